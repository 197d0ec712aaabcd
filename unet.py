"""The denoising UNet of Stable Diffusion 1.x and of InstructPix2Pix (Sec. 3.2), which only adds input channels.

The network is the table `STABLE_DIFFUSION.levels`: on the way down each level runs its residual blocks, each followed
by a transformer where the table says so, then halves the picture; on the way up the same levels run in reverse, each
block taking one feature map that the way down left behind. The text enters through the transformers' cross-attention,
the time through every residual block.

Shapes: B batch, C channels, H and W height and width of a feature map, L text tokens, E width of a text token.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import Layer, fused, join_heads, split_heads


@dataclass(frozen=True)
class Level:
    """One resolution of the UNet: its channels, whether transformers follow its residual blocks, and their heads."""

    channels: int
    attention: bool
    heads: int


@dataclass(frozen=True)
class UNetConfig:
    """Everything that may differ between two UNets."""

    levels: tuple[Level, ...]
    resblocks: int = 2  # per level on the way down; one more on the way up
    in_channels: int = 4  # 4: Stable Diffusion. 8: InstructPix2Pix, noisy latent first, then the input picture's
    out_channels: int = 4
    context_width: int = 768  # E
    groups: int = 32  # of every GroupNorm


STABLE_DIFFUSION = UNetConfig(
    levels=(
        #   channels  attention  heads    a 512x512 picture is here
        Level(   320,      True,     8),  # 64x64 latents
        Level(   640,      True,     8),  # 32x32
        Level(  1280,      True,     8),  # 16x16
        Level(  1280,     False,     8),  # 8x8; only the middle's transformer uses these heads
    )
)
INSTRUCT_PIX2PIX = replace(STABLE_DIFFUSION, in_channels=8)


class UNet(nn.Module):
    """eps_theta(z_t, t, c): predicts the noise in a noisy latent (Eq. 1)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        levels, first = config.levels, config.levels[0].channels
        time_width = 4 * first

        self.time_embed = nn.Sequential(nn.Linear(first, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)

        numbers = itertools.count()  # of the transformers, in the order of computation

        def resblock(width_in, width_out):
            return ResBlock(width_in, width_out, time_width, config.groups)

        def transformer(level, place):
            return Transformer(level.channels, level.heads, config.context_width, config.groups, next(numbers), place)

        self.down = nn.ModuleList()
        width, skips = first, [first]  # channels of h, and of every feature map left behind for the way up
        for number, level in enumerate(levels):
            stage = nn.Module()
            stage.resblocks, stage.transformers = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.resblocks):
                stage.resblocks.append(resblock(width, level.channels))
                if level.attention:
                    stage.transformers.append(transformer(level, "down"))
                width = level.channels
                skips.append(width)
            stage.downsample = None
            if number < len(levels) - 1:
                stage.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
                skips.append(width)
            self.down.append(stage)

        self.middle = nn.Module()
        self.middle.resblock1 = resblock(width, width)
        self.middle.transformer = transformer(levels[-1], "middle")
        self.middle.resblock2 = resblock(width, width)

        self.up = nn.ModuleList()
        for number, level in reversed(list(enumerate(levels))):
            stage = nn.Module()
            stage.resblocks, stage.transformers = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.resblocks + 1):
                stage.resblocks.append(resblock(width + skips.pop(), level.channels))
                if level.attention:
                    stage.transformers.append(transformer(level, "up"))
                width = level.channels
            stage.upsample = nn.Conv2d(width, width, 3, padding=1) if number > 0 else None
            self.up.append(stage)

        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, z, t, context, attend=fused):
        """Predict eps.

        z [B, in_channels, H, W] noisy latent (and the input picture's, for InstructPix2Pix), t [B] time in [0, 999],
        fractions allowed, context [B, L, E] text embedding, attend: see attention.py. Returns [B, out_channels, H, W].
        """
        return self.predict(z, self.embed_time(t), self.read(context), attend)

    def embed_time(self, t):
        """t [B] -> what each residual block adds to its channels at that time, each [B, C], in their order."""
        time = timestep_embedding(t, self.config.levels[0].channels)
        time = F.silu(self.time_embed(time.to(self.time_embed[0].weight.dtype)))
        return [layer.time(time) for layer in self.modules() if isinstance(layer, ResBlock)]

    def time_embedder(self, times):
        """Make the function t -> `embed_time` of it, each [1, C], for a sampler that knows its steps' times beforehand.

        times: N floats, which are embedded here, as one batch. Any other t is embedded when it is asked for.
        """

        def embed(times):
            return self.embed_time(torch.tensor(times, dtype=torch.float32, device=self.conv_in.weight.device))

        rows = zip(*(added.split(1) for added in embed(times)), strict=True)
        known = dict(zip(times, rows, strict=True))
        return lambda t: known[t] if t in known else embed([t])

    def read(self, context):
        """context [B, L, E] -> the keys and values of all cross-attention layers, each [B, H, L, D], in their order.

        They depend on the text alone, so a sampler reads it once and not at every step.
        """
        transformers = [layer for layer in self.modules() if isinstance(layer, Transformer)]
        return [layer.cross_attention.keys_values(context) for layer in transformers]

    def predict(self, z, times, text, attend=fused):
        """`forward` with what `embed_time` made of the time, and `read` of the text."""
        times, text = iter(times), iter(text)
        h = self.conv_in(z)
        skips = [h]
        for stage in self.down:
            for number, resblock in enumerate(stage.resblocks):
                h = resblock(h, next(times))
                if stage.transformers:
                    h = stage.transformers[number](h, next(text), attend)
                skips.append(h)
            if stage.downsample is not None:
                h = stage.downsample(h)
                skips.append(h)

        h = self.middle.resblock1(h, next(times))
        h = self.middle.transformer(h, next(text), attend)
        h = self.middle.resblock2(h, next(times))

        for stage in self.up:
            for number, resblock in enumerate(stage.resblocks):
                h = resblock(torch.cat([h, skips.pop()], dim=1), next(times))
                if stage.transformers:
                    h = stage.transformers[number](h, next(text), attend)
            if stage.upsample is not None:
                # to the size of the map it will meet: twice its own, or one less where the way down met an odd size
                h = stage.upsample(doubled(h, skips[-1].shape[-2:]))

        return self.conv_out(F.silu(self.norm_out(h)))


class ResBlock(nn.Module):
    """Two convolutions around the time's embedding, and a bypass."""

    def __init__(self, width_in, width_out, time_width, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-5)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.time = nn.Linear(time_width, width_out)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-5)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x, time):
        """x [B, C_in, H, W], time [B, C_out], which `UNet.embed_time` makes -> [B, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + time[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Transformer(nn.Module):
    """Every pixel looks at every pixel (self-attention), then at every word (cross-attention), then thinks (GEGLU)."""

    def __init__(self, width, heads, context_width, groups, index, place):
        super().__init__()
        self.index, self.place = index, place
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.self_attention = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.cross_attention = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, text, attend):
        """x [B, C, H, W], text: keys and values, as `UNet.read` makes them -> [B, C, H, W]."""
        size = x.shape[-2:]
        self_layer = Layer(self.index, self.place, False, tuple(size))
        cross_layer = Layer(self.index, self.place, True, tuple(size))

        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # [B, N, C], N = H W
        own = self.norm1(h)
        h = h + self.self_attention(own, self.self_attention.keys_values(own), attend, self_layer)
        h = h + self.cross_attention(self.norm2(h), text, attend, cross_layer)
        h = h + self.feed_forward(self.norm3(h))
        h = h.transpose(1, 2).unflatten(2, size)  # [B, C, H, W]
        return x + self.proj_out(h)


class Attention(nn.Module):
    """Projections to q, k and v, the `attend` function, and a projection back."""

    def __init__(self, width, context_width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def keys_values(self, context):
        """context [B, M, E], which answers -> k and v, each [B, H, M, D]."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def forward(self, x, keys_values, attend, layer):
        """x [B, N, C] asks what `keys_values` made of another, or of itself -> [B, N, C]."""
        q = split_heads(self.to_q(x), self.heads)
        return self.to_out(join_heads(attend(q, *keys_values, layer)))


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): one half of a wide layer, gated by the gelu of the other half."""

    def __init__(self, width):
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x):
        """x [B, N, C] -> [B, N, C]."""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


def doubled(x, size):
    """Every pixel twice along both axes: x [B, C, h, w] -> [B, C, *size], where each of size is 2h (2w), or one less.

    To the bit what F.interpolate's "nearest" gives, but its way back is a sum, where that one's is a scatter, which
    torch 2.13 puts into the wrong order when it compiles bfloat16 for CPUs: weights below it then get no gradient.
    The channels come first in memory, whichever way they lay.
    """
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)  # [B, C, h, 2, w, 2]
    return x.flatten(4).flatten(2, 3)[:, :, : size[0], : size[1]]


def timestep_embedding(t, width):
    """The time as cosines, then sines, of `width` / 2 frequencies from 1 to 1/10000: t [B] -> [B, width], float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
