"""What `python -m bench` measures: parts in several variants, each made with equal random weights and equal inputs."""

import gc
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch

from attention import reference
from clip_text import CLIP_L_TEXT, CLIPText, CLIPTokenizer
from formats.checkpoint import Model, load, save_folder, save_single_file
from gpu.compiled import compiled
from p2p import PairControl
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
    """(mean seconds of a call, peak bytes of the process or None); calls are repeated for `least` seconds."""
    cuda, status, peak = options.device == "cuda", Path("/proc/self/status"), None
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    calls, elapsed, start = 0, 0, time.perf_counter()
    while elapsed < least:
        RUNS[title, variant]()
        if cuda:
            torch.cuda.synchronize()
        calls, elapsed = calls + 1, time.perf_counter() - start
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    elif status.exists():
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return elapsed / calls, peak


def made(variant, options):
    """An editor with seeded random weights, of Stable Diffusion 1.5's size or tiny; or diffusers' UNet and VAE."""
    with torch.device("meta"):
        model = Model(UNet(INSTRUCT_PIX2PIX), VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT), tokenizer=None)
    model = random_model() if options.small else model
    for network in (model.unet, model.vae, model.text_encoder):
        randomise(network.to_empty(device="cpu"), seed=0).eval()
    if variant.startswith("diffusers"):
        import reference  # the tests' module; here, so that diffusers takes no memory of ours

        model.unet, model.vae = reference.unet_reference(model.unet), reference.vae_reference(model.vae)
        for network in (model.unet, model.vae):
            network.register_forward_hook(lambda network, inputs, output: output.sample)
    return model


def noise(options, *shape, seed=0):
    """Standard normal noise, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**options.to)


# ---- how a variant is made: (variant, options) -> the function () -> output ----


def unet_step(variant, options, batch=3, train=False):
    """A step of an edit, whose three branches are one batch, or of a Prompt-to-Prompt pair (batch 4).

    train: forward and backward pass at half the size -> the gradient of the first convolution, the last to be computed.
    """
    unet, side = made(variant, options).unet.to(**options.to), options.size // (16 if train else 8)
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
    vae, x = made(variant, options).vae.to(**options.to), noise(options, 1, 3, options.size, options.size)
    return lambda: vae.decode(vae.encode(x).mode()) if variant == "ours" else vae(x)


def loading(variant, options, suffix=""):
    """Load a model from its folder or the file beside it, and read all weights -> the norms of its networks, [3]."""
    folder = Path(options.folder, "model")
    if variant == "ours":
        read = partial(load, tokenizer=folder)
    else:
        from diffusers import StableDiffusionInstructPix2PixPipeline as Pipeline

        read = partial(Pipeline.from_single_file, config=str(folder)) if suffix else Pipeline.from_pretrained

    def norms():
        model = read(folder.with_suffix(suffix), dtype=options.to["dtype"])
        networks = [network.to(options.device) for network in (model.unet, model.vae, model.text_encoder)]
        return torch.stack([sum(weight.norm() for weight in network.parameters()) for network in networks])

    return norms


def write_model(options):
    """Write the model to load, as a folder and as one file beside it."""
    from reference import real_vocabulary

    model, folder = made("ours", options), Path(options.folder, "model")
    if not options.small:
        model.tokenizer = CLIPTokenizer(*real_vocabulary())
    save_folder(model, folder)
    save_single_file(model, folder.with_suffix(".safetensors"))


BOTH, PAIR = ("ours", "diffusers"), ("no maps in memory", "maps in memory")
ON_CUDA = "compiled", "compiled, CUDA graphs", "diffusers, compiled"  # where alone these are measured
LADDER = ("reference attention", "fused attention", *ON_CUDA, "diffusers")
PARTS = {  # title: what --only calls it, the variants, of which ratios are to the last one, how they are made
    "UNet step": ("unet", BOTH, unet_step),
    "VAE, encoder and decoder": ("vae", BOTH, autoencoding),
    "forward and backward pass, batch 1, half the size": ("train", BOTH, partial(unet_step, batch=1, train=True)),
    "UNet step of a Prompt-to-Prompt pair": ("p2p", PAIR, partial(unet_step, batch=4)),
    "load one file": ("load", BOTH, partial(loading, suffix=".safetensors")),
    "load a folder": ("load", BOTH, loading),
    "UNet step, trick by trick": ("ladder", LADDER, unet_step),
}
