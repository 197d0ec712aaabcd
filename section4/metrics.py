"""Which metric tells the truth? The miniature's world knows whether an edit succeeded, so metrics can be judged by it.

Editors of graded quality edit the same images. Of single edits: how often has a success the larger value than a failure
(the area under the ROC curve; 50 % is chance)? Of editors: does the mean value rank them as success does, and as the
damage outside the edit does (Spearman's rank correlation)?
"""

from functools import partial

from cli import UserError

import numpy as np

from images import open_image
from section4.edits import find_cases
from section4.lab import Lab, add_models, joined, read_json, world_only, write_json
from section4.methods import METHODS, ours
from section4.report import row_of, rows_table, write_report
from section4.statistics import auc, interval, resamples, spearman
from training.plot import COLOURS, Curve, Panel

METRICS = {  # score: its name in the report, and 1 or -1: is more or less of it good?
    "direction": ("CLIP directional similarity", 1), "image": ("CLIP image similarity", 1),
    "product": ("product of both CLIP similarities", 1), "caption": ("CLIP similarity to the caption after", 1),
    "l1_input": ("L1 to the input", -1), "l1_true": ("L1 to the true image", -1),
    "vision": ("a vision-language model", 1),
}  # fmt: skip
TEXT_FACTORS, IMAGE_FACTORS, STEPS = (0.25, 0.5, 1, 2, 4), (0.7, 1, 1.4), (1, 2, 4)
GROUPS = {
    "scales": "ours, guidance scales", "steps": "ours, few steps", "other": "other editors", "baselines": "baselines",
    "known": "no editor",
}  # fmt: skip
TITLES = {
    "auc_success": "single edits: a success above a failure", "rank": "editors: rank as by success",
    "rank_outside": "editors: rank as by least L1 outside",
}  # fmt: skip
FEWER = 200  # resamples, for the areas, which take long


def add_flags(parser):
    """The flags of `evaluate.py metrics`."""
    add_models(parser, 252)
    add, vision = parser.add_argument, "a vision-language model at OPENAI_BASE_URL (default: none)"
    add("--checkpoints", nargs="+", default=[], metavar="PATH", help="more editors, as those of a training")
    add("--vision", metavar="MODEL", help=vision)


def run(options):
    """Write the table of all metrics, as `write_report` does, and a figure of the editors."""
    world_only(options)
    cases, lab = find_cases(options, options.count), Lab(options)
    groups = editors(lab)
    scores = measured(lab, cases, {name: edit for some in groups.values() for name, edit in some.items()})
    known = {key: METRICS[key] for key in METRICS if key in next(iter(scores.values()))}
    values = {key: sign * np.array([one[key] for one in scores.values()]) for key, (_, sign) in known.items()}
    truth = {key: np.array([one[key] for one in scores.values()]) for key in ("success", "l1_outside")}
    if len(np.unique(truth["success"])) < 2:
        raise UserError("no edit succeeds, or every one does, so that no metric can be judged; take more edits")
    rows = [{"name": title} | judged(values[key], truth) for key, (title, _) in known.items()]
    weights = resamples(len(cases))
    own = {name: row_of(name, one, ["success", "l1_outside", *known], weights) for name, one in scores.items()}
    texts = ["# Which metric tells the truth?", f"`{options.command}`: {len(own)} editors, {len(cases)} edits each"]
    texts += [rows_table(rows, TITLES), conclusion(rows)]
    texts.append(rows_table(own.values(), {"success": "success"} | {key: title for key, (title, _) in known.items()}))
    write_report(lab.out, "metrics", rows, texts, panels(groups, own, rows))
    write_json(lab.out / "editors.json", [*own.values()])


def editors(lab):
    """{group: {name: a function of cases -> images}}: at least 20 editors of graded quality."""
    own, groups = lab.editor.sampling, {group: {} for group in GROUPS}
    for s_t in TEXT_FACTORS:
        for s_i in IMAGE_FACTORS:
            scales = s_t * own.text_guidance, s_i * own.image_guidance
            edit = partial(ours, lab, scales[1], text_guidance=scales[0])
            groups["scales"][f"s_T {scales[0]:g}, s_I {scales[1]:g}"] = edit
    groups["steps"] = {f"{steps} steps": partial(ours, lab, None, steps=steps) for steps in STEPS}
    for number, path in enumerate(lab.options.checkpoints):
        groups["other"][f"checkpoint {number + 1}"] = partial(ours, lab.with_editor(path), None)
    for name, values in (("sdedit", (0.3, 0.5, 0.7)), ("p2p-caption", (0.3, 0.7))):
        for value in values:
            groups["baselines"][f"{name} {value:g}"] = partial(METHODS[name].edit, lab, value)
    groups["known"] = {
        "copy the input": lambda some: [case.images(lab.side)[0] for case in some],
        "true image": lambda some: [case.images(lab.side)[1] for case in some],
        "true image, autoencoder": lambda some: lab.through_vae([case.images(lab.side)[1] for case in some]),
    }
    return groups


def measured(lab, cases, jobs):
    """{name of a job: {score: array [N]}}, with the product and, if one is asked, a vision-language model's marks."""
    paths, scores, size = lab.edited(cases, jobs), {}, lab.options.batch_size
    for column, name in enumerate(jobs):
        images = [open_image(own[column]) for own in paths]
        batches = range(0, len(cases), size)
        scores[name] = joined(lab.score(cases[i : i + size], images[i : i + size]) for i in batches)
        scores[name]["product"] = scores[name]["direction"] * scores[name]["image"]
        if lab.options.vision:
            path = lab.out / "vision" / f"{name}.json"
            if not path.exists():
                from section4.vision import rate  # here, since the client takes seconds to load

                triples = [(case.load()[0], image, case.instruction) for case, image in zip(cases, images, strict=True)]
                write_json(path, rate(lab.options.vision, triples))
            scores[name]["vision"] = np.array(read_json(path))
    return scores


def judged(values, truth):
    """How well a metric's values [editors, edits], more being better, tell the truth, with bootstrap intervals."""
    weights, success = resamples(values.shape[1]), truth["success"]
    areas = [auc(values.ravel(), success.ravel(), np.tile(some, len(values))) for some in weights[:FEWER]]
    found = {"auc_success": (auc(values.ravel(), success.ravel()), np.array(areas))}
    for key, good in (("rank", success), ("rank_outside", -truth["l1_outside"])):
        many = spearman((values @ weights.T).T, (good @ weights.T).T)
        found[key] = spearman(values.mean(axis=1), good.mean(axis=1)), many
    row = {}
    for key, (value, many) in found.items():
        low, high = interval(many)
        row |= {key: float(value), f"{key}_low": float(low), f"{key}_high": float(high)}
    return row


def conclusion(rows):
    """What a practitioner can use."""
    usable = [row for row in rows if row["name"] != METRICS["l1_true"][0]]
    single, editor, rest = (max(usable, key=lambda row: row[key]) for key in TITLES)
    return (
        f"Without the true image: to tell a good edit from a bad one, take the {single['name']} (right in "
        f"{100 * single['auc_success']:.0f} % of pairs); to rank editors by success, the {editor['name']} (rank "
        f"correlation {editor['rank']:.2f}); the least damage elsewhere shows best in the {rest['name']} "
        f"({rest['rank_outside']:.2f})."
    )


def panels(groups, own, rows):
    """Success over the mean of each metric, a point for each editor; the metrics in the order of `rows`."""
    drawn = []
    for key, row in [(key, row) for key, (title, _) in METRICS.items() for row in rows if row["name"] == title]:
        curves = []
        for colour, (group, some) in zip(COLOURS, groups.items(), strict=False):
            points = np.array([[own[name][key], 100 * own[name]["success"]] for name in some]).reshape(-1, 2)
            curves.append(Curve(GROUPS[group], points, joined=False, colour=colour))
        drawn.append(Panel(curves, row["name"], "success, %", f"rank correlation {row['rank']:.2f}"))
    return drawn
