"""What `python -m bench` measures: parts in several variants, each made with equal random weights and equal inputs."""

import functools
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from attention import Layer, fused, reference
from clip_text import CLIP_L_TEXT, END, START, CLIPText, CLIPTokenizer
from diffusion import NoiseSchedule
from formats import checkpoint
from gpu import shared_maps
from gpu.compiled import compiled
from ip2p import loss
from p2p import PairControl
from unet import STABLE_DIFFUSION, UNet
from vae import STABLE_DIFFUSION_VAE, VAE

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # random_model; reference, the way to diffusers
from random_model import random_model, randomise  # noqa: E402

OURS, THEIRS = "ours", "diffusers"
LADDER = (
    *("reference attention", "fused attention", "compiled", "compiled, channels_last", "CUDA graphs"),
    *("diffusers, compiled", "diffusers, CUDA graphs", THEIRS),
)
ATTENTION = ("Triton kernel", "memory-efficient", "FlexAttention, compiled", "q and k padded", "a map for every value")
ON_CUDA = {*LADDER[2:-1], *ATTENTION[:3]}  # where alone these variants are measured


class Settings(NamedTuple):
    """What a measuring process has to know."""

    device: str
    dtype: str
    size: int  # pixels of the image's side
    small: bool  # tiny networks, to try this program
    folder: str | None = None  # of the model to load

    def noise(self, *shape, seed=0):
        """Standard normal noise, the same in every process."""
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device, getattr(torch, self.dtype))


def blank_model(settings, in_channels=8):
    """A model of Stable Diffusion 1.5's size whose weights take no memory yet; or a tiny one. 8 channels: an editor."""
    if settings.small:
        return random_model(in_channels=in_channels)
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]
    merges = list(itertools.islice(itertools.product(letters, pieces), CLIP_L_TEXT.vocabulary - len(pieces) - 2))
    pieces += [left + right for left, right in merges] + [START, END]  # a vocabulary of CLIP's size, but made up
    tokenizer = CLIPTokenizer({piece: number for number, piece in enumerate(pieces)}, merges)
    with torch.device("meta"):
        unet = UNet(replace(STABLE_DIFFUSION, in_channels=in_channels))
        return checkpoint.Model(unet, VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT), tokenizer)


def randomised(network):
    """Give a network memory and seeded random weights."""
    return randomise(network.to_empty(device="cpu"), seed=0).eval().requires_grad_(False)


def made(name, side, settings, in_channels=8):
    """(one side's network "unet", "vae" or "text" on its device, the blank model with the configurations)."""
    model = blank_model(settings, in_channels)
    network = randomised({"unet": model.unet, "vae": model.vae, "text": model.text_encoder}[name])
    if side.startswith(THEIRS):
        import reference  # the tests' module, which imports diffusers

        network = getattr(reference, f"{name}_reference")(network)
    return network.to(settings.device, getattr(torch, settings.dtype)), model


def step_inputs(model, settings, batch):
    """What the UNet is given at a step: (z, t, context)."""
    side, text = settings.size // model.vae.config.factor, model.text_encoder.config
    z = settings.noise(batch, model.unet.config.in_channels, side, side)
    t = torch.full((batch,), 500.0, device=settings.device)
    return z, t, settings.noise(batch, text.tokens, text.width, seed=1)


# ---- how variants are made: (variant, settings) -> the function () -> output ----


def unet_step(variant, settings):
    """A step of an edit, its three branches as one batch, from the textbook form to the fast one, and diffusers'."""
    unet, model = made("unet", variant, settings)
    z, t, context = step_inputs(model, settings, 3)
    if variant in ON_CUDA:
        if variant != "compiled":
            unet, z = unet.to(memory_format=torch.channels_last), z.to(memory_format=torch.channels_last)
        unet = compiled(unet, mode="reduce-overhead" if "graphs" in variant else None)
    if variant.startswith(THEIRS):
        return lambda: unet(z, t, context).sample
    return lambda: unet(z, t, context, reference if variant == "reference attention" else fused)


def vae_encoder(side, settings):
    """An image to the mode of its latent."""
    vae, _ = made("vae", side, settings)
    x = settings.noise(1, 3, settings.size, settings.size)
    return lambda: (vae.encode(x) if side == OURS else vae.encode(x).latent_dist).mode()


def vae_decoder(side, settings):
    """A latent to an image."""
    vae, model = made("vae", side, settings)
    z = step_inputs(model, settings, 1)[0][:, :4]
    return lambda: vae.decode(z) if side == OURS else vae.decode(z).sample


def text_encoder(side, settings):
    """Token ids to context."""
    network, model = made("text", side, settings)
    ids = torch.arange(model.text_encoder.config.tokens, device=settings.device)[None]
    return lambda: network(ids) if side == OURS else network(ids).last_hidden_state


def training_step(side, settings):
    """The output is the gradient of the first convolution, which comes from that of every layer behind it."""
    unet, model = made("unet", side, settings)
    unet.requires_grad_(True)
    latents, t, context = step_inputs(model, settings._replace(size=settings.size // 2), 1)
    latent, image_latent = latents.chunk(2, dim=1)
    no_dropout = torch.ones(1, device=settings.device)

    def predict_eps(*inputs):
        return unet(*inputs) if side == OURS else unet(*inputs).sample

    def step():
        unet.zero_grad()
        inputs = latent, image_latent, context, context, t.long(), latent, no_dropout
        with torch.enable_grad():
            loss(predict_eps, NoiseSchedule(), *inputs).mean().backward()
        return unet.conv_in.weight.grad

    return step


def pair_attend(side, device):
    """The `attend` of one active pair: as datagen.py runs it, or as the papers' code does, which overwrites maps."""

    def with_maps(q, k, v, layer):
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [4, H, N, M]
        if not layer.cross:
            maps[1::2] = maps[::2]
        return maps @ v

    control, wrap = PairControl(100, torch.tensor([0.9])), shared_maps(device)
    return with_maps if side != OURS else wrap(control) if wrap else control


def self_attention(settings, number):
    """`number` tensors [4, H, N, D] for the UNet's first self-attention layer. No network takes memory for them."""
    level, side = blank_model(settings).unet.config.levels[0], settings.size // 8
    return [settings.noise(4, level.heads, side**2, level.channels // level.heads, seed=i) for i in range(number)]


def pair_layer(side, settings):
    """One self-attention layer of one pair."""
    q, k, v = self_attention(settings, 3)
    attend, layer = pair_attend(side, settings.device), Layer(0, "down", False, (settings.size // 8,) * 2)
    return lambda: attend(q, k, v, layer)


def pair_step(side, settings):
    """A UNet step of one pair."""
    unet, model = made("unet", OURS, settings, in_channels=4)
    inputs = step_inputs(model, settings, 4)
    return lambda: unet(*inputs, pair_attend(side, settings.device))


def shared_map(variant, settings):
    """One self-attention map for the values of two images, which lie side by side: [4, H, N, 2 * D]."""
    q, k, *values = self_attention(settings, 4)
    v, width = torch.cat(values, dim=-1), q.shape[-1]
    if variant == "Triton kernel":
        from gpu.kernel import attend_values  # here, because it needs triton

        values = torch.stack(values)[None]  # [1, 2, 4, H, N, D]
        return lambda: torch.cat(attend_values(q[None], k[None], values)[0].unbind(), dim=-1)
    if variant == "memory-efficient":  # which takes values wider than q and k
        return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)(lambda: fused(q, k, v))
    if variant == "FlexAttention, compiled":
        flex = torch.compile(flex_attention.flex_attention, dynamic=False)
        return lambda: flex(q, k, v)
    if variant == "q and k padded":
        return lambda: F.scaled_dot_product_attention(F.pad(q, (0, width)), F.pad(k, (0, width)), v, scale=width**-0.5)
    return lambda: torch.cat([fused(q, k, value) for value in values], dim=-1)


def loading(side, settings, file=False, read=False):
    """Load a whole model, from its folder or from the single file beside it; read: and all weights, once.

    Without, weights may stay in the memory-mapped file until they are first used.
    """
    folder, dtype = Path(settings.folder, "model"), getattr(torch, settings.dtype)
    path = folder.with_suffix(".safetensors") if file else folder
    if side == OURS:
        load = functools.partial(checkpoint.load, path, settings.device, dtype, tokenizer=folder)
    else:
        from diffusers import StableDiffusionInstructPix2PixPipeline as Pipeline

        how = functools.partial(Pipeline.from_single_file, config=str(folder)) if file else Pipeline.from_pretrained
        load = lambda: how(path, dtype=dtype).to(settings.device)  # noqa: E731
    return (lambda: norms(load())) if read else load


def norms(model):
    """The sums of the norms of all weights of the UNet, the VAE and the text encoder: [3]."""
    networks = (model.unet, model.vae, model.text_encoder)
    return torch.tensor([sum(torch.linalg.vector_norm(w).item() for w in net.parameters()) for net in networks])


def write_model(settings):
    """Write the model to load, as a folder and as one file beside it."""
    model, path = blank_model(settings), Path(settings.folder, "model")
    for network in (model.unet, model.vae, model.text_encoder):
        randomised(network)
    checkpoint.save_folder(model, path)
    checkpoint.save_single_file(model, path.with_suffix(".safetensors"))


BOTH, WITH_MAPS = (OURS, THEIRS), (OURS, "with maps in memory")
PARTS = {  # title: what --only calls it, the variants, of which ratios are to the last one, how they are made
    "UNet step": ("unet", BOTH, unet_step),
    "VAE encoder": ("vae", BOTH, vae_encoder),
    "VAE decoder": ("vae", BOTH, vae_decoder),
    "text encoder": ("text", BOTH, text_encoder),
    "forward and backward pass, batch 1, half the size": ("train", BOTH, training_step),
    "self-attention of a Prompt-to-Prompt pair": ("p2p", WITH_MAPS, pair_layer),
    "UNet step of a pair": ("p2p", WITH_MAPS, pair_step),
    "one map for two values": ("attention", ATTENTION, shared_map),
    "load one file": ("load", BOTH, functools.partial(loading, file=True)),
    "load one file, read all weights": ("load", BOTH, functools.partial(loading, file=True, read=True)),
    "load a folder": ("load", BOTH, loading),
    "load a folder, read all weights": ("load", BOTH, functools.partial(loading, read=True)),
    "UNet step, trick by trick": ("ladder", LADDER, unet_step),
}
