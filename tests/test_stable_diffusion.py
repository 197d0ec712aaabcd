"""Text to image: guidance, batches, and the same images as diffusers' pipeline."""

from cli import UserError

import diffusers
import numpy as np
import pytest
import torch
from random_model import random_model
from reference import equal_schedule, relative_error

import attention
from diffusion import NoiseSchedule, euler, seeded_noise
from formats.checkpoint import load, save_folder
from stable_diffusion import StableDiffusion

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "a painting of a large red house by the sea, at night"
OTHER = "a sketch of nothing"


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(random_model(seed=1, in_channels=4))


@pytest.fixture
def noisy():
    """(x [2, 4, 16, 16], its noise level)."""
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3, 3.0


@pytest.mark.parametrize(("guidance", "text"), [(1, TEXT), (0, "")], ids=["text", "no text"])
@torch.no_grad()
def test_the_ends_of_guidance(model, noisy, guidance, text):
    """Scale 1 is the prediction with the text alone, scale 0 the one without."""
    guess = model.denoiser(model.encode_text([TEXT, TEXT]), guidance)(*noisy)
    context = model.encode_text([text, text])
    plain = NoiseSchedule().denoiser(lambda z, t: model.unet(z, torch.tensor([t, t]), context))(*noisy)
    assert relative_error(guess, plain) <= 1e-5
    other = model.denoiser(model.encode_text([TEXT, TEXT]), 0.5)(*noisy)
    assert relative_error(other, plain) > 1e-2


def test_a_sample_equals_that_of_diffusers(tmp_path):
    """Its own pipeline, opened from our folder, at equal noise levels and noise."""
    save_folder(random_model(seed=2, in_channels=4), tmp_path / "sd")
    model = StableDiffusion(load(tmp_path / "sd"))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    sigmas = model.schedule.sigmas(6)
    equal_schedule(pipeline, sigmas, model.schedule.t(sigmas[:-1]))
    for text, seed, guidance in ((TEXT, 0, 4.0), (OTHER, 7, 1.5)):
        theirs = pipeline(
            text,
            height=64,
            width=64,
            num_inference_steps=6,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        ours = model.sample([text], [seed], steps=6, guidance=guidance, size=64)[0]
        ours = ((ours + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
        assert ours.std() > 0.1
        assert np.abs(ours - theirs).max() < 1 / 255


@torch.no_grad()
def test_defaults_size_sampler_and_attention_may_change(model):
    usual = model.sample([TEXT], [5])
    assert torch.equal(model.sample([TEXT], [5], steps=10, guidance=4.0, size=128), usual)
    assert model.sample([TEXT], [5], steps=1, size=64).shape == (1, 3, 64, 64)

    noise = next(seeded_noise((4, 32, 32), [5]))
    sigmas = model.schedule.sigmas(3)
    latent = euler(model.denoiser(model.encode_text([TEXT]), 4.0), noise * sigmas[0].item(), sigmas)
    expected = model.vae.decode(latent / model.vae.config.scaling)
    assert relative_error(model.sample([TEXT], [5], steps=3, sampler=euler), expected) <= 1e-5

    layers = []

    def attend(q, k, v, layer):
        layers.append(layer)
        return attention.reference(q, k, v, layer)

    watched = model.sample([TEXT], [5], attend=attend)
    assert (watched - usual).abs().max() < 1e-2
    assert {layer.cross for layer in layers} == {True, False}


def test_an_editor_is_refused(tmp_path):
    save_folder(random_model(), tmp_path / "editor")
    with pytest.raises(UserError, match="editor is an InstructPix2Pix checkpoint: its UNet takes 8 channels, not 4"):
        StableDiffusion(load(tmp_path / "editor"))
    with pytest.raises(UserError, match="this model is an inpainting checkpoint"):
        StableDiffusion(random_model(in_channels=9))
