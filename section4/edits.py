"""The edits that are measured: of the miniature's world, of a data set in the authors' layout, or of a list.

A list is a CSV, JSON lines or JSON, as MagicBrush's: the columns (or keys) image, instruction and, where there are any,
caption, output_caption and after, an edited image to compare with. Paths count from the list's folder.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cli import UserError, reported_as

import numpy as np
from PIL import Image, ImageOps

from dataset import SPLITS, read_pair, read_prompt, read_seeds, too_many
from formats.pairs import HEADERS, STEMS, guess
from formats.tables import read_rows, text_of
from images import open_image
from mini import world
from mini.evaluation import held_out_edits


@dataclass(frozen=True)
class Case:
    """An edit to measure."""

    instruction: str
    captions: tuple[str, str]  # of the image before and after; "" where nobody wrote one
    seed: int
    load: Callable  # () -> (image before, image after or None)
    scenes: world.Edit | None = None  # in the miniature's world, where success is known

    def images(self, side):
        """(before, after or None), squares of so many pixels a side, cropped in the middle."""
        return [image and ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS) for image in self.load()]


def add_edits(add):
    """Add the flags that choose edits to a command line, by its `add_argument`."""
    what = "a data set in the authors' layout, or a list (CSV, JSON): image, instruction, caption, output_caption"
    add("--edits", type=Path, metavar="PATH", help=f"{what} (default: held-out edits of the miniature's world)")
    add("--split", choices=[*SPLITS], default="test", help="of a data set (default: test, its last 5 %%)")


def find_cases(options, count):
    """`count` edits, or all where there are fewer: what `add_edits` says. Raises UserError."""
    if not options.edits:
        edits = held_out_edits(-(-count // PER_ROUND) * PER_ROUND, options.seed)[:count]
        return [of_world(edit) for edit in edits]
    cases, broken, total = [], 0, 0
    for case in from_data_set(options) if options.edits.is_dir() else from_list(options.edits):
        if len(cases) == count:
            break
        total += 1
        try:
            case = case()
            case.load()
            cases.append(case)
        except UserError as error:
            broken, last = broken + 1, error
            print(f"skipped: {error}", file=sys.stderr)
    if broken and (too_many(broken, total) or not cases):
        raise UserError(f"{broken} of {total} edits are missing or damaged, which is too many; the last one: {last}")
    if not cases:
        raise UserError(f"{options.edits} holds no edits")
    return cases


PER_ROUND = 2 * len(world.KINDS)  # edits: `held_out_edits` makes as many of every kind, in known and in new phrasings


def of_world(edit):
    """The case of an edit of the miniature's world; its seed is the scene's layout, as in evaluate.py world."""
    captions = world.caption(edit.before), world.caption(edit.after)

    def load():
        return world.render(edit.before), world.render(edit.after)

    return Case(edit.instruction, captions, edit.before.layout, load, edit)


def from_data_set(options):
    """Functions that give the cases of one split: of each edit one seed, drawn randomly as in the released script."""
    entries, rng = read_seeds(options.edits), np.random.default_rng(options.seed)
    first, last = (int(fraction * len(entries)) for fraction in SPLITS[options.split])
    if first == last:
        raise UserError(f"{options.edits} has no edits in the split {options.split}; try --split all")
    for folder, seeds in entries[first:last]:
        yield partial(of_folder, options.edits / folder, seeds[rng.integers(len(seeds))])


def of_folder(folder, seed):
    """The case of a pair in an edit's folder. Raises UserError."""
    prompt = read_prompt(folder)
    captions = prompt.get("caption") or "", prompt.get("output") or ""
    return Case(prompt["edit"], captions, int(seed), partial(read_pair, folder, seed))


def from_list(path):
    """Functions that give the cases of a table, in its order, with seeds 0, 1, ... Raises UserError."""
    for number, (place, row) in enumerate(read_rows(path, HEADERS, skip=True)):
        yield partial(of_row, path, place, row, number)


def of_row(path, place, row, seed):
    """The case of one row. Raises UserError."""
    if isinstance(row, UserError):
        raise row
    columns = {}
    for name in ("before", "after", "edit", "caption", "output"):  # "input" and "output" are images where none else are
        columns[name] = guess([column for column in row if column not in columns.values()], STEMS[name])
    with reported_as(place):
        if not columns["before"] or not columns["edit"]:
            raise ValueError(f"the columns image and instruction are needed, but there is {', '.join(row)}")
        cells = {name: text_of(row, [column]) if column else "" for name, column in columns.items()}
        if not cells["edit"]:
            raise ValueError("the instruction is empty")

    def load():
        return tuple(cells[name] and open_image(path.parent / cells[name]) or None for name in ("before", "after"))

    return Case(cells["edit"], (cells["caption"], cells["output"]), seed, load)
