"""Pairs from other hands: which column is which, which image goes with which instruction, and what is no source."""

import io
import json
import sys
from types import SimpleNamespace

from cli import UserError

import huggingface_hub
import pytest
from conftest import colourful
from huggingface_hub import constants

from formats.pairs import read_pairs, read_parquet

COUNT = 12  # so that 10 comes before 2 in the order of letters


def data_of(seed, kind="PNG", size=(16, 12)):
    buffer = io.BytesIO()
    colourful(*size, seed=seed).save(buffer, kind)
    return buffer.getvalue()


def write(folder, files):
    """Files from {path: text or bytes}; returns the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def sides(before="before", after="after"):
    """Two folders of images 1.png to 12.png; the seed of an image is 2 n, and 2 n + 1 after the edit."""
    numbers = range(1, COUNT + 1)
    return {f"{name}/{n}.png": data_of(2 * n + side) for side, name in enumerate((before, after)) for n in numbers}


def is_right(row, number):
    before, after = row.images()
    return [x.tobytes() for x in (before, after)] == [
        colourful(16, 12, seed=2 * number + side).tobytes() for side in (0, 1)
    ]


def table(folder, names, end="\n", delimiter=","):
    lines = [delimiter.join(names), *(delimiter.join((f"in/{n}.png", f"out/{n}.png", f"edit {n}")) for n in (1, 2, 3))]
    return write(folder, {**sides("in", "out"), "pairs.csv": end.join(lines)})


def hub_folder(folder, names, count=COUNT, split="train-00000-of-00001"):
    """A parquet file as the datasets library writes it: {column: "before", "after", a text or a number}."""
    pyarrow = pytest.importorskip("pyarrow")  # it is optional
    from pyarrow import parquet

    numbers = range(1, count + 1)
    images = {name: [{"bytes": data_of(2 * n + i), "path": None} for n in numbers] for i, name in enumerate(("b", "a"))}
    cells = {"before": images["b"], "after": images["a"], "index": list(numbers)}
    columns = {name: cells.get(what) or [f"{what} {n}" for n in numbers] for name, what in names.items()}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / f"data/{split}-3bc.parquet", row_group_size=5)
    return folder


PUBLIC = {
    "fusing": {"input_image": "before", "edit_prompt": "edit", "edited_image": "after"},
    "timbrooks": {"original_prompt": "caption", "original_image": "before", "edit_prompt": "edit",
                  "edited_prompt": "output", "edited_image": "after"},
    "MagicBrush": {"img_id": "id", "turn_index": "index", "source_img": "before", "mask_img": "after",
                   "instruction": "edit", "target_img": "after"},
    "HQ-Edit": {"input": "caption", "input_image": "before", "edit": "edit", "inverse_edit": "other",
                "output": "output", "output_image": "after"},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_data_sets_by_their_columns(tmp_path, name):
    """From the training split alone, and no more than the columns that are needed."""
    rows = list(read_pairs(hub_folder(hub_folder(tmp_path, PUBLIC[name]), PUBLIC[name], 3, "dev-00000-of-00001")))
    assert len(rows) == COUNT
    assert all(is_right(row, number) for number, row in enumerate(rows, 1))
    captions = ("caption 2", "output 2") if "caption" in PUBLIC[name].values() else ("", "")
    assert rows[1].prompt() == {"caption": captions[0], "edit": "edit 2", "output": captions[1], "url": None}
    assert set(rows[0].cells) == {"before", "after", "edit"} | ({"caption", "output"} if captions[0] else set())
    (path,) = tmp_path.glob("data/train*")
    assert len(next(read_parquet(path, None))[1]) == len(rows[0].cells)


@pytest.mark.parametrize(
    "names",
    ["before after edit", "input_image output_image prompt", "file_name edited_file_name text",
     "Original Edited Instruction", "src_path target-image Edit~Prompt"],
)  # fmt: skip
def test_tables_by_their_columns(tmp_path, names):
    names = [name.replace("~", " ") for name in names.split()]
    for source in (table(tmp_path, names), tmp_path / "pairs.csv", table(tmp_path, names, "\r\n", ";")):
        rows = list(read_pairs(source))
        assert [row.prompt()["edit"] for row in rows] == ["edit 1", "edit 2", "edit 3"]
        assert all(is_right(row, number) for number, row in enumerate(rows, 1))


def test_columns_may_be_said(tmp_path):
    (row, *_) = read_pairs(table(tmp_path, ["after", "prompt", "x"]), ["after", "prompt", "x"])
    assert is_right(row, 1)
    with pytest.raises(UserError, match="no column for edit; there are 'after', 'prompt', 'x'; say --columns"):
        list(read_pairs(tmp_path, ["after", "prompt", "edit"]))
    with pytest.raises(UserError, match="no column for before; there are"):
        list(read_pairs(tmp_path))


LINES = "\n".join(f"edit {n}" for n in range(1, COUNT + 1))
NAMED = ["file_name;instruction", *(f'{n}.png;"edit {n}"' for n in range(COUNT, 0, -1))]
FOLDERS = {
    "a text in the order of names": {"edits.txt": LINES, "README.txt": "an example"},
    "with Windows' ends and BOM, and files of systems": {
        "E.TXT": f"\ufeff{LINES}\n\n".replace("\n", "\r\n"), "._E.txt": "\0",
        "before/Thumbs.db": "", "after/._1.png": "",
    },
    "a table with the names of images": {"edits.csv": "\r\n".join(NAMED).encode("utf-16")},
    "a table with both": {
        "edits.csv": "before,after,edit\n" + "\n".join(f"before/{n}.png,after\\{n}.png,edit {n}" for n in range(1, 13))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_two_folders_and_instructions(tmp_path, name, capsys):
    rows = list(read_pairs(write(tmp_path, {**sides(), **FOLDERS[name]})))
    assert len(rows) == COUNT
    for row in rows:
        assert is_right(row, int(row.prompt()["edit"].removeprefix("edit ")))
    said = "the first lines are for 1, 2, 3, the last one for 12" in capsys.readouterr().out
    assert said == ("edits.csv" not in FOLDERS[name])


def test_folders_of_other_names_and_one_instruction_for_all(tmp_path):
    write(tmp_path, {**sides("Day", "night"), "edits.txt": "make it night\n"})
    rows = list(read_pairs(tmp_path, ["day", "night", "edit"]))
    assert [row.prompt()["edit"] for row in rows] == COUNT * ["make it night"]
    assert all(is_right(row, number) for number, row in enumerate(rows, 1))
    with pytest.raises(UserError, match="edits.txt is plain text; it needs folders before/ and after/ beside it"):
        list(read_pairs(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": ""}, "holds no pairs: no parquet file, no table, no text with instructions"),
        ({"dataset_info.json": "{}", "data.arrow": ""}, "holds no pairs"),
        ({"seeds.json": "[]"}, "has the authors' layout already; use it as it is: --data"),
        ({"x.parquet": "version https://git-lfs.github.com/spec/v1"}, "is no parquet file; .*git lfs pull"),
        ({**sides(), "edits.txt": "a\nb"}, "edits.txt has 2 instructions for the 12 images in"),
        ({**sides(), "a.txt": "a", "b.txt": "b"}, "holds 2 texts, such as a.txt; leave one there"),
        ({**sides(), "before/x.png": "", "a.txt": "a"}, "need equal file names; x is in one of them alone"),
        ({**sides(), "a.csv": "1.png,one\n2.png,two"}, "a.csv: no column file_name; there are '1.png', 'one'"),
    ],
)
def test_what_is_no_source(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        next(read_pairs(write(tmp_path, files)))


def test_broken_rows_say_so_when_they_are_used(tmp_path):
    good = {"before": "a.png", "after": "a.png", "edit": "e"}
    changes = {}, {"after": None}, {"before": "no.png"}, {"edit": " "}, {}, {"edit": 3}, {"after": "long.png"}
    lines = [json.dumps(good | change) for change in (*changes, {"after": "large.png"})]
    lines[4] = lines[4][:20]
    images = {"a.png": data_of(0), "long.png": data_of(0, size=(16, 16)), "large.png": data_of(0, size=(32, 24))}
    rows = list(read_pairs(write(tmp_path, {"p.jsonl": "\n".join(lines), **images})))
    messages = []
    for row in rows:
        try:
            messages.append((row.prompt() and row.images())[1].size)
        except UserError as error:
            messages.append(str(error).removeprefix(str(tmp_path)).removeprefix("/p.jsonl, "))
    assert messages[4].startswith("line 5: this is no JSON")
    assert messages[:4] + messages[5:] == [
        (16, 12), "line 2: the image after is missing", "/no.png cannot be read as an image: No such file or directory",
        "line 4: the instruction is empty", "line 6: 3 is not a text",
        "line 7: the images differ in shape, 16x12 and 16x16", (16, 12),
    ]  # fmt: skip


def test_a_hub_data_set_is_fetched_a_file_at_a_time(tmp_path, monkeypatch, capsys):
    for number in range(3):
        hub_folder(tmp_path, PUBLIC["fusing"], 5, f"train-{number}")
    names = [f"data/train-{number}-3bc.parquet" for number in range(3)]
    files = [SimpleNamespace(rfilename=name, size=10**8) for name in ("README.md", *reversed(names))]
    info, fetched = SimpleNamespace(siblings=files, card_data={"license": "mit"}), []

    def download(repo_id, filename, repo_type):
        fetched.append((repo_id, filename, repo_type))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    rows = read_pairs("some/pairs")
    assert is_right([next(rows) for _ in range(6)][5], 1)
    assert fetched == [("some/pairs", name, "dataset") for name in names[:2]]
    said = "some/pairs: 0.30 GB in 3 files, each downloaded once, when it is needed; licence: mit"
    assert said in capsys.readouterr().out


def test_a_hub_data_set_without_the_hub(tmp_path, monkeypatch):
    """What is in the cache is used; else one line."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="some/pairs is neither here nor in the hub's cache, and the hub does not give"):
        list(read_pairs("some/pairs"))
    folder = tmp_path / "datasets--some--pairs"
    write(folder / "refs", {"main": "abc"})
    line = {"file_name": "1.png", "edited_file_name": "2.png", "edit": "e"}
    images = {f"{number}.png": data_of(number + 1) for number in (1, 2)}
    write(folder / "snapshots/abc/train", {"metadata.jsonl": json.dumps(line), **images})
    (row,) = read_pairs("some/pairs")
    assert is_right(row, 1)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pyarrow, .* not installed here; .*pip install -r requirements-parquet.txt"):
        list(read_pairs(write(tmp_path, {"a.parquet": b"PAR1"})))
