"""Measure an editor, and the generated pairs that editors are trained on (Sec. 4).

python evaluate.py world --model models/mini/editor      # on edits whose true result is known
python evaluate.py curves                                # Fig. 8: against SDEdit and Prompt-to-Prompt
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cli import SCALE, SEED, STEPS, WHOLE, Parser, add_sampler, add_savings, check_device, run_program

import torch

from mini.evaluation import evaluate_pairs, evaluate_world
from section4 import chains, choice, compare, curves, limits, magicbrush, metrics, prices

MINI = Path("models/mini")


def add_world_flags(parser):
    """The flags of `evaluate.py world`."""
    add = parser.add_argument
    add("--model", default=MINI / "editor", metavar="M", help="the editor: a folder or a file (default: %(default)s)")
    add("--bound", metavar="M", help="an editor trained on true pairs, to compare with")
    add("--count", type=WHOLE, default=504, metavar="N", help="edits, a multiple of 14 (default: 504)")
    add("--batch-size", type=WHOLE, default=63, metavar="B", help="edits at a time (default: 63)")
    add("--cfg-text", type=SCALE, metavar="S", help="text guidance s_T (default: each model's own)")
    add("--cfg-image", type=SCALE, metavar="S", help="image guidance s_I (default: each model's own)")
    add_sampler(add)
    add_savings(parser)
    add("--validation", action="store_true", help="use other edits, to choose the guidance scales by")
    add_mini_flags(add)


def add_pairs_flags(parser):
    """The flags of `evaluate.py pairs`."""
    add = parser.add_argument
    add("--sd", default=MINI / "sd", metavar="M", help="the text-to-image model (default: %(default)s)")
    add("--count", type=WHOLE, default=256, metavar="N", help="pairs to sample (default: 256)")
    add("--batch-size", type=WHOLE, default=32, metavar="B", help="pairs at a time (default: 32)")
    add("--guidance", type=SCALE, nargs=2, default=(2.0, 4.0), metavar=("LOW", "HIGH"), help="(default: 2 4)")
    add_mini_flags(add)


def add_mini_flags(add):
    """The flags of both."""
    add("--judge", default=MINI / "judge.safetensors", metavar="FILE", help="(default: %(default)s)")
    add("--clip", default=MINI / "clip", metavar="DIR", help="CLIP, for its similarities (default: %(default)s)")
    add("--seed", type=SEED, default=0, metavar="S", help="of the edits (default: 0)")
    add("--steps", type=STEPS, metavar="N", help="sampling steps (default: each model's own)")


class Command(NamedTuple):
    """A command."""

    what: str
    add_flags: Callable  # to a parser
    run: Callable  # with the options
    out: str = ""  # the default of --out, in runs/evaluate


def recorded(evaluate):
    """`evaluate_world` or `evaluate_pairs`, which write their settings beside the results."""
    return lambda options: evaluate(options, dict(vars(options)))


COMMANDS = {
    "world": Command("success on held-out edits of the miniature's world", add_world_flags, recorded(evaluate_world)),
    "pairs": Command("success of generated pairs, and of the CLIP filter", add_pairs_flags, recorded(evaluate_pairs)),
    "curves": Command("Fig. 8, 23: ours, SDEdit, Prompt-to-Prompt", curves.add_flags, curves.run, "curves"),
    "ablation": Command("Fig. 10: editors from other data", curves.add_ablation_flags, curves.run_ablation, "ablation"),
    "compare": Command("Fig. 9: all methods side by side", compare.add_flags, compare.run, "compare"),
    "sequence": Command("Fig. 13: edits one after another", chains.add_flags, chains.run, "sequence"),
    "failures": Command("Fig. 13: move, swap, double", limits.add_flags, limits.run, "failures"),
    "bias": Command("Fig. 14: what is added where nothing is said", limits.add_bias_flags, limits.run_bias, "bias"),
    "magicbrush": Command("MagicBrush's five metrics", magicbrush.add_flags, magicbrush.run, "magicbrush"),
    "metrics": Command("which metric tells the truth?", metrics.add_flags, metrics.run, "metrics"),
    "prices": Command("success against UNet evaluations an edit", prices.add_flags, prices.run, "prices"),
    "best": Command("sample.py --best: one sample, the best of N, the oracle", choice.add_flags, choice.run, "best"),
}


def main(arguments=None):
    """Run one of the commands."""
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own, out = commands.add_parser(name, help=command.what), Path("runs/evaluate") / command.out
        command.add_flags(own)
        add = own.add_argument
        add("--device", default="cpu", metavar="D", help="cpu, cuda, ... (default: cpu)")
        add("--threads", type=WHOLE, metavar="N", help="CPU threads (default: all cores)")
        add("--out", type=Path, default=out, metavar="DIR", help="for results (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    evaluate = COMMANDS[options.command].run
    options.command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if arguments is None else arguments)])
    evaluate(options)


if __name__ == "__main__":
    run_program(main)
