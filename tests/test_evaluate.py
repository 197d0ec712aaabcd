"""evaluate.py: what it takes for a success, that the edits are what they claim to be, and the program end to end."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import randomise, small_tokenizer, tiny_model
from torch import nn

import evaluate
from clip_image import CLIP, CLIPImageConfig
from clip_text import CLIPTextConfig
from formats.checkpoint import save_clip, save_folder
from images import to_tensor
from mini import evaluation
from mini.drawing import render
from mini.evaluation import clip_scores, edited_region, held_out_edits, l1_outside, measure, true_images, wilson
from mini.faults import VISIBLE, fault
from mini.judge import Judge, labels
from mini.wording import CLASSES, STYLES
from mini.world import KINDS, P_RANGE
from p2p import P_RANGE as PAPERS_P_RANGE
from p2p import PairNoise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def program(run_main):
    return partial(run_main, evaluate)


class Oracle(nn.Module):
    """A judge that knows the true images, and takes an image for the nearest."""

    def __init__(self, edits):
        super().__init__()
        self.where = nn.Parameter(torch.zeros(1))
        scenes = [scene for edit in edits for scene in (edit.before, edit.after)]
        self.classes, self.known = labels(scenes), torch.stack(true_images(edits), dim=1).flatten(0, 1)
        texts = [text for edit in edits for text in edit.captions]
        self.drawn = dict(zip(texts, self.known, strict=True))

    def read(self, x):
        return self.classes[torch.cdist(x.flatten(1), self.known.flatten(1)).argmin(1)]

    def sample_pairs(self, model, before, after, noise, steps=None):
        return tuple(torch.stack([self.drawn[text] for text in texts]) for texts in (before, after))


@pytest.fixture(scope="module")
def edits():
    return held_out_edits(30)


@pytest.fixture(scope="module")
def images(edits):
    return true_images(edits)


@pytest.fixture(scope="module")
def oracle(edits):
    return Oracle(edits)


@pytest.fixture(scope="module")
def clip():
    tokenizer = small_tokenizer(tokens=96)  # whole captions, almost letter by letter
    size = len(tokenizer.vocabulary)
    text = CLIPTextConfig(size, tokenizer.tokens, width=16, layers=1, heads=2, end_token=tokenizer.end, projection=8)
    image = CLIPImageConfig(size=64, patch=16, width=16, layers=1, heads=2, projection=8)
    return randomise(CLIP(text, image), 0).eval(), tokenizer


# ---- the edits ----


def test_equal_seeds_give_equal_edits_and_other_streams_others(edits):
    assert held_out_edits(60)[:30] == edits == held_out_edits(30)
    assert [edit.wording for edit in edits[::10]] == list(CLASSES)
    for others in (held_out_edits(30, validation=True), held_out_edits(30, seed=1)):
        assert not {edit.before.layout for edit in others} & {edit.before.layout for edit in edits}  # nor the noise


# ---- success ----


def test_true_images_succeed_and_copies_fail(edits, images, oracle):
    before, after = images
    row = measure(after, edits, before, after, oracle)
    assert (row["count"], row["l1_outside"], row["failed"]) == (30, 0, [])
    assert row["success"] == row["clean"] == row["attributes"] == 1
    parts = [pair for name in ("kinds", "wordings", "styles") for pair in row[name].values()]
    assert all(pair in ([1, 1], [None, None]) for pair in parts)
    assert (len(row["styles"]), len(row["wordings"])) == (len(STYLES), len(CLASSES))
    row = measure(before, edits, before, after, oracle)
    assert row["l1_outside"] < 1e-3  # it did leave everything alone
    assert row["success"] == row["clean"] == row["attributes"] == 0.1  # of requests for nothing
    assert row["kinds"] == {kind: [1, 1] if kind == "nothing" else [0, 0] for kind in KINDS}
    assert row["failed"] == [number for number, edit in enumerate(edits) if edit.kind != "nothing"]


def test_right_attributes_do_not_excuse_damage_elsewhere(edits, images, oracle):
    before, after = images
    outside = ~edited_region(before, after)
    _, counts = l1_outside(after, before, after)
    worse, fine = (torch.where(outside, after + 2 * amount, after) for amount in (0.06, 0.04))
    row = measure(worse, edits, before, after, oracle)
    assert row["attributes"] == 1
    assert row["failed"] == np.flatnonzero(counts).tolist()
    assert row["kinds"]["medium"][0] == 1  # which changes the whole image
    assert row["kinds"]["colour"] == [0, 0]
    assert row["l1_outside"] == pytest.approx(0.06, abs=1e-4)
    assert measure(fine, edits, before, after, oracle)["success"] == 1


def test_region_is_what_changes_and_a_cell_of_the_latent_around():
    before = torch.zeros(3, 3, 20, 16)
    after = before.clone()
    after[0, 1, 8, 5] = 2 * 0.03
    after[1, 1, 8, 5] = 2 * 0.015  # too little
    after[2, 2, 0, 0] = -1.0  # in a corner
    expected = torch.zeros(3, 1, 20, 16, dtype=torch.bool)
    expected[0, :, 0:17, 0:14] = True
    expected[2, :, :9, :9] = True
    assert torch.equal(edited_region(before, after), expected)


def test_l1_outside_by_hand():
    before = torch.zeros(4, 3, 24, 20)
    after = before.clone()
    after[:, :, 14:, :] = 1.0  # the region: rows 6 to 23
    after[2:] = 1.0
    after[3, :, 0, :3] = 0.0
    after[3, :, 3:, :] = 0.0
    images = after.clone()
    images[0, :, 14, :] = -1.0  # inside
    images[1, 0, 2, :10] = 1.0  # 0.5 in [0, 1], at 10 of 120 pixels, in one channel of three
    images[2] = -1.0  # everything is inside
    distances, counts = l1_outside(images, before, after)
    assert counts.tolist() == [True, True, False, True]
    assert distances.tolist() == pytest.approx([0, 0.5 * 10 / 120 / 3, 0, 0])


@pytest.mark.parametrize(
    ("successes", "count", "interval"),
    [(0, 10, (0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1)), (424, 504, (0.8069, 0.8706))],
)
def test_wilson_intervals(successes, count, interval):
    assert wilson(successes, count) == pytest.approx(interval, abs=1e-4)


# ---- the editors ----


@torch.no_grad()
def test_clip_scores_by_their_definition(edits, images, clip):
    (model, tokenizer), (before, after) = clip, images
    expected = []
    for number in range(5):
        pairs = torch.stack([before[number], after[number]])
        image = model.image.features((pairs + 1) / 2).numpy()
        text = model.text.features(tokenizer(list(edits[number].captions))).numpy()
        turn, said = image[1] - image[0], text[1] - text[0]
        directional = turn @ said / np.linalg.norm(turn) / np.linalg.norm(said)
        expected.append([image[0] @ image[1], directional, image[1] @ text[1]])
    scores = clip_scores(model, tokenizer, after[:5], edits[:5], before[:5], batch_size=2)
    assert list(scores) == ["image_image", "directional", "image_caption"]
    assert list(scores.values()) == pytest.approx(np.mean(expected, axis=0), abs=1e-4)
    copied = clip_scores(model, tokenizer, before, edits, before)
    assert copied["image_image"] == pytest.approx(1)
    assert copied["directional"] == 0


def test_faults_that_anyone_would_see(edits, images):
    """A second moon, a ghost of what should be gone, a spot; not a blur, nor a new thing a little aside."""
    before, after = images
    assert all(fault(x, edit) == 0 for x, edit in zip(after, edits, strict=True))
    (position,) = [number for number, edit in enumerate(edits[:10]) if edit.kind == "remove"]
    edit, x = edits[position], after[position]
    assert fault(0.5 * x + 0.5 * before[position], edit) > VISIBLE
    spot = x.clone()
    spot[:, 20:30, 50:60] = 1 - spot[:, 20:30, 50:60].clamp(0, 1)
    assert fault(spot, edit) > VISIBLE
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x[None], [1] * 4, mode="replicate"), 3, 1)[0]
    assert fault(blurred, edit) < VISIBLE
    (edit,) = [edit for edit in edits[:10] if edit.kind == "add"]
    aside = [(1.5, -2) if getattr(edit.before, side) is None else (0, 0) for side in ("left", "right")]
    assert fault(to_tensor(render(edit.after, shifts=aside)), edit) == 0


# ---- generated pairs ----


MODEL = SimpleNamespace(
    sampling=SimpleNamespace(resolution=128),
    vae=SimpleNamespace(config=SimpleNamespace(factor=8, latent_channels=4)),
    device="cpu",
)


def test_the_noise_of_pairs(edits, oracle, monkeypatch):
    """Every edit's number is its seed, p and the guidance are drawn from their ranges, whatever the batch size."""
    drawn = []

    def sample_pairs(model, before, after, noise, steps):
        drawn.append(noise)
        return oracle.sample_pairs(model, before, after, noise, steps)

    monkeypatch.setattr(evaluation, "sample_pairs", sample_pairs)
    evaluation.generate(MODEL, oracle, edits, (3.0, 6.0), 7, 10)
    p = [P_RANGE if edit.before.background != edit.after.background else PAPERS_P_RANGE for edit in edits]
    expected = PairNoise(range(30), (4, 16, 16), (3.0, 6.0), p)
    for name in ("p", "guidance"):
        assert torch.equal(torch.cat([getattr(noise, name) for noise in drawn]), getattr(expected, name))
    first = torch.cat([noise.first.chunk(2)[0] for noise in drawn])
    assert torch.equal(first, expected.first.chunk(2)[0])


def test_pairs_are_counted_by_kind(edits):
    """Of 30 pairs, three of a kind: a colour is wrong, the filter keeps a wrong shape among others, and no size."""
    kinds = [edit.kind for edit in edits]
    colour, shape, size = ([i for i, own in enumerate(kinds) if own == kind] for kind in ("colour", "shape", "size"))
    found, kept = np.ones(30, bool), np.ones(30, bool)
    found[[colour[0], shape[1]]] = False
    kept[[colour[0], shape[2], *size]] = False
    rows = evaluation.pair_rows(edits, found, kept)
    assert list(rows) == ["all", *KINDS]
    assert rows["all"] == {"pairs": 30, "right": 28 / 30, "kept": 25 / 30, "right_kept": 24 / 25}
    assert rows["colour"] == {"pairs": 3, "right": 2 / 3, "kept": 2 / 3, "right_kept": 1}
    assert rows["shape"] == {"pairs": 3, "right": 2 / 3, "kept": 2 / 3, "right_kept": 0.5}
    assert rows["size"] == {"pairs": 3, "right": 1, "kept": 0, "right_kept": None}
    assert rows["add"] == {"pairs": 3, "right": 1, "kept": 1, "right_kept": 1}


# ---- the program ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    """What the program needs, with random weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_folder(tiny_model(), folder / "editor")
    save_folder(tiny_model(seed=9), folder / "bound")
    sd = tiny_model(in_channels=4)
    sd.sampling = replace(sd.sampling, resolution=128)  # as large as the judge looks at
    save_folder(sd, folder / "sd")
    save_clip(*clip, folder / "clip")
    (folder / "clip" / "filter.json").write_text('{"image_text": -1, "image_image": 0.5, "direction": -1}')
    torch.manual_seed(0)
    Judge().save(folder / "judge.safetensors")
    return folder


def arguments(folder, **changed):
    """The command line, with some values changed."""
    own = {"model": folder / "editor", "judge": folder / "judge.safetensors", "clip": folder / "clip"}
    values = {**own, "count": 30, "batch_size": 10, **changed}
    return ["world", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def test_the_program_writes_its_results(folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    evaluate.main(arguments(folder, out=out, bound=folder / "bound", steps=1, cfg_text=2.0, sampler="heun"))
    assert sorted(path.name for path in out.iterdir()) == ["world.json", "world.md", "world.png"]

    results = json.loads((out / "world.json").read_text(), parse_constant=pytest.fail)  # a NaN would be no JSON
    names = ["EDITOR", "BOUND", "COPY", "FLOOR", "TRUE"]
    assert list(results["rows"]) == [getattr(evaluation, name) for name in names]
    assert list(results["clip"]) == [evaluation.EDITOR, evaluation.BOUND, "true image"]
    assert results["rows"][evaluation.EDITOR] != results["rows"][evaluation.BOUND]
    assert results["rows"][evaluation.TRUE]["l1_outside"] == 0
    chosen = {"steps": 1, "text_guidance": 2.0, "image_guidance": 1.5, "resolution": 64}
    chosen |= {"sampler": "heun", "schedule": "authors"}
    assert results["settings"]["sampling"] == {evaluation.EDITOR: chosen, evaluation.BOUND: chosen}

    text, tables = (out / "world.md").read_text(), evaluation.tables(results)
    assert "30 held-out edits" in text
    for title, table in tables.items():
        assert f"## {title}\n\n{table}\n" in text
        assert len({line.count("|") for line in table.splitlines()}) == 1  # every line has as many cells
    assert capsys.readouterr().out.startswith(tables["Overall"] + "\n")
    assert len(tables["Overall"].splitlines()) == 2 + len(names)
    assert Image.open(out / "world.png").width > 6 * 128


def test_the_pairs_program(folder, tmp_path, capsys):
    paths = {"sd": folder / "sd", "judge": folder / "judge.safetensors", "clip": folder / "clip", "out": tmp_path}
    own = [f"--{name}={path}" for name, path in paths.items()]
    evaluate.main(["pairs", *own, "--count=3", "--batch-size=2", "--steps=1", "--guidance", "2", "3"])
    results = json.loads((tmp_path / "pairs.json").read_text())
    assert [row["pairs"] for row in results["rows"].values()] == [3, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert results["rows"]["all"]["kept"] == 1
    assert results["rows"]["all"]["right"] == results["rows"]["all"]["right_kept"]
    report = (tmp_path / "pairs.md").read_text()
    assert all(words in report for words in (*KINDS, "| 100.0 % |", "| 0 | none | none | none |", "image_image 0.5"))
    assert Image.open(tmp_path / "pairs.png").width > 6 * 128
    assert report.strip().splitlines()[-1] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 10}, "the count of edits should be a multiple of 30 (kinds x wordings), not 10"),
        ({"cfg_text": "nan"}, "--cfg-text: should be from 0 to 100, not nan"),
        ({"device": "nonsense"}, "this machine or this torch has no device nonsense"),
        ({"model": "no/such/folder"}, "there are no weights at no/such/folder"),
        ({"judge": "no/such.safetensors"}, "no/such.safetensors cannot be read"),
        ({"model": "SD"}, "is a text-to-image checkpoint"),
        ({"out": "FILE"}, "file: File exists"),
    ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, program, changed, message):
    (tmp_path / "file").touch()
    places = {"SD": folder / "sd", "FILE": tmp_path / "file"}
    values = {"out": tmp_path / "out"} | {name: places.get(value, value) for name, value in changed.items()}
    code, _, (line,) = program(*arguments(folder, **values))
    assert code == 2
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
