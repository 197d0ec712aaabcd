"""The tensors of one network, from a file and into one.

Networks are made on the meta device, where tensors have a shape and no memory, and take the tensors of the
memory-mapped file as their own: no random initialisation, no second copy.
"""

import json
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

from cli import UserError, reported_as

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from formats.hub import best_weights
from formats.names import foreign_names
from unet import UNet

HARMLESS = ("position_ids", "text_projection.weight")  # what files may hold beyond what the networks here need


def read_component(folder):
    """The tensors in a component's folder, whatever its weights file is called."""
    names = best_weights(path.name for path in folder.glob("*"))
    if not names:
        expected = "diffusion_pytorch_model.safetensors or model.safetensors is expected"
        raise UserError(f"{folder} holds no weights; {expected}")
    return {name: tensor for file in names for name, tensor in read_tensors(folder / file)[0].items()}


def read_tensors(path):
    """(tensors by name, the header's text fields) of a .safetensors file, memory-mapped, or of a plain pickle."""
    if Path(path).suffix == ".safetensors":
        with reported_as(f"{path} is damaged or cannot be read"), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    with reported_as(f"{path} cannot be read"), open(path, "rb") as file:
        mapped = zipfile.is_zipfile(file)  # files from before 2020 are no archives, and must be read whole
    try:
        with warnings.catch_warnings(action="ignore"):  # torch doubts pickles that it reads well
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch's own words advise to run the code
        refused = "holds more than plain weights, which could run code, or is damaged"
        raise UserError(f"{path} {refused}; use a .safetensors file") from error
    values = values.get("state_dict", values) if isinstance(values, dict) else {}
    return {str(name): value for name, value in values.items() if isinstance(value, torch.Tensor)}, {}


def fill(make, tensors, candidates, where):
    """Make a network without memory and give it its weights; returns it, frozen and in eval mode.

    tensors: {foreign name: tensor}, candidates(Name) -> the foreign names to look under, where: named in errors.
    Raises UserError for a tensor that is missing, of the wrong shape or kind, or not asked for.
    """
    with reported_as(f"{where}: its configuration cannot be used"), torch.device("meta"):
        network = make()
    names, missing, weights, unknown = foreign_names(network), [], {}, dict(tensors)
    for key, blank in network.state_dict().items():
        found = next((name for name in candidates(names[key]) if name in tensors), None)
        if not found:
            missing.append(candidates(names[key])[0])
            continue
        tensor = unknown.pop(found)
        if not tensor.is_floating_point():
            raise UserError(f"{where}: tensor {found} holds {tensor.dtype}, not floating-point weights")
        if tensor.numel() != blank.numel() or tensor.shape[:2] != blank.shape[:2]:
            raise UserError(f"{where}: tensor {found} has shape {list(tensor.shape)}, not {list(blank.shape)}")
        weights[key] = tensor.reshape(blank.shape)  # a 1x1 convolution and a linear layer hold the same numbers
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(names)} tensors are missing, such as {missing[0]}")
    unknown = [name for name in unknown if not name.endswith(HARMLESS)]
    if unknown:
        raise UserError(f"{where}: {len(unknown)} unknown tensors, such as {min(unknown)}")
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def extend_input(unet, in_channels=8):
    """A UNet with more input channels whose new weights are zero (Sec. 3.2); it shares all others with `unet`."""
    with torch.device("meta"):
        extended = UNet(replace(unet.config, in_channels=in_channels))
    weights = unet.state_dict()
    first = weights["conv_in.weight"]  # [C, 4, 3, 3]
    weights["conv_in.weight"] = nn.functional.pad(first, (0, 0, 0, 0, 0, in_channels - first.shape[1]))
    extended.load_state_dict(weights, assign=True)
    return extended.train(unet.training).requires_grad_(next(unet.parameters()).requires_grad)


def renamed(network, layout, dtype):
    """A network's weights under the names of a layout, "diffusers" or "original"."""
    names, weights = foreign_names(network), network.state_dict()
    return {getattr(names[key], layout): tensor.to(dtype or tensor.dtype) for key, tensor in weights.items()}


def write_tensors(path, tensors, metadata=None):
    """A .safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with reported_as(f"cannot write {path}", SafetensorError):  # the library's word for a full disk or a missing folder
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})


def write_json(path, values):
    """A JSON file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
