"""Edits one after another (Sec. 5, Fig. 13): what is left, beside round trips of the autoencoder.

The miniature's world knows the scene after each edit. Three ways are measured, after k edits: each edit is made on the
result before it, as a user would; the true scene after k edits goes through the autoencoder once; and the first scene
goes through it k times, without any edit.
"""

from dataclasses import replace
from functools import partial

from cli import WHOLE

import numpy as np

from images import enlarge, grid, open_image, save_png
from mini import world
from mini.phrasings import PHRASINGS
from section4.edits import of_world
from section4.lab import Lab, add_models, world_only
from section4.methods import ours
from section4.report import row_of, rows_table, write_report
from section4.statistics import resamples
from training.plot import Curve, Panel

WAYS = {
    "edits": "edits, each on the result of the last", "trips": "round trips of the autoencoder, no edit",
    "once": "all edits true, one round trip",
}  # fmt: skip
SHOWN = 6  # chains on the sheet
TITLES = {"success": "success", "l1_outside": "L1 outside what changed", "l1_true": "L1 to the true image"}


def add_flags(parser):
    """The flags of `evaluate.py sequence`."""
    add_models(parser, 100)
    parser.add_argument("--length", type=WHOLE, default=5, metavar="K", help="edits in a row (default: %(default)s)")


def random_chain(number, length, seed):
    """`length` edits, each of the scene that the one before leaves; all scenes are held-out compositions."""
    rng, edits = np.random.default_rng([8_005, seed, number]), []
    while len(edits) < length:
        scene = edits[-1].after if edits else world.random_scene(rng, test=True)
        kinds = [kind for kind in world.KINDS if kind != ("remove" if len(scene.things) == 1 else "add")]
        kind = world.pick(rng, kinds)
        after, key, words = world.change(scene, kind, rng)
        if world.held_out(after):
            edits.append(world.Edit(kind, world.pick(rng, PHRASINGS[key]).format(**words), scene, after))
    return edits


def run(options):
    """Write the success after 1, 2, ... edits, as `write_report` does, and the first chains as a sheet."""
    world_only(options)
    lab, chains = Lab(options), [random_chain(number, options.length, options.seed) for number in range(options.count)]
    first = [of_world(chain[0]).load()[0] for chain in chains]
    edited, trips, rows, weights = first, first, [], resamples(len(chains))
    shown = [[image] for image in first[:SHOWN]]
    for k in range(options.length):
        steps = [following(chain[k], image, k) for chain, image in zip(chains, edited, strict=True)]
        edited = [open_image(path) for (path,) in lab.edited(steps, {f"edit_{k + 1}": partial(ours, lab, None)})]
        trips = lab.through_vae(trips)
        whole = [of_world(replace(chain[k], before=chain[0].before)) for chain in chains]
        still = [of_world(replace(chain[0], after=chain[0].before)) for chain in chains]
        once = lab.through_vae([case.load()[1] for case in whole])
        for way, cases, images in (("edits", whole, edited), ("once", whole, once), ("trips", still, trips)):
            scores = {name: np.array(values) for name, values in lab.score(cases, images).items()}
            rows.append(row_of(f"{WAYS[way]}: {k + 1}", scores, TITLES, weights) | {"way": way, "count": k + 1})
        for images, image, case in zip(shown, edited, whole, strict=False):
            images += [image, case.load()[1]]
    texts = ["# Edits one after another", f"`{options.command}`: {len(chains)} chains; in brackets 95 % intervals"]
    write_report(lab.out, "sequence", rows, [*texts, rows_table(rows, TITLES)], panels(rows))
    columns = ["input", *(title for k in range(options.length) for title in (f"after {k + 1}", "true"))]
    labels = [text for chain in chains[:SHOWN] for text in ("", *(t for edit in chain for t in (edit.instruction, "")))]
    images = [enlarge(image) for row in shown for image in row]
    save_png(grid(images, len(columns), labels, columns), lab.out / "sequence_images.png")


def following(edit, image, k):
    """The case of the edit number k of a chain, on the result of the one before; with other noise each time."""
    case = of_world(edit)
    return replace(case, seed=case.seed + k, load=lambda: (image, None))


def panels(rows):
    """Success, and the L1 outside, over the number of edits."""
    curves = {key: [] for key in ("success", "l1_outside")}
    for key, factor in (("success", 100), ("l1_outside", 1)):
        for way, name in WAYS.items():
            own = [row for row in rows if row["way"] == way]
            middle, low, high = (np.array([[row["count"], factor * row[k]] for row in own])
                                 for k in (key, f"{key}_low", f"{key}_high"))  # fmt: skip
            curves[key].append(Curve(name, middle, np.concatenate([low, high[::-1]])))
    x = "edits, or round trips"
    return [Panel(curves["success"], x, "success, %", "Is everything as it should be?"),
            Panel(curves["l1_outside"], x, TITLES["l1_outside"], "What is left of the rest")]  # fmt: skip
