"""Noise schedule and samplers. A sampler is a function of (denoise, x, sigmas, noise) and knows no network.

Two coordinate systems meet here. Training mixes z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps (Ho et al. 2020, Eq. 4).
Sampling follows Karras et al. 2022 and works on x = z_t / sqrt(abar_t) = z + sigma eps, where
sigma = sqrt((1 - abar) / abar): the clean latent, with noise of standard deviation sigma added.

    denoise(x, sigma) -> the network's guess of the clean x      x [B, C, H, W], sigma a float
    sigmas: noise levels [N + 1], falling, the last one 0
    noise: an iterator of standard normal draws shaped like x, so that pairs can share them and tests can fix them
    callback(step, sigma, denoised): called once a step, if given
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import cli

import torch


@dataclass(frozen=True)
class Sampling:
    """A model's sampling defaults, kept in its folder's `sampling.json`; these are the released code's."""

    steps: int = 100
    text_guidance: float = 7.5  # s_T of Eq. 3: how strongly to follow the instruction
    image_guidance: float = 1.5  # s_I of Eq. 3: how closely to keep to the image
    resolution: int = 512  # pixels of the longer side, about
    sampler: str = "euler_ancestral"  # one of SAMPLERS
    schedule: str = "authors"  # of the noise levels, see `NoiseSchedule.sigmas`


class NoiseSchedule:
    """Stable Diffusion's 1000 noise levels; beta is linear in its square root ("scaled linear")."""

    def __init__(self, steps=1000, beta_start=0.00085, beta_end=0.0120):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0).float()  # abar_t [steps]; the networks were trained on float32
        abar = self.alphas_cumprod.double()
        self.log_sigmas = ((1 - abar) / abar).sqrt().log()  # [steps], rising with t

    def sigma(self, t):
        """Noise level at the times t, fractions allowed: linear in log sigma between whole times. float64."""
        t = torch.as_tensor(t, dtype=torch.float64).clamp(0, len(self.log_sigmas) - 1)
        low = t.floor().long().clamp(max=len(self.log_sigmas) - 2)
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[low + 1], t - low).exp()

    def t(self, sigma):
        """Time, with fraction, of a noise level; the inverse of `sigma`. Clamped to [0, steps - 1]. float64."""
        log_sigma = torch.as_tensor(sigma, dtype=torch.float64).log()
        low = (torch.searchsorted(self.log_sigmas, log_sigma, right=True) - 1).clamp(0, len(self.log_sigmas) - 2)
        below, above = self.log_sigmas[low], self.log_sigmas[low + 1]
        return low + ((log_sigma - below) / (above - below)).clamp(0, 1)

    def sigmas(self, n, schedule="authors"):
        """n noise levels and a closing 0: [n + 1], float64. schedule: how they are spaced.

        "authors": at evenly spaced fractional times. "karras": evenly in sigma^(1/7) (Karras et al. 2022, Eq. 5).
        "trailing": at even times, too, the last of them a whole step before the 0 (Lin et al. 2023): for few steps.
        """
        if schedule == "karras":
            first, last = self.log_sigmas[[-1, 0]].exp() ** (1 / 7)
            sigmas = torch.lerp(first, last, torch.linspace(0, 1, n, dtype=torch.float64)) ** 7
        else:
            times = torch.linspace(len(self.log_sigmas) - 1, 0, n, dtype=torch.float64)
            if schedule == "trailing":
                times = len(self.log_sigmas) * torch.arange(n, 0, -1, dtype=torch.float64) / n - 1
            sigmas = self.sigma(times)
        return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])

    def add_noise(self, z, noise, t):
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) noise, for z and noise [B, C, H, W] and whole times t [B]."""
        abar = self.alphas_cumprod.to(z.device)[t][:, None, None, None].to(z.dtype)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise

    def min_snr(self, t, most=5.0):
        """Min-SNR weights of the loss, min(snr, 5) / snr [B] for times t [B] (Hang et al. 2023, Eq. 7, for eps)."""
        abar = self.alphas_cumprod.to(t.device)[t]
        snr = abar / (1 - abar)
        return snr.clamp(max=most) / snr

    def balanced(self, t, most=20.0):
        """Weights of the loss, (min(snr, 5) + 1) / snr, at most `most`: [B], for times t [B]. Our own choice.

        At high noise eps is easy to predict and x0 is not: an error of eps is an error of x0 times sqrt(snr). There an
        editor decides what to keep, so the loss is weighted as the error of x0; at low noise as by `min_snr`.
        """
        abar = self.alphas_cumprod.to(t.device)[t]
        snr = abar / (1 - abar)
        return ((snr.clamp(max=5) + 1) / snr).clamp(max=most)

    def denoiser(self, predict_eps):
        """Make `denoise(x, sigma)` of a network eps = predict_eps(z_t, t): z_t [B, C, H, W], t a float."""

        def denoise(x, sigma):
            return x - sigma * predict_eps(x / (sigma**2 + 1) ** 0.5, self.t(sigma).item())

        return denoise


def seeded_noise(shape, seeds, device="cpu"):
    """Yield batches [len(seeds), *shape] of normal draws; row i is what a run with seed i alone would draw.

    On one device it is the stream of torch.manual_seed(seed) and one randn a draw, as in the authors' edit_cli.py.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    while True:
        yield torch.cat([torch.randn(1, *shape, generator=generator, device=device) for generator in generators])


def ancestral_split(sigma, next_sigma, eta=1.0):
    """Split a step to `next_sigma`: go down to `sigma_down` without noise, then add noise of `sigma_up`.

    sigma_down^2 + sigma_up^2 = next_sigma^2. eta 1: as much new noise as the diffusion itself has there; 0: none.
    Returns (sigma_down, sigma_up).
    """
    sigma_up = min(next_sigma, eta * (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) ** 0.5)
    return (next_sigma**2 - sigma_up**2) ** 0.5, sigma_up


def euler_ancestral(denoise, x, sigmas, noise, callback=None):
    """The paper's sampler: an Euler step down to sigma_down, then fresh noise. One draw a step, none after the last."""
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if callback:
            callback(step, sigma, denoised)
        sigma_down, sigma_up = ancestral_split(sigma, next_sigma)
        slope = (x - denoised) / sigma  # dx / dsigma, which is eps
        x = x + slope * (sigma_down - sigma)
        if next_sigma > 0:
            x = x + next(noise) * sigma_up
    return x


def euler(denoise, x, sigmas, noise=None, callback=None):
    """Euler's method on dx / dsigma = eps (Karras et al. 2022, Alg. 1 without its second order). Draws no noise."""
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if callback:
            callback(step, sigma, denoised)
        x = x + (x - denoised) / sigma * (next_sigma - sigma)
    return x


def heun(denoise, x, sigmas, noise=None, callback=None):
    """Heun's second-order method (Karras et al. 2022, Alg. 1): two evaluations a step, but for the last. No noise."""
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if callback:
            callback(step, sigma, denoised)
        slope = (x - denoised) / sigma
        there = x + slope * (next_sigma - sigma)
        if next_sigma > 0:
            slope = (slope + (there - denoise(there, next_sigma)) / next_sigma) / 2
            there = x + slope * (next_sigma - sigma)
        x = there
    return x


# The next ones solve the same equation over lambda = -log sigma, where its linear part is exact: in a step of h, x goes
# 1 - exp(-h) of the way to the clean guess D. A step to sigma 0 ends there.


def dpm_solver_2m(denoise, x, sigmas, noise=None, callback=None, eta=0.0):
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2): second order from the guess of the step before. eta 1: its SDE."""
    last = None  # the guess of the step before, and its h
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if callback:
            callback(step, sigma, denoised)
        if next_sigma == 0:
            return denoised
        h, guess = math.log(sigma / next_sigma), denoised
        if last:
            guess = denoised + h / (2 * last[1]) * (denoised - last[0])  # with r = h' / h: (1 + 1 / 2r) D - 1 / 2r D'
        x = math.exp(-(1 + eta) * h) * x - math.expm1(-(1 + eta) * h) * guess
        if eta:
            x = x + next_sigma * math.sqrt(-math.expm1(-2 * eta * h)) * next(noise)
        last = denoised, h
    return x


def unipc(denoise, x, sigmas, noise=None, callback=None):
    """UniPC of order 2 with B(h) = exp(h) - 1 (Zhao et al. 2023): DPM-Solver++(2M) with corrected steps.

    Once D at the end of a step is known, the step is made again from its beginning, D' and, before it, D''.
    """
    before = older = None  # the last steps: (x, guess, h)
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if callback:
            callback(step, sigma, denoised)
        if before:
            (start, guess, h), to_last, weight = before, 0.0, 0.5
            if older:
                r, phi = -older[2] / h, math.expm1(-h) / -h - 1
                first, second = phi / math.expm1(-h), 2 * (phi / -h - 0.5) / math.expm1(-h)
                to_last = (first - second) / (1 - r) * (older[1] - guess) / r
                weight = first - (first - second) / (1 - r)
            x = math.exp(-h) * start - math.expm1(-h) * (guess + weight * (denoised - guess) + to_last)
        if next_sigma == 0:
            return denoised
        h, guess = math.log(sigma / next_sigma), denoised
        if before:
            guess = denoised + h / (2 * before[2]) * (denoised - before[1])
        older, before = before, (x, denoised, h)
        x = math.exp(-h) * x - math.expm1(-h) * guess
    return x


FUNCTIONS = euler_ancestral, euler, heun, dpm_solver_2m, partial(dpm_solver_2m, eta=1.0), unipc
SAMPLERS = dict(zip(cli.SAMPLERS, FUNCTIONS, strict=True))
