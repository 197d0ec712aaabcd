"""train.py: the gradient of a step, runs from a data set to a model, several processes, kills, mistakes in one line."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT
from dataset_of_true_pairs import write_pairs
from random_model import tiny_model
from reference import relative_error, unet_reference
from safetensors.torch import load_file, save_file

import train
from diffusion import NoiseSchedule, Sampling
from formats.checkpoint import load, save_folder
from formats.weights import extend_input
from training.batches import draws_of
from training.presets import PRESETS, parse
from training.runs import newest_state, state_paths

MOVED = 0.02  # AdamW divides by gradients, some of which are as small as their rounding
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty edits: 18 for training, one for validation. Shared: copy before changing it."""
    return write_pairs(tmp_path_factory.mktemp("train") / "pairs", 20)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("train") / "sd"
    save_folder(tiny_model(in_channels=4), folder)
    return folder


def command(data, init, out, /, *flags, **changed):
    """The command line, with some values changed."""
    values = {"data": data, "init": init, "out": out, "preset": "mini", "mixed_precision": "no", "max_steps": 4}
    values |= {"batch_size": 3, "lr": 1e-3, "warmup_steps": 0, "lr_decay": 0, "workers": 0, "sampling_steps": 1}
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in (values | changed).items()), *flags]


@pytest.fixture
def program(run_main):
    """train.py with the arguments given: (exit code, lines of stdout, lines of stderr without progress bars)."""
    return partial(run_main, train)


def assert_one_line(ended, expected):
    """`program` answered a mistake in one line with exit code 2; returns it."""
    code, _, errors = ended
    assert (code, len(errors)) == (2, 1)
    assert expected in errors[0]
    return errors[0]


def start(*arguments, processes=1):
    """train.py in a process of its own, or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *torchrun, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_equal_runs(one, two):
    """The same weights and averages, to the last bit."""
    ours, theirs = newest_state(one), newest_state(two)
    assert ours["step"] == theirs["step"]
    for part in ("weights", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())


def diffusers_gradients(unet, latent, image_latent, text, null_text, t, noise, u):
    """One step as Sec. 3.2 says it, with diffusers' UNet: its gradients by the names of diffusers."""
    network = unet_reference(unet).requires_grad_(True)
    alphas = (1 - torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()
    level = alphas[t][:, None, None, None]
    noisy = level.sqrt() * latent + (1 - level).sqrt() * noise
    no_text, no_image = u < 0.10, (u >= 0.05) & (u < 0.15)
    context = torch.where(no_text[:, None, None], null_text, text)
    image = image_latent * ~no_image[:, None, None, None]
    eps = network(torch.cat([noisy, image], dim=1), t, context).sample
    ((eps - noise) ** 2).mean().backward()
    return network


@pytest.fixture
def prepared(monkeypatch):
    """(unet, loss_of, settings, what Eq. 1 was called with) of a command line, without training."""

    def prepare(*arguments):
        found, drawn, usual = [], [], train.loss
        monkeypatch.setattr(train, "fit", lambda *parts: found.extend(parts))
        monkeypatch.setattr(train, "replace_model", lambda *parts: None)
        monkeypatch.setattr(train, "loss", lambda *parts: (drawn.append(parts[2:]), usual(*parts))[1])
        train.train(parse(list(map(str, arguments))))
        return *found[:3], drawn

    return prepare


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_gradient_is_that_of_diffusers(data, model_folder, tmp_path, prepared, micro_batches):
    """1e-5, float32, for the same noise, times and dropped conditions; also with accumulation."""
    flags = {"batch_size": 12 // micro_batches, "grad_accum": micro_batches, "loss_weighting": "none"}
    flags["seed"] = next(
        seed
        for seed in range(1000)
        if (u := u_of(seed)).min() < 0.05 and ((u > 0.05) & (u < 0.1)).any() and ((u > 0.1) & (u < 0.15)).any()
    )
    unet, loss_of, settings, drawn = prepared(*command(data, model_folder, tmp_path / "out", **flags))
    for micro in range(micro_batches):
        (loss_of(unet, draws_of(settings, 0, micro)) / micro_batches).backward()
    parts = [torch.cat(values) for values in zip(*drawn, strict=True)]
    assert parts[-1].tolist() == u_of(flags["seed"]).tolist()
    parts[3] = drawn[0][3]  # the null text
    network = diffusers_gradients(unet, *parts)
    with torch.no_grad():  # the gradients take the weights' places, and with them the names of diffusers
        for weight in unet.parameters():
            weight.copy_(weight.grad)
    ours = dict(unet_reference(unet).named_parameters())
    expected = {name: weight.grad for name, weight in network.named_parameters()}
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert relative_error(torch.cat([ours[name].flatten() for name in expected]), whole) <= 1e-5


def u_of(seed):
    """The u of a first step of 12 examples on cached latents of 64x64 pixels, as it is drawn."""
    draws = train.Draws(seed, 0, 12, slice(0, 12))
    draws.integers(18), draws.uniform(), draws.integers(2), draws.normal(4, 16, 16), draws.integers(1000)
    return draws.uniform()


def test_noise_levels_may_count_alike(data, model_folder, tmp_path, prepared):
    flags = {"loss_weighting": "balanced", "batch_size": 12}
    unet, loss_of, settings, drawn = prepared(*command(data, model_folder, tmp_path / "out", **flags))
    found, schedule = loss_of(unet, draws_of(settings, 0, 0)), NoiseSchedule()
    each, t = train.loss(unet, schedule, *drawn[0]), drawn[0][4]
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    assert found.item() == pytest.approx((each * ((snr.clamp(max=5) + 1) / snr).clamp(max=20)).mean().item(), rel=1e-4)


@pytest.fixture(scope="module")
def trained(data, init, tmp_path_factory):
    """What a tiny run leaves."""
    out = tmp_path_factory.mktemp("train") / "run"
    train.main(command(data, init, out, sampling_steps=3, cfg_text=5, cfg_image=1.25, eval_every=1))
    return out


def test_a_run_leaves_an_editor(trained, init):
    names = {"loss.png", "metrics.jsonl", "model", "samples", "samples.png", "settings.json", "states"}
    assert {path.name for path in trained.iterdir()} == names
    model, state = load(trained / "model"), newest_state(trained)
    assert model.sampling == Sampling(steps=3, text_guidance=5.0, image_guidance=1.25, resolution=64)
    weights = model.unet.state_dict()  # the moving average, as float16
    assert all(torch.equal(state["ema"][name].half().float(), weights[name]) for name in weights)
    assert not torch.equal(state["ema"]["conv_in.weight"], state["weights"]["conv_in.weight"])
    before = load(init)
    for part in ("vae", "text_encoder"):  # frozen
        ours, theirs = getattr(model, part).state_dict(), getattr(before, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name].half().float()) for name in theirs)
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    assert all(0 < line["validation"] < 100 for line in metrics)
    assert all(0 < line["loss"] < 100 for line in metrics[1:])
    assert sorted(path.name for path in (trained / "samples").iterdir()) == [f"{step:08d}.png" for step in range(5)]
    assert (trained / "samples" / "00000004.png").read_bytes() == (trained / "samples.png").read_bytes()


def test_the_papers_preset(data, init, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    paper = parse([f"--data={data}", f"--init={init}", f"--out={tmp_path / 'out'}"])
    assert (paper.resolution, paper.max_resize, paper.lr, paper.max_steps) == (256, 288, 1e-4, 10_000)
    assert (paper.batch_size, paper.grad_accum, paper.total_batch_size) == (32, 4, 1024)
    assert (paper.grad_clip, paper.mixed_precision, PRESETS["paper"]["ema_decay"]) == (0, "no", 0.9999)


@pytest.mark.parametrize("trainable", ["attention", "lora"])
def test_only_what_is_trainable_changes(data, init, tmp_path, program, trainable):
    assert program(*command(data, init, tmp_path / "run", trainable=trainable, rank=3, lr=0.01))[0] == 0
    before, after = load(init).unet, load(tmp_path / "run" / "model").unet
    before, after = extend_input(before, in_channels=8).state_dict(), after.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name].half().float())}
    pattern = r"attention|conv_in" if trainable == "attention" else r"attention\.to_\w+\.weight|conv_in\.weight"
    assert changed == {name for name in before if re.search(pattern, name)}


def test_memory_may_be_saved(data, init, trained, tmp_path, program):
    """--gradient-checkpointing learns the same, resumes where the other stopped, and what it leaves is exported."""
    flags = {"sampling_steps": 3, "cfg_text": 5, "cfg_image": 1.25, "ema_device": "cpu"}
    out, again = tmp_path / "run", tmp_path / "again"
    assert program(*command(data, init, out, "--gradient-checkpointing", **flags))[0] == 0
    assert_equal_runs(trained, out)
    assert program("export", f"--run={out}", f"--out={again}") [:2] == (0, [str(again)])
    ours, theirs = (load(folder).unet.state_dict() for folder in (again, trained / "model"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    flags |= {"max_steps": 6, "lr_decay": 0}
    assert program(*command(data, init, out, "--resume", **flags))[0] == 0


def test_overfitting_one_pair(data, init, tmp_path, program):
    flags = {"overfit": 1, "max_steps": 100, "batch_size": 4, "lr": 0.01, "ema_decay": 0.9, "eval_every": 50}
    said = "1 edits to train on, 4 pairs a step; 2 more are held out for validation and tests"
    code, printed, _ = program(*command(data, init, tmp_path / "run", **flags))
    expected = [said, f"{tmp_path / 'run'}: from step 0", str(tmp_path / "run" / "model")]
    assert (code, printed[-3:]) == (0, expected)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [value["validation"] for line in lines if "validation" in (value := json.loads(line))]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("from_disk", [False, True])
def test_two_processes_equal_one(data, init, tmp_path, from_disk):
    """Of twice the batch, or twice the micro-batches: the same examples and the same weights, but for rounding."""
    flags = {"max_steps": 3, "eval_every": 1, "lr": 1e-4, "warmup_steps": 0}
    if from_disk:
        flags |= {"preset": "paper", "resolution": 64, "max_resize": 72, "workers": 1}
    runs = {"one": (1, {"batch_size": 4}), "two": (2, {"batch_size": 1, "grad_accum": 2})}
    for name, (processes, sizes) in runs.items():
        totals = {"total_batch_size": 4} if from_disk else {}
        process = start(*command(data, init, tmp_path / name, **flags, **sizes, **totals), processes=processes)
        assert process.wait(200) == 0, process.stderr.read()
    start_weights = extend_input(load(init).unet, in_channels=8).state_dict()
    one, two = (newest_state(tmp_path / name)["weights"] for name in runs)
    moved = [torch.cat([(run[name] - start_weights[name]).flatten() for name in run]) for run in (one, two)]
    assert relative_error(*moved) <= MOVED  # of the way that the weights went
    assert max(relative_error(one[name], two[name]) for name in one) <= 1e-5  # of every tensor, at the paper's rate
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in runs]
    losses = [[json.loads(line)["loss"] for line in run[1:]] for run in lines]  # behind step 0
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_resumed_from_images_on_disk(data, init, tmp_path):
    """Crops, flips and the choice of pairs included, in worker processes: equal to the last bit."""
    flags = {"preset": "paper", "resolution": 64, "max_resize": 72, "workers": 1, "save_every": 1, "eval_every": 4}
    flags |= {"batch_size": 2, "total_batch_size": 2}
    for name, stops in (("whole", (4,)), ("parts", (1, 3, 4))):
        for steps in stops:
            train.main(command(data, init, tmp_path / name, "--resume", max_steps=steps, **flags))
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(data, init, tmp_path):
    """SIGKILL at thirty random moments, and resumed: the weights of a run that was left alone, to the last bit."""
    times = 30
    flags = {"max_steps": 5 * times, "save_every": 1, "eval_every": 5 * times}
    train.main(command(data, init, tmp_path / "whole", **flags))
    out, kills, generator = tmp_path / "killed", 0, random.Random(0)
    for _ in range(times):
        process = start(*command(data, init, out, "--resume", **flags))
        before, deadline = len(state_paths(out)) and state_paths(out)[-1], time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if state_paths(out) and state_paths(out)[-1] != before:
                break
            time.sleep(0.005)
        time.sleep(generator.random() * 0.1)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
    train.main(command(data, init, out, "--resume", **flags))
    assert kills >= times // 2
    assert_equal_runs(tmp_path / "whole", out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(data, init, tmp_path, number):
    out = tmp_path / "run"
    process = start(*command(data, init, out, max_steps=100_000, eval_every=100_000, save_every=1))
    while not state_paths(out) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert re.search(r"stopped at step \d+; the same command with --resume continues", printed)
    assert "Traceback" not in errors
    assert errors.count("finishing this step, then saving; once more to stop now") == 1


def test_a_run_says_what_it_will_do(data, init, tmp_path, program):
    """What it loads, all settings, GPU memory and disk; validation at the beginning and the end of so few steps."""
    flags = {"preset": "12gb", "resolution": 64, "total_batch_size": 3, "max_steps": 3}
    code, printed, _ = program(*command(data, init, tmp_path / "run", **flags))
    assert (code, printed[0]) == (0, f"loading {init}")
    text = " ".join(printed)
    assert all(f"{name} {value}" in re.sub(" +", " ", text) for name, value in (("lr", 0.001), ("eval-every", 100)))
    assert "GPU memory: 12gb takes 6 GB for Stable Diffusion 1.5 at 256x256; this run is on cpu, see --device" in text
    state = newest_state(tmp_path / "run")
    size, millions = re.search(r"disk: (\S+) GB a state \((\S+) million trained weights\), the newest 2", text).groups()
    assert float(millions) == round(sum(weight.numel() for weight in state["weights"].values()) / 1e6, 1)
    assert float(size) * 1e9 == pytest.approx(state_paths(tmp_path / "run")[0].stat().st_size, rel=0.5)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert ["validation" in line for line in lines] == [True, False, False, True]
    resumed = program(*command(data, init, tmp_path / "run", "--resume", **flags))
    assert f"{tmp_path / 'run'}: from step 3" in resumed.out


def test_a_reader_that_dies_is_one_line(data, init, tmp_path, program, monkeypatch):
    """What a process that reads images raises where shared memory is short, as in a container."""

    def short(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr("torch.utils.data._utils.collate.default_collate", short)
    monkeypatch.setattr("torch.utils.data.dataloader._utils.collate.default_collate", short)
    flags = {"preset": "12gb", "resolution": 64, "total_batch_size": 3, "workers": 1}
    line = assert_one_line(program(*command(data, init, tmp_path / "run", **flags)), "try --workers 0")
    assert "No space left" in line


def test_truncated_states_are_skipped(data, init, trained, tmp_path, program):
    out = tmp_path / "run"
    assert program(*command(data, init, out, save_every=1))[0] == 0
    older, newest = state_paths(out)
    for length in (0, 1000, newest.stat().st_size - 1):
        newest.write_bytes(older.read_bytes()[:length])
        assert newest_state(out)["step"] == 3
    code, printed, _ = program(*command(data, init, out, "--resume", save_every=1))
    assert code == 0
    assert any(f"{newest} is damaged and skipped" in line for line in printed)
    for path in state_paths(out):
        path.write_bytes(b"")
    assert_one_line(program(*command(data, init, out, "--resume")), "all states")


def test_a_full_disk_is_one_line(data, init, tmp_path, program, monkeypatch):
    def full(parts, path):
        raise RuntimeError("[enforce fail at inline_container.cc:595] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    assert_one_line(program(*command(data, init, tmp_path / "run")), "is the disk full?")


def test_nan_ends_in_one_line(data, init, tmp_path, program, monkeypatch):
    usual, calls = train.loss, []

    def breaks(*parts):
        calls.extend([1] * torch.is_grad_enabled())  # of the steps, not of the evaluation before them
        return usual(*parts) * (math.nan if len(calls) > 2 else 1)

    monkeypatch.setattr(train, "loss", breaks)
    ended = program(*command(data, init, tmp_path / "run", save_every=1, eval_every=4))
    assert_one_line(ended, "NaN or Inf at step 3")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"lr": -1}, "--lr: should be from 0 to 1, not -1"),
        ({"beta2": 1}, "--beta2: should be from 0 to 0.99999, not 1"),
        ({"batch_size": 0}, "--batch-size: should be at least 1"),
        ({"subset": 1.5}, "--subset: should be"),
        ({"subset": 19}, "holds 18 edits"),
        ({"data": "nowhere"}, "seeds.json cannot be read"),
        ({"init": "./nowhere"}, "nowhere"),
        ({"total_batch_size": 4}, "--total-batch-size 4 is not 3"),
        ({"compile": None}, "--compile does not pay on a CPU"),
    ],
)
def test_mistakes(data, init, tmp_path, program, changed, expected):
    flags = ["--compile"] if "compile" in changed else []
    changed = {name: value for name, value in changed.items() if name != "compile"}
    assert_one_line(program(*command(data, init, tmp_path / "run", *flags, **changed)), expected)
    assert not (tmp_path / "run").exists()


def test_another_run_is_refused(data, init, trained, program):
    assert_one_line(program(*command(data, init, trained)), "--resume")
    assert_one_line(program(*command(data, init, trained, "--resume", seed=1, sampling_steps=3)), "begun with")
    lora = program("export", f"--run={trained}", f"--out={trained / 'lora.safetensors'}", "--lora")
    assert_one_line(lora, "has no LoRA")


def test_a_run_knows_its_base_by_the_weights(data, init, tmp_path, program, monkeypatch):
    """By whatever path; and another model under the old name is refused."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(init, "sd")
    shutil.copytree(data, "pairs")
    line = command("pairs", "sd", "run", "--resume", trainable="lora", rank=2, max_steps=1)
    assert program(*line)[0] == 0
    monkeypatch.chdir(tmp_path / "sd")
    assert program("export", "--run=../run", "--out=../a.safetensors")[0] == 0
    monkeypatch.chdir(tmp_path)
    os.rename("sd", "elsewhere")
    assert_one_line(program("export", "--run=run", "--out=b.safetensors"), "say where it is now by --init")
    assert program("export", "--run=run", "--out=b.safetensors", "--init=elsewhere")[0] == 0
    first, again = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    os.rename("pairs", "moved")
    moved = [*line, "--data=moved", "--init=./elsewhere", "--max-steps=2"]
    assert program(*moved)[0] == 0
    assert program("export", "--run=run", "--out=c.safetensors")[0] == 0  # where it was seen last

    path = tmp_path / "elsewhere/unet/diffusion_pytorch_model.safetensors"
    tensors = {name: 0.5 * weight for name, weight in load_file(path).items()}
    save_file(tensors, path)
    assert_one_line(program(*moved, "--max-steps=3"), "begun with init_fingerprint")
    assert_one_line(program("export", "--run=run", "--out=d.safetensors"), "is not the model that the training began")
    tensors["conv_in.weight"][0, 0, 0, 0] = math.nan
    save_file(tensors, path)
    assert_one_line(program(*command("moved", "elsewhere", "other")), "unet: tensor conv_in.weight holds NaN or Inf")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("out", "lora"), [("x.ckpt", []), ("x.PT", []), ("folder", ["--lora"])])
def test_formats_that_are_not_written(out, lora, trained, program):
    assert_one_line(program("export", f"--run={trained}", f"--out={out}", *lora), "should end in .safetensors")
