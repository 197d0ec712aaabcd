"""batches.py: which pairs a step sees and which random numbers, whoever computes it; latents and texts of pairs."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_model
from dataset_of_true_pairs import write_pairs
from reference import relative_error

from batches import Contexts, Draws, LatentPairs, PicturePairs
from cli import UserError
from dataset import EditDataset
from images import to_tensor
from mini.world import random_edit, render

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = partial(torch.autocast, "cpu", enabled=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty pairs: 18 for training. Shared: copy before changing it."""
    return write_pairs(tmp_path_factory.mktemp("batches") / "pairs", 20)


@pytest.fixture(scope="module")
def latents(data):
    """(model, its LatentPairs of the training split)."""
    model = tiny_model()
    return model, LatentPairs(model, EditDataset(data), "cpu", EXACT)


# ---- chance ----


def all_of(draws):
    return draws.order(10), draws.normal(2, 3), draws.whole(1000), draws.uniform()


def test_parts_of_a_batch_see_what_the_whole_sees():
    """Whatever the cut: order, normal, whole and uniform numbers are those of the examples' positions."""
    whole = all_of(Draws(3, range(84, 96)))
    for size in (1, 3, 4, 6):
        parts = [all_of(Draws(3, range(first, first + size))) for first in range(84, 96, size)]
        for expected, found in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(found), expected)
    assert len(Draws(3, range(84, 96))) == 12


def test_examples_and_seeds_have_their_own_chance():
    first = all_of(Draws(3, range(84, 96)))
    for other in (Draws(3, range(96, 108)), Draws(4, range(84, 96))):
        assert not any(torch.equal(x, y) for x, y in zip(first, all_of(other), strict=True))


@pytest.mark.parametrize(("total", "count"), [(4, 10), (7, 10), (10, 10), (23, 10), (1, 3)])
def test_every_epoch_sees_each_example_once(total, count):
    """Also where steps do not divide an epoch; and each epoch has an order of its own."""
    steps = -(-5 * count // total)
    parts = [Draws(0, range(first, first + total)).order(count) for first in range(0, steps * total, total)]
    seen = torch.cat(parts)[: 5 * count]
    epochs = seen.view(5, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_numbers_are_of_their_kind():
    draws = Draws(0, range(20_000))
    normal, whole, uniform = draws.normal(), draws.whole(7), draws.uniform()
    assert (normal.mean().item(), normal.std().item()) == pytest.approx((0, 1), abs=0.03)
    assert torch.bincount(whole, minlength=7).float().div(20_000).sub(1 / 7).abs().max() < 0.01
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1


# ---- texts ----


def test_an_instruction_is_embedded_once(monkeypatch):
    """However often it comes, in a batch or later; and each as if it were alone."""
    model, seen = tiny_model(), []
    contexts = Contexts(model, "cpu", EXACT)
    encoder = model.text_encoder
    monkeypatch.setattr(model, "text_encoder", lambda ids: seen.append(len(ids)) or encoder(ids))
    texts = ["make it night", "add a moon", "make it night", ""]
    first = contexts(texts)
    assert torch.equal(contexts(texts[::-1]), first.flip(0))
    assert seen == [2]
    with torch.no_grad():
        for text, context in zip(texts, first, strict=True):
            assert relative_error(context, encoder(model.tokenizer([text]))[0]) <= 1e-5


def test_memory_for_instructions_is_limited(monkeypatch):
    """Those that came first are forgotten, and embedded again when they come back."""
    monkeypatch.setattr("batches.REMEMBERED", 24 * 16 * 4 * 10)
    contexts = Contexts(tiny_model(), "cpu", EXACT)
    texts = [f"number {i}" for i in range(30)]
    whole = contexts(texts)
    assert len(contexts.known) == 10
    assert relative_error(contexts(texts[:5]), whole[:5]) <= 1e-5


# ---- pictures ----


def test_pictures_give_what_cached_latents_give(data):
    """Of equal draws, without augmentation: the same latents, targets and texts, but for half precision on disk."""
    model, pairs = tiny_model(), EditDataset(data, resolution=64)
    cached = LatentPairs(model, pairs, "cpu", EXACT, flip=False)
    every = [Draws(0, (4 * step + 1, 4 * step + 2)) for step in range(3)]
    streamed = PicturePairs(model, pairs, "cpu", EXACT, every, 0)
    for step in range(3):
        draws = [Draws(0, (4 * step + 1, 4 * step + 2)) for _ in range(2)]
        for one, two in zip(streamed.batch(draws[0]), cached.batch(draws[1]), strict=True):
            assert one.shape == two.shape
            assert relative_error(one, two) < 2e-3


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_follow_from_the_position_in_the_run(data, workers):
    """So that they do not depend on who computes them: two halves see what the whole sees."""
    model, pairs = tiny_model(), EditDataset(data, resolution=32, largest=48, flip=0.5)

    def batches(size):
        parts = [range(first, first + size) for first in range(20, 28, size)]
        source = PicturePairs(model, pairs, "cpu", EXACT, [Draws(0, part) for part in parts], workers)
        return [source.batch(Draws(0, part)) for part in parts]

    whole, halves = batches(4), batches(2)
    for step in range(2):
        for one, *parts in zip(whole[step], halves[2 * step], halves[2 * step + 1], strict=True):
            assert relative_error(torch.cat(parts), one) < 1e-5


def test_crops_differ_between_seeds_and_epochs(data):
    pairs = EditDataset(data, resolution=32, largest=48, flip=0.5)
    keys = [dict(Draws(seed, range(first, first + 18)).keys(18)) for seed, first in [(0, 0), (0, 18), (1, 0)]]
    assert all(keys[0][number] != other[number] for other in keys[1:] for number in range(18))
    first, second = (pairs[3, key[3]][0] for key in keys[:2])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_they_are(data, tmp_path, workers):
    """From another process, too, where torch would wrap them in a traceback."""
    write_pairs(tmp_path / "pairs", 4)
    for path in (tmp_path / "pairs").glob("*/*_1.jpg"):
        path.unlink()
    pairs = EditDataset(tmp_path / "pairs", "all", resolution=64)
    source = PicturePairs(tiny_model(), pairs, "cpu", EXACT, [Draws(0, range(2))], workers)
    with pytest.raises(UserError, match=r"^1 of 4 pairs are missing or damaged, which is too many; the last one: th"):
        source.batch(Draws(0, range(2)))


# ---- latents ----


@torch.no_grad()
def test_latents_are_those_of_the_pictures(data, latents):
    """Unscaled: the mode for the picture before; mean and spread for the one after. As it is, and mirrored."""
    model, pairs = latents
    assert pairs.before.shape == pairs.after.shape == pairs.spread.shape == (18, 2, 4, 16, 16)
    before, after, _ = zip(*EditDataset(data), strict=True)
    for mirrored in (0, 1):
        x_before, x_after = (torch.stack(x).flip(3) if mirrored else torch.stack(x) for x in (before, after))
        target = model.vae.encode(x_after)
        expected = model.vae.encode(x_before).mode(), target.mode(), target.logvar.float().exp().sqrt()
        for ours, theirs in zip((pairs.before, pairs.after, pairs.spread), expected, strict=True):
            assert relative_error(ours[:, mirrored], theirs) <= 0.01
    for x in (pairs.before, pairs.after):
        assert relative_error(x[:, 0], x[:, 1]) > 0.05  # mirrored pictures, not twice the same ...
        assert relative_error(x[:, 0].flip(3), x[:, 1]) > 0.02  # ... nor mirrored latents
    assert relative_error(pairs.before, pairs.after) > 0.05


def test_texts_are_those_of_the_instructions(data, latents):
    model, pairs = latents
    instructions = [instruction for _, _, instruction in EditDataset(data)]
    assert len(set(instructions)) > 10
    with torch.no_grad():
        expected = model.text_encoder(model.tokenizer(instructions))
        null_text = model.text_encoder(model.tokenizer([""]))
    assert relative_error(pairs.contexts(pairs.texts), expected) <= 1e-5
    assert relative_error(pairs.contexts.null_text, null_text) <= 1e-5
    assert pairs.contexts.null_text.shape == (1, 24, 16)


def test_a_batch_is_of_whole_pairs(latents):
    """The condition: the mode, unscaled. The target: near its mean, scaled. The text of the same pair."""
    _, pairs = latents
    latent, image_latent, text = pairs.batch(Draws(0, range(64)))
    assert latent.shape == image_latent.shape == (64, 4, 16, 16)
    assert latent.dtype == image_latent.dtype == torch.float32
    known = pairs.before.float().flatten(0, 1)
    nearest = torch.cdist(image_latent.flatten(1), known.flatten(1)).argmin(1)
    assert torch.equal(image_latent, known[nearest])
    number, mirrored = nearest // 2, nearest % 2
    z = (latent / pairs.scaling - pairs.after[number, mirrored].float()) / pairs.spread[number, mirrored].float()
    assert z.mean().abs() < 0.02
    assert z.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(text, pairs.contexts([pairs.texts[i] for i in number.tolist()]))
    assert pairs.scaling == 0.5


def test_batches_are_drawn_by_chance(latents):
    """Every pair as often, about half of them mirrored; equal draws give the same."""
    _, pairs = latents
    first, again, other = (pairs.batch(Draws(0, range(5 * step, 5 * step + 5))) for step in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    _, image_latent, _ = pairs.batch(Draws(0, range(3600, 5400)))
    known = pairs.before.float().flatten(0, 1).flatten(1)
    counts = torch.bincount(torch.cdist(image_latent.flatten(1), known).argmin(1), minlength=36).view(18, 2)
    assert counts.sum(1).tolist() == [100] * 18
    assert counts.sum(0)[1].item() == pytest.approx(900, abs=90)
    assert counts.min() > 25


def test_a_target_is_a_sample(latents):
    """Of one pair: spread as the autoencoder says, about its mean."""
    model, _ = latents
    x = to_tensor(render(random_edit(np.random.default_rng(0)).before))
    one = LatentPairs(model, [(x, x, "make it night")], "cpu", EXACT)
    latent, image_latent, _ = one.batch(Draws(0, range(3000)))
    mirrored = (image_latent - one.before[0, 1]).abs().flatten(1).max(1).values < 1e-3
    for side in (0, 1):
        found = latent[mirrored == bool(side)]
        mean, spread = (part[0, side].float() * 0.5 for part in (one.after, one.spread))
        assert (found.mean(0) - mean).abs().max() < 0.15 * spread.max()
        assert relative_error(found.std(0), spread) < 0.05


# ---- a user's mistakes ----


def test_pictures_that_differ_within_every_pair(latents):
    x, y = torch.zeros(3, 64, 64), torch.zeros(3, 32, 64)
    with pytest.raises(UserError, match="differ in size; one size for all is needed"):
        LatentPairs(latents[0], [(x, y, "a"), (x, y, "b")], "cpu", EXACT)


def test_pictures_that_differ_from_a_later_batch_on(latents):
    """Each batch of 64 is encoded apart."""
    x, y = torch.zeros(3, 16, 16), torch.zeros(3, 32, 16)
    with pytest.raises(UserError, match="differ in size; one size for all is needed"):
        LatentPairs(latents[0], [(x, x, "a")] * 64 + [(y, y, "b")], "cpu", EXACT)


def test_other_errors_are_not_called_so(latents):
    """A picture that the autoencoder cannot take is no matter of sizes that differ."""
    x = torch.zeros(5, 64, 64)
    with pytest.raises(RuntimeError, match="channels"):
        LatentPairs(latents[0], [(x, x, "a")], "cpu", EXACT)
