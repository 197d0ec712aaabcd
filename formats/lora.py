"""LoRA (Hu et al. 2021): a weight W stays as it is, and what is learned is a narrow product added to it, W + B A.

Only A and B are trained, so optimizer and gradients take next to no memory. They are then merged into the weights, or
kept as a small file, which diffusers loads on top of the model that the training began with.
"""

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from formats.names import foreign_names
from formats.weights import write_tensors
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
