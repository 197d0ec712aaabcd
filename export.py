"""What a training run gives away: the editor as a folder in diffusers' layout, or as one file."""

import shutil
from types import SimpleNamespace

import torch

from cli import UserError
from editor_training import choose_weights, chosen_sampling, load_editor
from formats import checkpoint
from formats.lora import merge_lora, write_lora
from states import newest_state


def write_model(model, path):
    """Write an editor in half precision: a .safetensors file, or else a folder. Raises UserError if it is there."""
    merge_lora(model.unet)
    if path.exists():
        raise UserError(f"{path} exists already; name another one, or remove it first")
    if path.suffix == ".safetensors":
        checkpoint.save_single_file(model, path, torch.float16)
    else:
        checkpoint.save_folder(model, path, torch.float16)


def replace_model(model, folder):
    """Write an editor as a folder in place of an older one, which stays until the new one is there."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    write_model(model, beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def export(options):
    """Write the editor of a run's newest state, with the averaged weights or, with --raw, the last ones."""
    state = newest_state(options.run)
    if state is None:
        raise UserError(f"{options.run} holds no states of a training")
    run = SimpleNamespace(**state["settings"])
    model = load_editor(run.init, "cpu")
    model.sampling = chosen_sampling(model.sampling, run)
    choose_weights(model.unet, run.trainable, run.rank)
    weights = dict(model.unet.named_parameters())
    with torch.no_grad():
        for name, value in state["weights" if options.raw else "average"].items():
            weights[name].copy_(value)
    if not options.lora:
        write_model(model, options.out)
    elif run.trainable == "lora":
        write_lora(model.unet, options.out)
    else:
        raise UserError(f"{options.run} was trained with --trainable {run.trainable}; it has no LoRA of its own")
    print(options.out)
