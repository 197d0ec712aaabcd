"""MagicBrush's five metrics on images that lie in its layout, by the definitions of its published script.

    GENERATED/139/139_1.png        the first turn's edit; alone where there is one turn
    GENERATED/139/139_inde_2.png   the second turn's, of the true image of the first one
    GENERATED/139/139_iter_2.png   the second turn's, of the model's own edit of the first one
    TRUTH/139/139-output1.png      the true images of all turns
    CAPTIONS                       {"139": {"139-output1.png": "what this image shows"}}

Single-turn is the mean over all turns that begin at a true image, multi-turn over the last image of every session.
L1 and L2 (squared): of colours in [0, 1], the edit as large as the true image. CLIP-I and DINO: the cosine of both
images' features; CLIP-T: of the edit's and the caption's.
"""

import re
from pathlib import Path

from cli import WHOLE, UserError, keep_settings, reported_as

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from formats.checkpoint import load_clip, load_dino
from images import open_image, to_tensor
from section4.lab import joined, read_json, write_json
from section4.report import row_of, rows_table, write_report
from section4.statistics import resamples
from training.plot import Curve, Panel

PUBLISHED = {  # of InstructPix2Pix, single-turn (Zhang et al. 2023, Table 3)
    "l1": 0.1122, "l2": 0.0371, "clip_i": 0.8524, "dino": 0.7428, "clip_t": 0.2764,
}  # fmt: skip
TITLES = {"l1": "L1", "l2": "L2", "clip_i": "CLIP-I", "dino": "DINO", "clip_t": "CLIP-T"}


def add_flags(parser):
    """The flags of `evaluate.py magicbrush`."""
    add = parser.add_argument
    add("--generated", type=Path, required=True, metavar="DIR", help="the edits: DIR/ID/ID_1.png, ID_inde_2.png, ...")
    add("--truth", type=Path, required=True, metavar="DIR", help="MagicBrush's images: DIR/ID/ID-output1.png, ...")
    add("--captions", type=Path, required=True, metavar="FILE", help="its local_descriptions.json or global_...")
    add("--clip", default="clip-b32", metavar="DIR", help="CLIP ViT-B/32 (default: %(default)s)")
    add("--dino", default="dino", metavar="DIR", help="DINO ViT-S/16 (default: %(default)s)")
    add("--batch-size", type=WHOLE, default=16, metavar="B", help="images at a time (default: %(default)s)")


def run(options):
    """Write both settings' means beside the published ones, as `write_report` does."""
    turns = find_turns(options.generated, options.truth, options.captions)
    models = load_clip(options.clip, options.device), load_dino(options.dino, options.device)
    keep_settings(options.out / "settings.json", vars(options), noted=("command", "device", "threads", "out"))
    pairs = sorted({pair for some in turns.values() for pair in some})
    size, parts = options.batch_size, []
    for start in tqdm(range(0, len(pairs), size), unit="batch"):
        path = options.out / "scores" / f"{start:06d}.json"
        if not path.exists():
            write_json(path, measure(*models, *zip(*pairs[start : start + size], strict=True)))
        parts.append(read_json(path))
    scores, rows = joined(parts), []
    for name, some in turns.items():
        if some:
            own = {key: values[[pairs.index(pair) for pair in some]] for key, values in scores.items()}
            rows.append(row_of(f"{name}, {len(some)} images", own, [*TITLES, "clip_t_true"], resamples(len(some))))
    rows.append({"name": "published, InstructPix2Pix, single-turn"} | PUBLISHED)
    texts = ["# MagicBrush's metrics", f"`{options.command}`; in brackets 95 % intervals over the images"]
    curves = []
    for number, row in enumerate(rows):
        points = [[place + 0.08 * (number - 1), row[key]] for place, key in enumerate(TITLES)]
        ends = [[row.get(f"{key}_low", row[key]), row.get(f"{key}_high", row[key])] for key in TITLES]
        curves.append(Curve(row["name"], np.array(points), intervals=np.array(ends), joined=False))
    panel = Panel(curves, "metric", "mean", "MagicBrush", names=tuple(TITLES.values()))
    titles = TITLES | {"clip_t_true": "CLIP-T of the true image"}
    write_report(options.out, "magicbrush", rows, [*texts, rows_table(rows, titles, digits=4)], [panel])


def find_turns(generated, truth, captions):
    """{"single-turn", "multi-turn": [(edit, true image, caption), ...]}, paths and texts. Raises UserError.

    There is no multi-turn where a session lacks the image of its last turn.
    """
    with reported_as(f"{captions} cannot be read"):
        texts = read_json(captions)
    folders = [{path.name for path in root.iterdir() if path.is_dir()} for root in (generated, truth)]
    if alone := sorted(folders[0] ^ folders[1]):
        raise UserError(f"{generated} and {truth} need the same folders; {alone[0]} is in one of them alone")
    single, multi, whole = [], [], True
    for name in sorted(folders[0]):
        edits = numbered(generated / name, rf"{re.escape(name)}_(?:inde_)?(\d+)\.(?:png|jpg)")
        images = numbered(truth / name, r".*output\D*(\d+)\.(?:png|jpg)")
        chained = numbered(generated / name, rf"{re.escape(name)}_iter_(\d+)\.(?:png|jpg)")
        if not images or edits.keys() != images.keys():
            raise UserError(f"{generated / name} holds {len(edits)} single edits, {truth / name} {len(images)} outputs")
        with reported_as(f"{captions} lacks a caption of {name}"):
            known = {turn: (str(path), texts[name][path.name]) for turn, path in images.items()}
        single += [(str(path), *known[turn]) for turn, path in sorted(edits.items())]
        last = max(images)
        path = chained.get(last) if last > 1 else edits[1]
        multi += [(str(path), *known[last])]
        whole = whole and path is not None
    return {"single-turn": single, "multi-turn": multi if whole else []}


def numbered(folder, pattern):
    """{its number: a file's path} for the files in a folder whose whole name matches; without masks."""
    found = ((re.fullmatch(pattern, path.name), path) for path in folder.iterdir() if "mask" not in path.name)
    return {int(match[1]): path for match, path in found if match}


@torch.no_grad()
def measure(clip, dino, edits, images, captions):
    """Paths of edits and of true images, and these images' captions -> {metric: list of N numbers}.

    clip: (CLIP, its tokenizer). clip_t_true: CLIP-T of the true images, the most that an edit can be expected to reach.
    """
    (clip, tokenizer), device = clip, clip[0].logit_scale.device
    edits, images = ([open_image(path) for path in paths] for paths in (edits, images))
    scores = {"l1": [], "l2": []}
    for edit, image in zip(edits, images, strict=True):
        ours, true = (np.asarray(one, dtype=np.float32) / 255 for one in (edit.resize(image.size), image))
        scores["l1"].append(float(np.abs(ours - true).mean()))
        scores["l2"].append(float(np.square(ours - true).mean()))
    text = clip.text.features(tokenizer(list(captions)).to(device))
    for name, tower, larger in (("clip_i", clip.image, 1), ("dino", dino, 256 / 224)):
        ours, true = (tower(cropped(tower, some, larger).to(device)) for some in (edits, images))
        scores[name] = F.cosine_similarity(ours, true).tolist()
        if tower is clip.image:
            scores["clip_t"], scores["clip_t_true"] = (F.cosine_similarity(x, text).tolist() for x in (ours, true))
    return scores


def cropped(tower, images, larger):
    """RGB images -> what a tower takes: the shorter side resized to `larger` times its input, the middle cut out."""
    size, rows = tower.config.size, []
    for image in images:
        short = round(size * larger)
        scaled = [int(short * side / min(image.size)) for side in image.size]
        left, top = (round((side - size) / 2) for side in scaled)
        square = image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        rows.append((to_tensor(square) + 1) / 2)
    return tower.normalise(torch.stack(rows))
