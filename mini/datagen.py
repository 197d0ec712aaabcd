"""The miniature's own edits and true pairs, by the rules of its world.

    python -m mini.datagen text --count 7000 --out runs/mini/edits.jsonl
    python -m mini.datagen text --captions captions.txt --out runs/edits.jsonl
    python -m mini.datagen true --count 5000 --out runs/mini/true    # only to compare with: an upper bound
"""

import json
from pathlib import Path

from cli import Parser, UserError, atomic_write, check_seeds, run_program, whole

import numpy as np
from tqdm import tqdm

from dataset import Pair, begin_data_set, folder_name, write_edit, write_seeds
from language.captions import FIELDS, Unique, begin_file, read_captions
from mini.world import caption, edit_scene, held_out, random_edit, read_caption, render


def write_text(options):
    """Triplets of the miniature's world: {"caption", "edit", "output", "url"}, a line each."""
    rng = np.random.default_rng(options.seed)
    if options.captions:
        records = list(edits_of_captions(options.captions, rng))
    else:
        records = [triplet(random_edit(rng)) for _ in range(options.count)]
    if not records:
        raise UserError(f"{options.captions} holds no captions to edit")
    number = None if options.captions else options.count
    settings = {"program": "mini.datagen text", "count": number, "seed": options.seed, "captions": options.captions}
    begin_file(options.out, settings)
    if not options.out.exists():
        with atomic_write(options.out) as beside:
            beside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{options.out}: {len(records)} triplets")


def edits_of_captions(path, rng):
    """A triplet for every caption of a file, but for repeated ones and for scenes that are kept to be measured on."""
    for text, url in Unique(read_captions(path)):
        try:
            scene = read_caption(text)
        except ValueError as error:
            raise UserError(f"{path}: {error}; datagen.py text reads any caption") from error
        if not held_out(scene):
            yield triplet(edit_scene(scene, rng), url)


def triplet(edit, url=None):
    """An edit of the miniature's world as a record."""
    texts = (caption(edit.before), edit.instruction, caption(edit.after))
    return {**dict(zip(FIELDS, texts, strict=True)), "url": url}


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
        command.add_argument("--count", type=whole, default=5000, metavar="N", help="(default: 5000)")
        command.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
        command.add_argument("--out", type=Path, required=True, metavar="PATH")
    options = parser.parse_args(arguments)
    check_seeds([options.seed])
    options.run(options)


if __name__ == "__main__":
    run_program(main)
