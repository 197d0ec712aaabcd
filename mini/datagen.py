"""The miniature's own edits and true pairs, by the rules of its world.

    python -m mini.datagen text --count 7000 --out runs/mini/edits.jsonl
    python -m mini.datagen true --count 5000 --out runs/mini/true    # only to compare with: an upper bound
"""

import json
from pathlib import Path

from cli import SEED, WHOLE, Parser, atomic_write, run_program

import numpy as np
from tqdm import tqdm

from dataset import Pair, begin_data_set, folder_name, write_edit, write_seeds
from language.captions import begin_file
from mini.drawing import render
from mini.world import random_edit


def main(arguments=None):
    """Draw the edits, and write them as a file of triplets or as a data set of TRUE pairs."""
    parser = Parser(prog="mini.datagen", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("command", choices=["text", "true"], help="text: captions, instructions, captions after; true: true pairs")
    add("--count", type=WHOLE, default=5000, metavar="N", help="(default: 5000)")
    add("--seed", type=SEED, default=0, metavar="S", help="(default: 0)")
    add("--out", type=Path, required=True, metavar="PATH")
    options = parser.parse_args(arguments)
    rng, out = np.random.default_rng(options.seed), options.out
    edits = [random_edit(rng) for _ in range(options.count)]
    settings = {"program": f"mini.datagen {options.command}", "count": options.count, "seed": options.seed}
    if options.command == "text":
        begin_file(out, settings)
        if not out.exists():
            with atomic_write(out) as beside:
                beside.write_text("".join(json.dumps(edit.triplet()) + "\n" for edit in edits), encoding="utf-8")
        print(f"{out}: {len(edits)} triplets")
    else:
        begin_data_set(out, settings)
        for number, edit in enumerate(tqdm(edits, desc="drawing", unit="pair", mininterval=5, leave=False)):
            if not (out / folder_name(number)).exists():
                pair = Pair(render(edit.before), render(edit.after), {"seed": edit.before.layout})
                write_edit(out, number, edit.triplet(), [pair])
        print(f"{out}: {write_seeds(out)} true pairs")


if __name__ == "__main__":
    run_program(main)
