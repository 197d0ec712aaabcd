"""train.py --plan: the memory of a training step, computed, beside what a step really takes."""

import gc

import pytest
import torch
from dataset_of_true_pairs import write_pairs
from random_model import random_model
from torch.profiler import ProfilerActivity, profile

import train
from editor_training import Training
from formats.checkpoint import save_folder
from plan import PARTS, plan
from presets import parse
from ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A small Stable Diffusion, and pairs to train it with."""
    folder = tmp_path_factory.mktemp("plan")
    save_folder(random_model(in_channels=4), folder / "sd")
    write_pairs(folder / "pairs", 20)
    return folder


def options_for(paths, flags, device="cpu"):
    """The settings of a training with these flags."""
    given = ["--init", paths / "sd", "--data", paths / "pairs", "--out", paths / "run", "--device", device]
    given += ["--resolution", 64, "--largest", 64, "--steps", 3, "--batch", 16, "--workers", 0]
    total = [] if "--total" in flags else ["--total", 16]
    return parse([str(word) for word in [*given, *total, *flags.split()]])


def most_bytes(work):
    """The most bytes that torch's allocator on the CPU holds in `work`, beyond those it holds before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        work()
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    "flags",
    [
        "--dtype float32",
        "--dtype bfloat16",
        "--dtype float32 --checkpointing --cache-latents",
        "--dtype bfloat16 --checkpointing --cache-latents",
        "--dtype float32 --trainable lora",
        "--dtype float32 --trainable attention",
        "--dtype float32 --total 32",
    ],
)
def test_a_step_takes_what_was_planned(paths, flags):
    """The kernels' own buffers are all that the plan does not know. On a GPU the bar is 15 %."""
    options = options_for(paths, flags)
    parts, place = plan(options)
    assert place == "the way back"
    run = Training(options, Ranks("cpu"))
    run.read_data()
    run.backward(0)
    run.update(0)
    networks = run.unet, run.model.vae, run.model.text_encoder
    held = [weight for network in networks for weight in network.parameters()] + run.average.values
    held += [value for state in run.optimizer.state.values() for value in state.values()]

    def step():
        run.backward(1)
        run.update(1)

    measured = sum(tensor.nbytes for tensor in held) + most_bytes(step)
    assert parts["at most"] == pytest.approx(measured, rel=0.01)


def test_the_parts_are_those_of_the_networks(paths):
    """Whatever is trained has a gradient, two moments and an average of its size; all else is frozen."""
    full, lora = (plan(options_for(paths, f"--trainable {kind}"))[0] for kind in ("full", "lora"))
    model = random_model()
    unet, others = (
        sum(weight.nbytes for network in networks for weight in network.parameters())
        for networks in ([model.unet], [model.vae, model.text_encoder])
    )
    assert (full["trained weights"], full["frozen weights"]) == (unet, others)
    assert lora["trained weights"] < unet / 5
    assert lora["frozen weights"] == unet + others
    for parts in (full, lora):
        size = parts["trained weights"]
        assert (parts["gradients"], parts["optimizer"], parts["moving average"]) == (size, 2 * size, size)
        assert parts["at most"] == sum(parts[name] for name in PARTS[:-1])


def test_an_average_kept_elsewhere_is_not_counted(paths):
    here, elsewhere = (plan(options_for(paths, flags))[0] for flags in ("", "--plan --device cuda --ema-device cpu"))
    there = plan(options_for(paths, "--plan --device cuda"))[0]
    assert there["at most"] - elsewhere["at most"] == there["moving average"] == here["moving average"]


def test_what_saves_memory_is_seen_to(paths):
    """Half precision, checkpointing and small batches take less; a GPU's float32 norms take more than a CPU's."""
    flags = "--dtype float32", "--dtype bfloat16", "--dtype bfloat16 --checkpointing"
    many, fewer, least = (plan(options_for(paths, flag + " --cache-latents"))[0]["activations"] for flag in flags)
    assert many > 1.5 * fewer > 2 * least
    on_gpu = plan(options_for(paths, "--dtype bfloat16 --cache-latents --plan", device="cuda"))[0]["activations"]
    assert fewer < on_gpu < many


def test_the_table_needs_neither_data_nor_weights(capsys):
    """Stable Diffusion 1.5's size, on a GPU that is not there; 860 million weights take no memory."""
    train.main(["--plan", "--preset", "24gb", "--device", "cuda"])
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert "Stable Diffusion 1.5" in first
    assert "16 pairs" in first
    values = {line[:24].strip(): float(line[24:32]) for line in lines}
    assert list(values) == list(PARTS)
    assert values["trained weights"] == 3.44
    assert 15 < values["at most"] < 24


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["--dtype float32", "--dtype bfloat16", "--dtype bfloat16 --checkpointing"])
def test_a_step_on_a_gpu_takes_what_was_planned(paths, flags):
    options = options_for(paths, flags + " --no-compile --batch 128 --total 128 --cache-latents", "cuda")
    parts, _ = plan(options)
    workspace = torch.cuda.memory_allocated()
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    workspace = torch.cuda.memory_allocated() - workspace  # cuBLAS has its own from torch's allocator
    run = Training(options, Ranks("cuda"))
    run.read_data()
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        run.backward(step)
        run.update(step)
    assert parts["at most"] == pytest.approx(torch.cuda.max_memory_allocated() - workspace, rel=0.15)
