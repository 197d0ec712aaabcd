"""The command line of train.py: presets, and flags that override them."""

import sys
from argparse import BooleanOptionalAction
from pathlib import Path

import torch

from cli import Parser, UserError, check_device, check_device_name, check_sampling, own_device

COMMON = {
    "largest": None,
    "batch": 32,
    "total": None,
    "accumulate": None,
    "steps": 10_000,
    "lr": 1e-4,
    "warmup": 0,
    "decay": 0.0,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "clip": 1.0,
    "ema": 0.9999,
    "ema_device": None,
    "balanced": False,
    "trainable": "full",
    "rank": 32,
    "checkpointing": False,
    "cache_latents": False,
}
PRESETS = {
    # Sec. A.1 of the paper: 256x256 crops of pictures made 256 to 288 large, 1024 pairs a step
    "paper": {**COMMON, "resolution": 256, "largest": 288, "total": 1024},
    # the same on one GPU: activations are computed twice instead of kept, and the average waits in main memory
    "24gb": {**COMMON, "resolution": 256, "batch": 16, "total": 256, "checkpointing": True, "ema_device": "cpu"},
    "12gb": {
        **COMMON,
        "resolution": 256, "batch": 16, "total": 128, "checkpointing": True, "ema_device": "cpu",
        "trainable": "lora",
    },
    # the miniature: pictures as they are, encoded once
    "mini": {
        **COMMON,
        "resolution": None, "steps": 32_500, "lr": 6e-4, "warmup": 100, "decay": 0.33, "beta2": 0.99,
        "ema": 0.999, "balanced": True, "cache_latents": True,
    },
}


def parse(arguments=None, processes=1):
    """The settings of a training: a namespace with every value decided. Raises UserError.

    processes: that train together.
    """
    about = "Train an editor from a text-to-image model."
    parser = Parser(prog="train.py", description=about, allow_abbrev=False)
    add = parser.add_argument
    needed = "--plan" not in (sys.argv[1:] if arguments is None else arguments)
    add("--data", type=Path, required=needed, metavar="DIR", help="pairs, as datagen.py images leaves them")
    add("--init", required=needed, metavar="PATH", help="Stable Diffusion weights, or an editor's")
    add("--out", type=Path, required=needed, metavar="DIR", help="for all that the run leaves")
    add("--plan", action="store_true", help="say what memory a step takes, and train nothing; only --init is looked at")
    add("--preset", choices=PRESETS, default="paper", help="where all other flags start from (default: paper)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--resolution", type=int, metavar="R", help="pixels a side of the crops; 0 for pictures as they are")
    add("--largest", type=int, metavar="R", help="before a crop, the shorter side is by chance up to so large")
    add("--batch", type=int, metavar="B", help="pairs a process computes at once")
    add("--accumulate", type=int, metavar="N", help="such passes a step")
    add("--total", type=int, metavar="B", help="pairs a step, of all processes and passes; in place of --accumulate")
    add("--steps", type=int, metavar="N", help="training steps")
    add("--lr", type=float, metavar="X", help="learning rate")
    add("--warmup", type=int, metavar="N", help="steps in which it rises")
    add("--decay", type=float, metavar="SHARE", help="the share of all steps, at the end, in which it falls")
    add("--beta2", type=float, metavar="X", help="AdamW's, of squared gradients")
    add("--weight-decay", type=float, metavar="X", help="AdamW's")
    add("--clip", type=float, metavar="X", help="the largest norm of a step's gradient; 0 for any")
    add("--ema", type=float, metavar="X", help="decay of the weights' moving average, which becomes the editor")
    add("--ema-device", metavar="D", help="where that average is kept")
    add("--balanced", action="store_true", default=None, help="let all noise levels count about alike")
    kinds = "all weights; those of attention and the first convolution; or small ones beside these (lora.py)"
    add("--trainable", choices=["full", "attention", "lora"], help=kinds)
    add("--rank", type=int, metavar="N", help="of LoRA's weights")
    add("--checkpointing", action="store_true", default=None, help="compute activations twice instead of keeping them")
    add("--cache-latents", action="store_true", default=None, help="encode once, in memory; no crops by chance")
    add("--subset", type=amount, metavar="N", help="so many of the pairs, or a share such as 0.1")
    add("--overfit", type=int, metavar="N", help="train on so few pairs, unchanged: what to try first")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="(default: auto)")
    compiled = "compile the UNet, and check its gradient, before the first step (default: on a GPU)"
    add("--compile", action=BooleanOptionalAction, help=compiled)
    add("--channels-last", action="store_true", help="another memory layout, faster on some GPUs")
    add("--seed", type=int, default=0, metavar="S", help="of all randomness (default: 0)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between two states (default: 500)")
    add("--keep", type=int, default=2, metavar="K", help="newest states that are kept (default: 2)")
    add("--look-every", type=int, metavar="N", help="steps between two sample sheets (default: a tenth of all)")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add("--workers", type=int, default=4, metavar="N", help="processes that read pictures (default: 4)")
    noted = "noted in the model as its default for sampling (default: that of --init)"
    add("--sampling-steps", type=int, metavar="N", help=f"denoising steps, {noted}")
    add("--cfg-text", type=float, metavar="S_T", help=f"text guidance, {noted}")
    add("--cfg-image", type=float, metavar="S_I", help=f"image guidance, {noted}")
    options = parser.parse_args(arguments)
    preset, given_total = PRESETS[options.preset], options.total
    if options.resolution and options.largest is None and preset["largest"]:  # as much larger as the preset has it
        options.largest = options.resolution * preset["largest"] // preset["resolution"]
    for name, value in preset.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    check(options)
    decide(options, processes, given_total)
    return options


def amount(text):
    """Read "500" as 500 and "0.1" as 0.1."""
    return float(text) if "." in text else int(text)


def check(options):
    """Raise UserError for a value out of range."""
    at_least_one = ("steps", "batch", "accumulate", "total", "save_every", "keep", "look_every", "threads", "overfit")
    for name in (*at_least_one, "rank", "sampling_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} should be at least 1, not {value}")
    ranges = {"lr": (0, 1), "beta2": (0, 1), "ema": (-1, 1), "decay": (-1, 1), "weight_decay": (-1, 10)}
    for name, (low, high) in ranges.items():
        if not low < getattr(options, name) < high or (low < 0 and getattr(options, name) < 0):
            wanted = f"from 0 to below {high}" if low < 0 else f"between 0 and {high}"
            raise UserError(f"--{name.replace('_', '-')} should be {wanted}, not {getattr(options, name)}")
    if not options.clip >= 0 or options.warmup < 0 or options.workers < 0:
        raise UserError("--clip, --warmup and --workers should be at least 0")
    whole = isinstance(options.subset, int) and options.subset > 0
    if options.subset is not None and not (whole or 0 < options.subset < 1):
        raise UserError(f"--subset should be a number of pairs, or a share above 0 and below 1, not {options.subset}")
    if options.subset and options.overfit:
        raise UserError("--subset and --overfit both say how many pairs; one of them is enough")
    if not 0 <= options.seed < 10**8:
        raise UserError(f"--seed should be between 0 and {10**8 - 1}, not {options.seed}")
    if options.resolution and options.largest and options.largest < options.resolution:
        raise UserError(f"--largest should be at least the resolution, {options.resolution}")
    check_sampling(options.sampling_steps, options.cfg_text, options.cfg_image, options.resolution or None)


def decide(options, processes, given_total):
    """Put in place what follows from other settings. given_total: what --total said."""
    if options.overfit:
        options.cache_latents = True
    if options.cache_latents:
        options.largest = None
    if not options.resolution:
        options.resolution = options.largest = None
        if not options.cache_latents:
            raise UserError("pictures as they are (--resolution 0) need --cache-latents")
    if options.accumulate is None:
        each = options.batch * processes
        if options.total and options.total % each:
            found = f"{processes} processes with a batch of {options.batch}" if processes > 1 else f"{options.batch}"
            raise UserError(f"a step of {options.total} pairs cannot be divided by {found}; change --total or --batch")
        options.accumulate = options.total // each if options.total else 1
    elif given_total not in (None, options.batch * options.accumulate * processes):
        raise UserError(f"--total {given_total} is not --batch times --accumulate times {processes} processes")
    options.total = options.batch * options.accumulate * processes
    options.look_every = options.look_every or max(1, options.steps // 10)
    for device in {options.device, options.ema_device or options.device}:
        (check_device_name if options.plan else check_device)(own_device(device))
    if options.compile is None:
        options.compile = torch.device(options.device).type == "cuda"
    if options.dtype == "auto":
        options.dtype = fast_dtype(torch.device(options.device).type)


def fast_dtype(kind):
    """The number format in which a kind of device computes fastest, without being too coarse to train in."""
    if kind == "cuda":
        absent = not torch.cuda.is_available()  # and only planned for
        return "bfloat16" if absent or torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if kind == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def parse_export(arguments):
    """The command line of `train.py export`."""
    parser = Parser(prog="train.py export", description="Write a run's editor, from its newest state.")
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="the --out of the training")
    add("--out", type=Path, required=True, metavar="PATH", help="a folder, or a .safetensors file")
    add("--lora", action="store_true", help="only what LoRA has learned, as a file for diffusers")
    add("--raw", action="store_true", help="the weights as they were last, not their moving average")
    return parser.parse_args(arguments)
