"""What `python -m bench` measures: parts in several variants, each made with equal random weights and equal inputs."""

import gc
import sys
import time
from functools import partial
from pathlib import Path

import torch

from attention import reference
from gpu.compiled import compiled
from p2p import PairControl
from training.runs import peak_memory
from unet import INSTRUCT_PIX2PIX, UNet
from vae import STABLE_DIFFUSION_VAE, VAE

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # random_model; reference, the way to diffusers
from random_model import random_model, randomise  # noqa: E402

RUNS = {}  # {(title, variant): the function () -> output}, in the process that measures it


def first_output(title, variant, options):
    """Make a variant and warm it up -> its output as float32 on the CPU."""
    RUNS[title, variant] = torch.no_grad()(PARTS[title][2](variant, options))
    return RUNS[title, variant]().float().cpu()


def timed(title, variant, options, least=0.2):
    """(mean seconds of a call, peak bytes, 0 where unknown); calls are repeated for `least` seconds."""
    cuda, clear = options.device == "cuda", Path("/proc/self/clear_refs")
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif clear.exists():
        clear.write_text("5")  # the peak starts anew from what is held now
    calls, elapsed, start = 0, 0, time.perf_counter()
    while elapsed < least:
        RUNS[title, variant]()
        if cuda:
            torch.cuda.synchronize()
        calls, elapsed = calls + 1, time.perf_counter() - start
    return elapsed / calls, torch.cuda.max_memory_allocated() if cuda else peak_memory()


# ---- how a variant is made: (variant, options) -> the function () -> output ----


def made(network, variant, options):
    """Our UNet or VAE with seeded random weights, of Stable Diffusion 1.5's size or tiny; or diffusers'."""
    if options.small:
        ours = getattr(random_model(), network)
    else:
        with torch.device("meta"):
            ours = UNet(INSTRUCT_PIX2PIX) if network == "unet" else VAE(STABLE_DIFFUSION_VAE)
    ours = randomise(ours.to_empty(device="cpu"), seed=0).eval()
    if not variant.startswith("diffusers"):
        return ours.to(**options.to)
    import reference  # the tests' module; here, so that diffusers takes no memory of ours

    theirs = getattr(reference, f"{network}_reference")(ours)
    theirs.register_forward_hook(lambda network, inputs, output: output.sample)
    return theirs.to(**options.to)


def noise(options, *shape, seed=0):
    """Standard normal noise, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**options.to)


def unet_step(variant, options, batch=3, train=False):
    """A step of an edit, whose three branches are one batch, or of a Prompt-to-Prompt pair (batch 4).

    train: forward and backward pass at half the size -> the gradient of the first convolution, the last to be computed.
    """
    unet, side = made("unet", variant, options), options.size // (16 if train else 8)
    z, t = noise(options, batch, 8, side, side), torch.full((batch,), 500.0, device=options.device)
    context = noise(options, batch, 77, 32 if options.small else 768, seed=1)
    if "compiled" in variant:
        settings = {"mode": "reduce-overhead"} if "graphs" in variant else {}
        unet = compiled(unet.to(memory_format=torch.channels_last), **settings)
    pair = PairControl(100, torch.tensor([0.9]))
    ways = {"reference attention": reference, "maps in memory": with_maps, "no maps in memory": pair}
    attend = [ways[variant]] if variant in ways else []

    @torch.enable_grad()
    def gradient():
        unet.zero_grad()
        unet(z, t, context).square().mean().backward()
        return unet.conv_in.weight.grad

    return gradient if train else lambda: unet(z, t, context, *attend)


def with_maps(q, k, v, layer):
    """Attention of a pair as in the papers' code, which overwrites the second image's maps [4, H, N, M]."""
    maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    if not layer.cross:
        maps[1::2] = maps[::2]
    return maps @ v


def autoencoding(variant, options):
    """An image to the mode of its latent, and that to an image."""
    vae, x = made("vae", variant, options), noise(options, 1, 3, options.size, options.size)
    return lambda: vae.decode(vae.encode(x).mode()) if variant == "ours" else vae(x)


BOTH, PAIR = ("ours", "diffusers"), ("no maps in memory", "maps in memory")
ON_CUDA = "compiled", "compiled, CUDA graphs", "diffusers, compiled"  # where alone these are measured
LADDER = ("reference attention", "fused attention", *ON_CUDA, "diffusers")
PARTS = {  # title: what --only calls it, the variants, of which ratios are to the last one, how they are made
    "UNet step": ("unet", BOTH, unet_step),
    "VAE, encoder and decoder": ("vae", BOTH, autoencoding),
    "forward and backward pass, batch 1, half the size": ("train", BOTH, partial(unet_step, batch=1, train=True)),
    "UNet step of a Prompt-to-Prompt pair": ("p2p", PAIR, partial(unet_step, batch=4)),
    "UNet step, trick by trick": ("ladder", LADDER, unet_step),
}
