"""What `python -m bench` measures: parts in several variants, each made with equal random weights and equal inputs."""

import gc
import sys
import time
from functools import partial
from pathlib import Path

from cli import atomic_write

import torch
from torch.nn.attention.flex_attention import flex_attention

from attention import Layer, reference, split_heads
from clip_text import CLIP_L_TEXT, CLIPText
from formats.checkpoint import Model
from gpu.compiled import compiled
from p2p import PairControl
from training.runs import peak_memory
from unet import INSTRUCT_PIX2PIX, UNet
from vae import STABLE_DIFFUSION_VAE, VAE

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # random_model; reference, the way to diffusers
from random_model import random_model, randomise, small_tokenizer  # noqa: E402

RUNS = {}  # {(title, variant): the function () -> output}, in the process that measures it


def first_output(title, variant, options):
    """Make a variant and warm it up -> its output as float32 on the CPU."""
    RUNS[title, variant] = torch.no_grad()(PARTS[title][2](variant, options))
    return RUNS[title, variant]().float().cpu()


def timed(title, variant, options):
    """`timed_calls` of a variant that `first_output` has made."""
    return timed_calls(RUNS[title, variant], options)


def timed_calls(run, options, least=0.2):
    """(mean seconds of a call of `run()`, peak bytes, 0 where unknown); calls are repeated for `least` seconds."""
    least = 0.01 if options.small else least
    cuda, clear = options.device == "cuda", Path("/proc/self/clear_refs")
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif clear.exists():
        clear.write_text("5")  # the peak starts anew from what is held now
    calls, elapsed, start = 0, 0, time.perf_counter()
    while elapsed < least:
        run()
        if cuda:
            torch.cuda.synchronize()
        calls, elapsed = calls + 1, time.perf_counter() - start
    return elapsed / calls, torch.cuda.max_memory_allocated() if cuda else peak_memory()


def trace(options):
    """Write a trace of one UNet step to the file that the options name."""
    step = torch.no_grad()(unet_step("fused attention", options))
    step()  # to warm up
    with torch.profiler.profile() as profile:
        step()
        if options.device == "cuda":
            torch.cuda.synchronize()
    with atomic_write(options.trace) as beside:
        profile.export_chrome_trace(str(beside))


# ---- how a variant is made: (variant, options) -> the function () -> output ----


def made(network, variant, options):
    """Our UNet or VAE with seeded random weights, of Stable Diffusion 1.5's size or tiny; or diffusers'."""
    if options.small:
        ours = getattr(random_model(), network)
    else:
        with torch.device("meta"):
            ours = UNet(INSTRUCT_PIX2PIX) if network == "unet" else VAE(STABLE_DIFFUSION_VAE)
    ours = randomise(ours.to_empty(device=options.device), seed=0).eval()
    if not variant.startswith("diffusers"):
        return ours.to(**options.to)
    import reference  # the tests' module; here, so that diffusers takes no memory of ours

    theirs = getattr(reference, f"{network}_reference")(ours)
    theirs.register_forward_hook(lambda network, inputs, output: output.sample)
    return theirs.to(**options.to)


def whole_model(options, config, dtype):
    """A `Model` with seeded random weights: of Stable Diffusion 1.5's size but for the UNet's config, or small."""
    if options.small:
        model = random_model(in_channels=config.in_channels)
    else:
        with torch.device(options.device):
            networks = UNet(config), VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT)
        model = Model(*(randomise(network, seed=0).eval() for network in networks), small_tokenizer(CLIP_L_TEXT.tokens))
    for network in (model.unet, model.vae, model.text_encoder):
        network.to(options.device, dtype)
    return model


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
    if "channels_last" in variant:
        unet.to(memory_format=torch.channels_last)
    if "compiled" in variant:
        unet = compiled(unet, mode="reduce-overhead" if "graphs" in variant else None)
    if variant == "OpenVINO":
        return openvino_step(unet, z, t, context)
    pair = PairControl(100, torch.tensor([0.9]))
    ways = {"reference attention": reference, "maps in memory": with_maps, "no maps in memory": pair}
    attend = [ways[variant]] if variant in ways else []

    @torch.enable_grad()
    def gradient():
        unet.zero_grad()
        unet(z, t, context).square().mean().backward()
        return unet.conv_in.weight.grad

    return gradient if train else lambda: unet(z, t, context, *attend)


def openvino_step(unet, *inputs):
    """The UNet as OpenVINO runs it (pip install openvino): what is made for speed on CPUs."""
    import openvino

    with torch.no_grad():
        model = openvino.convert_model(unet, example_input=inputs)
    run = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda: torch.from_numpy(run([x.numpy() for x in inputs])[0])


def with_maps(q, k, v, layer):
    """Attention of a pair as in the papers' code, which overwrites the second image's maps [4, H, N, M]."""
    maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    if not layer.cross:
        maps[1::2] = maps[::2]
    return maps @ v


def pair_attention(variant, options):
    """The largest self-attentions of a pair's UNet step, five layers of either size."""
    shapes = ((options.size // 8) ** 2, 40), ((options.size // 16) ** 2, 80)  # N and D
    inputs = [[split_heads(noise(options, 4, n, 8 * d, seed=seed), 8) for seed in range(3)] for n, d in shapes]
    attend = partial(PairControl(100, torch.tensor([0.9])), layer=Layer(0, "down", False, (0, 0)))
    if "FlexAttention" in variant:
        attend = torch.compile(one_map, dynamic=False, fullgraph=True)
    return lambda: torch.cat([attend(*qkv).flatten() for qkv in inputs * 5])


def one_map(q, k, v):
    """q, k and v [4, H, N, D] of a pair: the first image's map, for the values of both side by side."""
    out = flex_attention(q[::2], k[::2], torch.cat([v[::2], v[1::2]], dim=-1))  # [2, H, N, 2 D]
    return torch.stack(out.chunk(2, dim=-1), dim=1).flatten(0, 1)


def autoencoding(variant, options):
    """An image to the mode of its latent, and that to an image."""
    vae, x = made("vae", variant, options), noise(options, 1, 3, options.size, options.size)
    return lambda: vae.decode(vae.encode(x).mode()) if variant == "ours" else vae(x)


BOTH, PAIR = ("ours", "diffusers"), ("no maps in memory", "maps in memory")
ON_CUDA = (  # where alone these are measured
    *("fused attention, channels_last", "compiled, channels_last", "compiled, CUDA graphs"),
    *("compiled, channels_last, CUDA graphs", "diffusers, compiled, channels_last", "FlexAttention, compiled"),
)
LADDER = ("reference attention", "fused attention", *ON_CUDA[:-1], "diffusers")
FLEX = ("FlexAttention, compiled", "fused attention")
PARTS = {  # title: what --only calls it, the variants, of which ratios are to the last one, how they are made
    "UNet step": ("unet", BOTH, unet_step),
    "VAE, encoder and decoder": ("vae", BOTH, autoencoding),
    "forward and backward pass, batch 1, half the size": ("train", BOTH, partial(unet_step, batch=1, train=True)),
    "UNet step of a Prompt-to-Prompt pair": ("p2p", PAIR, partial(unet_step, batch=4)),
    "UNet step, trick by trick": ("ladder", LADDER, unet_step),
    "self-attention of a pair": ("attention", FLEX, pair_attention),
    "UNet step beside OpenVINO": ("openvino", (*BOTH, "OpenVINO"), unet_step),
}
