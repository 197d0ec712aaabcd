"""Edited pairs on disk, in the layout of the authors' published data set.

    ROOT/0000012/prompt.json      {"caption", "edit", "output", "url"}
    ROOT/0000012/171_0.jpg        before, made with seed 171
    ROOT/0000012/171_1.jpg        after
    ROOT/0000012/metadata.jsonl   a line a pair: its seed, how it was sampled, its CLIP similarities
    ROOT/seeds.json               [["0000012", ["171", ...]], ...], sorted: what there is to train on

Splits go by position in seeds.json: the first 90 % are for training, 5 % for validation, 5 % for tests.
"""

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from cli import UserError, atomic_write
from formats.configs import Config
from images import open_image, to_jpeg, to_tensor

SPLITS = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0), "all": (0.0, 1.0)}
TOLERATED = 0.01  # of all pairs may be missing or damaged


@dataclass(frozen=True)
class Pair:
    """One pair: PIL images, and what metadata.jsonl says of it (seed, p2p_threshold, cfg_scale, clip_sim_*)."""

    before: object
    after: object
    metadata: dict


@dataclass(frozen=True)
class Filter:
    """What a pair must reach to be kept; these are the paper's thresholds, for CLIP ViT-L/14 (Sec. 3.1.2).

    A CLIP of another kind has similarities of another size: a `filter.json` in its folder holds its own.
    """

    image_text: float = 0.2  # both pictures, each with its caption
    image_image: float = 0.7  # the two pictures
    direction: float = 0.2  # the change of the picture with the change of the caption

    def keeps(self, scores):
        """Does a candidate with these similarities (see `CLIP.edit_similarities`) pass?"""
        return (
            min(scores["clip_sim_0"], scores["clip_sim_1"]) >= self.image_text
            and scores["clip_sim_image"] >= self.image_image
            and scores["clip_sim_dir"] >= self.direction
        )

    @classmethod
    def read(cls, folder):
        """The thresholds of the CLIP in a folder."""
        path = Path(folder) / "filter.json"
        if not path.exists():
            return cls()
        config = Config.read(path)
        values = {field.name: config.values.get(field.name, field.default) for field in fields(cls)}
        config.must(all(type(value) in (int, float) for value in values.values()), "numbers are needed")
        return cls(**values)


def folder_name(number):
    """The folder of the edit with this number."""
    return f"{number:07d}"


def write_edit(root, number, prompt, pairs):
    """Write the pairs of one edit, whole or not at all; an older folder of that number is replaced.

    prompt: {"caption", "edit", "output", "url"}, pairs: a list of Pair.
    """
    folder = Path(root) / folder_name(number)
    with atomic_write(folder) as beside:
        beside.mkdir()
        (beside / "prompt.json").write_text(json.dumps(prompt, ensure_ascii=False), encoding="utf-8")
        for pair in pairs:
            for side, image in enumerate((pair.before, pair.after)):
                # without chroma subsampling, which at 64 pixels a side would smear the colours
                data = to_jpeg(image, quality=100, subsampling=0)
                (beside / f"{pair.metadata['seed']}_{side}.jpg").write_bytes(data)
        lines = [json.dumps(pair.metadata) + "\n" for pair in pairs]
        (beside / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        remove_folder(folder)


def remove_folder(folder):
    """Remove an edit's folder if it is there. Raises UserError, and removes nothing, if it holds any other file."""
    if folder.is_dir():
        own = {*folder.glob("*_[01].jpg"), folder / "prompt.json", folder / "metadata.jsonl"}
        for path in folder.iterdir():
            if path not in own:
                raise UserError(f"{folder} holds {path.name}, which is no part of a data set; move it away")
        shutil.rmtree(folder)


def write_seeds(root, writer=None):
    """Write seeds.json from the folders there are; returns the number of pairs. writer: as for `atomic_write`.

    If another process adds to the folders meanwhile, it is written again: the last one to end leaves it whole.
    """
    entries, found = [], None
    while found != (paths := sorted(Path(root).glob("[0-9]*/metadata.jsonl"))):
        entries, found = [], paths
        for path in paths:
            try:
                if seeds := [str(noted["seed"]) for noted in read_metadata(path)]:
                    entries.append([path.parent.name, seeds])
            except FileNotFoundError:
                found = None  # another process is just writing that edit anew
        with atomic_write(Path(root) / "seeds.json", writer) as beside:
            beside.write_text(json.dumps(entries), encoding="utf-8")
    return sum(len(seeds) for _, seeds in entries)


def read_metadata(path):
    """The lines of a metadata.jsonl: a dict for each pair. Raises FileNotFoundError, or UserError for a damaged one."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all("seed" in line for line in lines):
            raise ValueError("a line without a seed")
        return lines
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove its folder, and the edit is made anew") from error


def read_seeds(root):
    """What seeds.json lists: (folder, its seeds) of every edit, in order. Raises UserError."""
    path = Path(root) / "seeds.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not all(type(folder) is str and type(seeds) is list for folder, seeds in entries):
            raise ValueError("a list of folders with lists of seeds is expected")
        return entries
    except FileNotFoundError as error:
        raise UserError(f"{root} holds no seeds.json; datagen.py images makes such a folder") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


class EditDataset(Dataset):
    """The pairs of one split: (before [3, H, W], after [3, H, W], instruction), pictures in [-1, 1].

    A large data set that came over a network has gaps: a pair that is missing or damaged is left out, and the next
    whole one takes its place, until more than 1 % of all are. `broken` marks them, for all processes of a DataLoader.
    """

    def __init__(self, root, split="train", resolution=None, largest=None, flip=0.0):
        """resolution: pixels a side of square crops; None for pictures as they are on disk.

        Pictures are made `resolution` pixels large on their shorter side and cropped in the middle. With a key (index,
        seed) they are augmented as in Sec. A.1: the shorter side is by chance from `resolution` to `largest`, the crop
        and, with probability `flip`, the mirroring are by chance as well, the same for both pictures.

        Raises UserError where `root` is no data set.
        """
        self.root, self.resolution, self.flip = Path(root), resolution, flip
        self.largest = largest or resolution
        entries = read_seeds(root)
        first, last = (int(round(share * len(entries))) for share in SPLITS[split])
        self.pairs = [(folder, seed) for folder, seeds in entries[first:last] for seed in seeds]
        if not self.pairs:
            raise UserError(f"{root} holds no pairs for the split {split}")
        self.broken = torch.zeros(len(self.pairs), dtype=torch.bool).share_memory_()

    def thin_out(self, amount):
        """Keep so many pairs, or such a share, spread evenly over all of them. Raises UserError for more than all."""
        count = max(1, round(amount * len(self))) if isinstance(amount, float) else amount
        if count > len(self):
            raise UserError(f"{self.root} holds {len(self)} pairs for this split, not {count}")
        self.pairs = [self.pairs[i * len(self.pairs) // count] for i in range(count)]
        self.broken = torch.zeros(count, dtype=torch.bool).share_memory_()

    def __len__(self):
        """How many pairs there are, broken ones included."""
        return len(self.pairs)

    def __getitem__(self, key):
        """The pair at a position, or (position, seed). Raises UserError where too many are missing or damaged."""
        index, seed = key if isinstance(key, tuple) else (key, None)
        if not -len(self) <= index < len(self):
            raise IndexError
        while (pair := self.read(index)) is None:
            index = (index + 1) % len(self)
        before, after, instruction = pair
        if self.resolution:
            before, after = self.crop(before, after, seed)
        return to_tensor(before), to_tensor(after), instruction

    def read(self, index):
        """(before, after, instruction) with RGB images as on disk; None, and counted, where it is missing or damaged.

        Raises UserError when these are more than 1 % of all.
        """
        if self.broken[index]:
            self.check_gaps("see above")
            return None
        folder, seed = self.pairs[index]
        path = self.root / folder
        try:
            instruction = read_instruction(path / "prompt.json")
            before, after = (open_image(path / f"{seed}_{side}.jpg") for side in (0, 1))
            if before.size != after.size:
                raise UserError(f"{path}: the pictures of seed {seed} differ in size")
            return before, after, instruction
        except UserError as error:
            self.broken[index] = True
            self.check_gaps(error)
            return None

    def check_gaps(self, last):
        """Raise UserError if too many pairs are missing or damaged; `last` says what was wrong with one of them."""
        count = int(self.broken.sum())
        if count > TOLERATED * len(self):
            reason = f"{count} of {len(self)} pairs are missing or damaged, which is too many; the last one"
            raise UserError(f"{reason}: {last}")

    def crop(self, before, after, seed):
        """Two images of one size -> squares of `resolution`; in the middle, or with a seed augmented."""
        width, height = before.size
        if seed is None:
            side, x, y, mirrored = self.resolution, 0.5, 0.5, False
        else:
            generator = torch.Generator().manual_seed(seed)
            side = int(torch.randint(self.resolution, self.largest + 1, (), generator=generator))
            x, y, chance = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            mirrored = chance < self.flip
        scale = side / min(width, height)
        size = [max(side, round(length * scale)) for length in (width, height)]
        # any of the places where the square fits, all of them alike
        left, top = (int(share * (length - self.resolution + 1)) for share, length in zip((x, y), size, strict=True))
        box = (left, top, left + self.resolution, top + self.resolution)
        for image in (before, after):
            cropped = image.resize(size, Image.Resampling.LANCZOS).crop(box)
            yield ImageOps.mirror(cropped) if mirrored else cropped


def read_instruction(path):
    """The instruction in a prompt.json. Raises UserError."""
    try:
        instruction = json.loads(path.read_text(encoding="utf-8"))["edit"]
        if not isinstance(instruction, str):
            raise ValueError("its edit is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from error
    return instruction
