"""InstructPix2Pix: conditioning, two-fold guidance, the training loss, and the edit itself (Sec. 3.2).

    model = InstructPix2Pix.load("ip2p")
    edited = model.edit(Image.open("x.png"), "make it night", seed=0)
"""

import os
from dataclasses import replace

from cli import UserError, check_instruction, check_sampling, check_seeds, reported_as

import torch
from PIL import Image
from tqdm import tqdm

from attention import fused
from diffusion import euler_ancestral, seeded_noise
from images import check_size, open_image, resize_and_crop, to_image, to_rgb, to_tensor
from stable_diffusion import LatentDiffusion

LISTS = (list, tuple, range)  # of seeds, instructions or scales for several edits in one batch


def guided_eps(eps_full, eps_image, eps_null, text_guidance, image_guidance):
    """Eq. 3: from the unconditional prediction towards the input image, and from there towards the instruction.

    eps_full = e(z, I, T), eps_image = e(z, I, 0), eps_null = e(z, 0, 0), each [B, C, H, W]; the scales s_T and s_I are
    numbers or tensors [B, 1, 1, 1].
    """
    return eps_null + image_guidance * (eps_image - eps_null) + text_guidance * (eps_full - eps_image)


def drop_conditions(text, image_latent, null_text, u):
    """Sec. 3.2.1: 5 % of the examples lose the text, 5 % the image, 5 % both, so that guidance has what it compares.

    text [B, L, E], image_latent [B, C, H, W], null_text [1, L, E], u [B] uniform in [0, 1), one draw an example.
    Returns (text, image_latent).
    """
    no_text = u < 0.10  # below 0.05 the text alone, from there on both
    no_image = (u >= 0.05) & (u < 0.15)  # from 0.10 on the image alone
    text = torch.where(no_text[:, None, None], null_text, text)
    return text, image_latent * ~no_image[:, None, None, None]


def loss(unet, schedule, latent, image_latent, text, null_text, t, noise, u):
    """Eq. 1, an example at a time: || eps - eps_theta(z_t, t, E(c_I), c_T) ||^2, averaged over the latent's entries.

    latent [B, C, H, W]: the edited image's, a sample, scaled. image_latent [B, C, H, W]: the input image's, the mode,
    unscaled. text [B, L, E], null_text [1, L, E], t [B] whole times, noise like latent, u [B] as in
    `drop_conditions`. Returns [B].
    """
    text, image_latent = drop_conditions(text, image_latent, null_text, u)
    z_t = schedule.add_noise(latent, noise, t)
    eps = unet(torch.cat([z_t, image_latent], dim=1), t, text)
    return (eps - noise).square().mean(dim=(1, 2, 3))


class InstructPix2Pix(LatentDiffusion):
    """A model that edits images by instruction: its UNet takes the noisy latent and the input image's (Sec. 3.2)."""

    inputs = 2
    kind, advice = "editor", "use InstructPix2Pix weights, such as ip2p or mini"

    def denoiser(self, text, image_latent, text_guidance, image_guidance, low_memory=False, attend=fused):
        """The sampler's `denoise(x, sigma)` under both guidances (Eq. 3), its three branches as one batch.

        text [B, L, E], image_latent [B, C, h, w], the scales as in `guided_eps`. low_memory: a row at a time.
        """
        null_text, null_image = self.null_text.expand_as(text), torch.zeros_like(image_latent)
        contexts = torch.cat([text, null_text, null_text])
        images = torch.cat([image_latent, image_latent, null_image])

        def guided(z, t):
            z = torch.cat([z.repeat(3, 1, 1, 1), images], dim=1)  # [3B, 2C, h, w]: (I, T), (I, 0), (0, 0)
            eps_full, eps_image, eps_null = self.predict_eps(z, t, contexts, attend, low_memory).chunk(3)
            return guided_eps(eps_full, eps_image, eps_null, text_guidance, image_guidance)

        return self.schedule.denoiser(guided)

    @torch.no_grad()
    def sample(
        self, text, image_latent, seeds, text_guidance, image_guidance, steps,
        *, sampler=euler_ancestral, low_memory=False, callback=None, attend=fused,
    ):  # fmt: skip
        """Edit B images by B instructions in one batch: `edit` without its files, checks and defaults.

        text [B, L, E] from `encode_text`, image_latent [B, C, h, w] from `encode_image`, seeds: B whole numbers, the
        scales numbers or tensors [B, 1, 1, 1]; the rest as in `edit`. Returns images [B, 3, H, W], about in [-1, 1].
        Raises UserError where the networks give NaN or Inf.
        """
        sigmas = self.schedule.sigmas(steps)
        noise = seeded_noise(image_latent.shape[1:], seeds, self.device)
        denoise = self.denoiser(text, image_latent, text_guidance, image_guidance, low_memory, attend)
        latent = sampler(denoise, next(noise) * sigmas[0].item(), sigmas, noise, callback)
        images = self.decode(latent)
        if not images.isfinite().all():
            hint = "" if self.dtype == torch.float32 else f", or {self.dtype} is too coarse for them: try float32"
            raise UserError(f"the networks gave NaN or Inf: the weights are damaged{hint}")
        return images

    @torch.no_grad()
    def edit(
        self, image, instruction, text_guidance=None, image_guidance=None, steps=None, seed=0, resolution=None,
        *, sampler=euler_ancestral, low_memory=False, progress=False, callback=None, attend=fused,
    ):  # fmt: skip
        """Edit an image (of PIL's, a file's path, or an array [H, W, 3] of bytes) by a written instruction.

        text_guidance (s_T), image_guidance (s_I), steps and resolution (pixels of the longer side, about) default to
        the model's own (`self.sampling`). seed: a whole number. With a list of seeds or of instructions a list of
        images is returned, made in one batch; the scales may then be lists as well. Equal seeds mean equal noise.
        sampler: from diffusion.py. low_memory: slower, a row of the batch at a time. progress: a bar on stderr.
        callback(step, sigma, denoised): once a step; denoised [B, C, h, w] is the current guess of the scaled latent.
        Raises UserError for values out of range or of a wrong type.
        """
        chosen = {"text_guidance": text_guidance, "image_guidance": image_guidance}
        chosen |= {"steps": steps, "resolution": resolution}
        sampling = replace(self.sampling, **{name: value for name, value in chosen.items() if value is not None})
        several = next((value for value in (seed, instruction) if isinstance(value, LISTS)), None)
        each = [seed, instruction, sampling.text_guidance, sampling.image_guidance]
        each = [one_each(value, 1 if several is None else len(several)) for value in each]
        seeds, instructions, text_scales, image_scales = each
        check_seeds(seeds)
        for text in instructions:
            check_instruction(text)
        for scales in zip(text_scales, image_scales, strict=True):
            check_sampling(sampling.steps, *scales, sampling.resolution)
        seeds = [int(number) for number in seeds]  # generators take no number of numpy's
        x = to_tensor(resize_and_crop(as_image(image), sampling.resolution))[None]
        text = self.encode_text(instructions if isinstance(instruction, LISTS) else [instruction])
        text = text.expand(len(seeds), -1, -1)
        image_latent = self.encode_image(x).expand(len(seeds), -1, -1, -1)
        scales = torch.tensor([text_scales, image_scales], dtype=torch.float32, device=self.device)
        scales = scales[:, :, None, None, None]  # [2, B, 1, 1, 1]

        with tqdm(total=sampling.steps, desc="editing", unit="step", disable=not progress, leave=False) as bar:

            def step_done(step, sigma, denoised):
                bar.update()
                if callback:
                    callback(step, sigma, denoised)

            edited = self.sample(
                text, image_latent, seeds, *scales, sampling.steps,
                sampler=sampler, low_memory=low_memory, callback=step_done, attend=attend,
            )  # fmt: skip
        edited = [to_image(x) for x in edited]
        return edited[0] if several is None else edited


def one_each(value, count):
    """A value -> a list of `count` of it; a list of `count` values -> itself. Raises UserError for another length."""
    values = list(value) if isinstance(value, LISTS) else [value] * count
    if len(values) != count or not values:
        lengths = f"one has {len(values)} values, one {count}"
        raise UserError(f"lists of seeds, instructions and guidance scales should be equally long; {lengths}")
    return values


def as_image(image):
    """What `edit` takes -> an RGB image. Raises UserError."""
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    with reported_as("the image should be one of PIL's, a file's path, or an array [H, W, 3] of bytes"):
        image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
    check_size(image)
    return image
