"""The command line of train.py: presets, and flags that override them."""

import os
import shutil
from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter
from pathlib import Path
from textwrap import fill

from cli import FRACTION, SCALE, STEPS, WHOLE, Parser, UserError, between, check_device, fast_precision, own_device

import torch

PAPER = {
    # as the released code trains: 32-bit floats, gradients not clipped. It resizes to exactly 256 pixels where the
    # paper's text says 256 to 288; here we follow the text.
    "resolution": 256, "max_resize": 288, "batch_size": 32, "total_batch_size": 1024, "max_steps": 10_000,
    "lr": 1e-4, "warmup_steps": 0, "lr_decay": 0.0, "beta2": 0.999, "weight_decay": 0.01, "grad_clip": 0.0,
    "ema_decay": 0.9999, "ema_device": None, "loss_weighting": "none", "trainable": "full", "rank": 32,
    "gradient_checkpointing": False, "cache_latents": False, "mixed_precision": "no",
}  # fmt: skip
SMALLER = {  # on one GPU: activations are computed twice instead of kept, and the EMA lies in main memory
    **PAPER,
    "max_resize": 256, "batch_size": 16, "gradient_checkpointing": True, "ema_device": "cpu", "grad_clip": 1.0,
    "mixed_precision": "auto",
}  # fmt: skip
PRESETS = {
    "paper": PAPER,
    "24gb": {**SMALLER, "total_batch_size": 256},
    "12gb": {**SMALLER, "total_batch_size": 128, "trainable": "lora"},
    "mini": {  # the miniature: images as they are, encoded once
        **PAPER,
        "resolution": 0, "max_resize": None, "total_batch_size": None, "max_steps": 32_500, "lr": 6e-4,
        "warmup_steps": 100, "lr_decay": 0.33, "beta2": 0.99, "grad_clip": 1.0, "ema_decay": 0.999,
        "loss_weighting": "balanced", "cache_latents": True, "mixed_precision": "auto",
    },  # fmt: skip
}

# GB for Stable Diffusion 1.5 at 256x256: bench/README.md, and for the paper's 32-bit floats its activations twice
GPU_MEMORY = {"paper": 42, "24gb": 17, "12gb": 6}


def parse(arguments=None):
    """The settings of a training, as a namespace in which every value is decided. Raises UserError."""
    description = "Train an editor from a text-to-image model. To write it to a file: train.py export --help"
    parser = Parser(prog="train.py", description=description, allow_abbrev=False)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["what the presets set:", *map(described, PRESETS)])
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="pairs, as datagen.py images leaves them")
    start = parser.add_mutually_exclusive_group(required=True).add_argument
    start("--init", metavar="PATH", help="Stable Diffusion weights, such as sd15 or mini, or an editor's")
    start("--distill", metavar="PATH", help="an editor, whose edits it learns in 4 steps (or --sampling-steps)")
    add("--out", type=Path, required=True, metavar="DIR", help="for all that the run writes")
    add("--preset", choices=PRESETS, default="paper", help="defaults of all other flags (default: paper)")
    add("--resume", action="store_true", help="resume the run in --out, if there is one")
    add("--resolution", type=between(0, 4096), metavar="R", help="pixels a side of the crops; 0 for images as they are")
    add("--max-resize", type=int, metavar="R", help="before a crop, the shorter side is randomly up to this large")
    add("--batch-size", type=WHOLE, metavar="B", help="pairs that a process computes at once")
    add("--grad-accum", type=WHOLE, metavar="N", help="micro-batches a step")
    add("--total-batch-size", type=WHOLE, metavar="B", help="pairs a step, of all processes and micro-batches")
    add("--max-steps", type=WHOLE, metavar="N", help="training steps")
    add("--lr", type=FRACTION, metavar="X", help="learning rate")
    add("--warmup-steps", type=between(0), metavar="N", help="steps of linear warmup")
    add("--lr-decay", type=FRACTION, metavar="F", help="the last fraction of all steps, of linear decay")
    add("--beta2", type=between(0, 0.99999, float), metavar="X", help="AdamW's")
    add("--weight-decay", type=FRACTION, metavar="X", help="AdamW's")
    add("--grad-clip", type=between(0, kind=float), metavar="X", help="largest norm of a gradient; 0 for no clipping")
    add("--ema-decay", type=FRACTION, metavar="X", help="of the weights' moving average, which becomes the editor")
    add("--ema-device", metavar="D", help="where that average lies")
    add("--mixed-precision", choices=["no", "fp16", "bf16", "auto"], help="autocast's number format")
    add("--gradient-checkpointing", action=BooleanOptionalAction, help="compute activations twice")
    add("--cache-latents", action=BooleanOptionalAction, help="encode once, in memory; without random crops")
    add("--loss-weighting", choices=["none", "balanced"], help="balanced: all noise levels count about alike")
    add("--trainable", choices=["full", "attention", "lora"], help="all weights, attention and conv_in, or LoRA")
    add("--rank", type=WHOLE, metavar="N", help="LoRA's")
    edits = parser.add_mutually_exclusive_group().add_argument
    edits("--subset", type=amount, metavar="N", help="number of edits to train on, or a fraction such as 0.1")
    edits("--overfit", type=WHOLE, metavar="N", help="train on so few edits, not augmented: what to try first")
    add("--compile", action=BooleanOptionalAction, help="torch.compile the UNet (default: on a GPU)")
    add("--seed", type=between(0, 10**8), default=0, metavar="S", help="of all randomness (default: 0)")
    add("--save-every", type=WHOLE, default=500, metavar="N", help="steps between two states (default: 500)")
    add("--eval-every", type=WHOLE, metavar="N", help="steps between evaluations (default: a tenth of all, or 100)")
    add("--keep", type=WHOLE, default=2, metavar="K", help="newest states that are kept (default: 2)")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    add("--threads", type=WHOLE, metavar="N", help="CPU threads (default: all cores)")
    add("--workers", type=between(0), default=4, metavar="N", help="processes that read images; at most one a core")
    noted = "noted in the model as its default for sampling (default: that of --init)"
    add("--sampling-steps", type=STEPS, metavar="N", help=f"denoising steps, {noted}")
    add("--cfg-text", type=SCALE, metavar="S_T", help=f"text guidance, {noted}")
    add("--cfg-image", type=SCALE, metavar="S_I", help=f"image guidance, {noted}")
    options = parser.parse_args(arguments)
    decide(options, int(os.environ.get("WORLD_SIZE", 1)))
    return options


def described(name):
    """What a preset sets, as a paragraph; of the others only what differs from the paper's."""
    if name == "paper":
        return paragraph("paper", PAPER)
    return paragraph(f"{name}, as paper but", {k: value for k, value in PRESETS[name].items() if value != PAPER[k]})


def paragraph(title, settings):
    """Settings {name: value} as text under a title."""
    text = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in settings.items())
    return fill(f"{title}: {text}", 100, subsequent_indent="    ", break_on_hyphens=False)


def amount(text):
    """A number of edits, "500", or a fraction of all, "0.1"."""
    return FRACTION(text) if "." in text else WHOLE(text)


def decide(options, processes):
    """Put the preset's value where the command line gave none, and decide what follows from other settings."""
    preset = dict(PRESETS[options.preset])
    if options.grad_accum:
        preset["total_batch_size"] = None
    if options.resolution and preset["max_resize"]:  # as much larger as the preset has it
        preset["max_resize"] = options.resolution * preset["max_resize"] // preset["resolution"]
    vars(options).update((name, value) for name, value in preset.items() if getattr(options, name) is None)

    if options.distill:
        options.init, options.distill, options.sampling_steps = options.distill, True, options.sampling_steps or 4
        if options.batch_size % options.sampling_steps:
            raise UserError(f"--batch-size should be a multiple of the student's {options.sampling_steps} steps")
    if options.resolution and options.max_resize and options.max_resize < options.resolution:
        raise UserError(f"--max-resize should be at least the resolution, {options.resolution}")
    options.cache_latents = options.cache_latents or bool(options.overfit)
    if not options.resolution and not options.cache_latents:
        raise UserError("images as they are (--resolution 0) need --cache-latents")
    options.resolution = options.resolution or None
    options.max_resize = None if options.cache_latents else options.max_resize

    each = options.batch_size * processes
    total = options.total_batch_size or each * (options.grad_accum or 1)
    options.grad_accum = options.grad_accum or total // each
    if total != each * options.grad_accum:
        raise UserError(f"--total-batch-size {total} is not {each} (--batch-size of all processes) times --grad-accum")
    options.total_batch_size = total
    options.eval_every = options.eval_every or max(100, options.max_steps // 10)

    for device in {options.device, options.ema_device or options.device}:
        check_device(own_device(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options.workers = min(options.workers, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if options.compile is None:
        options.compile = torch.device(options.device).type == "cuda"
    if options.mixed_precision == "auto":
        options.mixed_precision = fast_precision(options.device)


def outlook(options, trained):
    """What a run with so many trained weights will do and take, in a few lines. Its folder should be there."""
    lines, device = [paragraph("settings", vars(options))], torch.device(own_device(options.device))
    if needed := GPU_MEMORY.get(options.preset):
        here = f"this run is on {device}, see --device"
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory / 1e9
            here = f"{device} has {memory:.0f} GB, {'enough' if memory > needed else 'too little'}"
        lines.append(f"GPU memory: {options.preset} takes {needed} GB for Stable Diffusion 1.5 at 256x256; {here}")
    state, free = 16 * trained / 1e9, shutil.disk_usage(options.out).free / 1e9  # weight, average, AdamW's two moments
    states = f"{state:.2g} GB a state ({trained / 1e6:.1f} million trained weights), the newest {options.keep} are kept"
    enough = "enough" if free > (options.keep + 1) * state else "too little"
    lines.append(f"disk: {states}; {free:.0f} GB are free, {enough}; the model at the end is in half precision")
    return "\n".join(lines)


def parse_export(arguments):
    """The command line of `train.py export`."""
    parser = Parser(prog="train.py export", description="Write a run's editor, from its newest state.")
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="the --out of the training")
    add("--out", type=Path, required=True, metavar="PATH", help="a folder, or a .safetensors file; in half precision")
    add("--init", metavar="PATH", help="the model that the training began with, if it was moved")
    add("--lora", action="store_true", help="only what LoRA has learned, as a file for diffusers")
    add("--raw", action="store_true", help="the last weights, not their moving average")
    options = parser.parse_args(arguments)
    ending = options.out.suffix.lower()
    if ending in (".ckpt", ".pt", ".pth", ".bin") or (options.lora and ending != ".safetensors"):
        raise UserError(f"--out {options.out} should end in .safetensors{'' if options.lora else ', or be a folder'}")
    return options
