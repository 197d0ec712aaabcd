"""LoRA (Hu et al. 2021): a weight W stays as it is, and what is learned is a narrow product added to it, W + B A.

Only A and B are trained, so optimizer and gradients take next to no memory. They are then merged into the weights, or
kept as a small file, which diffusers loads on top of the model that the training began with.
"""

import json
import math
import re
from pathlib import Path

from cli import UserError, reported_as

import torch
from torch import nn
from torch.nn.utils import parametrize

from formats.names import foreign_names
from formats.weights import extend_input, read_tensors, write_tensors
from unet import Attention, UNet


class LowRank(nn.Module):
    """W -> W + B A for a weight W [out, ...]: A [rank, all the rest] random and B [out, rank] zero at first."""

    def __init__(self, weight, rank, generator):
        super().__init__()
        shape, place = (rank, weight[0].numel()), {"device": weight.device, "dtype": weight.dtype}
        bound = math.sqrt(1 / shape[1])
        self.a = nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator).to(**place))
        self.b = nn.Parameter(torch.zeros(len(weight), rank, **place))

    def forward(self, weight):
        """The weight to compute with, of the same shape."""
        return weight + (self.b @ self.a).view_as(weight)


def add_lora(unet, rank):
    """Freeze a UNet and give the projections of its attention, and its first convolution, a LowRank each."""
    unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(unet).values():
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, generator))


def adapted_layers(unet):
    """{name: layer} of all that LoRA changes. The first convolution has the channels of the input image."""
    layers = {"conv_in": unet.conv_in}
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            layers |= {f"{name}.{part}": getattr(module, part) for part in ("to_q", "to_k", "to_v", "to_out")}
    return layers


def merge_lora(unet):
    """Put W + B A in the place of every weight; the UNet is then a plain one."""
    for layer in adapted_layers(unet).values():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


# The name of a layer, and what is said of it, as our own files, kohya's, diffusers' and peft's have them.
FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?:unet\.|lora_unet_|text_encoder\.|lora_te1?_)?(?P<layer>.+?)"
    r"(?:[._]lora(?:_linear_layer)?)?\.(?:(?P<a>(?:lora_A|lora_down|down)(?:\.\w+)?\.weight)"
    r"|(?P<b>(?:lora_B|lora_up|up)(?:\.\w+)?\.weight)|(?P<alpha>alpha))"
)


def apply_lora(model, named):
    """Merge a LoRA into the UNet and the text encoder of a `checkpoint.Model`: W + scale * alpha / rank * B A.

    named: the path of a file, or PATH:SCALE. If the LoRA is an editor's and the model has no input channels for an
    image, they are added (Sec. 3.2). Raises UserError for a layer that the model lacks, and for what is no plain LoRA.
    """
    parts = re.fullmatch(r"(.+):(-?\d*\.?\d+)", str(named))
    path, scale = (Path(parts[1]), float(parts[2])) if parts else (Path(named), 1.0)
    factors, alphas = read_lora(path)
    first = factors.get("conv_in", {}).get("a")
    if first is not None and first.dim() == 4 and first.shape[1] == 2 * model.unet.config.in_channels:
        model.unet = extend_input(model.unet, in_channels=first.shape[1])
    layers = {
        name.removesuffix(".weight").replace(".", "_"): (kind, getattr(model, kind).get_parameter(key))
        for kind in ("unet", "text_encoder")
        for key, names in foreign_names(getattr(model, kind)).items()
        for name in names
    }
    for layer, factor in factors.items():
        if layer not in layers:
            raise UserError(f"{path} changes {layer}, which this model lacks; a LoRA of Stable Diffusion 1.x is needed")
        if not {"a", "b"} <= factor.keys():
            raise UserError(f"{path} is no plain LoRA, or it is damaged: {layer} has one factor alone")
        kind, weight = layers[layer]
        with reported_as(f"{path} is damaged: {layer} cannot be used"):
            a, b = (factor[name].float().flatten(1) for name in ("a", "b"))
            if (len(b), a.shape[1], b.shape[1]) != (len(weight), weight[0].numel(), len(a)):
                raise UserError(f"{path} is made for another model: the sizes of {layer} differ")
            alpha = float(factor.get("alpha", alphas.get(f"{kind}.lora_alpha", len(a))))
            weight.data = weight.float() + scale * alpha / len(a) * (b @ a).view_as(weight)


def read_lora(path):
    """A LoRA's file -> ({layer: {"a", "b" and maybe "alpha": tensor}}, {"unet.lora_alpha": number, ...})."""
    tensors, metadata = read_tensors(path)
    factors, beside = {}, path.parent / "adapter_config.json"
    for name, tensor in tensors.items():
        if not (match := FACTOR.fullmatch(name)):
            raise UserError(f"{path} is no plain LoRA: it holds {name}")
        layer = match["layer"].replace(".processor", "").replace(".", "_")
        layer += "_0" * layer.endswith("to_out")
        factors.setdefault(layer, {})[match.lastgroup] = tensor
    if not factors:
        raise UserError(f"{path} is no LoRA: it holds no tensors")
    with reported_as(f"the alpha of {path} cannot be read"):
        alphas = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))  # diffusers', from 2025 on
        if beside.exists() and any(name.startswith("base_model.") for name in tensors):  # peft's
            alphas["unet.lora_alpha"] = json.loads(beside.read_text(encoding="utf-8"))["lora_alpha"]
    return factors, alphas


def write_lora(unet, path, base):
    """Write A and B of every layer as a .safetensors file for `load_lora_weights` of an InstructPix2Pix in diffusers.

    base: what the training began with. If that is a text-to-image model, its conv_in needs the channels of zeros first.
    """
    with torch.device("meta"):
        names = foreign_names(UNet(unet.config))
    tensors = {}
    for name, layer in adapted_layers(unet).items():
        low_rank = layer.parametrizations.weight[0]
        a, b = low_rank.a, low_rank.b
        if isinstance(layer, nn.Conv2d):  # there A is a convolution, and B one of 1x1
            a, b = a.unflatten(1, layer.weight.shape[1:]), b[:, :, None, None]
        key = "unet." + names[f"{name}.weight"].diffusers.removesuffix(".weight")
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    note = f"{base}, its UNet's conv_in extended by zeros to {unet.config.in_channels} input channels if it had fewer"
    write_tensors(path, tensors, {"base_model": note})
