"""Whole models in and out: a diffusers folder, an original single file, a hub id; and a CLIP folder.

How tensors are read stands in `weights.py`, what they are called in `names.py`, how sizes are noted in `configs.py`.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cli import UserError, atomic_write, check_sampling, reported_as

import torch

from clip_image import CLIP, DINO
from clip_text import CLIP_L_TEXT, CLIPText, CLIPTokenizer
from diffusion import Sampling
from formats import configs, hub
from formats.configs import Config
from formats.lora import apply_lora
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
OTHER_KINDS = {  # what a name in a single file contains: what the file is
    r"label_emb\.": "of Stable Diffusion XL", r"cond_stage_model\.model\.": "of Stable Diffusion 2",
    r"joint_blocks\.": "of Stable Diffusion 3", r"double_blocks\.": "of Flux",
    r"^(v_pred|ztsnr)$": "of a model with v-prediction", r"control_model|^controlnet_": "of a ControlNet",
    r"lora_|[._]lora\.|\.(hada|lokr)_": "a LoRA, which changes a model (sample.py --lora)",
    r"^(string_to_param|emb_params|\*)$": "a textual inversion",
    r"^(encoder|decoder)\.": "an autoencoder alone (for --vae)",
    r"^(down_blocks|text_model)\.": "one part of a model",
}
LACKING = {
    "unet": "no UNet; a whole model is needed: a folder in diffusers' layout, or a single file",
    "vae": "no autoencoder; name one by --vae, such as --vae vae",
    "text_encoder": "no text encoder; a whole model is needed",
}
STALE = 0.25  # relative difference from which averaged weights are no longer those of the raw ones
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


def load(path, device="cpu", dtype=torch.float32, tokenizer=None, vae=None, lora=None, ema=None, kind="editor"):
    """Read a Model from a diffusers-layout folder, an original single file (.safetensors, .ckpt), or from the hub.

    path: also a hub id or a short name (see `hub.find`, to which kind, "editor" or "sd", says what is meant by "mini").
    tokenizer: a tokenizer's folder, vae: a folder or a file; both replace what `path` brings. lora: a file, or
    "FILE:SCALE", that is merged into the weights. ema: "yes" or "no", whether the averaged weights of a file that holds
    both are taken; None: if they are sane. Raises UserError.
    """
    path = hub.find(path, kind)
    wanted = {name: part for name, part in PARTS.items() if name != "vae" or not vae}
    networks, sampling = load_folder(path, wanted, ema) if path.is_dir() else load_single_file(path, wanted, ema)
    if vae:
        networks["vae"] = load_vae(vae)
    tokenizer = tokenizer or (path if path.is_dir() else tokenizer_beside(path))
    tokenizer = load_tokenizer(tokenizer, networks["text_encoder"].config)
    model = Model(**networks, tokenizer=tokenizer, sampling=sampling, source=str(path))
    unet, text, vae = model.unet.config, model.text_encoder.config, model.vae.config
    if (unet.context_width, unet.out_channels) != (text.width, vae.latent_channels):
        raise UserError(f"{path}: its UNet is made for another text encoder or another VAE")
    if lora:
        apply_lora(model, lora)
    for network in (model.unet, model.vae, model.text_encoder):
        network.to(device=device, dtype=dtype)
    return model


def load_clip(path, device="cpu"):
    """Read CLIP's two towers and the tokenizer from a folder in transformers' layout or a hub id: (CLIP, tokenizer)."""
    folder = hub.find(path, "clip")
    clip = load_part(CLIP_TOWERS, folder)
    return clip.to(device, torch.float32), load_tokenizer(folder, clip.config[0])


def load_dino(path, device="cpu"):
    """Read DINO from a folder in the layout of transformers' ViTModel, or a hub id."""
    folder = hub.find(path, "dino")
    config = Config.read(folder / "config.json")
    # transformers' tokens have a batch of one, and a pooling layer that DINO was not trained with
    tensors = {name: tensor for name, tensor in read_component(folder).items() if not name.startswith("pooler.")}
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        if name in tensors:
            tensors[name] = tensors[name].squeeze()
    dino = fill(lambda: DINO(configs.dino_from(config)), tensors, lambda name: [name.diffusers], folder)
    return dino.to(device, torch.float32)


def load_folder(folder, parts, ema=None):
    """Read parts of a diffusers-layout folder: ({name: network}, Sampling)."""
    if absent := [name for name in parts if not (folder / name).is_dir()]:
        raise UserError(f"{folder} holds {LACKING[absent[0]]}")
    if ema:
        raise UserError(f"--ema is for a single file that holds averages, too; {folder} is a folder")
    scheduler, sampling = folder / "scheduler" / "scheduler_config.json", folder / "sampling.json"
    if scheduler.exists():
        config = Config.read(scheduler)
        config.fixed(configs.SCHEDULER_FIXED)
        config.known(*configs.SCHEDULER_FIXED, *configs.SCHEDULER_HARMLESS)
    sampling = sampling_from(Config.read(sampling)) if sampling.exists() else Sampling()
    return {name: load_part(part, folder / name) for name, part in parts.items()}, sampling


def load_part(part, folder):
    """Read one network from its own folder."""
    config = Config.read(folder / "config.json")
    return fill(lambda: part.make(config), read_component(folder), lambda name: aliases(name.diffusers), folder)


def load_single_file(path, parts, ema=None):
    """Read parts of an original Stable Diffusion file: ({name: network}, Sampling)."""
    tensors, metadata = read_tensors(path)
    names = "\n".join(tensors)
    for pattern, kind in OTHER_KINDS.items():
        if re.search(pattern, names, re.M):
            raise UserError(f"{path} is {kind}; a whole Stable Diffusion 1.x or an editor made of it is needed")
    if metadata.get("modelspec.prediction_type", "epsilon") != "epsilon":
        raise UserError(f"{path} says prediction_type {metadata['modelspec.prediction_type']}; epsilon is supported")
    averaged = choose_averages(tensors, path, ema)
    prefixes = {name: EMA_PREFIX if averaged and name == "unet" else part.prefix for name, part in parts.items()}
    for name, prefix in prefixes.items():
        if not any(key.startswith(prefix) for key in tensors):
            raise UserError(f"{path} holds {LACKING[name]}")
    with reported_as(f"{path} is no Stable Diffusion checkpoint, or it is damaged"):
        if "ip2p" in metadata:  # written by `save_single_file`, which notes what the names do not tell
            noted = json.loads(metadata["ip2p"])
        else:
            first = EMA_PREFIX + "input_blocks00weight" if averaged else UNET_PREFIX + "input_blocks.0.0.weight"
            unet = replace(STABLE_DIFFUSION, in_channels=tensors[first].shape[1])
            noted = {"unet": configs.unet_json(unet), "vae": VAE_JSON, "text_encoder": configs.text_json(CLIP_L_TEXT)}
        networks = {
            name: from_original(part, Config(noted[name], path), tensors, averaged and name == "unet")
            for name, part in parts.items()
        }
        return networks, sampling_from(Config(noted.get("sampling", {}), path))


def choose_averages(tensors, path, ema=None):
    """Are a single file's averaged weights (EMA) to be taken? Says which ones are, where there is a choice.

    Those of a training differ little from the raw ones. A merge of models by "add difference" changes the raw weights
    alone, or leaves zeros in place of the averages. ema: "yes" or "no" decides. Raises UserError.
    """
    averages = any(name.startswith(EMA_PREFIX) for name in tensors)
    raw = [name for name in tensors if name.startswith(UNET_PREFIX)]
    if ema and not (averages if ema == "yes" else raw or not averages):
        raise UserError(f"{path} holds no {'averaged' if ema == 'yes' else 'raw'} weights; leave out --ema {ema}")
    if ema or not averages:
        return ema == "yes"
    pairs = [(name, EMA_PREFIX + name.removeprefix(UNET_PREFIX).replace(".", "")) for name in raw]
    squares, reason = torch.zeros(3, dtype=torch.float64), None
    for pair in pairs:
        ours, theirs = (tensors.get(name, torch.zeros(0)).flatten()[:4096].double() for name in pair)  # enough to tell
        if len(ours) != len(theirs) or (ours.any() and not theirs.any()):
            reason = "are zero or missing in part"
            break
        squares += torch.stack([(ours - theirs).square().sum(), ours.square().sum(), theirs.square().sum()])
    difference = (squares[0] / squares[1:].min()).sqrt().item()
    if not squares[2].isfinite():
        reason = "hold NaN or Inf"
    elif not reason and difference > STALE:
        reason = f"differ from the raw ones by {difference:.0%}, as after a merge"
    if not raw:
        chosen = "its averaged weights (EMA) are taken, since it holds no raw ones"
    elif reason:
        chosen = f"its averaged weights (EMA) {reason}; the raw ones are taken (--ema yes: the averaged ones)"
    else:
        chosen = f"its averaged weights (EMA) are taken; they differ from the raw ones (--ema no) by {difference:.1%}"
    print(f"{path}: {chosen}", file=sys.stderr)
    return not reason


def from_original(part, config, tensors, averaged=False):
    """One network from the tensors of an original file; averaged: the UNet from its moving average."""
    roots = EMA_PREFIX if averaged else tuple(part.prefix + root for root in part.roots)
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(roots)}

    def candidates(name):
        return [EMA_PREFIX + name.original.replace(".", "")] if averaged else aliases(part.prefix + name.original)

    return fill(lambda: part.make(config), mine, candidates, config.name)


def load_vae(path):
    """An autoencoder alone: its folder or the file in it, a model's folder, or a file with the original names."""
    path, part = hub.find(path, "vae"), PARTS["vae"]
    if path.is_dir():
        return load_part(part, path / "vae" if (path / "vae").is_dir() else path)
    tensors, metadata = read_tensors(path)
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        beside = path.parent / "config.json"
        config = Config.read(beside) if beside.exists() else Config(VAE_JSON, path)
        return fill(lambda: part.make(config), tensors, lambda name: aliases(name.diffusers), path)
    with reported_as(f"{path} is damaged"):
        noted = json.loads(metadata["ip2p"])["vae"] if "ip2p" in metadata else VAE_JSON
    prefix = next((p for p in (VAE_PREFIX, "vae.") if any(name.startswith(p) for name in tensors)), "")
    return from_original(part._replace(prefix=prefix), Config(noted, path), tensors)


def load_tokenizer(path, text_config):
    """The tokenizer in a folder, or in its `tokenizer/`, if it is the one that a text encoder was trained with."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder of the tokenizer")
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
    try:
        return hub.find("clip", "tokenizer")
    except UserError as error:
        raise UserError(f"{path} has no tokenizer/ beside it, and {error}") from error


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
    editor = model.unet.config.in_channels == 2 * model.unet.config.out_channels
    more = {"unet": {"sample_size": model.sampling.resolution // model.vae.config.factor}}  # diffusers' default
    with write_new(folder) as beside:
        (beside / "tokenizer").mkdir(parents=True)
        model.tokenizer.save(beside / "tokenizer")
        for name, part in PARTS.items():
            save_part(part, getattr(model, name), beside / name, dtype, **more.get(name, {}))
        write_json(beside / "scheduler" / "scheduler_config.json", configs.SCHEDULER)
        write_json(beside / "sampling.json", asdict(model.sampling))
        write_json(beside / "model_index.json", configs.EDITOR if editor else configs.TEXT_TO_IMAGE)


def save_part(part, network, folder, dtype, **more):
    """Write one network into its own folder; more: for its config.json."""
    write_json(folder / "config.json", part.config_json(network.config) | more)
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
    """Write a Model as one .safetensors file with the original names, and tokenizer/ beside it.

    Raises UserError if the file exists, or the tokenizer of another model is there.
    """
    folder = Path(path).parent / "tokenizer"
    if folder.exists() and load_tokenizer(folder, model.text_encoder.config).merges != model.tokenizer.merges:
        raise UserError(f"{folder} is the tokenizer of another model; write {path} into another folder")
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
    if not folder.exists():
        with atomic_write(folder) as beside:
            beside.mkdir()
            model.tokenizer.save(beside)
