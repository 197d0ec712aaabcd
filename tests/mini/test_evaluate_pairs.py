"""Measuring generated pairs: the edits, what counts as change and as right, and what the filter keeps."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dataset import Filter
from mini import evaluate_pairs
from mini.evaluate_pairs import NOISE, measure_pairs, measure_right, one_sided_edits
from mini.evaluate_world import SIMILARITIES
from mini.judge import Judge, labels
from mini.world import caption
from p2p import P_RANGE

pytestmark = pytest.mark.usefixtures("one_thread")

INDEPENDENT, SHARED, CONTROLLED = NOISE
MODEL = SimpleNamespace(
    sampling=SimpleNamespace(resolution=64),
    vae=SimpleNamespace(config=SimpleNamespace(factor=4, latent_channels=4)),
    device="cpu",
)


@pytest.fixture(scope="module")
def edits():
    return one_sided_edits(24)


class Oracle(nn.Module):
    """A judge of grey images whose brightness tells the scene; it takes those in `wrong` for others, and no more."""

    def __init__(self, edits, wrong=()):
        super().__init__()
        self.where = nn.Parameter(torch.zeros(1))
        self.scenes, self.wrong = [scene for edit in edits for scene in (edit.before, edit.after)], wrong

    def image(self, scene):
        return torch.full((3, 64, 64), self.scenes.index(scene) / len(self.scenes))

    def read(self, x):
        numbers = [round(value) for value in (x.mean((1, 2, 3)) * len(self.scenes)).tolist()]
        return labels([self.scenes[number - 1 if number in self.wrong else number] for number in numbers])


def drawn(monkeypatch, oracle):
    """Let the oracle's images be what is sampled for the captions of its scenes."""
    known = {caption(scene): oracle.image(scene) for scene in oracle.scenes}

    def sample_pairs(model, before, after, noise, steps=None):
        return tuple(torch.stack([known[text] for text in texts]) for texts in (before, after))

    monkeypatch.setattr(evaluate_pairs, "sample_pairs", sample_pairs)


# ---- change ----


def test_change_is_that_of_the_half_not_named(edits, monkeypatch):
    """Of a pair that differs by 1 in the half named and by 0.4 in the other one, from -1 to 1: 0.2 of the range."""
    sides = {caption(edit.before): edit.before.left != edit.after.left for edit in edits}
    assert set(sides.values()) == {False, True}

    def sample_pairs(model, before, after, noise, steps=None):
        x = torch.zeros(len(before), 3, 64, 64)
        y = x + 0.4
        for row, text in enumerate(before):
            half = slice(0, 32) if sides[text] else slice(32, 64)
            y[row, :, :, half] = -1
        return x, y

    monkeypatch.setattr(evaluate_pairs, "sample_pairs", sample_pairs)
    measured, shown = measure_pairs(MODEL, Judge().eval(), edits, (3.0, 6.0), None, 10)
    assert list(measured) == list(shown) == list(NOISE)
    for way in NOISE:
        assert measured[way]["change"] == pytest.approx(0.2, abs=1e-6)
        assert shown[way].shape == (8, 2, 3, 64, 64)
        assert torch.equal(shown[way][:, 0], torch.zeros(8, 3, 64, 64))


def test_the_three_ways(edits, monkeypatch):
    """Images that are nothing but their noise, with the fraction of control and the guidance of every call."""
    calls = []

    def sample_pairs(model, before, after, noise, steps=None):
        calls.append((noise.p, noise.guidance, steps))
        return tuple(half[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3) / 4 for half in noise.first.chunk(2))

    monkeypatch.setattr(evaluate_pairs, "sample_pairs", sample_pairs)
    measured, shown = measure_pairs(MODEL, Judge().eval(), edits, (3.0, 6.0), 7, 16)
    assert measured[SHARED]["change"] == measured[CONTROLLED]["change"] == 0
    assert measured[INDEPENDENT]["change"] == pytest.approx(0.141, abs=0.01)  # E|x - y| / 2 of two N(0, 1/4)
    for way in NOISE:  # the same noise for the first images
        assert torch.equal(shown[way][:, 0], shown[SHARED][:, 0])
    assert len({tuple(x.flatten().tolist()) for x in shown[INDEPENDENT].flatten(0, 1)}) == 16
    assert [len(p) for p, _, _ in calls] == [16, 16, 8, 8, 16, 8, 16, 8]  # independent pairs are sampled twice
    assert all(steps == 7 for _, _, steps in calls)
    assert all(not p.any() for p, _, _ in calls[:6])
    p, guidance = (torch.cat(values) for values in list(zip(*calls[6:], strict=True))[:2])
    assert P_RANGE[0] <= p.min() < 0.3
    assert 0.7 < p.max() <= P_RANGE[1]
    assert 3 <= guidance.min() < guidance.max() <= 6


# ---- right ----


@pytest.mark.parametrize(
    ("wrong", "fraction"),
    [
        ([], 1.0),
        ([0], 5 / 6),  # the first pair's image before
        ([3], 5 / 6),  # the second's image after
        ([4, 5], 5 / 6),  # both of the third
        (range(12), 0.0),
    ],
)
def test_both_images_of_a_pair_must_be_right(edits, monkeypatch, wrong, fraction):
    oracle = Oracle(edits[:6], wrong)
    drawn(monkeypatch, oracle)
    measured, _ = measure_pairs(MODEL, oracle, edits[:6], (3.0, 6.0), None, 4)
    assert [row["both_right"] for row in measured.values()] == [pytest.approx(fraction)] * 3


class Scorer:
    """A CLIP whose similarities are given; it checks that it is shown images in [0, 1] with their own captions."""

    def __init__(self, rows, oracle):
        self.rows, self.oracle, self.logit_scale = rows, oracle, torch.zeros(())

    def edit_similarities(self, before, after, ids_before, ids_after):
        known = {caption(scene): self.oracle.image(scene) for scene in self.oracle.scenes}
        for images, ids in ((before, ids_before), (after, ids_after)):
            captions = ["".join(map(chr, row)).strip() for row in ids.tolist()]
            torch.testing.assert_close(images, (torch.stack([known[text] for text in captions]) + 1) / 2)
        rows, self.rows = self.rows[: len(before)], self.rows[len(before) :]
        return dict(zip(SIMILARITIES, torch.tensor(rows).T, strict=True))


def letters(texts):
    """A tokenizer."""
    return torch.tensor([[ord(letter) for letter in text.ljust(120)] for text in texts])


def test_filtered_pairs_are_compared_with_all(edits, monkeypatch):
    """Six pairs, of which the 1st, 2nd, 4th and 6th pass, and the 2nd, 3rd and 5th are wrong."""
    edits, good = edits[:6], [0.5, 0.6, 0.5, 0.9]
    rows = [good, good, [0.1, *good[1:]], good, [*good[:3], 0.6], good]
    oracle = Oracle(edits, wrong=[3, 4, 8, 9])
    drawn(monkeypatch, oracle)
    found = measure_right(MODEL, oracle, Scorer(rows, oracle), letters, edits, Filter(), (3.0, 6.0), None, 4)
    assert found == {"yield": pytest.approx(4 / 6), "right_all": 0.5, "right_kept": 0.75}
