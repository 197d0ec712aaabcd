"""InstructPix2Pix: conditioning, two-fold guidance, the training loss, and the edit itself (Sec. 3.2).

    model = InstructPix2Pix.load("timbrooks/instruct-pix2pix")
    edited = model.edit(Image.open("x.png"), "make it night", seed=0)
"""

from dataclasses import replace
from functools import cached_property

import torch
from tqdm import tqdm

from attention import fused
from cli import UserError, check_instruction, check_sampling, check_seeds
from diffusion import NoiseSchedule, euler_ancestral, seeded_noise
from formats import checkpoint
from gpu.compiled import compile_networks, compiled
from images import check_size, fit, to_image, to_rgb, to_tensor


def guided_eps(eps_full, eps_image, eps_null, text_guidance, image_guidance):
    """Eq. 3: walk from the unconditional guess towards the input picture, and from there towards the instruction.

    eps_full = e(z, I, T), eps_image = e(z, I, 0), eps_null = e(z, 0, 0), each [B, C, H, W]; the scales s_T and s_I are
    numbers or tensors [B, 1, 1, 1].
    """
    return eps_null + image_guidance * (eps_image - eps_null) + text_guidance * (eps_full - eps_image)


def drop_conditions(text, image_latent, null_text, u):
    """Sec. 3.2.1: 5 % of the examples lose the text, 5 % the picture, 5 % both, so that guidance has what it compares.

    text [B, L, E], image_latent [B, C, H, W], null_text [1, L, E], u [B] uniform in [0, 1), one draw an example.
    Returns (text, image_latent).
    """
    no_text = u < 0.10  # below 0.05 the text alone, from there on both
    no_image = (u >= 0.05) & (u < 0.15)  # from 0.10 on the picture alone
    text = torch.where(no_text[:, None, None], null_text, text)
    return text, image_latent * ~no_image[:, None, None, None]


def loss(unet, schedule, latent, image_latent, text, null_text, t, noise, u):
    """Eq. 1, an example at a time: || eps - eps_theta(z_t, t, E(c_I), c_T) ||^2, averaged over the latent's entries.

    latent [B, C, H, W]: the edited picture's, a sample, scaled. image_latent [B, C, H, W]: the input picture's, the
    mode, unscaled. text [B, L, E], null_text [1, L, E], t [B] whole times, noise like latent, u [B] as in
    `drop_conditions`. Returns [B].
    """
    text, image_latent = drop_conditions(text, image_latent, null_text, u)
    z_t = schedule.add_noise(latent, noise, t)
    eps = unet(torch.cat([z_t, image_latent], dim=1), t, text)
    return (eps - noise).square().mean(dim=(1, 2, 3))


class InstructPix2Pix:
    """A model that edits pictures by instruction."""

    def __init__(self, model):
        """model: a `checkpoint.Model` with an 8-channel UNet. Raises UserError for any other."""
        self.unet, self.vae, self.text_encoder = model.unet, model.vae, model.text_encoder
        self.tokenizer, self.sampling = model.tokenizer, model.sampling
        self.schedule, self.guided_eps = NoiseSchedule(), guided_eps
        channels, needed = model.unet.config.in_channels, 2 * model.vae.config.latent_channels
        if channels != needed:
            others = {needed // 2: "a text-to-image Stable Diffusion", needed + 1: "a Stable Diffusion inpainting"}
            raise UserError(
                f"{model.source} is {others.get(channels, 'another')} checkpoint (its UNet takes {channels} channels, "
                f"not {needed}). Use InstructPix2Pix weights, such as {checkpoint.PUBLIC}"
            )

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, tokenizer=None, vae=None):
        """Read the model from a folder, a single file or a hub id (see `checkpoint.load`). Raises UserError."""
        return cls(checkpoint.load(path, device, dtype, tokenizer, vae))

    @property
    def device(self):
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        """The networks' number format; the sampler itself always runs in float32."""
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def encode_text(self, texts):
        """A list of B texts -> context [B, L, E]."""
        return self.text_encoder(self.tokenizer(texts).to(self.device))

    @cached_property
    def null_text(self):
        """The embedding of "", which stands for no instruction: [1, L, E]."""
        return self.encode_text([""])

    @torch.no_grad()
    def encode_image(self, x):
        """Pictures x [B, 3, H, W] in [-1, 1] -> E(c_I) [B, C, h, w], float32: the mode, NOT scaled (Sec. 3.2)."""
        return self.vae.encode(x.to(self.device, self.dtype)).mode().float()

    @torch.no_grad()
    def decode(self, latent, low_memory=False):
        """A denoised latent [B, C, h, w], as the sampler leaves it -> pictures [B, 3, H, W], about in [-1, 1]."""
        z = (latent / self.vae.config.scaling).to(self.dtype)
        # cloned, since CUDA graphs write their next output to the same place
        return torch.cat([self.vae.decode(one[None], low_memory).clone() for one in z]).float()

    def compile(self, **settings):
        """Compile what an edit calls at every step, and the decoder; settings: of torch.compile.

        Meant for a GPU; on a CPU it does not pay (bench/ladder-cpu.md). The first edit of a size takes minutes
        longer. The same pictures come out, but for rounding. mode="reduce-overhead" replays each step as a CUDA graph,
        for networks so small that the GPU waits for Python. torch must be able to trace an `attend` of one's own: it
        may not print, for one.
        """
        compile_networks(self.unet, self.vae, **settings)
        self.guided_eps = compiled(guided_eps, fullgraph=True, **settings)

    def denoiser(self, text, image_latent, sigmas, text_guidance, image_guidance, low_memory=False, attend=fused):
        """Make the sampler's `denoise(x, sigma)` from the UNet under both guidances.

        text [B, L, E], image_latent [B, C, h, w], sigmas: the sampler's, the scales as in `guided_eps`. The three
        branches of Eq. 3 run as one batch, or with low_memory one after another.
        """
        null_text = self.null_text.expand_as(text)
        branches = [  # in the order of the released code
            (image_latent, text),
            (image_latent, null_text),
            (torch.zeros_like(image_latent), null_text),
        ]
        if not low_memory:
            branches = [tuple(torch.cat(parts) for parts in zip(*branches, strict=True))]
        # once, not at every step
        branches = [(image, self.unet.read(context)) for image, context in branches]
        embed = self.unet.time_embedder(self.schedule.t(sigmas[:-1]).tolist())

        # as tensors, compiled code takes all of them alike
        scales = [torch.as_tensor(scale, device=self.device) for scale in (text_guidance, image_guidance)]

        def predict_eps(z, t):
            guesses = []
            for image, read in branches:
                copies = len(image) // len(z)
                inputs = torch.cat([z.repeat(copies, 1, 1, 1), image], dim=1).to(self.dtype)
                times = [added.expand(len(inputs), -1) for added in embed(t)]
                guesses.append(self.unet.predict(inputs, times, read, attend).float().clone())
            return self.guided_eps(*torch.cat(guesses).chunk(3), *scales)

        return self.schedule.denoiser(predict_eps)

    @torch.no_grad()
    def sample(
        self,
        text,
        image_latent,
        seeds,
        text_guidance,
        image_guidance,
        steps,
        *,
        sampler=euler_ancestral,
        low_memory=False,
        callback=None,
        attend=fused,
    ):
        """Edit B pictures by B instructions in one batch: `edit` without its files, checks and defaults.

        text [B, L, E] from `encode_text`, image_latent [B, C, h, w] from `encode_image`, seeds: B whole numbers, the
        scales numbers or tensors [B, 1, 1, 1]; the rest as in `edit`. Returns pictures [B, 3, H, W], about in [-1, 1].
        Raises UserError where the networks give values that are not numbers.
        """
        sigmas = self.schedule.sigmas(steps)
        noise = seeded_noise(image_latent.shape[1:], seeds, self.device)
        denoise = self.denoiser(text, image_latent, sigmas, text_guidance, image_guidance, low_memory, attend)
        latent = sampler(denoise, next(noise) * sigmas[0].item(), sigmas, noise, callback)
        pictures = self.decode(latent, low_memory)
        if not pictures.isfinite().all():
            hint = "" if self.dtype == torch.float32 else f", or {self.dtype} is too coarse for them: try float32"
            raise UserError(f"the networks gave values that are not numbers: the weights are damaged{hint}")
        return pictures

    @torch.no_grad()
    def edit(
        self,
        image,
        instruction,
        text_guidance=None,
        image_guidance=None,
        steps=None,
        seed=0,
        resolution=None,
        *,
        sampler=euler_ancestral,
        low_memory=False,
        progress=False,
        callback=None,
        attend=fused,
    ):
        """Edit a PIL image by a written instruction.

        text_guidance (s_T), image_guidance (s_I), steps and resolution (pixels of the longer side, about) default to
        the model's own (`self.sampling`). seed: a whole number, and one image is returned; or a list of them, and a
        list of images is returned, made in one batch; the scales may then be lists as well. Equal seeds mean equal
        noise. sampler: from diffusion.py. low_memory: slower, in less memory. progress: a bar on stderr.
        callback(step, sigma, denoised): once a step; denoised [B, C, h, w] is the current guess of the scaled latent.
        Raises UserError for values out of range.
        """
        chosen = {
            "steps": steps,
            "text_guidance": text_guidance,
            "image_guidance": image_guidance,
            "resolution": resolution,
        }
        sampling = replace(self.sampling, **{key: value for key, value in chosen.items() if value is not None})
        seeds = list(seed) if isinstance(seed, (list, tuple, range)) else [seed]
        text_scales = one_each(sampling.text_guidance, len(seeds))
        image_scales = one_each(sampling.image_guidance, len(seeds))
        check_instruction(instruction)
        check_seeds(seeds)
        for scales in zip(text_scales, image_scales, strict=True):
            check_sampling(sampling.steps, *scales, sampling.resolution)
        check_size(image)

        x = to_tensor(fit(to_rgb(image), sampling.resolution))[None]
        text = self.encode_text([instruction]).expand(len(seeds), -1, -1)
        image_latent = self.encode_image(x).expand(len(seeds), -1, -1, -1)
        scales = torch.tensor([text_scales, image_scales], dtype=torch.float32, device=self.device)

        with tqdm(total=sampling.steps, desc="editing", unit="step", disable=not progress, leave=False) as bar:

            def step_done(step, sigma, denoised):
                bar.update()
                if callback:
                    callback(step, sigma, denoised)

            pictures = self.sample(
                text,
                image_latent,
                seeds,
                *scales[:, :, None, None, None],  # [2, B, 1, 1, 1]
                sampling.steps,
                sampler=sampler,
                low_memory=low_memory,
                callback=step_done,
                attend=attend,
            )
        pictures = [to_image(picture) for picture in pictures]
        return pictures if isinstance(seed, (list, tuple, range)) else pictures[0]


def one_each(value, count):
    """A number -> a list of `count` of it; a list of `count` numbers -> itself. Raises UserError for another length."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise UserError(f"{len(values)} guidance scales were given for {count} seeds")
    return values
