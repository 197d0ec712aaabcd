"""The miniature's world: edits change what they say and nothing else, and what is held out stays held out."""

import itertools
import re
from dataclasses import fields, replace

import numpy as np
import pytest

from mini.phrasings import HELD_OUT, PHRASINGS
from mini.pretrain_clip import train_tokenizer, world_texts
from mini.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MEDIA,
    SHAPES,
    SIZE,
    SIZES,
    Scene,
    Thing,
    caption,
    held_out,
    random_edit,
    random_scene,
    read_caption,
    render,
)

BOX = {"left": np.s_[16:60, :40], "right": np.s_[16:60, 24:]}  # the largest thing, its shadow, and a mosaic's tiles
THING = f"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
def pixels(scene):
    return np.asarray(render(scene))


def edits(kind=None, count=60, seed=0, **how):
    rng = np.random.default_rng(seed)
    return [random_edit(rng, kind, **how) for _ in range(count)]


def filled(templates):
    """Every text that the templates of one key can become."""
    choices = {"shape": SHAPES, "other": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
    for template in templates:
        slots = sorted(set(re.findall(r"{(\w+)}", template)))
        for words in itertools.product(*(choices[slot] for slot in slots)):
            yield template.format(**dict(zip(slots, words, strict=True)))


def every_text(phrasings):
    return {text for templates in phrasings.values() for text in filled(templates)}


def captions_of_one_thing():
    """All of them, as scenes."""
    return [
        Scene(medium, background, Thing(shape, colour, size), None, 0)
        for medium, background, shape, colour, size in itertools.product(MEDIA, BACKGROUNDS, SHAPES, COLOURS, SIZES)
    ]


# ---- images ----


def test_equal_scenes_give_equal_pixels():
    rng = np.random.default_rng(0)
    for scene in [random_scene(rng) for _ in range(10)]:
        first = pixels(scene)
        assert first.shape == (SIZE, SIZE, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, pixels(replace(scene)))
        assert not np.array_equal(first, pixels(replace(scene, layout=scene.layout + 1)))


# ---- edits ----


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_only_what_it_says(kind):
    for edit in edits(kind):
        before, after = edit.before, edit.after
        assert edit.kind == kind
        changed = {field.name for field in fields(Scene) if getattr(before, field.name) != getattr(after, field.name)}
        assert len(changed) == 1
        (name,) = changed
        if kind in ("background", "medium"):
            assert name == kind
            continue
        assert name in BOX
        old, new = getattr(before, name), getattr(after, name)
        if kind == "add":
            assert old is None
            assert len(after.things) == 2
        elif kind == "remove":
            assert new is None
            assert len(before.things) == 2
        else:
            assert {f.name for f in fields(Thing) if getattr(old, f.name) != getattr(new, f.name)} == {kind}


@pytest.mark.parametrize("kind", ["colour", "shape", "size", "add", "remove"])
def test_the_pixels_elsewhere_stay(kind):
    sides = set()
    for edit in edits(kind, 40):
        (side,) = (side for side in BOX if getattr(edit.before, side) != getattr(edit.after, side))
        before, after = pixels(edit.before), pixels(edit.after)
        changed = (before != after).any(2)
        assert changed.sum() >= 20
        changed[BOX[side]] = False
        assert not changed.any()
        sides.add(side)
    assert sides == set(BOX)


@pytest.mark.parametrize("new_phrasing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_instruction_says_what_changes(kind, new_phrasing):
    """The words are taken from the scenes, apart from how world.py fills them in."""
    phrasings, used = HELD_OUT if new_phrasing else PHRASINGS, set()
    for edit in edits(kind, 500, new_phrasing=new_phrasing):
        before, after = edit.before, edit.after
        if kind in ("background", "medium"):
            key, words = getattr(after, kind), {}
        else:
            (side,) = (side for side in BOX if getattr(before, side) != getattr(after, side))
            old, new = getattr(before, side), getattr(after, side)
            key = new.size if kind == "size" else kind
            if kind == "add":
                words = {**vars(new), "other": before.things[0].shape}
            else:
                words = {"shape": old.shape} | ({"colour": new.colour, "other": new.shape} if new else {})
        told = {template.format(**words): template for template in phrasings[key]}
        assert edit.instruction in told
        used.add(told[edit.instruction])
    keys = {"background": tuple(BACKGROUNDS), "medium": MEDIA, "size": tuple(SIZES)}.get(kind, [kind])
    assert used == {template for key in keys for template in phrasings[key]}


# ---- words ----


def test_captions_are_read_back():
    """All of training's and of the held-out ones; the layout is no part of a caption."""
    rng = np.random.default_rng(0)
    for scene in (random_scene(rng, test) for test in (False, True) for _ in range(300)):
        assert read_caption(caption(scene), scene.layout) == scene


def test_every_text_fits_the_text_tower():
    """24 tokens with start and end, and each word of the world one token; also in words that training never used."""
    tokenizer = train_tokenizer(world_texts()[::16])
    rng = np.random.default_rng(0)
    captions = {caption(random_scene(rng, test)) for test in (False, True) for _ in range(300)}
    texts = every_text(PHRASINGS) | captions
    for text in texts:
        words = re.findall(r"[a-z]+|,", text)
        assert tokenizer.bpe.encode(text).ids == [tokenizer.vocabulary[f"{word}</w>"] for word in words], text
    for text in texts | every_text(HELD_OUT):
        assert tokenizer.cut_off(text) == ""
        assert tokenizer([text]).shape == (1, 24)


# ---- what is held out ----


def test_a_tenth_of_all_compositions_is_held_out():
    one = [held_out(scene) for scene in captions_of_one_thing()]
    assert np.mean(one) == pytest.approx(0.1, abs=0.02)
    two = [
        held_out(Scene(medium, background, Thing(left, colour, size), Thing(right, other, "small"), 0))
        for medium, background, (left, right), colour, other, size in itertools.product(
            MEDIA, BACKGROUNDS, itertools.permutations(SHAPES[::2], 2), COLOURS, COLOURS, SIZES
        )
    ]
    assert np.mean(two) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("test", [False, True])
def test_training_never_sees_a_held_out_composition(test):
    rng = np.random.default_rng(2)
    assert all(held_out(random_scene(rng, test)) == test for _ in range(300))
    for kind in KINDS:
        for edit in edits(kind, 40 if test else 300, test=test):
            assert held_out(edit.before) == held_out(edit.after) == test


def test_held_out_phrasings_are_new():
    keys = {*KINDS, *BACKGROUNDS, *MEDIA, *SIZES} - {"background", "medium", "size"}
    assert HELD_OUT.keys() == PHRASINGS.keys() == keys
    for key in PHRASINGS:
        assert len(HELD_OUT[key]) >= 2
        assert not set(HELD_OUT[key]) & set(PHRASINGS[key])
        templates = [*HELD_OUT[key], *PHRASINGS[key]]
        slots = {"colour": {"shape", "colour"}, "shape": {"shape", "other"}, "remove": {"shape"}}
        slots |= {"large": {"shape"}, "small": {"shape"}, "add": {"size", "colour", "shape", "other"}}
        assert all(set(re.findall(r"{(\w+)}", template)) <= slots.get(key, set()) for template in templates)
    assert not every_text(HELD_OUT) & every_text(PHRASINGS)
