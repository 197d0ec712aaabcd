"""Edited pairs on disk: the authors' layout to the letter, whole or not at all, and read as they were written."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import colourful
from PIL import Image
from torch.utils.data import DataLoader

import dataset
from cli import UserError
from dataset import EditDataset, Filter, Pair, folder_name, write_edit, write_seeds
from images import to_image, to_tensor

NAMES = ["seed", "p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"]


def prompt(edit="make it night"):
    return {"caption": "a café by the sea", "edit": edit, "output": "a café at night", "url": None}


def pair(seed, size=(32, 24)):
    values = np.random.default_rng(seed).random(len(NAMES) - 1).round(6).tolist()
    metadata = dict(zip(NAMES, [seed, *values], strict=True))
    return Pair(colourful(*size, seed=2 * seed), colourful(*size, seed=2 * seed + 1), metadata)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def root(tmp_path):
    """Edit 12 with two pairs, edit 3 with one, edit 7 with none."""
    write_edit(tmp_path, 12, prompt("make it night"), [pair(171), pair(5)])
    write_edit(tmp_path, 3, prompt("add a moon"), [pair(40)])
    write_edit(tmp_path, 7, prompt("nothing came of it"), [])
    assert write_seeds(tmp_path) == 3
    return tmp_path


def many(folder, edits, pairs=1):
    """A data set of so many edits, of which only seeds.json is there."""
    entries = [[folder_name(number), [str(10 * number + i) for i in range(pairs)]] for number in range(edits)]
    (folder / "seeds.json").write_text(json.dumps(entries))
    return folder


# ---- writing ----


def test_the_authors_layout(root):
    assert names(root) == [
        "0000003/40_0.jpg",
        "0000003/40_1.jpg",
        "0000003/metadata.jsonl",
        "0000003/prompt.json",
        "0000007/metadata.jsonl",
        "0000007/prompt.json",
        "0000012/171_0.jpg",
        "0000012/171_1.jpg",
        "0000012/5_0.jpg",
        "0000012/5_1.jpg",
        "0000012/metadata.jsonl",
        "0000012/prompt.json",
        "seeds.json",
    ]
    assert read_json(root / "seeds.json") == [["0000003", ["40"]], ["0000012", ["171", "5"]]]
    assert read_json(root / "0000012" / "prompt.json") == prompt()
    assert "café" in (root / "0000012" / "prompt.json").read_text(encoding="utf-8")
    lines = (root / "0000012" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [pair(171).metadata, pair(5).metadata]
    assert list(json.loads(lines[0])) == NAMES
    assert (root / "0000007" / "metadata.jsonl").read_text() == ""


def test_pictures_lose_almost_nothing(root):
    for seed, folder in ((171, "0000012"), (5, "0000012"), (40, "0000003")):
        for side, image in enumerate((pair(seed).before, pair(seed).after)):
            with Image.open(root / folder / f"{seed}_{side}.jpg") as file:
                assert (file.format, file.mode, file.size) == ("JPEG", "RGB", (32, 24))
                assert max(map(max, file.quantization.values())) == 1  # quality 100
                assert {layer[1:3] for layer in file.layer} == {(1, 1)}  # no channel at half the resolution
                error = np.abs(np.asarray(file, dtype=int) - np.asarray(image, dtype=int))
            assert error.max() <= 4
            assert error.mean() < 0.6


def test_fine_colours_are_not_smeared(tmp_path):
    """Stripes one pixel wide, red and blue."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, ::2, 0] = pixels[:, 1::2, 2] = 200
    stripes = Image.fromarray(pixels)
    write_edit(tmp_path, 0, prompt(), [Pair(stripes, stripes, {"seed": 1})])
    error = np.abs(np.asarray(Image.open(tmp_path / "0000000/1_1.jpg"), dtype=int) - pixels)
    assert error.max() <= 4


def test_an_edit_that_is_written_again_is_replaced(root):
    write_edit(root, 12, prompt("make it day"), [pair(99)])
    assert names(root / "0000012") == ["99_0.jpg", "99_1.jpg", "metadata.jsonl", "prompt.json"]
    assert read_json(root / "0000012" / "prompt.json")["edit"] == "make it day"
    write_edit(root, 3, prompt(), [])
    assert names(root / "0000003") == ["metadata.jsonl", "prompt.json"]
    assert write_seeds(root) == 1
    assert read_json(root / "seeds.json") == [["0000012", ["99"]]]


def test_foreign_files_are_never_removed(root):
    """An edit's folder that holds something else as well is not replaced."""
    notes = root / "0000003" / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UserError, match="0000003 holds notes.txt, which is no part of a data set; move it away"):
        write_edit(root, 3, prompt(), [pair(1)])
    assert notes.read_text() == "mine"
    assert names(root / "0000003") == ["40_0.jpg", "40_1.jpg", "metadata.jsonl", "notes.txt", "prompt.json"]
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


class Unwilling:
    """A picture that cannot be saved."""

    def __init__(self, error):
        self.error = error

    def save(self, file, *rest, **settings):
        file.write(b"half a picture")
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_nothing_is_left_half_written(root, error, raised):
    """When the third of four pictures fails: neither of a new edit nor of one that was there."""
    before = {name: (root / name).read_bytes() for name in names(root)}
    broken = [pair(1), replace(pair(2), before=Unwilling(error))]
    for number in (12, 13):
        with pytest.raises(raised):
            write_edit(root, number, prompt("another"), broken)
    assert sorted(path.name for path in root.iterdir()) == ["0000003", "0000007", "0000012", "seeds.json"]
    assert {name: (root / name).read_bytes() for name in names(root)} == before


def test_a_root_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*0000001: No such file"):
        write_edit(tmp_path / "nowhere", 1, prompt(), [pair(1)])
    with pytest.raises(UserError, match=r"cannot write .*seeds.json: No such file"):
        write_seeds(tmp_path / "nowhere")


def test_seeds_are_those_of_the_folders(root):
    (root / "0000020").mkdir()  # as of a run that was killed
    (root / ".0000021.77.tmp").mkdir()
    (root / ".0000021.77.tmp" / "metadata.jsonl").write_text('{"seed": 9}\n')
    (root / "candidates.jsonl").write_text("{}\n")
    assert write_seeds(root) == 3
    assert read_json(root / "seeds.json") == [["0000003", ["40"]], ["0000012", ["171", "5"]]]
    write_edit(root, 10, prompt(), [pair(8)])
    assert write_seeds(root) == 4
    assert [name for name, _ in read_json(root / "seeds.json")] == ["0000003", "0000010", "0000012"]


# ---- reading ----


def test_seeds_while_another_process_writes(root, monkeypatch):
    """An edit that appears meanwhile is listed, and so is one that was just being written anew."""
    read, events = dataset.read_metadata, ["new", "gone"]

    def meanwhile(path):
        event = events.pop() if events else None
        if event == "gone":
            raise FileNotFoundError
        if event == "new":
            write_edit(root, 99, prompt("too late?"), [pair(7)])
        return read(path)

    monkeypatch.setattr(dataset, "read_metadata", meanwhile)
    assert write_seeds(root, writer="0of2") == 4
    assert read_json(root / "seeds.json") == [["0000003", ["40"]], ["0000012", ["171", "5"]], ["0000099", ["7"]]]
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("text", ["{", "[]\n", '{"p2p_threshold": 0.5}\n', "3\n"])
def test_damaged_metadata(root, text):
    (root / "0000003" / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match="0000003/metadata.jsonl is damaged"):
        write_seeds(root)


def test_what_was_written_is_read(root):
    data = EditDataset(root, "all")
    assert len(data) == 3
    for item, (seed, edit) in zip(
        data, [(40, "add a moon"), (171, "make it night"), (5, "make it night")], strict=True
    ):
        before, after, instruction = item
        assert instruction == edit
        for x, image in ((before, pair(seed).before), (after, pair(seed).after)):
            assert x.shape == (3, 24, 32)
            assert x.dtype == torch.float32
            assert (x - to_tensor(image)).abs().max() <= 2 * 4 / 255
    assert torch.equal(data[0][0], to_tensor(Image.open(root / "0000003/40_0.jpg")))
    assert to_image(data[1][1]).size == (32, 24)


def test_a_data_set_as_the_authors_publish_it(tmp_path):
    """Written by hand, with what theirs has beyond ours: no metadata, other keys, large seeds."""
    folder = tmp_path / "0454444"
    folder.mkdir()
    (folder / "prompt.json").write_text(
        json.dumps({"input": "a", "edit": "as a cat", "output": "b", "url": "http://x"})
    )
    for side in (0, 1):
        colourful(64, 64, seed=side).save(folder / f"4294967295_{side}.jpg", quality=100)
    (tmp_path / "seeds.json").write_text('[["0454444", ["4294967295"]]]')
    ((before, after, instruction),) = EditDataset(tmp_path, "all")
    assert instruction == "as a cat"
    assert (before - to_tensor(colourful(64, 64, seed=0))).abs().mean() < 0.02
    assert (after - to_tensor(colourful(64, 64, seed=1))).abs().mean() < 0.02


@pytest.mark.parametrize(("edits", "counts"), [(20, (18, 1, 1)), (40, (36, 2, 2)), (1000, (900, 50, 50))])
def test_splits_go_by_position(tmp_path, edits, counts):
    """By edits, not by pairs: all pairs of an edit are in the same split."""
    many(tmp_path, edits, pairs=3)
    parts = [EditDataset(tmp_path, split).pairs for split in ("train", "val", "test")]
    assert tuple(map(len, parts)) == tuple(3 * count for count in counts)
    assert sum(parts, []) == EditDataset(tmp_path, "all").pairs
    assert EditDataset(tmp_path, "all").pairs[3:5] == [("0000001", "10"), ("0000001", "11")]
    assert EditDataset(tmp_path).pairs == parts[0]


def test_every_edit_is_in_one_split(tmp_path):
    for edits in range(1, 60):
        many(tmp_path, edits)
        found = []
        for split in ("train", "val", "test"):
            with suppress(UserError):  # of few edits there may be none
                found += EditDataset(tmp_path, split).pairs
        assert found == EditDataset(tmp_path, "all").pairs
        assert len(found) == edits


# ---- what goes wrong ----


def test_a_folder_that_is_no_data_set(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=f"^{folder} holds no seeds.json; datagen.py images makes such a folder$"):
            EditDataset(folder)
    (tmp_path / "file").write_text("hello")
    with pytest.raises(UserError, match="file"):
        EditDataset(tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    ["", "[[", "3", "null", '{"0000001": ["1"]}', '["0000001"]', '[["0000001"]]', '[["0000001", 5]]', "[1, 2]", "\x00"],
)
def test_damaged_seeds(tmp_path, text):
    (tmp_path / "seeds.json").write_text(text)
    with pytest.raises(UserError, match="seeds.json is damaged: "):
        EditDataset(tmp_path, "all")
    (tmp_path / "seeds.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="seeds.json is damaged: "):
        EditDataset(tmp_path, "all")


def test_a_split_without_pairs(tmp_path):
    (tmp_path / "seeds.json").write_text("[]")
    for split in ("train", "all"):
        with pytest.raises(UserError, match=f"holds no pairs for the split {split}$"):
            EditDataset(tmp_path, split)
    many(tmp_path, 2)
    with pytest.raises(UserError, match="holds no pairs for the split test$"):
        EditDataset(tmp_path, "test")


@pytest.mark.parametrize("text", [None, "", "{", "[]", '"edit"', '{"caption": "a"}', '{"edit": 3}', "null"])
def test_damaged_prompts(root, text):
    path = root / "0000003" / "prompt.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    data = EditDataset(root, "all")
    with pytest.raises(UserError, match="^1 of 3 pairs are .*0000003/prompt.json is missing or damaged: "):
        data[0]
    assert data[1][2] == "make it night"


def test_damaged_pictures(root):
    path = root / "0000003" / "40_1.jpg"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"40_1.jpg cannot be read as a picture"):
        EditDataset(root, "all")[0]
    path.unlink()
    with pytest.raises(UserError, match=r"there is no picture .*40_1.jpg"):
        EditDataset(root, "all")[0]


# ---- the filter's thresholds ----

GOOD = {"clip_sim_0": 0.2, "clip_sim_1": 0.25, "clip_sim_dir": 0.2, "clip_sim_image": 0.7}


def test_the_papers_thresholds():
    assert Filter() == Filter(image_text=0.2, image_image=0.7, direction=0.2)
    assert Filter().keeps(GOOD)  # each may be reached exactly
    for name, value in GOOD.items():
        assert not Filter().keeps({**GOOD, name: 0.199 if name != "clip_sim_image" else 0.699})
        assert Filter().keeps({**GOOD, name: value + 0.3, "seed": 7})
    assert not Filter().keeps(dict.fromkeys(GOOD, float("nan")))


def test_each_threshold_is_for_its_own_similarity():
    anything = {"clip_sim_0": -0.9, "clip_sim_1": -0.8, "clip_sim_dir": -0.7, "clip_sim_image": -0.6}
    least = {"image_text": -0.9, "image_image": -0.6, "direction": -0.7}
    assert Filter(**least).keeps(anything)
    for name, value in least.items():
        assert not Filter(**{**least, name: value + 0.01}).keeps(anything)
    assert not Filter(**{**least, "image_text": -0.85}).keeps(anything)
    assert not Filter(**{**least, "image_text": -0.85}).keeps({**anything, "clip_sim_0": 0.5, "clip_sim_1": -0.9})


def test_a_clips_own_thresholds(tmp_path):
    assert Filter.read(tmp_path) == Filter()
    path = tmp_path / "filter.json"
    path.write_text('{"image_text": 0.3, "image_image": 0.9, "direction": 0}')
    assert Filter.read(tmp_path) == Filter.read(str(tmp_path)) == Filter(0.3, 0.9, 0)
    path.write_text('{"image_image": -1.5, "note": "of the miniature"}')
    assert Filter.read(tmp_path) == Filter(image_image=-1.5)
    path.write_text("{}")
    assert Filter.read(tmp_path) == Filter()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[0.2, 0.7, 0.2]", "a JSON object is expected"),
        ('{"direction": "0.2"}', "numbers are needed"),
        ('{"direction": null}', "numbers are needed"),
        ('{"image_text": true}', "numbers are needed"),
        ('{"image_image": [0.7]}', "numbers are needed"),
    ],
)
def test_damaged_thresholds(tmp_path, text, message):
    (tmp_path / "filter.json").write_text(text)
    with pytest.raises(UserError, match=f"filter.json.*{message}"):
        Filter.read(tmp_path)


# ---- gaps ----


def gap(root, index):
    """Damage a pair: now its first picture, now its second one or its prompt."""
    folder = root / folder_name(index)
    if index % 3 == 2:
        (folder / "prompt.json").unlink()
    else:
        path = folder / f"{index}_{index % 3}.jpg"
        path.write_bytes(path.read_bytes()[: 30 * (index % 2)])


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory):
    """200 edits of a pair each, seeds and instructions after their numbers. Shared: copy before changing it."""
    root = tmp_path_factory.mktemp("many")
    for number in range(200):
        side = Image.new("RGB", (32, 32), (number, 0, 255 - number))
        write_edit(root, number, prompt(f"edit {number}"), [Pair(side, side, {"seed": number})])
    write_seeds(root)
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_gaps_are_skipped_and_counted(two_hundred, tmp_path, workers):
    """Up to 1 %, whichever process meets them: the next pair stands in, and the last one's stand-in is the first."""
    shutil.copytree(two_hundred, tmp_path, dirs_exist_ok=True)
    for index in (77, 199):
        gap(tmp_path, index)
    data = EditDataset(tmp_path, "all")
    found = [text for _, _, texts in DataLoader(data, 10, num_workers=workers) for text in texts]
    expected = [f"edit {number}" for number in range(200)]
    expected[77], expected[199] = "edit 78", "edit 0"
    assert found == expected
    assert data.broken.nonzero().flatten().tolist() == [77, 199]
    gap(tmp_path, 5)
    message = r"^3 of 200 pairs are missing or damaged, which is too many; the last one: .*0000005"
    if workers == 0:
        with pytest.raises(UserError, match=message):
            list(data)
        with pytest.raises(UserError, match=message.replace("0000005", "0000199")):
            list(EditDataset(tmp_path, "all"))
    else:
        with pytest.raises(UserError, match="3 of 200 pairs are missing or damaged"):
            list(DataLoader(data, 10, num_workers=workers))


def test_pictures_of_a_pair_that_differ_in_size(two_hundred, tmp_path):
    shutil.copytree(two_hundred, tmp_path, dirs_exist_ok=True)
    Image.new("RGB", (32, 40)).save(tmp_path / "0000009/9_1.jpg")
    data = EditDataset(tmp_path, "all")
    assert data[9][2] == "edit 10"
    assert data.broken.sum() == 1


# ---- crops ----


@pytest.fixture
def wide(tmp_path):
    """One pair of 80x60 pixels: a ramp in both directions, and its negative."""
    x, y = np.meshgrid(np.linspace(0, 255, 80), np.linspace(0, 255, 60))
    before = np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8)
    images = Image.fromarray(before), Image.fromarray(255 - before)
    write_edit(tmp_path, 0, prompt("invert it"), [Pair(*images, {"seed": 1})])
    write_seeds(tmp_path)
    return tmp_path


def window(x):
    """(left, top, right, bottom) of what a crop of `wide` shows, as shares of the whole picture."""
    red, green, _ = (x + 1) / 2
    return tuple(edge.mean().item() for edge in (red[:, 0], green[0], red[:, -1], green[-1]))


def test_without_a_seed_crops_are_in_the_middle(wide):
    before, after, _ = EditDataset(wide, "all", resolution=30, largest=45, flip=1.0)[0]
    assert before.shape == after.shape == (3, 30, 30)
    assert window(before) == pytest.approx((1 / 8, 0, 7 / 8, 1), abs=0.03)  # 80x60 becomes 40x30
    assert (before + after).abs().max() < 0.05


def test_crops_are_by_chance_and_the_same_for_both_pictures(wide):
    """Their size, their place and their mirroring, over the whole of what is possible; a seed gives the same again."""
    data = EditDataset(wide, "all", resolution=40, largest=60, flip=0.5)
    windows = []
    for seed in range(300):
        before, after, _ = data[0, seed]
        assert before.shape == after.shape == (3, 40, 40)
        assert (before + after).abs().max() < 0.06
        left, top, right, bottom = window(before)
        windows.append((min(left, right), top, abs(right - left), bottom - top, left > right))
    left, top, width, height, mirrored = np.array(windows).T
    assert 0.4 < mirrored.mean() < 0.6
    assert (height.min(), height.max()) == pytest.approx((40 / 60, 1), abs=0.03)
    assert (width.min(), width.max()) == pytest.approx((40 / 80, 60 / 80), abs=0.03)
    assert (left.min(), (left + width).max()) == pytest.approx((0, 1), abs=0.03)
    assert (top.min(), (top + height).max()) == pytest.approx((0, 1), abs=0.03)
    assert len(set(np.round(height, 2))) > 15
    assert all(torch.equal(*pair) for pair in zip(data[0, 7][:2], data[0, 7][:2], strict=True))
    assert not torch.equal(data[0, 7][0], data[0, 8][0])


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, False), (1.0, True)])
def test_mirroring_can_be_sure_or_off(wide, flip, mirrored):
    data = EditDataset(wide, "all", resolution=30, flip=flip)
    for seed in range(20):
        left, _, right, _ = window(data[0, seed][0])
        assert (left > right) == mirrored
