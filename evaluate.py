"""Measure an editor, and the generated pairs that editors are trained on.

python evaluate.py world --model models/mini/editor      # on edits whose true result is known
python evaluate.py pairs --sd models/mini/sd             # are they right, and what is the CLIP filter worth?
"""

import shlex
import sys
from pathlib import Path

from cli import SCALE, SEED, STEPS, WHOLE, Parser, add_sampler, add_savings, check_device, run_program

import torch

from mini.evaluation import evaluate_pairs, evaluate_world


def main(arguments=None):
    """Run one of the commands."""
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="world|pairs")
    mini = Path("models/mini")

    world = commands.add_parser("world", help="success on held-out edits of the miniature's world")
    add = world.add_argument
    add("--model", default=mini / "editor", metavar="M", help="the editor: a folder or a file (default: %(default)s)")
    add("--bound", metavar="M", help="an editor trained on true pairs, to compare with")
    add("--count", type=WHOLE, default=600, metavar="N", help="edits, a multiple of 30 (default: 600)")
    add("--batch-size", type=WHOLE, default=60, metavar="B", help="edits at a time (default: 60)")
    add("--cfg-text", type=SCALE, metavar="S", help="text guidance s_T (default: each model's own)")
    add("--cfg-image", type=SCALE, metavar="S", help="image guidance s_I (default: each model's own)")
    add_sampler(add)
    add_savings(world)
    add("--validation", action="store_true", help="use other edits, to choose the guidance scales by")

    pairs = commands.add_parser("pairs", help="success of generated pairs, and what the CLIP filter is worth")
    add = pairs.add_argument
    add("--sd", default=mini / "sd", metavar="M", help="the text-to-image model (default: %(default)s)")
    add("--count", type=WHOLE, default=256, metavar="N", help="pairs to sample (default: 256)")
    add("--batch-size", type=WHOLE, default=32, metavar="B", help="pairs at a time (default: 32)")
    add("--guidance", type=SCALE, nargs=2, default=(2.0, 4.0), metavar=("LOW", "HIGH"), help="(default: 2 4)")

    for command in (world, pairs):
        add = command.add_argument
        add("--judge", default=mini / "judge.safetensors", metavar="FILE", help="(default: %(default)s)")
        add("--clip", default=mini / "clip", metavar="DIR", help="CLIP, for its similarities (default: %(default)s)")
        add("--seed", type=SEED, default=0, metavar="S", help="of the edits (default: 0)")
        add("--steps", type=STEPS, metavar="N", help="sampling steps (default: each model's own)")
        add("--device", default="cpu", metavar="D", help="cpu, cuda, ... (default: cpu)")
        add("--threads", type=WHOLE, metavar="N", help="CPU threads (default: all cores)")
        add("--out", type=Path, default=Path("runs/evaluate"), metavar="DIR", help="for results (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    line = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if arguments is None else arguments)])
    evaluate = evaluate_world if options.command == "world" else evaluate_pairs
    evaluate(options, vars(options) | {"command": line})


if __name__ == "__main__":
    run_program(main)
