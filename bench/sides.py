"""What bench.py measures, in processes of their own: either side's networks, ready to run, and its loading of them.

And what it shares with bench_ladder.py: such processes, the clock, the memory, the comparison of outputs.
"""

# Nothing heavy is imported here, since bench.py answers --help and mistakes at once.
import functools
import gc
import itertools
import os
import re
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # random models, and the ways to diffusers

OURS, THEIRS, MAPS = "ours", "diffusers", "with maps"
NETWORKS = {  # what it is, our call, their call
    "unet": ("UNet step, batch 3", lambda net, *inputs: net(*inputs), lambda net, *inputs: net(*inputs).sample),
    "encode": ("VAE encoder", lambda net, x: net.encode(x).mode(), lambda net, x: net.encode(x).latent_dist.mode()),
    "decode": ("VAE decoder", lambda net, z: net.decode(z), lambda net, z: net.decode(z).sample),
    "text": ("text encoder", lambda net, ids: net(ids), lambda net, ids: net(ids).last_hidden_state),
}
TRAIN = "train"
PAIRS = {  # Prompt-to-Prompt, beside the same with attention maps in memory
    "p2p-layer": "one layer of self-attention",
    "p2p": "UNet step, batch 4: one pair",
}
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # most that two outputs may differ, relatively
SHORT = 0.5  # seconds; what is faster is repeated for so long, and averaged


class Settings(NamedTuple):
    """What a measuring process has to know."""

    device: str
    dtype: str
    size: int  # pixels of the picture's side
    small: bool  # tiny networks, to try this program


def first_output(side, part, settings):
    """Make a network and run it once, which warms it up -> its output as an array."""
    run = prepared(side, part, settings)
    forget_peak(settings.device)
    return run().float().cpu().numpy()


def timed(side, part, settings):
    """(seconds a run takes, peak bytes so far)."""
    return seconds_each(prepared(side, part, settings), settings.device), peak(settings.device)


def seconds_each(run, device):
    """The mean time of a call of `run`: of one, or of as many as `SHORT` lasts."""
    synchronise(device)
    runs, start, elapsed = 0, time.perf_counter(), 0
    while elapsed < SHORT:
        run()
        synchronise(device)
        runs, elapsed = runs + 1, time.perf_counter() - start
    return elapsed / runs


@functools.cache
def prepared(side, part, settings):
    """Make one side's network and its input, both the same on either side -> the function () -> output."""
    import torch

    network, (unet, vae, text), noise = made(side, part, settings)
    latent = settings.size // vae.factor
    if part in PAIRS:
        return pair_prepared(part, side, network, noise, latent, text.tokens)
    if part == TRAIN:
        latents = noise(1, unet.in_channels, latent // 2, latent // 2)
        return training_prepared(side, network, latents, noise(1, text.tokens, text.width))
    if part == "unet":
        inputs = step_inputs((unet, vae, text), noise, settings)
    elif part == "text":
        ids = torch.randint(text.end_token, (1, text.tokens), generator=torch.Generator().manual_seed(0))
        inputs = (ids.to(settings.device),)
    else:
        inputs = (noise(1, 3, settings.size, settings.size) if part == "encode" else noise(1, 4, latent, latent),)
    _, ours, theirs = NETWORKS[part]
    return torch.no_grad()(functools.partial(ours if side == OURS else theirs, network, *inputs))


def made(side, part, settings):
    """One side's network, on its device; the configurations of UNet, VAE and text encoder; noise(*shape), seeded."""
    import torch

    model = blank_model(settings.small, in_channels=4 if part in PAIRS else 8)
    network = {"text": model.text_encoder, "encode": model.vae, "decode": model.vae}.get(part, model.unet)
    if part != "p2p-layer":  # which needs no weights, so that its peak memory is its own
        randomised(network)
    if side == THEIRS:
        import reference  # the tests' way to diffusers and transformers

        makers = {"unet": reference.unet_reference, "text": reference.text_reference}
        makers[TRAIN] = makers["unet"]
        network = makers.get(part, reference.vae_reference)(network)
    if part != "p2p-layer":
        network.to(settings.device, getattr(torch, settings.dtype))

    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(settings.device, getattr(torch, settings.dtype))

    return network, (model.unet.config, model.vae.config, model.text_encoder.config), noise


def step_inputs(configs, noise, settings):
    """What the UNet is given at one step of an edit, its three branches as one batch: (z, t, context)."""
    import torch

    unet, vae, text = configs
    latent = settings.size // vae.factor
    z, t = noise(3, unet.in_channels, latent, latent), torch.full((3,), 500.0, device=settings.device)
    return z, t, noise(3, text.tokens, text.width)


def training_prepared(side, unet, latents, context):
    """One side's function () -> gradient of the first convolution, which comes from that of every layer behind it."""
    import torch

    from diffusion import NoiseSchedule
    from ip2p import loss

    unet.requires_grad_(True)
    schedule, (latent, image_latent) = NoiseSchedule(), latents.chunk(2, dim=1)
    t, kept = torch.tensor([500], device=latent.device), torch.ones(1, device=latent.device)

    def predict_eps(*inputs):
        return unet(*inputs) if side == OURS else unet(*inputs).sample

    def step():
        unet.zero_grad()
        loss(predict_eps, schedule, latent, image_latent, context, context, t, latent, kept).mean().backward()
        return unet.conv_in.weight.grad

    return step


def pair_prepared(part, side, unet, noise, latent, tokens):
    """One side's function () -> output of a pair, sampled at a step at which its control acts."""
    import torch

    from attention import Layer
    from p2p import PairControl

    def with_maps(q, k, v, layer):
        """The control as the papers write it: the second picture's map is overwritten by the first one's."""
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [4, H, N, M]
        if not layer.cross:
            maps[1::2] = maps[::2]
        return maps @ v

    level, z = unet.config.levels[0], noise(4, unet.config.in_channels, latent, latent)
    attend = PairControl(100, torch.tensor([0.9])) if side == OURS else with_maps
    if part == "p2p-layer":
        q, k, v = (noise(4, level.heads, latent**2, level.channels // level.heads) for _ in range(3))
        return torch.no_grad()(functools.partial(attend, q, k, v, Layer(0, "down", False, (latent, latent))))
    inputs = z, torch.full((4,), 999.0, device=z.device), noise(4, tokens, unet.config.context_width)
    return torch.no_grad()(functools.partial(unet, *inputs, attend=attend))


def blank_model(small, in_channels=8):
    """A model of Stable Diffusion 1.5's size whose weights take no memory yet; or a tiny one. 8 channels: an editor."""
    import torch
    from random_model import random_model
    from tokenizers.pre_tokenizers import ByteLevel

    from clip_text import CLIP_L_TEXT, END, START, CLIPText, CLIPTokenizer
    from formats.checkpoint import Model
    from unet import STABLE_DIFFUSION, UNet
    from vae import STABLE_DIFFUSION_VAE, VAE

    if small:
        return random_model(in_channels=in_channels)
    # a tokenizer of CLIP's size and making, but with made-up merges
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]
    merges = list(itertools.islice(itertools.product(letters, pieces), CLIP_L_TEXT.vocabulary - len(pieces) - 2))
    pieces += [left + right for left, right in merges] + [START, END]
    tokenizer = CLIPTokenizer({piece: number for number, piece in enumerate(pieces)}, merges)
    with torch.device("meta"):
        unet = UNet(replace(STABLE_DIFFUSION, in_channels=in_channels))
        return Model(unet, VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT), tokenizer)


def randomised(network):
    """Give a network memory and seeded random weights, and return it."""
    from random_model import randomise

    return randomise(network.to_empty(device="cpu"), seed=0).eval().requires_grad_(False)


def write_models(folder, settings):
    """Write "model" and "tiny", each as a folder and as one file beside it -> the bytes of model.safetensors."""
    from formats.checkpoint import save_folder, save_single_file

    for name, small in [("model", settings.small), ("tiny", True)]:
        model, path = blank_model(small), Path(folder, name)
        for network in (model.unet, model.vae, model.text_encoder):
            randomised(network)
        save_folder(model, path)
        save_single_file(model, path.with_suffix(".safetensors"))
    os.sync()  # the disk is quiet when the clock runs; what was written stays in the system's cache
    return Path(folder, "model.safetensors").stat().st_size


def load(side, kind, folder, settings):
    """Load "model" -> (seconds, peak bytes) of the call; the same with all weights read; the networks' norms [3]."""
    import numpy as np
    import torch

    kinds = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}

    def stop():
        synchronise(settings.device)
        return time.perf_counter() - start, peak("cpu")

    opened(side, kind, Path(folder, "tiny"), **kinds)  # what a process does once, importing above all, is not counted
    gc.collect()
    forget_peak("cpu")
    start = time.perf_counter()
    model = opened(side, kind, Path(folder, "model"), **kinds)
    call = stop()
    networks = (model.unet, model.vae, model.text_encoder)
    norms = np.array([sum(torch.linalg.vector_norm(w).item() for w in net.parameters()) for net in networks])
    return call, stop(), norms


def opened(side, kind, folder, device, dtype):
    """Load a model from its folder, or from the single file beside it, of which the folder holds what it lacks."""
    file = folder.with_suffix(".safetensors")
    if side == OURS:
        from formats import checkpoint

        return checkpoint.load(file if kind == "file" else folder, device, dtype, tokenizer=folder)
    from diffusers import StableDiffusionInstructPix2PixPipeline as Pipeline

    if kind == "file":
        return Pipeline.from_single_file(file, config=str(folder), dtype=dtype).to(device)
    return Pipeline.from_pretrained(folder, dtype=dtype).to(device)


def synchronise(device):
    """Wait until the device has done its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak(device):
    """Let the peak memory start anew from what is held now."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    """The most bytes held since `forget_peak`; None where Linux does not tell.

    Not getrusage's ru_maxrss, which never falls and which a process inherits from the one that starts it.
    """
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def held(device):
    """The bytes held now; None where Linux does not tell."""
    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else status_bytes("VmRSS")


def status_bytes(name):
    """What Linux tells of this process under a name, in bytes; None where it does not."""
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


# ---- in any process ----


def own_process():
    """A process that starts from nothing and keeps what it makes until its `with` block ends."""
    quiet = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=quiet)


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs| of two arrays; not a number where one holds what is none."""
    import numpy as np

    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def gigabytes(count):
    """Bytes for people."""
    return "unknown" if count is None else f"{count / 1e9:.2f} GB"


def say(message):
    """Progress, on stderr: stdout is for the table."""
    print(f"bench.py: {message}", file=sys.stderr, flush=True)
