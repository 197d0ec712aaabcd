"""Attention, the one operation that Prompt-to-Prompt takes control of, and therefore a parameter of the UNet.

Every attention layer of the UNet computes q, k and v and hands them to a function

    attend(q, k, v, layer) -> out        q [B, H, N, D], k and v [B, H, M, D], out [B, H, N, D]

with B batch, H heads, N queries, M keys and D head width. `reference` is that function as the textbook has it,
`fused` is the default. To look at attention or to change it (Prompt-to-Prompt, a tracer, a benchmark), pass another
function to `UNet.forward`; nothing is ever patched.
"""

from typing import NamedTuple

import torch.nn.functional as F


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
    """The same in one kernel that never holds the map. causal: a token sees itself and earlier tokens (CLIP's text)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def split_heads(x, heads):
    """[B, N, H*D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x):
    """[B, H, N, D] -> [B, N, H*D]."""
    return x.transpose(1, 2).flatten(2)
