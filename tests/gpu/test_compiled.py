"""Compiling: one graph for all steps, and the same images."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import ROOT, colourful
from random_model import random_model, tiny_model
from reference import relative_error

from attention import fused
from formats.checkpoint import load
from gpu.compiled import compile_model
from images import open_image
from ip2p import InstructPix2Pix
from p2p import PairNoise, sample_pairs
from stable_diffusion import StableDiffusion
from unet import INSTRUCT_PIX2PIX, UNet

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
    """The largest one, of 255, over lists of images."""
    return max(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() for a, b in zip(ours, theirs, strict=True))


def counted(module):
    """Compile a module's forward in place by such a backend; returns the list of its graphs."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module.forward = torch.compile(module.forward, dynamic=False, fullgraph=True, backend=counting)
    return graphs


@pytest.mark.slow
def test_one_graph_serves_every_step_scale_and_instruction():
    """Without a break in it: torch would refuse."""
    image, model = colourful(128, 128), InstructPix2Pix(random_model())
    plain = model.edit(image, "make it night", seed=[0, 1])
    graphs = counted(model.unet)
    assert difference(model.edit(image, "make it night", seed=[0, 1]), plain) <= 1
    assert len(graphs) == 1
    with only_known_code():
        others = model.edit(image, "make it a sketch", [3.0, 5.0], [1.0, 2.0], steps=7, seed=[0, 1])
        assert difference(model.edit(image, "make it night", seed=[0, 1]), plain) <= 1
    assert difference(others, plain) > 5


@pytest.mark.slow
def test_pairs_need_two_graphs():
    """With and without control; not one a step or a batch."""
    model = StableDiffusion(random_model(in_channels=4))

    def draw(seeds):
        noise = PairNoise(seeds, (4, 8, 8), (3.0, 5.0))
        noise.p[:] = torch.tensor([0.3, 0.7])  # at 3 steps: both, one, none
        return torch.cat(sample_pairs(model, *zip(*TEXTS, strict=True), noise, 3))

    plain, graphs = draw([0, 1]), counted(model.unet)
    assert relative_error(draw([0, 1]), plain) <= 1e-4
    assert len(graphs) == 2
    with only_known_code():
        assert draw([2, 3]).isfinite().all()


@pytest.fixture(scope="module")
def scene():
    return open_image(ROOT / "examples" / "scene.png")


@pytest.fixture(scope="module")
def plain(scene):
    """Two edits by the bundled miniature, in float32, as it is."""
    return InstructPix2Pix.load(MINI / "editor").edit(scene, "make it night", seed=[0, 3])


def psnr(ours, theirs):
    """The smallest one in dB, over lists of images."""
    pairs = [(np.asarray(one, float), np.asarray(other, float)) for one, other in zip(ours, theirs, strict=True)]
    return min(-10 * np.log10(np.square((one - other) / 255).mean()) for one, other in pairs)


@pytest.mark.slow
def test_half_precision_looks_the_same(scene, plain):
    model = InstructPix2Pix.load(MINI / "editor", dtype=torch.bfloat16)
    assert psnr(model.edit(scene, "make it night", seed=[0, 3]), plain) > 35


@pytest.mark.slow
def test_compiled_code_gives_the_same_edit(scene, plain):
    model = InstructPix2Pix.load(MINI / "editor")
    model.unet.forward = torch.compile(model.unet.forward, dynamic=False, fullgraph=True)
    assert difference(model.edit(scene, "make it night", seed=[0, 3]), plain) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "mode"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "reduce-overhead")]
)
def test_compiled_code_gives_the_same_edit_on_a_gpu(scene, dtype, mode):
    """Also from CUDA graphs."""
    usual = InstructPix2Pix.load(MINI / "editor", "cuda").edit(scene, "make it night", seed=[0, 3])
    model = InstructPix2Pix.load(MINI / "editor", "cuda", dtype)
    compile_model(model, mode=mode)
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
    compile_model(model)
    assert relative_error(draw(), plain) <= 1e-2


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


@pytest.mark.slow
@torch.no_grad()
def test_the_full_size_is_one_graph():
    """Traced with tensors that take no memory."""
    with torch.device("meta"):
        unet = UNet(INSTRUCT_PIX2PIX)
        z, context = torch.zeros(3, 8, 64, 64), torch.zeros(3, 77, 768)
        t = torch.zeros(3)
    graphs = torch._dynamo.explain(unet)(z, t, context)
    assert (graphs.graph_count, graphs.graph_break_count) == (1, 0)
