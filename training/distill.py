"""Distil an editor: few steps, one branch. The guidance scales become inputs of its UNet (Meng et al. 2023).

The student's step from one noise level to the next should end where several steps of the teacher, under both guidances,
end (Salimans and Ho 2022, with its levels fixed from the beginning).
"""

import torch

from diffusion import dpm_solver_2m

TEACHER_STEPS = 3  # for each of the student's
NO_TEXT = 0.1  # this fraction of the examples has the empty instruction, with which `region` compares


def draw_scales(draws, sampling):
    """Guidance scales for the rows of a `Draws`, [B, 2]: uniform from 1 to as far above a model's own."""
    own = torch.tensor([sampling.text_guidance, sampling.image_guidance])
    return 1 + 2 * (own - 1).clamp(min=0) * torch.stack([draws.uniform(), draws.uniform()], dim=1)


def loss(predict_eps, teacher, steps, draws, latent, image_latent, text, null_text, noise):
    """The student's error, an example at a time: max(1, 1 / sigma^2) || D - D* ||^2, averaged over the latent.

    D is the student's clean guess at noise level sigma, D* the one with which Euler's step ends where the teacher does.
    Equal parts of the batch are at each of the student's `steps` levels. predict_eps(z, t, text, scales=): its UNet;
    teacher: an `InstructPix2Pix`; draws: a `Draws`; the others as in `ip2p.loss`. Returns [B].
    """
    scales = draw_scales(draws, teacher.sampling).to(latent.device)
    no_text = draws.uniform().to(latent.device) < NO_TEXT
    text = torch.where(no_text[:, None, None], null_text, text)
    sigmas = teacher.schedule.sigmas(steps * TEACHER_STEPS, "trailing")
    x, levels, wanted = [], [], []
    parts = zip(*(rows.chunk(steps) for rows in (latent, image_latent, text, noise, scales)), strict=True)
    for number, (z, image, context, eps, scale) in enumerate(parts):
        segment = sigmas[number * TEACHER_STEPS :][: TEACHER_STEPS + 1]
        first, last = segment[0].item(), segment[-1].item()
        x.append(z + first * eps)
        with torch.no_grad():
            denoise = teacher.denoiser(context, image, *scale.T[..., None, None, None])
            end = dpm_solver_2m(denoise, x[-1], segment)
        wanted.append(x[-1] + (end - x[-1]) * first / (first - last))
        levels += [first] * len(z)
    x, wanted, sigma = torch.cat(x), torch.cat(wanted), torch.tensor(levels, device=latent.device)[:, None, None, None]
    t = teacher.schedule.t(sigma.cpu()).flatten().to(latent.device)
    z_t = x / (sigma**2 + 1).sqrt()
    eps = predict_eps(torch.cat([z_t, image_latent], dim=1), t, text, scales=scales).float()
    error = (x - sigma * eps - wanted).square().mean(dim=(1, 2, 3))
    return error * (1 / sigma**2).clamp(min=1).flatten()
