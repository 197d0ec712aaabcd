"""datagen.py images as a long run meets the world: killed, without space on the disk, begun again otherwise."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time

import pytest
from conftest import tiny_model
from random_model import randomise, small_tokenizer

import datagen
import pairs
from cli import UserError, append_whole, run_program
from clip_image import CLIP, CLIPImageConfig
from clip_text import CLIPTextConfig
from dataset import read_seeds
from formats.checkpoint import save_clip, save_folder

pytestmark = pytest.mark.usefixtures("one_thread")

EDITS, SAMPLES, KEEP, BATCH = 30, 2, 1, 4
KILLS = 50


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny Stable Diffusion, a CLIP, and edits."""
    folder = tmp_path_factory.mktemp("models")
    save_folder(tiny_model(in_channels=4), folder / "sd")
    tokenizer = small_tokenizer()
    size = len(tokenizer.vocabulary)
    text = CLIPTextConfig(size, tokenizer.tokens, width=16, layers=1, heads=2, end_token=tokenizer.end, projection=8)
    image = CLIPImageConfig(size=64, patch=16, width=16, layers=1, heads=2, projection=8)
    save_clip(randomise(CLIP(text, image), 0).eval(), tokenizer, folder / "clip")
    edits = [{"caption": f"ball {i}", "edit": "make it red", "output": f"red ball {i}"} for i in range(EDITS)]
    (folder / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    return folder


def command(models, out, *more):
    """The command line; about half of all candidates pass its filter."""
    own = {"edits": models / "edits.jsonl", "weights": models / "sd", "clip": models / "clip", "out": out}
    own |= {"samples": SAMPLES, "keep": KEEP, "batch": BATCH, "steps": 2, "min-image-text": -1, "min-image-image": -1}
    given = [f"--{name}={value}" for name, value in own.items()]
    return ["images", *given, "--min-direction=0", "--guidance", "2", "4", *map(str, more)]


@pytest.fixture(scope="module")
def data(models, tmp_path_factory):
    """The data set, made in one go."""
    folder = tmp_path_factory.mktemp("data") / "data"
    datagen.main(command(models, folder))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail(arguments, capsys, monkeypatch):
    """The one line of a run that must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["datagen.py", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_program(datagen.main)
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("datagen.py"))
    return line


# ---- killed ----


def test_some_pass_and_some_do_not(data):
    """Else the tests below would show little."""
    counts = [len(seeds) for _, seeds in read_seeds(data)]
    assert set(counts) == {1}
    assert EDITS // 4 < len(counts) < EDITS


def test_killed_at_fifty_moments_it_ends_in_the_same_files(models, data, tmp_path, capfd):
    """SIGKILL, which no program can answer. The moments are by chance, and such that about 50 of them fill a run."""
    folder, rng, context = tmp_path / "data", random.Random(0), multiprocessing.get_context("fork")
    longest, done, moments = 0.2, 0, set()
    for _ in range(KILLS):
        process = context.Process(target=datagen.main, args=(command(models, folder),))
        process.start()
        time.sleep(rng.uniform(0, longest))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        log = folder / "candidates.jsonl"
        before, done = done, log.read_bytes().count(b"\n") if log.exists() else 0
        moments.add(done)
        if done < EDITS:
            longest *= 1.2 if done == before else 0.8
        else:  # the next one begins anew
            assert complete(models, folder) == contents(data)
            shutil.rmtree(folder)
            done = 0
    assert complete(models, folder) == contents(data)
    assert len(moments) > 5


def complete(models, folder):
    """What is there when a run that was killed has been gone on with."""
    datagen.main(command(models, folder))
    assert not [path for path in folder.rglob("*") if path.is_dir() and not list(path.iterdir())]
    return contents(folder)


def test_what_a_killed_process_leaves_is_removed(models, data, tmp_path):
    """But of edits that are other processes' it is not."""
    folder = tmp_path / "data"
    datagen.main(command(models, folder, "--shard=0/2"))
    left = [folder / ".0000004.77.tmp", folder / ".0000005.77.tmp"]
    for path in left:
        path.mkdir()
        (path / "1_0.jpg").write_bytes(b"half")
    for name in ("seeds", "settings"):
        (folder / f".{name}.json.0of2.tmp").write_text("[")
        (folder / f".{name}.json.1of2.tmp").write_text("[")
    datagen.main(command(models, folder, "--shard=0/2"))
    others = [".0000005.77.tmp", ".seeds.json.1of2.tmp", ".settings.json.1of2.tmp"]
    assert sorted(path.name for path in folder.glob(".*")) == others
    datagen.main(command(models, folder, "--shard=1/2"))
    assert not list(folder.glob(".*"))
    assert [folder for folder, _ in read_seeds(folder)] == [folder for folder, _ in read_seeds(data)]


def test_groups_are_the_same_after_a_stop(models, data, tmp_path, monkeypatch):
    """A list that ends within a group is cut off before it, and the group is sampled as one batch again."""
    folder, batches = tmp_path / "data", []
    shutil.copytree(data, folder)
    lines = (folder / "candidates.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "candidates.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:50])
    sample = pairs.Sampler.sample
    monkeypatch.setattr(pairs.Sampler, "sample", lambda self, jobs: batches.append(jobs) or sample(self, jobs))
    datagen.main(command(models, folder))
    assert batches[0] == [(6, 12), (6, 13), (7, 14), (7, 15)]
    assert contents(folder) == contents(data)


# ---- begun again with other settings ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--samples=3", "samples 2, now it is 3"),
        ("--steps=3", "steps 2, now it is 3"),
        ("--min-direction=0.5", "min_direction 0.0, now it is 0.5"),
        ("--seed=1", "seed 0, now it is 1"),
        ("--shard=0/2", "shards 1, now it is 2"),
    ],
)
def test_other_settings_are_no_resuming(models, data, capsys, monkeypatch, change, words):
    """Half a data set of one kind and half of another would be hard to find out later."""
    before = contents(data)
    line = fail([*command(models, data), change], capsys, monkeypatch)
    assert f"was begun with {words}; take the same settings, or another folder" in line
    assert contents(data) == before


def test_other_edits_are_no_resuming(models, data, tmp_path, capsys, monkeypatch):
    """A file of edits that was written anew, with as many lines or fewer or more."""
    edits = tmp_path / "edits.jsonl"
    edits.write_text((models / "edits.jsonl").read_text().replace("make it red", "paint it red"))
    line = fail([*command(models, data), f"--edits={edits}"], capsys, monkeypatch)
    assert f"was begun with other edits than those of {edits}; take another folder" in line
    edits.write_text((models / "edits.jsonl").read_text().splitlines(keepends=True)[0])
    assert "candidates.jsonl is damaged" in fail([*command(models, data), f"--edits={edits}"], capsys, monkeypatch)


def test_more_edits_may_be_added(models, data, tmp_path):
    """A file of edits that has grown is gone on with."""
    folder, few = tmp_path / "data", tmp_path / "edits.jsonl"
    few.write_text("".join((models / "edits.jsonl").read_text().splitlines(keepends=True)[:13]))
    datagen.main([*command(models, folder), f"--edits={few}"])
    datagen.main(command(models, folder))
    assert contents(folder) == contents(data)


# ---- no space ----


def limited(size, main, arguments):
    """Run in this process, with no file larger than `size`: writing more fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    sys.argv = ["datagen.py", *arguments]
    run_program(main)


@pytest.mark.parametrize("size", [1000, 14_000])
def test_a_full_disk(models, data, tmp_path, capfd, size):
    """Full at the start of a picture or at its end: a line, nothing torn; and with space again it goes on."""
    folder = tmp_path / "data"
    process = multiprocessing.get_context("fork").Process(
        target=limited, args=(size, datagen.main, command(models, folder))
    )
    process.start()
    process.join()
    assert process.exitcode == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("datagen.py"))
    assert line.startswith(f"datagen.py: cannot write {folder}")
    assert line.endswith(("File too large", "No space left on device"))
    assert not list(folder.glob(".*"))
    whole = contents(data)
    for name, content in contents(folder).items():
        assert content == whole[name]
    datagen.main(command(models, folder))
    assert contents(folder) == whole


def test_nothing_is_half_appended(tmp_path, monkeypatch):
    """Not even when a part of it had space."""
    path = tmp_path / "list"
    append_whole(path, b"one\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            append_whole(path, b"two, which is longer\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"one\n"
    append_whole(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


# ---- before the work ----


def test_a_dry_run_tells_and_writes_nothing(models, data, tmp_path, capsys):
    """The size is that of the data set which the same command makes."""
    folder = tmp_path / "data"
    datagen.main([*command(models, folder, "--batch=60"), "--dry-run"])
    edits, seconds, size = capsys.readouterr().out.splitlines()
    assert edits == "30 edits with 2 candidates each: 60 candidates"
    assert re.fullmatch(r"time: about [\d.]+ (seconds|minutes) \([\d.e-]+ s a candidate, in batches of 30\)", seconds)
    megabytes, count, kilobytes, share = re.fullmatch(
        r"size: about ([\d.]+) MB: (\d+) pairs of ([\d.]+) kB, if (\d+)% of the candidates pass", size
    ).groups()
    assert not folder.exists()
    folders = [data / name for name, _ in read_seeds(data)]
    true_size = sum(path.stat().st_size for folder in folders for path in folder.iterdir()) / len(folders)
    assert float(kilobytes) == pytest.approx(true_size / 1e3, rel=0.2)
    entries = [json.loads(line) for line in (data / "candidates.jsonl").read_text().splitlines()]
    passed = sum(line["candidates"][0]["clip_sim_dir"] >= 0 for line in entries)  # one of each edit was sampled
    assert int(share) == round(100 * passed / EDITS)
    assert int(count) == round(EDITS * min(KEEP, passed / EDITS * SAMPLES))
    written = true_size * int(count) + (data / "candidates.jsonl").stat().st_size
    assert float(megabytes) == pytest.approx(written / 1e6, rel=0.2)
    datagen.main([*command(models, data), "--dry-run"])
    assert capsys.readouterr().out == "nothing is left to do\n"


@pytest.mark.parametrize(("rank", "device"), [("1", "cuda:1"), (None, "cuda")])
def test_each_process_of_torchrun_has_its_gpu(models, tmp_path, capsys, monkeypatch, rank, device):
    """As the only GPU here is none, the message says which one was asked for."""
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("torch.zeros", lambda *size, device: (_ for _ in ()).throw(RuntimeError(device)))
    line = fail([*command(models, tmp_path / "data"), "--device=cuda"], capsys, monkeypatch)
    assert f"no device {device};" in line
