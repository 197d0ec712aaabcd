"""Speed and memory of our networks and of Prompt-to-Prompt, beside diffusers' or another way to do it.

    python -m bench --only unet,train --runs 3

The speed of machines drifts, so the variants of a part take turns (ours, theirs, ours, theirs, ...), on a CPU each in a
process of its own, and the RATIO within each round counts. All must give the same output before anything is timed.
"""

import re
import signal
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from cli import WHOLE, Parser, UserError, check_device, reported_as, run_program

import torch

from bench.parts import ON_CUDA, PARTS, first_output, timed, trace

TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # most that two outputs may differ, relatively
GROUPS = [group for group, *_ in PARTS.values()]
FAILURES = (BrokenExecutor, torch.OutOfMemoryError, ImportError)  # the first: the system has ended a process
ADVICE = "failed; a smaller --size needs less memory; pip install -r requirements-dev.txt, and openvino for that part"


def parse(arguments=None):
    """The command line. Raises UserError."""
    parser = Parser(prog="bench", description="Compare speed and memory; a Markdown table goes to stdout.")
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--dtype", choices=list(TOLERANCE), default="float32", help="number format of the networks (default: float32)")
    add("--size", type=int, choices=range(64, 2049, 64), default=512, metavar="N", help="multiple of 64 (default: 512)")
    add("--runs", type=WHOLE, default=5, metavar="N", help="rounds (default: 5)")
    add("--only", default=",".join(GROUPS[:-3]), help=f"some of {','.join(GROUPS)} (default: the first four)")
    add("--trace", type=Path, metavar="FILE.json", help="only write a trace of a UNet step, for ui.perfetto.dev")
    add("--small", action="store_true", help="tiny networks, to try this program; their times mean nothing")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(GROUPS):
        raise UserError(f"--only knows {', '.join(GROUPS)}, not {min(unknown)!r}")
    check_device(options.device)
    options.to = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    return options


def main(arguments=None):
    """Print what is measured where, then the table."""
    options = parse(arguments)
    if options.trace:
        trace(options)
        print(options.trace)
        return
    cpu, threads = Path("/proc/cpuinfo"), f"threads: {torch.get_num_threads()}"
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    device = ["cuda", torch.cuda.get_device_name()] if options.device == "cuda" else ["cpu", *names[:1], threads]
    with reported_as(ADVICE, FAILURES):
        versions = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "accelerate")]
        print("- command: python -m bench", *(sys.argv[1:] if arguments is None else arguments))
        print("- machine:", ", ".join([*device, *versions, time.strftime("%Y-%m-%d")]))
        print("\n| | time | ratio | its range | peak memory | difference |", "|---" * 6 + "|", sep="\n", flush=True)
        for title, (group, *_) in PARTS.items():
            if group in options.only:
                print(*measure(title, options), sep="\n", flush=True)


def measure(title, options):
    """Measure one part: rows of the table. Raises UserError if the outputs differ."""
    variants = [one for one in PARTS[title][1] if options.device == "cuda" or one not in ON_CUDA]
    processes, outputs, rows = {}, {}, []
    with ExitStack() as stack:
        for variant in variants:
            print(f"bench: {title}, {variant}", file=sys.stderr, flush=True)
            ctrl_c = signal.signal, (signal.SIGINT, signal.SIG_DFL)  # ends a process without a word
            if options.device == "cpu" or not processes:  # on a GPU one for all, since it takes long to start
                process = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), *ctrl_c))
            processes[variant] = process
            outputs[variant] = processes[variant].submit(first_output, title, variant, options).result()
        base = outputs[variants[-1]]
        errors = {variant: ((output - base).norm() / base.norm()).item() for variant, output in outputs.items()}
        for variant, error in errors.items():
            if not error <= TOLERANCE[options.dtype]:
                raise UserError(f"{title}, {variant}: the output differs by {error:.1e}, so that times mean nothing")
        rounds = []  # of {variant: (seconds, peak bytes)}
        for _ in range(options.runs):
            rounds.append({one: processes[one].submit(timed, title, one, options).result() for one in processes})
    for variant, error in errors.items():
        times, peaks = zip(*(measured[variant] for measured in rounds), strict=True)
        ratios = [measured[variant][0] / measured[variants[-1]][0] for measured in rounds]
        ratio = f"**{median(ratios):.3f}** | {min(ratios):.3f} to {max(ratios):.3f}"
        memory = f"{max(peaks) / 1e9:.2f} GB" if max(peaks) else "unknown"
        rows.append(f"| {title}: {variant} | {median(times):.3g} s | {ratio} | {memory} | {error:.1e} |")
    return rows


if __name__ == "__main__":
    sys.argv[0] = "bench"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the processes end, too
    run_program(main)
