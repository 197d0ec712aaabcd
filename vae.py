"""The autoencoder between images and latents: a KL autoencoder as in latent diffusion (Rombach et al. 2022).

A 512x512 image becomes a 4x64x64 latent and back. Two rules of InstructPix2Pix (Sec. 3.2) are easy to get wrong:
the input image conditions the UNet by the MODE of its latent distribution, unscaled; the latent that is diffused is
a SAMPLE, times `scaling` (0.18215), and must be divided by it before decoding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attention import fused


@dataclass(frozen=True)
class VAEConfig:
    """Everything that may differ between two autoencoders."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # one entry a level; each level but the last halves the image
    resblocks: int = 2  # per level in the encoder; one more in the decoder
    latent_channels: int = 4
    groups: int = 32  # of every GroupNorm
    scaling: float = 0.18215  # brings the latents that are diffused to unit variance

    @property
    def factor(self):
        """Pixels a latent, along one side."""
        return 2 ** (len(self.channels) - 1)


STABLE_DIFFUSION_VAE = VAEConfig()


class Gaussian(NamedTuple):
    """A diagonal normal distribution over latents: mean and logvar [B, latent_channels, H, W]."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def mode(self):
        """The most likely latent: the mean."""
        return self.mean

    def sample(self, noise):
        """A draw, from standard normal `noise` of the mean's shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise


class VAE(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x):
        """Images x [B, 3, factor*H, factor*W] in [-1, 1] -> a Gaussian over latents, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(-30, 20))

    def decode(self, z):
        """Unscaled latents z [B, latent_channels, H, W] -> images [B, 3, factor*H, factor*W], about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


class Encoder(nn.Module):
    """Images [B, 3, ...] -> moments [B, 2 * latent_channels, H, W]."""

    def __init__(self, config):
        super().__init__()
        width = config.channels[0]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for number, channels in enumerate(config.channels):
            stage = nn.Module()
            stage.resblocks = nn.ModuleList()
            for _ in range(config.resblocks):
                stage.resblocks.append(ResBlock(width, channels, config.groups))
                width = channels
            last = number == len(config.channels) - 1
            stage.downsample = None if last else nn.Conv2d(width, width, 3, stride=2)
            self.down.append(stage)
        self.middle = Middle(width, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        """x [B, 3, factor*H, factor*W] -> [B, 2 * latent_channels, H, W]."""
        h = self.conv_in(x)
        for stage in self.down:
            for resblock in stage.resblocks:
                h = resblock(h)
            if stage.downsample is not None:
                h = stage.downsample(F.pad(h, (0, 1, 0, 1)))  # zeros at the right and the bottom only
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Latents [B, latent_channels, H, W] -> images [B, 3, ...]."""

    def __init__(self, config):
        super().__init__()
        width = config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = Middle(width, config.groups)
        self.up = nn.ModuleList()
        for number, channels in reversed(list(enumerate(config.channels))):
            stage = nn.Module()
            stage.resblocks = nn.ModuleList()
            for _ in range(config.resblocks + 1):
                stage.resblocks.append(ResBlock(width, channels, config.groups))
                width = channels
            stage.upsample = nn.Conv2d(width, width, 3, padding=1) if number > 0 else None
            self.up.append(stage)
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        """z [B, latent_channels, H, W] -> [B, 3, factor*H, factor*W]."""
        h = self.middle(self.conv_in(z))  # [B, C, H, W]
        for stage in self.up:
            for resblock in stage.resblocks:
                h = resblock(h)
            if stage.upsample is not None:
                h = stage.upsample(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))


class Middle(nn.Module):
    """The lowest level's two residual blocks with attention between them, in encoder and decoder alike."""

    def __init__(self, width, groups):
        super().__init__()
        self.resblock1 = ResBlock(width, width, groups)
        self.attention = Attention(width, groups)
        self.resblock2 = ResBlock(width, width, groups)

    def forward(self, h):
        """h [B, C, H, W] -> [B, C, H, W]."""
        return self.resblock2(self.attention(self.resblock1(h)))


class ResBlock(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, width_in, width_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x):
        """x [B, C_in, H, W] -> [B, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels with a single head."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x):
        """x [B, C, H, W] -> [B, C, H, W]."""
        h = self.norm(x).flatten(2).transpose(1, 2)[:, None]  # [B, 1, N, C]: one head
        h = self.to_out(fused(self.to_q(h), self.to_k(h), self.to_v(h)))
        h = h[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])
        return h + x  # h first: the sum then lies channels last in memory, which the convolutions after it prefer
