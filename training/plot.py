"""loss.png: the losses of a metrics.jsonl over the steps."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from images import save_png

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 480, 70, 40, 40, 40


def draw_losses(lines, path):
    """Plot the losses of metrics over the steps, on a log scale: of training (blue; dots as logged), of validation."""
    curves = {  # a logarithm needs numbers above 0
        name: np.array([(line["step"], line[name]) for line in lines if 0 < line.get(name, 0) < math.inf])
        for name in ("loss", "validation")
    }
    points = np.concatenate([curve for curve in curves.values() if len(curve)] or [np.ones((1, 2))])
    last, low, high = max(1, points[:, 0].max()), 0.95 * points[:, 1].min(), 1.05 * points[:, 1].max()
    image, font = Image.new("RGB", (WIDTH, HEIGHT), "white"), ImageFont.load_default(14)
    draw = ImageDraw.Draw(image)

    def place(step, value):
        up = math.log(value / low) / math.log(high / low)
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    for value in log_ticks(low, high):
        draw.line([place(0, value), place(last, value)], fill="#e4e4e4")
        draw.text((LEFT - 8, place(0, value)[1]), f"{value:g}", fill="black", font=font, anchor="rm")
    for step in filter(float.is_integer, ticks(0, last)):
        draw.line([place(step, low), place(step, high)], fill="#e4e4e4")
        draw.text((place(step, low)[0], HEIGHT - BOTTOM + 8), f"{step:,.0f}", fill="black", font=font, anchor="ma")
    draw.text((WIDTH - RIGHT, 14), "on a log scale, over the steps", fill="black", font=font, anchor="ra")
    loss, validation = curves.values()
    for x, (name, curve), line, dots, colour, radius in (
        (LEFT, ("loss", loss), smooth(loss), "#9cbce4", "#1f5fae", 2 if len(loss) < 1000 else 1),
        (LEFT + 60, ("validation", validation), validation, "#c2571a", "#c2571a", 3),
    ):
        draw.text((x, 14), name if len(curve) else "", fill=colour, font=font)
        for point in curve:
            draw.circle(place(*point), radius, fill=dots)
        draw.line([place(*point) for point in line], fill=colour, width=2)
    save_png(image, path)


def smooth(curve):
    """The means of each point's neighbours in a curve of steps and losses [n, 2], up to n / 40 on each side.

    As many before a point as after it: otherwise the mean would lag behind a falling loss. The ends, which have fewer,
    are left out where n is large. A logged loss is the mean of the steps since the one before, and weighs as many.
    """
    if not len(curve):
        return curve
    weights, index = np.diff(curve[:, 0], prepend=0), np.arange(len(curve))
    sums = np.pad(np.cumsum([weights * curve[:, 1], weights], axis=1), ((0, 0), (1, 0)))
    near = np.minimum(np.minimum(index, index[::-1]), len(curve) // 40)
    totals, counts = sums[:, index + near + 1] - sums[:, index - near]
    end = len(curve) // 100
    return np.stack([curve[:, 0], totals / counts], axis=1)[end : len(curve) - end]


def ticks(low, high, most=8):
    """At most `most` + 1 round numbers between two: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    unit = next(unit for unit in (power, 2 * power, 5 * power, 10 * power) if (high - low) / unit <= most)
    return [round(unit * i, 12) for i in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def log_ticks(low, high):
    """Round numbers between two for a log scale: powers of ten, their 2 and 5 fold; evenly spaced where few fit."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))]
    factors = (1, 2, 5) if len(powers) < 5 else (1,)
    found = [power * factor for power in powers for factor in factors if low <= power * factor <= high]
    return found if len(found) > 2 else ticks(low, high)
