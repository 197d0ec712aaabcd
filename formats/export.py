"""From a text-to-image model to a trainable editor, and from a training run to a model that others can open."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from cli import UserError, reported_as

import torch

from formats import checkpoint
from formats.lora import adapted_layers, add_lora, merge_lora, write_lora
from formats.weights import check_finite, extend_input, fingerprint

SCALES_WIDTH = 256  # of the guidance scales' embedding in a distilled editor


def load_editor(options, device="cpu"):
    """The `checkpoint.Model` of a training's settings: an editor, or Stable Diffusion with new input channels of zeros.

    With `options.distill` it is a student (training/distill.py) of the editor that `options.init` names. The defaults
    for sampling that the settings name take the place of the model's own. Returns the model and the
    fingerprint of the weights in the file. Raises UserError if any weight is NaN or Inf.
    """
    model = checkpoint.load(options.init, device, kind="editor" if options.distill else "sd")
    networks = {name: getattr(model, name) for name in checkpoint.PARTS}
    for name, network in networks.items():
        check_finite(network, f"{model.source}, {name}")
    base = fingerprint(*networks.values())
    channels = model.vae.config.latent_channels
    if model.unet.config.in_channels == channels:
        model.unet = extend_input(model.unet, in_channels=2 * channels)
    if model.unet.scales and not options.distill:
        raise UserError(f"{model.source} is a distilled editor, which --distill trains; --init takes others")
    if options.distill:
        if not model.unet.config.scales_width:
            model.unet = extend_input(model.unet, scales_width=SCALES_WIDTH)
        model.sampling = replace(model.sampling, sampler="euler", schedule="trailing")
    named = {"steps": options.sampling_steps, "text_guidance": options.cfg_text, "image_guidance": options.cfg_image}
    model.sampling = replace(model.sampling, **{name: value for name, value in named.items() if value is not None})
    return model, base


def choose_weights(unet, trainable, rank):
    """Choose which weights are trained: all ("full"), "attention" and the first convolution, or those of "lora"."""
    unet.requires_grad_(trainable == "full")
    if trainable == "lora":
        add_lora(unet, rank)
    elif trainable == "attention":
        for layer in adapted_layers(unet).values():
            layer.requires_grad_(True)
    if unet.scales:
        unet.scales.requires_grad_(True)  # a student has them from nowhere else


def write_model(model, path):
    """Write an editor in half precision: a .safetensors file, or else a folder. Raises UserError if it is there."""
    merge_lora(model.unet)
    save = checkpoint.save_single_file if path.suffix.lower() == ".safetensors" else checkpoint.save_folder
    save(model, path, torch.float16)


def replace_model(model, folder):
    """Write an editor as a folder in place of an older one, which stays until the new one is there."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    write_model(model, beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def export(folder, state, out, lora=False, raw=False, init=None):
    """Write the editor of a run's folder from a state, with the averaged weights or (raw) the last ones.

    init: where the model that the training began with is now, if it was moved. Raises UserError.
    """
    with reported_as(f"{folder / 'settings.json'} cannot be read"):
        run = SimpleNamespace(**json.loads((folder / "settings.json").read_text(encoding="utf-8")))
    run.init, run.distill = init or run.init, getattr(run, "distill", None)
    if lora and run.trainable != "lora":
        raise UserError(f"{folder} was trained with --trainable {run.trainable}; it has no LoRA")
    if lora and run.distill:
        raise UserError(f"{folder} is of a distilled editor, which is more than a LoRA; leave out --lora")
    if not init and Path(run.init).is_absolute() and not Path(run.init).exists():
        raise UserError(f"the training began with {run.init}, which is not there; say where it is now by --init")
    model, base = load_editor(run)
    if base != getattr(run, "init_fingerprint", base):
        raise UserError(f"{run.init} is not the model that the training began with; name that one by --init")
    choose_weights(model.unet, run.trainable, run.rank)
    model.unet.load_state_dict(state["weights" if raw else "ema"], strict=False)  # only the trained ones are there
    if lora:
        with checkpoint.write_new(out) as beside:
            write_lora(model.unet, beside, base=run.init)
    else:
        write_model(model, out)
        print(f"{out}: in half precision (float16), with its tokenizer", file=sys.stderr)
