"""datagen.py: triplets by rule, pairs end to end with tiny models, and that it may be stopped and split at will."""

import json
import re
import shutil
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import lines_of, tiny_model
from PIL import Image
from random_model import randomise, small_tokenizer

import datagen
import pairs as pairs_module
from cli import run_program
from clip_image import CLIP, CLIPImageConfig
from clip_text import CLIPTextConfig
from dataset import EditDataset, Filter
from formats.checkpoint import load, load_clip, save_clip, save_folder
from gpu.compiled import NOTICE
from images import to_image, to_tensor
from language.captions import read_edits
from mini.phrasings import PHRASINGS
from mini.world import (
    BACKGROUNDS,
    COLOURS,
    MEDIA,
    SHAPES,
    SIZES,
    caption,
    held_out,
    random_edit,
    random_scene,
    read_caption,
    render,
)
from p2p import P_RANGE, PairNoise, sample_pairs
from stable_diffusion import StableDiffusion

pytestmark = pytest.mark.usefixtures("one_thread")

EDITS = [  # short, for tiny tokenizers read letter by letter
    {"caption": "a red ball", "edit": "make it blue", "output": "a blue ball", "url": "http://a"},
    {"caption": "a café", "edit": "make it night", "output": "a café at night"},
    {"caption": "the sea", "edit": "as a mosaic", "output": "a mosaic", "url": None, "more": 1},
    {"caption": "nothing", "edit": "add a tree", "output": "a tree", "url": None},
]
SAMPLES, KEEP, BATCH = 3, 2, 6
OPEN = ["--min-image-text=-1", "--min-image-image=-1", "--min-direction=-1"]  # whatever the similarities, it passes
NAMES = ["seed", "p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny Stable Diffusion in sd, a CLIP in clip, and the edits. Shared: copy before changing it."""
    folder = tmp_path_factory.mktemp("datagen")
    save_folder(tiny_model(in_channels=4), folder / "sd")
    tokenizer = small_tokenizer()
    size = len(tokenizer.vocabulary)
    text = CLIPTextConfig(size, tokenizer.tokens, width=16, layers=1, heads=2, end_token=tokenizer.end, projection=8)
    image = CLIPImageConfig(size=64, patch=16, width=16, layers=1, heads=2, projection=8)
    save_clip(randomise(CLIP(text, image), 0).eval(), tokenizer, folder / "clip")
    (folder / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
    return folder


def command(models, out, *more, **changed):
    """The command line for a data set, with some values changed."""
    values = {"edits": models / "edits.jsonl", "out": out, "weights": models / "sd", "clip": models / "clip"}
    values |= {"samples": SAMPLES, "keep": KEEP, "batch": BATCH} | changed
    own = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return ["images", *own, "--guidance", "2", "4", *map(str, more)]


@pytest.fixture(scope="module")
def pairs(models, tmp_path_factory):
    """The data set, made in one go. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("pairs") / "data"
    datagen.main(command(models, folder, *OPEN))
    return folder


@pytest.fixture
def program(capsys, monkeypatch):
    """datagen.py with the arguments given: (exit code, lines of stdout, lines of stderr without the progress bar)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["datagen.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_program(datagen.main)
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        errors = [line for line in lines_of(captured.err) if not re.match(r"\w+: +\d+%", line)]
        return code, captured.out.splitlines(), errors

    return run


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def candidates_of(folder, name="candidates.jsonl"):
    """{edit: its line}."""
    return {entry["edit"]: entry for entry in read_lines(folder / name)}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal_but_for_rounding(folder, other):
    """The same files; similarities and pixels that differ no more than batches of other sizes make them differ."""
    assert contents(folder).keys() == contents(other).keys()
    assert (folder / "seeds.json").read_bytes() == (other / "seeds.json").read_bytes()
    ours, theirs = candidates_of(folder), candidates_of(other)
    assert ours.keys() == theirs.keys()
    for number, entry in ours.items():
        assert entry["kept"] == theirs[number]["kept"]
        for one, two in zip(entry["candidates"], theirs[number]["candidates"], strict=True):
            assert one == pytest.approx(two, abs=2e-3)
    for path in folder.rglob("*.jpg"):
        one, two = (np.asarray(Image.open(p), dtype=int) for p in (path, other / path.relative_to(folder)))
        assert np.abs(one - two).max() <= 4
        assert np.abs(one - two).mean() < 0.05


# ---- text ----


def test_triplets_by_rule(program, tmp_path):
    """Their words are the world's, in the phrasings of training, and no composition is a held-out one."""
    out = tmp_path / "edits.jsonl"
    code, lines, errors = program("text", "--count=300", f"--out={out}")
    assert (code, lines, errors) == (0, [f"{out}: 300 triplets"], [])
    edits = read_lines(out)
    assert len(edits) == 300
    assert all(list(edit) == ["caption", "edit", "output", "url"] for edit in edits)
    assert read_edits(out) == edits
    options = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "other": SHAPES}
    words = {name: f"({'|'.join(values)})" for name, values in options.items()}
    thing = "a {size} {colour} {shape}".format(**words)
    things = f"({thing} and {thing}|{thing} on the (left|right))"
    text = re.compile(f"a ({'|'.join(MEDIA)}) of {things} ({'|'.join(BACKGROUNDS.values())})")
    wording = re.compile("|".join(p.format(**words) for phrasings in PHRASINGS.values() for p in phrasings))
    for edit in edits:
        assert text.fullmatch(edit["caption"]), edit
        assert text.fullmatch(edit["output"]), edit
        assert wording.fullmatch(edit["edit"]), edit
        assert edit["caption"] != edit["output"]
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
    out = tmp_path / "edits.jsonl"
    arguments = "text", f"--captions={tmp_path / 'captions.jsonl'}", f"--out={out}"
    code, lines, errors = program(*arguments)
    unique = dict.fromkeys(captions)
    again = len(captions) + 1 - len(unique)
    left_out = f"left out: {again} captions that are empty or came before, 1 of scenes kept to be measured on"
    assert (code, lines, errors) == (0, [left_out, f"{out}: {len(unique)} triplets"], [])
    edits = read_lines(out)
    assert [edit["caption"] for edit in edits] == list(unique)
    assert [edit["url"] for edit in edits] == [f"u{captions.index(text)}" for text in unique]
    for edit in edits:
        before, after = read_caption(edit["caption"]), read_caption(edit["output"])
        assert not held_out(after)
        parts = ("medium", "background", "left", "right")
        assert sum(getattr(before, part) != getattr(after, part) for part in parts) == 1
    kinds = [len(read_caption(edit["output"]).things) - len(read_caption(edit["caption"]).things) for edit in edits]
    assert set(kinds) == {-1, 0, 1}
    first = out.read_bytes()
    assert program(*arguments)[0] == 0
    assert out.read_bytes() == first
    assert program(*arguments, "--seed=1")[0] == 0
    assert out.read_bytes() != first


def test_captions_of_another_world(program, tmp_path):
    (tmp_path / "captions.txt").write_text("a cat on a mat\n")
    files = f"--captions={tmp_path / 'captions.txt'}", f"--out={tmp_path / 'edits.jsonl'}"
    code, lines, errors = program("text", *files)
    assert (code, lines) == (2, [])
    assert "\"a cat on a mat\" is not a caption of the miniature's world; --writer openai reads any" in errors[0]
    assert list(tmp_path.iterdir()) == [tmp_path / "captions.txt"]


def test_triplets_can_be_repeated(program, tmp_path):
    for name, arguments in {"a": ["--seed=3"], "b": ["--seed=3"], "c": ["--seed=4"], "d": []}.items():
        assert program("text", "--count=20", f"--out={tmp_path / name}", *arguments)[0] == 0
    texts = [(tmp_path / name).read_text() for name in "abcd"]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    program("text", "--count=5", "--seed=3", f"--out={tmp_path / 'c'}")  # replaces the file
    assert (tmp_path / "c").read_text() == "".join(texts[0].splitlines(keepends=True)[:5])


def test_true_pairs(program, tmp_path):
    """The upper bound's: the same triplets, with the world's own pictures."""
    assert program("text", "--count=6", "--seed=3", f"--out={tmp_path / 'edits.jsonl'}")[0] == 0
    assert program("true", "--count=6", "--seed=3", f"--out={tmp_path / 'data'}")[0] == 0
    edits, rng = read_lines(tmp_path / "edits.jsonl"), np.random.default_rng(3)
    data = EditDataset(tmp_path / "data", "all")
    assert len(data) == 6
    for number, (before, after, instruction) in enumerate(data):
        assert json.loads((tmp_path / f"data/{number:07d}/prompt.json").read_text()) == edits[number]
        assert instruction == edits[number]["edit"]
        edit = random_edit(rng)
        for x, scene in ((before, edit.before), (after, edit.after)):
            assert (x - to_tensor(render(scene))).abs().mean() < 0.01


# ---- images ----


def test_pairs_in_the_authors_layout(models, pairs):
    seeds = json.loads((pairs / "seeds.json").read_text())
    assert [name for name, _ in seeds] == ["0000000", "0000001", "0000002", "0000003"]
    for number, (name, kept) in enumerate(seeds):
        assert len(kept) == len(set(kept)) == KEEP
        pictures = {f"{seed}_{side}.jpg" for seed in kept for side in (0, 1)}
        assert {path.name for path in (pairs / name).iterdir()} == {"metadata.jsonl", "prompt.json", *pictures}
        edit = EDITS[number]
        expected = {**{field: edit[field] for field in ("caption", "edit", "output")}, "url": edit.get("url")}
        assert json.loads((pairs / name / "prompt.json").read_text(encoding="utf-8")) == expected
        assert [str(entry["seed"]) for entry in read_lines(pairs / name / "metadata.jsonl")] == kept
    data = EditDataset(pairs, "all")
    assert len(data) == len(EDITS) * KEEP
    assert [item[2] for item in data][::KEEP] == [edit["edit"] for edit in EDITS]
    for before, after, _ in data:
        assert before.shape == after.shape == (3, 64, 64)
        assert before.std() > 0.05
        assert (before - after).abs().mean() > 0.01


def test_candidates_hold_every_score(pairs):
    entries = read_lines(pairs / "candidates.jsonl")
    assert [entry["edit"] for entry in entries] == [0, 1, 2, 3]
    every = [candidate for entry in entries for candidate in entry["candidates"]]
    assert [candidate["seed"] for candidate in every] == list(range(len(EDITS) * SAMPLES))
    for candidate in every:
        assert list(candidate) == NAMES
        assert P_RANGE[0] <= candidate["p2p_threshold"] <= P_RANGE[1]
        assert 2 <= candidate["cfg_scale"] <= 4
        assert all(-1 <= candidate[name] <= 1 for name in NAMES[3:])
    for name in NAMES[1:]:
        assert len({candidate[name] for candidate in every}) > len(every) // 2
    for entry in entries:
        by_seed = {candidate["seed"]: candidate for candidate in entry["candidates"]}
        noted = read_lines(pairs / f"{entry['edit']:07d}" / "metadata.jsonl")
        assert noted == [by_seed[seed] for seed in entry["kept"]]


def test_the_best_by_direction_are_kept(pairs):
    for entry in read_lines(pairs / "candidates.jsonl"):
        falling = sorted(entry["candidates"], key=lambda candidate: candidate["clip_sim_dir"], reverse=True)
        assert entry["kept"] == [candidate["seed"] for candidate in falling[:KEEP]]


def test_scores_are_those_of_the_files(models, pairs):
    """As far as JPEG leaves them: each picture with its own caption, the change with the change."""
    clip, tokenizer = load_clip(models / "clip")
    for number, entry in candidates_of(pairs).items():
        ids = [tokenizer([EDITS[number][name]]) for name in ("caption", "output")]
        for noted in entry["candidates"]:
            if noted["seed"] not in entry["kept"]:
                continue
            paths = (pairs / f"{number:07d}" / f"{noted['seed']}_{side}.jpg" for side in (0, 1))
            images = ((to_tensor(Image.open(path))[None] + 1) / 2 for path in paths)
            for name, value in clip.edit_similarities(*images, *ids).items():
                assert value.item() == pytest.approx(noted[name], abs=0.1 if name == "clip_sim_dir" else 0.02), name


def test_a_seed_stands_for_one_pair(models, pairs):
    """Sampled alone: the two numbers that its seed draws, the scores of the pixels, and the files but for JPEG."""
    model, (clip, tokenizer) = StableDiffusion(load(models / "sd")), load_clip(models / "clip")
    for number in (1, 3):
        noted = read_lines(pairs / f"{number:07d}" / "metadata.jsonl")[0]
        noise = PairNoise([noted["seed"]], (4, 16, 16), (2.0, 4.0))
        assert noise.p.item() == pytest.approx(noted["p2p_threshold"], abs=1e-6)
        assert noise.guidance.item() == pytest.approx(noted["cfg_scale"], abs=1e-6)
        texts = [[EDITS[number][name]] for name in ("caption", "output")]
        pictures = [to_tensor(to_image(x[0]))[None] for x in sample_pairs(model, *texts, noise)]
        scores = clip.edit_similarities(*((x + 1) / 2 for x in pictures), *map(tokenizer, texts))
        for name, value in scores.items():
            assert value.item() == pytest.approx(noted[name], abs=2e-3), name
        for side, x in enumerate(pictures):
            seen = to_tensor(Image.open(pairs / f"{number:07d}" / f"{noted['seed']}_{side}.jpg"))
            assert (x[0] - seen).abs().max() <= 2 * 5 / 255


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_the_batch_changes_nothing(models, pairs, program, tmp_path, monkeypatch, batch):
    """And no more pairs are sampled at once than it says, even of one edit."""
    sizes = []

    def counted(model, before, *rest, **settings):
        sizes.append(len(before))
        return sample_pairs(model, before, *rest, **settings)

    monkeypatch.setattr(pairs_module, "sample_pairs", counted)
    assert program(*command(models, tmp_path / "data", *OPEN, batch=batch))[0] == 0
    equal_but_for_rounding(tmp_path / "data", pairs)
    assert max(sizes) <= batch
    assert sum(sizes) == len(EDITS) * SAMPLES
    assert len(sizes) == {2: 8, 3: 4, 100: 1}[batch]


def test_the_first_seed_can_be_chosen(models, pairs, program, tmp_path):
    assert program(*command(models, tmp_path / "data", *OPEN, seed=3))[0] == 0
    ours, theirs = candidates_of(tmp_path / "data"), candidates_of(pairs)
    assert [candidate["seed"] for candidate in ours[0]["candidates"]] == [3, 4, 5]
    for one, two in zip(ours[0]["candidates"], theirs[1]["candidates"], strict=True):
        assert [one[name] for name in NAMES[:3]] == [two[name] for name in NAMES[:3]]  # what a seed draws
        assert one["clip_sim_0"] != pytest.approx(two["clip_sim_0"], abs=1e-3)  # but of another caption


def test_compiled_it_makes_the_same_pairs(models, pairs, program, tmp_path, monkeypatch):
    """With a compiler that traces and does not translate."""
    compiled, compile_with = [], StableDiffusion.compile

    def traced(model):
        compiled.append(model)
        compile_with(model, backend="eager")

    monkeypatch.setattr(StableDiffusion, "compile", traced)
    code, lines, errors = program(*command(models, tmp_path / "data", *OPEN, "--compile"))
    assert (code, errors, len(compiled)) == (0, [], 1)
    assert NOTICE in lines
    equal_but_for_rounding(tmp_path / "data", pairs)
    torch.compiler.reset()


def test_settings_reach_the_sampler(models, program, tmp_path, monkeypatch):
    """The model's own where none are given: its steps, its size, and one to two times its guidance."""
    calls = []

    def watched(model, before, after, noise, steps=None, **settings):
        calls.append((steps or model.sampling.steps, tuple(noise.first.shape[1:]), noise.guidance, settings["control"]))
        return sample_pairs(model, before, after, noise, steps, **settings)

    monkeypatch.setattr(pairs_module, "sample_pairs", watched)
    arguments = command(models, tmp_path / "a", *OPEN, steps=1, resolution=80, samples=2, control="both")
    assert program(*arguments)[0] == 0
    own = [word for word in command(models, tmp_path / "b", *OPEN) if word not in ("--guidance", "2", "4")]
    assert program(*own)[0] == 0
    for (steps, side, low, high, way), (made, shape, guidance, control) in zip(
        [(1, 20, 2, 4, "both"), (2, 16, 4, 8, "self")], calls[::3], strict=True
    ):
        assert (made, shape, control) == (steps, (4, side, side), way)
        assert low <= guidance.min() < guidance.max() - 0.2 < high
        assert guidance.max() <= high
    assert EditDataset(tmp_path / "a", "all")[0][0].shape == (3, 80, 80)


# ---- the filter ----


def middle(pairs, name):
    """A threshold that half of the candidates reach."""
    every = [candidate[name] for entry in candidates_of(pairs).values() for candidate in entry["candidates"]]
    return float(np.median(every))


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--min-direction", ["clip_sim_dir"]),
        ("--min-image-image", ["clip_sim_image"]),
        ("--min-image-text", ["clip_sim_0", "clip_sim_1"]),
    ],
)
def test_only_what_passes_is_kept(models, pairs, program, tmp_path, flag, names):
    threshold = middle(pairs, names[0])
    code, out, _ = program(*command(models, tmp_path / "data", *OPEN, f"{flag}={threshold}"))
    assert code == 0
    ours, kept = candidates_of(tmp_path / "data"), 0
    for number, entry in candidates_of(pairs).items():
        assert ours[number]["candidates"] == entry["candidates"]
        good = [c for c in entry["candidates"] if all(c[name] >= threshold for name in names)]
        best = sorted(good, key=lambda candidate: -candidate["clip_sim_dir"])[:KEEP]
        assert ours[number]["kept"] == [candidate["seed"] for candidate in best]
        kept += len(best)
    seeds = json.loads((tmp_path / "data" / "seeds.json").read_text())
    assert sum(len(numbers) for _, numbers in seeds) == kept
    assert 0 < kept < len(EDITS) * KEEP
    assert f"{kept} pairs" in out[-1]
    assert len(list((tmp_path / "data").rglob("*.jpg"))) == 2 * kept


def test_a_clip_brings_its_own_thresholds(models, pairs, program, tmp_path):
    """The command line overrules them one by one."""
    clip = tmp_path / "clip"
    shutil.copytree(models / "clip", clip)
    (clip / "filter.json").write_text('{"image_text": -1, "image_image": -1, "direction": 2}')
    code, out, _ = program(*command(models, tmp_path / "none", clip=clip))
    assert code == 0
    assert "0 pairs" in out[-1]
    assert json.loads((tmp_path / "none" / "seeds.json").read_text()) == []
    assert len(candidates_of(tmp_path / "none")) == len(EDITS)
    assert program(*command(models, tmp_path / "all", "--min-direction=-1", clip=clip))[0] == 0
    ours, theirs = contents(tmp_path / "all"), contents(pairs)
    assert ours.pop("settings.json") != theirs.pop("settings.json")  # which name the CLIP
    assert ours == theirs


def test_a_clip_is_calibrated(models, program, tmp_path):
    """A threshold is what a share of the candidates, one an edit, do not reach; each has a share of its own."""
    clip = tmp_path / "clip"
    shutil.copytree(models / "clip", clip)
    assert program(*command(models, tmp_path / "data", *OPEN, samples=1))[0] == 0
    scores = [entry["candidates"][0] for entry in read_lines(tmp_path / "data" / "candidates.jsonl")]
    own = [f"--edits={models / 'edits.jsonl'}", f"--weights={models / 'sd'}", f"--clip={clip}", "--batch=3"]
    own += ["--guidance", "2", "4"]
    code, out, errors = program("calibrate", *own, "--shares", "0.5", "0.25", "0.75")
    assert (code, errors) == (0, [])
    assert str(clip / "filter.json") in out[-1]
    chosen = Filter.read(clip)
    image_text = [min(score["clip_sim_0"], score["clip_sim_1"]) for score in scores]
    assert chosen.image_text == pytest.approx(np.quantile(image_text, 0.5), abs=2e-3)
    assert chosen.image_image == pytest.approx(np.quantile([s["clip_sim_image"] for s in scores], 0.25), abs=2e-3)
    assert chosen.direction == pytest.approx(np.quantile([s["clip_sim_dir"] for s in scores], 0.75), abs=2e-3)
    assert program("calibrate", *own, "--count=1", "--shares", "0", "0", "0")[0] == 0
    assert Filter.read(clip).image_text == pytest.approx(image_text[0], abs=2e-3)


# ---- stopped, and split ----


def test_a_run_that_was_killed_goes_on(models, pairs, program, tmp_path):
    """In the middle of a line of candidates.jsonl, with one edit's folder half there and no seeds.json."""
    folder = tmp_path / "data"
    shutil.copytree(pairs, folder)
    lines = (folder / "candidates.jsonl").read_text().splitlines(keepends=True)
    (folder / "candidates.jsonl").write_text("".join(lines[:2]) + lines[2][:100])
    (folder / "seeds.json").unlink()
    shutil.rmtree(folder / "0000003")
    (folder / "0000002" / "prompt.json").unlink()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("000000[01]/*")}
    assert program(*command(models, folder, *OPEN))[0] == 0
    assert contents(folder) == contents(pairs)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("000000[01]/*")} == done


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_that_was_stopped_goes_on(models, pairs, program, tmp_path, monkeypatch, stop_at):
    """By Ctrl-C, before an edit is written."""
    folder, written = tmp_path / "data", []

    def interrupted(root, number, *rest):
        if len(written) == stop_at:
            raise KeyboardInterrupt
        written.append(number)
        return write_edit(root, number, *rest)

    write_edit = pairs_module.write_edit
    monkeypatch.setattr(pairs_module, "write_edit", interrupted)
    code, _, errors = program(*command(models, folder, *OPEN))
    assert (code, errors) == (130, ["datagen.py: stopped; nothing half-written is left behind"])
    assert sorted(path.name for path in folder.glob("0*")) == [f"{number:07d}" for number in range(stop_at)]
    monkeypatch.setattr(pairs_module, "write_edit", write_edit)
    assert program(*command(models, folder, *OPEN))[0] == 0
    equal_but_for_rounding(folder, pairs)


def test_a_finished_run_samples_nothing(models, pairs, program, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(pairs, folder)
    monkeypatch.setattr(pairs_module, "sample_pairs", None)
    code, out, _ = program(*command(models, folder, *OPEN))
    assert code == 0
    assert f"{len(EDITS) * KEEP} pairs" in out[-1]
    assert contents(folder) == contents(pairs)


def test_processes_may_share_the_work(models, pairs, program, tmp_path):
    """Three of them, one without any edit left; all files but the candidates' list are those of one process."""
    folder = tmp_path / "data"
    for part in (2, 0, 4, 1, 3):
        assert program(*command(models, folder, *OPEN, shard=f"{part}/5"))[0] == 0
    logs = sorted(path.name for path in folder.glob("candidates*"))
    whole = [entry for name in logs for entry in read_lines(folder / name)]
    assert sorted(entry["edit"] for entry in whole) == [0, 1, 2, 3]
    for name in logs:
        (folder / name).unlink()
    text = "".join(json.dumps(entry) + "\n" for entry in sorted(whole, key=lambda entry: entry["edit"]))
    (folder / "candidates.jsonl").write_text(text)
    equal_but_for_rounding(folder, pairs)


# ---- a user's mistakes ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "command"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["text"], "--out"),
        (["text", "--out=x", "--count=0"], "--count should be at least 1, not 0"),
        (["text", "--out=x", "--count=few"], "--count"),
        (["text", "--out=x", "--writer=nobody"], "invalid choice: 'nobody'"),
        (["text", "--out=x", "--seed=-1"], "seed"),
        (["text", "--out=nowhere/x"], "cannot write nowhere/x: No such file"),
        (["text", "--out=."], "cannot write ."),
        (["text", "--out=/"], "cannot write /"),
        (["true"], "--out"),
        (["true", "--out=x", "--count=0"], "--count should be at least 1, not 0"),
        (["true", "--out=x", "--seed=-1"], "seed"),
        (["calibrate"], "--edits"),
        (["calibrate", "--edits=x", "--shares", "0", "0.5", "1"], "--shares should be from 0 to below 1"),
        (["calibrate", "--edits=x", "--shares", "-0.1", "0", "0"], "--shares should be from 0 to below 1"),
        (["calibrate", "--edits=x", "--shares", "0", "nan", "0"], "--shares should be from 0 to below 1"),
        (["calibrate", "--edits=x"], "there is no file x"),
        (["images", "--out=x"], "--edits"),
    ],
)
def test_mistakes(program, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, errors = program(*arguments)
    assert (code, out) == (2, [])
    assert len(errors) == 1
    assert errors[0].startswith("datagen.py")
    assert words in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"edits": "nowhere.jsonl"}, "there is no file nowhere.jsonl; datagen.py text writes one"),
        ({"edits": "."}, ". cannot be read"),
        ({"weights": "nowhere"}, "there are no weights at nowhere"),
        ({"weights": "EDITOR"}, "no text-to-image model (its UNet takes 8 channels, not 4)"),
        ({"clip": "nowhere"}, "there are no weights at nowhere"),
        ({"clip": "SD"}, "config.json is missing"),
        ({"samples": 0}, "--samples should be at least 1, not 0"),
        ({"keep": 0}, "--keep should be at least 1, not 0"),
        ({"batch": -2}, "--batch should be at least 1, not -2"),
        ({"steps": 0}, "--steps should be at least 1, not 0"),
        ({"steps": 2000}, "steps should be between 1 and 1000, not 2000"),
        ({"threads": 0}, "--threads should be at least 1, not 0"),
        ({"resolution": 8}, "resolution should be between 64 and 4096 pixels, not 8"),
        ({"resolution": -64}, "resolution should be"),
        ({"resolution": 100}, "the resolution should be a multiple of 8 for this model, not 100"),
        ({"seed": -1}, "seed should be a whole number"),
        ({"seed": 2**70}, "seed should be a whole number"),
        ({"device": "abacus"}, "no device abacus"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"shard": "2/2"}, "--shard"),
        ({"shard": "one"}, "--shard"),
        ({"out": "FILE"}, "FILE"),
        ({"out": "FILE/data"}, "FILE/data"),
    ],
)
def test_mistakes_with_images(models, model_folder, program, tmp_path, monkeypatch, changed, words):
    """One line, exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("hello")
    places = {"EDITOR": model_folder, "SD": models / "sd"}
    changed = {name: places.get(value, value) for name, value in changed.items()}
    code, out, errors = program(*command(models, changed.pop("out", "data"), **changed))
    assert (code, out) == (2, [])
    assert len(errors) == 1
    assert errors[0].startswith("datagen.py")
    assert words in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


@pytest.mark.parametrize("guidance", [("nan", "4"), ("-1", "4"), ("2", "inf"), ("2", "x"), ("2", "1e9")])
def test_mistakes_with_guidance(models, program, tmp_path, guidance):
    arguments = [*command(models, tmp_path / "data"), "--guidance", *guidance]
    code, out, errors = program(*arguments)
    assert (code, out) == (2, [])
    assert len(errors) == 1
    assert "guidance" in errors[0]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "line",
    [
        '{"caption": "a", "edit": "b"}',
        '{"caption": "a", "edit": " ", "output": "c"}',
        '{"caption": "a", "edit": 3, "output": "c"}',
        "hello",
        "[]",
        "",
        '{"caption": "a"',
        '{"caption": "\\ud800", "edit": "b", "output": "c"}',  # half a character
    ],
)
def test_mistakes_in_edits(models, program, tmp_path, line):
    """The line is named, counted from 1, and so is what it should hold."""
    path = tmp_path / "edits.jsonl"
    path.write_text(f"{json.dumps(EDITS[0])}\n{line}\n{json.dumps(EDITS[1])}\n")
    code, out, errors = program(*command(models, tmp_path / "data", edits=path))
    assert (code, out) == (2, [])
    assert len(errors) == 1
    assert f"{path}, line 2: " in errors[0]
    assert "the texts caption, edit, output" in errors[0]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("data", "words"), [(b"", "holds no edits"), (b"\xff\xfe\x00", "cannot be read")])
def test_files_without_edits(models, program, tmp_path, data, words):
    path = tmp_path / "edits.jsonl"
    path.write_bytes(data)
    code, _, errors = program(*command(models, tmp_path / "data", edits=path))
    assert code == 2
    assert len(errors) == 1
    assert words in errors[0]


def test_odd_characters_in_edits_are_no_line_breaks(tmp_path):
    """Python's splitlines takes U+2028 for one; other programs write it into JSON as it is."""
    edit = {"caption": "a\u2028b", "edit": "make\x85it night", "output": "c"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(edit, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_edits(tmp_path / "edits.jsonl") == [edit]


@pytest.mark.parametrize("line", ["hello", "{}", "[]", '{"edit": '])
def test_a_damaged_list_of_candidates(models, pairs, program, tmp_path, line):
    """Not at its end, where a run was killed, but inside."""
    folder = tmp_path / "data"
    shutil.copytree(pairs, folder)
    text = (folder / "candidates.jsonl").read_text()
    (folder / "candidates.jsonl").write_text(f"{line}\n{text}")
    code, _, errors = program(*command(models, folder, *OPEN))
    assert code == 2
    assert len(errors) == 1
    assert "candidates.jsonl" in errors[0]


def test_damaged_thresholds(models, program, tmp_path):
    clip = tmp_path / "clip"
    shutil.copytree(models / "clip", clip)
    (clip / "filter.json").write_text("{")
    code, _, errors = program(*command(models, tmp_path / "data", clip=clip))
    assert code == 2
    assert len(errors) == 1
    assert "filter.json cannot be read" in errors[0]
    assert not (tmp_path / "data").exists()


def test_weights_that_are_not_numbers(models, program, tmp_path):
    model = tiny_model(in_channels=4)
    model.unet.conv_out.bias.data[0] = float("nan")
    save_folder(model, tmp_path / "sd")
    code, _, errors = program(*command(models, tmp_path / "data", *OPEN, weights=tmp_path / "sd"))
    assert code == 2
    assert len(errors) == 1
    assert "not numbers" in errors[0]
