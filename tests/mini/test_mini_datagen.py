"""mini.datagen: triplets and true pairs by the rules of the miniature's world."""

import json
from functools import partial

import numpy as np
import pytest

from dataset import EditDataset
from images import to_tensor
from language.captions import read_edits
from mini import datagen
from mini.drawing import render
from mini.world import held_out, random_edit


@pytest.fixture
def program(run_main):
    return partial(run_main, datagen)


def test_triplets_by_rule(program, tmp_path):
    """The world's edits as records; where the background changes, with a range of p of their own."""
    out = tmp_path / "edits.jsonl"
    assert program("text", "--count=300", f"--out={out}") == (0, [f"{out}: 300 triplets"], [])
    edits, rng = read_edits(out), np.random.default_rng(0)
    assert len(edits) == 300
    for record in edits:
        edit = random_edit(rng)
        assert (record["caption"], record["output"]) == edit.captions
        assert record["edit"] == edit.instruction
        assert record["p"] == (None if edit.before.background == edit.after.background else [0.1, 0.4])
        assert not held_out(edit.before)
        assert not held_out(edit.after)


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
        record = json.loads((tmp_path / f"data/{number:07d}/prompt.json").read_text())
        assert record == {name: edits[number][name] for name in record}
        assert instruction == edits[number]["edit"]
        edit = random_edit(rng)
        for x, scene in ((before, edit.before), (after, edit.after)):
            assert (x - to_tensor(render(scene))).abs().mean() < 0.01
