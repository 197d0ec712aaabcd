"""The miniature world: scenes whose captions, edits and true edited images are known.

A `Scene` is one or two things on a background, in a medium. drawing.py draws it, `caption` describes it, `random_edit`
changes one attribute and words the instruction. An edit keeps what it does not mention, down to the pixel, because
everything else comes from the scene's `layout` seed. So every edit has a TRUE edited image: never shown in training.

Held out from all training, for evaluation: a tenth of all compositions (the attributes without the side of a single
thing), chosen by a hash, and the phrasings in `HELD_OUT` of phrasings.py.
"""

import zlib
from dataclasses import astuple, dataclass, replace

from mini.drawing import COLOURS, SIZES
from mini.phrasings import HELD_OUT, PHRASINGS

SHAPES = ("ball", "star", "heart", "house", "tree", "mushroom")
MEDIA = ("painting", "sketch", "mosaic")
BACKGROUNDS = {  # name: as a caption says it
    "meadow": "in a meadow", "sea": "by the sea", "desert": "in the desert", "sunset": "at sunset",
    "night": "at night", "snow": "in the snow", "autumn": "in autumn", "paper": "on white paper",
}  # fmt: skip
OPTIONS = {"colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS, "medium": MEDIA, "size": SIZES}
KINDS = (*OPTIONS, "add", "remove")  # of edits


@dataclass(frozen=True)
class Thing:
    """An object of a scene."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """All attributes of an image. The things of a scene differ in shape, so that "the star" is unambiguous."""

    medium: str
    background: str
    left: Thing | None
    right: Thing | None
    layout: int  # seed of everything else: places, horizon, stars, tints

    @property
    def things(self):
        """The one or two things, from left to right."""
        return [thing for thing in (self.left, self.right) if thing]


@dataclass(frozen=True)
class Edit:
    """An edit and the true scene after it."""

    kind: str
    instruction: str
    before: Scene
    after: Scene
    new_phrasing: bool = False  # worded as training never words it


def caption(scene, side=True):
    """A scene in words: "a painting of a large red house and a small blue tree by the sea".

    A single thing has its side, unless side=False, so that Prompt-to-Prompt has no reason to move anything.
    """
    things = " and ".join(f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things)
    side = f" on the {'left' if scene.left else 'right'}" if side and len(scene.things) == 1 else ""
    return f"a {scene.medium} of {things}{side} {BACKGROUNDS[scene.background]}"


def held_out(scene):
    """Is this composition kept from all training? A tenth of them are, and then their mirror images are, too."""
    things = sorted(astuple(thing) for thing in scene.things)
    return zlib.crc32(repr((scene.medium, scene.background, things)).encode()) % 10 == 0


# ---- random scenes and edits ----


def random_scene(rng, test=False):
    """A scene for training, or a held-out one with `test`. rng: a numpy Generator."""
    while True:
        shapes = rng.choice(SHAPES, 2, replace=False)
        things = [Thing(str(shape), pick(rng, COLOURS), pick(rng, SIZES)) for shape in shapes]
        if rng.random() < 0.45:
            things[rng.integers(2)] = None
        layout = int(rng.integers(2**31))
        scene = Scene(pick(rng, MEDIA), pick(rng, BACKGROUNDS), things[0], things[1], layout)
        if held_out(scene) == test:
            return scene


def random_edit(rng, kind=None, test=False, new_phrasing=False):
    """An edit of a random scene. kind: one of KINDS, or None for any.

    test: both scenes are held-out compositions, else neither is; new_phrasing: worded as training never words it.
    """
    kind = kind or pick(rng, KINDS)
    while True:
        before = random_scene(rng, test)
        if kind != ("remove" if len(before.things) == 1 else "add"):  # there are one or two, always
            after, key, words = change(before, kind, rng)
            if held_out(after) == test:
                break
    template = pick(rng, (HELD_OUT if new_phrasing else PHRASINGS)[key])
    return Edit(kind, template.format(**words), before, after, new_phrasing)


def change(scene, kind, rng):
    """Change one attribute randomly: (the scene after, the key of its phrasings, the words that fill them)."""
    if kind in ("background", "medium"):
        value = pick(rng, OPTIONS[kind], but=[getattr(scene, kind)])
        return replace(scene, **{kind: value}), value, {}
    if kind == "add":
        old, side = scene.things[0], "right" if scene.left else "left"
        new = Thing(pick(rng, SHAPES, but=[old.shape]), pick(rng, COLOURS), pick(rng, SIZES))
        return replace(scene, **{side: new}), kind, {**vars(new), "other": old.shape}
    side = pick(rng, [side for side in ("left", "right") if getattr(scene, side)])
    thing = getattr(scene, side)
    if kind == "remove":
        return replace(scene, **{side: None}), kind, {"shape": thing.shape}
    taken = [thing.shape for thing in scene.things] if kind == "shape" else [getattr(thing, kind)]
    new = replace(thing, **{kind: pick(rng, OPTIONS[kind], but=taken)})
    key = new.size if kind == "size" else kind
    return replace(scene, **{side: new}), key, {"shape": thing.shape, "colour": new.colour, "other": new.shape}


def pick(rng, options, but=()):
    """One of the options, but for some of them, as a plain string."""
    options = [option for option in options if option not in but]
    return options[rng.integers(len(options))]
