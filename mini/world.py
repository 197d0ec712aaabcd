"""The miniature world: 64x64 scenes whose captions, edits and true edited images are known.

A `Scene` is one or two things on a background, in a medium. `render` draws it, `caption` describes it, `random_edit`
changes one attribute and words the instruction. An edit keeps what it does not mention, down to the pixel, because
everything else comes from the scene's `layout` seed. So every edit has a TRUE edited image: never shown in training.

Held out from all training, for evaluation: a tenth of all compositions (the attributes without the side of a single
thing), chosen by a hash, and the phrasings in `HELD_OUT` of phrasings.py.
"""

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from mini.phrasings import HELD_OUT, PHRASINGS

SIZE = 64  # pixels a side
FINE = 4  # things are drawn this many times larger, then averaged down
PAPER = np.array([252, 250, 243])  # of a sketch

SHAPES = ("ball", "star", "heart", "house", "tree", "mushroom")
COLOURS = {
    "red": (214, 45, 50), "yellow": (250, 208, 50), "green": (58, 168, 76), "blue": (48, 108, 222),
    "purple": (138, 68, 188), "pink": (246, 142, 188),
}  # fmt: skip
SIZES = {"small": 8.0, "large": 13.0}  # half of a thing's height in pixels, about
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
    """Is this composition kept from all training? A tenth of them are, whichever side a single thing stands on."""
    return zlib.crc32(caption(scene, side=False).encode()) % 10 == 0


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


# ---- drawing ----


def render(scene):
    """Draw a scene: an RGB image of 64x64 pixels. Equal scenes give equal pixels."""
    rng, sketched = np.random.default_rng(scene.layout), scene.medium == "sketch"
    pixels = draw_background(scene.background, rng)  # [64, 64, 3], float in [0, 255]
    places = [(x + rng.uniform(-2, 2), 51 + rng.uniform(-3, 3)) for x in (18, 46)]
    tints, scales, tilts = rng.uniform(-10, 10, (2, 3)), rng.uniform(0.94, 1.06, 2), rng.uniform(-0.1, 0.1, 2)
    tiles = rng.uniform(0.92, 1.06, (SIZE // 4, SIZE // 4, 1))
    if sketched:
        pixels = 0.62 * PAPER + 0.38 * (0.75 * pixels + 0.25 * pixels.mean(2, keepdims=True))
    for side, thing in enumerate((scene.left, scene.right)):
        if thing:
            colour = np.clip(np.array(COLOURS[thing.colour]) + tints[side], 0, 255)
            radius = SIZES[thing.size] * scales[side]
            pixels = draw_thing(pixels, thing.shape, colour, radius, tilts[side], places[side], sketched)
    if sketched:
        pixels = pixels * np.where((X + Y) % 4 == 1, 0.94, 1.0)[..., None]  # pencil strokes
    if scene.medium == "mosaic":
        blocks = pixels.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3)) * tiles
        pixels = 0.6 * blocks.repeat(4, 0).repeat(4, 1) + 0.4 * pixels
        pixels[::4] *= 0.8  # the joints between the tiles
        pixels[:, ::4] *= 0.8
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


GRADIENTS = {  # background: the colours at the top and the bottom of the sky, and of the ground
    "meadow": ((120, 190, 245), (205, 232, 250), (140, 205, 90), (84, 160, 60)),
    "sea": ((150, 205, 245), (225, 240, 250), (240, 220, 165), (225, 195, 130)),
    "desert": ((250, 225, 150), (252, 240, 200), (230, 170, 95), (200, 125, 60)),
    "sunset": ((90, 60, 140), (255, 150, 80), (110, 60, 90), (60, 35, 70)),
    "night": ((12, 16, 52), (40, 52, 105), (30, 52, 58), (16, 30, 40)),
    "snow": ((165, 185, 208), (212, 224, 236), (244, 248, 252), (214, 226, 240)),
    "autumn": ((190, 180, 190), (232, 220, 205), (176, 104, 50), (128, 66, 38)),
}
Y, X = np.mgrid[:SIZE, :SIZE] + 0.5  # [64, 64], the centres of the pixels


def draw_background(name, rng):
    """A landscape [64, 64, 3]; every name draws the same numbers, so that a change of background keeps the rest."""
    horizon = 33 + rng.uniform(-4, 4)
    waves = [(rng.uniform(1, 2.5), rng.uniform(0.08, 0.14), rng.uniform(0, 6.3)) for _ in range(2)]
    spots = rng.uniform(0, SIZE, (16, 2))  # (x, y) of stars, snowflakes, leaves
    far = rng.uniform(14, 50)  # x of the sun, the moon or a cloud
    hills = horizon + sum(height * np.sin(pace * X + phase) for height, pace, phase in waves)
    if name == "paper":
        return blend((254, 254, 252), (244, 243, 238), Y / SIZE)

    def ground(pixels, top, bottom, edge):
        earth = blend(top, bottom, (Y - horizon) / (SIZE - horizon))
        amount = (Y - edge + 0.5).clip(0, 1)[..., None]
        return pixels * (1 - amount) + earth * amount

    sky_top, sky_bottom, top, bottom = GRADIENTS[name]
    pixels = blend(sky_top, sky_bottom, Y / horizon)
    if name == "meadow":
        for shift, size in ((-5, 4.5), (0, 6), (6, 4)):  # a cloud
            pixels = blend(pixels, (252, 252, 252), disc(far + shift, 11, size, 1.5))
    elif name == "sea":
        pixels = ground(pixels, (40, 130, 190), (70, 185, 215), horizon)
        hills = hills + 13  # the beach begins lower
    elif name == "desert":
        pixels = blend(pixels, (255, 250, 225), disc(far, 12, 6))  # the sun
    elif name == "sunset":
        pixels = blend(pixels, (255, 225, 120), disc(far, horizon - 1, 8))
    elif name == "night":
        pixels = dots(pixels, (250, 245, 205), 0.8, spots)
        pixels = blend(pixels, (250, 240, 190), np.minimum(disc(far, 12, 6), -disc(far + 3.5, 10.5, 5.5) + 1))
    pixels = ground(pixels, top, bottom, hills)
    if name == "snow":
        pixels = dots(pixels, (255, 255, 255), 1.2, spots[spots[:, 1] < horizon])
    elif name == "autumn":
        pixels = dots(pixels, (226, 150, 40), 1.3, spots[spots[:, 1] > horizon + 5])
    return pixels


def blend(first, second, amount):
    """From `first` (amount <= 0) to `second` (amount >= 1): colours [3] or pixels [64, 64, 3]; amount [64, 64]."""
    return np.array(first) + (np.array(second) - np.array(first)) * amount.clip(0, 1)[..., None]


def disc(cx, cy, radius, flat=1.0):
    """How far a disc covers each pixel [64, 64]: 1 or more inside, 0 or less outside; flat > 1 squeezes its height."""
    return radius - np.hypot(X - cx, (Y - cy) * flat) + 0.5


def dots(pixels, colour, radius, spots):
    """Draw a disc at every (x, y) of `spots`."""
    for cx, cy in spots:
        pixels = blend(pixels, colour, disc(cx, cy, radius))
    return pixels


def ellipse(cx, cy, rx, ry, start=0.0, stop=2 * math.pi):
    """40 points of an ellipse, or of its arc between two angles."""
    return [(cx + rx * math.cos(angle), cy + ry * math.sin(angle)) for angle in np.linspace(start, stop, 40)]


RAYS = [((1.05, 0.46)[i % 2], math.pi * (i / 5 - 0.5)) for i in range(10)]  # tips and notches of the star
TURNS = np.linspace(0, 2 * math.pi, 60)[:-1]
LOBES = [13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t) for t in TURNS]  # the heart curve
OWN, GLOSS, CREAM = ((0, 0, 0), 0.0), ((255, 255, 255), 0.75), ((255, 250, 240), 0.9)  # see PARTS
PARTS = {  # shape: polygons (points in [-1, 1]^2 with y down, (a colour to mix in, its fraction), outlined?)
    "ball": [(ellipse(0, 0, 0.95, 0.95), OWN, True), (ellipse(-0.35, -0.38, 0.26, 0.2), GLOSS, False)],
    "star": [([(r * math.cos(angle), 0.08 + r * math.sin(angle)) for r, angle in RAYS], OWN, True)],
    "heart": [([(np.sin(t) ** 3, -(h + 2.5) / 15.5) for t, h in zip(TURNS, LOBES, strict=True)], OWN, True)],
    "house": [  # walls, roof, door, window
        ([(-0.72, -0.15), (0.72, -0.15), (0.72, 0.97), (-0.72, 0.97)], OWN, True),
        ([(-1.0, -0.12), (0, -1.0), (1.0, -0.12)], ((0, 0, 0), 0.32), True),
        ([(-0.45, 0.97), (-0.45, 0.35), (-0.08, 0.35), (-0.08, 0.97)], ((60, 35, 25), 0.85), False),
        ([(0.15, 0.2), (0.52, 0.2), (0.52, 0.56), (0.15, 0.56)], ((255, 240, 190), 0.9), False),
    ],
    "tree": [
        ([(-0.16, 0.5), (0.16, 0.5), (0.16, 0.98), (-0.16, 0.98)], ((105, 66, 38), 1.0), True),
        ([(0, -1.05), (0.5, -0.3), (0.3, -0.3), (0.85, 0.6), (-0.85, 0.6), (-0.3, -0.3), (-0.5, -0.3)], OWN, True),
    ],
    "mushroom": [  # stem, cap, spots
        ([(-0.28, -0.1), (0.28, -0.1), (0.36, 0.97), (-0.36, 0.97)], ((246, 234, 208), 1.0), True),
        (ellipse(0, 0.12, 0.98, 1.08, math.pi, 2 * math.pi), OWN, True),
        *((ellipse(x, y, 0.15, 0.14), CREAM, False) for x, y in ((-0.45, -0.25), (0.1, -0.6), (0.48, -0.18))),
    ],
}


def draw_thing(pixels, shape, colour, radius, tilt, place, sketched):
    """Draw a thing onto pixels [64, 64, 3]; place: (x, y) of its lowest point, in pixels; tilt: in radians."""
    canvas = Image.new("RGBA", (SIZE * FINE, SIZE * FINE), (*(int(c) for c in colour), 0))
    draw = ImageDraw.Draw(canvas)
    ink = np.array([70, 70, 76]) if sketched else colour * 0.45
    cos, sin = math.cos(tilt), math.sin(tilt)
    x0, y0 = place[0], place[1] - radius
    for points, (other, amount), outlined in PARTS[shape]:
        fill = colour + (np.array(other) - colour) * amount
        fill = fill * 0.66 + PAPER * 0.34 if sketched else fill  # in a sketch, everything is paler
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
        corners = [(FINE * (x0 + radius * x), FINE * (y0 + radius * y)) for x, y in turned]
        draw.polygon(corners, fill=(*(int(c) for c in fill), 255))
        if outlined:
            draw.line([*corners, corners[0], corners[1]], fill=(*(int(c) for c in ink), 255), width=5, joint="curve")
    if not sketched:  # a soft shadow on the ground
        distance = np.hypot((X - x0) / (0.95 * radius), (Y - place[1]) / (0.22 * radius))
        pixels = pixels * (1 - 0.3 * (1.6 - 1.2 * distance).clip(0, 1)[..., None])
    layer = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    amount = layer[..., 3:] / 255
    return pixels * (1 - amount) + layer[..., :3] * amount
