"""Plots: round ticks, points where they belong, names that cover neither curves nor each other."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training import plot
from training.plot import Curve, Panel
from training.ticks import log_ticks, ticks


def test_ticks_are_round():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 100_000) == [0, 20_000, 40_000, 60_000, 80_000, 100_000]
    assert ticks(0.093, 0.117) == [0.095, 0.1, 0.105, 0.11, 0.115]
    assert log_ticks(0.05, 1.1) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])
    assert log_ticks(1e-6, 3) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
    assert log_ticks(0.19, 0.31) == [0.2, 0.22, 0.24, 0.26, 0.28, 0.3]


def test_points_stand_where_the_axes_say(tmp_path):
    """A point at the middle of both ranges is in the middle of the axes, on a log scale at the geometric mean."""
    for log, middle in ((False, 50.5), (True, 10.0)):
        ends = Curve("", np.array([[0, 1.0], [2, 100.0]]), joined=False, radius=0)
        dot = Curve("", np.array([[1, middle]]), radius=4, colour="#ff0000")
        plot.plot([Panel([ends, dot], "x", "y", log=log)], tmp_path / "plot.png")
        rows, columns = np.nonzero((np.asarray(Image.open(tmp_path / "plot.png")) == (255, 0, 0)).all(2))
        centre = (plot.TOP + plot.HEIGHT - plot.BOTTOM) / 2, (plot.LEFT + plot.WIDTH - plot.RIGHT) / 2
        assert (rows.mean(), columns.mean()) == pytest.approx(centre, abs=1.5)


def test_names_cover_neither_points_nor_each_other(monkeypatch):
    """Three curves that begin at the same place, and a point there."""
    written = {}
    text = ImageDraw.ImageDraw.text

    def recorded(self, place, words, *args, **options):
        written.setdefault(words, self.textbbox(place, words, options["font"], anchor=options.get("anchor")))
        return text(self, place, words, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    x = np.linspace(0, 1, 9)
    curves = [Curve(f"curve {slope}", np.stack([x, slope * x], axis=1)) for slope in (0.2, 0.5, 1.0)]
    panel = Panel([*curves, Curve("the origin", np.zeros((1, 2)), joined=False)], "x", "y")
    plot.draw_panel(panel)
    boxes = [written[curve.name] for curve in panel.curves]
    for number, (left, top, right, bottom) in enumerate(boxes):
        for x, y in np.concatenate([panel.place(curve.points) for curve in panel.curves]):
            assert not (left < x < right and top < y < bottom)
        for other in boxes[:number]:
            assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1]
