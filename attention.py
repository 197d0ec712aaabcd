"""Attention, the one operation that Prompt-to-Prompt takes control of, and therefore a parameter of the UNet.

Every attention layer of the UNet computes q, k and v and hands them to a function

    attend(q, k, v, layer) -> out        q [B, H, N, D], k and v [B, H, M, D], out [B, H, N, D]

with B batch, H heads, N queries, M keys and D head width. `reference` is that function as the textbook has it,
`fused` is the default. Whoever wants to look at attention or to change it (Prompt-to-Prompt, a tracer, a benchmark)
passes a function of their own to `UNet.forward`; nothing is ever patched.

Who computes it on a GPU, by shape. No GPU has timed the two against each other yet, so no shape is an exception:

    one map, one value              `fused`            any shape    torch
    one map, several values         `fused_values`     any shape    kernel.py; torch would have to pad q and k
    and a second map for the last   `fused_values`     any shape    kernel.py, in the same launch

kernel.py needs triton, which torch's builds for CUDA bring along. Without CUDA or triton everything is torch's, also on
AMD's GPUs, which torch calls cuda as well; and so are float64 and heads wider than any of Stable Diffusion's (256).
"""

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F

WIDEST = 512  # head widths of several values, side by side, that kernel.py has tiles for
KERNEL_DEVICES = ("cuda",) if torch.version.cuda and importlib.util.find_spec("triton") else ()


class Layer(NamedTuple):
    """Where in the UNet a call of `attend` comes from."""

    index: int  # counts the attention layers of one kind (self or cross) in the order of computation, from 0
    place: str  # "down", "middle" or "up"
    cross: bool  # cross-attention (keys and values from the text), or self-attention
    size: tuple[int, int]  # height and width of the feature map: N = height * width queries


def reference(q, k, v, layer=None):
    """Attention(Q, K, V) = softmax(Q K^T / sqrt(D)) V, with the map [B, H, N, M] in memory (Vaswani 2017, Eq. 1)."""
    scale = q.shape[-1] ** -0.5
    logits = q @ k.transpose(-1, -2) * scale  # [B, H, N, M]
    attention_map = logits.softmax(dim=-1)
    return attention_map @ v


def fused(q, k, v, layer=None, causal=False):
    """The same in one kernel that never holds the map. `causal` (CLIP's text): tokens see the past alone."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def fused_values(q, k, v, *second):
    """One map for several values, out_s = softmax(Q K^T / sqrt(D)) V_s, and for the last one what a second map gives.

    q [G, B, H, N, D], k [G, B, H, M, D], v [G, S, B, H, M, D] with G groups and S values of each map; second: nothing,
    or q', k' and v' [G, B, H, ., D], and softmax(Q' K'^T / sqrt(D)) V' is added to out_S. Returns [G, S, B, H, N, D].
    """
    if has_kernel(q, v.shape[1]):
        from gpu.kernel import attend_values  # here, because it needs triton

        return attend_values(q, k, v, *second)
    groups, values, width = len(q), v.shape[1], q.shape[-1]
    # the values side by side; torch wants one width, and zeros beside q and k leave their products as they are
    q, k = (F.pad(x.flatten(0, 1), (0, (values - 1) * width)) for x in (q, k))
    v = v.movedim(1, -2).flatten(-2).flatten(0, 1)  # [G B, H, M, S D]
    out = F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)
    out = out.unflatten(0, (groups, -1)).unflatten(-1, (values, width)).movedim(-2, 1)
    if second:
        out[:, -1] += fused(*(x.flatten(0, 1) for x in second)).unflatten(0, (groups, -1))
    return out


def has_kernel(q, values):
    """Whether kernel.py can serve these queries, by their place, number format and width, with so many values."""
    return q.device.type in KERNEL_DEVICES and q.dtype != torch.float64 and values * q.shape[-1] <= WIDEST


def split_heads(x, heads):
    """[B, N, H*D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x):
    """[B, H, N, D] -> [B, N, H*D]."""
    return x.transpose(1, 2).flatten(2)
