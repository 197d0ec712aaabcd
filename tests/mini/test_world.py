"""The miniature's world: edits change what they say and nothing else, and what is held out stays held out."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest

from mini.drawing import SIZE, render
from mini.words import caption
from mini.world import KINDS, OPTIONS, SIMPLE, Scene, Thing, held_out, random_edit, random_scene

# the largest thing, its shadow, and a mosaic's tiles
BOX = {"left": np.s_[32:120, :80], "right": np.s_[32:120, 48:]}


def pixels(scene):
    return np.asarray(render(scene))


def edits(kind, count, **how):
    rng = np.random.default_rng(0)
    return [random_edit(rng, kind, **how) for _ in range(count)]


def differing(before, after):
    """The names of the fields in which two dataclasses differ."""
    return [field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)]


def test_equal_scenes_give_equal_pixels():
    rng = np.random.default_rng(0)
    for scene in [random_scene(rng) for _ in range(10)]:
        first = pixels(scene)
        assert (first.shape, first.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert np.array_equal(first, pixels(replace(scene)))
        assert not np.array_equal(first, pixels(replace(scene, layout=scene.layout + 1)))


@pytest.mark.parametrize("kind", SIMPLE)
def test_an_edit_changes_only_what_it_says(kind):
    """One attribute of the scene; and of the image, if it is a thing's, only the pixels around the thing."""
    sides = set()
    for edit in edits(kind, 20):
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
        assert changed.sum() >= 80
        changed[BOX[name]] = False
        assert not changed.any()
    assert sides == ({kind} if kind in ("background", "medium") else set(BOX))


def test_the_other_kinds_change_a_named_side_two_attributes_or_nothing():
    for edit in edits("side", 100):
        (name,) = differing(edit.before, edit.after)
        assert name in edit.canonical
    assert all(edit.before == edit.after for edit in edits("nothing", 100))
    counts = set()
    for edit in edits("two", 100):
        names = differing(edit.before, edit.after)
        things = [(getattr(edit.before, name), getattr(edit.after, name)) for name in names if name in BOX]
        changes = [len(differing(*pair)) if all(pair) else 1 for pair in things]
        counts.add(sum(changes) + len(names) - len(things))
    assert counts == {2}


def test_a_caption_says_all_but_the_layout():
    """In any style; and one style words what two scenes have in common alike."""
    rng = np.random.default_rng(0)
    scenes = [replace(random_scene(rng, test), layout=0) for test in (False, True) for _ in range(2000)]
    for style in (0, 7, 8):
        assert len({caption(scene, style) for scene in scenes}) == len(set(scenes)) > 1000
    for edit in edits("colour", 100):
        first, second = (text.split() for text in edit.captions)
        assert sum(a != b for a, b in zip(first, second, strict=True)) == 1


def test_a_tenth_of_all_compositions_is_held_out():
    things = [Thing(*words) for words in itertools.product(*(OPTIONS[name] for name in ("shape", "colour", "size")))]
    places = list(itertools.product(OPTIONS["medium"], OPTIONS["background"]))
    one = [held_out(Scene(*place, thing, None, 0)) for place in places for thing in things]
    assert np.mean(one) == pytest.approx(0.1, abs=0.02)
    pairs = [pair for pair in itertools.permutations(things[::3], 2) if pair[0].shape != pair[1].shape]
    two = [held_out(Scene(*place, *pair, 0)) for place in places for pair in pairs]
    assert np.mean(two) == pytest.approx(0.1, abs=0.01)
    mirrored = [held_out(Scene(*place, second, first, 0)) for place in places for first, second in pairs]
    assert mirrored == two


@pytest.mark.parametrize("test", [False, True])
def test_training_never_sees_a_held_out_composition(test):
    rng = np.random.default_rng(2)
    assert all(held_out(random_scene(rng, test)) == test for _ in range(300))
    for kind in KINDS:
        for edit in edits(kind, 20 if test else 150, test=test):
            assert held_out(edit.before) == held_out(edit.after) == test
