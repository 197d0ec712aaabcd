"""A latent diffusion model: UNet, autoencoder, text encoder (Rombach et al. 2022), and text-to-image with them.

    model = StableDiffusion.load("models/mini/sd")
    images = model.sample(["a painting of a large red house on the left by the sea"], seeds=[0])
"""

from functools import cached_property
from itertools import repeat

from cli import UserError

import torch

from attention import fused
from diffusion import SAMPLERS, NoiseSchedule, seeded_noise
from formats import checkpoint

PIXELS_AT_ONCE = 512 * 512  # of images that the decoder makes in one batch


class LatentDiffusion:
    """The parts of a model, and what text-to-image and editing both need of them."""

    inputs = 1  # latents that the UNet takes: the noisy one, and for an editor the input image's
    kind, advice = "sd", "use Stable Diffusion weights, such as sd15 or mini"

    def __init__(self, model):
        """model: a `checkpoint.Model`. Raises UserError if its UNet is made for another use."""
        self.unet, self.vae, self.text_encoder = model.unet, model.vae, model.text_encoder
        self.tokenizer, self.sampling, self.schedule = model.tokenizer, model.sampling, NoiseSchedule()
        channels, latent = model.unet.config.in_channels, model.vae.config.latent_channels
        kinds = {latent: "a text-to-image", 2 * latent: "an InstructPix2Pix", 2 * latent + 1: "an inpainting"}
        if channels != self.inputs * latent:
            found = f"{kinds.get(channels, 'another')} checkpoint: its UNet takes {channels} channels"
            raise UserError(f"{model.source} is {found}, not {self.inputs * latent}; {self.advice}")

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, tokenizer=None, vae=None, lora=None, ema=None):
        """Read the model from a folder, a single file, a hub id or a short name (see `checkpoint.load`)."""
        return cls(checkpoint.load(path, device, dtype, tokenizer, vae, lora, ema, cls.kind))

    @property
    def device(self):
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        """The UNet's number format; samplers always run in float32."""
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def encode_text(self, texts):
        """A list of B texts -> context [B, L, E]."""
        return self.text_encoder(self.tokenizer(texts).to(self.device))

    @cached_property
    def null_text(self):
        """The embedding of "", which stands for no text: [1, L, E]."""
        return self.encode_text([""])

    @torch.no_grad()
    def encode_image(self, x):
        """Images x [B, 3, H, W] in [-1, 1] -> E(c_I) [B, C, h, w], float32: the mode, NOT scaled (Sec. 3.2)."""
        return self.vae.encode(x.to(self.device, self.vae.quant_conv.weight.dtype)).mode().float()

    @torch.no_grad()
    def decode(self, latent):
        """A denoised, scaled latent [B, C, h, w] -> images [B, 3, H, W], about in [-1, 1]."""
        z = (latent / self.vae.config.scaling).to(self.vae.post_quant_conv.weight.dtype)
        rows = max(1, PIXELS_AT_ONCE // (self.vae.config.factor**2 * z.shape[2] * z.shape[3]))
        return torch.cat([self.vae.decode(part) for part in z.split(rows)]).float()

    def solver(self, steps=None, sampler=None, schedule=None):
        """(the sampler function, its noise levels [steps + 1]); the model's own where None.

        sampler: a name of SAMPLERS, or a function like those of diffusion.py.
        """
        own = self.sampling
        sigmas = self.schedule.sigmas(steps or own.steps, schedule or own.schedule)
        return SAMPLERS.get(sampler or own.sampler, sampler), sigmas

    def predict_eps(self, z, t, context, attend=fused, low_memory=False, deep=None, scales=None):
        """The UNet's eps for z [B, ., h, w] at one time t (a float), in float32; low_memory: a row at a time.

        deep: B lists, one for each part that is computed at once; scales [B, 2] (for both see `UNet.forward`).
        """
        times = torch.full((len(z),), t, device=self.device)
        rows = 1 if low_memory else len(z)
        inputs = (x.split(rows) for x in (z.to(self.dtype), times, context))
        scales = repeat(None) if scales is None else scales.split(rows)
        parts = zip(*inputs, deep or repeat(None), scales, strict=False)
        return torch.cat([self.unet(z, t, text, attend, *more) for z, t, text, *more in parts]).float()


class StableDiffusion(LatentDiffusion):
    """Text to image."""

    def denoiser(self, text, guidance, attend=fused, null_text=None):
        """The sampler's `denoise(x, sigma)` under classifier-free guidance (Ho and Salimans 2022, Eq. 6).

        text [B, L, E]; guidance: a number, or a tensor [B, 1, 1, 1]; null_text [B, L, E]: another text than the empty
        one. The UNet sees one batch [null..., text...].
        """
        contexts = torch.cat([self.null_text.expand_as(text) if null_text is None else null_text, text])

        def guided(z, t):
            eps_null, eps_text = self.predict_eps(z.repeat(2, 1, 1, 1), t, contexts, attend).chunk(2)
            return eps_null + guidance * (eps_text - eps_null)

        return self.schedule.denoiser(guided)

    @torch.no_grad()
    def sample(
        self, texts, seeds, steps=None, guidance=None, size=None, sampler=None, schedule=None, attend=fused
    ):
        """A list of B texts and one seed each -> images [B, 3, size, size], about in [-1, 1], in one batch.

        guidance and size (pixels, a multiple of the VAE's factor) default to the model's own; the rest as in `solver`.
        """
        sampler, sigmas = self.solver(steps, sampler, schedule)
        side = (size or self.sampling.resolution) // self.vae.config.factor
        noise = seeded_noise((self.vae.config.latent_channels, side, side), seeds, self.device)
        scale = self.sampling.text_guidance if guidance is None else guidance
        denoise = self.denoiser(self.encode_text(texts), scale, attend)
        return self.decode(sampler(denoise, next(noise) * sigmas[0].item(), sigmas, noise))
