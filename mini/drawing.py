"""Draw a scene of the miniature's world, 128x128 pixels, anti-aliased.

All lengths here are in units of two pixels, so that the world is 64 units wide and high.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # pixels a side
WORLD = 64  # units a side
UNIT = SIZE // WORLD  # pixels a unit
FINE = 3  # things are drawn this many times larger, then averaged down
PAPER = np.array([252, 250, 243])  # of a sketch

COLOURS = {
    "red": (214, 45, 50), "yellow": (250, 208, 50), "green": (58, 168, 76), "blue": (48, 108, 222),
    "purple": (138, 68, 188), "pink": (246, 142, 188),
}  # fmt: skip
SIZES = {"small": 8.0, "large": 13.0}  # half of a thing's height, about

def render(scene, far=None, shifts=((0, 0), (0, 0))):
    """Draw a scene: an RGB image of 128x128 pixels. Equal scenes give equal pixels.

    far: x of the sun, the moon or a cloud, in place of the layout's. shifts: (x, y) by which the things are moved.
    """
    rng, sketched = np.random.default_rng(scene.layout), scene.medium == "sketch"
    pixels = draw_background(scene.background, rng, far)  # [128, 128, 3], float in [0, 255]
    places = [(x + rng.uniform(-2, 2), 51 + rng.uniform(-3, 3)) for x in (18, 46)]
    places = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(places, shifts, strict=True)]
    tints, scales, tilts = rng.uniform(-10, 10, (2, 3)), rng.uniform(0.94, 1.06, 2), rng.uniform(-0.1, 0.1, 2)
    if sketched:
        pixels = 0.62 * PAPER + 0.38 * (0.75 * pixels + 0.25 * pixels.mean(2, keepdims=True))
    for side, thing in enumerate((scene.left, scene.right)):
        if thing:
            colour = np.clip(np.array(COLOURS[thing.colour]) + tints[side], 0, 255)
            radius = SIZES[thing.size] * scales[side]
            pixels = draw_thing(pixels, thing.shape, colour, radius, tilts[side], places[side], sketched)
    if sketched:
        pixels = pixels * (0.965 + 0.025 * np.sin(math.pi / 2 * (X + Y)))[..., None]  # soft pencil strokes
    if scene.medium == "mosaic":
        tile = 4 * UNIT
        blocks = pixels.reshape(SIZE // tile, tile, SIZE // tile, tile, 3).mean((1, 3))
        pixels = 0.5 * blocks.repeat(tile, 0).repeat(tile, 1) + 0.5 * pixels
        pixels[::tile] *= 0.78  # the joints between the tiles
        pixels[:, ::tile] *= 0.78
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
Y, X = (np.mgrid[:SIZE, :SIZE] + 0.5) / UNIT  # [128, 128], the centres of the pixels


def draw_background(name, rng, far=None):
    """A landscape [128, 128, 3]; every name draws the same numbers, so that a change of background keeps the rest."""
    horizon = 33 + rng.uniform(-4, 4)
    waves = [(rng.uniform(1, 2.5), rng.uniform(0.08, 0.14), rng.uniform(0, 6.3)) for _ in range(2)]
    spots = rng.uniform(0, WORLD, (12, 2))  # (x, y) of stars, snowflakes, leaves
    layout_far = rng.uniform(14, 50)
    far = layout_far if far is None else far  # x of the sun, the moon or a cloud
    hills = horizon + sum(height * np.sin(pace * X + phase) for height, pace, phase in waves)
    if name == "paper":
        return blend((254, 254, 252), (244, 243, 238), Y / WORLD)

    def ground(pixels, top, bottom, edge):
        earth = blend(top, bottom, (Y - horizon) / (WORLD - horizon))
        amount = (UNIT * (Y - edge) + 0.5).clip(0, 1)[..., None]
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
    """From `first` (amount <= 0) to `second` (amount >= 1): colours [3] or pixels [128, 128, 3]; amount [128, 128]."""
    return np.array(first) + (np.array(second) - np.array(first)) * amount.clip(0, 1)[..., None]


def disc(cx, cy, radius, flat=1.0):
    """How far a disc covers each pixel [128, 128]: >= 1 inside, <= 0 outside; flat > 1 squeezes its height."""
    return UNIT * (radius - np.hypot(X - cx, (Y - cy) * flat)) + 0.5


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
    """Draw a thing onto pixels [128, 128, 3]; place: (x, y) of its lowest point; tilt: in radians."""
    canvas = Image.new("RGBA", (SIZE * FINE, SIZE * FINE), (*(int(c) for c in colour), 0))
    draw = ImageDraw.Draw(canvas)
    ink = np.array([70, 70, 76]) if sketched else colour * 0.45
    ink = (*(int(c) for c in ink), 255)
    cos, sin = math.cos(tilt), math.sin(tilt)
    x0, y0 = place[0], place[1] - radius
    for points, (other, amount), outlined in PARTS[shape]:
        fill = colour + (np.array(other) - colour) * amount
        fill = fill * 0.66 + PAPER * 0.34 if sketched else fill  # in a sketch, everything is paler
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
        corners = [(FINE * UNIT * (x0 + radius * x), FINE * UNIT * (y0 + radius * y)) for x, y in turned]
        draw.polygon(corners, fill=(*(int(c) for c in fill), 255))
        if outlined:
            draw.line([*corners, corners[0], corners[1]], fill=ink, width=2 * FINE, joint="curve")
    if not sketched:  # a soft shadow on the ground
        distance = np.hypot((X - x0) / (0.95 * radius), (Y - place[1]) / (0.22 * radius))
        pixels = pixels * (1 - 0.3 * (1.6 - 1.2 * distance).clip(0, 1)[..., None])
    layer = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    amount = layer[..., 3:] / 255
    return pixels * (1 - amount) + layer[..., :3] * amount
