"""What `python -m bench.gpu` measures besides `python -m bench`: the device's ceilings, whole edits, training steps.

Each part prints a table whose second column begins with a number.
"""

import gc
import math
from functools import partial
from statistics import median

from cli import fast_precision

import torch
from PIL import Image
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.flop_counter import FlopCounterMode

from attention import reference
from bench.parts import noise, timed_calls, whole_model
from formats.export import choose_weights
from gpu.compiled import compile_model
from ip2p import InstructPix2Pix, loss
from p2p import PairNoise, sample_pairs
from stable_diffusion import StableDiffusion
from train import autocasting
from training import runs
from training.batches import encode_pairs
from training.presets import GPU_MEMORY, PRESETS
from unet import INSTRUCT_PIX2PIX, STABLE_DIFFUSION, ResBlock, Transformer, UNet

EXAMPLES = 10_000 * 1024  # that the paper's training sees
OPERATIONS, PRODUCTS = "operations of a UNet step, batch 3", "ceiling of matrix products"  # rows of `ceilings`


def ceilings(options):
    """The most that this device reaches, and how much a UNet step of full size asks of it."""
    size, count = (256, 2**20) if options.small else (8192, 2**31)
    a, b = noise(options, size, size), noise(options, size, size, seed=1)
    source, target = torch.zeros(2, count, dtype=torch.uint8, device=options.device)
    print("| | |", "|---|---|", sep="\n")
    for what, work, unit, run in (
        (PRODUCTS, 2 * size**3, "TFLOP/s", partial(torch.mm, a, b)),
        ("ceiling of copies", 2 * count, "TB/s", partial(target.copy_, source)),  # read and written
    ):
        timed_calls(run, options)  # to warm up
        print(f"| {what} | {work / timed_calls(run, options)[0] / 1e12:.4g} {unit} |")
    side = options.size // 8
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # its tensors take no memory
        UNet(INSTRUCT_PIX2PIX)(torch.zeros(3, 8, side, side), torch.zeros(3), torch.zeros(3, 77, 768), reference)
    print(f"| {OPERATIONS} | {counter.get_total_flops() / 1e12:.4g} TFLOP |")


# ---- whole runs ----


def edits(options):
    """A Prompt-to-Prompt pair, and edits of 100 and of 20 steps: as they are, and as sample.py --compile makes them."""
    print("| | time, median of 3 | its range | the first time | peak memory |", "|---" * 5 + "|", sep="\n")
    pair(options)
    torch.backends.cudnn.deterministic = True  # as sample.py
    editor = InstructPix2Pix(whole_model(options, INSTRUCT_PIX2PIX, options.to["dtype"]))
    edit = partial(editor.edit, Image.effect_noise((options.size, options.size), 50), "make it night")
    for way in ("as it is", "compiled, CUDA graphs"):
        if way != "as it is" and options.device == "cuda":
            compile_model(editor, mode="reduce-overhead")
        for steps, sampler in ((100, "euler_ancestral"), (20, "unipc")):
            run = partial(edit, steps=2 if options.small else steps, sampler=sampler, resolution=options.size)
            row(f"an edit, {steps} steps of {sampler}, {way}", run, options)


def pair(options):
    """A pair whose second image borrows the first one's self-attention maps in half of the steps."""
    model = StableDiffusion(whole_model(options, STABLE_DIFFUSION, options.to["dtype"]))
    steps, side = 2 if options.small else 100, options.size // model.vae.config.factor
    randomness = PairNoise([0], (4, side, side), guidance=(7.5, 7.5), p=(0.5, 0.5), device=options.device)
    run = partial(sample_pairs, model, ["a house"], ["a house at night"], randomness, steps)
    row(f"a Prompt-to-Prompt pair, {steps} steps", run, options)


def row(what, run, options):
    """Print the row of the table for a function, which is called once and then three times more."""
    calls = 2 if options.small else 4
    (first, *times), peaks = zip(*(timed_calls(run, options) for _ in range(calls)), strict=True)
    spread = f"{min(times):.3g} to {max(times):.3g} s | {first:.3g} s"
    print(f"| {what} | {median(times):.3g} s | {spread} | {max(peaks) / 1e9:.2f} GB |")


# ---- training ----


def training(options):
    """What train.py's presets take on this device, and how long for as many examples as the paper's."""
    runs.join(options.device)  # the settings of torch that train.py has
    columns = "of a micro-batch | of an update | examples a second | the paper's 10.24 million | peak memory"
    print(f"| | seconds {columns} |", "|---" * 6 + "|", sep="\n")
    for name, expected in GPU_MEMORY.items():
        for side in (64,) if options.small else (256, 512):
            gc.collect()
            torch.cuda.empty_cache()  # of the preset before
            what, known = f"training, {name}, {side}x{side}", f" (train.py: {expected} at 256x256)"
            try:
                micro, update, peak = training_step(PRESETS[name], side, options)
            except torch.OutOfMemoryError:
                print(f"| {what} | out of memory | | | | {known} |")
                continue
            total, batch_size = PRESETS[name]["total_batch_size"], PRESETS[name]["batch_size"]
            rate = total / (total / batch_size * micro + update)
            times, hours = f"{micro:.3g} | {update:.3g} | {rate:.3g}", f"{EXAMPLES / rate / 3600:.3g} hours"
            print(f"| {what} | {times} | {hours} | {peak / 1e9:.1f} GB{known} |")


def training_step(preset, side, options):
    """(seconds of a micro-batch, seconds of an update of the weights, peak bytes), as in train.py, not compiled.

    A micro-batch: encoding, and the UNet's forward and backward pass. An update: clipping, the optimizer's step and the
    moving average. No images are read from a disk.
    """
    precision, batch = preset["mixed_precision"], 2 if options.small else preset["batch_size"]
    autocast = autocasting(options.device, fast_precision(options.device) if precision == "auto" else precision)
    editor = InstructPix2Pix(whole_model(options, INSTRUCT_PIX2PIX, torch.float32))
    choose_weights(editor.unet, preset["trainable"], preset["rank"])
    if preset["gradient_checkpointing"]:
        apply_activation_checkpointing(editor.unet, check_fn=lambda layer: isinstance(layer, ResBlock | Transformer))
    weights = {name: weight for name, weight in editor.unet.named_parameters() if weight.requires_grad}
    ema = {name: w.detach().to(preset["ema_device"] or options.device, copy=True) for name, w in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), preset["lr"], fused=True)
    images = torch.rand(2, batch, 3, side, side) * 2 - 1
    t, u = torch.randint(1000, (batch,), device=options.device), torch.rand(batch, device=options.device)

    def micro_batch():
        image_latent, latent, _ = encode_pairs(editor.vae, autocast, *images)
        with autocast():
            text, null_text = editor.encode_text(["make it night"] * batch).float(), editor.null_text.float()
            eps = torch.randn_like(latent)
            each = loss(editor.unet, editor.schedule, latent, image_latent, text, null_text, t, eps, u)
        each.mean().backward()

    def update():
        torch.nn.utils.clip_grad_norm_(weights.values(), preset["grad_clip"] or math.inf).item()
        optimizer.step()  # the gradients stay, so that it can be repeated
        runs.update_ema(ema, weights, preset["ema_decay"])

    micro_batch()
    update()  # to warm up
    (micro, peak), (seconds, later) = (timed_calls(run, options, least=1) for run in (micro_batch, update))
    return micro, seconds, max(peak, later)
