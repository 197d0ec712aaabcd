"""Compiling: one graph for all steps, the same pictures, and a training that does not trust it blindly."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, colourful, tiny_model
from random_model import random_model
from reference import relative_error

from attention import fused, reference
from cli import UserError
from formats.checkpoint import load
from gpu.compiled import compiled, compiling
from images import open_image
from ip2p import InstructPix2Pix
from p2p import PairNoise, sample_pairs
from stable_diffusion import StableDiffusion
from unet import INSTRUCT_PIX2PIX, UNet, doubled

MINI = ROOT / "models" / "mini"
TEXTS = [("a red house by the sea", "a red tree by the sea"), ("a house at night", "a small house at night")]


@contextlib.contextmanager
def only_known_code():
    """Whatever would be compiled in here is an error."""
    torch.compiler.set_stance("fail_on_recompile")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@pytest.fixture(autouse=True)
def fresh(one_thread):
    """Nothing compiled before."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def difference(ours, theirs):
    """The largest one, of 255, over lists of pictures."""
    return max(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() for a, b in zip(ours, theirs, strict=True))


# ---- sampling ----


def test_one_graph_serves_every_step_scale_and_instruction():
    """Without a break in it: `compile` asks for the full graph, and torch would refuse."""
    image, graphs = colourful(128, 128), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = InstructPix2Pix(random_model())
    plain = model.edit(image, "make it night", seed=[0, 1])
    model.compile(backend=counting)
    assert difference(model.edit(image, "make it night", seed=[0, 1]), plain) <= 1
    assert len(graphs) == 3  # a step, the guidance, the decoder
    with only_known_code():
        others = model.edit(image, "make it a sketch", [3.0, 5.0], [1.0, 2.0], steps=7, seed=[0, 1])
        assert difference(model.edit(image, "make it night", seed=[0, 1]), plain) <= 1
    assert difference(others, plain) > 5


@pytest.mark.parametrize("control", ["self", "cross", "both"])
def test_pairs_need_a_graph_for_every_set_of_pairs_that_may_be_controlled(control):
    """Some or none, and not one for every step; and one for the decoder. (With the kernel also: all.)"""
    model, graphs = StableDiffusion(random_model(in_channels=4)), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def draw(seeds):
        noise = PairNoise(seeds, (4, 16, 16), (3.0, 5.0))
        return torch.cat(sample_pairs(model, *zip(*TEXTS, strict=True), noise, 6, control=control))

    plain = draw([0, 1]), draw([2, 3])
    model.compile(backend=counting)
    assert relative_error(draw([0, 1]), plain[0]) <= 1e-4
    assert len(graphs) <= 3
    with only_known_code():
        assert relative_error(draw([2, 3]), plain[1]) <= 1e-4


def test_decoding_in_bands_is_not_compiled():
    model = InstructPix2Pix(random_model())
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = model.decode(latent, low_memory=True)
    model.compile(backend="eager")
    with only_known_code():
        assert relative_error(model.decode(latent, low_memory=True), plain) <= 1e-5


def test_the_compiler_is_not_loaded_for_nothing():
    """It takes a second."""
    program = "import sys, sample, datagen, ip2p, text2image; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_many_sizes_may_be_compiled():
    """More than the eight at which torch would give up."""
    double = compiled(lambda x: 2 * x, fullgraph=True, backend="eager")
    assert [double(torch.ones(count)).sum().item() for count in range(1, 13)] == [2 * n for n in range(1, 13)]


def test_what_cannot_be_compiled_is_one_line():
    def failing(graph, inputs):
        raise RuntimeError("no compiler here\nat all")

    words = r"^the networks could not be compiled here \(.*\); take another road$"
    with pytest.raises(UserError, match=words), compiling("take another road"):
        compiled(torch.sin, backend=failing)(torch.ones(2))


def test_it_is_kept_where_the_user_keeps_such_things(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled(torch.sin)
    assert torch._inductor.runtime.cache_dir_utils.cache_dir() == str(tmp_path / "ip2p" / "compiled")


# ---- the same pictures ----


@pytest.fixture(scope="module")
def scene():
    return open_image(ROOT / "examples" / "scene.png")


@pytest.fixture(scope="module")
def plain(scene):
    """Two edits by the bundled miniature, in float32, as it is."""
    return InstructPix2Pix.load(MINI / "editor").edit(scene, "make it night", seed=[0, 3])


def test_another_memory_layout_gives_the_same_edit(scene, plain):
    model = InstructPix2Pix.load(MINI / "editor")
    model.unet.to(memory_format=torch.channels_last)
    model.vae.to(memory_format=torch.channels_last)
    assert difference(model.edit(scene, "make it night", seed=[0, 3]), plain) <= 1


def psnr(ours, theirs):
    """The smallest one in dB, over lists of pictures."""
    pairs = [(np.asarray(one, float), np.asarray(other, float)) for one, other in zip(ours, theirs, strict=True)]
    return min(-10 * np.log10(np.square((one - other) / 255).mean()) for one, other in pairs)


def test_half_precision_looks_the_same(scene, plain):
    model = InstructPix2Pix.load(MINI / "editor", dtype=torch.bfloat16)
    assert psnr(model.edit(scene, "make it night", seed=[0, 3]), plain) > 35


@pytest.mark.slow
def test_compiled_code_gives_the_same_edit(scene, plain):
    model = InstructPix2Pix.load(MINI / "editor")
    model.compile()
    assert difference(model.edit(scene, "make it night", seed=[0, 3]), plain) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "mode"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "reduce-overhead")]
)
def test_compiled_code_gives_the_same_edit_on_a_gpu(scene, dtype, mode):
    """Also from CUDA graphs."""
    usual = InstructPix2Pix.load(MINI / "editor", "cuda").edit(scene, "make it night", seed=[0, 3])
    model = InstructPix2Pix.load(MINI / "editor", "cuda", dtype)
    model.compile(mode=mode)
    edited = model.edit(scene, "make it night", seed=[0, 3])
    assert difference(edited, usual) <= 1 if dtype == torch.float32 else psnr(edited, usual) > 35


@pytest.mark.gpu
@pytest.mark.parametrize("control", ["self", "both"])
def test_compiled_code_gives_the_same_pairs_on_a_gpu(control):
    """At steps with all, some and none of the pairs controlled."""
    model = StableDiffusion(load(MINI / "sd", "cuda"))

    def draw():
        noise = PairNoise([0, 1], (4, 16, 16), (3.0, 5.0), device="cuda")
        noise.p[:] = torch.tensor([0.3, 0.6])
        return torch.cat(sample_pairs(model, *zip(*TEXTS, strict=True), noise, 6, control=control))

    plain = draw()
    model.compile()
    assert relative_error(draw(), plain) <= 1e-2


# ---- training ----


@pytest.mark.parametrize("size", [(16, 16), (15, 16), (8, 23), (1, 1)])
def test_doubling_is_the_nearest_interpolation(size):
    x = torch.randn(2, 3, *((side + 1) // 2 for side in size), requires_grad=True)
    ours, theirs = doubled(x, size), F.interpolate(x, size=size, mode="nearest")
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(theirs)
    found, expected = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs))
    assert torch.allclose(found, expected, atol=1e-6)


def gradient(network, inputs, attend, dtype):
    """Of all weights, by name, as a list."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        network(*inputs, attend=attend).square().mean().backward()
    found = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "miniature"])
def test_a_compiled_gradient_is_as_good_as_the_plain_one(name):
    """In bfloat16, for which torch 2.13's compiler loses gradients below an interpolation (see unet.doubled)."""
    made = tiny_model() if name == "tiny" else load(MINI / "editor")
    unet, generator = made.unet.requires_grad_(True), torch.Generator().manual_seed(0)
    z = torch.randn(3, 8, 16, 16, generator=generator)
    text = made.text_encoder.config
    inputs = z, torch.tensor([1, 400, 999]), torch.randn(3, text.tokens, text.width, generator=generator)
    exact, plain = (gradient(unet, inputs, reference, dtype) for dtype in (torch.float32, torch.bfloat16))
    fast = torch.compile(unet, dynamic=False)
    found = gradient(fast, inputs, reference, torch.bfloat16)

    def error(gradients):
        return relative_error(*(torch.cat([part.flatten() for part in parts]) for parts in (gradients, exact)))

    assert error(found) <= 2 * error(plain) + 0.01
    assert not [i for i, (ours, theirs) in enumerate(zip(found, exact, strict=True)) if theirs.any() and not ours.any()]


def test_the_fused_kernels_are_in_the_graph():
    """A compiled UNet still never holds an attention map."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network = torch.compile(tiny_model().unet, fullgraph=True, backend=keep)
    z, context = torch.randn(1, 8, 16, 16), torch.randn(1, 24, 16)
    network(z, torch.tensor([5]), context, attend=fused)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("scaled_dot_product_attention" in name for name in called) == 2 * 4
    assert not any("softmax" in name for name in called)


@torch.no_grad()
def test_the_full_size_is_one_graph():
    """Traced with tensors that take no memory."""
    with torch.device("meta"):
        unet = UNet(INSTRUCT_PIX2PIX)
        z, context = torch.zeros(3, 8, 64, 64), torch.zeros(3, 77, 768)
        t = torch.zeros(3)
    graphs = torch._dynamo.explain(unet)(z, t, context)
    assert (graphs.graph_count, graphs.graph_break_count) == (1, 0)
