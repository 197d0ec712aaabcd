"""Speed and memory of our networks, loaders and Prompt-to-Prompt beside diffusers' and other ways, with equal weights.

    python -m bench --only unet,load --runs 3

Machines are shared and their speed drifts, so the variants of a part take turns (ours, theirs, ours, theirs, ...), and
the RATIO within each round counts, not the seconds. Each variant runs in a process of its own, so that its peak memory
is its own. All must give the same output before anything is timed. One Markdown table goes to stdout.
"""

import datetime
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from cli import WHOLE, Parser, UserError, check_device, run_program

import torch

from bench.parts import ON_CUDA, PARTS, Settings, write_model
from bench.process import first_output, own_process, timed

TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # most that two outputs may differ, relatively
GROUPS = list(dict.fromkeys(group for group, _, _ in PARTS.values()))
QUIET = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
LEGEND = """
Times and ratios are medians over the rounds. A ratio is the time divided by that of the part's last line in the same
round; its range is from the smallest to the largest. Peak memory is that of the process, libraries (about 0.4 GB) and
memory-mapped files included; on CUDA what PyTorch allocates. The difference is the relative one to the last line's
output, or to the weights that it loaded."""


def parse(arguments=None):
    """The command line. Raises UserError."""
    parser = Parser(prog="bench", description="Compare speed and memory; a Markdown table goes to stdout.")
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--dtype", choices=list(TOLERANCE), default="float32", help="number format of the networks (default: float32)")
    add("--size", type=int, default=512, metavar="PIXELS", help="the image's side, a multiple of 64 (default: 512)")
    add("--runs", type=WHOLE, default=5, metavar="N", help="rounds (default: 5)")
    add("--only", default=",".join(GROUPS[:-1]), help=f"some of {','.join(GROUPS)} (default: all but the last)")
    add("--small", action="store_true", help="tiny networks, to try this program; their times mean nothing")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := [group for group in options.only if group not in GROUPS]:
        raise UserError(f"--only knows {', '.join(GROUPS)}, not {unknown[0]!r}")
    if options.size < 64 or options.size % 64:
        raise UserError(f"--size should be a multiple of 64, not {options.size}")
    if lacking := [name for name in ("diffusers", "transformers") if not find_spec(name)]:
        raise UserError(f"{' and '.join(lacking)} must be installed: pip install -r requirements-dev.txt")
    check_device(options.device)
    return options


def main(arguments=None):
    """Measure what was asked for, then print it."""
    options = parse(arguments)
    os.environ.update(QUIET)  # for the processes that use diffusers
    with tempfile.TemporaryDirectory(prefix="ip2p-bench-") as folder:
        settings = Settings(options.device, options.dtype, options.size, options.small, folder)
        try:
            if "load" in options.only:
                say("writing the model to load")
                with own_process() as process:
                    process.submit(write_model, settings).result()
            measured = [measure(title, settings, options.runs) for title in PARTS if PARTS[title][0] in options.only]
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:  # the first also where the system ends a process
            raise UserError("there is not enough memory; try a smaller --size, or fewer parts with --only") from error
    lines = heading(settings, sys.argv[1:] if arguments is None else arguments)
    lines += ["", "| | time | ratio | its range | peak memory | difference |", "|---" * 6 + "|"]
    print("\n".join([*lines, *(line for rows in measured for line in rows), LEGEND]))


def measure(title, settings, runs):
    """Measure one part: lines of the table. Raises UserError if the outputs differ.

    A variant for CUDA alone that fails (it may want another GPU or number format) is left out, with a line on stderr.
    """
    variants = [one for one in PARTS[title][1] if settings.device == "cuda" or one not in ON_CUDA]
    outputs = {}
    with ExitStack() as stack:
        processes = {variant: stack.enter_context(own_process()) for variant in variants}
        for variant in variants:
            say(f"{title}, {variant}: first call")
            try:
                outputs[variant] = processes[variant].submit(first_output, title, variant, settings).result()
            except Exception as error:
                if variant not in ON_CUDA or isinstance(error, BrokenProcessPool):
                    raise
                say(f"{title}, {variant}: left out, since {(str(error).splitlines() or [repr(error)])[0]}")
        errors = {variant: relative_error(output, outputs[variants[-1]]) for variant, output in outputs.items()}
        for variant, error in errors.items():
            if not error <= TOLERANCE[settings.dtype]:
                raise UserError(f"{title}, {variant}: the output differs by {error:.1e}, so that times mean nothing")
        turns = {variant: [] for variant in outputs}
        for _ in range(runs):
            for variant in outputs:
                turns[variant].append(processes[variant].submit(timed, title, variant, settings).result())
                say(f"{title}, {variant}: {turns[variant][-1][0]:.3g} s")
    return table_rows(title, turns, errors)


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs| of two tensors; NaN where one holds NaN or Inf."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def table_rows(title, turns, errors):
    """turns {variant: [(seconds, peak bytes or None)]}, errors {variant: relative difference} -> lines in Markdown."""
    lines, base = [], [seconds for seconds, _ in list(turns.values())[-1]]
    for variant, measured in turns.items():
        times, peaks = zip(*measured, strict=True)
        ratios = [ours / theirs for ours, theirs in zip(times, base, strict=True)]
        ratio = f"**{median(ratios):.3f}** | {min(ratios):.3f} to {max(ratios):.3f}"
        memory = "unknown" if None in peaks else f"{max(peaks) / 1e9:.2f} GB"
        lines.append(f"| {title}: {variant} | {median(times):.3g} s | {ratio} | {memory} | {errors[variant]:.1e} |")
    return lines


def heading(settings, arguments):
    """What was measured, where and when: lines."""
    names = [name for name in ("torch", "diffusers", "transformers", "accelerate", "triton") if find_spec(name)]
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
    machine = f"cpu, {found[1] if found else platform.machine()}, threads: {torch.get_num_threads()}"
    networks = "tiny networks" if settings.small else "networks of Stable Diffusion 1.5's size"
    return [
        f"- command: `{shlex.join(['python', '-m', 'bench', *arguments])}`",
        f"- device: {f'cuda, {torch.cuda.get_device_name()}' if settings.device == 'cuda' else machine}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in names)}",
        f"- measured: {networks}, {settings.size}x{settings.size} pixels, {settings.dtype}, random weights",
        f"- date: {datetime.date.today()}",
    ]


def say(message):
    """Progress, on stderr: stdout is for the table."""
    print(f"bench: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.argv[0] = "bench"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and temporary files are removed
    run_program(main)
