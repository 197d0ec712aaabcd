"""Speed and memory of our networks and loaders against those of diffusers and transformers, with equal weights.

And of a Prompt-to-Prompt pair against the same with attention maps held in memory, as the papers' code has it; and of
an edit's step from its textbook form to its fast form, trick by trick (ladder.py).

    python -m bench --runs 3 > bench/cpu.md
    python -m bench --only ladder > bench/ladder.md

Machines are shared and their speed drifts, so the two sides take turns (ours, theirs, ours, theirs, ...) and the RATIO
of each pair counts, not the seconds. Each side runs in a process of its own, so that its peak memory is its own. The
weights are random, which changes no time; both sides must give the same output before anything is timed.
"""

# Nothing heavy is imported before the arguments are read, so that --help and mistakes are answered at once.
import argparse
import datetime
import importlib.util
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

from cli import UserError, run_program

from bench import ladder as bench_ladder
from bench.sides import (
    MAPS,
    NETWORKS,
    OURS,
    PAIRS,
    THEIRS,
    TOLERANCE,
    TRAIN,
    Settings,
    first_output,
    gigabytes,
    load,
    own_process,
    relative_error,
    say,
    timed,
    write_models,
)

WHAT = {part: what for part, (what, _, _) in NETWORKS.items()}
WHAT |= {TRAIN: "training step without its optimizer, batch 1, half the size", **PAIRS}
LADDER = "ladder"
LOADS = {"file": "load one file", "folder": "load a folder"}
LEGEND = """\
Times and ratios are medians; a ratio is ours through theirs in one pair of runs, so below 1 we are faster.
Peak memory is what the process holds at most, the programs (0.3 GB) and memory-mapped files included; for
networks on CUDA it is what PyTorch allocates there. The difference is the relative one between the outputs,
or between the weights that were loaded.""".splitlines()


class Row(NamedTuple):
    """One line of the table."""

    what: str
    runs: list  # of pairs (ours, theirs), each (seconds, peak bytes or None)
    error: float  # relative difference of the outputs, or of the weights that were loaded


def parse(arguments=None):
    """The command line: (options, the parts to measure)."""
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Compare speed and memory with diffusers; a Markdown table goes to stdout.",
        epilog="Loading writes a 4.3 GB model twice, as a file and as a folder, to a temporary folder below TMPDIR.",
    )
    parser.error = lambda message: parser.exit(2, f"bench.py: {message} (--help shows what is possible)\n")
    usual = [*NETWORKS, TRAIN, *PAIRS, "load"]
    names = [*usual, LADDER]
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--dtype", choices=list(TOLERANCE), default="float32", help="number format of the networks (default: float32)")
    add("--size", type=int, default=512, metavar="PIXELS", help="the picture's side, a multiple of 64 (default: 512)")
    add("--runs", type=int, default=5, metavar="N", help="how often each side has its turn (default: 5)")
    only = f"some of {','.join(names)} (default: all but {LADDER}, which takes long)"
    add("--only", default=",".join(usual), metavar="LIST", help=only)
    add("--small", action="store_true", help="tiny networks, to try this program; their times mean nothing")
    ladder = parser.add_argument_group(f"with --only {LADDER}")
    add = ladder.add_argument
    add("--rungs", metavar="LIST", help=f"some of {','.join(bench_ladder.LABELS)} (default: all that the device has)")
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in names]:
        raise UserError(f"--only knows {', '.join(names)}, not {unknown[0]!r}")
    if options.size < 64 or options.size % 64:
        raise UserError(f"--size should be a multiple of 64, not {options.size}")
    if options.runs < 1:
        raise UserError(f"--runs should be at least 1, not {options.runs}")
    if LADDER not in parts and options.rungs is not None:
        raise UserError(f"--rungs is about the ladder: add --only {LADDER}")
    listed = None if options.rungs is None else options.rungs.split(",")
    options.rungs = bench_ladder.chosen(listed, options.device)
    if lacking := [name for name in ("diffusers", "transformers") if not importlib.util.find_spec(name)]:
        raise UserError(f"{' and '.join(lacking)} must be installed: pip install -r requirements-dev.txt")
    return options, parts


def main(arguments=None):
    """Measure what was asked for, then print it."""
    options, parts = parse(arguments)
    # for the processes that use diffusers: nothing is fetched, nothing but the table is printed
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine or this torch has no CUDA device; try --device cpu")
    settings = Settings(options.device, options.dtype, options.size, options.small)
    try:
        rows = [compare_networks(part, settings, options.runs) for part in (*NETWORKS, TRAIN) if part in parts]
        pairs = [compare_networks(part, settings, options.runs) for part in PAIRS if part in parts]
        loads, notes = compare_loading(settings, options.runs) if "load" in parts else ([], [])
        ladder = bench_ladder.measure(options.rungs, settings, options.runs) if LADDER in parts else None
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:  # the first one also where the system ends a process
        raise UserError("there is not enough memory; try a smaller --size, or fewer parts with --only") from error
    arguments = sys.argv[1:] if arguments is None else arguments
    lines = [*heading(settings, arguments), ""]
    if rows + loads:
        lines += [*table(rows + loads), ""]
    if pairs:
        lines += ["## Prompt-to-Prompt, beside the same with attention maps in memory", "", *table(pairs, MAPS), ""]
    if rows + loads + pairs:
        lines += [*LEGEND, "", *notes, ""]
    if ladder:
        lines += bench_ladder.report(ladder)
    print("\n".join(lines).rstrip())


# ---- in the main process ----


def compare_networks(part, settings, runs):
    """One network, on both sides -> Row. Raises UserError if the outputs differ."""
    what, other = WHAT[part], MAPS if part in PAIRS else THEIRS
    with own_process() as our_process, own_process() as their_process:

        def both(function):
            """Call a function in our process, then in theirs: (result, result)."""
            ours = our_process.submit(function, OURS, part, settings).result()
            return ours, their_process.submit(function, other, part, settings).result()

        say(f"{what}: making the networks and warming up")
        error = relative_error(*both(first_output))
        if not error <= TOLERANCE[settings.dtype]:
            raise UserError(f"{what}: the outputs of the two sides differ by {error:.1e}; their times mean nothing")
        pairs = []
        for _ in range(runs):
            pairs.append(both(timed))
            say_pair(what, pairs[-1], other)
    return Row(what, pairs, error)


def compare_loading(settings, runs):
    """A whole model, as one file and as a folder, by both sides -> (Rows, lines to print below the table).

    Tensors may stay in the memory-mapped file until they are first used. So each load has two lines: the call alone,
    and the call with the reading of every weight.
    """
    rows, notes = [], []
    with tempfile.TemporaryDirectory(prefix="ip2p-bench-") as folder:
        say("writing the models to load")
        with own_process() as process:
            size = process.submit(write_models, folder, settings).result()
        for kind, what in LOADS.items():
            calls, reads, errors = [], [], []
            for _ in range(runs):
                loads = []
                for side in (OURS, THEIRS):
                    with own_process() as process:
                        loads.append(process.submit(load, side, kind, folder, settings).result())
                call, read, norms = zip(*loads, strict=True)
                calls.append(call)
                reads.append(read)
                errors.append(relative_error(*norms))
                say_pair(what, call)
            if not max(errors) <= 1e-6:
                raise UserError(f"{what}: the two sides loaded different weights; their times mean nothing")
            rows += [Row(what, calls, max(errors)), Row(f"{what}, read all weights", reads, max(errors))]
            ours, theirs = (f"{count / size:.2f}" if count else "unknown" for count in peaks(reads))
            notes.append(f"- {what}: {gigabytes(size)}; the peak memory is {ours} (ours) and {theirs} times that.")
    return rows, notes


def heading(settings, arguments):
    """What was measured, where and when: lines."""
    names = [name for name in ("torch", "diffusers", "transformers", "accelerate") if importlib.util.find_spec(name)]
    lacking = "" if "accelerate" in names else ", WITHOUT accelerate: diffusers loads slowly"
    return [
        "# Speed and memory against diffusers",
        "",
        f"- command: `{shlex.join(['python', '-m', 'bench', *arguments])}`",
        f"- device: {machine(settings)}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in names)}{lacking}",
        f"- measured: {measured(settings)}, random weights",
        f"- date: {datetime.date.today()}",
    ]


def machine(settings):
    """Where it was measured."""
    import torch

    if settings.device == "cuda":
        return f"cuda, {torch.cuda.get_device_name()}"
    linux = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", linux.read_text() if linux.exists() else "")
    threads = torch.get_num_threads()
    return f"cpu, {found[1] if found else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def measured(settings):
    """What was measured."""
    size = "tiny networks" if settings.small else "networks of Stable Diffusion 1.5's size"
    return f"{size}, {settings.size}x{settings.size} pixels, {settings.dtype}"


def table(rows, other=THEIRS):
    """The rows in Markdown: lines."""
    lines = [
        f"| | ours | {other} | ratio | its range | peak, ours | peak, {other} | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, pairs, error in rows:
        ours, theirs = ([seconds for seconds, _ in side] for side in zip(*pairs, strict=True))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        cells = [
            what,
            f"{median(ours):.3g} s",
            f"{median(theirs):.3g} s",
            f"**{median(ratios):.3f}**",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            *(gigabytes(count) for count in peaks(pairs)),
            f"{error:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def peaks(pairs):
    """The highest peak of either side, in bytes, or None where it is unknown."""
    return [max((count for _, count in side if count), default=None) for side in zip(*pairs, strict=True)]


def say_pair(what, pair, other=THEIRS):
    """The seconds of one turn each."""
    say(f"{what}: {pair[0][0]:.3g} s ours, {pair[1][0]:.3g} s {other}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and temporary files are removed
    run_program(main)
