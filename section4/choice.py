"""How good is `sample.py --best N`? One sample, the best of N by a signal, and by an oracle that knows success."""

from functools import partial

from cli import WHOLE

import numpy as np
import torch

from dataset import Filter
from editing.best import agreement, candidates, directional
from formats import hub
from images import open_image, to_tensor
from section4.edits import find_cases
from section4.lab import Lab, add_models, world_only
from section4.methods import ours
from section4.report import row_of, rows_table, write_report
from section4.statistics import resamples
from training.plot import Curve, Panel

WAYS = {
    "one": "one sample", "direction": "by directional similarity (needs captions)", "agreement": "by agreement",
    "least": "by least change", "oracle": "by the truth",
}  # fmt: skip


def add_flags(parser):
    """The flags of `evaluate.py best`."""
    add_models(parser, 252)
    parser.add_argument("--best", type=WHOLE, default=8, metavar="N", help="candidates (default: %(default)s)")


def run(options):
    """Write the success of each way over the number of candidates, as `write_report` does."""
    world_only(options)
    cases, lab = find_cases(options, options.count), Lab(options)
    own, floor = lab.editor.sampling, Filter.read(hub.find(options.clip[0], "clip")).image_image
    settings = candidates(options.best, own.text_guidance, own.image_guidance, 0)
    jobs = {f"candidate_{number:02d}": partial(candidate, lab, *one) for number, one in enumerate(settings)}
    counts = sorted({min(2**power, options.best) for power in range(11)})
    chosen = {(way, count): [] for count in counts for way in WAYS}  # success of the one that is chosen, for each case
    for case, paths in zip(cases, lab.edited(cases, jobs), strict=True):
        images = [open_image(path) for path in paths]
        scores = {key: torch.tensor(values) for key, values in lab.score([case] * len(images), images).items()}
        x = torch.stack([to_tensor(image) for image in images])
        for way, count in chosen:
            best = int(signal(way, {key: values[:count] for key, values in scores.items()}, x[:count], floor).argmax())
            chosen[way, count].append(scores["success"][best].item())
    rows, weights = [], resamples(len(cases))
    for (way, count), successes in chosen.items():
        row = row_of(f"{WAYS[way]}, N = {count}", {"success": np.array(successes)}, ["success"], weights)
        rows.append(row | {"way": way, "count": count})
    curves = []
    for way, name in WAYS.items():
        middle, low, high = (np.array([[row["count"], 100 * row[key]] for row in rows if row["way"] == way])
                             for key in ("success", "success_low", "success_high"))  # fmt: skip
        curves.append(Curve(name, middle, np.concatenate([low, high[::-1]]) if way in ("one", "oracle") else None))
    panel = Panel(curves, "candidates", "success, %", f"The best of N, {len(cases):,} edits")
    texts = ["# The best of N samples", f"`{options.command}`: {len(cases)} edits; in brackets 95 % intervals"]
    write_report(lab.out, "best", rows, [*texts, rows_table(rows, {"success": "success"})], [panel])


def candidate(lab, text_guidance, image_guidance, seed, cases):
    """One candidate of each case; its seed counts from the case's own."""
    seeds = [case.seed + seed for case in cases]
    return ours(lab, image_guidance, cases, text_guidance=text_guidance, seed=seeds)


def signal(way, scores, x, floor):
    """How good one of WAYS takes candidates for, [N]: from their scores of `Lab.score` and images x [N, 3, H, W]."""
    return {
        "one": lambda: -torch.arange(len(x)).float(),
        "direction": lambda: directional(scores["image"], scores["direction"], floor),
        "agreement": lambda: agreement(x),
        "least": lambda: -scores["l1_input"],
        "oracle": lambda: scores["success"],
    }[way]()
