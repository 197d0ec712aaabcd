"""What editors cannot do (Sec. 5, Fig. 13 and 14): places and numbers; and what they do with what is left open.

failures: instructions to move, swap and double things, whose true result the world knows. bias: "add a star" says
neither a colour nor a size; which ones come of it, beside those of the data?
"""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from cli import UserError

import numpy as np
import torch

from images import enlarge, grid, open_image, save_png, to_tensor
from language.captions import read_edits
from mini import world
from mini.datagen import triplet
from mini.evaluation import TOUCHED, held_out_edits, l1_outside, wilson
from mini.judge import ATTRIBUTES, right
from section4.edits import of_world
from section4.lab import Lab, add_models, world_only
from section4.methods import ours
from section4.report import rows_table, write_report
from training.plot import Curve, Panel

SHOWN = 4  # edits of each kind on the sheet
ORDINARY = "as in training"


def add_flags(parser):
    """The flags of `evaluate.py failures`."""
    add_models(parser, 100)


def add_bias_flags(parser):
    """The flags of `evaluate.py bias`."""
    add_models(parser, 300)
    data = "triplets that the editor was trained on, as datagen.py text writes them (default: the world's own)"
    parser.add_argument("--data", type=Path, metavar="FILE", help=data)


def hard_edit(kind, rng):
    """An edit of a random held-out scene: "move" a thing, "swap" two, or "double" one."""
    while True:
        scene = world.random_scene(rng, test=True)
        if len(scene.things) == (2 if kind == "swap" else 1):
            break
    shape, side = scene.things[0].shape, "right" if scene.left else "left"
    if kind == "move":
        return world.Edit(kind, f"move the {shape} to the {side}", scene, swapped(scene))
    if kind == "swap":
        return world.Edit(kind, f"swap the {shape} and the {scene.things[1].shape}", scene, swapped(scene))
    return world.Edit(kind, f"make it two {shape}s", scene, replace(scene, **{side: scene.things[0]}))


def swapped(scene):
    """A scene whose left and right are exchanged."""
    return replace(scene, left=scene.right, right=scene.left)


def run(options):
    """Write the successes of hard edits, as `write_report` does, and examples as a sheet."""
    world_only(options)
    lab, rng, rows, shown, labels = Lab(options), np.random.default_rng([8_006, options.seed]), [], [], []
    groups = {kind: [hard_edit(kind, rng) for _ in range(options.count)] for kind in ("move", "swap", "double")}
    groups[ORDINARY] = held_out_edits(-(-options.count // 14) * 14, options.seed)[: options.count]
    cases = {kind: [*map(of_world, edits)] for kind, edits in groups.items()}
    paths = lab.edited(sum(cases.values(), []), {"edited": partial(ours, lab, None)})
    images = [open_image(path) for (path,) in paths]
    for kind, edits in groups.items():
        own, images = images[: len(edits)], images[len(edits) :]
        pairs = [case.load() for case in cases[kind]]
        x, before, after = map(stacked, (own, *zip(*pairs, strict=True)))
        known = l1_outside(x, before, after)[0] <= TOUCHED
        good = right(lab.judge, x, [edit.after for edit in edits]) & known.numpy()
        same = right(lab.judge, x, [edit.before for edit in edits])
        rows.append({"name": kind, "count": len(edits), "instruction": edits[0].instruction})
        rows[-1] |= fraction("success", good) | fraction("unchanged_success", same)
        for number in range(min(SHOWN, len(edits))):
            shown += [pairs[number][0], own[number], pairs[number][1]]
            labels += ["", edits[number].instruction, ""]
    titles = {"instruction": "such as", "success": "success", "unchanged_success": "left as it was"}
    texts = ["# Places and numbers", f"`{options.command}`: {options.count} of a kind; in brackets 95 % intervals"]
    curves = [bars("success", rows, "success", -0.05), bars("left as it was", rows, "unchanged_success", 0.05)]
    panel = Panel(curves, "what is asked for", "edits, %", "Places and numbers", names=tuple(groups))
    write_report(lab.out, "failures", rows, [*texts, rows_table(rows, titles)], [panel])
    columns = ["input", "ours", "true"] * 2
    save_png(grid([enlarge(image) for image in shown], 6, labels, columns), lab.out / "failures_images.png")


def fraction(key, values):
    """The mean of bools [N] and its Wilson interval, as a row has them."""
    low, high = wilson(int(values.sum()), len(values))
    return {key: float(values.mean()), f"{key}_low": low, f"{key}_high": high}


def bars(name, rows, key, shift=0.0):
    """A curve of percentages, not joined, over the numbers of the rows, beside which there is room for another one."""
    points = np.array([[number + shift, 100 * row[key]] for number, row in enumerate(rows)])
    ends = 100 * np.array([[row[f"{key}_low"], row[f"{key}_high"]] for row in rows])
    return Curve(name, points, intervals=ends, joined=False)


def stacked(images):
    """RGB images -> [N, 3, H, W] in [-1, 1]."""
    return torch.stack([to_tensor(image) for image in images])


# ---- what is left open ----


def open_edit(rng):
    """An edit "add a star", without colour and size, of a held-out scene with one thing; its `after` is one of many."""
    while len((scene := world.random_scene(rng, test=True)).things) == 2:
        pass
    shape = world.pick(rng, world.SHAPES, but=[scene.things[0].shape])
    added = {free_side(scene): world.Thing(shape, "red", "large")}
    return world.Edit("add", f"add a {shape}", scene, replace(scene, **added))


def free_side(scene):
    """Where a scene with one thing has room."""
    return "right" if scene.left else "left"


def run_bias(options):
    """Write which colours and sizes are added, beside the data's, as `write_report` does."""
    world_only(options)
    lab, rng = Lab(options), np.random.default_rng([8_007, options.seed])
    edits, data = [open_edit(rng) for _ in range(options.count)], in_data(options.data, rng)
    paths = lab.edited([*map(of_world, edits)], {"edited": partial(ours, lab, None)})
    read = lab.judge.read(stacked([open_image(path) for (path,) in paths]).to(options.device)).tolist()
    found, added = {name: Counter() for name in OPEN}, 0
    for edit, classes in zip(edits, read, strict=True):
        values = {name: options[number] for (name, options), number in zip(ATTRIBUTES.items(), classes, strict=True)}
        side = free_side(edit.before)
        if values[f"{side} shape"] == getattr(edit.after, side).shape:
            added += 1
            for name in OPEN:
                found[name][values[f"{side} {name}"]] += 1
    rows, panels, tests = [], [], []
    for name, options_of in OPEN.items():
        own = [{"name": value, "attribute": name} | fractions(found[name], data[name], value) for value in options_of]
        rows += own
        chi, p = chi_squared([found[name][v] for v in options_of], [row["data_success"] for row in own])
        tests.append(f"{name}: chi-squared {chi:.1f}, p = {p:.2g} for choices as in the data")
        curves = [bars("the editor", own, "success", -0.08), bars("its data", own, "data_success", 0.08)]
        panels.append(Panel(curves, name, "of what is added, %", f'"add a star": which {name}?', names=options_of))
    texts = ["# What an instruction leaves open", f"`{options.command}`: {added} of {len(edits)} edits added the thing"]
    titles = {"success": "the editor", "data_success": "its data"}
    write_report(lab.out, "bias", rows, [*texts, rows_table(rows, titles), *tests], panels)


OPEN = {"colour": tuple(world.COLOURS), "size": tuple(world.SIZES)}
ADDED = re.compile(rf"({'|'.join(OPEN['size'])}) ({'|'.join(OPEN['colour'])}) ({'|'.join(world.SHAPES)})")


def in_data(path, rng):
    """How often the instructions of a file of triplets name each size and colour of what they add.

    path None: 5,000 random edits of the world, as the miniature was trained on. Raises UserError.
    """
    edits = read_edits(path) if path else [triplet(world.random_edit(rng, "add")) for _ in range(5000)]
    named = [match for edit in edits if (match := ADDED.search(edit["edit"]))]
    if not named:
        raise UserError(f"{path} holds no edits that add a thing of the miniature's world")
    return {"size": Counter(match[1] for match in named), "colour": Counter(match[2] for match in named)}


def fractions(found, data, value):
    """The shares of a value among an editor's and the data's choices, two Counters, as a row has them."""
    shares = {}
    for key, counts in (("success", found), ("data_success", data)):
        shares |= fraction(key, np.arange(max(1, counts.total())) < counts[value])
    return shares


def chi_squared(counts, shares):
    """Pearson's statistic of counts against expected shares, and the probability of one as large (a large N)."""
    counts, shares = np.array(counts, dtype=float), np.array(shares)
    expected = counts.sum() * shares
    with np.errstate(divide="ignore", invalid="ignore"):  # infinite for a choice that the data never makes
        statistic = np.nansum((counts - expected) ** 2 / expected)
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(statistic), float(torch.special.gammaincc(half[0], half[1]))
