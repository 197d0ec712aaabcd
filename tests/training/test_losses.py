"""loss.png: a mean that does not lag, and something to see after any number of steps."""

import numpy as np
import pytest
from PIL import Image

from training.runs import draw_losses, smooth


def test_the_mean_does_not_lag_and_weighs_steps():
    steps = np.arange(1, 401)
    falling = np.stack([steps, 5 - 0.01 * steps], axis=1)
    np.testing.assert_allclose(smooth(falling), falling[4:-4])
    noise = np.random.default_rng(0).standard_normal(400)
    assert smooth(falling + noise[:, None] * [0, 1])[10:-10, 1].std() < 1.2
    uneven = np.array([[step, 1.0] for step in range(1, 51)] + [[step, 3.0] for step in range(150, 5150, 100)])
    assert smooth(uneven)[48, 1] == pytest.approx((3 * 1 + 2 * 100 * 3) / 203)  # 3 of one step, 2 of a hundred


@pytest.mark.parametrize("steps", [1, 10, 100_000])
def test_curves_can_be_seen(tmp_path, steps):
    shown = np.unique(np.linspace(1, steps, 1000).astype(int)).tolist()[:-1]
    lines = [{"step": step, "loss": 0.1 + np.exp(-step / 300)} for step in shown]
    lines = [{"step": 0, "validation": 1.0}, *lines, {"step": steps, "loss": 0.2, "validation": 0.3}]
    draw_losses(lines, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png")).astype(int)
    for colour in ((0x1F, 0x5F, 0xAE), (0xC2, 0x57, 0x1A)):
        columns = np.nonzero((pixels[36:] == colour).all(2).any(0))[0]
        assert np.ptp(columns) > 700 or steps == 1


def test_what_has_no_logarithm_is_left_out(tmp_path):
    odd = [{"step": 1 + i, "loss": loss} for i, loss in enumerate((float("nan"), 0.0, float("inf"), 2.0))]
    for lines in ([], odd):
        draw_losses([{"step": 0}, *lines], tmp_path / "loss.png")
