"""evaluate.py's commands of Section 4 at toy size: tiny models with random weights, two steps."""

import json
from dataclasses import replace
from unittest.mock import ANY

from cli import SAMPLERS, UserError

import pytest
import torch
from conftest import colourful
from language_model import LanguageModel
from random_model import randomise, small_tokenizer, tiny_model
from test_evaluate import Oracle

import evaluate
from clip_image import CLIP, CLIPImageConfig
from clip_text import CLIPTextConfig
from formats.checkpoint import save_clip, save_folder
from gpu.savings import Savings
from images import open_image
from mini.evaluation import held_out_edits
from mini.judge import Judge
from mini.world import SIZE, Edit, Scene, Thing, held_out
from section4 import limits, methods, metrics, prices
from section4.chains import random_chain
from section4.limits import chi_squared
from section4.vision import rate
from training import plot

pytestmark = pytest.mark.usefixtures("one_thread")
NO_EDITS = ["copy the input", "true image", "true image, autoencoder"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models that the commands need."""
    folder, tokenizer = tmp_path_factory.mktemp("section4"), small_tokenizer(tokens=96)
    for name, model in (("editor", tiny_model()), ("other", tiny_model(seed=9)), ("sd", tiny_model(in_channels=4))):
        model.sampling = replace(model.sampling, resolution=SIZE)
        save_folder(model, folder / name)
    text = CLIPTextConfig(len(tokenizer.vocabulary), tokenizer.tokens, 16, 1, 2, end_token=tokenizer.end, projection=8)
    for seed, name in enumerate(("clip", "clip2")):
        image = CLIPImageConfig(size=64, patch=16, width=16, layers=1, heads=2, projection=8)
        save_clip(randomise(CLIP(text, image), seed).eval(), tokenizer, folder / name)
    torch.manual_seed(0)
    Judge().save(folder / "judge.safetensors")
    return folder


@pytest.fixture(autouse=True)
def coarse_plots(monkeypatch):
    """Drawn at once at their size, without averaging down: a quarter of the time."""
    monkeypatch.setattr(plot, "FINE", 1)


@pytest.fixture
def evaluated(folder, tmp_path, run_main):
    """Run a command on these models: (exit code, the last line of stderr, what NAME.json of its results holds)."""

    def run(command, *more, name=None):
        named = {"weights": folder / "editor", "sd": folder / "sd", "clip": folder / "clip", "steps": 2, "count": 4}
        named |= {"judge": folder / "judge.safetensors", "out": tmp_path / "out", "batch-size": 3}
        flags = [part for key, value in named.items() for part in (f"--{key}", value)]
        code, _, err = run_main(evaluate, command, *flags, *more)
        path = tmp_path / "out" / f"{name or command}.json"
        return code, err[-1] if err else "", json.loads(path.read_text()) if path.exists() else None

    return run


def test_fig_8_and_fig_23(evaluated, folder, tmp_path):
    """All points of all methods, for two CLIPs; what edits nothing is where it must be."""
    chosen = ["--points", "2", "--methods", "ip2p", "sdedit", "p2p-null", "p2p-caption"]
    code, _, rows = evaluated("curves", *chosen, "--count", "2", "--clip", folder / "clip", folder / "clip2")
    assert code == 0
    assert [row["value"] for row in rows[:4]] == [1.0, 2.2, 0.3, 0.9]
    assert [row["name"] for row in rows[8:]] == NO_EDITS
    copy, true, _ = rows[8:]
    assert (copy["image"], copy["direction"], copy["success"]) == (pytest.approx(1, abs=1e-5), 0, 0)
    assert true["l1_outside"] == 0
    assert all(row["image_low"] <= row["image"] <= row["image_high"] for row in rows)
    second = json.loads((tmp_path / "out" / "curves_2.json").read_text())
    assert second[8]["image"] == pytest.approx(1, abs=1e-5)
    assert second[0]["image"] != rows[0]["image"]
    report = (tmp_path / "out" / "curves.md").read_text()
    assert "InstructPix2Pix (ours) leads" in report
    assert len((tmp_path / "out" / "curves.csv").read_text().splitlines()) == 1 + len(rows)
    assert open_image(tmp_path / "out" / "curves_2.png").width > 1000


def test_a_stopped_run_resumes(evaluated, tmp_path, monkeypatch):
    """Only what is missing is edited anew, to the same numbers; other settings are refused."""
    arguments = "curves", "--points", "2", "--methods", "ip2p"
    _, _, rows = evaluated(*arguments)
    (tmp_path / "out" / "scores" / "ip2p-2.2" / "000003.json").unlink()
    edited, edit = [], methods.METHODS["ip2p"].edit

    def recorded(lab, value, cases):
        edited.append((value, len(cases)))
        return edit(lab, value, cases)

    monkeypatch.setitem(methods.METHODS, "ip2p", methods.METHODS["ip2p"]._replace(edit=recorded))
    assert evaluated(*arguments)[2] == rows
    assert edited == [(2.2, 1)]
    code, line, _ = evaluated(*arguments, "--seed", "1")
    assert code == 2
    assert "the output was begun with seed 0, not 1" in line


def test_the_price_list(evaluated, monkeypatch, tmp_path):
    """Every sampler at every number of steps, and what is left out; the cheapest that is as good is named."""
    monkeypatch.setattr(prices, "STEPS", (2, 4))
    monkeypatch.setattr(prices, "SAVED", {"null-2": Savings(null_every=2), "deep-2": Savings(deep_every=2)})
    code, _, rows = evaluated("prices", "--count", "2", "--steps", "4")
    assert code == 0
    costs = {row["name"]: row["evaluations"] for row in rows}
    assert len(costs) == 2 * len(SAMPLERS) + 1 + 4
    assert [costs[name] for name in ("euler 2", "heun 2", "unipc 4", "authors: 100 steps")] == [6, 9, 12, 300]
    assert [costs[f"unipc 4, {saving}"] for saving in ("null-2", "deep-2")] == [10, 12]
    assert [row["evaluations"] for row in rows] == sorted(costs.values())
    assert "The cheapest within a point of the best, 0.0 %: euler" in (tmp_path / "out" / "prices.md").read_text()


def test_fig_10_of_three_editors_the_last_with_two_seeds(evaluated, folder):
    editors = [f"full={folder}/editor", f"other={folder}/other", f"both={folder}/editor,{folder}/other"]
    code, _, rows = evaluated("ablation", "--points", "2", "--editors", *editors)
    assert code == 0
    full, other, both = (rows[number]["direction"] for number in (0, 2, 4))
    assert full != other
    assert both == pytest.approx((full + other) / 2)


def test_fig_9_of_ones_own_image(evaluated, tmp_path, monkeypatch):
    usual = methods.METHODS["text2live"]._replace(usual=1)
    monkeypatch.setitem(methods.METHODS, "text2live", usual)
    colourful(90, 70).save(tmp_path / "photo.png")
    own = "--image", tmp_path / "photo.png", "--instr", "make it night"
    texts = "--caption-before", "a house", "--caption-after", "a house at night"
    code, line, _ = evaluated("compare", *own)
    assert code == 2
    assert 'captions of the image before and after are needed here, and the edit "make it night" lacks one' in line
    assert evaluated("compare", *own, *texts)[:2] == (2, ANY)  # the folder holds results of other settings
    (tmp_path / "out" / "settings.json").unlink()
    assert evaluated("compare", *own, *texts)[0] == 0
    made = {path.stem for path in (tmp_path / "out" / "images" / "00000").iterdir()}
    assert made == {*methods.METHODS} - {"p2p-caption"}
    assert open_image(tmp_path / "out" / "compare.png").width > 6 * SIZE


def test_repeated_edits(evaluated, tmp_path):
    code, _, rows = evaluated("sequence", "--length", "2")
    assert (code, len(rows)) == (0, 6)
    assert [(row["way"], row["count"]) for row in rows[3:]] == [("edits", 2), ("once", 2), ("trips", 2)]
    assert (tmp_path / "out" / "images" / "00003" / "edit_2.png").exists()


def test_places_and_numbers(evaluated):
    code, _, rows = evaluated("failures")
    assert (code, [row["name"] for row in rows]) == (0, ["move", "swap", "double", "as in training"])
    assert all(row["count"] == 4 and row["success"] == 0 for row in rows)


def test_what_is_left_open(evaluated, monkeypatch, tmp_path):
    """A judge that reads the same thing in every image; the data is a file of two edits."""
    added = "small red star", "small pink ball"
    edits = [{"caption": "a", "edit": f"add a {words}", "output": "b"} for words in added]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    shapes = {"ball": 1, "star": 2, "heart": 3}
    monkeypatch.setattr(limits, "open_edit", lambda rng: star_to_add())
    classes = torch.tensor([[0, 0, 1, 0, 0, shapes["star"], 5, 1]])  # on the right a large pink star
    monkeypatch.setattr(Judge, "read", lambda self, x: classes.expand(len(x), -1))
    code, _, rows = evaluated("bias", "--data", tmp_path / "edits.jsonl")
    found = {row["name"]: (row["success"], row["data_success"]) for row in rows}
    assert code == 0
    assert (found["pink"], found["red"], found["large"], found["small"]) == ((1, 0.5), (0, 0.5), (1, 0), (0, 1))


def star_to_add():
    scene = Scene("painting", "sea", Thing("ball", "red", "small"), None, 5)
    return Edit("add", "add a star", scene, replace(scene, right=Thing("star", "red", "large")))


@pytest.mark.slow
def test_the_metrics_are_judged_by_success(evaluated, monkeypatch):
    """A judge that takes an image for the nearest true one, and a vision-language model that is always content."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setattr(Judge, "load", lambda *_: Oracle(held_out_edits(14)[:2]))
    for name in ("TEXT_FACTORS", "IMAGE_FACTORS", "STEPS"):
        monkeypatch.setattr(metrics, name, (1,))
    arguments = "metrics", "--vision", "any-model", "--count", "2", "--batch-size", "2"
    with LanguageModel(lambda caption, time: "marks") as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        code, line, rows = evaluated(*arguments)
    assert code == 0, line
    found = {row["name"]: row for row in rows}
    assert found["L1 to the true image"]["auc_success"] == 1
    assert found["a vision-language model"]["auc_success"] == 0.5
    parts = model.requests[0]["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert all(part["image_url"]["url"].startswith("data:image/jpeg;base64,") for part in parts[:2])
    assert evaluated(*arguments)[2] == rows  # without the server: its marks are kept


def test_a_vision_language_model_without_marks_is_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    with LanguageModel(lambda caption, time: "prose") as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        with pytest.raises(UserError, match="any-model gave no two marks from 0 to 10 in 3 answers"):
            rate("any-model", [(colourful(8, 8), colourful(8, 8), "make it night")])


def test_the_best_of_several(evaluated, monkeypatch):
    """An oracle never does worse than one sample, and all ways are the same with one candidate."""
    monkeypatch.setattr(Judge, "load", lambda *_: Oracle(held_out_edits(14)[:4]))
    code, _, rows = evaluated("best", "--best", "3")
    rates = {(row["way"], row["count"]): row["success"] for row in rows}
    assert code == 0
    assert {count for _, count in rates} == {1, 2, 3}
    assert all(rates["oracle", 3] >= rate for rate in rates.values())
    assert len({rate for (_, count), rate in rates.items() if count == 1}) == 1


def test_chains_lead_from_scene_to_scene():
    for number in range(5):
        chain = random_chain(number, 4, 0)
        assert all(edit.before == before.after for before, edit in zip(chain, chain[1:], strict=False))
        assert all(held_out(edit.after) for edit in chain)


def test_chi_squared():
    assert chi_squared([10, 10], [0.5, 0.5]) == (0, 1)
    assert chi_squared([15, 5], [0.5, 0.5]) == pytest.approx((5, 0.02535), abs=1e-4)
