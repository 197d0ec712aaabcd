"""A process of its own for every variant that is measured: its output, its time and its peak memory."""

import functools
import gc
import re
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.parts import ON_CUDA, PARTS, norms

SHORT = 0.5  # seconds; what is faster is repeated for so long, and averaged


def own_process():
    """A process that starts from nothing and keeps what it makes until its `with` block ends."""
    quiet = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=quiet)


@functools.cache
def prepared(title, variant, settings):
    """Make a variant's networks and inputs, once -> the function () -> output."""
    return torch.no_grad()(PARTS[title][2](variant, settings))


def first_output(title, variant, settings):
    """Make a variant and warm it up -> its output as float32 on the CPU; for a loaded model the weights' norms."""
    run = prepared(title, variant, settings)
    for _ in range(3 if variant in ON_CUDA else 1):  # CUDA graphs are recorded at the second call
        output = run()
    return output.float().cpu() if isinstance(output, torch.Tensor) else norms(output)


def timed(title, variant, settings):
    """(mean seconds of a call, peak bytes of the process or None). Calls are repeated for `SHORT`, but not loading."""
    run, cuda = prepared(title, variant, settings), settings.device == "cuda"
    synchronise = torch.cuda.synchronize if cuda else int
    gc.collect()
    forget_peak(cuda)
    synchronise()
    calls, start, elapsed = 0, time.perf_counter(), 0
    while not calls or (elapsed < SHORT and PARTS[title][0] != "load"):
        run()
        synchronise()
        calls, elapsed = calls + 1, time.perf_counter() - start
    return elapsed / calls, None if "graphs" in variant else peak(cuda)  # graphs hold their memory for good


def forget_peak(cuda):
    """Let the peak memory start anew from what is held now."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(cuda):
    """The most bytes held since `forget_peak` (not ru_maxrss, which never falls); None where Linux does not tell."""
    status = Path("/proc/self/status")
    if cuda or not status.exists():
        return torch.cuda.max_memory_allocated() if cuda else None
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
