"""A training that can be followed: a bar, metrics.jsonl with a line now and then, and loss.png drawn from it."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cli import UserError, append_whole, atomic_write
from images import save_png

EVERY = 5.0  # seconds between two lines
WIDTH, HEIGHT, MARGIN = 900, 420, 56
FONT = ImageFont.load_default(13)


class Progress:
    """What one run shows; on all processes but the first, nothing."""

    def __init__(self, run, steps, start, seconds, batch, shown=True):
        """run: its folder, steps: of the whole run, start: where it goes on, seconds: what it took so far."""
        self.path, self.batch, self.shown = run / "metrics.jsonl", batch, shown
        self.losses, self.examples, self.noted = [], 0, time.monotonic()
        self.began = time.monotonic() - seconds
        self.bar = tqdm(total=steps, initial=start, desc=run.name, unit="step", mininterval=1, disable=not shown)
        if shown:
            cut(self.path, start)

    @property
    def seconds(self):
        """What the run took so far, with all its parts before it was resumed."""
        return time.monotonic() - self.began

    def step(self, step, loss):
        """A step is done, and this was its loss."""
        self.losses.append(loss)
        self.bar.update()
        if time.monotonic() - self.noted > EVERY:
            self.note(step)

    def note(self, step, **values):
        """Write a line: the mean loss since the last one, examples a second, memory, and `values`."""
        now = time.monotonic()
        line = {"step": step, "minutes": round(self.seconds / 60, 3)}
        if self.losses:
            per_second = len(self.losses) * self.batch / (now - self.noted)
            line |= {"loss": round(sum(self.losses) / len(self.losses), 6), "examples_per_s": round(per_second, 2)}
        line |= {"memory_gb": round(memory() / 1e9, 2), **values}
        if self.shown:
            append_whole(self.path, (json.dumps(line) + "\n").encode())
            shown = {"loss": line.get("loss"), "ex/s": line.get("examples_per_s"), "GB": line["memory_gb"]}
            self.bar.set_postfix({key: value for key, value in shown.items() if value is not None})
        self.losses, self.noted = [], now

    @contextmanager
    def beside(self):
        """What is done in here is no part of the examples a second."""
        start = time.monotonic()
        yield
        self.noted += time.monotonic() - start

    def draw(self):
        """Write loss.png."""
        if self.shown and self.path.exists():
            draw_losses(read_metrics(self.path), self.path.with_name("loss.png"))

    def __enter__(self):
        """The bar is there already."""
        return self

    def __exit__(self, *error):
        """End the bar, so that whatever is said next has a line of its own."""
        self.bar.close()


def read_metrics(path):
    """The lines of a metrics.jsonl. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # a torn last one is none
        if not all(type(line["step"]) is int for line in lines):
            raise ValueError("a step is a whole number")
        return lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and the run goes on without its past") from error


def cut(path, step):
    """Leave out the lines after a step: a resumed run writes them again. Raises UserError."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        with atomic_write(path) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def memory():
    """Bytes at most so far: what torch allocated on a GPU, else what this process holds."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return 0


def draw_losses(metrics, path):
    """A plot over the steps: the training loss, smoothed, and where it was measured that of the validation split."""
    training = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    smooth, value = [], None
    for step, loss in training:
        value = loss if value is None else 0.9 * value + 0.1 * loss
        smooth.append((step, value))
    validation = [(line["step"], line["validation"]) for line in metrics if "validation" in line]
    curves = [(training, "#c9d7ea", "as noted"), (smooth, "#1f5fae", "training"), (validation, "#c2571a", "validation")]
    points = [point for curve, _, _ in curves for point in curve]
    if not points:
        return
    last, (low, high) = max(step for step, _ in points), (f(y for _, y in points) for f in (min, max))
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    right, bottom = WIDTH - 20, HEIGHT - 40

    def place(step, y):
        x = MARGIN + (right - MARGIN) * step / max(1, last)
        return x, bottom - (bottom - 34) * (y - low) / (high - low)

    for i in range(5):
        y = low + (high - low) * i / 4
        draw.line([place(0, y), place(last, y)], fill="#e4e4e4")
        draw.text((MARGIN - 6, place(0, y)[1]), f"{y:.3f}", fill="black", font=FONT, anchor="rm")
        step = round(last * i / 4)
        draw.text((place(step, low)[0], bottom + 8), f"{step:,}", fill="black", font=FONT, anchor="ma")
    for number, (curve, colour, name) in enumerate(curves):
        places = [place(*point) for point in curve]
        if len(places) > 1:
            draw.line(places, fill=colour, width=1 if number == 0 else 2)
        for x, y in places if number == 2 else ():
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        if places:
            draw.text((MARGIN + 10 + 110 * number, 10), name, fill=colour, font=FONT)
    draw.text((right, 10), "loss over steps", fill="black", font=FONT, anchor="ra")
    save_png(image, path)
