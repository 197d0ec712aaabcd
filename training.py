"""The training loop of the networks that pretrain.py makes: AdamW, a moving average of the weights, logs, and resuming.

A step draws all its randomness from (seed, step), so a run that was stopped and resumed sees what an uninterrupted one
sees. What a run leaves in its folder: `log.jsonl`, one line every few seconds, and `state.pt`, from which it resumes.
"""

import copy
import json
import math
import os
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from threading import BrokenBarrierError, Thread

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from cli import UserError, atomic_write

WORKERS = 64  # processes of one training at most, so that each has a random stream of its own


@dataclass(frozen=True)
class Plan:
    """How a network is trained."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100  # steps in which the learning rate rises to `lr`
    decay: float = 0.33  # the share of all steps, at the end, in which it falls to almost zero
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0

    def rate(self, step):
        """The learning rate at a step, as a share of `lr`."""
        left = (self.steps - step) / max(1, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, max(left, 0.01))


def random_at(seed, step, worker=0):
    """A generator on the CPU for one step of a run: the same numbers, whether the run was interrupted or not."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * WORKERS + worker)


@contextmanager
def fast_training(device):
    """What makes training fast on a device: half precision, and on a CPU attention by its textbook form.

    bfloat16 is used on GPUs, and on CPUs that can multiply it. On CPUs torch's fused attention is slow backwards, and
    at the miniature's sizes the map is small enough to keep.
    """
    kind = torch.device(device).type
    half = kind == "cuda" or (kind == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    attention = textbook_attention() if kind == "cpu" else nullcontext()
    with torch.autocast(kind, torch.bfloat16, enabled=half), attention:
        yield


@contextmanager
def textbook_attention():
    """Let torch keep attention maps, in the inputs' own number format; left alone, it would go to float32 and back."""
    settings = torch.backends.cuda  # which hold for CPUs as well
    before = settings.fp16_bf16_reduction_math_sdp_allowed()
    settings.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        settings.allow_fp16_bf16_reduction_math_sdp(before)


def fit(network, loss_of, plan, folder, *, device="cpu", show=None, save_every=120):
    """Train `network` in place and return the moving average of its weights (a network of its own, in eval mode).

    loss_of(step, generator, batch) -> a scalar tensor, the mean over `batch` examples, computed with `network`.
    show(average, step) is called at each tenth of the way, to write sample pictures. folder: a Path, made if it is not
    there; if it holds a `state.pt`, training goes on from there. save_every: seconds. Raises UserError when the loss is
    no longer a number, or the state does not fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True
    )
    start, seconds, state = 0, 0.0, folder / "state.pt"
    if state.exists():
        start, seconds = resume(state, network, average, optimizer)
    network.train()

    log, losses = folder / "log.jsonl", []
    began = saved = logged = time.monotonic()
    with (
        Crew(network, loss_of, plan, start, device) as crew,
        tqdm(total=plan.steps, initial=start, desc=folder.name, unit="step", mininterval=5, leave=False) as bar,
    ):
        for step in range(start, plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * plan.rate(step)
            losses.append(crew.backward(step))
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            follow(average, network, min(plan.ema, (step + 1) / (step + 10)))
            bar.update()

            now, done = time.monotonic(), step + 1
            saving = now - saved > save_every or done == plan.steps
            if saving or now - logged > 5:  # no state is saved before its loss was looked at
                value = torch.stack(losses).mean().item()
                if not math.isfinite(value):
                    raise UserError(f"the loss of {folder.name} is {value} at step {done}; lower the learning rate")
                rate = len(losses) * plan.batch / (now - logged)
                noted = {"loss": round(value, 5), "per_s": round(rate, 1), "minutes": (seconds + now - began) / 60}
                with open(log, "a", encoding="utf-8") as file:
                    print(json.dumps({"step": done, **noted}), file=file)
                bar.set_postfix(loss=f"{value:.4f}")
                logged, losses = now, []
            if saving:
                parts = {"network": network.state_dict(), "average": average.state_dict()}
                parts |= {"optimizer": optimizer.state_dict(), "step": done, "seconds": seconds + now - began}
                with atomic_write(state) as beside:
                    torch.save(parts, beside)
                saved = now
            if show and done % max(1, plan.steps // 10) == 0:
                with torch.no_grad(), fast_training(device):
                    show(average, done)
    return average


class Crew:
    """Several processes that compute a step's gradients together, one a core; on a GPU, this process alone.

    Small networks gain little from threads, which wait for each other in every layer. Here each process takes a part of
    the batch on one thread, and they meet twice a step. The weights are in shared memory, so that all of them see what
    the optimizer does.
    """

    WAIT = 900  # seconds until a process gives the others up: longer than sample pictures take

    def __init__(self, network, loss_of, plan, start, device):
        """start: the first step; the rest as for `fit`."""
        self.network, self.loss_of, self.plan, self.start, self.device = network, loss_of, plan, start, device
        cores = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
        self.count = max(n for n in range(1, min(cores, WORKERS) + 1) if plan.batch % n == 0)
        self.threads, self.processes = cores, []

    def __enter__(self):
        """Start the other processes."""
        if self.count > 1:
            self.network.share_memory()
            context = get_context("fork")  # they inherit the data and the network as they are
            self.barrier = context.Barrier(self.count)
            self.losses = torch.zeros(self.count).share_memory_()
            torch.set_num_threads(1)
            for worker in range(1, self.count):
                gradients = [torch.zeros_like(weight).share_memory_() for weight in self.network.parameters()]
                process = context.Process(target=self.work, args=(worker, gradients), daemon=True)
                process.start()
                self.processes.append((process, gradients))
        return self

    def __exit__(self, *error):
        """Let the other processes go."""
        if self.processes:
            self.barrier.abort()
            for process, _ in self.processes:
                process.join(10)
            torch.set_num_threads(self.threads)

    def backward(self, step):
        """Put the gradients of the whole batch into the network; returns the loss."""
        if not self.processes:
            return self.part(step, 0)
        torch.set_num_threads(1)
        try:
            self.barrier.wait(self.WAIT)  # the weights are those of this step
            self.losses[0] = self.part(step, 0)
            self.barrier.wait(self.WAIT)  # all gradients are there
        except BrokenBarrierError as error:
            raise RuntimeError("a process that computes gradients has died; its traceback stands above") from error
        torch.set_num_threads(self.threads)  # the others wait until the optimizer is done
        own = [weight.grad for weight in self.network.parameters()]
        for _, gradients in self.processes:
            torch._foreach_add_(own, gradients)
        return self.losses.mean()

    def part(self, step, worker):
        """One process's part of a step: its share of the batch, and random numbers of its own."""
        with fast_training(self.device):
            loss = self.loss_of(step, random_at(self.plan.seed, step, worker), self.plan.batch // self.count)
        (loss / self.count).backward()
        return loss.detach()

    def work(self, worker, gradients):
        """What another process does until the last step, or until the first one leaves."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the first process
        Thread(target=leave_with_parent, daemon=True).start()
        weights = list(self.network.parameters())
        try:
            for step in range(self.start, self.plan.steps):
                self.barrier.wait(self.WAIT)
                self.losses[worker] = self.part(step, worker)
                for shared, weight in zip(gradients, weights, strict=True):
                    shared.copy_(weight.grad)
                    weight.grad = None
                self.barrier.wait(self.WAIT)
        except BrokenBarrierError:
            return
        except BaseException:
            self.barrier.abort()
            raise


def leave_with_parent():
    """End this process when the one that started it has ended, however that was."""
    parent_process().join()
    os._exit(1)


def resume(state, network, average, optimizer):
    """Put a saved state into a run; returns the step to go on from, and the seconds that the run took so far.

    Raises UserError if it is another network's.
    """
    try:
        parts = torch.load(state, map_location="cpu", weights_only=True)
        network.load_state_dict(parts["network"])
        average.load_state_dict(parts["average"])
        optimizer.load_state_dict(parts["optimizer"])
        return parts["step"], parts["seconds"]
    except Exception as error:  # torch.load meets damaged files with exceptions of every kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{state} is damaged, or of another run ({reason}); remove its folder to start anew") from error


class MovingAverage:
    """The moving average of some weights, kept where there is room for it."""

    def __init__(self, weights, device=None):
        """weights: a list of parameters."""
        self.weights = weights
        self.values = [weight.detach().to(device or weight.device, copy=True) for weight in weights]

    @torch.no_grad()
    def follow(self, decay):
        """average = decay * average + (1 - decay) * weights."""
        if self.values:
            torch._foreach_lerp_(self.values, [w.detach().to(v.device) for w, v in self.pairs()], 1 - decay)

    def pairs(self):
        """(weight, its average)."""
        return zip(self.weights, self.values, strict=True)

    @contextmanager
    def in_place(self):
        """The network has the average for its weights."""
        own = [weight.detach().to(value.device, copy=True) for weight, value in self.pairs()]
        self.put(self.values)
        try:
            yield
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, values):
        """Set the weights."""
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)


@torch.no_grad()
def follow(average, network, decay):
    """One step of the moving average: average = decay * average + (1 - decay) * network."""
    pairs = zip(average.parameters(), network.parameters(), strict=True)
    theirs, ours = zip(*pairs, strict=True)
    torch._foreach_lerp_(list(theirs), list(ours), 1 - decay)
