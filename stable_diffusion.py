"""Text to image by a latent diffusion model: what Stable Diffusion does, and what data generation builds on.

    model = StableDiffusion(checkpoint.load("models/mini/sd"))
    pictures = model.sample(["a painting of a large red house on the left by the sea"], seeds=[0])
"""

from functools import cached_property

import torch

from attention import fused
from cli import UserError
from diffusion import NoiseSchedule, euler_ancestral, seeded_noise
from gpu.compiled import compile_networks


class StableDiffusion:
    """A text-to-image model and its sampler."""

    def __init__(self, model):
        """model: a `checkpoint.Model` whose UNet takes the latent alone. Raises UserError for any other."""
        self.unet, self.vae, self.text_encoder = model.unet, model.vae, model.text_encoder
        self.tokenizer, self.sampling = model.tokenizer, model.sampling
        self.schedule = NoiseSchedule()
        channels, needed = model.unet.config.in_channels, model.vae.config.latent_channels
        if channels != needed:
            raise UserError(
                f"{model.source} is no text-to-image model (its UNet takes {channels} channels, not {needed}); "
                "use Stable Diffusion weights, such as models/mini/sd"
            )

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
        """The embedding of "": [1, L, E]."""
        return self.encode_text([""])

    @torch.no_grad()
    def decode(self, latent):
        """A denoised latent [B, C, h, w] -> pictures [B, 3, H, W], about in [-1, 1]."""
        z = latent / self.vae.config.scaling
        return self.vae.decode(z.to(self.vae.post_quant_conv.weight.dtype)).float()

    def compile(self, **settings):
        """Compile what sampling calls at every step, and the decoder, as `InstructPix2Pix.compile` does."""
        compile_networks(self.unet, self.vae, **settings)

    def denoiser(self, text, sigmas, guidance, attend=fused):
        """The sampler's `denoise(x, sigma)` under classifier-free guidance (Ho and Salimans 2022, Eq. 6).

        text [B, L, E]; sigmas: the sampler's; guidance: a number, or a tensor [B, 1, 1, 1]. The UNet sees one batch
        [null..., text...].
        """
        # once, not at every step
        read = self.unet.read(torch.cat([self.null_text.expand_as(text), text]))
        embed = self.unet.time_embedder(self.schedule.t(sigmas[:-1]).tolist())

        def predict_eps(z, t):
            inputs = z.repeat(2, 1, 1, 1).to(self.dtype)
            times = [added.expand(len(inputs), -1) for added in embed(t)]
            eps_null, eps_text = self.unet.predict(inputs, times, read, attend).float().chunk(2)
            return eps_null + guidance * (eps_text - eps_null)

        return self.schedule.denoiser(predict_eps)

    @torch.no_grad()
    def sample(self, texts, seeds, steps=None, guidance=None, size=None, sampler=euler_ancestral, attend=fused):
        """A list of B texts and one seed each -> pictures [B, 3, size, size], about in [-1, 1], made in one batch.

        steps, guidance and size (pixels, a multiple of the VAE's factor) default to the model's own.
        """
        side = (size or self.sampling.resolution) // self.vae.config.factor
        sigmas = self.schedule.sigmas(steps or self.sampling.steps)
        noise = seeded_noise((self.vae.config.latent_channels, side, side), seeds, self.device)
        scale = self.sampling.text_guidance if guidance is None else guidance
        denoise = self.denoiser(self.encode_text(texts), sigmas, scale, attend)
        return self.decode(sampler(denoise, next(noise) * sigmas[0].item(), sigmas, noise))
