"""The judge: its answers mean what the scenes say, and a file brings the same judge back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_model import randomise
from safetensors.torch import load_file
from torch import nn

from mini.judge import ATTRIBUTES, Judge, labels, right
from mini.world import random_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [random_scene(rng) for _ in range(250)]


@pytest.fixture
def judge():
    return randomise(Judge(), seed=0).eval()


def certain(answers, seed=0):
    """Logits that say `answers` [B, attributes] clearly, and anything where an answer is -1."""
    generator = torch.Generator().manual_seed(seed)
    logits = {}
    for (name, options), answer in zip(ATTRIBUTES.items(), answers.T, strict=True):
        noise = torch.randn(len(answers), len(options), generator=generator)
        logits[name] = noise + 100 * F.one_hot(answer.clamp(min=0), len(options)) * (answer >= 0)[:, None]
    return logits


def test_a_judge_that_is_right_reads_the_truth(judge, scenes, monkeypatch):
    monkeypatch.setattr(judge, "forward", lambda x: certain(labels(scenes)))
    x = torch.zeros(len(scenes), 3, 128, 128)
    assert right(judge, x, scenes).all()
    assert right(judge, x, scenes[1:] + scenes[:1]).mean() < 0.02


@torch.no_grad()
def test_the_logits_of_a_place_come_from_its_half(judge, monkeypatch):
    class Features(nn.Module):
        def forward(self, x):
            channels = judge.squeeze.in_channels
            return F.avg_pool2d(x, 16).repeat(1, channels, 1, 1)[:, :channels]

    monkeypatch.setattr(judge, "features", Features())
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    logits = judge(x)
    assert {name: part.shape for name, part in logits.items()} == {n: (1, len(o)) for n, o in ATTRIBUTES.items()}
    x[:, :, :, 80:] += 1
    changed = {name for name, part in judge(x).items() if not torch.equal(part, logits[name])}
    assert changed == {name for name in ATTRIBUTES if not name.startswith("left")}


def test_the_loss_asks_for_the_truth_and_for_nothing_about_nothing(judge, scenes, monkeypatch):
    x, answers = torch.zeros(len(scenes), 3, 128, 128), labels(scenes)
    for seed in (0, 1):  # the logits that differ are those of the colour and the size of nothing, and far from the rest
        monkeypatch.setattr(judge, "forward", lambda x, seed=seed: certain(answers, seed))
        assert judge.loss(x, answers).item() < 1e-6
    wrong = answers.clone()
    wrong[0, 0] = (wrong[0, 0] + 1) % 3
    assert judge.loss(x, wrong).item() == pytest.approx(100 / len(scenes), rel=0.1)


@torch.no_grad()
def test_a_judge_survives_being_saved(judge, tmp_path):
    """In float16, and used in float32."""
    x = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    judge.half().float().save(tmp_path / "judge.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "judge.safetensors").values()} == {torch.float16}
    again = Judge.load(tmp_path / "judge.safetensors")
    assert all(torch.equal(part, judge(x)[name]) for name, part in again(x).items())
    assert not again.training
    assert not any(weight.requires_grad for weight in again.parameters())
