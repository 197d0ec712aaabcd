"""The settings of an edit: a model's own defaults, and what is allowed.

Imports nothing heavy, so that programs can answer a mistake at once.
"""

import os
from dataclasses import dataclass

from errors import UserError


@dataclass(frozen=True)
class Sampling:
    """A model's sampling defaults, kept in a folder's `sampling.json`; these here are the released code's."""

    steps: int = 100
    text_guidance: float = 7.5  # s_T of Eq. 3: how strongly to follow the instruction
    image_guidance: float = 1.5  # s_I of Eq. 3: how closely to keep to the picture
    resolution: int = 512  # pixels of the longer side, about


def check_sampling(steps, text_guidance, image_guidance, resolution):
    """Raise UserError for a value out of range; None stands for the model's default and passes."""
    if steps is not None and not 1 <= steps <= 1000:
        raise UserError(f"the steps should be between 1 and 1000, not {steps}")
    for name, scale in (("text", text_guidance), ("image", image_guidance)):
        if scale is not None and not 0 <= scale <= 100:
            raise UserError(f"the {name} guidance should be between 0 and 100, not {scale}")
    if resolution is not None and not 64 <= resolution <= 4096:
        raise UserError(f"the resolution should be between 64 and 4096 pixels, not {resolution}")


def check_instruction(instruction):
    """Raise UserError for an empty one, and for bytes that were no text when the command line was read."""
    if not instruction.strip():
        raise UserError('the instruction is empty; say what to change, such as "make it night"')
    if any("\ud800" <= letter <= "\udfff" for letter in instruction):
        raise UserError("the instruction is not valid UTF-8 text; check the terminal's encoding")


def check_device(name):
    """Raise UserError unless torch can compute on the device of this name. Imports torch."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch has another one for every device that it was not made for
        raise UserError(f"this machine or this torch has no device {name}; try --device cpu") from error


def check_device_name(name):
    """Raise UserError unless it is the name of a device, which need not be there. Imports torch."""
    import torch

    try:
        torch.device(name)
    except RuntimeError as error:
        raise UserError(f"there is no kind of device {name}; try cpu or cuda") from error


def own_device(name):
    """The device for this process: "cuda" is the one GPU, or of several that of this process of torchrun's."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if name == "cuda" and rank else name


def check_seeds(seeds):
    """Raise UserError unless there are seeds and the random generators take them all."""
    if not seeds or not all(0 <= seed < 2**63 for seed in seeds):
        raise UserError(f"a seed should be a whole number from 0 to {2**63 - 1}")
