"""What a training run needs around its loop: EMA, processes, signals, states to resume from, metrics."""

import json
import math
import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from cli import UserError, atomic_write, own_device, reported_as

import numpy as np
import torch
import torch.distributed as dist

from training.plot import Curve, Panel, plot

LOG_EVERY = 5.0  # seconds between two lines of metrics.jsonl, after those of the first steps
DRAW_EVERY = 60.0  # seconds between two drawings of loss.png, which takes one
FIRST_STEPS = 20
PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # as torchrun sets them


@torch.no_grad()
def update_ema(ema, weights, decay):
    """ema = decay * ema + (1 - decay) * weights: each {name: tensor}, with the same names, maybe on two devices."""
    now = [weights[name].to(value.device) for name, value in ema.items()]
    torch._foreach_lerp_(list(ema.values()), now, 1 - decay)


@torch.no_grad()
def swap(weights, ema):
    """Exchange the weights with their average; a second call changes them back."""
    for name, weight in weights.items():
        own = weight.to(ema[name].device, copy=True)
        weight.copy_(ema[name])
        ema[name].copy_(own)


@contextmanager
def averaged(weights, ema):
    """Within it, the weights are their average."""
    swap(weights, ema)
    yield
    swap(weights, ema)


def join(device):
    """Join the other processes of torchrun, if there are any; returns the device of this one."""
    device = own_device(device)
    if device.startswith("cuda"):  # the same bits every time, as on CPUs: a resumed run equals an uninterrupted one
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.cuda.set_device(torch.device(device).index or 0)  # "cuda" alone has no number, and torch wants one
    if PROCESSES > 1 and not dist.is_initialized():  # the others wait while the first one evaluates
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    return device


def barrier():
    """Wait until all processes are here."""
    if PROCESSES > 1:
        dist.barrier()


def mean_of_processes(*numbers):
    """The mean over all processes of each of these numbers."""
    if PROCESSES == 1:
        return numbers
    means = torch.tensor(numbers, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(means)
    return (means / PROCESSES).tolist()


@contextmanager
def stop_signals():
    """Within it, the first Ctrl-C and SIGTERM only add their number to the list that it gives, to be looked at."""
    received = []

    def receive(number, frame):
        if RANK == 0:  # not by print, which a signal may interrupt
            os.write(2, b"\nfinishing this step, then saving; once more to stop now\n")
        received.append(number)
        signal.signal(number, usual[number])

    usual = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def state_paths(out):
    """The states of a run, oldest first."""
    return sorted((out / "states").glob("[0-9]*.pt"))


def save_state(out, keep, step, seconds, weights, ema, optimizer, scaler):
    """Write OUT/states/STEP.pt, whole or not at all, and remove all but the `keep` newest. Raises UserError."""
    state = {"step": step, "seconds": seconds, "weights": weights, "ema": ema}
    state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    path = out / "states" / f"{step:08d}.pt"
    full = reported_as(f"cannot write {path}; is the disk full?", RuntimeError)  # torch's own writer raises it
    with full, atomic_write(path) as beside:
        torch.save(state, beside)
        with open(beside, "rb+") as file:  # Windows writes nothing out for who may only read
            os.fsync(file.fileno())  # older states are removed only when this one is on the disk
    paths = state_paths(out)
    kept = [other for other in paths if other <= path][-keep:]  # a later one is damaged, or the run had begun there
    for old in {*paths, *path.parent.glob(".*.tmp")} - {*kept}:
        old.unlink()


def newest_state(out):
    """What the newest whole state holds, or None where there is none. Raises UserError if all are damaged."""
    paths = state_paths(out)
    for path in reversed(paths):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # torch.load meets damaged files with exceptions of every kind
            print(f"{path} is damaged and skipped")
    if paths:
        raise UserError(f"all states in {out / 'states'} are damaged; remove that folder to start anew")
    return None


@torch.no_grad()
def resume(out, weights, ema, optimizer, scaler):
    """Put the newest state into a run; returns the steps that are done and the seconds so far. Raises UserError."""
    state = newest_state(out)
    step, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
    if RANK == 0:
        print(f"{out}: from step {step}")
    if mean_of_processes(step)[0] != step:
        raise UserError("the processes found different states; they need to share the folder of the run")
    if state:
        with reported_as(f"the state in {out} is of another network; use another folder"):
            for name in weights:
                weights[name].copy_(state["weights"][name])
                ema[name].copy_(state["ema"][name])
            optimizer.load_state_dict(state["optimizer"])
            if scaler.is_enabled():
                scaler.load_state_dict(state["scaler"])
    return step, seconds


class Log:
    """metrics.jsonl, a line every few seconds, and loss.png, its plot."""

    def __init__(self, out, step, seconds):
        """step, seconds: how far a resumed run is. Lines of later steps are dropped, for they will come again."""
        self.path, self.losses = out / "metrics.jsonl", []  # of the steps since the last line
        self.began, self.written, self.drawn = time.monotonic() - seconds, time.monotonic(), -math.inf
        lines = read_metrics(self.path) if self.path.exists() else []
        self.lines = [line for line in lines if line["step"] <= step]

    def seconds(self):
        """What the run took so far."""
        return time.monotonic() - self.began

    def is_due(self, step):
        """Is it time for a line?"""
        return step <= FIRST_STEPS or time.monotonic() - self.written > LOG_EVERY

    def line(self, step, total):
        """The values of a line: the mean loss since the last one, examples a second (`total` a step), memory."""
        return {
            "step": step,
            "minutes": round(self.seconds() / 60, 3),
            "loss": round(sum(self.losses) / len(self.losses), 6),
            "examples_per_s": round(len(self.losses) * total / (time.monotonic() - self.written), 2),
            "memory_gb": round((torch.cuda.max_memory_allocated() or peak_memory()) / 1e9, 2),
        }

    def write(self, line):
        """Add a line to the file; draw the plot anew with a validation loss, and otherwise once a minute."""
        self.lines.append(line)
        with atomic_write(self.path) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        if "validation" in line or time.monotonic() - self.drawn > DRAW_EVERY:
            draw_losses(self.lines, self.path.with_name("loss.png"))
            self.drawn = time.monotonic()
        self.losses, self.written = [], time.monotonic()


def draw_losses(lines, path):
    """Plot the losses of metrics over the steps, on a log scale: of training (blue; dots as logged), of validation."""
    loss, validation = (  # a logarithm needs numbers above 0
        np.array([(line["step"], line[name]) for line in lines if 0 < line.get(name, 0) < math.inf]).reshape(-1, 2)
        for name in ("loss", "validation")
    )
    dots = Curve("", loss, joined=False, radius=2 if len(loss) < 1000 else 1, colour="#9cbce4")
    mean = Curve("loss", smooth(loss), radius=0, colour="#1f5fae")
    shown = [dots, mean, Curve("validation", validation, colour="#c2571a")]
    plot([Panel(shown, "step", "loss, on a log scale", log=True)], path)


def smooth(curve):
    """The means of each point's neighbours in a curve of steps and losses [n, 2], up to n / 40 on each side.

    As many before a point as after it: otherwise the mean would lag behind a falling loss. The ends, which have fewer,
    are left out where n is large. A logged loss is the mean of the steps since the one before, and weighs as many.
    """
    if not len(curve):
        return curve
    weights, index = np.diff(curve[:, 0], prepend=0), np.arange(len(curve))
    sums = np.pad(np.cumsum([weights * curve[:, 1], weights], axis=1), ((0, 0), (1, 0)))
    near = np.minimum(np.minimum(index, index[::-1]), len(curve) // 40)
    totals, counts = sums[:, index + near + 1] - sums[:, index - near]
    end = len(curve) // 100
    return np.stack([curve[:, 0], totals / counts], axis=1)[end : len(curve) - end]


def read_metrics(path):
    """The lines of a metrics.jsonl, a dict each. Raises UserError."""
    with reported_as(f"{path} cannot be read; remove it, and the run resumes without it"):
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [{"step": line["step"], **line} for line in lines]


def peak_memory():
    """The most bytes that this process held so far; 0 where Linux does not tell."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0
