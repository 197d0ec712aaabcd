"""Edited pairs on disk: the authors' layout to the letter, whole or not at all, and read as they were written."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import time
from functools import partial

from cli import UserError

import numpy as np
import pytest
import torch
from conftest import colourful, contents
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import dataset
from dataset import EditDataset, Filter, Pair, folder_name, write_edit, write_seeds
from images import open_image, to_image, to_tensor

NAMES = ["seed", "p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"]


def prompt(edit="make it night"):
    return {"caption": "a café by the sea", "edit": edit, "output": "a café at night", "url": None}


def pair(seed, size=(32, 24)):
    values = np.random.default_rng(seed).random(len(NAMES) - 1).round(6).tolist()
    metadata = dict(zip(NAMES, [seed, *values], strict=True))
    return Pair(colourful(*size, seed=2 * seed), colourful(*size, seed=2 * seed + 1), metadata)


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
    images = {3: ["40_0.jpg", "40_1.jpg"], 7: [], 12: ["171_0.jpg", "171_1.jpg", "5_0.jpg", "5_1.jpg"]}
    files = [f"{number:07d}/{name}" for number in images for name in (*images[number], "metadata.jsonl", "prompt.json")]
    assert sorted(contents(root)) == [*files, "seeds.json"]
    assert read_json(root / "seeds.json") == [["0000003", ["40"]], ["0000012", ["171", "5"]]]
    assert read_json(root / "0000012" / "prompt.json") == prompt()
    assert "café" in (root / "0000012" / "prompt.json").read_text(encoding="utf-8")
    lines = (root / "0000012" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [pair(171).metadata, pair(5).metadata]
    assert list(json.loads(lines[0])) == NAMES
    assert (root / "0000007" / "metadata.jsonl").read_text() == ""


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
    """An edit that appears meanwhile is listed."""
    read, events = dataset.read_metadata, ["new"]

    def meanwhile(path):
        if events:
            events.pop()
            write_edit(root, 99, prompt("too late?"), [pair(7)])
        return read(path)

    monkeypatch.setattr(dataset, "read_metadata", meanwhile)
    assert write_seeds(root) == 4
    assert read_json(root / "seeds.json") == [["0000003", ["40"]], ["0000012", ["171", "5"]], ["0000099", ["7"]]]
    assert not list(root.glob(".*"))


def test_what_was_written_is_read(root):
    data = EditDataset(root, "all")
    assert len(data) == 2
    assert data.edits == [["0000003", ["40"]], ["0000012", ["171", "5"]]]
    assert torch.equal(data[1][0], data.load_pair(1, 0)[0])  # an edit's first pair
    for index, k, seed, edit in [(0, 0, 40, "add a moon"), (1, 0, 171, "make it night"), (1, 1, 5, "make it night")]:
        before, after, instruction = data.load_pair(index, k)
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


def test_byte_order_marks_change_nothing(root):
    for path in root.rglob("*.json*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [item[2] for item in EditDataset(root, "all")] == ["add a moon", "make it night"]
    assert write_seeds(root) == 3


@pytest.mark.parametrize(
    ("edits", "counts"), [(20, (18, 1, 1)), (1000, (900, 50, 50)), (313_010, (281_709, 15_650, 15_651))]
)
def test_splits_floor_as_in_the_released_code(tmp_path, edits, counts):
    """By edits, by position, each edit in one split; 313,010 edits are the published data set."""
    many(tmp_path, edits, pairs=3 if edits < 2000 else 1)
    parts = [EditDataset(tmp_path, split).edits for split in ("train", "val", "test")]
    assert tuple(map(len, parts)) == counts
    assert sum(parts, []) == EditDataset(tmp_path, "all").edits
    assert counts[0] == int(0.9 * edits)
    assert sum(counts[:2]) == int((0.9 + 0.05) * edits)


def test_each_edit_counts_once_and_each_of_its_pairs_is_drawn(tmp_path):
    """Of one edit with four pairs and one with a single pair: two items, and all four come alike often."""
    for number, count in enumerate((4, 1)):
        sides = [Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(count)]
        write_edit(tmp_path, number, prompt(), [Pair(side, side, {"seed": i}) for i, side in enumerate(sides)])
    write_seeds(tmp_path)
    data = EditDataset(tmp_path, "all")
    assert len(data) == 2
    found = [round((data[0, example][0][0].mean().item() + 1) * 2.55) for example in range(400)]
    counts = [found.count(i) for i in range(4)]
    assert sum(counts) == 400
    assert min(counts) > 70
    assert torch.equal(data[0, 5][0], data[0, 5][0])


@pytest.mark.parametrize(("subset", "count"), [(5, 5), (0.2, 20), (0.001, 1), (100, 100)])
def test_a_subset_of_the_edits(tmp_path, subset, count):
    """Evenly spread; every pair of an edit comes along."""
    data = EditDataset(many(tmp_path, 100, pairs=4), "all", subset=subset)
    assert [folder for folder, _ in data.edits] == [folder_name(i * 100 // count) for i in range(count)]
    assert all(len(seeds) == 4 for _, seeds in data.edits)
    with pytest.raises(UserError, match="holds 100 edits for this split, not 101"):
        EditDataset(tmp_path, "all", subset=101)


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        (None, "all", "seeds.json cannot be read; datagen.py images makes such a folder"),
        ("[[", "all", "seeds.json cannot be read"),
        ('{"0000001": ["1"]}', "all", "seeds.json cannot be read"),
        ('[["0000001", []]]', "all", "seeds.json cannot be read"),
        ("[]", "train", "holds no pairs for the split train$"),
        ('[["0000000", ["1"]], ["0000001", ["2"]]]', "val", "holds no pairs for the split val$"),
    ],
)
def test_a_folder_that_is_no_data_set(tmp_path, text, split, message):
    if text:
        (tmp_path / "seeds.json").write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path}.*{message}"):
        EditDataset(tmp_path, split)


# ---- the filter's thresholds ----

GOOD = {"clip_sim_0": 0.2, "clip_sim_1": 0.25, "clip_sim_dir": 0.2, "clip_sim_image": 0.7}


def test_the_papers_thresholds():
    assert Filter() == Filter(image_text=0.2, image_image=0.7, direction=0.2)
    assert Filter().keeps(GOOD)  # each may be reached exactly
    for name, value in GOOD.items():
        assert not Filter().keeps({**GOOD, name: 0.199 if name != "clip_sim_image" else 0.699})
        assert Filter().keeps({**GOOD, name: value + 0.3, "seed": 7})
    assert not Filter().keeps(dict.fromkeys(GOOD, float("nan")))


def test_a_clips_own_thresholds(tmp_path):
    assert Filter.read(tmp_path) == Filter()
    path = tmp_path / "filter.json"
    path.write_text('{"image_text": 0.3, "image_image": 0.9, "direction": 0}')
    assert Filter.read(tmp_path) == Filter.read(str(tmp_path)) == Filter(0.3, 0.9, 0)
    path.write_text('{"image_image": -1.5, "note": "of the miniature"}')
    assert Filter.read(tmp_path) == Filter(image_image=-1.5)
    for damaged in ("{", "[0.2, 0.7, 0.2]", '{"direction": "0.2"}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match="filter.json"):
            Filter.read(tmp_path)


# ---- gaps ----


def gap(root, index):
    """Damage a pair: now its first image, now its second one or its prompt."""
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
def test_gaps_are_named_and_skipped(two_hundred, tmp_path, workers, capfd):
    """Up to three, whichever process meets them: the next edit stands in, and the last one's stand-in is the first."""
    shutil.copytree(two_hundred, tmp_path, dirs_exist_ok=True)
    for index in (77, 150, 199):
        gap(tmp_path, index)
    data = EditDataset(tmp_path, "all")
    found = [text for _, _, texts in DataLoader(data, 10, num_workers=workers) for text in texts]
    expected = [f"edit {number}" for number in range(200)]
    expected[77], expected[150], expected[199] = "edit 78", "edit 151", "edit 0"
    assert found == expected
    assert data.broken.nonzero().flatten().tolist() == [77, 150, 199]
    named = sorted(line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: "))
    assert [f"{number:07d}" in line for number, line in zip((77, 150, 199), named, strict=True)] == [True] * 3
    gap(tmp_path, 5)
    with pytest.raises(UserError, match="4 of 200 pairs are missing or damaged, which is too many; the last one: "):
        list(DataLoader(data, 10, num_workers=workers))


def test_another_pair_of_the_edit_takes_the_place_of_a_broken_one(root):
    (root / "0000012" / "171_1.jpg").unlink()
    Image.new("RGB", (32, 40)).save(root / "0000003" / "40_1.jpg")  # not as large as the first image
    data = EditDataset(root, "all")
    assert data.load_pair(1, 0) is None
    assert torch.equal(data[1][0], data.load_pair(1, 1)[0])
    assert data[0][2] == "make it night"
    for example in range(5):
        assert torch.equal(data[1, example][0], data[1][0])
    (root / "0000012" / "prompt.json").unlink()
    with pytest.raises(UserError, match="holds no whole pair"):
        EditDataset(root, "all")[0]


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
    """(left, top, right, bottom) of what a crop of `wide` shows, as fractions of the whole image."""
    red, green, _ = (x + 1) / 2
    return tuple(edge.mean().item() for edge in (red[:, 0], green[0], red[:, -1], green[-1]))


def test_crops_are_random_and_the_same_for_both_images(wide):
    """Their size, their place and their mirroring, over the whole of what is possible; a seed gives the same again."""
    data = EditDataset(wide, "all", resolution=40, max_resize=60, flip=0.5)
    windows = []
    for seed in range(150):
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


# ---- the program ----


@pytest.fixture
def program(run_main):
    return partial(run_main, dataset)


def own_pairs(folder, count, change=None):
    """pairs.csv with so many rows, of which some are changed: {number: row}."""
    folder.mkdir(exist_ok=True)
    for name, seed in (("a", 1), ("b", 2)):
        colourful(32, 24, seed).save(folder / f"{name}.png")
    rows = {number: f"a.png,b.png,edit {number}" for number in range(count)} | (change or {})
    (folder / "pairs.csv").write_text("\n".join(["before,after,edit", *rows.values()]))
    return folder


def test_own_pairs_become_a_data_set(tmp_path, program):
    """Whose files are the authors': seeds.json, prompt.json, SEED_0.jpg and SEED_1.jpg; broken rows leave a gap."""
    source = own_pairs(tmp_path / "own", 7, {2: "a.png,no.png,edit 2", 4: "a.png,b.png,make it red, please"})
    out = tmp_path / "out"
    end = program("import", source, f"--out={out}")
    assert (end.code, end.out) == (0, [f"{out}: 5 pairs of 7 rows; 2 skipped"])
    assert sum(line.startswith("skipped: ") for line in end.err) == 2
    numbers = [0, 1, 3, 5, 6]
    assert read_json(out / "seeds.json") == [[folder_name(number), ["0"]] for number in numbers]
    for number in numbers:
        folder = out / folder_name(number)
        assert read_json(folder / "prompt.json")["edit"] == f"edit {number}"
        for side, seed in enumerate((1, 2)):
            written = to_tensor(Image.open(folder / f"0_{side}.jpg"))
            assert (written - to_tensor(colourful(32, 24, seed))).abs().max() < 0.06
    before = contents(out)
    assert program("import", source, f"--out={out}").code == 0
    assert contents(out) == before
    few = tmp_path / "few"
    assert program("import", source, f"--out={few}", "--count=2").out == [f"{few}: 2 pairs of 2 rows"]


@pytest.mark.parametrize(
    ("count", "broken", "words"),
    [
        (200, 4, "4 of 200 rows are broken, which is too many; the last one: .*x.png cannot be read"),
        (2000, 11, "11 of 11 rows are broken, which is too many"),  # found out at once
        (1, 1, "1 of 1 rows are broken"),
        (0, 0, "own holds no pairs"),
    ],
)
def test_a_source_that_is_too_broken(tmp_path, program, count, broken, words):
    source = own_pairs(tmp_path / "own", count, dict.fromkeys(range(broken), "x.png,b.png,e"))
    code, out, err = program("import", source, f"--out={tmp_path / 'out'}")
    assert (code, out) == (2, [])
    assert re.search(words, err[-1])
    assert not (tmp_path / "out" / "seeds.json").exists()


def test_a_source_that_has_changed_is_not_mixed_in(tmp_path, program):
    source, out = own_pairs(tmp_path / "own", 5), tmp_path / "out"
    program("import", source, f"--out={out}")
    source.rename(tmp_path / "moved")
    assert program("import", tmp_path / "moved", f"--out={out}").code == 0
    own_pairs(tmp_path / "moved", 5, {3: "a.png,b.png,another"})
    code, _, err = program("import", tmp_path / "moved", f"--out={out}")
    assert code == 2
    assert re.search("0000003 was not made from .*pairs.csv, line 5; the source has changed: use another", err[-1])


@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_in_the_same_files(tmp_path, capfd, times):
    """SIGKILL at random moments of an import of 40 rows."""
    source, rng, done = own_pairs(tmp_path / "own", 40), random.Random(0), set()
    whole, arguments = (["import", str(source), f"--out={tmp_path / name}"] for name in ("whole", "out"))
    tqdm.set_lock(threading.RLock())  # its own one is shared with forked processes, and a killed one would keep it
    begin = time.monotonic()
    dataset.main(whole)
    longest, now = (time.monotonic() - begin) / 4, 0
    for _ in range(times):
        process = multiprocessing.get_context("fork").Process(target=dataset.main, args=(arguments,))
        process.start()
        time.sleep(rng.uniform(0, longest))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        before, now = now, len(list(tmp_path.glob("out/0*")))
        done.add(now)
        longest *= 1.5 if now == before else 0.8
        if now == 40:  # the next one begins anew
            shutil.rmtree(tmp_path / "out")
            now = 0
    dataset.main(arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("out/.*"))
    assert len(done) > 1  # it was stopped between its rows, too


def test_check_says_what_is_there(root, program):
    """Edits and pairs, their sizes, what is missing, what is twice, and ten samples."""
    write_edit(root, 20, prompt("add a moon"), [Pair(*pair(40)[:2], {"seed": 9})])  # as edit 3
    same = colourful(48, 48)
    write_edit(root, 21, prompt("a long instruction of seven words here"), [Pair(same, same, {"seed": 1})])
    write_edit(root, 22, prompt(), [pair(1)])
    write_seeds(root)
    (root / "0000022" / "1_1.jpg").unlink()
    code, out, _ = program("check", root)
    assert code == 0
    assert out == [
        f"{root}: 5 edits (4 train, 0 val, 1 test) with 6 pairs",
        "sizes: 4 of 32x24, 1 of 48x48",
        "gaps: 1 pairs are missing or damaged, such as: "
        f"{root}/0000022/1_1.jpg cannot be read as an image: No such file or directory",
        "duplicates: 1 pairs repeat an earlier one; in 1 both images are equal",
        "longest instruction, 7 words (CLIP reads 75 tokens, about 55 words): a long instruction of seven words here",
        f"{root / 'check.png'}: 4 samples",
    ]
    assert open_image(root / "check.png").width > 4 * 256
    assert program("check", root / "0000003").code == 2
