"""train.py: where an editor starts, the gradient of a step, runs from a data set to a model, and runs broken off."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, lines_of, tiny_model
from dataset_of_true_pairs import write_pairs
from PIL import Image
from reference import relative_error, unet_reference
from safetensors.torch import load_file

import editor_training
import train
from batches import Draws
from cli import run_program
from dataset import EditDataset
from diffusion import NoiseSchedule, Sampling
from formats.checkpoint import load, save_folder
from formats.weights import extend_input
from ip2p import InstructPix2Pix, loss
from presets import PRESETS, parse
from ranks import Ranks
from states import newest_state, state_paths
from unet import ResBlock

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty pairs: 18 for training, one for validation. Shared: copy before changing it."""
    return write_pairs(tmp_path_factory.mktemp("train") / "pairs", 20)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("train") / "sd"
    save_folder(tiny_model(in_channels=4), folder)
    return folder


def command(data, init, out, *flags, **changed):
    """The command line, with some values changed."""
    values = {"data": data, "init": init, "out": out, "preset": "mini", "dtype": "float32", "steps": 4, "batch": 3}
    values |= {"lr": 1e-3, "warmup": 0, "decay": 0, "workers": 0} | changed
    given = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    return [*given, *flags]


@pytest.fixture
def program(capsys, monkeypatch):
    """train.py with the arguments given: (exit code, lines of stdout, lines of stderr without progress bars)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_program(train.main)
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        errors = [line for line in lines_of(captured.err) if not re.match(r"\w+: +\d+(%|it)", line)]
        return code, captured.out.splitlines(), errors

    return run


def training(*arguments):
    """Everything that a step needs, as train.py makes it."""
    run = editor_training.Training(parse(list(map(str, arguments))), Ranks("cpu"))
    run.read_data()
    return run


def weights_of(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


def assert_equal_runs(one, two):
    """The same weights, averages and optimizer to the last bit, and the same model folders."""
    ours, theirs = newest_state(one), newest_state(two)
    assert ours["step"] == theirs["step"]
    for part in ("weights", "average"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
    for number, values in ours["optimizer"]["state"].items():
        assert all(torch.equal(value, theirs["optimizer"]["state"][number][name]) for name, value in values.items())
    for path in (one / "model").rglob("*"):
        if path.is_file():
            assert (two / "model" / path.relative_to(one / "model")).read_bytes() == path.read_bytes()


# ---- where it starts ----


@torch.no_grad()
def test_at_first_the_picture_does_not_matter(data, init, tmp_path):
    """The new weights are zero, all others are Stable Diffusion's: the same prediction, whatever the picture."""
    unet, sd = training(*command(data, init, tmp_path / "out")).unet, load(init).unet
    assert unet.config.in_channels == 8
    assert torch.equal(unet.conv_in.weight[:, :4], sd.conv_in.weight)
    assert not unet.conv_in.weight[:, 4:].any()
    assert all(weight.requires_grad for weight in unet.parameters())
    generator = torch.Generator().manual_seed(0)
    z, context = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 24, 16, generator=generator)
    t = torch.tensor([0, 500, 999])
    expected = sd(z, t, context)
    for scale in (0, 1, 30):
        picture = scale * torch.randn(3, 4, 16, 16, generator=generator)
        assert relative_error(unet(torch.cat([z, picture], dim=1), t, context), expected) <= 1e-5
    assert relative_error(unet(torch.cat([z + picture, picture], dim=1), t, context), expected) > 0.1


def test_an_editor_may_be_trained_further(data, model_folder, tmp_path):
    unet = training(*command(data, model_folder, tmp_path / "out")).unet
    assert torch.equal(unet.conv_in.weight, load(model_folder).unet.conv_in.weight)


def test_a_preset_is_where_flags_start_from(data, init, tmp_path):
    given = f"--data={data}", f"--init={init}", f"--out={tmp_path / 'out'}"
    options = parse([*given, "--preset=mini", "--lr=0.5"])
    assert (options.lr, options.ema, options.steps) == (0.5, PRESETS["mini"]["ema"], PRESETS["mini"]["steps"])
    paper = parse(given, processes=8)  # Sec. A.1
    assert (paper.resolution, paper.largest, paper.lr, paper.ema, paper.steps) == (256, 288, 1e-4, 0.9999, 10_000)
    assert (paper.batch, paper.accumulate, paper.total) == (32, 4, 1024)
    assert parse([*given, "--preset=paper", "--batch=16"]).accumulate == 64
    assert parse([*given, "--accumulate=3", "--batch=16"], processes=2).total == 96


# ---- the gradient ----


def diffusers_gradients(unet, latent, image_latent, text, null_text, t, noise, u):
    """One step as Sec. 3.2 says it, with diffusers' UNet: its gradients by the names of diffusers."""
    network = unet_reference(unet).requires_grad_(True)
    alphas = (1 - torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()
    signal = alphas[t][:, None, None, None]
    noisy = signal.sqrt() * latent + (1 - signal).sqrt() * noise
    no_text, no_image = u < 0.10, (u >= 0.05) & (u < 0.15)
    context = torch.where(no_text[:, None, None], null_text, text)
    image = image_latent * ~no_image[:, None, None, None]
    eps = network(torch.cat([noisy, image], dim=1), t, context).sample
    ((eps - noise) ** 2).mean().backward()
    return network


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_is_that_of_diffusers(data, model_folder, tmp_path, accumulate):
    """1e-5, float32, for the same noise, times and dropped conditions; also when a step has several passes."""
    flags = {"batch": 12 // accumulate, "accumulate": accumulate}
    run = training(*command(data, model_folder, tmp_path / "out", **flags))
    run.options.balanced = False
    seed = next(seed for seed in range(100) if (drops := drawn(run, seed)[-1]).min() < 0.05 and 0.1 < drops[1] < 0.15)
    run.options.seed = seed
    value = run.backward(0)
    network = diffusers_gradients(run.unet, *drawn(run, seed))
    with torch.no_grad():  # the gradients take the weights' places, and with them the names of diffusers
        for weight in run.unet.parameters():
            weight.copy_(weight.grad)
    ours = unet_reference(run.unet)
    expected = {name: weight.grad for name, weight in network.named_parameters()}
    found = dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert relative_error(torch.cat([found[name].flatten() for name in expected]), whole) <= 1e-5
    assert value.item() > 0


def drawn(run, seed):
    """What the first step of a run of 12 examples with this seed draws, in its order."""
    draws = Draws(seed, range(12))
    latent, image_latent, text = run.data.batch(draws)
    t, u = draws.whole(1000), draws.uniform()
    noise = draws.normal(*latent.shape[1:])
    return latent, image_latent, text, run.data.contexts.null_text, t, noise, u


@torch.no_grad()
def test_noise_levels_may_count_alike(data, init, tmp_path):
    """--balanced weighs Eq. 1 by the signal-to-noise ratio."""
    run, schedule = training(*command(data, init, tmp_path / "out", batch=12)), NoiseSchedule()
    *batch, null_text, t, noise, u = drawn(run, 0)
    draws = Draws(0, range(12))
    run.data.batch(draws), draws.whole(1000), draws.uniform()
    each = loss(run.unet, schedule, *batch, null_text, t, noise, u)
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    expected = (each * ((snr.clamp(max=5) + 1) / snr).clamp(max=20)).mean()
    assert run.options.balanced
    assert run.loss(run.unet, batch, draws, t, u).item() == pytest.approx(expected.item(), rel=1e-4)


# ---- a run ----


@pytest.fixture(scope="module")
def trained(data, init, tmp_path_factory):
    """What a tiny run leaves. Shared: copy before changing it."""
    out = tmp_path_factory.mktemp("train") / "run"
    train.main(command(data, init, out, sampling_steps=3, cfg_text=5, cfg_image=1.25))
    return out


def test_a_run_leaves_an_editor(init, trained):
    names = {"loss.png", "metrics.jsonl", "model", "samples.png", "states"}
    assert {path.name for path in trained.iterdir()} == names
    model = load(trained / "model")
    assert model.unet.config.in_channels == 8
    assert model.sampling == Sampling(steps=3, text_guidance=5.0, image_guidance=1.25, resolution=64)
    assert model.tokenizer.vocabulary == load(init).tokenizer.vocabulary
    edited = InstructPix2Pix(model).edit(Image.new("RGB", (64, 64), "red"), "make it night")
    assert edited.size == (64, 64)
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]  # each is a tenth of the way
    assert all(0 < line["loss"] < 100 and 0 < line["validation"] < 100 for line in metrics)
    with Image.open(trained / "samples.png") as sheet, Image.open(trained / "loss.png") as plot:
        assert sheet.width > 3 * 128
        assert plot.width > 600
        assert len(plot.convert("RGB").getcolors(100_000)) > 4


def test_only_the_unet_is_trained(init, trained):
    """The autoencoder and the text encoder are those of --init to the last bit, as float16."""
    for part in ("vae", "text_encoder"):
        before, after = weights_of(init, part), weights_of(trained / "model", part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].half(), after[name]) for name in before)
    before, after = load(init).unet.state_dict(), newest_state(trained)["weights"]
    assert after["conv_in.weight"][:, 4:].any()
    after["conv_in.weight"] = after["conv_in.weight"][:, :4]
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_the_editor_is_the_moving_average(trained):
    state, unet = newest_state(trained), load(trained / "model").unet.state_dict()
    assert state["average"].keys() == unet.keys()
    assert all(torch.equal(state["average"][name].half().float(), unet[name]) for name in unet)
    assert not all(torch.equal(state["weights"][name], state["average"][name]) for name in unet)


def test_sampling_defaults_are_inits_own(data, init, tmp_path, program):
    code, out, errors = program(*command(data, init, tmp_path / "out", steps=1))
    assert (code, errors) == (0, [])
    assert out == ["18 pairs, 3 a step", str(tmp_path / "out" / "model")]
    assert load(tmp_path / "out" / "model").sampling == load(init).sampling


def test_seeds_differ(data, init, trained, program, tmp_path):
    assert program(*command(data, init, tmp_path / "other", seed=1))[0] == 0
    ours, theirs = (weights_of(folder / "model", "unet") for folder in (trained, tmp_path / "other"))
    assert not torch.equal(ours["conv_in.weight"], theirs["conv_in.weight"])


def test_overfitting_one_pair(data, init, tmp_path, program):
    """The first thing to try: the loss of that one pair falls far below that of a network that has learned nothing."""
    flags = {"overfit": 1, "steps": 150, "batch": 4, "lr": 0.01, "ema": 0.9, "look_every": 15, "preset": "paper"}
    flags |= {"resolution": 64, "accumulate": 1, "sampling_steps": 1}
    code, out, errors = program(*command(data, init, tmp_path / "run", **flags))
    assert (code, errors, out[0]) == (0, [], "1 pairs, 4 a step")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation"] for line in metrics if "validation" in line]
    assert len(losses) == 10
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(("subset", "count"), [(5, 5), (0.5, 9)])
def test_a_subset_is_spread_over_all(data, init, tmp_path, subset, count):
    run = training(*command(data, init, tmp_path / "out", subset=subset))
    numbers = [int(folder) for folder, _ in run.pairs.pairs]
    assert len(set(numbers)) == len(numbers) == count == len(run.data.texts)
    assert numbers == sorted(numbers)
    assert numbers[-1] - numbers[0] > 12


def test_pictures_may_be_cropped_by_chance(init, tmp_path, program):
    """As the paper does, at another size than they have on disk; encoded when their turn comes."""
    data = write_pairs(tmp_path / "pairs", 20, size=(96, 80))
    flags = {"preset": "paper", "resolution": 64, "largest": 72, "total": 6, "look_every": 2}
    code, out, errors = program(*command(data, init, tmp_path / "run", **flags))
    assert (code, errors) == (0, [])
    assert out[0] == "18 pairs, 6 a step"


@pytest.mark.parametrize("trainable", ["full", "attention"])
def test_only_what_is_trainable_changes(data, init, tmp_path, program, trainable):
    assert program(*command(data, init, tmp_path / "run", trainable=trainable, lr=0.01))[0] == 0
    before, after = extend_input(load(init).unet, 8).state_dict(), newest_state(tmp_path / "run")["weights"]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    part = {name for name in before if "attention" in name or "conv_in" in name}
    wanted = set(before) if trainable == "full" else part
    assert after.keys() == wanted
    assert changed == wanted
    exported = load(tmp_path / "run" / "model").unet.state_dict()
    kept = [name for name in before if name not in wanted]
    assert all(torch.equal(exported[name], before[name].half().float()) for name in kept)


def test_lora(data, init, trained, program, tmp_path):
    """Its state holds only the small weights; the model is a plain one with them merged in; the file is diffusers'."""
    flags = {"trainable": "lora", "rank": 3, "lr": 0.01}
    assert program(*command(data, init, tmp_path / "run", **flags))[0] == 0
    state, start = newest_state(tmp_path / "run"), extend_input(load(init).unet, 8).state_dict()
    assert all(name.endswith((".a", ".b")) for name in state["weights"])
    exported = load(tmp_path / "run" / "model").unet.state_dict()
    changed = {name for name in start if not torch.equal(exported[name], start[name].half().float())}
    assert changed == {name for name in start if re.search(r"attention\.to_\w+\.weight|conv_in\.weight", name)}
    path = tmp_path / "lora.safetensors"
    export = "export", f"--run={tmp_path / 'run'}", f"--out={path}"
    assert program(*export, "--lora") == (0, [str(path)], [])
    tensors = load_file(path)
    assert len(tensors) == len(state["weights"])
    found = [(len(tensor), tensor.flatten().tolist()) for tensor in tensors.values()]
    assert all((len(value), value.flatten().tolist()) in found for value in state["average"].values())
    code, _, errors = program("export", f"--run={trained}", f"--out={path}", "--lora")
    assert (code, len(errors)) == (2, 1)
    assert "was trained with --trainable full; it has no LoRA of its own" in errors[0]
    assert program(*command(data, init, tmp_path / "run", "--resume", **flags, steps=5, save_every=1))[0] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_group_that_is_told_to_stop(data, init, tmp_path, workers):
    """As torchrun, Ctrl-C and job schedulers do: reading processes must not be the first to go."""
    flags = {"preset": "paper", "resolution": 64, "total": 6, "steps": 10_000, "workers": workers, "save_every": 9999}
    arguments = command(data, init, tmp_path / "run", **flags)
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    out, errors = process.communicate()
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert f"stopped at step {newest_state(tmp_path / 'run')['step']}; the same command" in out


def test_checkpointing_computes_the_blocks_twice(data, init, tmp_path, monkeypatch):
    """With fused attention as well, which the presets for small GPUs take; the gradient stays what it was."""
    flags = {"preset": "paper", "resolution": 64, "total": 3}
    plain = training(*command(data, init, tmp_path / "out", **flags))
    twice = training(*command(data, init, tmp_path / "out", "--checkpointing", **flags))
    calls = []
    for module in twice.unet.modules():
        if isinstance(module, ResBlock):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    losses = [run.backward(0).item() for run in (plain, twice)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(calls) == 2 * sum(isinstance(module, ResBlock) for module in plain.unet.modules())
    for one, two in zip(plain.weights, twice.weights, strict=True):
        assert relative_error(two.grad, one.grad) <= 1e-5


def test_channels_last_reaches_the_weights(data, init, tmp_path):
    run = training(*command(data, init, tmp_path / "out", "--channels-last"))
    assert run.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("first", "then"), [([], ["--channels-last"]), (["--channels-last"], [])])
def test_the_memory_layout_may_change(data, init, trained, program, tmp_path, first, then):
    """The optimizer's moments follow."""
    assert program(*command(data, init, tmp_path / "run", *first, steps=4))[0] == 0
    (tmp_path / "run" / "states" / "00000004.pt").rename(tmp_path / "four")
    assert program(*command(data, init, tmp_path / "run", *first, steps=2))[0] == 0
    assert program(*command(data, init, tmp_path / "run", "--resume", *then, steps=4))[0] == 0
    ours, theirs = newest_state(tmp_path / "run")["weights"], torch.load(tmp_path / "four")["weights"]
    assert max(relative_error(ours[name], theirs[name]) for name in ours) < 1e-4


def test_a_run_may_go_on_in_float16(data, init, program, tmp_path):
    assert program(*command(data, init, tmp_path / "run", steps=2))[0] == 0
    assert program(*command(data, init, tmp_path / "run", "--resume", steps=3, dtype="float16"))[0] == 0
    assert program(*command(data, init, tmp_path / "run", "--resume", steps=4, dtype="float32"))[0] == 0


@pytest.mark.parametrize("flag", ["--checkpointing", "--channels-last"])
def test_ways_to_save_memory_or_time_change_nothing(data, init, trained, tmp_path, program, flag):
    """But for rounding."""
    out = tmp_path / "run"
    assert program(*command(data, init, out, flag, sampling_steps=3, cfg_text=5, cfg_image=1.25))[0] == 0
    ours, theirs = newest_state(out)["weights"], newest_state(trained)["weights"]
    assert ours.keys() == theirs.keys()
    assert max(relative_error(ours[name], theirs[name]) for name in ours) < 1e-4
    assert load(out / "model").unet.config.in_channels == 8


@pytest.mark.parametrize("flags", [["--compile"], ["--compile", "--checkpointing"]])
def test_compiled_it_learns_the_same(data, init, trained, tmp_path, program, monkeypatch, flags):
    """With a compiler that only traces, so to the last bit, or where blocks are computed twice but for rounding."""
    traced = []

    def compiled(network):
        traced.append(network)
        return torch.compile(network, backend="eager", dynamic=False)

    monkeypatch.setattr(editor_training, "compiled", compiled)
    out = tmp_path / "run"
    assert program(*command(data, init, out, *flags, sampling_steps=3, cfg_text=5, cfg_image=1.25))[0] == 0
    assert len(traced) == 1
    ours, theirs = newest_state(out)["weights"], newest_state(trained)["weights"]
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) <= (1e-4 if flags[1:] else 0)
    assert list(ours) == list(theirs)


def test_the_graph_that_was_checked_is_the_one_that_trains(data, init, tmp_path, monkeypatch):
    """Also where pictures are encoded at every step: whatever the autoencoder leaves fits the compiled code."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(editor_training, "compiled", lambda net: torch.compile(net, backend=counting, dynamic=False))
    flags = {"preset": "paper", "resolution": 64, "total": 3}
    run = training(*command(data, init, tmp_path / "out", "--compile", **flags))
    assert len(graphs) == 1
    for step in range(2):
        run.backward(step)
        run.update(step)
    assert len(graphs) == 1


class WrongScale(torch.nn.Module):
    """A network with the right output, and twice its gradient."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs, **others):
        out = self.network(*inputs, **others)
        return out.detach() + 2 * (out - out.detach())


class LosesOne(WrongScale):
    """A network whose first convolution gets no gradient."""

    def forward(self, *inputs, **others):
        frozen = {"conv_in.bias": self.network.conv_in.bias.detach()}
        return torch.func.functional_call(self.network, frozen, inputs, others)


@pytest.mark.parametrize(("wrong", "words"), [(WrongScale, "is 100 % from"), (LosesOne, "of some weights is lost")])
def test_a_compiler_that_is_wrong_is_found_out(data, init, tmp_path, program, monkeypatch, wrong, words):
    monkeypatch.setattr(editor_training, "compiled", wrong)
    code, _, errors = program(*command(data, init, tmp_path / "run", "--compile"))
    assert (code, len(errors)) == (2, 1)
    assert "this PyTorch compiles the UNet wrongly" in errors[0]
    assert words in errors[0]
    assert not (tmp_path / "run").exists()


def test_float16_scales_its_gradients(data, init, tmp_path, program):
    """At first too much, so that some steps change nothing; then it finds its scale."""
    assert program(*command(data, init, tmp_path / "run", dtype="float16", steps=12))[0] == 0
    state, start = newest_state(tmp_path / "run"), extend_input(load(init).unet, 8).state_dict()
    assert all(value.isfinite().all() for value in state["weights"].values())
    assert not any(torch.equal(value, start[name]) for name, value in state["weights"].items())
    assert 1 < state["scaler"]["scale"] < 2**16


def test_half_precision_stays_close(data, init, trained, tmp_path, program):
    assert program(*command(data, init, tmp_path / "run", dtype="bfloat16"))[0] == 0
    ours, theirs = newest_state(tmp_path / "run")["weights"], newest_state(trained)["weights"]
    start = extend_input(load(init).unet, 8).state_dict()
    moved = torch.cat([(theirs[name] - start[name]).flatten() for name in ours])
    assert relative_error(torch.cat([(ours[name] - start[name]).flatten() for name in ours]), moved) < 0.5


# ---- stopped, and gone on with ----


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    data, init, trained, program, tmp_path, monkeypatch, stop_at
):
    """By SIGTERM: it finishes the step, saves, and says how to go on. To the last bit."""
    backward, calls = editor_training.Training.backward, []

    def interrupted(self, step):
        calls.append(step)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, step)

    arguments = command(data, init, tmp_path / "run", "--resume", sampling_steps=3, cfg_text=5, cfg_image=1.25)
    monkeypatch.setattr(editor_training.Training, "backward", interrupted)
    code, out, errors = program(*arguments)
    assert (code, errors) == (143, [])
    assert out[-1] == f"stopped at step {stop_at}; the same command with --resume goes on"
    assert newest_state(tmp_path / "run")["step"] == stop_at
    assert not (tmp_path / "run" / "model").exists()

    monkeypatch.setattr(editor_training.Training, "backward", backward)
    assert program(*arguments)[0] == 0
    assert_equal_runs(tmp_path / "run", trained)
    assert (tmp_path / "run" / "samples.png").read_bytes() == (trained / "samples.png").read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(steps) == {1, 2, 3, 4}
    assert steps == sorted(steps)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], ["--dtype=bfloat16", "--checkpointing", "--channels-last"]])
def test_on_a_gpu_a_resumed_run_is_the_same_to_the_last_bit(data, init, tmp_path, program, flags):
    for name, parts in {"whole": [6], "parts": [3, 6]}.items():
        for steps in parts:
            run = command(data, init, tmp_path / name, "--resume", *flags, steps=steps, device="cuda", save_every=1)
            assert program(*run)[0] == 0
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")


def test_killed_at_thirty_moments_it_ends_in_the_same_weights(data, init, tmp_path, program):
    """SIGKILL; whatever is lost is at most the interval between two states."""
    arguments = command(data, init, tmp_path / "run", "--resume", steps=12, save_every=2, sampling_steps=2)
    whole = command(data, init, tmp_path / "whole", steps=12, save_every=2, sampling_steps=2)
    assert program(*whole)[0] == 0
    rng, context, moments = random.Random(0), multiprocessing.get_context("fork"), set()
    longest, done = 0.5, 0
    for _ in range(30):
        process = context.Process(target=train.main, args=(arguments,))
        process.start()
        time.sleep(rng.uniform(0, longest))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        states = state_paths(tmp_path / "run")
        before, done = done, int(states[-1].stem) if states else 0
        moments.add(done)
        longest *= 1.2 if done == before else 0.8
        if done == 12:
            assert program(*arguments)[0] == 0
            assert_equal_runs(tmp_path / "run", tmp_path / "whole")
            shutil.rmtree(tmp_path / "run")
            done = 0
    assert program(*arguments)[0] == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")
    assert len(moments) > 3


def test_a_damaged_state_is_left_aside(data, init, trained, program, tmp_path):
    """Cut short by a full disk, say: the one before it is taken, and the end is the same."""
    shutil.copytree(trained, tmp_path / "run")
    arguments = command(data, init, tmp_path / "run", "--resume", steps=6, save_every=1)
    assert program(*arguments)[0] == 0
    assert [path.name for path in state_paths(tmp_path / "run")] == ["00000005.pt", "00000006.pt"]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    path = tmp_path / "again" / "states" / "00000006.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    code, out, _ = program(*command(data, init, tmp_path / "again", "--resume", steps=6, save_every=1))
    assert code == 0
    assert any(line.startswith(f"{path} is damaged and left aside") for line in out)
    assert_equal_runs(tmp_path / "again", tmp_path / "run")
    for path in state_paths(tmp_path / "again"):
        path.write_bytes(b"nothing")
    code, _, errors = program(*command(data, init, tmp_path / "again", "--resume", steps=6))
    assert (code, len(errors)) == (2, 1)
    assert "are damaged; remove that folder to start anew" in errors[0]


def test_a_disk_that_is_full_when_a_state_is_written(data, init, trained, program, tmp_path):
    """One line, the states before it are whole, nothing torn is there; with room, the run ends as it would have."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(trained, tmp_path / "whole")
    arguments = command(data, init, tmp_path / "run", "--resume", steps=6, save_every=1)
    before = {path: path.read_bytes() for path in state_paths(tmp_path / "run")}

    def on_a_full_disk():
        sys.argv = ["train.py", *arguments]
        size = min(len(content) for content in before.values()) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # no file may grow beyond half a state
        with open(tmp_path / "errors", "w") as sys.stderr:
            run_program(train.main)

    process = multiprocessing.get_context("fork").Process(target=on_a_full_disk)
    process.start()
    process.join()
    assert process.exitcode == 2
    errors = [line for line in lines_of((tmp_path / "errors").read_text()) if line.startswith("train.py:")]
    assert len(errors) == 1
    assert "is the disk full?" in errors[0]
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "states").iterdir()} == before
    assert program(*arguments)[0] == 0
    assert program(*command(data, init, tmp_path / "whole", "--resume", steps=6, save_every=1))[0] == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_run_is_not_overwritten(data, init, trained, program, tmp_path):
    """Without --resume it is left alone; and with it, what would make another run of it is refused."""
    shutil.copytree(trained, tmp_path / "run")
    code, _, errors = program(*command(data, init, tmp_path / "run"))
    message = f"{tmp_path / 'run'} holds a run; go on with it by --resume, or take another --out"
    assert (code, errors) == (2, [f"train.py: {message}"])
    for changed, words in [({"seed": 1}, "seed 0, now it is 1"), ({"batch": 2}, "total 3, now it is 2")]:
        code, _, errors = program(*command(data, init, tmp_path / "run", "--resume", **changed))
        assert (code, len(errors)) == (2, 1)
        assert f"was begun with {words}; take the same, or another --out" in errors[0]


def test_a_finished_run_writes_the_same_model_again(data, init, trained, program, tmp_path):
    """And may note other sampling defaults in it."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    assert program(*command(data, init, out, "--resume", cfg_text=6))[0] == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (out / "model" / name).read_bytes() == (trained / "model" / name).read_bytes()
    assert load(out / "model").sampling == Sampling(steps=2, text_guidance=6.0, image_guidance=1.5, resolution=64)


@pytest.mark.parametrize(("bad", "words"), [(np.nan, "is nan"), (np.inf, "is inf"), (1e6, "has grown to 5 times")])
def test_a_training_that_goes_astray_ends(data, init, program, tmp_path, monkeypatch, bad, words):
    """Before its weights are saved, and naming the last state that is good."""
    backward = editor_training.Training.backward
    monkeypatch.setattr(editor_training, "MEAN_OF", 2)
    monkeypatch.setattr(
        editor_training.Training, "backward", lambda self, step: backward(self, step) * (bad if step >= 5 else 1)
    )
    code, _, errors = program(*command(data, init, tmp_path / "run", steps=8, save_every=2))
    assert (code, len(errors)) == (2, 1)
    assert f"the loss {words}" in errors[0]
    good = "00000004.pt" if bad != 1e6 else "00000002.pt"  # an explosion is seen only some steps after it began
    assert f"the last good state is {good}: remove later ones and go on with --resume and a lower --lr" in errors[0]
    assert int(state_paths(tmp_path / "run")[-1].stem) in (4, 6)
    assert all(value.isfinite().all() for value in newest_state(tmp_path / "run")["weights"].values())


def test_a_gradient_that_is_no_number_changes_nothing(data, init, program, tmp_path, monkeypatch):
    """Although the loss was one: the weights stay, and no state is written."""
    watch = editor_training.Training.watch

    def spoil(self, step, loss):
        if step == 3:
            self.weights[0].grad.view(-1)[0] = np.inf
        return watch(self, step, loss)

    monkeypatch.setattr(editor_training.Training, "watch", spoil)
    code, _, errors = program(*command(data, init, tmp_path / "run", save_every=1, clip=0))
    assert (code, len(errors)) == (2, 1)
    assert "the gradient is inf at step 4; the last good state is 00000003.pt" in errors[0]
    assert newest_state(tmp_path / "run")["step"] == 3


def test_only_the_newest_states_are_kept(data, init, program, tmp_path):
    assert program(*command(data, init, tmp_path / "run", steps=5, save_every=1, keep=3))[0] == 0
    assert [path.name for path in state_paths(tmp_path / "run")] == [f"0000000{i}.pt" for i in (3, 4, 5)]


# ---- several processes ----


def run_under_torchrun(count, arguments):
    """train.py in so many processes, of one thread each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*torchrun, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one_with_twice_the_batch(data, init, program, tmp_path, accumulate):
    """After 5 steps, to 1e-5; they share the same examples, times and noise out among them."""
    # at the paper's learning rate; a larger one also enlarges what AdamW makes of the rounding of tiny gradients
    one = command(data, init, tmp_path / "one", batch=4 * accumulate, steps=5, lr=1e-4, sampling_steps=2)
    two = command(data, init, tmp_path / "two", batch=2, accumulate=accumulate, steps=5, lr=1e-4, sampling_steps=2)
    assert program(*one)[0] == 0
    done = run_under_torchrun(2, two)
    assert done.returncode == 0, done.stderr
    ours, theirs = newest_state(tmp_path / "two"), newest_state(tmp_path / "one")
    for part in ("weights", "average"):
        for name, value in theirs[part].items():
            assert relative_error(ours[part][name], value) <= 1e-5, name
    assert done.stdout.count("18 pairs") == 1


# ---- export ----


def test_export(data, init, trained, program, tmp_path):
    """A folder and a file, averaged and raw, in half precision; all open again."""
    state = newest_state(trained)
    for raw in (False, True):
        wanted = state["weights" if raw else "average"]
        for name in ("folder", "file.safetensors"):
            path = tmp_path / f"{raw}-{name}"
            code, out, errors = program("export", f"--run={trained}", f"--out={path}", *["--raw"][:raw])
            assert (code, out, errors) == (0, [str(path)], [])
            tokenizer = None if path.is_dir() else init
            unet = load(path, tokenizer=tokenizer).unet.state_dict()
            assert all(torch.equal(unet[name], value.half().float()) for name, value in wanted.items())
    assert load(tmp_path / "False-folder").sampling.text_guidance == 5


def test_export_overwrites_nothing(trained, program, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.safetensors").write_text("mine")
    for path in (tmp_path / "mine", tmp_path / "mine.safetensors", trained):
        code, _, errors = program("export", f"--run={trained}", f"--out={path}")
        assert (code, errors) == (2, [f"train.py: {path} exists already; name another one, or remove it first"])
    assert (tmp_path / "mine.safetensors").read_text() == "mine"
    assert newest_state(trained)["step"] == 4


def test_export_of_nothing(program, tmp_path):
    code, _, errors = program("export", f"--run={tmp_path}", f"--out={tmp_path / 'out'}")
    assert (code, errors) == (2, [f"train.py: {tmp_path} holds no states of a training"])


# ---- small data sets, and a user's mistakes ----


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_pairs_are_enough(init, program, tmp_path, count):
    """There are none for validation then: the sheet shows what it was trained on."""
    data = write_pairs(tmp_path / "pairs", count)
    code, out, errors = program(*command(data, init, tmp_path / "run", steps=1))
    assert (code, errors) == (0, [])
    assert out[0].startswith(f"{len(EditDataset(data))} pairs")
    assert load(tmp_path / "run" / "model").unet.config.in_channels == 8
    assert (tmp_path / "run" / "samples.png").exists()


def resize(path, size):
    Image.open(path).resize(size).save(path)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("number", [0, 3])
def test_pictures_of_several_sizes(data, init, program, tmp_path, both, number):
    """Of one pair and another, or within a pair."""
    folder = tmp_path / "pairs"
    shutil.copytree(data, folder)
    for side in (0, 1) if both else (1,):
        resize(folder / f"{number:07d}" / f"{number}_{side}.jpg", (96, 64))
    code, _, errors = program(*command(folder, init, tmp_path / "out"))
    assert code == 2
    among = "the pictures of the data set differ in size; one size for all is needed"
    (error,) = errors
    assert error.endswith(among if both else f"the pictures of seed {number} differ in size")


def test_pictures_that_the_unet_cannot_halve(init, program, tmp_path):
    data = write_pairs(tmp_path / "pairs", 4, size=(64, 68))
    code, out, errors = program(*command(data, init, tmp_path / "out"))
    message = "the pictures are 64x68; this model needs sides that are multiples of 8 pixels: see --resolution"
    assert (code, out, errors) == (2, [], [f"train.py: {message}"])
    assert not (tmp_path / "out").exists()


def test_pictures_smaller_than_the_crop(data, init, program, tmp_path):
    code, out, errors = program(*command(data, init, tmp_path / "out", resolution=128))
    message = "the pictures are 64x64; crops of 128 pixels need such a side at least: see --resolution"
    assert (code, out, errors) == (2, [], [f"train.py: {message}"])


def test_a_damaged_pair_is_named(data, init, program, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(data, folder)
    (folder / "0000003" / "3_0.jpg").write_bytes(b"hello")
    code, _, errors = program(*command(folder, init, tmp_path / "out"))
    assert code == 2
    assert len(errors) == 1
    assert "3_0.jpg cannot be read as a picture" in errors[0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": None}, "--data"),
        ({"init": None}, "--init"),
        ({"out": None}, "--out"),
        ({"data": "nowhere"}, "nowhere holds no seeds.json; datagen.py images makes such a folder"),
        ({"data": "FOLDER"}, "FOLDER holds no seeds.json"),
        ({"init": "nowhere"}, "there are no weights at nowhere"),
        ({"init": "INPAINTING"}, "a Stable Diffusion inpainting checkpoint"),
        ({"out": "FILE"}, "FILE"),
        ({"out": "FILE/run"}, "FILE/run"),
        ({"lr": 0}, "--lr should be between 0 and 1, not 0.0"),
        ({"lr": -1e-4}, "--lr should be between 0 and 1, not -0.0001"),
        ({"lr": 1}, "--lr should be between 0 and 1, not 1.0"),
        ({"lr": "nan"}, "--lr should be between 0 and 1, not nan"),
        ({"lr": "fast"}, "argument --lr"),
        ({"ema": 1}, "--ema should be from 0 to below 1, not 1.0"),
        ({"ema": -0.1}, "--ema should be from 0 to below 1"),
        ({"ema": "nan"}, "--ema should be from 0 to below 1"),
        ({"steps": 0}, "--steps should be at least 1, not 0"),
        ({"batch": 0}, "--batch should be at least 1, not 0"),
        ({"threads": -1}, "--threads should be at least 1, not -1"),
        ({"total": 7}, "a step of 7 pairs cannot be divided by 3"),
        ({"total": 7, "accumulate": 2}, "--total 7 is not --batch times --accumulate times 1 processes"),
        ({"subset": 2.5}, "--subset should be a number of pairs, or a share above 0 and below 1, not 2.5"),
        ({"subset": 19}, "holds 18 pairs for this split, not 19"),
        ({"subset": 3, "overfit": 1}, "one of them is enough"),
        ({"clip": "nan"}, "--clip, --warmup and --workers should be at least 0"),
        ({"ema-device": "abacus"}, "no device abacus"),
        ({"sampling-steps": 0}, "--sampling-steps should be at least 1, not 0"),
        # what checkpoint.load would refuse to read in the end
        ({"sampling-steps": 1001}, "steps should be between 1 and 1000, not 1001"),
        ({"cfg-text": -1}, "text guidance should be between 0 and 100, not -1.0"),
        ({"cfg-text": "nan"}, "text guidance should be between 0 and 100, not nan"),
        ({"cfg-image": 1000}, "image guidance should be between 0 and 100, not 1000.0"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**8}, "--seed should be between 0 and 99999999, not 100000000"),
        ({"device": "abacus"}, "no device abacus"),
    ],
)
def test_mistakes(data, init, program, tmp_path, monkeypatch, changed, words):
    """One line, exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("hello")
    (tmp_path / "FOLDER").mkdir()
    save_folder(tiny_model(in_channels=9), tmp_path / "INPAINTING")
    values = {"data": data, "init": init, "out": "out"} | changed
    code, out, errors = program(*command(values.pop("data"), values.pop("init"), values.pop("out"), **values))
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("train.py: ")
    assert words in errors[0]
    assert out == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER", "INPAINTING"]
