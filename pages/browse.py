"""A data set as one page: every pair with its numbers, and sliders that show what other thresholds would keep.

The page holds everything it needs, pictures included, and asks no network for anything. `data/browse.html` is its
form; what fills it is collected here.
"""

import base64
import json
import re
from dataclasses import asdict
from pathlib import Path

from cli import UserError, atomic_write
from dataset import Filter, read_metadata, read_seeds
from formats.configs import Config
from images import open_image, to_jpeg

FORM = Path(__file__).resolve().parent / "browse.html"
SIDE, BYTES = 256, 30_000  # larger pictures are made smaller, or a page of many would be huge
NUMBERS = ("p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_image", "clip_sim_dir")


def write_page(root, out, count):
    """Write a page of about `count` pairs of the data set `root` at most, whole edits spread over all of it.

    Where every candidate's similarities are noted (datagen.py does so), they are on it for these edits, and for those
    between them of which nothing was kept. Returns a line that says what is there. Raises UserError where `root` is no
    data set or the page cannot be written.
    """
    logs = sorted(root.glob("candidates*.jsonl"))
    edits = edits_of_logs(logs) if logs else [(folder, seeds, None) for folder, seeds in read_seeds(root)]
    total = sum(len(seeds) for _, seeds, _ in edits)
    chosen = edits[:: max(1, -(-total // count))]
    pairs, candidates, broken = [], [], 0
    for index, (folder, seeds, line) in enumerate(chosen):
        try:
            found = pairs_of(root / folder, index, seeds)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            found, broken = [], broken + 1
        pairs += found
        scores = read_candidates(*line) if line else found
        candidates += [[index, *(scored.get(name) for name in NUMBERS[2:])] for scored in scores]
    settings = Config.read(root / "settings.json").values if (root / "settings.json").exists() else {}
    data = {
        "title": root.resolve().name,
        "pairs": pairs,
        "candidates": candidates,
        "every": bool(logs),  # are candidates that were not kept among them?
        "thresholds": {name: settings.get(f"min_{name}", own) for name, own in asdict(Filter()).items()},
        "keep": settings.get("keep", 4),
        "total": total,
    }
    # "<" could end the script that holds this
    filled = FORM.read_text(encoding="utf-8").replace('"DATA"', json.dumps(data).replace("<", "\\u003c"))
    with atomic_write(out) as beside:
        beside.write_text(filled, encoding="utf-8")
    left = f"; {broken} damaged edits are left out" if broken else ""
    return f"{out}: {len(pairs)} of {total} pairs{left}"


def edits_of_logs(logs):
    """[(folder, kept seeds, (file, offset of its line))] of every edit, in order; a torn last line is left out.

    Such lists may be larger than memory, so of each line only the start is looked at.
    """
    edits = {}
    for path in logs:
        offset = 0
        with open(path, "rb") as file:
            for line in file:
                start = re.match(rb'\{"edit": (\d+), "kept": \[([\d, ]*)\]', line)
                if not start and line.endswith(b"\n"):
                    raise UserError(f"{path} is damaged; remove it, and datagen.py makes its edits anew")
                if start and line.endswith(b"\n"):
                    number = int(start[1])
                    edits[number] = (f"{number:07d}", start[2].decode().replace(",", " ").split(), (path, offset))
                offset += len(line)
    return [edits[number] for number in sorted(edits)]


def read_candidates(path, offset):
    """What is noted of an edit's candidates, in the line that starts there. Raises UserError."""
    with open(path, "rb") as file:
        file.seek(offset)
        try:
            return [dict(noted) for noted in json.loads(file.readline())["candidates"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged; remove it, and datagen.py makes its edits anew ({error})") from error


def pairs_of(folder, index, seeds):
    """The pairs of one edit, as the page takes them; what is not noted of a pair is None."""
    prompt = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    texts = {
        "caption": str(prompt.get("caption", prompt.get("input", ""))),  # the authors' older files call it input
        "edit": str(prompt["edit"]),
        "output": str(prompt.get("output", "")),
    }
    path = folder / "metadata.jsonl"
    known = {str(noted["seed"]): noted for noted in read_metadata(path)} if path.exists() else {}
    pairs = []
    for seed in seeds:
        noted = known.get(seed, {})
        pictures = [picture(folder / f"{seed}_{side}.jpg") for side in (0, 1)]
        numbers = {name: noted.get(name) for name in NUMBERS}
        pairs.append({"index": index, "folder": folder.name, "seed": seed, **texts, **numbers, "pictures": pictures})
    return pairs


def picture(path):
    """A picture file as a data URL: as it is, or smaller."""
    image, data = open_image(path), path.read_bytes()
    if max(image.size) > SIDE or len(data) > BYTES:
        image.thumbnail((SIDE, SIDE))
        data = to_jpeg(image, quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
