"""Edited pairs on disk, in the layout of the authors' published data set.

    ROOT/0000012/prompt.json      {"caption", "edit", "output", "url"}
    ROOT/0000012/171_0.jpg        before, made with seed 171
    ROOT/0000012/171_1.jpg        after
    ROOT/0000012/metadata.jsonl   a line a pair: its seed, how it was sampled, its CLIP similarities
    ROOT/seeds.json               [["0000012", ["171", ...]], ...], sorted: what there is to train on

Splits go by position in seeds.json: the first 90 % are for training, 5 % for validation, 5 % for tests.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from torch.utils.data import Dataset

from configs import Config
from errors import UserError, written_whole
from images import open_image, to_jpeg, to_tensor

SPLITS = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0), "all": (0.0, 1.0)}


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
    with written_whole(folder) as beside:
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
    """Remove an edit's folder if it is there; only files of this layout are touched."""
    if folder.is_dir():
        for path in [*folder.glob("*_[01].jpg"), folder / "prompt.json", folder / "metadata.jsonl"]:
            path.unlink(missing_ok=True)
        folder.rmdir()


def write_seeds(root):
    """Write seeds.json from the folders there are; returns the number of pairs.

    If another process adds to the folders meanwhile, it is written again: the last one to end leaves it whole.
    """
    entries, found = [], None
    while found != (paths := sorted(Path(root).glob("[0-9]*/metadata.jsonl"))):
        entries, found = [], paths
        for path in paths:
            if lines := path.read_text(encoding="utf-8").splitlines():
                entries.append([path.parent.name, [str(json.loads(line)["seed"]) for line in lines]])
        with written_whole(Path(root) / "seeds.json") as beside:
            beside.write_text(json.dumps(entries), encoding="utf-8")
    return sum(len(seeds) for _, seeds in entries)


def read_seeds(root):
    """What seeds.json lists: (folder, its seeds) of every edit, in order. Raises UserError."""
    path = Path(root) / "seeds.json"
    try:
        return [(folder, list(seeds)) for folder, seeds in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError as error:
        raise UserError(f"{root} holds no seeds.json; datagen.py images makes such a folder") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


class EditDataset(Dataset):
    """The pairs of one split: (before [3, H, W], after [3, H, W], instruction), pictures in [-1, 1], as on disk."""

    def __init__(self, root, split="train"):
        """Raises UserError where `root` is no data set."""
        self.root = Path(root)
        entries = read_seeds(root)
        first, last = (int(round(share * len(entries))) for share in SPLITS[split])
        self.pairs = [(folder, seed) for folder, seeds in entries[first:last] for seed in seeds]
        if not self.pairs:
            raise UserError(f"{root} holds no pairs for the split {split}")

    def __len__(self):
        """How many pairs there are."""
        return len(self.pairs)

    def __getitem__(self, index):
        """The pair at a position. Raises UserError where a file is missing or damaged."""
        folder, seed = self.pairs[index]
        path = self.root / folder
        try:
            instruction = json.loads((path / "prompt.json").read_text(encoding="utf-8"))["edit"]
            if not isinstance(instruction, str):
                raise ValueError("its edit is no text")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / 'prompt.json'} is missing or damaged: {error}") from error
        before, after = (to_tensor(open_image(path / f"{seed}_{side}.jpg")) for side in (0, 1))
        return before, after, instruction
