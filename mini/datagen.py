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
from mini.world import caption, random_edit, render


def write_text(edits, out, settings):
    """Triplets of the miniature's world: {"caption", "edit", "output", "url"}, a line each."""
    begin_file(out, settings)
    if not out.exists():
        with atomic_write(out) as beside:
            beside.write_text("".join(json.dumps(triplet(edit)) + "\n" for edit in edits), encoding="utf-8")
    print(f"{out}: {len(edits)} triplets")


def write_true(edits, out, settings):
    """Pairs of TRUE images, drawn by the miniature's world: never for an editor of ours, only for its upper bound."""
    begin_data_set(out, settings)
    for number, edit in enumerate(tqdm(edits, desc="drawing", unit="pair", mininterval=5, leave=False)):
        if not (out / folder_name(number)).exists():
            pair = Pair(render(edit.before), render(edit.after), {"seed": edit.before.layout})
            write_edit(out, number, triplet(edit), [pair])
    print(f"{out}: {write_seeds(out)} true pairs")


def triplet(edit):
    """An edit of the miniature's world as a record."""
    return {"caption": caption(edit.before), "edit": edit.instruction, "output": caption(edit.after), "url": None}


def main(arguments=None):
    """Draw the edits and run one of the commands."""
    parser = Parser(prog="mini.datagen", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("command", choices=["text", "true"], help="text: captions, instructions, captions after; true: true pairs")
    add("--count", type=WHOLE, default=5000, metavar="N", help="(default: 5000)")
    add("--seed", type=SEED, default=0, metavar="S", help="(default: 0)")
    add("--out", type=Path, required=True, metavar="PATH")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    edits = [random_edit(rng) for _ in range(options.count)]
    settings = {"program": f"mini.datagen {options.command}", "count": options.count, "seed": options.seed}
    (write_text if options.command == "text" else write_true)(edits, options.out, settings)


if __name__ == "__main__":
    run_program(main)
