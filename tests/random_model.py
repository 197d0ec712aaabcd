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
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, device=device)
            if weight.dim() > 1 and "embedding.weight" not in name:
                weight.copy_(noise * (weight.numel() // len(weight)) ** -0.5)  # one over the root of the fan-in
            else:
                weight.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return network


def random_model(seed=0, in_channels=8):
    """A small Model whose UNet has three levels, the last without attention."""
    levels = Level(32, True, 2), Level(64, True, 4), Level(64, False, 4)
    unet = UNetConfig(levels, resblocks=1, in_channels=in_channels, context_width=32, groups=8)
    sampling = Sampling(steps=10, text_guidance=4.0, image_guidance=1.5, resolution=128)
    return model_of(unet, VAEConfig((16, 32, 32), 1, groups=8, scaling=0.5), 2, sampling, seed)


def tiny_model(seed=0, in_channels=8):
    """The smallest model with all kinds of layers; a step on 64x64 pixels takes about 10 ms."""
    levels = Level(8, True, 2), Level(16, False, 2)
    unet = UNetConfig(levels, resblocks=1, in_channels=in_channels, context_width=16, groups=4)
    sampling = Sampling(steps=2, text_guidance=4.0, image_guidance=1.5, resolution=64)
    return model_of(unet, VAEConfig((8, 8, 8), 1, groups=4, scaling=0.5), 1, sampling, seed)


def model_of(unet, vae, layers, sampling, seed):
    """A Model of these configurations; layers: of the text encoder."""
    tokenizer = small_tokenizer()
    size, width = len(tokenizer.vocabulary), unet.context_width
    text = CLIPTextConfig(size, tokenizer.tokens, width, layers, heads=2, end_token=tokenizer.end)
    networks = UNet(unet), VAE(vae), CLIPText(text)
    return Model(*(randomise(net, seed + i).eval() for i, net in enumerate(networks)), tokenizer, sampling)
