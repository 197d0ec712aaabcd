"""What an evaluation may leave out: how much of the network runs, and what stands in for the rest."""

import pytest
import torch
from random_model import random_model

from gpu.savings import Savings
from ip2p import InstructPix2Pix, guided_eps

LOW, HIGH = 1.0, 6.0


@pytest.fixture(scope="module")
def model():
    return InstructPix2Pix(random_model())


@pytest.fixture
def inputs(model):
    """Two edits' text, image latents, scales, and a latent at some noise level."""
    generator = torch.Generator().manual_seed(0)
    x, image_latent = torch.randn(2, 2, 4, 16, 16, generator=generator)
    return x, (model.encode_text(["a", "b"]), image_latent, 4.0, 1.5)


@pytest.fixture
def rows(model):
    """(rows that the UNet computed, rows of these that its middle computed), an evaluation at a time."""
    found, middle = [], []
    hooks = [
        model.unet.middle.resblock1.register_forward_pre_hook(lambda _, args: middle.append(len(args[0]))),
        model.unet.register_forward_hook(lambda _, args, __: found.append((len(args[0]), sum(middle)))),
        model.unet.register_forward_hook(lambda *_: middle.clear()),
    ]
    yield found
    for hook in hooks:
        hook.remove()


def eps_of(model, x, sigma, denoise):
    """Eps from a denoiser's guess."""
    return (x - denoise(x, sigma)) / sigma


@torch.no_grad()
@pytest.mark.parametrize("low_memory", [False, True])
def test_nothing_left_out_is_the_same_to_the_bit(model, inputs, low_memory):
    x, conditions = inputs
    sparing = model.denoiser(*conditions, savings=Savings(), low_memory=low_memory)
    plain = model.denoiser(*conditions, low_memory=low_memory)
    for sigma in (9.0, 2.0, 0.1):
        assert torch.equal(sparing(x, sigma), plain(x, sigma))


@torch.no_grad()
def test_guidance_in_an_interval(model, inputs, rows):
    """Outside it the prediction with image and text stands alone, and is all that is computed."""
    x, (text, image_latent, *scales) = inputs
    sparing = model.denoiser(text, image_latent, *scales, savings=Savings(cfg_above=LOW, cfg_below=HIGH))
    plain = model.denoiser(text, image_latent, *scales)
    unguided = model.denoiser(text, image_latent, 1.0, 1.0)
    for sigma in (9.0, 6.1, 0.9):
        torch.testing.assert_close(sparing(x, sigma), unguided(x, sigma), atol=1e-4, rtol=1e-4)
    for sigma in (5.9, 1.1):
        assert torch.equal(sparing(x, sigma), plain(x, sigma))
    assert [count for count, _ in rows] == [2, 6] * 3 + [6] * 4


@torch.no_grad()
def test_the_null_branch_at_every_second_evaluation(model, inputs, rows):
    """In between it is the image branch plus their last difference."""
    x, (text, image_latent, *scales) = inputs
    sparing = model.denoiser(text, image_latent, *scales, savings=Savings(null_every=2))
    branches = [model.denoiser(text, image_latent, *branch) for branch in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0))]
    sparing(x, 3.0)
    _, image, null = (eps_of(model, x, 3.0, branch) for branch in branches)
    full, later, _ = (eps_of(model, x, 2.0, branch) for branch in branches)
    wanted = guided_eps(full, later, later + null - image, *scales)
    torch.testing.assert_close(eps_of(model, x, 2.0, sparing), wanted, atol=1e-4, rtol=1e-4)
    assert [count for count, _ in (rows[0], rows[-1])] == [6, 4]


@torch.no_grad()
@pytest.mark.parametrize("low_memory", [False, True])
def test_deep_features_at_every_third_evaluation(model, inputs, rows, low_memory):
    """At the same x and sigma the kept ones are the true ones; elsewhere they are not."""
    x, conditions = inputs
    sparing = model.denoiser(*conditions, savings=Savings(deep_every=3), low_memory=low_memory)
    first, again = sparing(x, 3.0), sparing(x, 3.0)
    torch.testing.assert_close(again, first)
    assert not torch.allclose(sparing(x, 2.0), model.denoiser(*conditions)(x, 2.0), atol=1e-3)
    sparing(x, 1.0)
    deep = [middle for _, middle in rows if middle]
    assert sum(deep) == 18  # all rows at the first and the fourth evaluation, and those of the plain denoiser
    assert sum(count for count, _ in rows) == 30


@torch.no_grad()
def test_all_together(model, inputs, rows):
    """Deep features that were kept for fewer branches are not used for more."""
    x, conditions = inputs
    savings = Savings(cfg_above=LOW, cfg_below=HIGH, null_every=3, deep_every=2)
    sparing = model.denoiser(*conditions, savings=savings)
    for sigma in (9.0, 5.0, 4.0, 3.0, 2.0, 0.5):
        assert sparing(x, sigma).isfinite().all()
    assert rows == [(2, 2), (6, 6), (4, 4), (6, 6), (4, 4), (2, 0)]
