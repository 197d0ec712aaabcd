"""The ladder of bench_ladder.py as a plot: a bar a rung, and the floor as a line through them."""

import math

from PIL import Image, ImageDraw, ImageFont

from bench.ladder import LABELS, floor_text, short, side_of
from bench.sides import OURS
from images import save_png


def draw(ladder, details, path):
    """Write a plot: a bar a rung, as long as its step, and the floor as a line through them. Raises UserError.

    details: a line that says what was measured, and where.
    """
    font, large = ImageFont.load_default(16), ImageFont.load_default(19)
    steps = [1e3 * rung.step for rung in ladder.rungs]
    floor, longest = 1e3 * ladder.floor, max(1e3 * ladder.floor, *steps)
    row, top, width = 36, 112, 960
    left = 36 + round(max(font.getlength(LABELS[rung.name]) for rung in ladder.rungs))
    right, bottom = width - 240, top + row * len(steps)  # right of the longest bar is room for its numbers
    image = Image.new("RGB", (width, bottom + 62), "white")
    pen = ImageDraw.Draw(image)

    def x(milliseconds):
        return left + (right - left) * milliseconds / longest

    pen.text((24, 16), "A step of an edit, its three branches as one batch", fill="black", font=large)
    pen.text((24, 44), details, fill="black", font=font)
    scale = 10 ** math.floor(math.log10(longest))
    gap = next(scale * factor for factor in (0.2, 0.5, 1, 2) if longest <= 6 * scale * factor)
    for number in range(int(longest / gap) + 1):
        pen.line([x(number * gap), top, x(number * gap), bottom], fill="#e4e4e4")
        pen.text((x(number * gap), bottom + 8), f"{number * gap:,.6g}", fill="black", font=font, anchor="ma")
    pen.text((left, bottom + 32), "milliseconds a step", fill="black", font=font)
    for number, (rung, step) in enumerate(zip(ladder.rungs, steps, strict=True)):
        middle = top + row * (number + 0.5)
        colour = "#1f5fae" if side_of(rung.name) == OURS else "#c2571a"
        pen.rectangle([left, middle - 11, x(step), middle + 11], fill=colour)
        pen.text((left - 10, middle), LABELS[rung.name], fill="black", font=font, anchor="rm")
        note = f"{short(step)} ms, {floor / step:.0%} of the ceiling"
        pen.text((x(max(step, floor)) + 8, middle), note, fill="black", font=font, anchor="lm")
    pen.line([x(floor), top - 6, x(floor), bottom], fill="black", width=2)
    words = floor_text(ladder)
    side = "l" if x(floor) + font.getlength(words) < width - 24 else "r"  # of the words, that is at the line
    pen.text((x(floor), top - 12), words, fill="black", font=font, anchor=side + "s")
    save_png(image, path)
