"""Edited pairs on disk, in the layout of the authors' published data set.

    python dataset.py import SOURCE --out DIR   # from one's own pairs (see formats/pairs.py); after a stop it resumes
    python dataset.py check DIR                 # what is there, and ten samples as a sheet

    ROOT/0000012/prompt.json      {"caption", "edit", "output", "url"}
    ROOT/0000012/171_0.jpg        before, made with seed 171
    ROOT/0000012/171_1.jpg        after
    ROOT/0000012/metadata.jsonl   one line for each pair: its seed, how it was sampled, its CLIP similarities
    ROOT/seeds.json               [["0000012", ["171", ...]], ...], sorted: the edits to train on

Splits go by position in seeds.json: the first 90 % are for training, 5 % for validation, 5 % for tests.
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass, fields
from itertools import accumulate, chain, islice
from pathlib import Path

from cli import WHOLE, Parser, UserError, atomic_write, keep_settings, reported_as, run_program

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from formats.configs import Config
from formats.pairs import read_pairs
from images import grid, open_image, save_png, thumbnail, to_jpeg, to_tensor

SPLITS = {"train": (0.0, 0.9), "val": (0.9, 0.9 + 0.05), "test": (0.9 + 0.05, 1.0), "all": (0.0, 1.0)}
TOLERATED = 3, 0.01  # so many pairs, or this fraction of all, may be missing or damaged
SAMPLES = 10  # on the sheet of `check`
# two PIL images, and their line of metadata.jsonl, a dict: seed, p2p_threshold, cfg_scale, clip_sim_*
Pair = namedtuple("Pair", ["before", "after", "metadata"])


@dataclass(frozen=True)
class Filter:
    """The least similarities of a pair that is kept; the defaults are the paper's, for CLIP ViT-L/14 (Sec. 3.1.2).

    Another CLIP has similarities of another size: a `filter.json` in its folder holds its own thresholds.
    """

    image_text: float = 0.2  # both images, each with its caption
    image_image: float = 0.7  # the two images
    direction: float = 0.2  # the change of the image with the change of the caption

    def keeps(self, scores):
        """Does a candidate with these similarities (see `CLIP.edit_similarities`) pass?"""
        return not self.refused_by(scores)

    def refused_by(self, scores):
        """The names of the thresholds that it does not reach."""
        text, image, direction = (scores[f"clip_sim_{name}"] for name in (0, "image", "dir"))
        values = min(text, scores["clip_sim_1"]), image, direction
        return [field.name for field, x in zip(fields(self), values, strict=True) if not x >= getattr(self, field.name)]

    @classmethod
    def read(cls, folder):
        """The thresholds of the CLIP in a folder. Raises UserError."""
        path = Path(folder) / "filter.json"
        config = Config.read(path) if path.exists() else Config({}, path)
        values = {field.name: config.values.get(field.name, field.default) for field in fields(cls)}
        config.must(all(type(value) in (int, float) for value in values.values()), "numbers are needed")
        return cls(**values)


def begin_data_set(root, settings, noted=()):
    """`keep_settings` in ROOT/settings.json. Raises UserError where the folder holds anything else."""
    names = {path.name for path in root.iterdir() if not path.name.startswith(".")} if root.is_dir() else set()
    if names and "settings.json" not in names:
        raise UserError(f"{root} holds other files, such as {min(names)}; use a new folder")
    keep_settings(root / "settings.json", settings, noted)


def folder_name(number):
    """The folder of the edit with this number."""
    return f"{number:07d}"


def write_edit(root, number, prompt, pairs, candidates=None):
    """Write the folder of one edit, whole or not at all. Raises UserError where there is such a folder already.

    prompt: {"caption", "edit", "output", "url"}; pairs: the `Pair`s that are kept; candidates: the metadata of all
    that were sampled, kept or not, for candidates.jsonl.
    """
    with atomic_write(Path(root) / folder_name(number)) as beside:
        beside.mkdir()
        (beside / "prompt.json").write_text(json.dumps(prompt, ensure_ascii=False), encoding="utf-8")
        for pair in pairs:
            for side, image in enumerate((pair.before, pair.after)):
                # without chroma subsampling, which at 64 pixels a side would smear the colours
                data = to_jpeg(image, quality=100, subsampling=0)
                (beside / f"{pair.metadata['seed']}_{side}.jpg").write_bytes(data)
        for name, records in (("metadata", [pair.metadata for pair in pairs]), ("candidates", candidates)):
            if records is not None:
                (beside / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_seeds(root):
    """Write seeds.json from the folders there are, anew if others add some meanwhile; returns the number of pairs."""
    entries, found = [], None
    while found != (paths := sorted(Path(root).glob("[0-9]*/metadata.jsonl"))):
        seeds = {path.parent.name: [str(line["seed"]) for line in read_metadata(path)] for path in paths}
        entries, found = [[folder, seeds[folder]] for folder in seeds if seeds[folder]], paths
        with atomic_write(Path(root) / "seeds.json") as beside:
            beside.write_text(json.dumps(entries), encoding="utf-8")
    return sum(len(seeds) for _, seeds in entries)


def read_metadata(path):
    """The lines of a metadata.jsonl or candidates.jsonl: a dict for each pair. Raises UserError."""
    with reported_as(f"{path} cannot be read; remove its folder, and the edit is made anew"):
        lines = map(json.loads, path.read_text(encoding="utf-8-sig").splitlines())
        return [{"seed": line["seed"], **line} for line in lines]


def read_seeds(root):
    """What seeds.json lists: (folder, its seeds) of every edit, in order. Raises UserError."""
    path = Path(root) / "seeds.json"
    with reported_as(f"{path} cannot be read; datagen.py images makes such a folder, dataset.py import as well"):
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        if not all(type(folder) is str and type(seeds) is list and seeds for folder, seeds in entries):
            raise ValueError("a list of folders with lists of seeds is expected")
        return entries


def read_prompt(folder):
    """What an edit's prompt.json holds, a dict with the text "edit". Raises UserError."""
    with reported_as(f"{folder / 'prompt.json'} is missing or damaged"):
        prompt = json.loads((folder / "prompt.json").read_text(encoding="utf-8-sig"))
        prompt["edit"].encode()  # a text, and one that has an encoding
        return prompt


def read_pair(folder, seed):
    """A pair from the folder of its edit: (before, after), RGB images of one size. Raises UserError."""
    before, after = (open_image(folder / f"{seed}_{side}.jpg") for side in (0, 1))
    if before.size != after.size:
        raise UserError(f"{folder}: the images of seed {seed} differ in size")
    return before, after


def too_many(broken, total):
    """Are so many broken ones of a total more than a data set may have?"""
    return broken > max(TOLERATED[0], TOLERATED[1] * total)


class EditDataset(Dataset):
    """The edits of one split: (before [3, H, W], after [3, H, W], instruction), images in [-1, 1].

    One item an edit, as in the released code: however many of an edit's pairs passed the filter, it counts once, and
    one of them is drawn. Large data sets have gaps: a pair that is missing or damaged is named and skipped, and the
    edit's next whole one takes its place. `broken` marks them, for all processes of a DataLoader.
    """

    def __init__(self, root, split="train", resolution=None, max_resize=None, flip=0.0, subset=None):
        """resolution: pixels a side of square crops; None for images as they are on disk.

        `ds[index]` is an edit's first whole pair, made `resolution` pixels large on its shorter side and cropped in
        the middle. `ds[index, example]` is augmented as in Sec. A.1: the number `example` seeds what is drawn, the
        pair, the shorter side from `resolution` to `max_resize`, the place of the crop, and, with probability `flip`,
        the mirroring; the same for both images. subset: so many edits, or (a float) such a fraction of them, spread
        evenly over the split; None for all. Raises UserError where `root` is no data set, or smaller than `subset`.
        """
        self.root, self.flip, self.resolution, self.max_resize = Path(root), flip, resolution, max_resize or resolution
        entries = read_seeds(root)
        first, last = (int(fraction * len(entries)) for fraction in SPLITS[split])  # floors, as the released code
        edits = entries[first:last]
        if not edits:
            raise UserError(f"{root} holds no pairs for the split {split}")
        if subset is not None:
            count = max(1, round(subset * len(edits))) if isinstance(subset, float) else subset
            if count > len(edits):
                raise UserError(f"{root} holds {len(edits)} edits for this split, not {count}")
            edits = [edits[i * len(edits) // count] for i in range(count)]
        self.edits, self.held_out = edits, len(entries) - (last - first)  # held out: those of the other splits
        self.starts = [0, *accumulate(len(seeds) for _, seeds in edits)]  # of each edit's pairs in `broken`
        self.broken = torch.zeros(self.starts[-1], dtype=torch.bool).share_memory_()

    def __len__(self):
        """How many edits there are, broken ones included."""
        return len(self.edits)

    def __getitem__(self, key):
        """The item of an index, or of (index, example). Raises UserError where too many are missing or damaged."""
        index, example = key if isinstance(key, tuple) else (key, None)
        if not -len(self) <= index < len(self):
            raise IndexError  # which ends a loop over the data set
        generator = None if example is None else torch.Generator().manual_seed(example)
        for edit in range(index, index + len(self)):  # the next edit stands in for one that has no whole pair
            edit %= len(self)
            count = len(self.edits[edit][1])
            first = 0 if generator is None else int(torch.randint(count, (), generator=generator))
            for k in range(first, first + count):
                if pair := self.load_pair(edit, k % count, generator):
                    return pair
        raise UserError(f"{self.root} holds no whole pair")

    def load_pair(self, index, k, generator=None):
        """The k-th pair of an edit; None where it is missing or damaged. generator: draws the augmentation, if any.

        Raises UserError when more than three and more than 1 % of all pairs are missing or damaged.
        """
        folder, seeds = self.edits[index]
        path, place = self.root / folder, self.starts[index] + k
        if self.broken[place]:
            return None
        try:
            instruction, images = read_prompt(path)["edit"], read_pair(path, seeds[k])
        except UserError as error:
            self.broken[place] = True
            count = int(self.broken.sum())
            if too_many(count, len(self.broken)):
                reason = f"{count} of {len(self.broken)} pairs are missing or damaged, which is too many; the last one"
                raise UserError(f"{reason}: {error}") from error
            print(f"skipped: {error}", file=sys.stderr)
            return None
        mirrored = False
        if self.resolution:
            *images, mirrored = self.crop(images, generator)
        before, after = map(to_tensor, images)
        return before, after, other_way_round(instruction) if mirrored else instruction

    def crop(self, images, generator):
        """Two images of one size -> squares of `resolution`, in the middle, or with a generator augmented; mirrored?"""
        if generator is None:
            side, x, y, mirrored = self.resolution, 0.5, 0.5, False
        else:
            side = int(torch.randint(self.resolution, self.max_resize + 1, (), generator=generator))
            x, y, u = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            mirrored = u < self.flip
        scale = side / min(images[0].size)
        size = [max(side, round(length * scale)) for length in images[0].size]
        # each of the places where the square fits is equally likely
        left, top = (int(u * (length - self.resolution + 1)) for u, length in zip((x, y), size, strict=True))
        for image in images:
            cropped = image.resize(size, Image.Resampling.LANCZOS)
            cropped = cropped.crop((left, top, left + self.resolution, top + self.resolution))
            yield ImageOps.mirror(cropped) if mirrored else cropped
        yield mirrored


def other_way_round(text):
    """An instruction for mirrored images: left for right, and right for left."""
    sides = {"left": "right", "right": "left"}
    return re.sub(r"(?i)\b(left|right)\b", lambda found: sides[found[0].lower()], text)


# ---- the program ----


def import_pairs(options):
    """Write the pairs of a source (see `formats.pairs.read_pairs`) as a data set, a folder for each row.

    A row is done when its folder is there, so that the same command resumes. Raises UserError where too many rows are
    broken, and where a folder was made from another row.
    """
    rows, out, number, broken = read_pairs(options.source, options.columns), options.out, -1, 0
    if (first := next(rows, None)) is None:  # a source that is none leaves nothing behind
        raise UserError(f"{options.source} holds no pairs")
    begin_data_set(out, {"program": "dataset.py import", "columns": options.columns})
    for path in out.glob(".*.tmp"):  # what a killed run left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    rows = islice(chain([first], rows), options.count)
    for number, row in enumerate(tqdm(rows, "import", options.count, unit="row")):
        folder = out / folder_name(number)
        try:
            prompt, images = row.prompt(), None if folder.exists() else row.images()
        except UserError as error:
            broken, last = broken + 1, error
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            if too_many(broken, max(1000, number + 1)):
                break
            continue
        if images:
            write_edit(out, number, prompt, [Pair(*images, {"seed": 0})])
        elif read_prompt(folder) != prompt:
            raise UserError(f"{folder} was not made from {row.place}; the source has changed: use another --out")
    if too_many(broken, number + 1) or broken > number:
        raise UserError(f"{broken} of {number + 1} rows are broken, which is too many; the last one: {last}")
    print(f"{out}: {write_seeds(out)} pairs of {number + 1} rows" + (f"; {broken} skipped" if broken else ""))


def check(options):
    """Print what a data set holds and what is wrong with it, and draw ten samples. Raises UserError if it is none."""
    root, entries = options.data, read_seeds(options.data)
    sizes, seen, gaps, unchanged, longest, samples = Counter(), Counter(), [], 0, "", []
    wanted = {i * len(entries) // SAMPLES for i in range(SAMPLES)}
    for index, (name, seeds) in enumerate(tqdm(entries, "check", unit="edit")):
        for seed in seeds:
            try:
                edit, (before, after) = read_prompt(root / name)["edit"], read_pair(root / name, seed)
            except UserError as error:
                gaps.append(error)
                continue
            sizes[f"{before.width}x{before.height}"] += 1
            seen[hash((before.tobytes(), after.tobytes(), edit))] += 1
            unchanged += before.tobytes() == after.tobytes()
            longest = max(longest, edit, key=len)
            if index in wanted and seed == seeds[0]:
                samples += [(before, "before"), (after, edit)]
    bounds = ((name, *(int(part * len(entries)) for part in SPLITS[name])) for name in ("train", "val", "test"))
    parts = ", ".join(f"{last - first} {name}" for name, first, last in bounds)
    print(f"{root}: {len(entries)} edits ({parts}) with {sum(len(seeds) for _, seeds in entries)} pairs")
    print("sizes: " + ", ".join(f"{count} of {size}" for size, count in sizes.most_common(8)))
    print(f"gaps: {len(gaps)} pairs are missing or damaged" + (f", such as: {gaps[0]}" if gaps else ""))
    print(f"duplicates: {seen.total() - len(seen)} pairs repeat an earlier one; in {unchanged} both images are equal")
    print(f"longest instruction, {len(longest.split())} words (CLIP reads 75 tokens, about 55 words): {longest}")
    if samples:
        images = [thumbnail(image) for image, _ in samples]
        save_png(grid(images, 4, [label for _, label in samples]), out := options.out or root / "check.png")
        print(f"{out}: {len(samples) // 2} samples")


def three_names(text):
    """The type of --columns: before,after,instruction as a list, in lower case."""
    names = [name.strip().lower() for name in text.split(",")]
    if len(names) != 3:
        raise argparse.ArgumentTypeError(f"should be three names, such as before,after,edit, not {text!r}")
    return names


def main(arguments=None):
    """Import a data set, or check one."""
    parser = Parser(prog="dataset.py", description="Make a data set from one's own pairs, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)

    own = commands.add_parser("import", help="pairs from other hands -> the authors' layout")
    own.set_defaults(run=import_pairs)
    add = own.add_argument
    folders = "a folder with two folders of equal file names, before and after, and a text or a table of instructions"
    files = "a CSV, JSON lines, parquet or metadata.jsonl with columns for before, after and instruction"
    add("source", metavar="SOURCE", help=f"{folders}; {files}; or a hub id of such a data set")
    add("--out", type=Path, required=True, metavar="DIR", help="the data set")
    add("--columns", type=three_names, metavar="BEFORE,AFTER,EDIT", help="names of columns (default: guessed)")
    add("--count", type=WHOLE, metavar="N", help="only the first N rows")

    look = commands.add_parser("check", help="say what a data set holds, and draw ten samples")
    look.set_defaults(run=check)
    add = look.add_argument
    add("data", type=Path, metavar="DIR", help="the data set, in the authors' layout")
    add("--out", type=Path, metavar="FILE.png", help="the samples (default: DIR/check.png)")
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    run_program(main)
