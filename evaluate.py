"""Measure editors, and the generated pairs that they learn from.

python evaluate.py world --model models/mini/editor      # on edits whose right answer is known
python evaluate.py pairs --sd models/mini/sd             # what Prompt-to-Prompt keeps, what the filter is worth
"""

import shlex
import sys
from pathlib import Path

import torch

from cli import Parser, UserError, check_device, check_sampling, check_seeds, run_program
from mini.evaluate_pairs import evaluate_pairs
from mini.evaluate_world import evaluate_world


def parse(arguments=None):
    """The command line. Raises UserError for values out of range."""
    parser = Parser(prog="evaluate.py", description="Measure editors, and the generated pairs that they learn from.")
    programs = parser.add_subparsers(dest="program", required=True, metavar="world|pairs")
    mini = Path("models/mini")

    world = programs.add_parser("world", help="success on held-out edits of the miniature's world")
    world.set_defaults(run=evaluate_world)
    add = world.add_argument
    add("--model", default=mini / "editor", metavar="M", help="the editor: a folder or a file (default: %(default)s)")
    add("--bound", metavar="M", help="an editor trained on true pairs, to compare with")
    add("--count", type=int, default=504, metavar="N", help="edits, a multiple of 14 (default: 504)")
    add("--batch", type=int, default=63, metavar="B", help="edits at a time (default: 63)")
    add("--cfg-text", type=float, metavar="S", help="text guidance s_T (default: each model's own)")
    add("--cfg-image", type=float, metavar="S", help="image guidance s_I (default: each model's own)")
    add("--validation", action="store_true", help="use other edits, to choose the guidance scales by")

    pairs = programs.add_parser("pairs", help="what Prompt-to-Prompt keeps, and what the CLIP filter is worth")
    pairs.set_defaults(run=evaluate_pairs, cfg_text=None, cfg_image=None)
    add = pairs.add_argument
    add("--sd", default=mini / "sd", metavar="M", help="the text-to-image model (default: %(default)s)")
    add("--count", type=int, default=256, metavar="N", help="pairs of each sort (default: 256)")
    add("--batch", type=int, default=32, metavar="B", help="pairs at a time (default: 32)")
    add("--guidance", type=float, nargs=2, default=(2.0, 4.0), metavar=("LOW", "HIGH"), help="range (default: 2 4)")
    add("--candidates", nargs="+", metavar="FILE", help="a data set's candidates*.jsonl, for the filter's quantiles")

    for program in (world, pairs):
        add = program.add_argument
        add("--judge", default=mini / "judge.safetensors", metavar="FILE", help="(default: %(default)s)")
        add("--clip", default=mini / "clip", metavar="DIR", help="CLIP, for its similarities (default: %(default)s)")
        add("--seed", type=int, default=0, metavar="S", help="of the edits (default: 0)")
        add("--steps", type=int, metavar="N", help="sampling steps (default: each model's own)")
        add("--device", default="cpu", metavar="D", help="cpu, cuda, ... (default: cpu)")
        add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
        out = Path("runs/evaluate")
        add("--out", type=Path, default=out, metavar="DIR", help="for the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("count", "batch", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} should be at least 1, not {value}")
    for scale in getattr(options, "guidance", (options.cfg_text,)):
        check_sampling(options.steps, scale, options.cfg_image, None)
    check_seeds([options.seed])
    return options


def main(arguments=None):
    """Do what the command line asks for."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    check_device(options.device)
    command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if arguments is None else arguments)])
    options.run(options, command)


if __name__ == "__main__":
    run_program(main)
