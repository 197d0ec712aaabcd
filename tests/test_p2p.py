"""Prompt-to-Prompt: the same as with attention maps in memory, when it acts, and the random numbers of pairs."""

from itertools import islice

import pytest
import torch
from random_model import random_model
from reference import relative_error

from attention import Layer
from diffusion import euler, euler_ancestral
from p2p import P_RANGE, PairNoise, SharedSelfAttention, sample_pairs
from text2image import TextToImage

pytestmark = pytest.mark.usefixtures("one_thread")

BEFORE, AFTER, OTHER = "a red house by the sea", "a blue tree at night", "nothing"
SHAPE = (4, 16, 16)
SELF, CROSS = (Layer(0, "down", cross, (4, 4)) for cross in (False, True))


@pytest.fixture(scope="module")
def model():
    return TextToImage(random_model(seed=3, in_channels=4))


def with_maps(share, steps, step):
    """The control as Hertz et al. have it: maps in memory, and the target's replaced by the source's, row by row."""

    def attend(q, k, v, layer):
        maps = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)  # [4B, H, N, M]
        pairs = len(share)
        for row, p in enumerate(share):
            if not layer.cross and p * (steps - 1) > step:
                null_before, null_after, before, after = range(row, 4 * pairs, pairs)
                maps[null_after] = maps[null_before]
                maps[after] = maps[before]
        return maps @ v

    return attend


def control(share, steps, step):
    """Ours, as it is at this step."""
    attend = SharedSelfAttention(torch.tensor(share), steps)
    for passed in range(step):
        attend.next_step(passed, 1.0, None)
    return attend


def largest(x, y):
    return (x - y).abs().max().item()


# ---- one attention layer ----


@pytest.mark.parametrize("step", range(5))
def test_a_layer_equals_that_with_maps(step):
    """Three pairs: one that is never controlled, one at first, one till the last step but one."""
    share, generator = [0.0, 0.4, 0.9], torch.Generator().manual_seed(step)
    q, k, v = torch.randn(3, 12, 2, 16, 8, generator=generator)
    ours, theirs = (make(share, 5, step)(q, k, v, SELF) for make in (control, with_maps))
    assert largest(ours, theirs) <= 1e-5
    free = with_maps([0.0] * 3, 5, step)(q, k, v, SELF)
    changed = [row for row in range(12) if largest(ours[row], free[row]) > 0.1]
    assert changed == {0: [4, 5, 10, 11], 1: [4, 5, 10, 11], 4: []}.get(step, [5, 11])  # second pictures, both halves


def test_texts_are_looked_at_as_ever():
    share, generator = [0.9, 0.9], torch.Generator().manual_seed(0)
    q = torch.randn(8, 2, 16, 8, generator=generator)
    k, v = torch.randn(2, 8, 2, 7, 8, generator=generator)
    attend = control(share, 5, 0)
    assert largest(attend(q, k, v, CROSS), with_maps([0.0, 0.0], 5, 0)(q, k, v, CROSS)) <= 1e-5
    k, v = torch.randn(2, 8, 2, 16, 8, generator=generator)
    assert largest(attend(q, k, v, CROSS), attend(q, k, v, SELF)) > 0.1


def test_inputs_are_left_alone():
    q, k, v = torch.randn(3, 8, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    kept = q.clone(), k.clone(), v.clone()
    control([0.9, 0.9], 5, 0)(q, k, v, SELF)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), kept, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 100])
@pytest.mark.parametrize("p", [0.0, 0.1001, 0.35, 0.5, 0.9001, 1.0])
def test_when_it_acts(p, steps):
    """At step i of n when p > i / (n - 1): even p = 1 leaves the last step free. One step alone: when p > 0."""
    q, k, v = torch.randn(3, 4, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    free = with_maps([0.0], 1, 0)(q, k, v, SELF)
    attend, acted = SharedSelfAttention(torch.tensor([p]), steps), []
    for step in range(steps):
        acted.append(largest(attend(q, k, v, SELF), free) > 1e-3)
        attend.next_step(step, 1.0, None)
    assert acted == ([p > step / (steps - 1) for step in range(steps)] if steps > 1 else [p > 0])


# ---- the whole network ----


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 2, 4])
def test_the_unet_equals_that_with_maps(model, step):
    share, generator = [0.3, 0.8], torch.Generator().manual_seed(step)
    z = torch.randn(2, *SHAPE, generator=generator).repeat(4, 1, 1, 1)
    t = torch.tensor([700.0, 30.5]).repeat(4)
    context = torch.cat([model.null_text.expand(4, -1, -1), model.encode_text([BEFORE, OTHER, AFTER, BEFORE])])
    context = context + 0.3 * torch.randn(context.shape, generator=generator)  # so that the null halves differ, too
    ours, theirs, free = (
        model.unet(z, t, context, attend)
        for attend in (control(share, 5, step), with_maps(share, 5, step), with_maps([0.0, 0.0], 5, step))
    )
    assert relative_error(ours, theirs) <= 1e-5
    changed = [row for row in range(8) if largest(ours[row], free[row]) > 1e-3]
    assert changed == {0: [2, 3, 6, 7], 2: [3, 7], 4: []}[step]


# ---- pairs ----


def pairs(model, before, after, seeds, p=P_RANGE, steps=4, **settings):
    return sample_pairs(model, before, after, PairNoise(seeds, SHAPE, (3.0, 6.0), p), steps, **settings)


@torch.no_grad()
def test_a_pair_equals_one_written_out(model):
    """Every step of the sampler by hand, with maps in memory; numbers drawn in the order of the released code."""
    steps, seed = 5, 17
    generator = torch.Generator().manual_seed(seed)
    sigmas = model.schedule.sigmas(steps)
    x = torch.randn(1, *SHAPE, generator=generator).repeat(2, 1, 1, 1) * sigmas[0].item()
    p = 0.1 + 0.8 * torch.rand(1, generator=generator).item()
    guidance = 3 + 3 * torch.rand(1, generator=generator).item()
    assert 0.25 < p < 1
    context = torch.cat([model.null_text, model.null_text, model.encode_text([BEFORE, AFTER])])
    for step in range(steps):
        sigma, following = sigmas[step].item(), sigmas[step + 1].item()
        z = (x / (sigma**2 + 1) ** 0.5).repeat(2, 1, 1, 1)
        t = torch.full((4,), model.schedule.t(sigma).item())
        null, text = model.unet(z, t, context, with_maps([p], steps, step)).chunk(2)
        eps = null + guidance * (text - null)
        up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
        x = x + eps * ((following**2 - up**2) ** 0.5 - sigma)
        if following > 0:
            x = x + up * torch.randn(1, *SHAPE, generator=generator)
    expected = model.vae.decode(x / model.vae.config.scaling)

    before, after = pairs(model, [BEFORE], [AFTER], [seed], steps=steps)
    assert before.shape == after.shape == (1, 3, 64, 64)
    assert relative_error(before, expected[:1]) <= 1e-4
    assert relative_error(after, expected[1:]) <= 1e-4
    assert relative_error(after, before) > 0.1


def test_the_first_picture_does_not_know_of_the_control(model):
    free, little, much = (pairs(model, [BEFORE], [AFTER], [5], (p, p)) for p in (0.0, 0.1, 0.9))
    assert torch.equal(free[0], little[0])
    assert torch.equal(free[0], much[0])
    assert largest(free[1], little[1]) > 0.01
    assert largest(little[1], much[1]) > 0.005


@torch.no_grad()
def test_without_control_a_pair_is_two_pictures_of_the_same_noise(model):
    pair = pairs(model, [BEFORE], [AFTER], [5], (0.0, 0.0))
    sigmas = model.schedule.sigmas(4)
    for text, picture in zip((BEFORE, AFTER), pair, strict=True):
        noise = PairNoise([5], SHAPE, (3.0, 6.0))
        denoise = model.denoiser(model.encode_text([text]), noise.guidance.item())
        x = noise.first[:1] * sigmas[0].item()
        alone = model.decode(euler_ancestral(denoise, x, sigmas, (draw[:1] for draw in noise)))
        assert relative_error(picture, alone) <= 1e-4
    assert relative_error(pair[1], pair[0]) > 0.1


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_equal_captions_give_equal_pictures(model, p):
    before, after = pairs(model, [BEFORE, OTHER], [BEFORE, OTHER], [5, 6], (p, p))
    assert relative_error(after, before) <= 1e-5
    assert largest(before[0], before[1]) > 0.1


def test_a_batch_equals_its_pairs_one_by_one(model):
    befores, afters, seeds = [BEFORE, OTHER, BEFORE], [AFTER, BEFORE, OTHER], [7, 2**40, 7]
    together = pairs(model, befores, afters, seeds)
    for row, texts in enumerate(zip(befores, afters, strict=True)):
        alone = pairs(model, *([text] for text in texts), [seeds[row]])
        for many, one in zip(together, alone, strict=True):
            assert relative_error(many[row], one[0]) <= 1e-4
    assert relative_error(together[0][2], together[0][0]) <= 1e-4  # the same caption and seed
    assert largest(together[1][2], together[1][0]) > 0.1


def test_other_samplers_and_the_models_own_steps(model):
    own = pairs(model, [BEFORE], [AFTER], [5], steps=None)
    assert torch.equal(own[1], pairs(model, [BEFORE], [AFTER], [5], steps=10)[1])
    by_euler = pairs(model, [BEFORE], [AFTER], [5], steps=10, sampler=euler)
    assert largest(by_euler[1], own[1]) > 0.01
    free = pairs(model, [BEFORE], [AFTER], [5], (0.0, 0.0), steps=10, sampler=euler)
    assert torch.equal(free[0], by_euler[0])
    assert largest(free[1], by_euler[1]) > 0.01


# ---- random numbers ----


def draws(noise, count=3):
    """The noise of some steps [count, 2B, ...]."""
    return torch.stack(list(islice(noise, count)))


def test_numbers_are_drawn_in_the_order_of_the_released_code():
    noise = PairNoise([11], (4, 2, 3), (7.5, 15.0))
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(noise.first, torch.randn(1, 4, 2, 3, generator=generator).repeat(2, 1, 1, 1))
    assert noise.p.item() == pytest.approx(0.1 + 0.8 * torch.rand((), generator=generator).item())
    assert noise.guidance.item() == pytest.approx(7.5 + 7.5 * torch.rand((), generator=generator).item())
    for draw in draws(noise):
        assert torch.equal(draw, torch.randn(1, 4, 2, 3, generator=generator).repeat(2, 1, 1, 1))


def test_a_seed_draws_the_same_in_every_batch():
    seeds = [3, 2**63 - 1, 0, 3]
    together = PairNoise(seeds, (4, 2, 3), (1.0, 2.0))
    steps = draws(together)
    assert together.first.shape == (8, 4, 2, 3)
    assert together.p.shape == together.guidance.shape == (4,)
    for row, seed in enumerate(seeds):
        alone = PairNoise([seed], (4, 2, 3), (1.0, 2.0))
        assert together.p[row] == alone.p[0]
        assert together.guidance[row] == alone.guidance[0]
        both = [row, row + 4]  # of before..., after...
        assert torch.equal(together.first[both], alone.first)
        assert torch.equal(steps[:, both], draws(alone))
    assert len(set(together.p.tolist())) == 3
    assert len(set(steps[:, :3].flatten().tolist())) == steps[:, :3].numel()


def test_ranges():
    """Uniform over the whole of them."""
    noise = PairNoise(range(2000), (1, 1, 1), (7.5, 15.0))
    for values, (low, high) in ((noise.p, P_RANGE), (noise.guidance, (7.5, 15.0))):
        shares = ((values - low) / (high - low)).sort().values
        assert shares[0] >= 0
        assert shares[-1] <= 1
        assert (shares - torch.linspace(0, 1, 2000)).abs().max() < 0.04
    assert P_RANGE == (0.1, 0.9)
    assert abs(torch.corrcoef(torch.stack([noise.p, noise.guidance]))[0, 1]) < 0.1
    assert PairNoise([1], (1, 1, 1), (4.0, 4.0), (0.0, 0.0)).p.item() == 0
    assert PairNoise([1], (1, 1, 1), (4.0, 4.0)).guidance.item() == 4
