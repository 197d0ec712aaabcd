"""The Triton kernel against float64: on a GPU where there is one, else by triton's interpreter."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from reference import relative_error

pytest.importorskip("triton", reason="triton is not installed (requirements-triton.txt)")

from triton.runtime import interpreter

import attention
from attention import Layer, join_heads, split_heads
from gpu import kernel, shared_maps
from p2p import PairControl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("one_thread"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]

LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3}
SHAPES = [  # groups, values, batch, heads, queries, keys, head width
    (1, 1, 1, 1, 1, 1, 8),
    (2, 1, 2, 3, 7, 7, 8),
    (2, 2, 3, 2, 7, 64, 8),
    (1, 3, 2, 1, 64, 7, 32),
    (2, 2, 1, 2, 64, 64, 40),
    (1, 2, 2, 2, 77, 77, 40),
    (1, 2, 1, 1, 256, 256, 40),
    (1, 2, 1, 1, 256, 77, 80),
    (1, 2, 1, 1, 77, 256, 80),
    (1, 1, 1, 1, 130, 77, 160),
    (1, 2, 1, 2, 64, 77, 160),
]
LARGE = [  # of Stable Diffusion at 512x512: every query of it, every key of it, and all of its smaller maps
    (1, 2, 1, 1, 4096, 77, 40),
    (1, 2, 1, 1, 128, 4096, 40),
    (1, 2, 1, 1, 1024, 1024, 80),
    (1, 2, 1, 1, 256, 256, 160),
]


@pytest.fixture(autouse=True)
def interpreter_with_bfloat16(monkeypatch):
    """Make the interpreter treat bfloat16 as GPUs do: it keeps the bits in uint16, cuts off where it should round to
    the nearest, and multiplies the bits as if they were whole numbers.
    """
    convert, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(x, source, target, mode):
        if (source, target) != (kernel.tl.float32, kernel.tl.bfloat16):
            return convert(x, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def as_float32(x):
        if x.dtype.scalar != kernel.tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), kernel.tl.float32)

    def dot(self, a, b, *rest):
        return multiply(self, as_float32(a), as_float32(b), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def draw(shape, dtype, seed=0):
    """Random inputs of `attend_values`."""
    groups, values, batch, heads, n, m, width = shape
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (groups, batch, heads, n, width), (groups, batch, heads, m, width)
    shapes = [queries, keys, (groups, values, *keys[1:])]
    return [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in shapes]


def exact(q, k, v):
    """The same in float64, with maps in memory."""
    q, k, v = (x.double() for x in (q, k, v))
    return attention.reference(q[:, None], k[:, None], v)


def poisoned(inputs, dtype):
    """Room for the output, full of NaN."""
    return torch.full_like(kernel.empty_output(*inputs), torch.nan, dtype=dtype)


def check(inputs):
    """Against float64, as it is and before it is rounded; the rounding is all that these differ by."""
    expected, dtype = exact(*inputs), inputs[0].dtype
    summed, out = poisoned(inputs, torch.float32), poisoned(inputs, dtype)
    for room in (summed, out):
        kernel.launch(room, *inputs)
    assert summed.isfinite().all()
    assert out.isfinite().all()
    errors = [relative_error(x, expected) for x in (summed, out)]
    print(f"{dtype} {errors[0]:.2e} {errors[1]:.2e}")
    assert max(errors) <= LIMITS[dtype]
    assert dtype != torch.bfloat16 or errors[0] <= 3e-4
    assert relative_error(out, summed.to(dtype)) <= 1e-4


# ---- the kernel ----


def test_who_runs_the_kernel():
    assert isinstance(kernel.attend_kernel, interpreter.InterpretedFunction) == (DEVICE == "cpu")


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype):
    check(draw(shape, dtype, seed=SHAPES.index(shape)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", LARGE)
def test_agrees_with_float64_at_the_size_of_stable_diffusion(shape, dtype):
    check(draw(shape, dtype, seed=100 + LARGE.index(shape)))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("logits", ["large", "very negative", "all but one very negative", "rising", "falling"])
def test_extreme_logits(dtype, logits):
    """All of these logits are exact in every type, so that the reference sees the same ones."""
    n, m, width = 9, 200, 64
    q, k = torch.zeros(1, 1, 1, n, width), torch.zeros(1, 1, 1, m, width)
    generator = torch.Generator().manual_seed(0)
    q[..., 0], q[..., 1] = 2.0**15, 8.0  # times k, / 8: a logit is 2^12 k_0 + k_1
    k[..., 1] = torch.randint(-24, 24, (m,), generator=generator) / 8
    row = torch.arange(m)
    k[..., 0] = {
        "large": torch.full((m,), 2.0),
        "very negative": torch.full((m,), -2.0),
        "all but one very negative": torch.where(row == 150, 0.0, -2.0),
        "rising": (row // 20 - 5) / 4.0,
        "falling": (5 - row // 20) / 4.0,
    }[logits]
    v = torch.randn(1, 4, 1, 1, m, width, generator=generator)  # all queries ask alike, so many columns
    inputs = [x.to(DEVICE, dtype) for x in (q, k, v)]
    check(inputs)
    if logits == "all but one very negative":
        out = kernel.attend_values(*inputs)
        assert torch.equal(out, inputs[2][..., 150:151, :].expand_as(out))


def test_nothing_else_is_written():
    inputs = draw((1, 2, 1, 2, 70, 7, 40), torch.float32)
    room = torch.full((1, 2, 1, 2, 72, 48), torch.nan, device=DEVICE)
    kernel.launch(room[..., 1:71, :40], *inputs)
    assert relative_error(room[..., 1:71, :40], exact(*inputs)) <= 1e-6
    room[..., 1:71, :40] = torch.nan
    assert room.isnan().all()


def test_any_strides():
    """Views of what the UNet's projections make; inputs whose last axis is not contiguous; heads joined for nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (split_heads(torch.randn(8, 20, 3 * 8, generator=generator).to(DEVICE), 3) for _ in range(3))
    q, k, v = (x.unflatten(0, (2, 2, -1)) for x in (q, k, v))
    assert not q.is_contiguous()
    out = kernel.attend_values(q[:, 0], k[:, 0], v)
    assert relative_error(out, exact(q[:, 0], k[:, 0], v)) <= 1e-6
    assert join_heads(out.flatten(0, 2)).data_ptr() == out.data_ptr()
    q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v))
    assert torch.equal(kernel.attend_values(q[:, 0], k[:, 0], v), out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k, v[:, :, :, :, 1:]), "do not fit"),
        (lambda q, k, v: (q.half(), k, v), "should have one type"),
        (lambda q, k, v: (q, k[:, :, :, :0], v[:, :, :, :, :0]), "do not fit"),
        (lambda q, k, v: (q, k, v.repeat(1, 33, 1, 1, 1, 1)), "66 values of width 8"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        kernel.attend_values(*change(*draw((1, 2, 1, 1, 4, 5, 8), torch.float32)))


# ---- the operation ----


def test_it_has_no_derivative():
    q, k, v = draw((1, 2, 1, 1, 4, 5, 8), torch.float32)
    out = kernel.attend_values(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_sees_one_graph(backend):
    inputs = draw((1, 2, 1, 2, 7, 9, 8), torch.float32)

    def layer(q, k, v):
        return join_heads(kernel.attend_values(2 * q, k, v).flatten(0, 2)) + 1

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert relative_error(compiled(*inputs), layer(*inputs)) <= 1e-6


# ---- Prompt-to-Prompt ----


def test_programs_choose_the_kernel_on_cuda_alone():
    assert shared_maps("cpu") is None
    if torch.version.cuda:
        assert shared_maps("cuda") is kernel.SharedMaps


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("step", "p"), [(0, [0.9] * 3), (2, [0.9, 0.4, 0.6]), (2, [0.9] * 3), (3, [0.2] * 3)])
def test_pairs_are_controlled_as_without_the_kernel(cross, step, p, monkeypatch):
    """All of them, some, and none; views as split_heads makes them."""
    launches, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *tensors: launches.append(launch(*tensors)))
    generator = torch.Generator().manual_seed(step)
    q, k, v = (split_heads(torch.randn(12, 16, 16, generator=generator).to(DEVICE), 2) for _ in range(3))
    control = PairControl(5, torch.tensor(p))
    control.next_step(step - 1)
    layer = Layer(0, "down", cross, (4, 4))
    assert relative_error(kernel.SharedMaps(control)(q, k, v, layer), control(q, k, v, layer)) <= 1e-6
    assert len(launches) == (not cross and all(x > step / 4 for x in p))


# ---- the compiler ----


@pytest.mark.parametrize(
    ("architecture", "others"),
    [(90, False), *(pytest.param(x, True, marks=pytest.mark.slow) for x in (80, 90, 100, 120))],
)
def test_it_compiles_for_gpus_that_are_not_here(architecture, others, tmp_path):
    """Every row of TILES fits into the shared memory of each, and into its registers."""
    cases = ["2,40,bfloat16", "2,80,bfloat16", "2,160,float32"]
    if others:
        widths = ("1,8", "2,40", "2,80", "2,160")
        cases = [f"{width},{dtype}" for width in widths for dtype in ("bfloat16", "float16", "float32")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, ROOT / "tests/gpu/compiled_kernel.py", str(architecture), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert [facts["case"] for facts in made] == cases
    for facts in made:
        print(facts)
        assert facts["shared"] <= (227 if architecture in (90, 100) else 99) * 1024  # of a block (99: sm_86, 89, 120)
        assert facts["spilled"] <= 128  # of the 1020 bytes of a thread's registers
        # 16 bits on tensor cores, bfloat16 in part as tf32; and float32 not, since there it would be tf32
        dtype = facts["case"].split(",")[-1]
        assert bool(facts["multiplies"]) == (dtype != "float32")
        assert ("tf32" in facts["multiplies"]) == (dtype == "bfloat16")
