"""The miniature's world: 64x64 scenes whose captions, edits and true edited pictures are known.

A `Scene` is one or two things on a background, in a medium. `render` draws it, `caption` describes it, `random_edit`
changes one attribute of it in the words a person would use. What an edit does not mention stays as it was, down to the
last star in the sky, because all that is not an attribute comes from the scene's `layout` seed. So the TRUE edited
picture exists for every edit. Training never sees it; `evaluate.py` measures by it.

Two things are held out from all training, to be measured on: a tenth of all compositions (what captions say, but for
the side of a lone thing), chosen by a hash, and the phrasings in `HELD_OUT` of phrasings.py.
"""

import math
import re
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from mini.phrasings import HELD_OUT, PHRASINGS

SIZE = 64  # pixels a side
FINE = 4  # things are drawn this many times larger, then averaged down

SHAPES = ("ball", "star", "heart", "house", "tree", "mushroom")
COLOURS = {
    "red": (214, 45, 50),
    "yellow": (250, 208, 50),
    "green": (58, 168, 76),
    "blue": (48, 108, 222),
    "purple": (138, 68, 188),
    "pink": (246, 142, 188),
}
SIZES = {"small": 8.0, "large": 13.0}  # half of a thing's height in pixels, about
MEDIA = ("painting", "sketch", "mosaic")
BACKGROUNDS = {  # name: as a caption says it
    "meadow": "in a meadow",
    "sea": "by the sea",
    "desert": "in the desert",
    "sunset": "at sunset",
    "night": "at night",
    "snow": "in the snow",
    "autumn": "in autumn",
    "paper": "on white paper",
}
KINDS = ("colour", "shape", "background", "medium", "size", "add", "remove")


@dataclass(frozen=True)
class Thing:
    """What stands in a scene."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """A whole picture. Things of one scene differ in shape, so that "the star" says which is meant."""

    medium: str
    background: str
    left: Thing | None
    right: Thing | None
    layout: int  # seed of all that is no attribute: places, horizon, stars, tints

    @property
    def things(self):
        """The one or two things, from left to right."""
        return [thing for thing in (self.left, self.right) if thing]


@dataclass(frozen=True)
class Edit:
    """An edit with its right answer."""

    kind: str
    instruction: str
    before: Scene
    after: Scene


# ---- words ----


def caption(scene):
    """A scene in words: "a painting of a large red house and a small blue tree by the sea", from left to right.

    Of a thing that is alone, it says where it stands: "a painting of a large red house on the left by the sea". So a
    caption leaves no attribute open, and in a pair of pictures made from two captions nothing has a reason to move.
    """
    side = "" if len(scene.things) == 2 else " on the left" if scene.left else " on the right"
    return describe(scene, side)


def describe(scene, side):
    """A scene's caption, with these words for where a lone thing stands."""
    things = " and ".join(f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things)
    return f"a {scene.medium} of {things}{side} {BACKGROUNDS[scene.background]}"


def read_caption(text, layout=0):
    """The scene that `caption` describes so, with this layout. Raises ValueError where it is no such caption."""
    thing = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    places = {words: name for name, words in BACKGROUNDS.items()}
    pattern = rf"a ({'|'.join(MEDIA)}) of {thing}(?: and {thing}| on the (left|right)) ({'|'.join(places)})"
    found = re.fullmatch(pattern, text)
    if not found:
        raise ValueError(f'"{text}" is not a caption of the miniature\'s world')
    medium, size, colour, shape, other_size, other_colour, other_shape, side, place = found.groups()
    first, second = Thing(shape, colour, size), None if side else Thing(other_shape, other_colour, other_size)
    if second and first.shape == second.shape:
        raise ValueError(f'"{text}" has the same thing twice, which the miniature\'s world has not')
    left, right = (None, first) if side == "right" else (first, second)
    return Scene(medium, places[place], left, right, layout)


def held_out(scene):
    """Is this composition kept from all training? A tenth of them is, each on whichever side a lone thing stands."""
    return zlib.crc32(describe(scene, "").encode()) % 10 == 0


# ---- scenes and edits by chance ----


def random_scene(rng, test=False):
    """A scene for training, or with `test` a held-out one. rng: a numpy Generator."""
    while True:
        first, second = (str(shape) for shape in rng.choice(SHAPES, 2, replace=False))
        things = [random_thing(rng, first), random_thing(rng, second)]
        if rng.random() < 0.45:
            things[rng.integers(2)] = None
        layout = int(rng.integers(2**31))
        scene = Scene(pick(rng, MEDIA), pick(rng, BACKGROUNDS), things[0], things[1], layout)
        if held_out(scene) == test:
            return scene


def random_thing(rng, shape):
    """A thing of this shape."""
    return Thing(shape, pick(rng, COLOURS), pick(rng, SIZES))


def random_edit(rng, kind=None, test=False, new_phrasing=False):
    """An edit of a random scene. kind: one of KINDS, or None for any.

    test: both the scene before and the one after are held-out compositions, else neither is. new_phrasing: the
    instruction is worded as training never words it.
    """
    kind = kind or pick(rng, KINDS)
    while True:
        before = random_scene(rng, test)
        if kind in possible_kinds(before):
            after, key, words = change(before, kind, rng)
            if held_out(after) == test:
                break
    template = pick(rng, (HELD_OUT if new_phrasing else PHRASINGS)[key])
    return Edit(kind, template.format(**words), before, after)


def edit_scene(before, rng):
    """An edit for training of this scene, of any kind that it allows."""
    while True:
        kind = pick(rng, possible_kinds(before))
        after, key, words = change(before, kind, rng)
        if not held_out(after):
            return Edit(kind, pick(rng, PHRASINGS[key]).format(**words), before, after)


def possible_kinds(scene):
    """The kinds of edits that a scene allows: no third thing can be added, and the last one cannot be removed."""
    return [kind for kind in KINDS if kind != ("add" if len(scene.things) == 2 else "remove")]


def change(scene, kind, rng):
    """Change one attribute: (the scene after, the key of its phrasings, the words that fill them)."""
    if kind == "background":
        background = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
        return replace(scene, background=background), background, {}
    if kind == "medium":
        medium = pick(rng, [name for name in MEDIA if name != scene.medium])
        return replace(scene, medium=medium), medium, {}
    if kind == "add":
        old, side = scene.things[0], "right" if scene.left else "left"
        new = random_thing(rng, pick(rng, [shape for shape in SHAPES if shape != old.shape]))
        words = {"size": new.size, "colour": new.colour, "shape": new.shape, "other": old.shape}
        return replace(scene, **{side: new}), kind, words
    side = pick(rng, [side for side in ("left", "right") if getattr(scene, side)])
    thing = getattr(scene, side)
    if kind == "remove":
        return replace(scene, **{side: None}), kind, {"shape": thing.shape}
    if kind == "colour":
        new = replace(thing, colour=pick(rng, [colour for colour in COLOURS if colour != thing.colour]))
    elif kind == "shape":
        taken = {other.shape for other in scene.things}
        new = replace(thing, shape=pick(rng, [shape for shape in SHAPES if shape not in taken]))
    else:
        new = replace(thing, size="small" if thing.size == "large" else "large")
    key = new.size if kind == "size" else kind
    return replace(scene, **{side: new}), key, {"shape": thing.shape, "colour": new.colour, "other": new.shape}


def pick(rng, options):
    """One of the options, as a plain string."""
    options = tuple(options)
    return options[rng.integers(len(options))]


# ---- drawing ----


def render(scene):
    """Draw a scene: an RGB image of 64x64 pixels. Equal scenes give equal pixels."""
    rng = np.random.default_rng(scene.layout)
    pixels = draw_background(scene.background, rng)  # [64, 64, 3], float in [0, 255]
    places = [(18 + rng.uniform(-2, 2), 51 + rng.uniform(-3, 3)), (46 + rng.uniform(-2, 2), 51 + rng.uniform(-3, 3))]
    tints, scales, tilts = rng.uniform(-10, 10, (2, 3)), rng.uniform(0.94, 1.06, 2), rng.uniform(-0.1, 0.1, 2)
    tiles = rng.uniform(0.92, 1.06, (SIZE // 4, SIZE // 4, 1))
    sketched = scene.medium == "sketch"
    if sketched:
        grey = pixels.mean(2, keepdims=True)
        pixels = 0.62 * np.array([252, 250, 243]) + 0.38 * (0.75 * pixels + 0.25 * grey)
    for side, thing in enumerate((scene.left, scene.right)):
        if thing:
            colour = np.clip(np.array(COLOURS[thing.colour]) + tints[side], 0, 255)
            radius = SIZES[thing.size] * scales[side]
            pixels = draw_thing(pixels, thing.shape, colour, radius, tilts[side], places[side], sketched)
    if sketched:
        y, x = np.mgrid[:SIZE, :SIZE]
        pixels = pixels * np.where((x + y) % 4 == 0, 0.94, 1.0)[..., None]  # the strokes of the pencil
    if scene.medium == "mosaic":
        blocks = pixels.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3)) * tiles
        pixels = 0.6 * blocks.repeat(4, 0).repeat(4, 1) + 0.4 * pixels
        pixels[::4] *= 0.8  # the joints between the tiles
        pixels[:, ::4] *= 0.8
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def draw_background(name, rng):
    """A landscape [64, 64, 3]; every name draws the same numbers, so that a change of background keeps the rest."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    horizon = 33 + rng.uniform(-4, 4)
    waves = [(rng.uniform(1, 2.5), rng.uniform(0.08, 0.14), rng.uniform(0, 6.3)) for _ in range(2)]
    spots = rng.uniform(0, SIZE, (16, 2))  # stars, flakes, leaves
    far = rng.uniform(14, 50)  # where the sun, the moon or a cloud is
    hills = horizon + sum(height * np.sin(pace * x + phase) for height, pace, phase in waves)

    def mix(top, bottom, share):
        return np.array(top) + (np.array(bottom) - np.array(top)) * share.clip(0, 1)[..., None]

    def cover(pixels, colour, amount):
        return pixels + (np.array(colour) - pixels) * amount.clip(0, 1)[..., None]

    def disc(cx, cy, radius, flat=1.0):
        return radius - np.hypot(x - cx, (y - cy) * flat) + 0.5

    def ground(pixels, top, bottom, edge):
        earth = mix(top, bottom, (y - horizon) / (SIZE - horizon))
        amount = (y - edge + 0.5).clip(0, 1)[..., None]
        return pixels * (1 - amount) + earth * amount

    def dots(pixels, colour, radius, where):
        for cx, cy in spots:
            if where(cy):
                pixels = cover(pixels, colour, disc(cx, cy, radius))
        return pixels

    depth = y / horizon
    if name == "meadow":
        pixels = mix((120, 190, 245), (205, 232, 250), depth)
        for shift, size in ((-5, 4.5), (0, 6), (6, 4)):
            pixels = cover(pixels, (252, 252, 252), disc(far + shift, 11, size, 1.5))
        return ground(pixels, (140, 205, 90), (84, 160, 60), hills)
    if name == "sea":
        pixels = ground(mix((150, 205, 245), (225, 240, 250), depth), (40, 130, 190), (70, 185, 215), 0 * x + horizon)
        return ground(pixels, (240, 220, 165), (225, 195, 130), hills + 13)
    if name == "desert":
        pixels = cover(mix((250, 225, 150), (252, 240, 200), depth), (255, 250, 225), disc(far, 12, 6))
        return ground(pixels, (230, 170, 95), (200, 125, 60), hills)
    if name == "sunset":
        pixels = cover(mix((90, 60, 140), (255, 150, 80), depth), (255, 225, 120), disc(far, horizon - 1, 8))
        return ground(pixels, (110, 60, 90), (60, 35, 70), hills)
    if name == "night":
        pixels = dots(mix((12, 16, 52), (40, 52, 105), depth), (250, 245, 205), 0.8, lambda cy: True)
        pixels = cover(pixels, (250, 240, 190), np.minimum(disc(far, 12, 6), -disc(far + 3.5, 10.5, 5.5) + 1))
        return ground(pixels, (30, 52, 58), (16, 30, 40), hills)
    if name == "snow":
        pixels = ground(mix((165, 185, 208), (212, 224, 236), depth), (244, 248, 252), (214, 226, 240), hills)
        return dots(pixels, (255, 255, 255), 1.2, lambda cy: cy < horizon)
    if name == "autumn":
        pixels = ground(mix((190, 180, 190), (232, 220, 205), depth), (176, 104, 50), (128, 66, 38), hills)
        return dots(pixels, (226, 150, 40), 1.3, lambda cy: cy > horizon + 5)
    return mix((254, 254, 252), (244, 243, 238), y / SIZE)  # paper


def draw_thing(pixels, shape, colour, radius, tilt, place, sketched):
    """Draw a thing that stands at `place` (x, y of its lowest point, in pixels) onto pixels [64, 64, 3]."""
    canvas = Image.new("RGBA", (SIZE * FINE, SIZE * FINE), (*(int(c) for c in colour), 0))
    draw = ImageDraw.Draw(canvas)
    paper = np.array([252, 250, 243])
    ink = np.array([70, 70, 76]) if sketched else colour * 0.45
    cos, sin = math.cos(tilt), math.sin(tilt)
    x0, y0 = place[0], place[1] - radius

    def shade(tone, share=0.0):
        """The thing's own colour, mixed with another; in a sketch, everything is paler."""
        tone = colour + (np.array(tone) - colour) * share
        return (*(int(c) for c in (tone * 0.66 + paper * 0.34 if sketched else tone)), 255)

    def points(outline):
        """From the unit square, y down, to the canvas."""
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in outline]
        return [(FINE * (x0 + radius * x), FINE * (y0 + radius * y)) for x, y in turned]

    def area(outline, fill, line=True):
        corners = points(outline)
        draw.polygon(corners, fill=fill)
        if line:
            draw.line([*corners, corners[0], corners[1]], fill=(*(int(c) for c in ink), 255), width=5, joint="curve")

    def round_outline(cx, cy, rx, ry, start=0.0, stop=2 * math.pi):
        angles = np.linspace(start, stop, 40)
        return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]

    if not sketched:  # a soft shadow on the ground
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        distance = np.hypot((x - x0) / (0.95 * radius), (y - place[1]) / (0.22 * radius))
        pixels = pixels * (1 - 0.3 * (1.6 - 1.2 * distance).clip(0, 1)[..., None])

    body = shade(colour)
    if shape == "ball":
        area(round_outline(0, 0, 0.95, 0.95), body)
        area(round_outline(-0.35, -0.38, 0.26, 0.2), shade((255, 255, 255), 0.75), line=False)
    elif shape == "star":
        rays = [((1.05, 0.46)[i % 2], math.pi * (i / 5 - 0.5)) for i in range(10)]  # tips and notches
        area([(length * math.cos(angle), 0.08 + length * math.sin(angle)) for length, angle in rays], body)
    elif shape == "heart":
        turns = np.linspace(0, 2 * math.pi, 60)[:-1]
        lobes = [13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t) for t in turns]
        area([(np.sin(t) ** 3, -(h + 2.5) / 15.5) for t, h in zip(turns, lobes, strict=True)], body)
    elif shape == "house":
        area([(-0.72, -0.15), (0.72, -0.15), (0.72, 0.97), (-0.72, 0.97)], body)
        area([(-1.0, -0.12), (0, -1.0), (1.0, -0.12)], shade((0, 0, 0), 0.32))
        area([(-0.45, 0.97), (-0.45, 0.35), (-0.08, 0.35), (-0.08, 0.97)], shade((60, 35, 25), 0.85), line=False)
        area([(0.15, 0.2), (0.52, 0.2), (0.52, 0.56), (0.15, 0.56)], shade((255, 240, 190), 0.9), line=False)
    elif shape == "tree":
        area([(-0.16, 0.5), (0.16, 0.5), (0.16, 0.98), (-0.16, 0.98)], shade((105, 66, 38), 1.0))
        area([(0, -1.05), (0.5, -0.3), (0.3, -0.3), (0.85, 0.6), (-0.85, 0.6), (-0.3, -0.3), (-0.5, -0.3)], body)
    else:  # mushroom
        area([(-0.28, -0.1), (0.28, -0.1), (0.36, 0.97), (-0.36, 0.97)], shade((246, 234, 208), 1.0))
        area(round_outline(0, 0.12, 0.98, 1.08, math.pi, 2 * math.pi), body)
        for cx, cy in ((-0.45, -0.25), (0.1, -0.6), (0.48, -0.18)):
            area(round_outline(cx, cy, 0.15, 0.14), shade((255, 250, 240), 0.9), line=False)

    layer = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    amount = layer[..., 3:] / 255
    return pixels * (1 - amount) + layer[..., :3] * amount
