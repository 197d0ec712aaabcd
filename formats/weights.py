"""The tensors of one network, from a file and into one.

Networks are made on the meta device, where tensors have a shape and no memory, and take the tensors of the
memory-mapped file as their own: no random initialisation, no second copy.
"""

import hashlib
import json
import os
import warnings
import zipfile
from contextlib import suppress
from dataclasses import replace

from cli import UserError, reported_as

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from formats.hub import best_weights
from formats.names import foreign_names
from unet import UNet

ARCHIVE, PICKLE = b"PK\3\4", b"\x80"  # how torch's files begin, from 2020 on and before
FOREIGN = {  # how files of other programs begin
    b"GGUF": "a GGUF file", b"\x89HDF": "a TensorFlow file (HDF5)", b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive", b"\x89PNG": "an image", b"\xff\xd8\xff": "an image",
}
HARMLESS = ("position_ids", "text_projection.weight")  # what files may hold beyond what the networks here need


def read_component(folder):
    """The tensors in a component's folder, whatever its weights file is called."""
    names = best_weights(path.name for path in folder.glob("*"))
    if not names:
        expected = "diffusion_pytorch_model.safetensors or model.safetensors is expected"
        raise UserError(f"{folder} holds no weights; {expected}")
    return {name: tensor for file in names for name, tensor in read_tensors(folder / file)[0].items()}


def read_tensors(path):
    """(tensors by name, the header's text fields) of a .safetensors file, memory-mapped, or of a plain pickle.

    Which of them it is, its first bytes say, not its name. Raises UserError.
    """
    with reported_as(f"{path} cannot be read"), open(path, "rb") as file:
        start, size = file.read(4096), file.seek(0, os.SEEK_END)
        archive = zipfile.is_zipfile(file)  # pickles from before 2020 are no archives, and must be read whole
    if start[5:9] == b"\0\0\0{":  # the header's length and the header
        return read_safetensors(path, size)
    if not start.startswith((ARCHIVE, PICKLE)):
        raise UserError(f"{path} is {what_begins(start)}")
    cut = f"{path} is cut off after {size:,} bytes; download it again"
    if start.startswith(ARCHIVE) and not archive:
        raise UserError(cut)
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:  # torch doubts pickles it reads well
            named = str(path).endswith(".safetensors")  # torch believes the name of a path
            mapped = archive and not named
            values = torch.load(file if named else path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch's own words advise to run the code
        refused = f"{path} holds more than plain weights, which could run code, or is damaged; use a .safetensors file"
        raise UserError(cut if isinstance(error, EOFError) or "unexpected EOF" in str(error) else refused) from error
    values = values.get("state_dict", values) if isinstance(values, dict) else {}
    return {str(name): value for name, value in values.items() if isinstance(value, torch.Tensor)}, {}


def read_safetensors(path, size):
    """`read_tensors` of a .safetensors file of so many bytes."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        needed = 0
        with suppress(Exception), open(path, "rb") as file:
            needed = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(needed - 8))
            needed += max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        if size < needed:
            raise UserError(f"{path} is cut off: it has {size:,} of {needed:,} bytes; download it again") from error
        raise UserError(f"{path} is damaged; download it again: {error}") from error


def what_begins(start):
    """What a file that holds no weights is, by its first bytes: the end of a sentence that says what to do."""
    text = start.decode("utf-8", "ignore").lstrip("\ufeff \r\n\t")
    if not start:
        return "empty; download it again"
    if text.startswith("version https://git-lfs"):
        return "a git-lfs pointer, which stands for the weights; `git lfs pull` in its folder fetches them"
    if text.lower().startswith(("<!doctype", "<html", "<head", "<?xml")):
        return "a web page instead of weights; download the file itself, after a login if it needs one"
    for beginning, kind in FOREIGN.items():
        if start.startswith(beginning):
            return f"{kind}, not PyTorch weights; a .safetensors file is needed"
    if len(text.encode()) > 0.9 * len(start) and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"a text, not weights; it begins: {' '.join(text.split())[:80]}"
    return "neither a .safetensors nor a PyTorch file, or it is damaged; download it again"


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


def extend_input(unet, **inputs):
    """A UNet with more inputs, whose new weights are zero; it shares all others with `unet`.

    inputs: in_channels, for the image to edit (Sec. 3.2), or scales_width, for guidance scales (Meng et al. 2023).
    """
    with torch.device("meta"):
        extended = UNet(replace(unet.config, **inputs))
    weights, first = unet.state_dict(), unet.conv_in.weight.detach()  # [C, 4, 3, 3]
    weights["conv_in.weight"] = nn.functional.pad(first, (0, 0, 0, 0, 0, extended.config.in_channels - first.shape[1]))
    if extended.scales and not unet.scales:
        weights["scales.weight"] = first.new_zeros(extended.scales.weight.shape)
    extended.load_state_dict(weights, assign=True)
    return extended.train(unet.training).requires_grad_(next(unet.parameters()).requires_grad)


def renamed(network, layout, dtype):
    """A network's weights under the names of a layout, "diffusers" or "original"."""
    names, weights = foreign_names(network), network.state_dict()
    return {getattr(names[key], layout): tensor.to(dtype or tensor.dtype) for key, tensor in weights.items()}


def fingerprint(*networks):
    """A short text that tells models from each other: from the names, shapes and some values of all weights."""
    digest = hashlib.sha256()
    for network in networks:
        for name, weight in network.state_dict().items():
            some = weight.flatten()[:: max(1, weight.numel() // 64)].float().cpu()
            digest.update(f"{name} {list(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_finite(network, where):
    """Raise UserError for a weight that is NaN or Inf."""
    for key, weight in network.state_dict().items():
        if not weight.sum(dtype=torch.float32).isfinite():  # far faster than a look at each
            raise UserError(f"{where}: tensor {foreign_names(network)[key].diffusers} holds NaN or Inf; it is damaged")


def write_tensors(path, tensors, metadata=None):
    """A .safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with reported_as(f"cannot write {path}", (SafetensorError, OSError)):  # the library's word for a full disk
        path.touch()
        usual = path.stat().st_mode  # the library's own file could be read by its owner alone
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        path.chmod(usual)


def write_json(path, values):
    """A JSON file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
