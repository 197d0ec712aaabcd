"""A data set as one page: every pair with its numbers, and sliders that show what other thresholds would keep.

The page holds everything it needs, pictures included, and asks no network for anything. `data/browse.html` is its
form; what fills it is collected here.
"""

import base64
import json
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from configs import Config
from dataset import Filter, read_seeds
from errors import UserError, written_whole
from images import to_jpeg

FORM = Path(__file__).resolve().parent / "data/browse.html"
SIDE = 256  # pixels; larger pictures are made smaller, or a page of many would be huge
SIMILARITIES = ("clip_sim_0", "clip_sim_1", "clip_sim_image", "clip_sim_dir")


def write_page(root, out, count):
    """Write a page of at most about `count` pairs of the data set `root`, whole edits spread over all of it.

    Returns a line that says what is there. Raises UserError where `root` is no data set or the page cannot be written.
    """
    entries = read_seeds(root)
    total = sum(len(seeds) for _, seeds in entries)
    every = max(1, -(-total // count))
    chosen = [folder for folder, _ in entries[::every]]
    pairs, broken = [], 0
    for folder in chosen:
        try:
            pairs += pairs_of(root / folder)
        except (OSError, ValueError, KeyError, TypeError):  # Pillow and json say so of damaged files
            broken += 1
    candidates = candidates_of(root, {int(folder) for folder in chosen})
    settings = settings_of(root)
    data = {
        "title": root.resolve().name,
        "pairs": pairs,
        "candidates": candidates or [[pair[name] for name in ("edit_number", *SIMILARITIES)] for pair in pairs],
        "thresholds": {name: settings.get(f"min_{name}", own) for name, own in asdict(Filter()).items()},
        "keep": settings.get("keep", 4),
        "total": total,
    }
    # "<" could end the script that holds this
    filled = FORM.read_text(encoding="utf-8").replace('"DATA"', json.dumps(data).replace("<", "\\u003c"))
    with written_whole(out) as beside:
        beside.write_text(filled, encoding="utf-8")
    left = f"; {broken} damaged edits are left out" if broken else ""
    return f"{out}: {len(pairs)} of {total} pairs{left}"


def pairs_of(folder):
    """The pairs of one edit, as the page takes them."""
    prompt = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    pairs = []
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        noted = json.loads(line)
        pictures = [picture(folder / f"{noted['seed']}_{side}.jpg") for side in (0, 1)]
        numbers = {name: noted.get(name) for name in ("p2p_threshold", "cfg_scale", *SIMILARITIES)}
        texts = {name: str(prompt[name]) for name in ("caption", "edit", "output")}
        pairs.append({"edit_number": int(folder.name), "seed": noted["seed"], **texts, **numbers, "pictures": pictures})
    return pairs


def picture(path):
    """A picture file as a data URL: as it is, or smaller."""
    with Image.open(path) as image:
        image.load()
        data = path.read_bytes()
        if max(image.size) > SIDE:
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            data = to_jpeg(image.convert("RGB"), quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def candidates_of(root, numbers):
    """[edit's number, its similarities] of every candidate of these edits, kept or not, as far as they are noted."""
    rows = []
    for path in sorted(root.glob("candidates*.jsonl")):
        try:
            with open(path, encoding="utf-8") as file:
                for entry in map(json.loads, file):
                    if entry["edit"] in numbers:
                        scores = ([noted[name] for name in SIMILARITIES] for noted in entry["candidates"])
                        rows += [[entry["edit"], *four] for four in scores]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return rows


def settings_of(root):
    """How the data set was made, as far as it is noted: its thresholds and how many pairs of an edit it keeps."""
    path = root / "settings.json"
    return Config.read(path).values if path.exists() else {}
