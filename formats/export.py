"""From a text-to-image model to a trainable editor, and from a training run to a model that others can open."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

from cli import UserError, reported_as

import torch

from formats import checkpoint
from formats.lora import adapted_layers, add_lora, merge_lora, write_lora
from formats.weights import extend_input


def load_editor(path, device="cpu", sampling=None):
    """A `checkpoint.Model` with an 8-channel UNet: an editor's, or Stable Diffusion's with new input channels of zeros.

    sampling: {name: value} to replace the model's own defaults for sampling; None values change nothing.
    """
    model = checkpoint.load(path, device)
    channels = model.vae.config.latent_channels
    if model.unet.config.in_channels == channels:
        model.unet = extend_input(model.unet, 2 * channels)
    model.sampling = replace(model.sampling, **{k: v for k, v in (sampling or {}).items() if v is not None})
    return model


def sampling_of(options):
    """The defaults for sampling that a training's command line names."""
    return {"steps": options.sampling_steps, "text_guidance": options.cfg_text, "image_guidance": options.cfg_image}


def choose_weights(unet, trainable, rank):
    """Choose which weights are trained: all ("full"), "attention" and the first convolution, or those of "lora"."""
    unet.requires_grad_(trainable == "full")
    if trainable == "lora":
        add_lora(unet, rank)
    elif trainable == "attention":
        for layer in adapted_layers(unet).values():
            layer.requires_grad_(True)


def write_model(model, path):
    """Write an editor in half precision: a .safetensors file, or else a folder. Raises UserError if it is there."""
    merge_lora(model.unet)
    save = checkpoint.save_single_file if path.suffix == ".safetensors" else checkpoint.save_folder
    save(model, path, torch.float16)


def replace_model(model, folder):
    """Write an editor as a folder in place of an older one, which stays until the new one is there."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    write_model(model, beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def export(folder, state, out, lora=False, raw=False):
    """Write the editor of a run's folder from a state, with the averaged weights or (raw) the last ones."""
    with reported_as(f"{folder / 'settings.json'} cannot be read"):
        run = SimpleNamespace(**json.loads((folder / "settings.json").read_text(encoding="utf-8")))
        init, trainable, rank, sampling = run.init, run.trainable, run.rank, sampling_of(run)
    if lora and trainable != "lora":
        raise UserError(f"{folder} was trained with --trainable {trainable}; it has no LoRA")
    model = load_editor(init, sampling=sampling)
    choose_weights(model.unet, trainable, rank)
    model.unet.load_state_dict(state["weights" if raw else "ema"], strict=False)  # only the trained ones are there
    if lora:
        write_lora(model.unet, out, base=init)
    else:
        write_model(model, out)
