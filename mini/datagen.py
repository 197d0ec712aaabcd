"""The miniature's own edits and true pairs, by the rules of its world.

    python -m mini.datagen text --count 7000 --out runs/mini/edits.jsonl
    python -m mini.datagen text --captions captions.txt --out runs/edits.jsonl
    python -m mini.datagen true --count 5000 --out runs/mini/true    # only to compare with: an upper bound
"""

import json
from pathlib import Path

from cli import SEED, WHOLE, Parser, UserError, atomic_write, reported_as, run_program

import numpy as np
from tqdm import tqdm

from dataset import Pair, begin_data_set, folder_name, write_edit, write_seeds
from language.captions import FIELDS, Unique, begin_file, read_captions
from mini.world import caption, edit_scene, held_out, random_edit, read_caption, render


def write_text(options):
    """Triplets of the miniature's world: {"caption", "edit", "output", "url"}, a line each."""
    rng, path = np.random.default_rng(options.seed), options.captions
    edits = edits_of_captions(path, rng) if path else ((random_edit(rng), None) for _ in range(options.count))
    lines = [json.dumps(triplet(edit, url)) + "\n" for edit, url in edits]
    if not lines:
        raise UserError(f"{path} holds no captions to edit")
    count = None if path else options.count
    begin_file(options.out, {"program": "mini.datagen text", "count": count, "seed": options.seed, "captions": path})
    if not options.out.exists():
        with atomic_write(options.out) as beside:
            beside.write_text("".join(lines), encoding="utf-8")
    print(f"{options.out}: {len(lines)} triplets")


def edits_of_captions(path, rng):
    """(Edit, url) for every caption of a file, but for repeated ones and for scenes that are kept to be measured on."""
    for text, url in Unique(read_captions(path)):
        with reported_as(f"{path} needs datagen.py text, which reads any caption"):
            scene = read_caption(text)
        if not held_out(scene):
            yield edit_scene(scene, rng), url


def triplet(edit, url=None):
    """An edit of the miniature's world as a record."""
    return dict(zip((*FIELDS, "url"), (caption(edit.before), edit.instruction, caption(edit.after), url), strict=True))


def write_true(options):
    """Pairs of TRUE images, drawn by the miniature's world: never for an editor of ours, only for its upper bound."""
    rng = np.random.default_rng(options.seed)
    begin_data_set(options.out, {"program": "mini.datagen true", "count": options.count, "seed": options.seed})
    for number in tqdm(range(options.count), desc="drawing", unit="pair", mininterval=5, leave=False):
        edit = random_edit(rng)
        pair = Pair(render(edit.before), render(edit.after), {"seed": edit.before.layout})
        if not (options.out / folder_name(number)).exists():
            write_edit(options.out, number, triplet(edit), [pair])
    print(f"{options.out}: {write_seeds(options.out)} true pairs")


def main(arguments=None):
    """Check the settings and run one of the commands."""
    parser = Parser(prog="mini.datagen", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="captions, instructions, captions after the edit")
    text.add_argument("--captions", type=Path, metavar="FILE", help="to edit (default: random scenes)")
    for command, run in ((text, write_text), (commands.add_parser("true", help="true pairs"), write_true)):
        command.set_defaults(run=run)
        command.add_argument("--count", type=WHOLE, default=5000, metavar="N", help="(default: 5000)")
        command.add_argument("--seed", type=SEED, default=0, metavar="S", help="(default: 0)")
        command.add_argument("--out", type=Path, required=True, metavar="PATH")
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    run_program(main)
