"""The miniature's world: edits change what they say and nothing else, and what is held out stays held out."""

import itertools
import re
from dataclasses import fields, replace

import numpy as np
import pytest

from mini.phrasings import HELD_OUT, PHRASINGS
from mini.pretrain import train_tokenizer, world_texts
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
    render,
)

BOX = {"left": np.s_[16:60, :40], "right": np.s_[16:60, 24:]}  # the largest thing, its shadow, and a mosaic's tiles


def pixels(scene):
    return np.asarray(render(scene))


def edits(kind, count, **how):
    rng = np.random.default_rng(0)
    return [random_edit(rng, kind, **how) for _ in range(count)]


def differing(before, after):
    """The names of the fields in which two dataclasses differ."""
    return [field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)]


def every_text(phrasings):
    """Every instruction that the templates can become."""
    choices = {"shape": SHAPES, "other": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
    texts = set()
    for template in itertools.chain(*phrasings.values()):
        slots = sorted(set(re.findall(r"{(\w+)}", template)))
        for words in itertools.product(*(choices[slot] for slot in slots)):
            texts.add(template.format(**dict(zip(slots, words, strict=True))))
    return texts


def test_equal_scenes_give_equal_pixels():
    rng = np.random.default_rng(0)
    for scene in [random_scene(rng) for _ in range(10)]:
        first = pixels(scene)
        assert (first.shape, first.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert np.array_equal(first, pixels(replace(scene)))
        assert not np.array_equal(first, pixels(replace(scene, layout=scene.layout + 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_only_what_it_says(kind):
    """One attribute of the scene; and of the image, if it is a thing's, only the pixels around the thing."""
    sides = set()
    for edit in edits(kind, 60):
        (name,) = differing(edit.before, edit.after)
        sides.add(name)
        if kind in ("background", "medium"):
            assert name == kind
            continue
        old, new = getattr(edit.before, name), getattr(edit.after, name)
        if kind in ("add", "remove"):
            assert (old is None, new is None) == (kind == "add", kind == "remove")
        else:
            assert differing(old, new) == [kind]
        changed = (pixels(edit.before) != pixels(edit.after)).any(2)
        assert changed.sum() >= 20
        changed[BOX[name]] = False
        assert not changed.any()
    assert sides == ({kind} if kind in ("background", "medium") else set(BOX))


@pytest.mark.parametrize("new_phrasing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_instruction_says_what_changes(kind, new_phrasing):
    """The words are taken from the scenes, apart from how world.py fills them in."""
    phrasings, used = HELD_OUT if new_phrasing else PHRASINGS, set()
    for edit in edits(kind, 500, new_phrasing=new_phrasing):
        (name,) = differing(edit.before, edit.after)
        old, new = getattr(edit.before, name), getattr(edit.after, name)
        if kind in ("background", "medium"):
            key, words = new, {}
        else:
            key = new.size if kind == "size" else kind
            if kind == "add":
                words = {**vars(new), "other": edit.before.things[0].shape}
            else:
                words = {"shape": old.shape} | ({"colour": new.colour, "other": new.shape} if new else {})
        told = {template.format(**words): template for template in phrasings[key]}
        assert edit.instruction in told
        used.add(told[edit.instruction])
    keys = {"background": tuple(BACKGROUNDS), "medium": MEDIA, "size": tuple(SIZES)}.get(kind, [kind])
    assert used == {template for key in keys for template in phrasings[key]}


def test_a_caption_says_all_but_the_layout():
    rng = np.random.default_rng(0)
    scenes = [replace(random_scene(rng, test), layout=0) for test in (False, True) for _ in range(2000)]
    assert len({caption(scene) for scene in scenes}) == len(set(scenes)) > 1000


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


def test_a_tenth_of_all_compositions_is_held_out():
    things = [Thing(*words) for words in itertools.product(SHAPES, COLOURS, SIZES)]
    one = [held_out(Scene(*words, None, 0)) for words in itertools.product(MEDIA, BACKGROUNDS, things)]
    assert np.mean(one) == pytest.approx(0.1, abs=0.02)
    pairs = [pair for pair in itertools.permutations(things[::3], 2) if pair[0].shape != pair[1].shape]
    two = [held_out(Scene(*words, *pair, 0)) for *words, pair in itertools.product(MEDIA, BACKGROUNDS, pairs)]
    assert np.mean(two) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("test", [False, True])
def test_training_never_sees_a_held_out_composition(test):
    rng = np.random.default_rng(2)
    assert all(held_out(random_scene(rng, test)) == test for _ in range(300))
    for kind in KINDS:
        for edit in edits(kind, 40 if test else 300, test=test):
            assert held_out(edit.before) == held_out(edit.after) == test


def test_held_out_phrasings_are_new():
    assert HELD_OUT.keys() == PHRASINGS.keys()
    assert all(len(templates) >= 2 for templates in HELD_OUT.values())
    assert not every_text(HELD_OUT) & every_text(PHRASINGS)
