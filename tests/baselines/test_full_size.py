"""Every baseline once on networks of full size with random weights: shapes fit, and what a step takes is printed."""

import resource
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import colourful
from random_model import randomise, small_tokenizer

from baselines.real_p2p import Inversion, ddim_invert, edit_inverted, null_text
from baselines.sdedit import sdedit
from baselines.text2live import text2live
from clip_image import CLIP, CLIPImageConfig
from clip_text import CLIP_L_TEXT, CLIPText
from diffusion import Sampling
from formats.checkpoint import Model
from stable_diffusion import StableDiffusion
from unet import STABLE_DIFFUSION, UNet
from vae import STABLE_DIFFUSION_VAE, VAE

pytestmark = pytest.mark.slow

SIDE, STEPS = 128, 2
BEFORE, AFTER = "a photo of a house", "a photo of a house at night"


@pytest.fixture
def measured(capsys):
    """Call a function and print the time a step and the most memory that the process has had."""

    def call(name, function, *arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        seconds = (time.perf_counter() - start) / STEPS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        with capsys.disabled():
            print(f"{name} at {SIDE}x{SIDE}: {seconds:.1f} s a step, {peak:.1f} GB so far")
        return result

    return call


def filled(network, seed):
    return randomise(network.to_empty(device="cpu"), seed).eval().requires_grad_(False)


def test_with_stable_diffusion(measured):
    with torch.device("meta"):
        networks = UNet(STABLE_DIFFUSION), VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT)
    networks = [filled(network, seed) for seed, network in enumerate(networks)]
    sd = StableDiffusion(Model(*networks, small_tokenizer(77), Sampling(STEPS, resolution=SIDE)))
    image = colourful(SIDE, SIDE)
    (edited,) = measured("SDEdit", sdedit, sd, [image], [AFTER], 1, seeds=[0])
    trajectory = measured("DDIM inversion", ddim_invert, sd, [image], [BEFORE], STEPS)
    nulls = measured("null-text optimisation", null_text, sd, trajectory, [BEFORE], 7.5, inner_steps=1)
    pair = measured("the edit", edit_inverted, sd, Inversion(trajectory, nulls), [BEFORE], [AFTER], 0.5, 7.5)
    for one in (edited, *pair[0], *pair[1]):
        assert one.size == (SIDE, SIDE)
        assert np.asarray(one).std() > 5


def test_with_clip(measured):
    tokenizer = small_tokenizer(77)
    text = replace(CLIP_L_TEXT, width=512, heads=8, projection=512, end_token=tokenizer.end)
    image = CLIPImageConfig(patch=32, width=768, layers=12, heads=12, projection=512)  # ViT-B/32
    clip = randomise(CLIP(text, image), seed=0).eval().requires_grad_(False), tokenizer
    edited, _, opacity = measured("Text2Live", text2live, clip, colourful(SIDE, SIDE), BEFORE, AFTER, steps=STEPS)
    assert edited.size == opacity.size == (SIDE, SIDE)
    assert np.asarray(edited).std() > 5
