"""The hand-written triplets of data/edit_examples.jsonl: their form, their variety, and that nothing is there twice."""

import json
import re
from collections import Counter
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "data" / "edit_examples.jsonl"


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def test_the_hand_written_examples():
    """Plain and trimmed; as short as captions are, so that CLIP reads all; a caption changes, and keeps some of it."""
    examples = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]
    assert len(examples) == 200
    for example in examples:
        assert set(example) == {"kind", "caption", "edit", "output"}
        for text in example.values():
            assert text == " ".join(text.split()).rstrip(".,!")
            assert text.isascii()
        before, edit, after = (words(example[field]) for field in ("caption", "edit", "output"))
        for text, least, most in ((before, 3, 16), (edit, 2, 12), (after, 2, 16)):
            assert least <= len(text) <= most, example
        assert before != after
        assert set(before) & set(after) - {"a", "an", "the", "of", "in", "on", "with", "and"}, example
    for field in ("caption", "edit", "output"):
        counts = Counter(" ".join(words(example[field])) for example in examples)
        assert counts.most_common(1)[0][1] == 1
