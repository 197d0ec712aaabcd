"""The attention functions against float64."""

import pytest
import torch
from reference import relative_error

from attention import fused, reference

SHAPES = [  # batch, heads, queries, keys, head width
    (1, 1, 1, 1, 8),
    (2, 8, 64, 77, 40),
    (3, 8, 256, 256, 80),
    (1, 8, 1024, 77, 160),
    (1, 1, 300, 300, 512),
]


def draw(shape, seed=0, dtype=torch.float64):
    b, h, n, m, d = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, length, d, generator=generator, dtype=torch.float64).to(dtype) for length in (n, m, m)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attend", [reference, fused])
def test_float32_agrees_with_float64(shape, attend):
    q, k, v = draw(shape)
    exact = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q, k) / shape[-1] ** 0.5, -1) @ v
    assert relative_error(attend(q.float(), k.float(), v.float()), exact) <= 1e-6


def test_large_logits_do_not_overflow():
    q, k, v = draw((1, 2, 16, 16, 8), dtype=torch.float32)
    for attend in (reference, fused):
        out = attend(1e4 * q, 1e4 * k, v)
        assert out.isfinite().all()
        assert relative_error(out, reference(1e4 * q.double(), 1e4 * k.double(), v.double())) <= 1e-6


def test_causal_attention_ignores_the_future():
    q, k, v = draw((1, 2, 10, 10, 8), dtype=torch.float32)
    before = fused(q, k, v, causal=True)
    k[:, :, 7:], v[:, :, 7:] = 5.0, -5.0
    after = fused(q, k, v, causal=True)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.allclose(before[:, :, 7:], after[:, :, 7:])


