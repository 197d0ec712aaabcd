"""SDEdit with a caption (Meng et al. 2022; Stable Diffusion's image-to-image): add noise to an image and denoise it.

The caption describes the RESULT. The strength in [0, 1] is the fraction of the sampling steps that are made: 0 is the
autoencoder's round trip, 1 is text-to-image. The paper uses strengths from 0.3 to 0.9 (Sec. 4).
"""

import torch

from diffusion import seeded_noise
from images import resize_and_crop, to_image
from ip2p import as_image, one_size


def encode(sd, images):
    """PIL images of one shape -> their scaled latents [B, C, h, w], by the mode; resized as in ip2p.py."""
    resized = [resize_and_crop(as_image(image), sd.sampling.resolution) for image in images]
    return sd.encode_image(one_size(resized)) * sd.vae.config.scaling


@torch.no_grad()
def sdedit(sd, images, captions, strength, *, steps=None, guidance=None, seeds, sampler=None, schedule=None):
    """Edit B images as one batch; B captions and seeds. Returns B PIL images.

    sd: a `StableDiffusion`. guidance, steps, sampler and schedule default to the model's own. An image is encoded by
    its mode, not by a sample. Strength 1 starts from noise alone, as text-to-image does.
    """
    sampler, sigmas = sd.solver(steps, sampler, schedule)
    made = int(strength * (len(sigmas) - 1))
    sigmas = sigmas[len(sigmas) - 1 - made :]
    latent = encode(sd, images) * (strength < 1)
    noise = seeded_noise(latent.shape[1:], seeds, sd.device)
    scale = sd.sampling.text_guidance if guidance is None else guidance
    x = latent + sigmas[0].item() * next(noise)
    x = sampler(sd.denoiser(sd.encode_text(captions), scale), x, sigmas, noise)
    return [to_image(image) for image in sd.decode(x)]
