"""Text2Live: its losses beside independent lines and transformers' CLIP, its optimiser, its views, and a whole edit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import colourful
from random_model import randomise, small_tokenizer
from reference import clip_reference

from baselines import text2live as module
from baselines.layer_network import LayerNetwork
from baselines.text2live import (
    GREEN,
    MADGRAD,
    Recipe,
    composite,
    direction_loss,
    sparsity_loss,
    spherical,
    structure_loss,
    text2live,
    total_loss,
)  # fmt: skip
from baselines.views import clip_views, perspective, training_view, warp
from clip_image import CLIP, MEAN, STD, CLIPImageConfig
from clip_text import CLIPTextConfig
from formats.checkpoint import load_clip
from images import to_tensor
from mini.evaluation import held_out_edits
from mini.world import caption, render

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def clip():
    tokenizer = small_tokenizer()
    text = CLIPTextConfig(len(tokenizer.vocabulary), tokenizer.tokens, 32, 2, 2, end_token=tokenizer.end, projection=16)
    image = CLIPImageConfig(size=32, patch=8, width=32, layers=3, heads=2, projection=16)
    return randomise(CLIP(text, image), seed=1).eval().requires_grad_(False), tokenizer


# ---- the losses ----


def test_each_loss_equals_its_equation():
    x, y = normal(5, 7).numpy(), normal(1, 7, seed=1).numpy()
    angles = [math.acos(row @ y[0] / np.linalg.norm(row) / np.linalg.norm(y)) for row in x]
    close = {"rel": 1e-9}
    assert spherical(*map(torch.tensor, (x, y))).item() == pytest.approx(np.mean([a**2 / 2 for a in angles]), **close)
    expected = np.mean([1 - math.cos(angle) for angle in angles])
    assert direction_loss(*map(torch.tensor, (x, y))).item() == pytest.approx(expected, **close)

    edited, image = normal(6, 7, seed=2).numpy(), normal(6, 7, seed=3).numpy()
    cosines = [[[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in x] for b in x] for x in (edited, image)]
    expected = np.mean((np.array(cosines[0]) - np.array(cosines[1])) ** 2)
    assert structure_loss(*(torch.tensor(x)[None] for x in (edited, image))).item() == pytest.approx(expected, **close)

    opacity = torch.rand(1, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = np.mean([0.01 * a + 0.01 * (2 / (1 + math.exp(-5 * a)) - 1) for a in opacity.flatten().tolist()])
    assert sparsity_loss(opacity).item() == pytest.approx(expected, **close)


def test_the_whole_loss_beside_transformers(clip, monkeypatch):
    """The sum with the released code's weights, and transformers' features; one view and one template, not random."""
    monkeypatch.setattr(module, "clip_views", lambda image, size, *_: F.interpolate(image, (size, size), mode="area"))
    image, colour, opacity = torch.rand(3, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    opacity, theirs, tokenizer = opacity[:, :1], clip_reference(clip[0]), clip[1]

    def seen(x, mode="area", **how):
        x = F.interpolate(x, (32, 32), mode=mode, **how)
        pixels = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        hidden = theirs.vision_model(pixels, output_hidden_states=True)
        return theirs.visual_projection(hidden.pooler_output)[0].numpy(), hidden.hidden_states[-2][0].numpy()

    def text(words):
        return theirs.text_projection(theirs.text_model(tokenizer([words])).pooler_output)[0].numpy()

    def cosine(x, y):
        return x @ y.T / np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(y, axis=-1)

    with torch.no_grad():
        edited = image * (1 - opacity) + colour * opacity
        screen = torch.tensor(GREEN).view(3, 1, 1) * (1 - opacity) + colour * opacity
        out, inside, green = seen(edited)[0], seen(image)[0], seen(screen)[0]
        tokens = [seen(x, "bicubic", align_corners=False)[1] for x in (edited, image)]
        before, after, on_green = text("a house."), text("a tree."), text("tree, on green")
        expected = math.acos(cosine(out, after).item()) ** 2 / 2 + 1 - cosine(out - inside, after - before).item()
        expected += math.acos(cosine(green, on_green).item()) ** 2 / 2
        expected += 2 * np.mean((cosine(tokens[0], tokens[0]) - cosine(tokens[1], tokens[1])) ** 2)
        expected += 6 * sparsity_loss(opacity).item()
        recipe = Recipe(("a {}.",), ("{}, on green",))
        ours = total_loss(*clip, lambda _: (colour, opacity), image, "house", "tree", recipe)
    assert ours.item() == pytest.approx(expected, rel=1e-4)


def test_the_layer_lies_over_the_image():
    image, colour = torch.rand(2, 1, 3, 4, 4)
    assert torch.equal(composite(image, colour, torch.zeros(1, 1, 4, 4)), image)
    assert torch.equal(composite(image, colour, torch.ones(1, 1, 4, 4)), colour)


# ---- the optimiser, the network, the views ----


def test_madgrad_equals_its_recursion():
    """On a quartic in float64, with another rate at every step."""
    start, rates = normal(6), [0.1, 0.05, 0.2, 0.01, 0.1]
    parameter = start.clone().requires_grad_()
    optimizer = MADGRAD([parameter])
    x0 = x = start.numpy().copy()
    s, v = np.zeros(6), np.zeros(6)
    for k, rate in enumerate(rates):
        (parameter**4).sum().backward()
        optimizer.step(rate)
        g = 4 * x**3 + 0.01 * x
        weight = (rate + 1e-6) * np.sqrt(k + 1)
        s, v = s + weight * g, v + weight * g * g
        x = 0.9 * x + 0.1 * (x0 - s / (np.cbrt(v) + 1e-6))
        np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=1e-9)
    assert parameter.grad is None


@pytest.mark.parametrize(("size", "scales"), [((64, 64), 4), ((97, 130), 4), ((512, 256), 6)])
def test_the_network_predicts_a_layer_of_the_images_size(size, scales):
    network = LayerNetwork(min(size), width=8)
    colour, opacity = network(torch.rand(1, 3, *size))
    assert (colour.shape, opacity.shape) == ((1, 3, *size), (1, 1, *size))
    assert 0 < min(colour.min(), opacity.min()) < max(colour.max(), opacity.max()) < 1
    depth, scale = 0, network.scale
    while hasattr(scale, "inner"):
        depth, scale = depth + 1, scale.inner
    assert depth == scales
    (colour.mean() * opacity.std()).backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())


def test_views_are_random_parts_of_the_image():
    torch.manual_seed(0)
    image = (to_tensor(colourful(96, 64))[None] + 1) / 2
    views = clip_views(image, 32)
    assert views.shape == (16, 3, 32, 32)
    assert -0.1 < views.min() < views.max() < 1.1
    assert (views[1:] - views[:-1]).abs().amax(dim=(1, 2, 3)).min() > 0.1
    sizes = {tuple(training_view(image).shape[2:]) for _ in range(20)}
    assert len(sizes) > 10
    assert all(0.8 * 0.85 * 64 - 2 <= height <= 1.2 * 64 for height, _ in sizes)


def test_perspective_moves_the_corners_and_leaves_white_behind():
    torch.manual_seed(0)
    image = (to_tensor(colourful(64, 64))[None] + 1) / 2
    torch.testing.assert_close(warp(image, torch.eye(3)[None]), image)
    torch.manual_seed(0)
    moved = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]) * (1 - 0.4 * torch.rand(4, 2))
    torch.manual_seed(0)
    matrix = perspective()
    points = torch.cat([moved, torch.ones(4, 1)], dim=1) @ matrix.T
    torch.testing.assert_close(points[:, :2] / points[:, 2:], moved.sign())
    assert torch.equal(warp(image, matrix[None])[0, :, 0, 0], torch.ones(3))


# ---- a whole edit ----


@torch.no_grad()
def test_an_edit_moves_towards_its_caption():
    """On a scene of the miniature, in few iterations. Equal seeds give equal edits; other random numbers stay."""
    clip, edit = load_clip("models/mini/clip"), held_out_edits(14)[0]
    image, texts = render(edit.before), (caption(edit.before), caption(edit.after))
    recipe = Recipe(("{}",), (), width=8, views=4, mirror=0.0)
    torch.manual_seed(5)
    first = text2live(clip, image, *texts, steps=1, recipe=recipe)
    drawn = torch.rand(3)
    edited, layer, opacity = text2live(clip, image, *texts, steps=25, recipe=recipe)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert np.array_equal(first[0], text2live(clip, image, *texts, steps=1, recipe=recipe)[0])
    assert edited.size == layer.size == opacity.size == image.size
    assert (edited.mode, layer.mode, opacity.mode) == ("RGB", "RGB", "L")
    before, start, end = ((to_tensor(x)[None] + 1) / 2 for x in (image, first[0], edited))
    ids = [clip[1]([text]) for text in texts]
    scores = [clip[0].edit_similarities(before, after, *ids)["clip_sim_dir"].item() for after in (start, end)]
    assert scores[1] > scores[0] + 0.1
