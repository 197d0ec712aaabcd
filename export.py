"""What a training run gives away: the editor as a folder in diffusers' layout, or as one file."""

import shutil
from dataclasses import replace

import torch

import checkpoint
from editor_training import choose_weights, load_editor
from errors import UserError
from lora import merge_lora, write_lora
from states import newest_state


def write_model(model, options, path):
    """Write an editor in half precision: a .safetensors file, or else a folder, in place of an older one.

    options: of train.py; what they say of sampling becomes the model's default.
    """
    merge_lora(model.unet)
    names = {"steps": "sampling_steps", "text_guidance": "cfg_text", "image_guidance": "cfg_image"}
    chosen = {name: getattr(options, option) for name, option in names.items() if getattr(options, option) is not None}
    model.sampling = replace(model.sampling, **chosen)
    if path.suffix == ".safetensors":
        checkpoint.save_single_file(model, path, torch.float16)
    else:
        shutil.rmtree(path, ignore_errors=True)
        checkpoint.save_folder(model, path, torch.float16)


def export(options):
    """Write the editor of a run's newest state, with the averaged weights or, with --raw, the last ones."""
    state = newest_state(options.run)
    if state is None:
        raise UserError(f"{options.run} holds no states of a training")
    run = Settings(state["settings"])
    model = load_editor(run.init, "cpu")
    choose_weights(model.unet, run.trainable, run.rank)
    weights = dict(model.unet.named_parameters())
    with torch.no_grad():
        for name, value in state["weights" if options.raw else "average"].items():
            weights[name].copy_(value)
    if options.lora:
        if run.trainable != "lora":
            raise UserError(f"{options.run} was trained with --trainable {run.trainable}; it has no LoRA of its own")
        write_lora(model.unet, options.out)
    else:
        write_model(model, run, options.out)
    print(options.out)


class Settings:
    """What the command line of a run said, as attributes."""

    def __init__(self, values):
        vars(self).update(values)
