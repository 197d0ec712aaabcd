"""The hand-written triplets of data/edit_examples.jsonl: their form, their variety, and that nothing is there twice."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "data" / "edit_examples.jsonl"
def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


@pytest.fixture(scope="module")
def examples():
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def test_their_form(examples):
    """One line each, plain and trimmed; as short as captions and instructions are, so that CLIP reads all of them."""
    assert len(examples) == 200
    for example in examples:
        assert set(example) == {"kind", "caption", "edit", "output"}
        for text in example.values():
            assert text == " ".join(text.split())
            assert text.isascii()
            assert not text.endswith((".", ",", "!"))
        assert 3 <= len(words(example["caption"])) <= 16, example
        assert 2 <= len(words(example["edit"])) <= 12, example
        assert 2 <= len(words(example["output"])) <= 16, example


def test_the_edit_changes_the_caption_and_keeps_some_of_it(examples):
    for example in examples:
        before, after = words(example["caption"]), words(example["output"])
        assert before != after
        small = {"a", "an", "the", "of", "in", "on", "with", "and"}
        assert set(before) & set(after) - small, example


@pytest.mark.parametrize("field", ["caption", "edit", "output"])
def test_nothing_is_there_twice(examples, field):
    counts = Counter(" ".join(words(example[field])) for example in examples)
    assert counts.most_common(1)[0][1] == 1
