"""The independent implementations, holding the same weights as our networks."""

import importlib.util
import warnings
from pathlib import Path

import torch

from formats import configs
from formats.weights import renamed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import transformers

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def relative_error(ours, theirs):
    """||a - b|| / ||b||, in float64."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def with_weights_of(network, theirs):
    """Give a foreign network the weights of ours: every one of them and no other, the tensors shared."""
    theirs.load_state_dict(renamed(network, "diffusers", None), strict=True, assign=True)
    return theirs.eval()


def unet_reference(unet):
    """diffusers' UNet with the same weights."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(configs.unet_json(unet.config))
    return with_weights_of(unet, theirs)


def vae_reference(vae):
    """diffusers' autoencoder with the same weights."""
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(configs.vae_json(vae.config))
    return with_weights_of(vae, theirs)


def text_reference(text):
    """transformers' text tower with the same weights; its names lack one level."""
    config = transformers.CLIPTextConfig(**configs.text_json(text.config))
    theirs = transformers.CLIPTextModel(config)
    weights = renamed(text, "diffusers", None)
    weights = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    theirs.load_state_dict(weights, strict=True, assign=True)
    return theirs.eval()


def clip_reference(clip):
    """transformers' CLIP with the same weights."""
    values = configs.clip_json(clip.config)
    config = transformers.CLIPConfig(
        text_config=values["text_config"],
        vision_config=values["vision_config"],
        projection_dim=values["projection_dim"],
    )
    return with_weights_of(clip, transformers.CLIPModel(config))


def real_vocabulary():
    """CLIP's own (vocabulary, merges), from the package that ships them; they are not ours to commit."""
    import gzip

    package = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = [chr(byte) for first, last in ("!~", "\xa1\xac", "\xae\xff") for byte in range(ord(first), ord(last) + 1)]
    letters += [chr(256 + number) for number in range(256 - len(letters))]  # stand-ins for the bytes without a shape
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def equal_schedule(pipeline, sigmas, t):
    """Make a diffusers pipeline sample at exactly these noise levels and fractional times."""

    def set_timesteps(count, device=None):
        pipeline.scheduler.num_inference_steps = count
        pipeline.scheduler.sigmas = sigmas.float()
        pipeline.scheduler.timesteps = t.float()
        pipeline.scheduler._step_index = None

    pipeline.scheduler.set_timesteps = set_timesteps
    pipeline.set_progress_bar_config(disable=True)


def edit_reference(pipeline, model, image, instruction, seed):
    """The edit that diffusers makes with our model's settings, noise levels and noise: uint8 [H, W, 3]."""
    sampling = model.sampling
    sigmas = model.schedule.sigmas(sampling.steps)
    equal_schedule(pipeline, sigmas, model.schedule.t(sigmas[:-1]))
    images = pipeline(
        instruction,
        image=image,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.text_guidance,
        image_guidance_scale=sampling.image_guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return (images[0] * 255).astype("uint8")  # truncated, as the released code does
