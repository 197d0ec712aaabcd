"""A data set as one page: every pair with its numbers, and sliders that show what other thresholds would keep.

The page holds everything it needs, images included, and asks no network for anything. `browse.html` is its body.
"""

from dataclasses import asdict

from cli import UserError

from dataset import Filter, read_metadata, read_prompt, read_seeds
from formats.configs import Config
from images import open_image
from pages.form import jpeg_url, write

SIDE = 256  # larger images are made smaller, or a page of many would be huge
NUMBERS = ("p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_image", "clip_sim_dir")


def write_page(root, out, count):
    """Write a page of at most about `count` pairs of the data set `root`, whole edits spread over all of it.

    Where candidates.jsonl holds the similarities of every candidate, kept or not, they are on the page as well.
    Returns a line that says what is there. Raises UserError where `root` is no data set.
    """
    every = sorted(path.parent for path in root.glob("[0-9]*/candidates.jsonl"))
    noted = [(folder.name, [line["seed"] for line in read_metadata(folder / "metadata.jsonl")]) for folder in every]
    listed = noted or read_seeds(root)
    total = sum(len(seeds) for _, seeds in listed)
    edits, broken = [], 0
    for folder, seeds in listed[:: max(1, -(-total // count))]:
        try:
            edits.append(page_edit(root / folder, [str(seed) for seed in seeds]))
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            broken += 1
    settings = Config.read(root / "settings.json").values if (root / "settings.json").exists() else {}
    data = {
        "title": root.resolve().name,
        "edits": edits,
        "every": bool(every),  # are candidates that were not kept among them?
        "thresholds": {name: settings.get(f"min_{name}", own) for name, own in asdict(Filter()).items()},
        "keep": settings.get("keep", 4),
        "total": total,
    }
    write("browse.html", data, out)
    pairs = sum(len(edit["pairs"]) for edit in edits)
    return f"{out}: {pairs} of {total} pairs" + (f"; {broken} damaged edits are skipped" if broken else "")


def page_edit(folder, seeds):
    """One edit, as the page takes it. pairs: (place among the candidates, seed, images); unknown NUMBERS are None."""
    prompt = read_prompt(folder)
    prompt = {"caption": prompt.get("input", ""), "output": "", **prompt}  # the authors' older files say input
    files = [folder / "candidates.jsonl", folder / "metadata.jsonl"]
    known = next((read_metadata(path) for path in files if path.exists()), [])
    scores = {seed: {} for seed in seeds} | {str(line["seed"]): line for line in known}
    pairs = []
    for seed in seeds:
        images = [open_image(folder / f"{seed}_{side}.jpg") for side in (0, 1)]
        for image in images:
            image.thumbnail((SIDE, SIDE))
        pairs.append([list(scores).index(seed), seed, [jpeg_url(image) for image in images]])
    candidates = [{name: scored.get(name) for name in NUMBERS} for scored in scores.values()]
    texts = {name: str(prompt[name]) for name in ("caption", "edit", "output")}
    return {"folder": folder.name, "candidates": candidates, "pairs": pairs, **texts}
