"""The price list: success against how often the UNet is evaluated for an edit, by sampler, steps and savings.

Where several settings cost the same, the best of them counts; the default should be the cheapest whose success is
within a point of the best.
"""

from copy import copy
from functools import partial

from cli import SAMPLERS

import numpy as np
import torch

from gpu.savings import Savings
from section4.edits import find_cases
from section4.lab import Lab, add_models, world_only
from section4.methods import ours
from section4.report import row_of, rows_table, write_report
from section4.statistics import resamples
from training.plot import Curve, Panel

STEPS = 4, 6, 8, 10, 14, 20, 30, 50
SAVED = {
    "null-2": Savings(null_every=2), "null-4": Savings(null_every=4), "deep-2": Savings(deep_every=2),
    "deep-3": Savings(deep_every=3), "interval": Savings(cfg_above=0.3, cfg_below=6.0),
    "null-4, deep-2": Savings(null_every=4, deep_every=2),
}  # fmt: skip
TITLES = {"evaluations": "UNet evaluations", "success": "success", "l1_outside": "L1 outside", "direction": "direction"}


def add_flags(parser):
    """The flags of `evaluate.py prices`."""
    add_models(parser, 600, 60)


def run(options):
    """Measure every setting on held-out edits of the world, and write the list as `write_report` does."""
    world_only(options)
    lab, cases = Lab(options), find_cases(options, options.count)
    own, steps = lab.editor.sampling, options.steps or lab.editor.sampling.steps
    settings = {f"{name} {count}": {"sampler": name, "steps": count} for name in SAMPLERS for count in STEPS}
    settings["authors: 100 steps"] = {"sampler": "euler_ancestral", "steps": 100}
    for name in ("euler_ancestral", "unipc"):
        for saving, saved in SAVED.items():
            settings[f"{name} {steps}, {saving}"] = {"sampler": name, "steps": steps, "savings": saved}
    jobs = {name: partial(ours, lab, own.image_guidance, **how) for name, how in settings.items()}
    found = lab.run(cases, jobs)
    weights, keys, rows = resamples(len(cases)), ("success", "l1_outside", "direction"), []
    for name, how in settings.items():
        row = row_of(name, found[name], keys, weights)
        rows.append(row | {"evaluations": evaluations(lab.editor, **how), "sampler": how["sampler"]})
    rows.sort(key=lambda row: row["evaluations"])
    best = max(row["success"] for row in rows)
    chosen = next(row for row in rows if row["success"] >= best - 0.01)
    texts = ["# Success against what an edit costs", f"`{options.command}`: {len(cases)} held-out edits"]
    texts.append(f"The cheapest within a point of the best, {100 * best:.1f} %: {chosen['name']}")
    write_report(lab.out, "prices", rows, [*texts, rows_table(rows, TITLES)], [panel(rows, len(cases))])


def evaluations(editor, sampler, steps, savings=None):
    """How many rows the UNet computes for one edit: three branches a step, but for what savings leave out.

    A row whose inner levels are left out counts in full, though it is cheaper.
    """
    rows, counting = 0, copy(editor)

    def count(z, *more, **options):
        nonlocal rows
        rows += len(z)
        return torch.zeros_like(z[:, : editor.unet.config.out_channels])

    counting.predict_eps = count
    side = editor.sampling.resolution // editor.vae.config.factor
    latent = torch.zeros(1, editor.vae.config.latent_channels, side, side)
    counting.sample(editor.null_text, latent, [0], 2.0, 1.5, steps, sampler=sampler, savings=savings)
    return rows


def panel(rows, count):
    """The plot: a curve a sampler, with intervals, and a dot for each saving."""
    curves = []
    for sampler in SAMPLERS:
        own = [row for row in rows if row["sampler"] == sampler and "," not in row["name"]]
        points = np.array([(row["evaluations"], 100 * row["success"]) for row in own])
        ends = 100 * np.array([(row["success_low"], row["success_high"]) for row in own])
        curves.append(Curve(sampler, points, intervals=ends if sampler == "euler_ancestral" else None))
    saved = [row for row in rows if "," in row["name"]]
    points = np.array([(row["evaluations"], 100 * row["success"]) for row in saved])
    curves.append(Curve("savings", points, joined=False, notes=tuple(row["name"].partition(", ")[2] for row in saved)))
    return Panel(curves, "UNet evaluations an edit", "success, %", f"{count:,} held-out edits")
