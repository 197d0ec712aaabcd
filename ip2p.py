"""InstructPix2Pix: conditioning, two-fold guidance, the training loss, and the edit itself (Sec. 3.2).

    model = InstructPix2Pix.load("timbrooks/instruct-pix2pix")
    edited = model.edit(Image.open("x.png"), "make it night", seed=0)
"""

import os
from dataclasses import replace
from functools import partial

from cli import UserError, check_instruction, check_sampling, check_seeds, reported_as

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from attention import fused
from diffusion import seeded_noise
from images import check_size, fit_mask, open_image, put_back, resize_and_crop, to_image, to_rgb, to_tensor
from stable_diffusion import LatentDiffusion


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

    def denoiser(
        self, text, image_latent, text_guidance, image_guidance,
        *, null_text=None, low_memory=False, attend=fused, savings=None, trace=None,
    ):  # fmt: skip
        """The sampler's `denoise(x, sigma)` under both guidances (Eq. 3), its three branches as one batch.

        text [B, L, E], image_latent [B, C, h, w], the scales as in `guided_eps`; null_text [1, L, E]: another text
        than the empty one. low_memory: a row at a time. savings: what to leave out, a `Savings` (gpu/savings.py).
        trace(z, eps_full, eps_image, eps_null, eps): called at each evaluation with what Eq. 3 takes and gives,
        each [B, C, h, w].
        """
        null_text = (self.null_text if null_text is None else null_text).expand_as(text)
        contexts = torch.cat([text, null_text, null_text])
        images = torch.cat([image_latent, image_latent, torch.zeros_like(image_latent)])
        predict = partial(self.predict_eps, attend=attend, low_memory=low_memory)
        scales = self.scales_input(text_guidance, image_guidance, len(text))
        if savings and scales is not None:
            raise UserError("a distilled editor has one branch, of which nothing can be left out")
        if trace and scales is not None:
            raise UserError("a distilled editor has one branch, which Eq. 3 cannot explain")
        if savings:
            predict = savings.applied_to(predict, self.schedule)

        def distilled(z, t):
            return predict(torch.cat([z, image_latent], dim=1), t, text, scales=scales)

        def guided(z, t):
            inputs = torch.cat([z.repeat(3, 1, 1, 1), images], dim=1)  # [3B, 2C, h, w]: (I, T), (I, 0), (0, 0)
            eps_full, eps_image, eps_null = predict(inputs, t, contexts).chunk(3)
            eps = guided_eps(eps_full, eps_image, eps_null, text_guidance, image_guidance)
            if trace:
                trace(z, eps_full, eps_image, eps_null, eps)
            return eps

        return self.schedule.denoiser(guided if scales is None else distilled)

    def scales_input(self, text_guidance, image_guidance, count):
        """What a distilled UNet takes in place of two branches, [count, 2], from scales as in `denoiser`; else None."""
        if not self.unet.config.scales_width:
            return None
        scales = [torch.as_tensor(scale, dtype=torch.float32) for scale in (text_guidance, image_guidance)]
        return torch.stack([scale.flatten().expand(count) for scale in scales], dim=1).to(self.device)

    @torch.no_grad()
    def sample(
        self, text, image_latent, seeds, text_guidance, image_guidance, steps,
        *, mask=None, sampler=None, schedule=None, callback=None, **options,
    ):  # fmt: skip
        """Edit B images by B instructions in one batch: `edit` without its files, checks and defaults.

        text [B, L, E] from `encode_text`, image_latent [B, C, h, w] from `encode_image`, seeds: B whole numbers, the
        scales numbers or tensors [B, 1, 1, 1], mask as in `keep_outside`, steps, sampler and schedule as in `solver`,
        callback as in `edit`, options as in `denoiser`. Returns images [B, 3, H, W], about in [-1, 1]. Raises
        UserError where the networks give NaN or Inf.
        """
        sampler, sigmas = self.solver(steps, sampler, schedule)
        noise = seeded_noise(image_latent.shape[1:], seeds, self.device)
        denoise = self.denoiser(text, image_latent, text_guidance, image_guidance, **options)
        if mask is not None:
            denoise = keep_outside(denoise, image_latent * self.vae.config.scaling, mask)
        latent = sampler(denoise, next(noise) * sigmas[0].item(), sigmas, noise, callback)
        images = self.decode(latent)
        if not images.isfinite().all():
            hint = "" if self.dtype == torch.float32 else f", or {self.dtype} is too coarse for them: try float32"
            raise UserError(f"the networks gave NaN or Inf: the weights are damaged{hint}")
        return images

    @torch.no_grad()
    def edit(
        self, image, instruction, text_guidance=None, image_guidance=None, steps=None, seed=0, resolution=None,
        *, mask=None, negative="", sampler=None, schedule=None, progress=False, callback=None, **options,
    ):  # fmt: skip
        """Edit an image (of PIL's, a file's path, or an array [H, W, 3] of bytes) by a written instruction.

        image, instruction, seed, text_guidance (s_T) and image_guidance (s_I) may be lists of equal length: a list of
        images is returned, made in one batch, for which the images should be edited at one size. The scales, steps,
        resolution (pixels of the longer side, about), sampler (a name of diffusion.SAMPLERS) and schedule ("authors"
        or "karras") default to the model's own (`self.sampling`). Equal seeds mean equal noise. mask: an image of the
        same size, or a list: white may change, black stays. negative: a text that guidance leads away from, in place
        of the empty one. progress: a bar on stderr. callback(step, sigma, denoised): once a step; denoised
        [B, C, h, w] is the current guess of the scaled latent. options: those of `denoiser`. Raises UserError for
        values out of range.
        """
        chosen = {"text_guidance": text_guidance, "image_guidance": image_guidance}
        chosen |= {"steps": steps, "resolution": resolution, "sampler": sampler, "schedule": schedule}
        sampling = replace(self.sampling, **{name: value for name, value in chosen.items() if value is not None})
        each = image, instruction, seed, sampling.text_guidance, sampling.image_guidance
        count = max((len(value) for value in each if isinstance(value, LISTS)), default=1)
        images, instructions, seeds, *scales = (one_each(value, count) for value in each)
        images = [as_image(one) for one in images]
        for text in instructions:
            check_instruction(text)
        if negative and self.unet.config.scales_width:
            raise UserError("a distilled editor has one branch, and none for a negative text")
        check_seeds(seeds)
        seeds = [int(number) for number in seeds]  # generators take no number of numpy's
        for pair in zip(*scales, strict=True):
            check_sampling(sampling.steps, *pair, sampling.resolution, sampling.sampler, sampling.schedule)
        if mask is not None:
            masks = [fit_mask(*pair, sampling.resolution) for pair in zip(one_each(mask, count), images, strict=True)]
            options["mask"] = torch.cat([latent_mask(one, self.vae.config.factor) for one in masks]).to(self.device)
        before = [resize_and_crop(one, sampling.resolution) for one in images]
        image_latent = self.encode_image(one_size(before if isinstance(image, LISTS) else before[:1]))
        image_latent = image_latent.expand(count, -1, -1, -1)
        text, options["null_text"] = self.encode_text(instructions), self.encode_text([negative])
        scales = torch.tensor(scales, dtype=torch.float32, device=self.device)[:, :, None, None, None]
        with tqdm(total=sampling.steps, desc="editing", unit="step", disable=not progress, leave=False) as bar:

            def step_done(step, sigma, denoised):
                bar.update()
                if callback:
                    callback(step, sigma, denoised)

            options |= {"sampler": sampling.sampler, "schedule": sampling.schedule}
            edited = self.sample(text, image_latent, seeds, *scales, sampling.steps, callback=step_done, **options)
        edited = [to_image(x) for x in edited]
        if mask is not None:
            edited = [Image.composite(*each) for each in zip(edited, before, masks, strict=True)]
        return edited if any(isinstance(value, LISTS) for value in each) else edited[0]

    @torch.no_grad()
    def region(self, image, words):
        """Where "the hat" or other words are in a PIL image: a mask for `edit`, white there, with soft edges.

        Where the predictions with and without the instruction to remove it differ (Couairon et al. 2023, DiffEdit).
        """
        small = resize_and_crop(as_image(image), self.sampling.resolution)
        image_latent = self.encode_image(to_tensor(small)[None])
        z, noise = image_latent * self.vae.config.scaling, next(seeded_noise(image_latent.shape[1:], [0], self.device))
        text, total = self.encode_text([f"remove {words}", ""]), 0
        for t in REGION_TIMES:
            z_t = self.schedule.add_noise(z, noise, torch.tensor([t], device=self.device))
            inputs = torch.cat([z_t, image_latent], dim=1).expand(2, -1, -1, -1)
            eps_full, eps_image = self.predict_eps(inputs, t, text, scales=self.scales_input(1, 1, 2)).chunk(2)
            change = (eps_full - eps_image).abs().mean(1, keepdim=True)
            total = total + change / change.mean()
        low, high = total.aminmax()
        mask = ((total - low) / (high - low) - 0.2) / 0.2  # black below 0.2 of the range, white from 0.4 on
        mask = F.max_pool2d(mask.clamp(0, 1), 3, 1, 1)  # a little larger, without holes
        mask = F.interpolate(mask, (small.height, small.width), mode="bilinear")[0].expand(3, -1, -1)
        return put_back(to_image(2 * mask - 1).convert("L"), Image.new("L", image.size))


REGION_TIMES = 300, 500, 700, 850  # of so much noise that details are hidden and things are not
LISTS = list, tuple, range  # what `edit` takes as one value for each edit


def one_each(value, count):
    """A value -> a list of `count` of it; a list of `count` values -> itself. Raises UserError for another length."""
    values = list(value) if isinstance(value, LISTS) else [value] * count
    if len(values) != count or not values:
        wanted = "lists of images, instructions, seeds and guidance scales should be equally long, and not empty"
        raise UserError(f"{wanted}: one has {len(values)}, another {count}")
    return values


def as_image(image):
    """What `edit` takes -> an RGB image. Raises UserError."""
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    with reported_as("the image should be one of PIL's, a file's path, or an array [H, W, 3] of bytes"):
        image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
    check_size(image)
    return image


def one_size(images):
    """A list of B images of one size -> tensor [B, 3, H, W]. Raises UserError for other sizes."""
    if len({image.size for image in images}) > 1:
        raise UserError("the images of one batch should be edited at one size")
    return torch.stack([to_tensor(image) for image in images])


def keep_outside(denoise, latent, mask):
    """`denoise` for which only `mask` may change: elsewhere its guess is the input (as in Avrahami et al. 2023).

    latent [B, C, h, w]: the input image's, scaled; mask [B, 1, h, w] in [0, 1]. At the last step, with sigma 0,
    the guess is the result; so it is the input outside the mask.
    """
    return lambda x, sigma: latent + mask * (denoise(x, sigma) - latent)


def latent_mask(mask, factor):
    """An "L" image -> [1, 1, h, w] in [0, 1]: a latent may change as much as any of its pixels."""
    pixels = torch.from_numpy(np.array(mask)).float()[None, None] / 255
    return F.max_pool2d(pixels, factor)
