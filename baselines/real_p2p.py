"""Prompt-to-Prompt on real images: invert the image to noise, then sample it again beside its edit.

DDIM inversion (Song et al. 2021; Hertz et al. 2022) runs the sampler backwards, from the image to a noise. Sampling
from it gives the image back, exactly only with infinitely many steps and guidance 1. Under higher guidance the result
depends on the null text, which is one of INVERSIONS:

    "ddim"            the empty text: the result is not quite the image
    "source-caption"  the image's own caption, with which guidance has no effect on the image (Miyake et al. 2023)
    "null-text"       an embedding for each step, optimised to give the image back (Mokady et al. 2023)
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from align import Alignment
from attention import fused
from baselines.sdedit import encode
from diffusion import euler
from images import to_image
from p2p import PairControl

INVERSIONS = "ddim", "source-caption", "null-text"
INNER_STEPS = 10  # of the optimisation, for each step of the sampler
LARGEST_SELF_MAP = 32 * 32  # queries; larger self-attention maps are not shared


class Inversion(NamedTuple):
    """What gives B images back."""

    trajectory: torch.Tensor  # x [steps + 1, B, C, h, w] at the levels of `ddim_sigmas`, from the noise to the image
    nulls: list  # the null text of each step [B, L, E]


class TextControl(PairControl):
    """PairControl as in the released code of Hertz et al.: in the half with text alone, and in small self maps."""

    def __call__(self, q, k, v, layer):
        """Attention as in attention.py; q [4B, H, N, D], k and v [4B, H, M, D]."""
        if not layer.cross and q.shape[2] > LARGEST_SELF_MAP:
            return fused(q, k, v)
        return super().__call__(q, k, v, layer)

    def of_first(self, x):
        """q or k [4B, H, N, D] -> the same, with the first image's in the second's place, both with text."""
        half = len(x) // 2
        return torch.cat([x[:half], super().of_first(x)[half:]])


def ddim_sigmas(schedule, steps):
    """DDIM's noise levels, falling: [steps + 1], float64, at the times ..., 2 k + 1, k + 1, 1 and 0; k = 1000 // steps.

    The last is the level of the time 0, not the level 0, as in Stable Diffusion's own sampler.
    """
    last = len(schedule.log_sigmas) // steps * (steps - 1) + 1
    times = torch.linspace(last, 1, steps, dtype=torch.float64)
    return schedule.sigma(torch.cat([times, torch.zeros(1, dtype=torch.float64)]))


@torch.no_grad()
def ddim_invert(sd, images, captions, steps):
    """B PIL images and their captions -> their trajectory, see `Inversion`. Guidance is 1.

    A step from sigma_s up to sigma_t asks the network at the time t, with the cleaner latent of s.
    """
    text, sigmas = sd.encode_text(captions), ddim_sigmas(sd.schedule, steps).flip(0).tolist()
    trajectory = [encode(sd, images) * (1 + sigmas[0] ** 2) ** 0.5]  # the latent is taken for z at the time 0
    for sigma, next_sigma in pairwise(sigmas):
        x, t = trajectory[-1], sd.schedule.t(next_sigma).item()
        eps = sd.predict_eps(x / (1 + sigma**2) ** 0.5, t, text)
        trajectory.append(x + eps * (next_sigma - sigma))
    return torch.stack(trajectory[::-1])


@torch.enable_grad()  # whatever the caller has
def null_text(sd, trajectory, captions, guidance, inner_steps=INNER_STEPS):
    """The null texts, one [B, L, E] a step, with which guidance follows a trajectory of `ddim_invert`; sd in float32.

    At step i Adam, with a rate falling from 0.01, minimises the distance of the guided step's end to the trajectory:
    the mean square over a latent z (Mokady et al. 2023), until it is below 1e-5 + 2e-5 i.
    """
    text, sigmas = sd.encode_text(captions), ddim_sigmas(sd.schedule, len(trajectory) - 1).tolist()
    x, null, nulls = trajectory[0], sd.null_text.expand_as(text), []
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        with torch.no_grad():
            eps_text = sd.predict_eps(x / (1 + sigma**2) ** 0.5, sd.schedule.t(sigma).item(), text)
        step_with = partial(guided_step, sd, x, sigma, next_sigma, eps_text, guidance)
        null = null.clone().requires_grad_()
        optimizer = torch.optim.Adam([null], lr=0.01 * (1 - i / 100))
        for _ in range(inner_steps):
            error = (step_with(null) - trajectory[i + 1]).square().mean(dim=(1, 2, 3)) / (1 + next_sigma**2)  # [B]
            done = error < 1e-5 + 2e-5 * i
            if done.all():
                break
            (null.grad,) = torch.autograd.grad(error.sum(), null)
            before = null.detach().clone()
            optimizer.step()
            null.data = torch.where(done[:, None, None], before, null.data)  # images do not depend on each other
        null = null.detach()
        nulls.append(null)
        with torch.no_grad():
            x = step_with(null)
    return nulls


def guided_step(sd, x, sigma, next_sigma, eps_text, guidance, null):
    """A DDIM step of x [B, C, h, w] with the prediction for the text eps_text, like x, and a null text [B, L, E]."""
    eps_null = sd.predict_eps(x / (1 + sigma**2) ** 0.5, sd.schedule.t(sigma).item(), null)
    return x + (eps_null + guidance * (eps_text - eps_null)) * (next_sigma - sigma)


def invert(sd, images, captions, steps, guidance, inversion="null-text"):
    """B PIL images and their captions -> an `Inversion`, for guidance by one of INVERSIONS."""
    trajectory, text = ddim_invert(sd, images, captions, steps), sd.encode_text(captions)
    if inversion == "null-text":
        return Inversion(trajectory, null_text(sd, trajectory, captions, guidance))
    null = {"ddim": sd.null_text.expand_as(text), "source-caption": text}[inversion]
    return Inversion(trajectory, [null] * steps)


@torch.no_grad()
def edit_inverted(sd, inverted, befores, afters, share, guidance, *, control="self", blend=None):
    """B captions before and after, an `Inversion` -> (reconstructions, edits): two lists of B PIL images.

    share: the fraction of the steps in which the edit has the attention maps of the reconstruction, a number or [B];
    control: which maps, one of p2p.CONTROLS; blend: a `LocalBlend`.
    """
    trajectory, nulls = inverted
    steps, sigmas = len(nulls), ddim_sigmas(sd.schedule, len(nulls))
    alignment = None if control == "self" else Alignment.of(sd.tokenizer, befores, afters, sd.device)
    pair_control = TextControl(steps, torch.as_tensor(share).expand(len(befores)), control, alignment)
    attend = blend.watch(pair_control) if blend else pair_control
    text, null = sd.encode_text([*befores, *afters]), iter(nulls)

    def denoise(x, sigma):
        return sd.denoiser(text, guidance, attend, next(null).repeat(2, 1, 1))(x, sigma)

    denoise = blend.blend(denoise) if blend else denoise
    x = euler(denoise, trajectory[0].repeat(2, 1, 1, 1), sigmas, callback=pair_control.next_step)
    images = [to_image(image) for image in sd.decode(x / (1 + sigmas[-1].item() ** 2) ** 0.5)]
    return images[: len(befores)], images[len(befores) :]


def edit_real(
    sd, image, before, after, share, *, steps=None, guidance=None, inversion="null-text", control="self", blend=None
):
    """Edit one PIL image by the captions before and after. Returns (reconstruction, edited), two PIL images.

    steps and guidance default to the model's own; the rest as in `invert` and `edit_inverted`, which take batches.
    """
    steps = steps or sd.sampling.steps
    guidance = sd.sampling.text_guidance if guidance is None else guidance
    inverted = invert(sd, [image], [before], steps, guidance, inversion)
    pair = edit_inverted(sd, inverted, [before], [after], share, guidance, control=control, blend=blend)
    return pair[0][0], pair[1][0]
