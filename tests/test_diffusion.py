"""Noise schedule and samplers, against closed forms and diffusers' schedulers."""

import sys
from functools import partial
from itertools import pairwise

from cli import SCHEDULES

import diffusers
import pytest
import torch
from reference import relative_error
from torch import nn

from diffusion import SAMPLERS, NoiseSchedule, seeded_noise

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


THEIRS = {  # diffusers' schedulers
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler, "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler, "dpm_solver_2m": diffusers.DPMSolverMultistepScheduler,
    "dpm_solver_2m_sde": partial(diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "unipc": diffusers.UniPCMultistepScheduler,
}  # fmt: skip


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_agree_with_diffusers(name, steps, monkeypatch):
    """With equal noise, on a small network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1)).double()
    first, *noise = [draw.double() for draw, _ in zip(draws(), range(steps + 1), strict=False)]
    theirs, fresh = THEIRS[name](**BETAS), iter(noise)
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", lambda *_, **__: next(fresh), False)
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.double().unique_consecutive()  # Heun's come twice
    x = first * sigmas[0]
    scaled = theirs.scale_model_input(x, theirs.timesteps[0]) is x  # theirs works on z_t
    expected = x / (sigmas[0] ** 2 + 1) ** (0.5 * scaled)
    with torch.no_grad():
        for t in theirs.timesteps:
            eps = network(theirs.scale_model_input(expected, t)) + t / 1000
            expected = theirs.step(eps, t, expected).prev_sample
        denoise = SCHEDULE.denoiser(lambda z, t: network(z) + t / 1000)
        ours = SAMPLERS[name](denoise, x, sigmas, iter(noise))
    assert relative_error(ours, expected) <= 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_reach_the_data(name, schedule):
    """From pure noise to the distribution that the denoiser knows."""
    sigmas = SCHEDULE.sigmas(400, schedule)
    x = 0.7 + next(draws((8, 4, 32, 32))) * (sigmas[0].item() ** 2 + 0.5**2) ** 0.5
    out = SAMPLERS[name](gaussian_denoiser(0.7, 0.5), x, sigmas, draws((8, 4, 32, 32), seed=50))
    assert out.mean().item() == pytest.approx(0.7, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm_solver_2m", 2), ("unipc", 3)])
def test_order_of_convergence(name, order):
    """On normal data, where the end of the path is known: twice the steps, 1 / 2^order of the error."""
    x, errors = torch.full((1, 1, 1, 1), 9.0, dtype=torch.float64), []
    for steps in (40, 80, 160):
        sigmas = torch.logspace(1, -2, steps + 1, dtype=torch.float64)  # not to 0: its step has no end in lambda
        exact = 0.7 + (x - 0.7) * ((0.5**2 + 1e-4) / (0.5**2 + 100)) ** 0.5
        errors.append((SAMPLERS[name](gaussian_denoiser(), x, sigmas) - exact).abs().item())
    for coarse, fine in pairwise(errors):
        assert 0.8 * 2**order < coarse / fine < 1.4 * 2**order


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_trailing_sigmas_are_those_of_diffusers(steps):
    theirs = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    sigmas = SCHEDULE.sigmas(steps, "trailing")
    torch.testing.assert_close(sigmas[:-1], SCHEDULE.sigma(theirs.timesteps), rtol=1e-6, atol=0)
    assert sigmas[-1] == 0


def test_karras_sigmas_are_those_of_diffusers():
    theirs = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    theirs.set_timesteps(10)
    torch.testing.assert_close(SCHEDULE.sigmas(10, "karras"), theirs.sigmas.double(), rtol=1e-4, atol=0)


def test_seeded_noise_is_the_stream_of_a_lone_seed():
    """Row i of a batch is what torch.manual_seed(i) and randn_like give, as in the authors' script."""
    batch = seeded_noise((4, 8, 6), [5, 9])
    first, second = next(batch), next(batch)
    for row, seed in enumerate((5, 9)):
        torch.manual_seed(seed)
        latent = torch.zeros(1, 4, 8, 6)
        assert torch.equal(first[row], torch.randn_like(latent)[0])
        assert torch.equal(second[row], torch.randn_like(latent)[0])
