"""Fig. 8 and 23: image similarity against directional similarity, for each method over the range of its knob.

And Fig. 10: the same curve for several editors. All methods edit the same images with the same seeds.
"""

import argparse
from functools import partial
from typing import NamedTuple

from cli import WHOLE

import numpy as np

from mini.evaluation import table, wilson
from section4.edits import find_cases
from section4.lab import Lab, add_models
from section4.methods import METHODS, OF_FIG_8, ours
from section4.report import row_of, rows_table, write_report
from section4.statistics import at_height, interval, resamples
from training.plot import COLOURS, Curve, Panel

HEIGHTS = 50  # image similarities at which curves are compared
TITLES = {
    "direction": "directional similarity", "image": "image similarity", "caption": "caption similarity",
    "success": "success", "l1_outside": "L1 outside",
}  # fmt: skip


class Series(NamedTuple):
    """A curve: its points' settings and scores, each {score: array [N]}."""

    name: str
    knob: str
    values: tuple
    scores: list


def add_flags(parser):
    """The flags of `evaluate.py curves`."""
    add_models(parser, 1008)
    known, add = f"of {', '.join(METHODS)} (default: those of Fig. 8)", parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=OF_FIG_8, metavar="NAME", help=known)
    add("--points", type=WHOLE, default=9, metavar="N", help="the most values of a knob (default: all of Fig. 8)")


def run(options):
    """Write Fig. 8, and with a second CLIP Fig. 23, as `write_report` does."""
    cases, lab = find_cases(options, options.count), Lab(options)
    values = {name: evenly(METHODS[name].values, options.points) for name in options.methods}
    jobs = {f"{name}-{v:g}": partial(METHODS[name].edit, lab, v) for name in values for v in values[name]}
    found = lab.run(cases, jobs | references(lab, cases))
    series = []
    for name in values:
        scores = [found.pop(f"{name}-{value:g}") for value in values[name]]
        series.append(Series(METHODS[name].name, METHODS[name].knob, values[name], scores))
    report(lab, len(cases), series, found, "Fig. 8", "curves")


def add_ablation_flags(parser):
    """The flags of `evaluate.py ablation`."""
    add_models(parser, 1008)
    add = parser.add_argument
    several = "a name and an editor, or one for each seed of its training (default: bundled=mini)"
    add("--editors", nargs="+", type=named_paths, default=[("bundled", ["mini"])], metavar="NAME=A,B,C", help=several)
    add("--points", type=WHOLE, default=7, metavar="N", help="the most values of s_I (default: all of Fig. 10)")


def named_paths(text):
    """The type of --editors: (name, [path, ...])."""
    name, _, paths = text.partition("=")
    if not name or not paths:
        raise argparse.ArgumentTypeError(f"should be NAME=PATH or NAME=PATH,PATH,PATH, not {text!r}")
    return name, paths.split(",")


def run_ablation(options):
    """Write Fig. 10, as `write_report` does. An edit's score is the mean over the seeds of a training."""
    cases, lab, series = find_cases(options, options.count), Lab(options), []
    values = evenly(METHODS["ip2p"].values, options.points)
    found = lab.run(cases, references(lab, cases))
    for number, (name, paths) in enumerate(options.editors):
        runs = []
        for seed, path in enumerate(paths):
            other = lab.with_editor(path)
            jobs = {f"{number}-{seed}-{value:g}": partial(ours, other, value) for value in values}
            runs.append([*other.run(cases, jobs).values()])
        points = zip(*runs, strict=True)  # each with the scores of all seeds
        scores = [{key: np.mean([run[key] for run in point], axis=0) for key in point[0]} for point in points]
        series.append(Series(name, "s_I", values, scores))
    report(lab, len(cases), series, found, "Fig. 10", "ablation")


def references(lab, cases):
    """Jobs that edit nothing: the input itself; where there is one the true image, also through the autoencoder."""
    jobs = {"copy the input": lambda some: [case.images(lab.side)[0] for case in some]}
    if all(case.load()[1] for case in cases):
        jobs["true image"] = lambda some: [case.images(lab.side)[1] for case in some]
        jobs["true image, autoencoder"] = lambda some: lab.through_vae(jobs["true image"](some))
    return jobs


def evenly(values, most):
    """At most so many of the values, the first and the last among them."""
    if most >= len(values):
        return values
    return tuple(values[round(i * (len(values) - 1) / max(1, most - 1))] for i in range(most))


def report(lab, count, series, known, figure, name):
    """Tables and plots for each CLIP; known: {name: scores} of `references`."""
    weights = resamples(count)
    series = [*series, *(Series(reference, "", ("",), [scores]) for reference, scores in known.items())]
    for number, path in enumerate(lab.options.clip):
        ending, rows = f"_{number + 1}" if number else "", []
        keys = {"direction": f"direction{ending}", "image": f"image{ending}", "caption": f"caption{ending}"}
        keys |= {key: key for key in ("success", "l1_outside") if key in series[0].scores[0]}
        shown = [one._replace(scores=[{key: s[keys[key]] for key in keys} for s in one.scores]) for one in series]
        for one in shown:
            for value, scores in zip(one.values, one.scores, strict=True):
                row = row_of(f"{one.name} {one.knob} {value}".strip(), scores, keys, weights)
                rows.append(row | {"method": one.name, "knob": one.knob, "value": value})
        texts = [f"# {figure}: what is kept of the image, against how far it changes as the captions do"]
        texts.append(f"`{lab.options.command}`: {count} edits, CLIP {path}; in brackets 95 % intervals")
        texts += [rows_table(rows, {key: TITLES[key] for key in keys}), *compared(shown, weights)]
        write_report(lab.out, f"{name}{ending}", rows, texts, panels(shown, weights, f"{figure}, {count:,} edits"))


def points_of(one, weights):
    """A curve's points [P, 2], directional and image similarity, and those of all resamples [RESAMPLES, P, 2]."""
    values = np.array([[scores["direction"], scores["image"]] for scores in one.scores])  # [P, 2, N]
    return values.mean(axis=-1), np.moveaxis(values @ weights.T, -1, 0)


def compared(series, weights):
    """Which curve is higher? The lead of the first over each other one, where their image similarities overlap."""
    curves, cells = [(one.name, *points_of(one, weights)) for one in series if len(one.values) > 1], {}
    if len(curves) < 2:
        return []
    (name, first, many_first), *others = curves
    for other, points, many in others:
        low, high = max(first[:, 1].min(), points[:, 1].min()), min(first[:, 1].max(), points[:, 1].max())
        cells[other] = "they do not overlap", ""
        if low < high:
            heights = np.linspace(low, high, HEIGHTS)
            leads = at_height(many_first, heights) - at_height(many, heights)  # [RESAMPLES, HEIGHTS]
            mean = np.mean(at_height(first, heights) - at_height(points, heights))
            low_lead, high_lead = interval(leads.mean(axis=1))
            cells[other] = f"{low:.3f} to {high:.3f}", f"{mean:+.4f} [{low_lead:+.4f}, {high_lead:+.4f}]"
    columns = "image similarities", "mean lead in directional similarity"
    return [f"At equal image similarity, {name} leads by so much:", table(columns, cells)]


def panels(series, weights, title):
    """The figure, and where it is known success beside it."""
    similarities, successes = [], []
    for number, one in enumerate(series):
        points, many = points_of(one, weights)
        notes = (f"{one.values[0]:g}", *[""] * (len(points) - 2), f"{one.values[-1]:g}") if len(points) > 1 else ()
        heights, band = np.linspace(points[:, 1].min(), points[:, 1].max(), HEIGHTS), None
        if len(points) > 1:
            low, high = interval(at_height(many, heights).T).T
            band = np.concatenate([np.stack([low, heights], 1), np.stack([high, heights], 1)[::-1]])
        colour = COLOURS[number % len(COLOURS)] if len(points) > 1 else "#555555"
        look = {"joined": len(points) > 1, "notes": notes, "colour": colour}
        similarities.append(Curve(one.name, points, band, **look))
        if "success" in one.scores[0]:
            rates = [(s["image"].mean(), s["success"].mean()) for s in one.scores]
            ends = [wilson(float(s["success"].sum()), len(s["success"])) for s in one.scores]
            successes.append(Curve(one.name, 100 * np.array(rates) / (100, 1), intervals=100 * np.array(ends), **look))
    y = "image similarity"
    found = [Panel(similarities, "directional similarity", y, title)]
    return found + ([Panel(successes, y, "success, %", "True success of the same edits")] if successes else [])
