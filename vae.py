"""The autoencoder between pictures and latents: a KL autoencoder as in latent diffusion (Rombach et al. 2022).

A 512x512 picture becomes a 4x64x64 latent and back. Two rules of InstructPix2Pix (Sec. 3.2) are easy to get wrong:
the input picture conditions the UNet by the MODE of its latent distribution, unscaled; the latent that is diffused is
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

    channels: tuple[int, ...] = (128, 256, 512, 512)  # one entry a level; each level but the last halves the picture
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
        """The likeliest latent."""
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
        """Pictures x [B, 3, factor*H, factor*W] in [-1, 1] -> a Gaussian over latents, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(-30, 20))

    def decode(self, z, low_memory=False):
        """Unscaled latents z [B, latent_channels, H, W] -> pictures [B, 3, factor*H, factor*W], about in [-1, 1].

        low_memory: the same picture, a band of rows at a time.
        """
        return self.decoder(self.post_quant_conv(z), low_memory)


class Encoder(nn.Module):
    """Pictures [B, 3, ...] -> moments [B, 2 * latent_channels, H, W]."""

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
    """Latents [B, latent_channels, H, W] -> pictures [B, 3, ...]."""

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

    def forward(self, z, low_memory=False):
        """z [B, latent_channels, H, W] -> [B, 3, factor*H, factor*W]."""
        h = self.middle(self.conv_in(z))  # [B, C, H, W]
        if low_memory:
            return to_pixels_in_bands(self, h)
        for stage in self.up:
            for resblock in stage.resblocks:
                h = resblock(h)
            if stage.upsample is not None:
                h = upsample(h, stage.upsample)
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
    """Two convolutions and a bypass."""

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


def upsample(h, conv):
    """Double the size of h [B, C, H, W], then smooth it by a convolution."""
    return conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


# ---- decoding in bands: nothing new about the method from here on ----


def to_pixels_in_bands(decoder, h):
    """The decoder after its middle, in a fraction of the memory: h [B, C, H, W] -> [B, 3, factor*H, factor*W].

    Every layer runs on a band of rows at a time, with as many rows around it as its convolution looks at, so that
    inputs and outputs are whole but nothing in between. The GroupNorms' statistics are taken over the whole picture
    first. So the picture is the same as without bands, and there can be no seams.
    """

    def normed(norm, x):
        """norm(x), for any band of x."""
        variance, mean = torch.var_mean(x.unflatten(1, (norm.num_groups, -1)), dim=(2, 3, 4), unbiased=False)
        spread = (variance + norm.eps).rsqrt()  # [B, groups]
        per_group = x.shape[1] // norm.num_groups
        scale = spread.repeat_interleave(per_group, dim=1) * norm.weight  # [B, C]
        shift = norm.bias - mean.repeat_interleave(per_group, dim=1) * scale
        return lambda band: band * scale[:, :, None, None] + shift[:, :, None, None]

    for stage in decoder.up:
        for block in stage.resblocks:
            norm = normed(block.norm1, h)
            inner = in_bands(lambda x, b=block, n=norm: b.conv1(F.silu(n(x))), h)
            norm = normed(block.norm2, inner)
            h = in_bands(lambda x, y, b=block, n=norm: b.skip(x) + b.conv2(F.silu(n(y))), h, inner)
        if stage.upsample is not None:
            h = in_bands(lambda x, conv=stage.upsample: upsample(x, conv), h)
    norm = normed(decoder.norm_out, h)
    return in_bands(lambda x: decoder.conv_out(F.silu(norm(x))), h)


def in_bands(layer, *maps, rows=32):
    """layer(*maps) for maps [B, C, H, W] and a layer that looks at most one row up and down, `rows` rows at a time."""
    height, out = maps[0].shape[-2], None
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)
        band = layer(*(x[:, :, first:last] for x in maps))
        factor = band.shape[-2] // (last - first)  # 2 where the layer upsamples
        if out is None:
            out = band.new_empty(*band.shape[:2], height * factor, band.shape[-1])
        out[:, :, top * factor : bottom * factor] = band[:, :, (top - first) * factor : (bottom - first) * factor]
    return out
