"""Noise schedule and samplers, against closed forms and diffusers' schedulers."""

import warnings

import diffusers
import pytest
import torch
from reference import relative_error

from diffusion import (
    NoiseSchedule,
    euler,
    euler_ancestral,
    seeded_noise,
)

SCHEDULE = NoiseSchedule()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def gaussian_denoiser(mean=0.7, deviation=0.5):
    """The exact denoiser of data that are normal: x shrinks towards the mean."""

    def denoise(x, sigma):
        return mean + (x - mean) * deviation**2 / (deviation**2 + sigma**2)

    return denoise


def draws(shape=(2, 4, 8, 8), seed=0):
    return seeded_noise(shape[1:], range(seed, seed + shape[0]))


def test_schedule_is_stable_diffusions():
    theirs = diffusers.DDIMScheduler(**BETAS)
    assert relative_error(SCHEDULE.alphas_cumprod, theirs.alphas_cumprod) <= 1e-6
    sigmas = SCHEDULE.log_sigmas.exp()
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-4)
    assert sigmas[0].item() == pytest.approx(0.0291675, abs=1e-6)


def test_the_authors_sigmas():
    sigmas = SCHEDULE.sigmas(3)
    assert SCHEDULE.t(sigmas[:-1]).tolist() == pytest.approx([999, 499.5, 0], abs=1e-6)
    assert sigmas[1].item() ** 2 == pytest.approx(SCHEDULE.sigma(499).item() * SCHEDULE.sigma(500).item())
    assert sigmas[-1] == 0
    assert SCHEDULE.sigmas(1).tolist() == pytest.approx([14.6146, 0], abs=1e-4)
    assert (SCHEDULE.sigmas(100).diff() < 0).all()


def test_time_and_noise_level_are_inverse_to_each_other():
    t = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 999
    assert (SCHEDULE.t(SCHEDULE.sigma(t)) - t).abs().max() < 1e-8
    assert SCHEDULE.t([1e-9, 1e9]).tolist() == [0, 999]


def test_add_noise_agrees_with_diffusers():
    noise = draws()
    z, eps, t = next(noise), next(noise), torch.tensor([3, 977])
    theirs = diffusers.DDPMScheduler(**BETAS).add_noise(z, eps, t)
    assert relative_error(SCHEDULE.add_noise(z, eps, t), theirs) <= 1e-6


def test_denoiser_scales_its_input_and_gives_the_fractional_time():
    seen = []

    def predict_eps(z, t):
        seen.append((z, t))
        return torch.ones_like(z)

    x = next(draws())
    sigma = SCHEDULE.sigma(250.25).item()
    denoised = SCHEDULE.denoiser(predict_eps)(x, sigma)
    torch.testing.assert_close(denoised, x - sigma)
    torch.testing.assert_close(seen[0][0], x / (1 + sigma**2) ** 0.5)
    assert seen[0][1] == pytest.approx(250.25)


@pytest.mark.parametrize("sampler", [euler_ancestral, euler])
def test_euler_samplers_agree_with_diffusers(sampler):
    kind = diffusers.EulerAncestralDiscreteScheduler if sampler is euler_ancestral else diffusers.EulerDiscreteScheduler
    theirs = kind(**BETAS)
    theirs.set_timesteps(9)
    sigmas, denoise = theirs.sigmas.double(), gaussian_denoiser()
    first, *rest = [draw for draw, _ in zip(draws(), range(10), strict=False)]
    expected = first * sigmas[0].float()
    for step, t in enumerate(theirs.timesteps):
        theirs.scale_model_input(expected, t)
        sigma = sigmas[step].item()
        eps = (expected - denoise(expected, sigma)) / sigma
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")
            module = __import__(kind.__module__, fromlist=["randn_tensor"])
            patch.setattr(module, "randn_tensor", lambda *_, step=step, **__: rest[step])
            expected = theirs.step(eps, t, expected).prev_sample
    ours = sampler(denoise, first * sigmas[0].float(), sigmas, iter(rest))
    assert relative_error(ours, expected) <= 1e-5


@pytest.mark.parametrize("sampler", [euler_ancestral, euler])
def test_samplers_reach_the_data(sampler):
    """From pure noise to the distribution that the denoiser knows."""
    sigmas = SCHEDULE.sigmas(400)
    x = 0.7 + next(draws((8, 4, 32, 32))) * (sigmas[0].item() ** 2 + 0.5**2) ** 0.5
    out = sampler(gaussian_denoiser(0.7, 0.5), x, sigmas, draws((8, 4, 32, 32), seed=50))
    assert out.mean().item() == pytest.approx(0.7, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.02)


def test_seeded_noise_is_the_stream_of_a_lone_seed():
    """Row i of a batch is what torch.manual_seed(i) and randn_like give, as in the authors' script."""
    batch = seeded_noise((4, 8, 6), [5, 9])
    first, second = next(batch), next(batch)
    for row, seed in enumerate((5, 9)):
        torch.manual_seed(seed)
        latent = torch.zeros(1, 4, 8, 6)
        assert torch.equal(first[row], torch.randn_like(latent)[0])
        assert torch.equal(second[row], torch.randn_like(latent)[0])
