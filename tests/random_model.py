"""Small models with RANDOM weights, none of them zero or trivial, to test and to measure with."""

import torch
from tokenizers.pre_tokenizers import ByteLevel

from clip_text import END, START, CLIPText, CLIPTextConfig, CLIPTokenizer
from diffusion import Sampling
from formats.checkpoint import Model
from unet import Level, UNet, UNetConfig
from vae import VAE, VAEConfig

MERGES = [("t", "h"), ("th", "e</w>"), ("i", "n"), ("in", "g</w>"), ("n", "i"), ("g", "h"), ("gh", "t</w>")]


def small_tokenizer(tokens=24):
    """A tokenizer in CLIP's format: every byte, with and without the end of a word, and a few merges."""
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in MERGES] + [START, END]
    return CLIPTokenizer({piece: number for number, piece in enumerate(pieces)}, MERGES, tokens)


def randomise(network, seed):
    """Give every weight of a network a seeded random value, none zero or trivial, and sizes that keep signals sane."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1 and "embedding.weight" not in name:
                weight.copy_(noise * (weight.numel() // len(weight)) ** -0.5)  # one over the root of the fan-in
            else:
                weight.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return network


def random_model(seed=0, in_channels=8):
    """A small Model whose UNet has three levels, the last without attention."""
    tokenizer = small_tokenizer()
    text = CLIPTextConfig(
        vocabulary=len(tokenizer.vocabulary),
        tokens=tokenizer.tokens,
        width=32,
        layers=2,
        heads=2,
        end_token=tokenizer.end,
    )
    unet = UNetConfig(
        levels=(Level(32, True, 2), Level(64, True, 4), Level(64, False, 4)),
        resblocks=1,
        in_channels=in_channels,
        context_width=text.width,
        groups=8,
    )
    vae = VAEConfig(channels=(16, 32, 32), resblocks=1, groups=8, scaling=0.5)
    return Model(
        unet=randomise(UNet(unet), seed).eval(),
        vae=randomise(VAE(vae), seed + 1).eval(),
        text_encoder=randomise(CLIPText(text), seed + 2).eval(),
        tokenizer=tokenizer,
        sampling=Sampling(steps=10, text_guidance=4.0, image_guidance=1.5, resolution=128),
    )
