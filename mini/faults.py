"""Faults that anyone would see in an edited image, found without a network: second moons, ghosts, spots, blots.

The image is compared with the TRUE edited one, both blurred, so that only what is large enough counts. What the editor
cannot know is tried out: where in its place a new thing stands, and a sun or moon that the input did not show.
"""

from itertools import product

import torch.nn.functional as F

from images import to_tensor
from mini.drawing import UNIT, render

BLUR = 9  # pixels a side of the square over which colours are averaged
VISIBLE = 0.15  # the largest difference of averaged colours, in [0, 1], in any channel, that no one minds
WITH_FAR = ("meadow", "desert", "sunset", "night")  # backgrounds with a cloud, a sun or a moon
HORIZON = slice(25 * UNIT, 44 * UNIT)  # rows that hold it; white paper does not show where it is


def fault(image, edit):
    """The largest difference that anyone would see, in [0, 1]: image [3, H, W] in [-1, 1] and the edit's true result.

    It is that to the drawing of the layout or, if that is VISIBLE, the smallest that any of the true drawings gives.
    """
    seen, after = blurred(image), edit.after
    hidden = edit.before.background == "paper" and after.background != "paper"

    def difference(far, shifts):
        error = (seen - blurred(to_tensor(render(after, far, shifts)))).abs().amax(dim=0)
        if hidden:
            error[HORIZON] = 0
        return error.max().item()

    found = difference(None, ((0, 0), (0, 0)))
    if found <= VISIBLE:
        return found
    shown = edit.before.background in WITH_FAR or after.background not in WITH_FAR
    fars = [None] if shown else [None, *range(14, 51, 3)]
    far = min(fars, key=lambda far: difference(far, ((0, 0), (0, 0))))
    steps = list(product((-3, -1.5, 0, 1.5, 3), (-4, -2, 0, 2, 4)))
    new = [side for side in ("left", "right") if getattr(after, side) and not getattr(edit.before, side)]
    shifts = [((0, 0), (0, 0))]
    for side in new:
        shifts = [(step, (0, 0)) if side == "left" else ((0, 0), step) for step in steps]
    return min(difference(far, shift) for shift in shifts)


def blurred(image):
    """An image [3, H, W] in [-1, 1] -> its averaged colours [3, H, W] in [0, 1]; those beyond its border repeat it."""
    padded = F.pad(image[None], [BLUR // 2] * 4, mode="replicate")
    return (F.avg_pool2d(padded, BLUR, stride=1)[0].clamp(-1, 1) + 1) / 2
