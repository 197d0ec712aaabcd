"""All that only a GPU can tell, by one command of at most nine minutes: `make gpu`.

    python -m bench.gpu                         # adds to runs/gpu/results.md, and all that is printed to log.txt there
    python -m bench.gpu training                # one part of it, in this process
    python -m bench.gpu --small --device cpu    # tiny networks, to try this program; their times mean nothing

Each part is a process with a limit of time. One that fails is named, the others run, and the exit code is 1.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer

from cli import Parser, check_device, run_program

import torch

from bench.whole import OPERATIONS, PRODUCTS, ceilings, edits, training

OWN_PARTS = {"ceilings": ceilings, "edits": edits, "training": training}
STEP, PAIR = "UNet step, trick by trick: ", "self-attention of a pair: "
CHOICES = {  # what may be used or not: the row with it, the row without
    "CUDA graphs": (STEP + "compiled, channels_last, CUDA graphs", STEP + "compiled, channels_last"),
    "channels_last": (STEP + "compiled, channels_last, CUDA graphs", STEP + "compiled, CUDA graphs"),
    "FlexAttention": (PAIR + "FlexAttention, compiled", PAIR + "fused attention"),
}
ROW = re.compile(r"\| (.+?) \| (\d[\d.e+-]*) ")  # of a table: its name, and its first number
RESULTS = re.compile(r"\||- |FAILED |=+ \d+ ")  # how the lines for results.md begin; the last two are pytest's


def parse(arguments=None):
    """The command line. Raises UserError."""
    parser = Parser(prog="bench.gpu", description="What only a GPU can tell, in at most nine minutes.")
    add = parser.add_argument
    add("part", nargs="?", choices=OWN_PARTS, help="only this one, in this process (default: all)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    add("--small", action="store_true", help="tiny networks, to try this program; their times mean nothing")
    add("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    check_device(options.device)
    options.size = 64 if options.small else 512
    options.dtype = "bfloat16" if options.device == "cuda" else "float32"  # not every CPU multiplies bfloat16
    options.to = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    return options


def main(arguments=None):
    """Run one part here, or all of them; exit code 1 if one fails."""
    options = parse(arguments)
    if options.part:
        OWN_PARTS[options.part](options)
    elif failed := run_all(options):
        sys.exit(f"bench.gpu: failed: {', '.join(failed)}")


def commands(options):
    """(seconds, arguments of Python) of every part. A part may also take the time that earlier ones have left."""
    to = ["--device", options.device, *["--small"] * options.small]
    variants = ["bench", *to, "--dtype", options.dtype, "--size", str(options.size), "--only", "ladder,p2p,attention"]
    tests = ["pytest", "-m", "gpu", "-vv", "--numprocesses", "4", *["--collect-only"] * options.small]
    own = {name: ["-m", "bench.gpu", name, *to] for name in OWN_PARTS}
    parts = (40, own["ceilings"]), (240, ["-m", *variants]), (100, own["edits"]), (90, own["training"])
    return [*parts, (55, ["-m", *tests])]


def run_all(options):
    """Run all parts, print what they print and what follows from it -> the commands that failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    device, numbers, failed, began, end = options.device, {}, [], time.monotonic(), 0
    with open(options.out / "log.txt", "a", 1) as log, open(options.out / "results.md", "a", 1) as results:

        def say(text, is_result=True):
            for file in (sys.stdout, log, results)[: 3 if is_result else 2]:
                print(text, file=file, flush=True)

        def take(line):
            say(line, RESULTS.match(line))
            if row := ROW.match(line):
                numbers[row[1]] = float(row[2])

        if device == "cuda":
            query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
            device = f"{subprocess.getoutput(query)}, CUDA {torch.version.cuda}"
        say(f"\n# {time.strftime('%Y-%m-%d %H:%M')}\n\n- command: {' '.join(['python', *sys.orig_argv[1:]])}")
        say(f"- device, driver, memory: {device}\n- torch {torch.__version__}")
        for seconds, command in commands(options):
            end, start = end + seconds, time.monotonic()
            say(f"\n## python {' '.join(command)}\n")
            code = run([sys.executable, "-u", *command], began + end - start, take)
            killed = "was killed: its time was over, or the memory full"
            how = {0: "ended well", -signal.SIGKILL: killed}.get(code, f"failed with exit code {code}")
            failed += [" ".join(command)] * (code != 0)
            say(f"\nThis part {how}, after {time.monotonic() - start:.0f} s.")
        say("\n## What follows\n")
        for sentence in conclusions(numbers):
            say(f"- {sentence}")
    return failed


def run(command, seconds, take):
    """Run a command, for so many seconds at most -> its exit code. take(line): gets each line that it prints."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, **pipe, process_group=0) as process:  # a group, so that what it starts ends, too
        timer = Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            for line in process.stdout:
                take(line.rstrip())
            process.wait()
        finally:
            timer.cancel()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


def conclusions(numbers):
    """What follows from {name of a row: its first number}, in sentences."""
    for what, (with_it, without) in CHOICES.items():
        if with_it in numbers and without in numbers:
            ratio = numbers[with_it] / numbers[without]
            verdict = "use it" if ratio < 0.95 else "do not use it" if ratio > 1.05 else "it makes no difference"
            yield f"{what}: {verdict}. \"{with_it}\" takes {ratio:.2f} of the time of \"{without}\"."
        else:
            yield f"{what}: not measured."
    steps = {name: seconds for name, seconds in numbers.items() if name.startswith(STEP)}
    if steps and PRODUCTS in numbers and OPERATIONS in numbers:
        fastest = min(steps, key=steps.get)
        rate = numbers[OPERATIONS] / steps[fastest]  # TFLOP/s
        fraction = f"{rate / numbers[PRODUCTS]:.0%} of what matrix products reach"
        yield f"The fastest step is \"{fastest}\": {rate:.4g} TFLOP/s, {fraction}."


if __name__ == "__main__":
    sys.argv[0] = "bench.gpu"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started ends, too
    run_program(main)
