"""The grammar of requests: many ways to ask, one token a word, and what is held out is never trained on."""

import re
from collections import Counter

import numpy as np
import pytest

from mini.phrasings import FORMS, WRAPPED
from mini.pretrain import train_tokenizer
from mini.wording import CLASSES, STYLES, all_words
from mini.words import BACKGROUNDS, COLOURS, MEDIA, PLACES, SIZES, STRANGE, THINGS
from mini.world import KINDS, random_edit

TABLES = (THINGS, COLOURS, SIZES, PLACES, BACKGROUNDS, MEDIA)
WORDS = [text for table in (*TABLES, {"": STRANGE}) for texts in table.values() for text in texts]
NEW_WORDS = {text[1:] for text in WORDS if text.startswith("~") and len(text.split()) == 1}


def requests(kind, count, wording="trained", seed=0):
    rng = np.random.default_rng(seed)
    return [random_edit(rng, kind, wording=wording) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_many_ways_to_ask(kind):
    """Of all styles; templates are few and plain. What is asked for is told by the plainest request alone."""
    found = requests(kind, 400)
    assert len({edit.instruction for edit in found}) > (100 if kind == "nothing" else 350)
    expected = {"two": {"plain", "polite", "wish", "clauses"}}.get(kind, set(STYLES))
    assert {edit.style for edit in found} >= expected | {"filler", "typo"}
    assert max(Counter(edit.style for edit in found).values()) < (300 if kind in ("nothing", "two") else 120)
    plain = requests(kind, 100, "template")
    assert {edit.style for edit in plain} == {"plain"}
    assert {edit.instruction.lower() for edit in plain} == {edit.instruction for edit in plain}


def test_a_request_names_what_changes():
    """In the world's words, whatever the construction."""
    for edit in requests("colour", 300):
        if edit.style != "typo":
            now = {thing.colour for thing in edit.after.things} - {thing.colour for thing in edit.before.things}
            assert all(any(word in edit.instruction.lower() for word in COLOURS[colour]) for colour in now)
    for edit in requests("background", 300):
        known = [*PLACES[edit.after.background], *BACKGROUNDS[edit.after.background]]
        assert edit.style == "typo" or any(words in edit.instruction.lower() for words in known)


def test_training_never_uses_what_is_held_out():
    texts = [edit.instruction.lower() for kind in KINDS for edit in requests(kind, 200)]
    said = set(re.findall(r"[a-z]+", " ".join(texts)))
    assert not said & NEW_WORDS
    forms = [form for kinds in (*FORMS.values(), WRAPPED) for group in kinds.values() for form in group]
    fixed = [re.split(r"{\w+}", form[1:]) for form in forms if form.startswith("~")]
    fixed = [parts for parts in fixed if len("".join(parts)) > 8]  # "get {thing} {colour}" is anything
    for text in texts:
        for parts in fixed:
            assert not re.fullmatch(".+".join(map(re.escape, parts)), text), (text, parts)


def test_a_new_wording_has_a_construction_or_words_that_training_never_uses():
    known = {edit.instruction.lower() for kind in KINDS for edit in requests(kind, 400)}
    for kind in KINDS:
        new = requests(kind, 30, "new", seed=1)
        assert all(edit.wording == CLASSES[2] and edit.instruction.lower() not in known for edit in new)


def test_every_word_is_one_token_and_every_request_fits():
    tokenizer = train_tokenizer(all_words())
    for kind in KINDS:
        for edit in requests(kind, 100):
            for text in (edit.instruction, *edit.captions):
                assert tokenizer.cut_off(text) == ""
            words = re.findall(r"[a-z]+", f"{edit.canonical} {edit.captions[0]}".lower())
            strange = {word for word in words if f"{word}</w>" not in tokenizer.vocabulary}
            assert not strange, strange
