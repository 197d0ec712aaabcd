"""mini.datagen: triplets and true pairs by the rules of the miniature's world."""

import json
import re
import zlib
from functools import partial

import numpy as np
import pytest

from dataset import EditDataset
from images import to_tensor
from language.captions import read_edits
from mini import datagen
from mini.phrasings import PHRASINGS
from mini.world import COLOURS, SHAPES, SIZES, random_edit, render


@pytest.fixture
def program(run_main):
    return partial(run_main, datagen)


def test_triplets_by_rule(program, tmp_path):
    """Their words are the world's, in the phrasings of training, and no composition is a held-out one."""
    out = tmp_path / "edits.jsonl"
    assert program("text", "--count=300", f"--out={out}") == (0, [f"{out}: 300 triplets"], [])
    edits = read_edits(out)
    assert len(edits) == 300
    choices = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "other": SHAPES}
    words = {name: f"({'|'.join(values)})" for name, values in choices.items()}
    wording = re.compile("|".join(p.format(**words) for phrasings in PHRASINGS.values() for p in phrasings))
    for edit in edits:
        assert list(edit) == ["caption", "edit", "output", "url"]
        assert edit["caption"] != edit["output"]
        assert wording.fullmatch(edit["edit"]), edit
        assert edit["url"] is None
        compositions = (re.sub(" on the (left|right)", "", edit[name]) for name in ("caption", "output"))
        assert all(zlib.crc32(composition.encode()) % 10 for composition in compositions)
    assert len({edit["caption"] for edit in edits}) > 280
    assert len({edit["edit"] for edit in edits}) > 100


def test_what_was_made_otherwise_is_never_replaced(program, tmp_path):
    """The same command again is fine, as after a restart of `make mini`."""
    out, data = tmp_path / "new/edits.jsonl", tmp_path / "true"
    for _ in range(2):
        assert program("text", "--count=20", "--seed=3", f"--out={out}") == (0, [f"{out}: 20 triplets"], [])
        assert program("true", "--count=2", f"--out={data}")[0] == 0
    first = out.read_bytes()
    assert "was begun with seed 3, not 0" in program("text", "--count=20", f"--out={out}")[2][0]
    assert "was begun with count 2, not 3" in program("true", "--count=3", f"--out={data}")[2][0]
    assert program("text", "--count=20", f"--out={tmp_path / 'other'}")[0] == 0
    assert out.read_bytes() == first != (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["text"], "--out"),
        (["true", "--out=x", "--count=0"], "--count: should be at least 1, not 0"),
        (["text", "--out=data"], "data is there already"),
        (["text", "--out=cat.txt"], "cat.txt is there already"),
        (["true", "--out=data"], "data holds other files, such as mine"),
    ],
)
def test_mistakes(program, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.txt").write_text("a cat on a mat\n")
    (tmp_path / "data/mine").mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    code, out, (error,) = program(*arguments)
    assert (code, out) == (2, [])
    assert words in error
    assert set(tmp_path.rglob("*")) == before


def test_true_pairs(program, tmp_path):
    """The upper bound's: the same triplets, with the world's own images."""
    assert program("text", "--count=6", "--seed=3", f"--out={tmp_path / 'edits.jsonl'}")[0] == 0
    assert program("true", "--count=6", "--seed=3", f"--out={tmp_path / 'data'}")[0] == 0
    edits, rng = read_edits(tmp_path / "edits.jsonl"), np.random.default_rng(3)
    data = EditDataset(tmp_path / "data", "all")
    assert len(data) == 6
    for number, (before, after, instruction) in enumerate(data):
        assert json.loads((tmp_path / f"data/{number:07d}/prompt.json").read_text()) == edits[number]
        assert instruction == edits[number]["edit"]
        edit = random_edit(rng)
        for x, scene in ((before, edit.before), (after, edit.after)):
            assert (x - to_tensor(render(scene))).abs().mean() < 0.01
