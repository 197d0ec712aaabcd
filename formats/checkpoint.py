"""Whole models in and out: a diffusers folder, an original single file, a hub id; and a CLIP folder.

How one network's tensors are read and written stands in `weights.py`, what they are called in `names.py`, and how their
sizes are noted in `configs.py`.
"""

import json
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cli import UserError, atomic_write, check_sampling

import torch

from clip_image import CLIP
from clip_text import CLIP_L_TEXT, CLIPText, CLIPTokenizer
from diffusion import Sampling
from formats import configs
from formats.configs import Config
from formats.names import aliases, ema_name
from formats.weights import fill, pick, read_component, read_tensors, renamed, write_json, write_tensors
from unet import STABLE_DIFFUSION, UNet
from vae import STABLE_DIFFUSION_VAE, VAE

PUBLIC = "timbrooks/instruct-pix2pix"
CLIP_L = "openai/clip-vit-large-patch14"
MODEL_FILES = [  # of a repository, to fetch
    *("*.json", "*/*.json", "*/merges.txt", "text_encoder/model.safetensors"),
    *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
]
CLIP_FILES = ["config.json", "vocab.json", "merges.txt", "model.safetensors"]
TOKENIZER_FILES = ["vocab.json", "merges.txt", "tokenizer/*"]
SUPPORTED = "only Stable Diffusion 1.x and InstructPix2Pix made from it are supported"
UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


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


# ---- reading ----


def load(path, device="cpu", dtype=torch.float32, tokenizer=None, vae=None):
    """Read a Model from a diffusers-layout folder, an original single file (.safetensors, .ckpt), or a hub id.

    tokenizer: a tokenizer's folder, vae: a folder or a file; both replace what `path` brings. Raises UserError.
    """
    path = find(path)
    model = load_folder(path, tokenizer, vae) if path.is_dir() else load_single_file(path, tokenizer, vae)
    model.source = str(path)
    check_fit(model)
    for network in (model.unet, model.vae, model.text_encoder):
        network.to(device=device, dtype=dtype)
    return model


def load_clip(path, device="cpu", dtype=torch.float32):
    """Read CLIP's two towers and the tokenizer from a folder in transformers' layout or a hub id: (CLIP, tokenizer)."""
    folder = find(path, CLIP_FILES)
    config = configs.clip_from(Config.read(folder / "config.json"))
    tensors = read_component(folder)
    clip = fill(lambda: CLIP(*config), tensors, lambda name: aliases(name.diffusers), folder)
    tokenizer = CLIPTokenizer.load(folder, config[0].tokens)
    check_vocabulary(tokenizer, config[0], folder)
    return clip.to(device=device, dtype=dtype), tokenizer


def find(path, files=MODEL_FILES):
    """A path that exists, or the local folder of a hub id. Raises UserError."""
    if os.path.exists(path):  # where Path.exists() raises for a name that is too long
        return Path(path)
    looks_like_file = Path(path).suffix in (".safetensors", ".ckpt", ".bin", ".pt") or Path(path).parent.is_dir()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not looks_like_file:
        return from_hub(str(path), files)
    raise UserError(f"there are no weights at {path}; give a folder, a .safetensors file or a hub id such as {PUBLIC}")


def from_hub(repository, files):
    """The local folder of a hub repository, downloaded into the hub's cache where it is not there. Raises UserError."""
    from huggingface_hub import snapshot_download  # here, since it takes a second

    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # the library has many exceptions for what cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{repository} is not in this machine's hub cache and cannot be fetched: {reason}") from error


def load_folder(folder, tokenizer=None, vae=None):
    """Read the parts of a diffusers-layout folder."""
    if (folder / "model_index.json").exists():
        kind = str(Config.read(folder / "model_index.json").values.get("_class_name"))
        if "XL" in kind or "3" in kind:
            raise UserError(f"{folder} is a {kind}; {SUPPORTED}")
    if not (folder / "unet").is_dir():
        raise UserError(f"{folder} has no unet/ folder; a folder in diffusers' layout, or a single file, is needed")
    if (folder / "scheduler" / "scheduler_config.json").exists():
        Config.read(folder / "scheduler" / "scheduler_config.json").fixed(configs.SCHEDULER_FIXED)

    def part(name, make, config_from):
        config = config_from(Config.read(folder / name / "config.json"))
        return fill(lambda: make(config), read_component(folder / name), lambda n: aliases(n.diffusers), folder / name)

    unet = part("unet", UNet, configs.unet_from)
    text_encoder = part("text_encoder", CLIPText, lambda config: configs.text_from(config, projected=False))
    return Model(
        unet=unet,
        vae=load_vae(vae) if vae else part("vae", VAE, configs.vae_from),
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(tokenizer or folder, text_encoder.config),
        sampling=read_sampling(folder / "sampling.json"),
    )


def load_single_file(path, tokenizer=None, vae=None):
    """Read an original Stable Diffusion file, with or without averaged (EMA) weights; those are preferred."""
    tensors, metadata = read_tensors(path)
    check_kind(tensors, path)
    if "ip2p" in metadata:  # written by `save_single_file`, which notes what the names do not tell
        try:
            values = json.loads(metadata["ip2p"])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: its header is damaged: {error}") from error
        noted = {key: Config(Config(values, path).values.get(key), path) for key in ("unet", "vae", "text_encoder")}
        unet_config, vae_config = configs.unet_from(noted["unet"]), configs.vae_from(noted["vae"])
        text_config = configs.text_from(noted["text_encoder"], projected=False)
        sampling = parse_sampling(Config(values.get("sampling"), path))
    else:
        channels = tensors[UNET_PREFIX + "input_blocks.0.0.weight"].shape[1:2]
        unet_config = replace(STABLE_DIFFUSION, in_channels=channels[0] if channels else 4)
        vae_config, text_config, sampling = STABLE_DIFFUSION_VAE, CLIP_L_TEXT, Sampling()

    averaged = {name for name in tensors if name.startswith("model_ema.diffusion_model")}
    raw = {name for name in tensors if name.startswith(UNET_PREFIX)}
    if averaged:
        unet = fill(lambda: UNet(unet_config), pick(tensors, averaged), lambda n: [ema_name(n.original)], path)
    else:
        unet = fill(lambda: UNet(unet_config), pick(tensors, raw), lambda n: [UNET_PREFIX + n.original], path)

    text = pick(tensors, {name for name in tensors if name.startswith(TEXT_PREFIX)})
    text_encoder = fill(lambda: CLIPText(text_config), text, lambda n: aliases(TEXT_PREFIX + n.original), path)
    return Model(
        unet=unet,
        vae=load_vae(vae) if vae else original_vae(tensors, VAE_PREFIX, vae_config, path),
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(tokenizer or tokenizer_beside(path), text_encoder.config),
        sampling=sampling,
    )


def load_vae(path):
    """An autoencoder alone: its own folder, the one inside a model's folder, or a file with the original names."""
    path = find(path)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config = configs.vae_from(Config.read(folder / "config.json"))
        return fill(lambda: VAE(config), read_component(folder), lambda name: aliases(name.diffusers), folder)
    tensors, _ = read_tensors(path)
    prefix = VAE_PREFIX if any(name.startswith(VAE_PREFIX) for name in tensors) else ""
    return original_vae(tensors, prefix, STABLE_DIFFUSION_VAE, path)


def original_vae(tensors, prefix, config, path):
    """The autoencoder among the tensors of an original file; such files may hold parts of its training loss as well."""
    parts = tuple(prefix + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    mine = pick(tensors, {name for name in tensors if name.startswith(parts)})
    return fill(lambda: VAE(config), mine, lambda n: aliases(prefix + n.original), path)


def load_tokenizer(path, text_config):
    """The tokenizer in a folder, or in its `tokenizer/`, checked against the text encoder it is for."""
    folder = Path(path)
    folder = folder / "tokenizer" if os.path.isdir(folder / "tokenizer") else folder
    tokenizer = CLIPTokenizer.load(folder, text_config.tokens)
    check_vocabulary(tokenizer, text_config, folder)
    return tokenizer


def tokenizer_beside(path):
    """Where the tokenizer of a single file is: beside it, else CLIP's own, from the hub's cache or the hub."""
    for folder in (path.parent / "tokenizer", path.parent):
        if (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists():
            return folder
    for repository in (CLIP_L, PUBLIC):
        with suppress(UserError):
            return from_hub(repository, TOKENIZER_FILES)
    raise UserError(
        f"{path} holds no tokenizer: put a folder tokenizer/ with vocab.json and merges.txt beside it, or name one "
        f"with --tokenizer (the hub's {CLIP_L} has it, but cannot be reached)"
    )


# ---- what is it, and does it fit together? ----

OTHER_KINDS = [  # what it is, and how some of its names begin
    ("Stable Diffusion XL checkpoint", "conditioner.embedders.", UNET_PREFIX + "label_emb."),
    ("Stable Diffusion 2 checkpoint", "cond_stage_model.model."),
    ("Stable Diffusion 3 checkpoint", UNET_PREFIX + "joint_blocks."),
    ("Flux checkpoint", UNET_PREFIX + "double_blocks.", "double_blocks."),
    ("LoRA, which changes a model but is none", "lora_"),
]


def check_kind(tensors, path):
    """Raise UserError unless these are the names of an original Stable Diffusion 1.x file, saying what they are."""
    for kind, *beginnings in OTHER_KINDS:
        if any(name.startswith(tuple(beginnings)) for name in tensors):
            raise UserError(f"{path} is a {kind}; {SUPPORTED}")
    if UNET_PREFIX + "input_blocks.0.0.weight" not in tensors:
        found = f"it holds {next(iter(tensors))}, ..." if tensors else "it holds no tensors"
        raise UserError(f"{path} is no Stable Diffusion checkpoint ({found}); its UNet should be {UNET_PREFIX}...")


def check_fit(model):
    """Raise UserError where the parts of a model do not fit each other."""
    unet, vae, text = model.unet.config, model.vae.config, model.text_encoder.config
    if unet.context_width != text.width:
        wanted = f"wants a text {unet.context_width} wide, its text encoder gives {text.width}"
        raise UserError(f"{model.source}: the UNet {wanted}")
    if unet.out_channels != vae.latent_channels:
        wanted = f"makes latents of {unet.out_channels} channels, its VAE has {vae.latent_channels}"
        raise UserError(f"{model.source}: the UNet {wanted}")


def check_vocabulary(tokenizer, text_config, path):
    """Raise UserError where a tokenizer gives ids that its text encoder does not know."""
    if max(tokenizer.vocabulary.values()) >= text_config.vocabulary or tokenizer.end != text_config.end_token:
        raise UserError(f"the tokenizer in {path} is not the one that the text encoder was trained with")


def read_sampling(path):
    """A model's sampling defaults, the released code's where the file is missing."""
    return parse_sampling(Config.read(path)) if path.exists() else Sampling()


def parse_sampling(config):
    """A Config -> Sampling."""
    values = {field: config.values.get(field, getattr(Sampling, field)) for field in asdict(Sampling())}
    config.must(all(type(value) in (int, float) for value in values.values()), "numbers are needed")
    try:
        check_sampling(**values)
    except UserError as error:
        raise UserError(f"{config.name}: {error}") from error
    return Sampling(int(values.pop("steps")), resolution=int(values.pop("resolution")), **values)


# ---- writing ----


@contextmanager
def new_folder(folder):
    """`atomic_write` for a folder that must not exist yet. Raises UserError if it does."""
    if Path(folder).exists():
        raise UserError(f"{folder} exists already; name a new folder, or remove it first")
    with atomic_write(folder) as beside:
        yield beside


def save_folder(model, folder, dtype=None):
    """Write a Model as a folder that diffusers opens. dtype None: as it is. Raises UserError if `folder` exists."""
    with new_folder(folder) as beside:
        (beside / "tokenizer").mkdir(parents=True)
        model.tokenizer.save(beside / "tokenizer")
        for name, network, config in [
            ("unet", model.unet, configs.unet_json(model.unet.config)),
            ("vae", model.vae, configs.vae_json(model.vae.config)),
            ("text_encoder", model.text_encoder, configs.text_json(model.text_encoder.config)),
        ]:
            write_json(beside / name / "config.json", config)
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            write_tensors(beside / name / f"{stem}.safetensors", renamed(network, "diffusers", dtype))
        write_json(beside / "scheduler" / "scheduler_config.json", configs.scheduler_json())
        write_json(beside / "sampling.json", asdict(model.sampling))
        write_json(beside / "model_index.json", configs.index_json(model.unet.config.in_channels))


def save_vae(vae, folder, dtype=None):
    """Write an autoencoder alone as a folder that `load_vae` and diffusers open. Raises UserError if it exists."""
    with new_folder(folder) as beside:
        write_json(beside / "config.json", configs.vae_json(vae.config))
        write_tensors(beside / "diffusion_pytorch_model.safetensors", renamed(vae, "diffusers", dtype))


def save_single_file(model, path, dtype=None):
    """Write a Model as one .safetensors file with the original names. The tokenizer is not part of such a file."""
    tensors = {
        **{UNET_PREFIX + name: tensor for name, tensor in renamed(model.unet, "original", dtype).items()},
        **{VAE_PREFIX + name: tensor for name, tensor in renamed(model.vae, "original", dtype).items()},
        **{TEXT_PREFIX + name: tensor for name, tensor in renamed(model.text_encoder, "original", dtype).items()},
    }
    for name in tensors:
        if ".mid.attn_1." in name and name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight")):
            tensors[name] = tensors[name][:, :, None, None]  # 1x1 convolutions in the original
    positions = torch.arange(model.text_encoder.config.tokens)[None]
    tensors[TEXT_PREFIX + "text_model.embeddings.position_ids"] = positions
    noted = {
        "unet": configs.unet_json(model.unet.config),
        "vae": configs.vae_json(model.vae.config),
        "text_encoder": configs.text_json(model.text_encoder.config),
        "sampling": asdict(model.sampling),
    }
    with atomic_write(path) as beside:
        write_tensors(beside, tensors, {"ip2p": json.dumps(noted)})


def save_clip(clip, tokenizer, folder, dtype=None):
    """Write CLIP's towers and the tokenizer in transformers' layout. Raises UserError if `folder` exists."""
    with new_folder(folder) as beside:
        write_json(beside / "config.json", configs.clip_json(clip.config))
        write_tensors(beside / "model.safetensors", renamed(clip, "diffusers", dtype))
        tokenizer.save(beside)
