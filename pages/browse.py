"""A data set as one page: every pair with its numbers, and sliders that show what other thresholds would keep.

The page holds everything it needs, images included, and asks no network for anything. `browse.html` is its form.
"""

import json
from dataclasses import asdict

from cli import UserError, atomic_write

from dataset import Filter, read_metadata, read_seeds
from formats.configs import Config
from images import open_image, to_jpeg
from pages.form import data_url, fill

SIDE, BYTES = 256, 30_000  # larger images are made smaller, or a page of many would be huge
NUMBERS = ("p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_image", "clip_sim_dir")


def write_page(root, out, count):
    """Write a page of at most about `count` pairs of the data set `root`, whole edits spread over all of it.

    Where candidates.jsonl holds the similarities of every candidate, kept or not, they are on the page as well.
    Returns a line that says what is there. Raises UserError where `root` is no data set.
    """
    every = sorted(path.parent for path in root.glob("[0-9]*/candidates.jsonl"))
    noted = [(folder.name, [line["seed"] for line in read_metadata(folder / "metadata.jsonl")]) for folder in every]
    edits = noted or read_seeds(root)
    total = sum(len(seeds) for _, seeds in edits)
    pairs, candidates, broken = [], [], 0
    for index, (folder, seeds) in enumerate(edits[:: max(1, -(-total // count))]):
        try:
            found = pairs_of(root / folder, index, seeds)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            found, broken = [], broken + 1
        pairs += found
        scores = read_metadata(root / folder / "candidates.jsonl") if every else found
        candidates += [[index, *(scored.get(name) for name in NUMBERS)] for scored in scores]
    settings = Config.read(root / "settings.json").values if (root / "settings.json").exists() else {}
    data = {
        "title": root.resolve().name,
        "pairs": pairs,
        "candidates": candidates,
        "every": bool(every),  # are candidates that were not kept among them?
        "thresholds": {name: settings.get(f"min_{name}", own) for name, own in asdict(Filter()).items()},
        "keep": settings.get("keep", 4),
        "total": total,
    }
    with atomic_write(out) as beside:
        beside.write_text(fill("browse.html", data), encoding="utf-8")
    return f"{out}: {len(pairs)} of {total} pairs" + (f"; {broken} damaged edits are skipped" if broken else "")


def pairs_of(folder, index, seeds):
    """The pairs of one edit, as the page takes them; what is not known of a pair is None."""
    prompt = json.loads((folder / "prompt.json").read_text(encoding="utf-8-sig"))
    prompt = {"caption": prompt.get("input", ""), "output": "", **prompt}  # the authors' older files say input
    texts = {name: str(prompt[name]) for name in ("caption", "edit", "output")}
    path = folder / "metadata.jsonl"
    known = {str(line["seed"]): line for line in read_metadata(path)} if path.exists() else {}
    pairs = []
    for seed in map(str, seeds):
        images = [image_url(folder / f"{seed}_{side}.jpg") for side in (0, 1)]
        numbers = {name: known.get(seed, {}).get(name) for name in NUMBERS}
        pairs.append({"index": index, "folder": folder.name, "seed": seed, **texts, **numbers, "images": images})
    return pairs


def image_url(path):
    """An image file as a data URL: as it is, or smaller."""
    image, data = open_image(path), path.read_bytes()
    if max(image.size) > SIDE or len(data) > BYTES:
        image.thumbnail((SIDE, SIDE))
        data = to_jpeg(image, quality=90)
    return data_url(data)
