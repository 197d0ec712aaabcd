"""Plots as a paper prints them: curves with bands and intervals, each labelled where it is. A PNG, by Pillow."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from images import save_png
from training.ticks import log_ticks, ticks

COLOURS = "#1f5fae", "#c2571a", "#2f8f5b", "#8a4fa3", "#a5822a", "#c23b5e", "#4f6b80", "#333333"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 660, 112, 32, 64, 88  # of a panel and its margins, in pixels
FINE = 2  # all is drawn this many times larger, then averaged down
AROUND = [(side, up, far) for far in (1, 3) for side in (1, 0, -1) for up in (0, -1, 1) if side or up]
AROUND = np.array(sorted(AROUND, key=lambda place: (place[2], abs(place[0] * place[1]))))  # where a name may stand


@dataclass
class Curve:
    """Points of one colour, joined or not, with a name that is written beside them."""

    name: str
    points: np.ndarray  # [n, 2]: x and y
    band: np.ndarray | None = None  # [m, 2]: the outline of what surrounds the curve
    intervals: np.ndarray | None = None  # [n, 2]: from which y to which
    notes: tuple = ()  # a short text for each point, as the setting that gave it; "" for none
    joined: bool = True
    radius: float = 5.5  # of the dots, in pixels; 0: none
    colour: str | None = None  # default: the next of COLOURS

    def ends(self):
        """The points at the lower and at the upper ends of the intervals."""
        sides = [] if self.intervals is None else self.intervals.T
        return [np.stack([self.points[:, 0], side], axis=1) for side in sides]


@dataclass
class Panel:
    """One pair of axes."""

    curves: list
    x: str  # titles of the axes
    y: str
    title: str = ""
    log: bool = False  # is y on a log scale?
    names: tuple = ()  # of x = 0, 1, 2, ..., where x is no number

    def __post_init__(self):
        """Find the range of the axes, with a margin, from all that is drawn; without points from 0 to 1."""
        drawn = [part for curve in self.curves for part in (curve.points, curve.band, *curve.ends())]
        drawn = [part for part in drawn if part is not None and len(part)] or [np.array([[0.0, 0.1], [1.0, 1.0]])]
        x, y = np.concatenate(drawn).T
        points = np.stack([x, np.log(y) if self.log else y], axis=1)
        low, high, self.whole = points.min(axis=0), points.max(axis=0), not (x % 1).any()
        margin = 0.06 * np.where(high > low, high - low, 0.1 + abs(high))
        self.low, self.high = low - margin, high + margin

    def place(self, points):
        """Points [n, 2] -> pixels [n, 2] of the enlarged panel."""
        x, y = np.asarray(points, dtype=float).T
        right, up = ((np.stack([x, np.log(y) if self.log else y], axis=1) - self.low) / (self.high - self.low)).T
        pixels = LEFT + (WIDTH - LEFT - RIGHT) * right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up
        return FINE * np.stack(pixels, axis=1)


def plot(panels, path):
    """Draw panels into a PNG, two in a row."""
    image = Image.new("RGB", (WIDTH * min(2, len(panels)), HEIGHT * -(-len(panels) // 2)), "white")
    for number, panel in enumerate(panels):
        image.paste(draw_panel(panel).reduce(FINE), (number % 2 * WIDTH, number // 2 * HEIGHT))
    save_png(image, path)


def draw_panel(panel):
    """An enlarged image of a panel: the axes, the bands, the curves, and last their names."""
    image = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    draw_axes(image, draw, panel)
    coloured = [(curve, curve.colour or COLOURS[i % len(COLOURS)]) for i, curve in enumerate(panel.curves)]
    curves = [(curve, colour) for curve, colour in coloured if len(curve.points)]
    for curve, colour in curves:
        if curve.band is not None:
            draw.polygon([*map(tuple, panel.place(curve.band))], fill=f"{colour}28")
    taken = [draw_curve(draw, panel, curve, colour) for curve, colour in curves]  # what a name should not cover
    boxes, font = [], ImageFont.load_default(FINE * 20)
    for curve, colour in curves:
        if curve.name:
            size = draw.textbbox((0, 0), curve.name, font)
            boxes.append(free_box(panel.place(curve.points), size, np.concatenate(taken), boxes))
            draw.text(boxes[-1][:2], curve.name, fill=colour, font=font)
    return image


def draw_axes(image, draw, panel):
    """The grid, the numbers at it, the titles."""
    font, black, grey = ImageFont.load_default(FINE * 17), "#222222", "#e6e6e6"
    left, right, top, bottom = (FINE * side for side in (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM))
    (x0, x1), (y0, y1) = zip(panel.low, panel.high, strict=True)
    y0, y1 = (math.exp(y0), math.exp(y1)) if panel.log else (y0, y1)
    for value in range(len(panel.names)) if panel.names else ticks(x0, x1, whole=panel.whole):
        x, text = panel.place([[value, y1]])[0, 0], panel.names[value] if panel.names else f"{value:,.6g}"
        draw.line([x, top, x, bottom], fill=grey, width=FINE)
        draw.text((x, bottom + FINE * 10), text, fill=black, font=font, anchor="ma")
    for value in log_ticks(y0, y1) if panel.log else ticks(y0, y1):
        y = panel.place([[x0, value]])[0, 1]
        draw.line([left, y, right, y], fill=grey, width=FINE)
        draw.text((left - FINE * 10, y), f"{value:.6g}", fill=black, font=font, anchor="rm")
    draw.line([left, top, left, bottom, right, bottom], fill=black, width=FINE)
    draw.text((left, FINE * 24), panel.title, fill=black, font=ImageFont.load_default(FINE * 22), anchor="lm")
    font = ImageFont.load_default(FINE * 20)
    draw.text(((left + right) / 2, FINE * (HEIGHT - 20)), panel.x, fill=black, font=font, anchor="ms")
    upright = Image.new("RGB", (bottom - top, FINE * 30), "white")
    ImageDraw.Draw(upright).text(((bottom - top) / 2, FINE * 15), panel.y, fill=black, font=font, anchor="mm")
    image.paste(upright.rotate(90, expand=True), (FINE * 8, top))


def draw_curve(draw, panel, curve, colour):
    """Draw a curve, its intervals and notes; returns pixels that they cover, [n, 2]."""
    points, font = panel.place(curve.points), ImageFont.load_default(FINE * 15)
    bars = [*zip(*map(panel.place, curve.ends()), strict=True)]
    for bar in bars:
        draw.line([*map(tuple, bar)], fill=f"{colour}a0", width=FINE * 2)
    if curve.joined:
        draw.line([*map(tuple, points)], fill=colour, width=FINE * 3, joint="curve")
    for point in points if curve.radius else ():
        draw.circle(tuple(point), FINE * curve.radius, fill=colour)
    notes = [(x + FINE * 8, y - FINE * 3, note) for (x, y), note in zip(points, curve.notes, strict=False) if note]
    for x, y, note in notes:
        draw.text((x, y), note, fill=colour, font=font, anchor="ld")
    lines = [points[i : i + 2] for i in range(len(points) - 1)] if curve.joined and len(points) < 100 else [points]
    covered = [np.linspace(line[0], line[-1], 60) if len(line) == 2 else line for line in (*lines, *bars)]
    return np.concatenate([points, *covered, *[[(x + FINE * 10, y - FINE * 8)] * 20 for x, y, _ in notes]])


def free_box(points, size, taken, boxes):
    """Where beside its points, best the last, a name covers least: the pixels (left, top, right, bottom) of its box."""
    half, points = np.array(size[2:]) / 2, points[:: max(1, len(points) // 20)][::-1, None]
    least, most = FINE * np.array([[LEFT, 40], [WIDTH - 4, HEIGHT - BOTTOM]])

    def cost(middle):
        low, high = middle - half, middle + half
        covered = ((taken > low - FINE * 6) & (taken < high + FINE * 6)).all(axis=1).sum()
        crossed = sum((low < other[2:]).all() and (high > other[:2]).all() for other in boxes)
        return covered + 1e4 * crossed + 1e5 * ((low < least).any() or (high > most).any())

    best = min((points + AROUND[:, :2] * (half + FINE * 12 * AROUND[:, 2:])).reshape(-1, 2), key=cost)
    return *(best - half), *(best + half)
