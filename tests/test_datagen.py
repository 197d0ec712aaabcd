"""datagen.py images and calibrate with tiny models: what they write, and that they may be stopped at will."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from functools import partial

from cli import run_program

import numpy as np
import pytest
from conftest import contents
from PIL import Image
from random_model import randomise, small_tokenizer, tiny_model
from tqdm import tqdm

import datagen
from clip_image import CLIP, CLIPImageConfig
from clip_text import CLIPTextConfig
from dataset import EditDataset, Filter
from formats.checkpoint import load, load_clip, save_clip, save_folder
from images import to_image, to_tensor
from p2p import PairNoise, sample_pairs
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
    values |= {"samples": SAMPLES, "keep": KEEP, "batch-size": BATCH} | changed
    own = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return ["images", *own, "--guidance", "2", "4", *map(str, more)]


@pytest.fixture(scope="module")
def pairs(models, tmp_path_factory):
    """The data set, made in one go. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("pairs") / "data"
    datagen.main(command(models, folder, *OPEN))
    return folder


@pytest.fixture(autouse=True)
def own_lock():
    """tqdm's own lock is shared with forked processes: one that was killed while it held the lock would keep it."""
    tqdm.set_lock(threading.RLock())


@pytest.fixture
def program(run_main):
    """datagen.py with the arguments given: (exit code, lines of stdout, lines of stderr without progress bars)."""
    return partial(run_main, datagen)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def candidates_of(folder):
    """{edit: the seeds that were kept, every candidate}."""
    found = {}
    for path in sorted(folder.glob("0*")):
        kept, every = (read_lines(path / f"{name}.jsonl") for name in ("metadata", "candidates"))
        found[int(path.name)] = ([line["seed"] for line in kept], every)
    return found


def equal_but_for_rounding(folder, other):
    """The same files; similarities and pixels that differ no more than batches of other sizes make them differ."""
    assert contents(folder).keys() == contents(other).keys()
    assert (folder / "seeds.json").read_bytes() == (other / "seeds.json").read_bytes()
    for (kept, every), (kept_there, every_there) in zip(
        candidates_of(folder).values(), candidates_of(other).values(), strict=True
    ):
        assert kept == kept_there
        for one, two in zip(every, every_there, strict=True):
            assert one == pytest.approx(two, abs=2e-3)
    for path in folder.rglob("*.jpg"):
        one, two = (np.asarray(Image.open(p), dtype=int) for p in (path, other / path.relative_to(folder)))
        assert np.abs(one - two).max() <= 4
        assert np.abs(one - two).mean() < 0.05


# ---- images ----


def test_pairs_in_the_authors_layout(models, pairs):
    seeds = json.loads((pairs / "seeds.json").read_text())
    assert [name for name, _ in seeds] == ["0000000", "0000001", "0000002", "0000003"]
    for number, (name, kept) in enumerate(seeds):
        assert len(kept) == len(set(kept)) == KEEP
        images = {f"{seed}_{side}.jpg" for seed in kept for side in (0, 1)}
        files = {"candidates.jsonl", "metadata.jsonl", "prompt.json", *images}
        assert {path.name for path in (pairs / name).iterdir()} == files
        edit = EDITS[number]
        expected = {**{field: edit[field] for field in ("caption", "edit", "output")}, "url": edit.get("url")}
        assert json.loads((pairs / name / "prompt.json").read_text(encoding="utf-8")) == expected
        assert [str(entry["seed"]) for entry in read_lines(pairs / name / "metadata.jsonl")] == kept
    data = EditDataset(pairs, "all")
    assert [item[2] for item in data] == [edit["edit"] for edit in EDITS]
    for before, after, _ in data:
        assert before.shape == after.shape == (3, 64, 64)
        assert before.std() > 0.05
        assert (before - after).abs().mean() > 0.01


def test_a_seed_stands_for_one_pair(models, pairs):
    """Sampled alone: the two numbers that its seed draws, the scores of the pixels, and the files but for JPEG."""
    model, (clip, tokenizer) = StableDiffusion(load(models / "sd")), load_clip(models / "clip")
    for number in (1, 3):
        noted = read_lines(pairs / f"{number:07d}" / "metadata.jsonl")[0]
        noise = PairNoise([noted["seed"]], (4, 16, 16), (2.0, 4.0))
        assert noise.p.item() == pytest.approx(noted["p2p_threshold"], abs=1e-6)
        assert noise.guidance.item() == pytest.approx(noted["cfg_scale"], abs=1e-6)
        texts = [[EDITS[number][name]] for name in ("caption", "output")]
        images = [to_tensor(to_image(x[0]))[None] for x in sample_pairs(model, *texts, noise)]
        scores = clip.edit_similarities(*((x + 1) / 2 for x in images), *map(tokenizer, texts))
        for name, value in scores.items():
            assert value.item() == pytest.approx(noted[name], abs=2e-3), name
        for side, x in enumerate(images):
            seen = to_tensor(Image.open(pairs / f"{number:07d}" / f"{noted['seed']}_{side}.jpg"))
            assert (x[0] - seen).abs().max() <= 2 * 5 / 255


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_the_batch_changes_nothing(models, pairs, program, tmp_path, monkeypatch, batch):
    """And no more pairs are sampled at once than it says, even of one edit."""
    sizes = []

    def counted(model, before, *rest, **settings):
        sizes.append(len(before))
        return sample_pairs(model, before, *rest, **settings)

    monkeypatch.setattr(datagen, "sample_pairs", counted)
    assert program(*command(models, tmp_path / "data", *OPEN, **{"batch-size": batch}))[0] == 0
    equal_but_for_rounding(tmp_path / "data", pairs)
    assert max(sizes) <= batch
    assert sum(sizes) == len(EDITS) * SAMPLES
    assert len(sizes) == {2: 8, 3: 4, 100: 1}[batch]


# ---- the filter ----


def middle(pairs, name):
    """A threshold that half of the candidates reach."""
    every = [candidate[name] for _, candidates in candidates_of(pairs).values() for candidate in candidates]
    return float(np.median(every))


def test_without_pairs_it_names_the_thresholds_that_refused_them(models, program, tmp_path):
    code, out, _ = program(*command(models, tmp_path / "data", *OPEN[:2], "--min-direction=2"))
    said = "0 pairs so far, of 4 edits; of 12 candidates --min-direction 2.0 refused 12"
    assert (code, out) == (0, [f"{tmp_path / 'data'}: {said}"])


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
    for number, (_, candidates) in candidates_of(pairs).items():
        assert ours[number][1] == candidates
        good = [c for c in candidates if all(c[name] >= threshold for name in names)]
        best = sorted(good, key=lambda candidate: -candidate["clip_sim_dir"])[:KEEP]
        assert ours[number][0] == [candidate["seed"] for candidate in best]
        kept += len(best)
    seeds = json.loads((tmp_path / "data" / "seeds.json").read_text())
    assert sum(len(numbers) for _, numbers in seeds) == kept
    assert 0 < kept < len(EDITS) * KEEP
    assert f"{kept} pairs" in out[-1]
    assert len(list((tmp_path / "data").rglob("*.jpg"))) == 2 * kept


def test_candidates_that_fail_badly_are_given_up(models, pairs, program, tmp_path):
    """By what they were when they were given up; no candidate that fails by less is."""
    threshold = middle(pairs, "clip_sim_image")
    flags = [*OPEN, f"--min-image-image={threshold}"]
    for name, slack in (("never", 1), ("early", 0)):
        assert program(*command(models, tmp_path / name, *flags, f"--give-up={slack}"))[0] == 0
    found = [candidates_of(tmp_path / name) for name in ("never", "early")]
    given_up = 0
    for number, (_, candidates) in candidates_of(pairs).items():
        assert found[0][number][1] == candidates
        for one, other in zip(candidates, found[1][number][1], strict=True):
            if one != pytest.approx(other, abs=2e-3):
                given_up += 1
                assert other["clip_sim_image"] < threshold
                assert other["seed"] not in found[1][number][0]
    assert 0 < given_up < len(EDITS) * SAMPLES


def test_a_clip_is_calibrated(models, program, tmp_path):
    """A threshold is what a share of the candidates, one an edit, do not reach; each has a share of its own."""
    clip = tmp_path / "clip"
    shutil.copytree(models / "clip", clip)
    assert program(*command(models, tmp_path / "data", *OPEN, samples=1))[0] == 0
    scores = [candidates[0] for _, candidates in candidates_of(tmp_path / "data").values()]
    own = [f"--edits={models / 'edits.jsonl'}", f"--weights={models / 'sd'}", f"--clip={clip}", "--batch-size=3"]
    own += ["--guidance", "2", "4"]
    code, out, errors = program("calibrate", *own, "--fractions", "0.5", "0.25", "0.75")
    assert (code, errors) == (0, [])
    assert str(clip / "filter.json") in out[-1]
    chosen = Filter.read(clip)
    image_text = [min(score["clip_sim_0"], score["clip_sim_1"]) for score in scores]
    assert chosen.image_text == pytest.approx(np.quantile(image_text, 0.5), abs=2e-3)
    assert chosen.image_image == pytest.approx(np.quantile([s["clip_sim_image"] for s in scores], 0.25), abs=2e-3)
    assert chosen.direction == pytest.approx(np.quantile([s["clip_sim_dir"] for s in scores], 0.75), abs=2e-3)
    first = (clip / "filter.json").read_bytes()
    assert program("calibrate", *own, "--fractions", "0.5", "0.25", "0.75")[0] == 0  # as a restart of `make mini` does
    code, _, (line,) = program("calibrate", *own, "--count=1")
    assert code == 2
    assert line.endswith("filter.json is there already, made otherwise; remove it to calibrate anew")
    assert (clip / "filter.json").read_bytes() == first
    (clip / "filter.json").unlink()
    assert program("calibrate", *own, "--count=1", "--fractions", "0", "0", "0")[0] == 0
    assert Filter.read(clip).image_text == pytest.approx(image_text[0], abs=2e-3)


# ---- another autoencoder ----


def test_another_autoencoder(models, program, tmp_path):
    other = tiny_model(in_channels=4)
    other.vae.decoder.conv_out.bias.data += 0.5
    save_folder(other, tmp_path / "other")
    assert program(*command(models, tmp_path / "a", *OPEN, samples=1, vae=tmp_path / "other/vae"))[0] == 0
    assert program(*command(models, tmp_path / "b", *OPEN, samples=1))[0] == 0
    first, second = (EditDataset(tmp_path / name, "all")[0][0] for name in "ab")
    assert first.mean() > second.mean() + 0.1


# ---- stopped, and shared by processes ----

MANY = 30


@pytest.fixture(scope="module")
def many(models):
    """Thirty edits."""
    edits = [{"input": f"ball {i}", "edit": "make it red", "output": f"red ball {i}"} for i in range(MANY)]
    (models / "many.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    return models / "many.jsonl"


def long_run(models, many, out, *more):
    """The command line for thirty edits, two in a batch; about half of all candidates pass the filter."""
    own = command(models, out, "--min-image-text=-1", "--min-image-image=-1", "--min-direction=0", edits=many)
    return [*own, "--samples=2", "--keep=1", "--batch-size=4", "--steps=2", *more]


@pytest.fixture(scope="module")
def data(models, many, tmp_path_factory):
    """The data set of these edits, made in one go. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("long") / "data"
    datagen.main(long_run(models, many, folder))
    seeds = [seeds for _, seeds in json.loads((folder / "seeds.json").read_text())]
    assert {len(numbers) for numbers in seeds} == {1}
    assert MANY // 4 < len(seeds) < MANY  # some pass and some do not
    return folder


def finished(folder):
    """Its files. SIGKILL while seeds.json is written leaves a hidden one, which may be another process's own."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(".seeds.json.")}


@pytest.mark.parametrize("times", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_many_moments_it_ends_in_the_same_files(models, many, data, tmp_path, capfd, times):
    """SIGKILL, which no program can answer, at random moments."""
    folder, rng, context = tmp_path / "data", random.Random(0), multiprocessing.get_context("fork")
    arguments, longest, done, moments = long_run(models, many, folder), 0.2, 0, set()
    for _ in range(times):
        process = context.Process(target=datagen.main, args=(arguments,))
        process.start()
        time.sleep(rng.uniform(0, longest))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        before, done = done, len(list(folder.glob("0*")))
        moments.add(done)
        if done < MANY:
            longest *= 1.6 if done == before else 0.8
        else:  # the next one begins anew
            datagen.main(arguments)
            assert finished(folder) == contents(data)
            shutil.rmtree(folder)
            done = 0
    datagen.main(arguments)
    assert finished(folder) == contents(data)
    assert not list(folder.glob(".[0-9]*"))
    assert len(moments) > times // 10


@pytest.mark.parametrize("processes", [2, 20])
def test_processes_share_the_work_and_end_in_the_same_files(models, many, data, tmp_path, monkeypatch, processes):
    """In any order; of twenty, five have nothing to do."""
    folder = tmp_path / "data"
    for rank in random.Random(0).sample(range(processes), processes):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        datagen.main(long_run(models, many, folder))
    assert contents(folder) == contents(data)


def test_several_files_of_texts_are_one(models, many, data, tmp_path):
    """As the parts of `text --shard` leave them; a data set that was begun with the whole is completed."""
    folder, lines = shutil.copytree(data, tmp_path / "data"), many.read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:20]), ("b", lines[20:])):
        (tmp_path / name).write_text("".join(part))
    shutil.rmtree(folder / "0000021")
    datagen.main([*long_run(models, many, folder), "--edits", str(tmp_path / "a"), str(tmp_path / "b")])
    assert contents(folder) == contents(data)


@pytest.mark.parametrize("size", [1000, 14_000])
def test_a_full_disk(models, many, data, tmp_path, capfd, size):
    """Full at the start of an image or at its end: a line, nothing torn; and with space again it resumes."""
    folder = tmp_path / "data"

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        sys.argv = ["datagen.py", *map(str, long_run(models, many, folder))]
        run_program(datagen.main)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join()
    assert process.exitcode == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("datagen.py"))
    assert line.startswith(f"datagen.py: cannot write {folder}")
    assert not list(folder.glob(".*"))
    assert contents(folder).items() <= contents(data).items()
    datagen.main(long_run(models, many, folder))
    assert contents(folder) == contents(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--samples=3", "samples 2, not 3"),
        ("--steps=3", "steps 2, not 3"),
        ("--min-direction=0.5", "min_direction 0.0, not 0.5"),
        ("--edits=OTHER", "edits "),
    ],
)
def test_what_was_begun_otherwise_is_refused(models, many, data, program, tmp_path, change, words):
    """Half a data set of one kind and half of another would be hard to find out later."""
    other = tmp_path / "other.jsonl"
    other.write_text(many.read_text().replace("ball 29", "bell 29"))
    before = contents(data)
    code, _, (line,) = program(*long_run(models, many, data, change.replace("OTHER", str(other))))
    assert code == 2
    assert f"was begun with {words}" in line
    assert contents(data) == before


# ---- a user's mistakes ----


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"edits": "nowhere.jsonl"}, "nowhere.jsonl cannot be read (text in UTF-8, CSV or JSON is expected): No such"),
        ({"weights": "nowhere"}, "there are no weights at nowhere"),
        ({"weights": "EDITOR"}, "an InstructPix2Pix checkpoint: its UNet takes 8 channels, not 4"),
        ({"clip": "SD"}, "config.json cannot be read"),
        ({"shard": "4/4"}, "should be I/N with I from 0 to N - 1, such as 0/4 to 3/4, not 4/4"),
        ({"samples": 0}, "--samples: should be at least 1, not 0"),
        ({"resolution": 8}, "resolution: should be from 64 to 4096, not 8"),
        ({"resolution": 100}, "--resolution should be a multiple of 8 for this model"),
        ({"device": "abacus"}, "no device abacus"),
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
