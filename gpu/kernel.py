"""Attention in one Triton kernel, for what Prompt-to-Prompt asks and torch's fused kernels do not offer. Needs triton.

    out_s = softmax(q k^T / sqrt(D)) v_s        one map serves several values, s = 1..S

No map is ever in memory. A row of softmax(logits) V is a quotient of two sums over the keys,

    out = sum_j w_j v_j / sum_j w_j       with w_j = exp(logit_j - top) for any number `top`,

so both can be summed up tile by tile of keys, and `top` = the largest logit so far keeps w_j from overflowing. When a
tile raises it, all that was summed up before shrinks by exp(old top - new top): the online softmax (Milakov and
Gimelshein 2018), which FlashAttention (Dao et al. 2022) made one kernel of. Values that share a map lie side by side as
one wide value, [v_1 | v_2 | ...], so that their map is computed once.

For inference: the operation has no derivative, and asking for one raises an error. Shapes: G groups (the halves without
and with text), B batch, H heads, N queries, M keys, D head width, S values of one map.

`SharedMaps` is the `attend` function that uses it; programs choose it on CUDA (`gpu.shared_maps`).
"""

import math

import torch
import triton
import triton.language as tl

# Queries and keys of one tile, by how wide the values are side by side. Chosen without a GPU to time them: for sm_80 to
# sm_120 the compiler finds room for all tiles in their shared memory, and for all sums (nearly) in registers.
TILES = {
    # up to   16 bits    32 bits
    128:     ((128, 64), (32, 32)),
    256:     ((64, 32),  (32, 16)),
    512:     ((32, 32),  (16, 16)),
}  # fmt: skip
WARPS, STAGES = 8, 2  # of 32 threads that share a tile; tiles of keys on their way from memory at a time


@torch.library.custom_op("ip2p::attend_values", mutates_args=())
def attend_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """out_s = softmax(q k^T / sqrt(D)) v_s.

    q [G, B, H, N, D], k [G, B, H, M, D], v [G, S, B, H, M, D] -> out [G, S, B, H, N, D]. All bfloat16, float16 or
    float32, whatever their strides; sums are in float32. Raises ValueError if shapes or types do not fit, or if S * D
    is more than 512. One opaque operation to torch.compile: it neither breaks the graph nor looks inside.
    """
    out = empty_output(q, k, v)
    launch(out, q, k, v)
    return out


@attend_values.register_fake
def empty_output(q, k, v):
    """Check the shapes and types and make room for the output, with heads where `join_heads` needs no copy."""
    if q.ndim != 5 or k.ndim != 5 or v.ndim != 6:
        raise ValueError("q and k should have 5 axes, v 6")
    (G, B, H, N, D), M, S = q.shape, k.shape[3], v.shape[1]
    if k.shape != (G, B, H, M, D) or v.shape != (G, S, B, H, M, D) or M == 0:
        raise ValueError(f"the shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)} do not fit")
    types = {(x.dtype, x.device) for x in (q, k, v)}
    if len(types) > 1 or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q, k and v should have one type, bfloat16, float16 or float32, on one device, not {types}")
    if max(TILES) < S * D:
        raise ValueError(f"{S} values of width {D} side by side are wider than {max(TILES)}")
    return q.new_empty(G, S, B, N, H, D).transpose(3, 4)


def launch(out, *inputs):
    """`attend_values`, checked already, into `out`: a tensor of any floating type, its last axis contiguous."""
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]
    strides = [x.stride()[:-1] for x in (*inputs, out)]
    G, S, B, H, N, D = out.shape
    M = inputs[1].shape[3]
    width, columns = (max(16, triton.next_power_of_2(x)) for x in (D, S * D))  # tensor cores multiply at least 16
    tile_n, tile_m = tile_of(inputs[0].dtype, columns)
    with torch.cuda.device_of(out):
        attend_kernel[(triton.cdiv(N, tile_n) * G * B * H,)](
            *inputs, out, *strides, B, H, N, M, math.log2(math.e) / math.sqrt(D), S, D, tile_n, tile_m, width, columns,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip


def tile_of(dtype, columns):
    """How many queries and keys are taken at a time."""
    return next(TILES[widest][dtype.itemsize == 4] for widest in TILES if columns <= widest)


class SharedMaps:
    """An `attend` around a `p2p.PairControl`: where all pairs borrow, one map serves both images of each (Sec. 3.1.2).

    Batches as for PairControl: [null before, null after, text before, text after]. Everything else is the control's.
    """

    def __init__(self, control):
        self.control = control

    def __call__(self, q, k, v, layer):
        """Attention as in attention.py; q [4B, H, N, D], k and v [4B, H, M, D]."""
        if layer.cross or not (self.control.self_control and self.control.all_active):
            return self.control(q, k, v, layer)
        q, k, v = (x.unflatten(0, (2, 2, -1)) for x in (q, k, v))  # [2, 2, B, H, ., D]: halves, images, pairs
        return attend_values(q[:, 0], k[:, 0], v).flatten(0, 2)


# ---- on the device ----


@triton.jit
def attend_kernel(
    q, k, v, out,  # pointers
    q_strides, k_strides, v_strides, out_strides,
    B, H, N, M,
    scale,
    S: tl.constexpr, D: tl.constexpr,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr,  # queries and keys at a time
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,  # D and S * D, rounded up to powers of two
):  # fmt: skip
    """One program: TILE_N queries of one head, all values. See `attend_values` for the tensors."""
    tiles = tl.cdiv(N, TILE_N)
    n = (tl.program_id(0) % tiles) * TILE_N + tl.arange(0, TILE_N)  # [TILE_N] which queries
    place = (tl.program_id(0) // tiles).to(tl.int64)  # 64 bits: large batches have more elements than 32 bits count
    g = place // (B * H)
    b = place // H % B
    h = place % H

    column = tl.arange(0, COLUMNS)  # [COLUMNS] of the values side by side:
    s = column // D  # which value
    d = column % D  # which of its channels
    is_value = column < S * D

    result = softmax_times_values(
        q + head_offset(q_strides, g, b, h), q_strides[3],
        k + head_offset(k_strides, g, b, h), k_strides[3],
        v + g * v_strides[0] + b * v_strides[2] + h * v_strides[3] + s * v_strides[1] + d, v_strides[4], is_value,
        n, N, M, scale, D, TILE_N, TILE_M, WIDTH, COLUMNS,
    )  # fmt: skip
    to = out + g * out_strides[0] + b * out_strides[2] + h * out_strides[3] + s * out_strides[1] + d  # [COLUMNS]
    to = to[None, :] + n[:, None] * out_strides[4]
    tl.store(to, result.to(out.dtype.element_ty), mask=(n < N)[:, None] & is_value[None, :])


@triton.jit
def head_offset(strides, g, b, h):
    """Where the matrix of one head begins in a tensor [G, B, H, ., D]."""
    return g * strides[0] + b * strides[1] + h * strides[2]


@triton.jit
def softmax_times_values(
    q, q_stride, k, k_stride, v, v_stride, is_value,
    n, N, M, scale,
    D: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T * scale) v of one head, for the queries n [TILE_N] -> float32 [TILE_N, COLUMNS].

    q and k: pointers to the head's first row, and how far the next row is. v [COLUMNS]: pointers to its columns' first
    row; columns that are not `is_value` count as zeros.
    """
    channel = tl.arange(0, WIDTH)
    is_channel = channel < D  # heads are not padded in memory, but here, by zeros
    queries = tl.load(
        q + n[:, None] * q_stride + channel[None, :], mask=(n < N)[:, None] & is_channel[None, :], other=0.0
    )  # [TILE_N, WIDTH]

    top = tl.full([TILE_N], float("-inf"), tl.float32)  # the largest logit so far
    total = tl.zeros([TILE_N], tl.float32)  # the sum of weights so far
    mixed = tl.zeros([TILE_N, COLUMNS], tl.float32)  # the sum of weighted values so far
    for start in range(0, M, TILE_M):
        m = start + tl.arange(0, TILE_M)  # [TILE_M] which keys
        is_key = m < M
        keys = tl.load(
            k + m[None, :] * k_stride + channel[:, None], mask=is_key[None, :] & is_channel[:, None], other=0.0
        )  # [WIDTH, TILE_M]
        values = tl.load(v[None, :] + m[:, None] * v_stride, mask=is_key[:, None] & is_value[None, :], other=0.0)

        logits = tl.dot(queries, keys, input_precision="ieee")  # [TILE_N, TILE_M], not yet scaled
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        # 2^x is what the hardware has, so the scale brings log2(e); subtracted first, large logits lose no digits to it
        weights = tl.exp2((logits - new_top[:, None]) * scale)  # [TILE_N, TILE_M], in [0, 1]
        shrink = tl.exp2((top - new_top) * scale)  # [TILE_N]; 0 for the first tile

        # tensor cores want the weights rounded; their sum is that of the rounded ones, so that they make up exactly 1
        if values.dtype != tl.float32:
            weights = weights.to(tl.float16).to(tl.float32)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed *= shrink[:, None]
        if values.dtype == tl.bfloat16:
            # whose 8 binary digits are too few for weights; tf32 has the 11 of float16, and bfloat16's range for values
            mixed = tl.dot(weights, values.to(tl.float32), mixed, input_precision="tf32")
        else:
            mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
        top = new_top
    return mixed / total[:, None]
