"""The autoencoder against diffusers', and decoding in bands."""

import pytest
import torch
from random_model import randomise
from reference import relative_error, vae_reference

from vae import STABLE_DIFFUSION_VAE, VAE, Gaussian, VAEConfig

SMALL = {
    "one level": VAEConfig(channels=(16,), resblocks=1, groups=4),
    "factor 4": VAEConfig(channels=(16, 32, 48), resblocks=1, groups=8),
    "as the paper, thinner": VAEConfig(channels=(32, 64, 64, 64), groups=32),
    "more latent channels": VAEConfig(channels=(16, 32), resblocks=3, latent_channels=6, groups=4),
}


def agree(vae, theirs, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
    ours, expected = vae.encode(x), theirs.encode(x).latent_dist
    assert relative_error(ours.mode(), expected.mode()) <= 1e-5
    assert relative_error(ours.logvar, expected.logvar) <= 1e-5
    noise = torch.randn(ours.mean.shape, generator=generator)
    assert relative_error(ours.sample(noise), expected.mean + expected.std * noise) <= 1e-5
    z = torch.randn(ours.mean.shape, generator=generator)
    assert relative_error(vae.decode(z), theirs.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_small_networks_agree_with_diffusers(name):
    vae = randomise(VAE(SMALL[name]), seed=1).eval()
    theirs = vae_reference(vae)
    agree(vae, theirs, 32, 32)
    agree(vae, theirs, 24, 40)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
@torch.no_grad()
def test_full_size_agrees_with_diffusers(size):
    vae = randomise(VAE(STABLE_DIFFUSION_VAE), seed=2).eval()
    assert len(vae.state_dict()) == 248
    agree(vae, vae_reference(vae), *size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_on_a_gpu_stays_close(dtype):
    vae = randomise(VAE(SMALL["one level"]), seed=3).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latent = vae.encode(x).mode()
    image = vae.decode(latent)
    vae.to("cuda", dtype)
    assert relative_error(vae.encode(x.to("cuda", dtype)).mode().float().cpu(), latent) < 0.05
    assert relative_error(vae.decode(latent.to("cuda", dtype)).float().cpu(), image) < 0.05


def test_logvar_is_clamped():
    vae = randomise(VAE(SMALL["one level"]), seed=3)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 0, 0])
        logvar = vae.encode(torch.zeros(1, 3, 8, 8)).logvar
    assert logvar[:, 0].unique().tolist() == [20]
    assert logvar[:, 1].unique().tolist() == [-30]


def test_gaussian():
    mean, logvar = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 4.0).log()
    assert torch.equal(Gaussian(mean, logvar).mode(), mean)
    torch.testing.assert_close(Gaussian(mean, logvar).sample(torch.ones_like(mean)), mean + 2)
