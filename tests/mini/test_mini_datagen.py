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
from mini.world import COLOURS, SHAPES, SIZES, caption, held_out, random_edit, random_scene, read_caption, render


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
        assert read_caption(edit["caption"]) != read_caption(edit["output"])
        assert wording.fullmatch(edit["edit"]), edit
        assert edit["url"] is None
        compositions = (re.sub(" on the (left|right)", "", edit[name]) for name in ("caption", "output"))
        assert all(zlib.crc32(composition.encode()) % 10 for composition in compositions)
    assert len({edit["caption"] for edit in edits}) > 280
    assert len({edit["edit"] for edit in edits}) > 100


def test_triplets_of_given_captions(program, tmp_path):
    """One for each caption of the world's, with its url; repeated ones and those of held-out scenes are left out."""
    rng = np.random.default_rng(5)
    captions = [caption(random_scene(rng)) for _ in range(200)]
    given = [{"caption": text, "url": f"u{i}"} for i, text in enumerate(captions)]
    given += [{"caption": captions[0]}, {"caption": caption(random_scene(rng, test=True))}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in given))
    out, unique = tmp_path / "edits.jsonl", dict.fromkeys(captions)
    found = program("text", f"--captions={tmp_path / 'captions.jsonl'}", f"--out={out}")
    assert found == (0, [f"{out}: {len(unique)} triplets"], [])
    edits = read_edits(out)
    assert [edit["caption"] for edit in edits] == list(unique)
    assert [edit["url"] for edit in edits] == [f"u{captions.index(text)}" for text in unique]
    more = set()
    for edit in edits:
        before, after = read_caption(edit["caption"]), read_caption(edit["output"])
        assert not held_out(after)
        parts = ("medium", "background", "left", "right")
        assert sum(getattr(before, part) != getattr(after, part) for part in parts) == 1
        more.add(len(after.things) - len(before.things))
    assert more == {-1, 0, 1}


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
        (["text", "--out=x", "--seed=-1"], "seed"),
        (["text", "--out=."], "cannot write ."),
        (["text", "--out=x", "--captions=cat.txt"], '"a cat on a mat" is not a caption of the miniature\'s world'),
        (["text", "--out=x", "--captions=empty.txt"], "empty.txt holds no captions"),
        (["text", "--out=cat.txt"], "cat.txt is there already"),
        (["true", "--out=data"], "data holds other files, such as mine"),
    ],
)
def test_mistakes(program, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.txt").write_text("a cat on a mat\n")
    (tmp_path / "empty.txt").touch()
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
