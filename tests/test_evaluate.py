"""evaluate.py: what it takes for a success, that the edits are what they claim to be, and the program end to end."""

import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import lines_of, tiny_model
from PIL import Image
from random_model import randomise, small_tokenizer
from torch import nn

import evaluate
from cli import UserError, run_program
from clip_image import CLIP, CLIPImageConfig
from clip_text import CLIPTextConfig
from diffusion import Sampling
from formats.checkpoint import save_clip, save_folder
from images import to_image, to_tensor
from ip2p import InstructPix2Pix
from mini import evaluate_world
from mini.evaluate_world import (
    clip_scores,
    edit_all,
    edited_region,
    held_out_edits,
    l1_outside,
    measure,
    true_pictures,
    wilson,
)
from mini.judge import Judge, truth
from mini.phrasings import HELD_OUT, PHRASINGS
from mini.world import KINDS, held_out, render

pytestmark = pytest.mark.usefixtures("one_thread")


class Oracle(nn.Module):
    """A judge that does not err: it knows the true pictures, and takes a picture for the one that is nearest."""

    def __init__(self, edits):
        super().__init__()
        self.where = nn.Parameter(torch.zeros(1))
        self.readings = [truth(scene) for edit in edits for scene in (edit.before, edit.after)]
        self.known = torch.stack(true_pictures(edits), dim=1).flatten(0, 1)

    def read(self, x):
        distances = torch.cdist(x.flatten(1), self.known.flatten(1))
        return [self.readings[nearest] for nearest in distances.argmin(1)]


@pytest.fixture(scope="module")
def edits():
    return held_out_edits(28)


@pytest.fixture(scope="module")
def pictures(edits):
    return true_pictures(edits)


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
    assert held_out_edits(28) == edits
    assert held_out_edits(14) == edits[:14]
    for others in (held_out_edits(28, validation=True), held_out_edits(28, seed=1)):
        assert not {edit.before for edit in others} & {edit.before for edit in edits}
        assert not {edit.before.layout for edit in others} & {edit.before.layout for edit in edits}  # nor the noise


def test_both_scenes_are_held_out(edits):
    assert all(held_out(edit.before) and held_out(edit.after) for edit in edits)


def test_kinds_and_phrasings_are_balanced(edits):
    assert set(Counter((edit.kind, edit.new_phrasing) for edit in edits).items()) == {
        ((kind, new), 2) for kind in KINDS for new in (False, True)
    }


def test_new_phrasings_are_those_that_training_never_uses(edits):
    def worded(edit, phrasings):
        templates = [re.sub(r"\{\w+\}", r"\\w+", template) for group in phrasings.values() for template in group]
        return any(re.fullmatch(template, edit.instruction) for template in templates)

    for edit in edits:
        assert worded(edit, HELD_OUT if edit.new_phrasing else PHRASINGS), edit


@pytest.mark.parametrize("count", [0, -14, 1, 7, 500])
def test_counts_that_cannot_be_balanced(count):
    with pytest.raises(UserError, match=f"should be a multiple of 14 .*, not {count}$"):
        held_out_edits(count)


def test_true_pictures_are_the_rendered_scenes(edits, pictures):
    for x, scenes in zip(pictures, ([e.before for e in edits], [e.after for e in edits]), strict=True):
        assert torch.equal(x[5], to_tensor(render(scenes[5])))


# ---- success ----


def test_true_pictures_succeed_and_copies_fail(edits, pictures, oracle):
    before, after = pictures
    row = measure(after, edits, before, after, oracle)
    assert row["count"] == 28
    assert row["success"] == row["attributes"] == row["known_phrasings"] == row["new_phrasings"] == 1
    assert set(row["kinds"].values()) == {1}
    assert row["l1_outside"] == 0
    assert row["failed"] == []
    row = measure(before, edits, before, after, oracle, batch=5)
    assert row["success"] == row["attributes"] == row["known_phrasings"] == row["new_phrasings"] == 0
    assert row["l1_outside"] < 1e-3  # it did leave everything alone
    assert row["failed"] == list(range(28))


def test_right_attributes_do_not_excuse_damage_elsewhere(edits, pictures, oracle):
    before, after = pictures
    outside = ~edited_region(before, after)
    _, counts = l1_outside(after, before, after)
    worse, fine = (torch.where(outside, after + 2 * amount, after) for amount in (0.06, 0.04))
    row = measure(worse, edits, before, after, oracle)
    assert row["attributes"] == 1
    assert row["failed"] == np.flatnonzero(counts).tolist()
    assert row["kinds"]["medium"] == 1  # which changes the whole picture
    assert row["kinds"]["colour"] == 0
    assert row["l1_outside"] == pytest.approx(0.06, abs=1e-4)
    assert measure(fine, edits, before, after, oracle)["success"] == 1


def test_damage_inside_the_region_is_left_to_the_judge(edits, pictures, oracle):
    before, after = pictures
    stripes = 0.3 * (-1.0) ** torch.arange(64)
    worse = torch.where(edited_region(before, after), after + stripes, after)
    row = measure(worse, edits, before, after, oracle)
    assert row["l1_outside"] == 0
    assert row["success"] == 1


def test_shares_are_taken_over_the_right_edits(edits, pictures, oracle):
    before, after = pictures
    failing = [n for n, edit in enumerate(edits) if edit.kind == "size" or (edit.kind == "add" and edit.new_phrasing)]
    mixed = after.clone()
    mixed[failing] = before[failing]
    row = measure(mixed, edits, before, after, oracle)
    assert row["failed"] == failing
    assert row["kinds"] == {kind: {"size": 0, "add": 0.5}.get(kind, 1) for kind in KINDS}
    assert row["success"] == pytest.approx(22 / 28)
    assert row["known_phrasings"] == pytest.approx(12 / 14)
    assert row["new_phrasings"] == pytest.approx(10 / 14)
    assert row["interval"] == wilson(22, 28)


def test_region_is_what_changes_and_a_cell_of_the_latent_around():
    before = torch.zeros(3, 3, 16, 12)
    after = before.clone()
    after[0, 1, 8, 5] = 2 * 0.03
    after[1, 1, 8, 5] = 2 * 0.015  # too little
    after[2, 2, 0, 0] = -1.0  # in a corner
    expected = torch.zeros(3, 1, 16, 12, dtype=torch.bool)
    expected[0, :, 4:13, 1:10] = True
    expected[2, :, :5, :5] = True
    assert torch.equal(edited_region(before, after), expected)


def test_l1_outside_by_hand():
    before = torch.zeros(4, 3, 20, 20)
    after = before.clone()
    after[:, :, 10:, :] = 1.0  # the region: rows 6 to 19
    after[2:] = 1.0
    after[3, :, 0, :3] = 0.0
    after[3, :, 3:, :] = 0.0
    pictures = after.clone()
    pictures[0, :, 10, :] = -1.0  # inside
    pictures[1, 0, 2, :10] = 1.0  # 0.5 in [0, 1], at 10 of 120 pixels, in one channel of three
    pictures[2] = -1.0  # everything is inside
    distances, counts = l1_outside(pictures, before, after)
    assert counts.tolist() == [True, True, False, True]
    assert distances.tolist() == pytest.approx([0, 0.5 * 10 / 120 / 3, 0, 0])


def test_l1_outside_is_the_distance_to_the_true_edited_picture():
    before = torch.zeros(1, 3, 16, 16)
    after = before + 2 * 0.015  # a change too faint for the region
    assert l1_outside(before, before, after)[0].item() == pytest.approx(0.015)
    assert l1_outside(after, before, after)[0].item() == 0


@pytest.mark.parametrize(
    ("successes", "count", "interval"),
    [(0, 10, (0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1)), (424, 504, (0.8069, 0.8706))],
)
def test_wilson_intervals(successes, count, interval):
    assert wilson(successes, count) == pytest.approx(interval, abs=1e-4)


# ---- the editors ----


def test_edits_are_those_of_the_library(edits, pictures):
    model, sampling = InstructPix2Pix(tiny_model()), Sampling(3, 2.5, 1.2, 64)
    edited = edit_all(model, edits[:7], pictures[0][:7], sampling, batch=3)
    assert edited.shape == (7, 3, 64, 64)
    for number in (0, 4, 6):
        edit = edits[number]
        alone = model.edit(render(edit.before), edit.instruction, 2.5, 1.2, 3, edit.before.layout, 64)
        difference = np.abs(np.int16(to_image(edited[number])) - np.int16(alone))
        assert difference.max() <= 1


def test_the_floor_is_the_autoencoder_alone(pictures):
    model = InstructPix2Pix(tiny_model())
    with torch.no_grad():
        expected = model.vae.decode(model.vae.encode(pictures[1][:3]).mode()).clamp(-1, 1)
    torch.testing.assert_close(evaluate_world.through_vae(model, pictures[1][:3], batch=2), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_clip_scores_by_their_definition(edits, pictures, clip):
    (model, tokenizer), (before, after) = clip, pictures
    expected = []
    for number in range(5):
        pairs = torch.stack([before[number], after[number]])
        image = model.image.features((pairs + 1) / 2).numpy()
        texts = [evaluate_world.caption(scene) for scene in (edits[number].before, edits[number].after)]
        text = model.text.features(tokenizer(texts)).numpy()
        turn, said = image[1] - image[0], text[1] - text[0]
        directional = turn @ said / np.linalg.norm(turn) / np.linalg.norm(said)
        expected.append([image[0] @ image[1], directional, image[1] @ text[1]])
    scores = clip_scores(model, tokenizer, after[:5], edits[:5], before[:5], batch=2)
    assert list(scores) == ["image_image", "directional", "image_caption"]
    assert list(scores.values()) == pytest.approx(np.mean(expected, axis=0), abs=1e-4)
    copied = clip_scores(model, tokenizer, before, edits, before)
    assert copied["image_image"] == pytest.approx(1)
    assert copied["directional"] == 0


# ---- the program ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    """What the program needs, with random weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_folder(tiny_model(), folder / "editor")
    save_folder(tiny_model(seed=9), folder / "bound")
    save_folder(tiny_model(in_channels=4), folder / "sd")
    save_clip(*clip, folder / "clip")
    torch.manual_seed(0)
    Judge().save(folder / "judge.safetensors")
    return folder


def arguments(folder, **changed):
    """The command line, with some values changed."""
    own = {"model": folder / "editor", "judge": folder / "judge.safetensors", "clip": folder / "clip"}
    values = {**own, "count": 14, "batch": 8, **changed}
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
    return ["world", *(word for pair in given for word in pair)]


def test_the_program_writes_its_results(folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    evaluate.main(arguments(folder, out=out, bound=folder / "bound", steps=1, cfg_text=2.0))
    assert sorted(path.name for path in out.iterdir()) == ["world.json", "world.md", "world.png"]

    results = json.loads((out / "world.json").read_text(), parse_constant=pytest.fail)  # a NaN would be no JSON
    names = ["EDITOR", "BOUND", "COPY", "FLOOR", "TRUE"]
    assert list(results["rows"]) == [getattr(evaluate_world, name) for name in names]
    assert list(results["clip"]) == [evaluate_world.EDITOR, evaluate_world.BOUND, "true picture"]
    assert results["rows"][evaluate_world.EDITOR] != results["rows"][evaluate_world.BOUND]
    assert results["rows"][evaluate_world.TRUE]["l1_outside"] == 0
    chosen = {"steps": 1, "text_guidance": 2.0, "image_guidance": 1.5, "resolution": 64}
    assert results["settings"]["sampling"] == {evaluate_world.EDITOR: chosen, evaluate_world.BOUND: chosen}
    assert results["settings"]["validation"] is False

    text = (out / "world.md").read_text()
    assert "14 held-out edits" in text
    for title, table in evaluate_world.tables(results).items():
        assert f"## {title}\n\n{table}\n" in text
        assert len({line.count("|") for line in table.splitlines()}) == 1  # every line has as many cells
    assert "| | " + " | ".join(KINDS) + " |" in text.replace("|  |", "| |")
    overall = evaluate_world.tables(results)["Overall"]
    assert capsys.readouterr().out.startswith(overall + "\n")
    assert len(overall.splitlines()) == 2 + len(names)

    with Image.open(out / "world.png") as sheet:
        assert sheet.width > 6 * 128
        assert sheet.height > 7 * 128
        pixels = np.asarray(sheet.convert("RGB"))
    first = np.asarray(to_image(to_tensor(render(held_out_edits(14)[0].before)))).repeat(2, 0).repeat(2, 1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:256, :256, 0], (128, 128))
    assert (windows == first[:, :, 0]).all((2, 3)).any()  # enlarged without smoothing


def test_validation_uses_other_edits_and_says_so(folder, tmp_path):
    for name, more in [("report", []), ("again", []), ("validation", ["--validation"])]:
        evaluate.main([*arguments(folder, out=tmp_path / name, steps=1), *more])
    report, again, validation = (
        json.loads((tmp_path / name / "world.json").read_text()) for name in ("report", "again", "validation")
    )
    assert report["rows"] == again["rows"]
    assert report["clip"] == again["clip"]
    assert report["clip"]["true picture"] != validation["clip"]["true picture"]
    assert "14 validation edits" in (tmp_path / "validation" / "world.md").read_text()
    assert evaluate_world.BOUND not in report["rows"]


def test_numbers_in_the_tables():
    row = {
        "success": 0.841,
        "interval": [0.8069, 0.8706],
        "attributes": 0.9,
        "l1_outside": None,
        "known_phrasings": 0.88,
        "new_phrasings": 0.802,
        "kinds": dict.fromkeys(KINDS, 0.5),
    }
    results = {"rows": {"x": row}, "clip": {"x": {"a": 0.7, "b": 0.25, "c": 0.5}}}
    lines = [table.splitlines()[-1] for table in evaluate_world.tables(results).values()]
    assert lines == [
        "| x | **84.1 %** [80.7 to 87.1 %] | 90.0 % | none | 88.0 % | 80.2 % |",
        "| x | " + " | ".join(["50.0 %"] * 7) + " |",
        "| x | 0.700 | 0.250 | 0.500 |",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 10}, "the count of edits should be a multiple of 14 (kinds x phrasings), not 10"),
        ({"batch": 0}, "--batch should be at least 1, not 0"),
        ({"threads": 0}, "--threads should be at least 1, not 0"),
        ({"steps": 0}, "the steps should be between 1 and 1000, not 0"),
        ({"cfg_text": "nan"}, "the text guidance should be between 0 and 100, not nan"),
        ({"cfg_image": -1}, "the image guidance should be between 0 and 100, not -1.0"),
        ({"seed": -1}, "a seed should be a whole number from 0 to"),
        ({"device": "nonsense"}, "this machine or this torch has no device nonsense; try --device cpu"),
        ({"model": "no/such/folder"}, "there are no weights at no/such/folder"),
        ({"bound": "no/such/folder"}, "there are no weights at no/such/folder"),
        ({"judge": "no/such.safetensors"}, "there is no judge at no/such.safetensors"),
        ({"clip": "no/such/folder"}, "there are no weights at no/such/folder"),
        ({"model": "SD"}, "is a text-to-image Stable Diffusion checkpoint"),
        ({"out": "FILE"}, "cannot make the folder"),
        ({"count": "many"}, "argument --count: invalid int value"),
        ({"nonsense": 1}, "unrecognized arguments: --nonsense 1"),
    ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, capsys, monkeypatch, changed, message):
    (tmp_path / "file").touch()
    places = {"SD": folder / "sd", "FILE": tmp_path / "file"}
    values = {"out": tmp_path / "out"} | {name: places.get(value, value) for name, value in changed.items()}
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(folder, **values)])
    with pytest.raises(SystemExit) as end:
        run_program(evaluate.main)
    assert end.value.code == 2
    (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith("evaluate.py")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_program_must_be_named(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main([])
    assert end.value.code == 2
    assert re.fullmatch(r"evaluate\.py: .*world.*\n", capsys.readouterr().err)
