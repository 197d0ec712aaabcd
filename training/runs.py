"""What a training run needs around its loop: EMA, processes, signals, states to resume from, metrics and their plot."""

import json
import math
import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from cli import UserError, append_whole, atomic_write, own_device, reported_as

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

from images import save_png

LOG_EVERY = 5.0  # seconds between two lines of metrics.jsonl
PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # as torchrun sets them


@torch.no_grad()
def update_ema(ema, weights, decay):
    """ema = decay * ema + (1 - decay) * weights; the two lists may lie on different devices."""
    torch._foreach_lerp_(ema, [weight.to(value.device) for weight, value in zip(weights, ema, strict=True)], 1 - decay)


@torch.no_grad()
def copy_into(weights, values):
    """Set weights."""
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


@contextmanager
def averaged(weights, ema):
    """Within it, the weights are their EMA."""
    own = [weight.detach().to(value.device, copy=True) for weight, value in zip(weights, ema, strict=True)]
    copy_into(weights, ema)
    try:
        yield
    finally:
        copy_into(weights, own)


# ---- several processes, and being told to stop ----


def join(device):
    """Join the other processes of torchrun, if there are any; returns the device of this one."""
    device = own_device(device)
    if device.startswith("cuda"):  # the same bits every time, as on CPUs: a resumed run equals an uninterrupted one
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.cuda.set_device(device)
    if PROCESSES > 1 and not dist.is_initialized():  # the others wait while the first one evaluates
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    return device


def barrier():
    """Wait until all processes are here."""
    if PROCESSES > 1:
        dist.barrier()


def agree(value, norm, stop):
    """(mean loss of all processes, norm of the gradient, has any been told to stop?), the same in all of them."""
    if PROCESSES == 1:
        return value.item(), norm.item(), stop
    both = torch.stack([value.float(), torch.tensor(float(stop), device=value.device)])
    dist.all_reduce(both)
    return both[0].item() / PROCESSES, norm.item(), both[1].item() > 0


@contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM end the training after the current step: the list of them so far, to be looked at.

    A second signal gets Python's default handling.
    """
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- states and metrics ----


def state_paths(out):
    """The states of a run, oldest first."""
    return sorted((out / "states").glob("[0-9]*.pt"))


def save_state(out, step, parts, keep):
    """Write OUT/states/STEP.pt, whole or not at all, and remove all but the `keep` newest. Raises UserError."""
    path = out / "states" / f"{step:08d}.pt"
    full = reported_as(f"cannot write {path}; is the disk full?", RuntimeError)  # torch's own writer raises it
    with full, atomic_write(path) as beside:
        torch.save({"step": step, **parts}, beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())  # older states are removed only when this one is on the disk
    paths = state_paths(out)
    place = paths.index(path)
    for old in [*paths[: max(0, place + 1 - keep)], *paths[place + 1 :], *path.parent.glob(".*.tmp")]:
        old.unlink()  # the later ones are damaged, or the run would have resumed from them


def newest_state(out):
    """What the newest whole state holds, or None where there is none. Raises UserError if all are damaged."""
    paths = state_paths(out)
    for path in reversed(paths):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state["step"], int):
                return state
        except Exception as error:  # torch.load meets damaged files with exceptions of every kind
            print(f"{path} is damaged and skipped ({' '.join(str(error).split())[:100] or type(error).__name__})")
    if paths:
        raise UserError(f"all states in {out / 'states'} are damaged; remove that folder to start anew")
    return None


def resume(out, weights, ema, optimizer, scaler):
    """Put the newest state into a run; returns the step to continue with and the seconds so far. Raises UserError."""
    state = newest_state(out)
    step = state["step"] if state else 0
    if PROCESSES > 1:
        steps = torch.tensor([step, -step], device=next(iter(weights.values())).device)
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        if steps[0] != -steps[1]:
            raise UserError("the processes found different states; they need to share the folder of the run")
    if not state:
        return 0, 0.0
    with reported_as(f"the state in {out} is of another network; use another folder"):
        copy_into(weights.values(), [state["weights"][name] for name in weights])
        copy_into(ema, [state["ema"][name] for name in weights])
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
    return step, state["seconds"]


class Log:
    """A bar, and metrics.jsonl with a line now and then; in all processes but the first, nothing."""

    def __init__(self, out, steps, start, seconds, total):
        """start: the step and `seconds` the time so far of a resumed run; total: examples a step."""
        self.path, self.total = out / "metrics.jsonl", total
        self.losses, self.written, self.began = [], time.monotonic(), time.monotonic() - seconds
        self.bar = tqdm(total=steps, initial=start, desc=out.name, unit="step", mininterval=1, disable=RANK > 0)
        if RANK == 0 and self.path.exists():  # a resumed run writes the lines after its first step again
            kept = [line for line in read_metrics(self.path) if line["step"] <= start]
            with atomic_write(self.path) as beside:
                beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    @property
    def seconds(self):
        """What the run took so far."""
        return time.monotonic() - self.began

    def step(self, step, loss):
        """A step is done, and this was its loss."""
        self.losses.append(loss)
        self.bar.update()
        if time.monotonic() - self.written > LOG_EVERY:
            self.write(step)

    def write(self, step, **values):
        """Write a line: the mean loss since the last one, examples a second, memory, and `values`."""
        if RANK > 0:
            return
        line, now = {"step": step, "minutes": round(self.seconds / 60, 3)}, time.monotonic()
        if self.losses:
            line["loss"] = round(sum(self.losses) / len(self.losses), 6)
            line["examples_per_s"] = round(len(self.losses) * self.total / (now - self.written), 2)
            self.bar.set_postfix(loss=line["loss"])
        line |= {"memory_gb": round(memory() / 1e9, 2), **values}
        append_whole(self.path, (json.dumps(line) + "\n").encode())
        self.losses, self.written = [], now

    @contextmanager
    def paused(self):
        """What is done within it does not count in the examples a second."""
        start = time.monotonic()
        yield
        self.written += time.monotonic() - start

    def close(self):
        """End the bar, so that what is printed next has its own line."""
        self.bar.close()


def read_metrics(path):
    """The whole lines of a metrics.jsonl. Raises UserError."""
    with reported_as(f"{path} cannot be read; remove it, and the run resumes without it"):
        text = path.read_text(encoding="utf-8")
        lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())  # the last may be torn
        return [{**line, "step": int(line["step"])} for line in lines]


def memory():
    """Bytes at most so far: what torch allocated on a GPU, else what this process holds."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0


def draw_losses(path, image_path):
    """Plot the losses of a metrics.jsonl over the steps: of training (blue), of validation (orange)."""
    metrics, curves = read_metrics(path), {}
    for name in ("loss", "validation"):
        curves[name] = [(m["step"], m[name]) for m in metrics if math.isfinite(m.get(name, math.nan))]
    steps, values = zip(*(curves["loss"] + curves["validation"] or [(1, 0.0)]), strict=True)
    low, high = min(values), max(values)
    image = Image.new("RGB", (900, 420), "white")
    draw = ImageDraw.Draw(image)

    def place(step, y):
        return 60 + 820 * step / max(steps), 380 - 340 * (y - low) / (high - low or 1)

    for i in range(5):
        y, step = low + (high - low) * i / 4, round(max(steps) * i / 4)
        draw.line([place(0, y), place(max(steps), y)], fill="#e4e4e4")
        draw.text((52, place(0, y)[1]), f"{y:.3f}", fill="black", anchor="rm")
        draw.text((place(step, low)[0], 388), f"{step:,}", fill="black", anchor="ma")
    for number, (name, curve) in enumerate(curves.items()):
        colour = ("#1f5fae", "#c2571a")[number]
        draw.text((70 + 100 * number, 12), name if curve else "", fill=colour)
        draw.line([place(*point) for point in curve], fill=colour, width=2)
    save_png(image, image_path)
