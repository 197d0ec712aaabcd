"""The ways to edit that Section 4 compares, as one table: each edits some cases at one setting of its own knob.

A function takes (lab, value, cases) and returns a list of RGB images, `lab.side` pixels a side.
"""

from collections.abc import Callable
from typing import NamedTuple

from baselines.real_p2p import edit_inverted, invert
from baselines.sdedit import sdedit
from baselines.text2live import MINIATURE, PHOTOGRAPHS, text2live
from section4.lab import captions_of


class Method(NamedTuple):
    """A way to edit."""

    name: str
    knob: str  # what is varied in Fig. 8
    values: tuple  # as there
    usual: float | int | None  # the value for a single image; None: the model's own
    edit: Callable


def ours(lab, image_guidance, cases, **settings):
    """InstructPix2Pix with this s_I; settings: others of `InstructPix2Pix.edit` than the model's own."""
    settings = {"steps": lab.steps, "seed": [case.seed for case in cases]} | settings
    images, texts = [case.images(lab.side)[0] for case in cases], [case.instruction for case in cases]
    return lab.editor.edit(images, texts, image_guidance=image_guidance, resolution=lab.side, **settings)


def by_sdedit(lab, strength, cases, texts=None):
    """SDEdit with the caption of the result, as in Sec. 4; or with other texts, as in Fig. 9 with the instruction."""
    images, texts = [case.images(lab.side)[0] for case in cases], texts or captions_of(cases)[1]
    return fitted(lab, sdedit(lab.sd, images, texts, strength, steps=lab.steps, seeds=[case.seed for case in cases]))


def by_sdedit_instruction(lab, strength, cases):
    """SDEdit with the instruction in place of a caption."""
    return by_sdedit(lab, strength, cases, [case.instruction for case in cases])


def by_p2p(inversion):
    """Prompt-to-Prompt on the real image, by an inversion of `baselines.real_p2p.INVERSIONS`."""

    def edit(lab, share, cases):
        (before, after), own = captions_of(cases), lab.sd.sampling
        steps, guidance, key = lab.steps or own.steps, own.text_guidance, (inversion, *(case.seed for case in cases))
        if lab.inverted[0] != key:  # all shares of a batch follow one another, and begin at the same noise
            images = [case.images(lab.side)[0] for case in cases]
            lab.inverted = key, invert(lab.sd, images, before, steps, guidance, inversion)
        return fitted(lab, edit_inverted(lab.sd, lab.inverted[1], before, after, share, guidance)[1])

    return edit


def by_text2live(lab, steps, cases):
    """Text2Live with the first CLIP, an optimisation of each image in so many steps; None: the usual number."""
    recipe, usual = (MINIATURE, 300) if cases[0].scenes else (PHOTOGRAPHS, 1000)
    inputs = [case.images(lab.side)[0] for case in cases], *captions_of(cases)
    how = {"steps": steps or usual, "recipe": recipe}
    return [text2live(lab.clips[0], *one, **how)[0] for one in zip(*inputs, strict=True)]


def fitted(lab, images):
    """Images of a model with another resolution than the editor's, as large as its own."""
    return [image.resize((lab.side, lab.side)) for image in images]


TENTHS = tuple(round(0.1 * number, 1) for number in range(1, 10))
METHODS = {
    "ip2p": Method("InstructPix2Pix (ours)", "s_I", (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2), None, ours),
    "sdedit": Method("SDEdit", "strength", TENTHS[2:], 0.6, by_sdedit),
    "p2p-null": Method("Prompt-to-Prompt, null-text", "p", TENTHS, 0.5, by_p2p("null-text")),
    "p2p-caption": Method("Prompt-to-Prompt, source caption", "p", TENTHS, 0.5, by_p2p("source-caption")),
    "sdedit-instruction": Method("SDEdit (instruction)", "strength", TENTHS[2:], 0.6, by_sdedit_instruction),
    "text2live": Method("Text2Live", "steps", (100, 300, 1000), None, by_text2live),
}
OF_FIG_8 = "ip2p", "sdedit", "p2p-null", "p2p-caption"
