"""Whole models in and out: a diffusers folder, an original single file, a hub id; and a CLIP folder.

How tensors are read stands in `weights.py`, what they are called in `names.py`, how sizes are noted in `configs.py`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cli import UserError, atomic_write, check_sampling, reported_as

import torch

from clip_image import CLIP
from clip_text import CLIP_L_TEXT, CLIPText, CLIPTokenizer
from diffusion import Sampling
from formats import configs, hub
from formats.configs import Config
from formats.names import aliases
from formats.weights import fill, read_component, read_tensors, renamed, write_json, write_tensors
from unet import STABLE_DIFFUSION, UNet
from vae import STABLE_DIFFUSION_VAE, VAE


class Part(NamedTuple):
    """One network of a model: how it is made and described, and where files keep its tensors."""

    make: Callable  # Config -> the network
    config_json: Callable  # the network's own configuration -> what config.json says
    stem: str  # of the weights' file in a folder
    prefix: str = ""  # of every weight's name in a single file
    roots: tuple[str, ...] = ("",)  # what may follow the prefix


STEM = "diffusion_pytorch_model"
UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
EMA_PREFIX = "model_ema.diffusion_model"  # of an averaged weight of the UNet, whose name then loses its dots
VAE_ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the loss that trained it may lie beside
PARTS = {  # as folders and `Model` call them
    "unet": Part(lambda config: UNet(configs.unet_from(config)), configs.unet_json, STEM, UNET_PREFIX),
    "vae": Part(lambda config: VAE(configs.vae_from(config)), configs.vae_json, STEM, VAE_PREFIX, VAE_ROOTS),
    "text_encoder": Part(lambda config: CLIPText(configs.text_from(config)), configs.text_json, "model", TEXT_PREFIX),
}
CLIP_TOWERS = Part(lambda config: CLIP(*configs.clip_from(config)), configs.clip_json, "model")
OTHER_KINDS = {  # what some names in a single file contain: what it is
    "label_emb.": "Stable Diffusion XL", "cond_stage_model.model.": "Stable Diffusion 2",
    "joint_blocks.": "Stable Diffusion 3", "double_blocks.": "Flux", "lora_": "LoRA",
}
VAE_JSON = configs.vae_json(STABLE_DIFFUSION_VAE)


@dataclass
class Model:
    """A latent diffusion model: text-to-image (UNet with 4 input channels) or an editor (8)."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: CLIPTokenizer
    sampling: Sampling = Sampling()
    source: str = "this model"  # where it came from, for messages

    @property
    def side_multiple(self):
        """Pixels: sides that are multiples of this can be halved down to the UNet's coarsest level."""
        return self.vae.config.factor * 2 ** (len(self.unet.config.levels) - 1)


def load(path, device="cpu", dtype=torch.float32, tokenizer=None, vae=None, kind="editor"):
    """Read a Model from a diffusers-layout folder, an original single file (.safetensors, .ckpt), or from the hub.

    path: also a hub id or a short name (see `hub.find`, to which kind, "editor" or "sd", says what is meant by "mini").
    tokenizer: a tokenizer's folder, vae: a folder or a file; both replace what `path` brings. Raises UserError.
    """
    path = hub.find(path, kind)
    wanted = {name: part for name, part in PARTS.items() if name != "vae" or not vae}
    networks, sampling = load_folder(path, wanted) if path.is_dir() else load_single_file(path, wanted)
    if vae:
        networks["vae"] = load_vae(vae)
    tokenizer = tokenizer or (path if path.is_dir() else tokenizer_beside(path))
    tokenizer = load_tokenizer(tokenizer, networks["text_encoder"].config)
    model = Model(**networks, tokenizer=tokenizer, sampling=sampling, source=str(path))
    unet, text, vae = model.unet.config, model.text_encoder.config, model.vae.config
    if (unet.context_width, unet.out_channels) != (text.width, vae.latent_channels):
        raise UserError(f"{path}: its UNet is made for another text encoder or another VAE")
    for network in networks.values():
        network.to(device=device, dtype=dtype)
    return model


def load_clip(path, device="cpu"):
    """Read CLIP's two towers and the tokenizer from a folder in transformers' layout or a hub id: (CLIP, tokenizer)."""
    folder = hub.find(path, "clip")
    clip = load_part(CLIP_TOWERS, folder)
    return clip.to(device, torch.float32), load_tokenizer(folder, clip.config[0])


def load_folder(folder, parts):
    """Read parts of a diffusers-layout folder: ({name: network}, Sampling)."""
    scheduler, sampling = folder / "scheduler" / "scheduler_config.json", folder / "sampling.json"
    if scheduler.exists():
        Config.read(scheduler).fixed(configs.SCHEDULER_FIXED)
    sampling = sampling_from(Config.read(sampling)) if sampling.exists() else Sampling()
    return {name: load_part(part, folder / name) for name, part in parts.items()}, sampling


def load_part(part, folder):
    """Read one network from its own folder."""
    config = Config.read(folder / "config.json")
    return fill(lambda: part.make(config), read_component(folder), lambda name: aliases(name.diffusers), folder)


def load_single_file(path, parts):
    """Read parts of an original Stable Diffusion file: ({name: network}, Sampling)."""
    tensors, metadata = read_tensors(path)
    for part, kind in OTHER_KINDS.items():
        if any(part in name for name in tensors):
            raise UserError(f"{path} is a file of {kind}; only Stable Diffusion 1.x and its editors are supported")
    with reported_as(f"{path} is no Stable Diffusion checkpoint, or it is damaged"):
        if "ip2p" in metadata:  # written by `save_single_file`, which notes what the names do not tell
            noted = json.loads(metadata["ip2p"])
        else:
            unet = replace(STABLE_DIFFUSION, in_channels=tensors[UNET_PREFIX + "input_blocks.0.0.weight"].shape[1])
            noted = {"unet": configs.unet_json(unet), "vae": VAE_JSON, "text_encoder": configs.text_json(CLIP_L_TEXT)}
        if any(name.startswith(EMA_PREFIX) for name in tensors):  # averaged weights are preferred
            for name in tensors:
                if name.startswith(UNET_PREFIX):
                    tensors[name] = tensors[EMA_PREFIX + name.removeprefix(UNET_PREFIX).replace(".", "")]
        networks = {name: from_original(part, Config(noted[name], path), tensors) for name, part in parts.items()}
        return networks, sampling_from(Config(noted.get("sampling", {}), path))


def from_original(part, config, tensors):
    """One network from the tensors of an original file."""
    roots = tuple(part.prefix + root for root in part.roots)
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(roots)}
    return fill(lambda: part.make(config), mine, lambda name: aliases(part.prefix + name.original), config.name)


def load_vae(path):
    """An autoencoder alone: its own folder, the one inside a model's folder, or a file with the original names."""
    path, part = hub.find(path, "vae"), PARTS["vae"]
    if path.is_dir():
        return load_part(part, path / "vae" if (path / "vae").is_dir() else path)
    tensors, _ = read_tensors(path)
    prefix = VAE_PREFIX if any(name.startswith(VAE_PREFIX) for name in tensors) else ""
    return from_original(part._replace(prefix=prefix), Config(VAE_JSON, path), tensors)


def load_tokenizer(path, text_config):
    """The tokenizer in a folder, or in its `tokenizer/`, if it is the one that a text encoder was trained with."""
    folder = Path(path)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    tokenizer = CLIPTokenizer.load(folder, text_config.tokens)
    if max(tokenizer.vocabulary.values()) >= text_config.vocabulary or tokenizer.end != text_config.end_token:
        raise UserError(f"the tokenizer in {folder} is not the one that the text encoder was trained with")
    return tokenizer


def tokenizer_beside(path):
    """The folder with the tokenizer of a single file: its own, else that of CLIP from the hub's cache or the hub."""
    if any((path.parent / name).exists() for name in ("tokenizer", "vocab.json", "tokenizer.json")):
        return path.parent
    for name in ("ip2p", "sd15"):
        if folder := hub.cached(hub.PUBLIC[name].repository, "tokenizer"):
            return folder
    with reported_as(f"{path} has no tokenizer/ beside it; name one by --tokenizer, since that of CLIP is not here"):
        return hub.find("clip", "tokenizer")


def sampling_from(config):
    """A Config -> Sampling; the released code's values where some are missing."""
    with reported_as(f"{config.name} cannot be used"):
        values = {name: type(value)(config.values.get(name, value)) for name, value in asdict(Sampling()).items()}
        check_sampling(**values)
        return Sampling(**values)


def write_new(path):
    """`atomic_write` for what must not exist yet. Raises UserError if it does."""
    if Path(path).exists():
        raise UserError(f"{path} exists already; name another one, or remove it first")
    return atomic_write(path)


def save_folder(model, folder, dtype=None):
    """Write a Model as a folder that diffusers opens. dtype None: as it is. Raises UserError if `folder` exists."""
    editor = model.unet.config.in_channels == 8
    with write_new(folder) as beside:
        (beside / "tokenizer").mkdir(parents=True)
        model.tokenizer.save(beside / "tokenizer")
        for name, part in PARTS.items():
            save_part(part, getattr(model, name), beside / name, dtype)
        write_json(beside / "scheduler" / "scheduler_config.json", configs.SCHEDULER)
        write_json(beside / "sampling.json", asdict(model.sampling))
        write_json(beside / "model_index.json", configs.EDITOR if editor else configs.TEXT_TO_IMAGE)


def save_part(part, network, folder, dtype):
    """Write one network into its own folder."""
    write_json(folder / "config.json", part.config_json(network.config))
    write_tensors(folder / f"{part.stem}.safetensors", renamed(network, "diffusers", dtype))


def save_vae(vae, folder, dtype=None):
    """Write an autoencoder alone as a folder that `load_vae` and diffusers open. Raises UserError if it exists."""
    with write_new(folder) as beside:
        save_part(PARTS["vae"], vae, beside, dtype)


def save_clip(clip, tokenizer, folder, dtype=None):
    """Write CLIP's towers and the tokenizer in transformers' layout. Raises UserError if `folder` exists."""
    with write_new(folder) as beside:
        save_part(CLIP_TOWERS, clip, beside, dtype)
        tokenizer.save(beside)


def save_single_file(model, path, dtype=None):
    """Write a Model, but for its tokenizer, as one .safetensors file with the original names; it must not exist yet."""
    tensors, noted = {}, {"sampling": asdict(model.sampling)}
    for key, part in PARTS.items():
        network = getattr(model, key)
        noted[key] = part.config_json(network.config)
        for name, tensor in renamed(network, "original", dtype).items():
            linear = ".mid.attn_1." in name and tensor.dim() == 2  # a 1x1 convolution in the original
            tensors[part.prefix + name] = tensor[:, :, None, None] if linear else tensor
    tensors[TEXT_PREFIX + "text_model.embeddings.position_ids"] = torch.arange(model.text_encoder.config.tokens)[None]
    with write_new(path) as beside:
        write_tensors(beside, tensors, {"ip2p": json.dumps(noted)})
