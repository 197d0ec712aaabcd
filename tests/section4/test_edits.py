"""Which edits are measured: a user's lists and data sets, and what is missing in them."""

import json
from argparse import Namespace
from pathlib import Path

from cli import UserError

import pytest
from conftest import colourful

from dataset import Pair, write_edit, write_seeds
from section4.edits import find_cases


def cases(path, count=100, split="test"):
    return find_cases(Namespace(edits=Path(path), split=split, seed=0), count)


@pytest.fixture
def table(tmp_path):
    """A list of 200 edits of four images, as MagicBrush's."""
    for number in range(4):
        colourful(60, 40, number).save(tmp_path / f"{number}.png")
    rows = [{"input": f"{i % 4}.png", "output": f"{(i + 1) % 4}.png", "instruction": f"edit {i}"} for i in range(200)]

    def write(changed=()):
        for number, row in dict(changed).items():
            rows[number] |= row
        (tmp_path / "turns.json").write_text(json.dumps(rows))
        return tmp_path / "turns.json"

    return write


def test_a_list_with_true_images_and_without_captions(table):
    found = cases(table(), 10)
    assert [case.instruction for case in found] == [f"edit {i}" for i in range(10)]
    assert found[3].captions == ("", "")
    before, after = found[3].images(32)
    assert (before.size, after.size) == ((32, 32), (32, 32))
    assert before.tobytes() != after.tobytes()


def test_a_list_with_captions(tmp_path):
    colourful(60, 40).save(tmp_path / "x.png")
    (tmp_path / "list.csv").write_text("image,instruction,caption,output_caption\nx.png,make it night,a,b\n")
    (case,) = cases(tmp_path / "list.csv")
    assert (case.captions, case.images(16)[1]) == (("a", "b"), None)


def test_what_is_missing_is_skipped_up_to_one_percent(table, capsys):
    few = {i: {"input": "none.png"} for i in (3, 50)} | {7: {"instruction": " "}}
    assert len(cases(table(few), 200)) == 197
    assert capsys.readouterr().err.count("skipped: ") == 3
    with pytest.raises(UserError, match="4 of 200 edits are missing or damaged, which is too many; .*none.png"):
        cases(table({100: {"output": "none.png"}}), 200)


def test_a_table_without_instructions(tmp_path):
    (tmp_path / "list.csv").write_text("image,caption\nx.png,a\n")
    with pytest.raises(UserError, match="the columns image and instruction are needed, but there is image, caption"):
        cases(tmp_path / "list.csv")


def test_the_test_split_of_a_data_set(tmp_path):
    image = colourful(64, 64)
    for number in range(20):
        prompt = {"caption": "a", "edit": f"edit {number}", "output": "b", "url": None}
        write_edit(tmp_path, number, prompt, [Pair(image, image, {"seed": 40 + number})])
    write_seeds(tmp_path)
    (case,) = cases(tmp_path)
    assert (case.instruction, case.captions, case.seed) == ("edit 19", ("a", "b"), 59)
    assert len(cases(tmp_path, split="all")) == 20
    (tmp_path / "seeds.json").write_text(json.dumps([["0000000", ["40"]]]))
    assert cases(tmp_path)[0].seed == 40
