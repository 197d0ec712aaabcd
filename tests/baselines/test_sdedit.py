"""SDEdit: the ends of its strength, and the same images as diffusers' image-to-image pipeline."""

import sys
from itertools import chain

import diffusers
import numpy as np
import pytest
from conftest import colourful
from random_model import random_model
from reference import equal_schedule

from baselines.sdedit import encode, sdedit
from diffusion import seeded_noise
from formats.checkpoint import load, save_folder
from images import to_image
from stable_diffusion import StableDiffusion

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["a red house by the sea", "a blue tree at night"]
IMAGES = [colourful(128, 64, seed) for seed in (0, 1)]


def difference(one, other):
    return np.abs(np.asarray(one).astype(int) - np.asarray(other)).max()


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(random_model(seed=4, in_channels=4))


def test_the_ends_of_the_strength(model):
    """0: the autoencoder's round trip; 1: text-to-image with equal noise."""
    for image, edited in zip(IMAGES, sdedit(model, IMAGES, CAPTIONS, 0, seeds=[3, 5]), strict=True):
        assert difference(edited, to_image(model.decode(encode(model, [image]))[0])) <= 1
    square = [colourful(128, 128)]
    made = to_image(model.sample(CAPTIONS[:1], [3], steps=4)[0])
    assert difference(sdedit(model, square, CAPTIONS[:1], 1, steps=4, seeds=[3])[0], made) == 0
    assert difference(sdedit(model, square, CAPTIONS[:1], 0.75, steps=4, seeds=[3])[0], made) > 20


def test_images_equal_those_of_diffusers(tmp_path, monkeypatch):
    """Its own pipeline, opened from our folder, at equal noise levels and noise; its encoder's samples are the mode."""
    model = random_model(seed=4, in_channels=4)
    model.vae.quant_conv.bias.data[4:] = -60  # the logarithm of the variance
    save_folder(model, tmp_path / "sd")
    model = StableDiffusion(load(tmp_path / "sd"))
    pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "sd")
    sigmas = model.schedule.sigmas(8)
    equal_schedule(pipeline, sigmas, model.schedule.t(sigmas[:-1]))
    for strength in (0.3, 0.7):
        noise = seeded_noise((4, 16, 32), [3, 5])
        draws = chain([next(noise)], noise)
        for module in (type(pipeline).__module__, type(pipeline.scheduler).__module__):
            monkeypatch.setattr(sys.modules[module], "randn_tensor", lambda *_, draws=draws, **__: next(draws))
        how = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "np"}
        theirs = pipeline(CAPTIONS, IMAGES, strength, **how).images
        ours = sdedit(model, IMAGES, CAPTIONS, strength, steps=8, guidance=3.0, seeds=[3, 5])
        for one, other in zip(ours, theirs, strict=True):
            assert np.asarray(one).std() > 20
            assert difference(one, (255 * other).astype(np.uint8)) <= 1
