"""The denoising UNet of Stable Diffusion 1.x and of InstructPix2Pix (Sec. 3.2), which only adds input channels.

The network is the table `STABLE_DIFFUSION.levels`. Going down, each level runs its residual blocks, each followed by a
transformer where the table says so, then halves the feature map. Going up, the levels run in reverse, and each block
also takes one feature map of the way down (a skip connection). The text enters through cross-attention, the time
through every residual block.

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
    in_channels: int = 4  # 4: Stable Diffusion. 8: InstructPix2Pix, noisy latent first, then the input image's
    out_channels: int = 4
    context_width: int = 768  # E
    groups: int = 32  # of every GroupNorm
    scales_width: int = 0  # of the embedding of both guidance scales, which a distilled editor takes as inputs


STABLE_DIFFUSION = UNetConfig(
    levels=(
        #   channels  attention  heads    a 512x512 image is here
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
        self.scales = nn.Linear(config.scales_width, first, bias=False) if config.scales_width else None
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)

        index = itertools.count()  # of the transformers, in the order of computation

        def resblock(width_in, width_out):
            return ResBlock(width_in, width_out, time_width, config.groups)

        def transformer(level, place):
            return Transformer(level.channels, level.heads, config.context_width, config.groups, next(index), place)

        self.down = nn.ModuleList()
        width, skips = first, [first]  # channels of h, and of every skip connection
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

    def forward(self, z, t, context, attend=fused, deep=None, scales=None):
        """Predict eps, the noise in z.

        z [B, in_channels, H, W]: the noisy latent, and for InstructPix2Pix the input image's latent behind it.
        t [B]: time in [0, 999], fractions allowed. context [B, L, E]: text embedding. attend: see attention.py.
        deep: a list. What the inner levels give to the outermost is put into an empty one; from a full one it is taken,
        and the inner levels are left out (Ma et al. 2024, DeepCache). scales [B, 2]: guidance scales s_T and s_I, for
        a distilled UNet (Meng et al. 2023). Returns [B, out_channels, H, W].
        """
        time = timestep_embedding(t, self.config.levels[0].channels).to(self.time_embed[0].weight.dtype)
        if self.scales is not None:
            both = timestep_embedding(100 * scales.flatten(), self.config.scales_width // 2)  # a scale is as 100 times
            time = time + self.scales(both.view(len(z), -1).to(time.dtype))
        time = F.silu(self.time_embed(time))  # [B, 4 C]

        h = self.conv_in(z)
        skips, levels = [h], 1 if deep else len(self.down)
        for stage in self.down[:levels]:
            for i, resblock in enumerate(stage.resblocks):
                h = resblock(h, time)
                if stage.transformers:
                    h = stage.transformers[i](h, context, attend)
                skips.append(h)
            if stage.downsample is not None and not deep:
                h = stage.downsample(h)
                skips.append(h)

        if deep:
            h = deep[0][: len(z)]
        else:
            h = self.middle.resblock1(h, time)
            h = self.middle.transformer(h, context, attend)
            h = self.middle.resblock2(h, time)

        for stage in self.up[-levels:]:
            if stage is self.up[-1] and deep == []:
                deep.append(h)
            for i, resblock in enumerate(stage.resblocks):
                h = resblock(torch.cat([h, skips.pop()], dim=1), time)
                if stage.transformers:
                    h = stage.transformers[i](h, context, attend)
            if stage.upsample is not None:
                # to the size of the next skip: twice h's own, or one less where downsampling met an odd size
                h = stage.upsample(F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest"))

        return self.conv_out(F.silu(self.norm_out(h)))


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added in between, and a skip connection."""

    def __init__(self, width_in, width_out, time_width, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-5)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.time = nn.Linear(time_width, width_out)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-5)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x, time):
        """x [B, C_in, H, W], time [B, 4 C] (after its SiLU) -> [B, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Transformer(nn.Module):
    """Self-attention over the pixels, cross-attention to the text tokens, and a feed-forward layer, each residual."""

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

    def forward(self, x, context, attend):
        """x [B, C, H, W], context [B, L, E] -> [B, C, H, W]."""
        size = tuple(x.shape[-2:])
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # [B, N, C], N = H W
        own = self.norm1(h)
        h = h + self.self_attention(own, own, attend, Layer(self.index, self.place, False, size))
        h = h + self.cross_attention(self.norm2(h), context, attend, Layer(self.index, self.place, True, size))
        h = h + self.feed_forward(self.norm3(h))
        # [B, C, H, W]; contiguous: else on a GPU proj_out's gradient has strides that DistributedDataParallel warns of
        h = h.transpose(1, 2).unflatten(2, size).contiguous()
        return x + self.proj_out(h)


class Attention(nn.Module):
    """Projections to q, k and v, the `attend` function, and the output projection."""

    def __init__(self, width, context_width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x, context, attend, layer):
        """Queries from x [B, N, C], keys and values from context [B, M, E] -> [B, N, C]."""
        q = split_heads(self.to_q(x), self.heads)  # [B, H, N, D]
        k = split_heads(self.to_k(context), self.heads)  # [B, H, M, D]
        v = split_heads(self.to_v(context), self.heads)
        return self.to_out(join_heads(attend(q, k, v, layer)))


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


def timestep_embedding(t, width):
    """The time as cosines, then sines, of `width` / 2 frequencies from 1 to 1/10000: t [B] -> [B, width], float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
