"""The miniature world: scenes whose captions, edits and true edited images are known.

A `Scene` is one or two things on a background, in a medium. drawing.py draws it, words.py captions it, `random_edit`
changes it and words the request by wording.py. An edit keeps what it does not mention, down to the pixel, because
everything else comes from the scene's `layout` seed. So every edit has a TRUE edited image: never shown in training.

Held out from all training, for evaluation: a tenth of all compositions (with their mirror images), chosen by a hash,
and the constructions and words of requests that begin with ~ in phrasings.py and words.py.
"""

import zlib
from dataclasses import astuple, dataclass, replace

from mini.wording import canonical, word
from mini.words import BACKGROUNDS, COLOURS, MEDIA, PLACES, SIZES, THINGS, caption

OPTIONS = {"colour": COLOURS, "shape": THINGS, "background": BACKGROUNDS, "medium": MEDIA, "size": SIZES}
OPTIONS = {name: tuple(table) for name, table in OPTIONS.items()}
SIMPLE = (*OPTIONS, "add", "remove")  # kinds of edits that change one attribute
KINDS = (*SIMPLE, "side", "two", "nothing")  # a thing named by its side; two edits in one request; no change
P_RANGE = (0.1, 0.4)  # of shared attention, where the background changes: more of it keeps the old sun beside the moon


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
    wording: str = "trained"  # one of wording.CLASSES
    style: str = "plain"  # of the wording, see wording.STYLES
    canonical: str = ""  # the plainest request for the same
    caption_style: int = 0  # of both captions, see words.caption

    @property
    def captions(self):
        """The captions of the scenes before and after."""
        return caption(self.before, self.caption_style), caption(self.after, self.caption_style)

    def triplet(self):
        """The edit as a record of a file of edits."""
        before, after = self.captions
        record = {"caption": before, "edit": self.instruction, "output": after, "url": None}
        return record | ({"p": P_RANGE} if self.before.background != self.after.background else {})


def held_out(scene):
    """Is this composition kept from all training? A tenth of them are, and then their mirror images are, too."""
    things = sorted(astuple(thing) for thing in scene.things)
    return zlib.crc32(repr((scene.medium, scene.background, things)).encode()) % 10 == 0


def random_scene(rng, test=False):
    """A scene for training, or a held-out one with `test`. rng: a numpy Generator."""
    while True:
        shapes = rng.choice(OPTIONS["shape"], 2, replace=False)
        things = [Thing(str(shape), pick(rng, "colour"), pick(rng, "size")) for shape in shapes]
        if rng.random() < 0.45:
            things[rng.integers(2)] = None
        layout = int(rng.integers(2**31))
        scene = Scene(pick(rng, "medium"), pick(rng, "background"), things[0], things[1], layout)
        if held_out(scene) == test:
            return scene


def random_edit(rng, kind=None, test=False, wording="trained"):
    """An edit of a random scene. kind: one of KINDS, or None for any; wording: one of wording.CLASSES.

    test: both scenes are held-out compositions, else neither is.
    """
    kind = kind or KINDS[rng.integers(len(KINDS))]
    change = {"side": change_by_side, "two": change_two, "nothing": no_change}.get(kind) or change_one
    while True:
        before = random_scene(rng, test)
        changed = change(before, kind, rng)
        if changed and held_out(changed[0]) == test:
            break
    after, form, words = changed
    instruction, style = word(rng, form, words, wording)
    caption_style = int(rng.integers(2) * rng.integers(1, 10**6))  # half of them are plain
    return Edit(kind, instruction, before, after, wording, style, canonical(form, words), caption_style)


# ---- a change of a scene: (the scene after, the kind of form that words it, the words that fill it), or None ----


def change_one(scene, kind, rng):
    """Change one attribute; None where the scene has no place for it."""
    if kind == ("remove" if len(scene.things) == 1 else "add"):  # there are one or two things, always
        return None
    if kind in ("background", "medium"):
        value, now = pick(rng, kind, but=[getattr(scene, kind)]), getattr(scene, kind)
        before = (PLACES if kind == "background" else MEDIA)[now][0]
        return replace(scene, **{kind: value}), kind, {kind: value, "before": before}
    if kind == "add":
        old, side = scene.things[0], "right" if scene.left else "left"
        new = Thing(pick(rng, "shape", but=[old.shape]), pick(rng, "colour"), pick(rng, "size"))
        words = {"shape": old.shape, "new": (new.size, new.colour, new.shape)}
        return replace(scene, **{side: new}), kind, words
    side = [side for side in ("left", "right") if getattr(scene, side)][rng.integers(len(scene.things))]
    return change_thing(scene, kind, side, rng)


def change_thing(scene, kind, side, rng):
    """Change the thing on one side: its colour, shape or size, or remove it."""
    thing = getattr(scene, side)
    words = {"shape": thing.shape, "of_colour": thing.colour}
    if kind == "remove":
        return replace(scene, **{side: None}), kind, words
    taken = [other.shape for other in scene.things] if kind == "shape" else [getattr(thing, kind)]
    value = pick(rng, kind, but=taken)
    words |= {"other" if kind == "shape" else kind: value}
    if kind != "shape":
        words["old"] = getattr(thing, kind)
    return replace(scene, **{side: replace(thing, **{kind: value})}), kind, words


def change_by_side(scene, kind, rng):
    """Change one of two things that is named by its place: "make the one on the left red"."""
    if len(scene.things) == 1:
        return None
    side, kind = ("left", "right")[rng.integers(2)], ("colour", "shape", "size", "remove")[rng.integers(4)]
    after, form, words = change_thing(scene, kind, side, rng)
    return after, form, words | {"side": side}


def change_two(scene, kind, rng):
    """Two changes, of different kinds and of different things, in one request."""
    kinds = rng.choice(SIMPLE, 2, replace=False)
    first = change_one(scene, str(kinds[0]), rng)
    second = first and change_one(first[0], str(kinds[1]), rng)
    if not second or {*kinds} == {"add", "remove"}:
        return None
    named = [words.get("other") or words.get("shape") for words in (first[2], second[2])]
    if "add" in kinds or (named[0] and named[0] in (named[1], second[2].get("shape"))):  # one may need the other
        return None
    return second[0], "two", {"one": first[1:], "two": second[1:]}


def no_change(scene, kind, rng):
    """Requests for nothing, for what is so already, for what is not there, or not of this world."""
    way = rng.random()
    if way < 0.3:
        return scene, "nothing", {}
    if way < 0.55:
        return scene, "nothing", {"strange": None, "shape": scene.things[0].shape, "colour": pick(rng, "colour")}
    thing = scene.things[rng.integers(len(scene.things))]
    if way < 0.8:  # so already
        kind = pick(rng, but=("shape", "size"))  # who asks for a large thing to be larger asks for more than that
        if kind == "colour":
            return scene, kind, {"colour": thing.colour, "shape": thing.shape}
        return scene, kind, {kind: getattr(scene, kind)}
    missing = pick(rng, "shape", but=[thing.shape for thing in scene.things])
    kind = ("colour", "shape", "size", "remove")[rng.integers(4)]
    words = {"shape": missing}
    if kind != "remove":
        words["other" if kind == "shape" else kind] = pick(rng, kind, but=[missing])
    return scene, kind, words


def pick(rng, name=None, but=()):
    """One of the options of an attribute, but for some of them, or one of the attributes, as a plain string."""
    options = [option for option in (OPTIONS[name] if name else OPTIONS) if option not in but]
    return options[rng.integers(len(options))]
