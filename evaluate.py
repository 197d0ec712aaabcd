"""Measure editors, and the generated pairs that they learn from.

    python evaluate.py world --model models/mini/editor      # on edits whose right answer is known
    python evaluate.py pairs --sd models/mini/sd             # what Prompt-to-Prompt keeps, what the filter is worth

`world` takes edits of world.py from held-out compositions to held-out compositions, half of them in phrasings that
training never uses. An edit SUCCEEDS when the judge reads every attribute of the edited picture as those of the true
edited scene, and what the edit should not touch is left alone: outside the edited region the picture differs from the
true one by at most 0.05 on average. Choose guidance scales with `--validation`, on edits that the report does not use.
"""

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from checkpoint import load, load_clip
from dataset import Filter
from errors import Parser, UserError, run_program, written_whole
from evaluate_pairs import measure_filter, measure_pairs, measure_right, one_sided_edits
from images import grid, save_png, to_image, to_tensor
from ip2p import InstructPix2Pix
from judge import Judge, truth
from settings import check_sampling, check_seeds
from text2image import TextToImage
from weights import write_json
from world import KINDS, Edit, caption, random_edit, render

CHANGED = 0.02  # a pixel whose true change is larger, in any channel in [0, 1], belongs to the edited region ...
MARGIN = 2  # ... and so do the pixels this near to it
TOUCHED = 0.05  # the largest mean L1 outside the region, in [0, 1], at which an edit still succeeds
STREAMS = {False: 8_001, True: 8_002}  # the first word of the seed of reported edits, and of validation edits
EDITOR, BOUND = "this editor", "the same, trained on true pairs (upper bound)"
COPY, FLOOR, TRUE = "copy the input", "true picture through the VAE (floor)", "true picture (the judge's own error)"
MEANING = f"""\
A success: the judge reads every attribute of the edited picture as those of the true edited scene, and outside the
edited region the picture differs from the true one by at most {TOUCHED} (mean L1 in [0, 1]). Edits that leave less than
1 % of the picture outside, as those of the medium do, are judged by the attributes alone and not in the mean L1."""


# ---- the edits ----


@dataclass(frozen=True)
class HeldOutEdit(Edit):
    """An edit between compositions that training never sees."""

    new_phrasing: bool  # its words are such as training never uses, either


def held_out_edits(count, seed=0, validation=False):
    """`count` edits, all kinds equally often, each kind half in training's phrasings and half in new ones.

    Equal seeds give equal edits, and fewer of them are the first of more. validation: others, from a stream of
    their own. Raises UserError for a count that cannot be balanced.
    """
    if count < 1 or count % (2 * len(KINDS)):
        raise UserError(f"the count of edits should be a multiple of {2 * len(KINDS)} (kinds x phrasings), not {count}")
    check_seeds([seed])
    edits = []
    for number in range(count):
        rng, new = np.random.default_rng([STREAMS[validation], seed, number]), number // len(KINDS) % 2 == 1
        edit = random_edit(rng, KINDS[number % len(KINDS)], test=True, new_phrasing=new)
        edits.append(HeldOutEdit(**vars(edit), new_phrasing=new))
    return edits


def true_pictures(edits):
    """The pictures before and after the edits: two tensors [count, 3, 64, 64] in [-1, 1]."""
    pairs = [(to_tensor(render(edit.before)), to_tensor(render(edit.after))) for edit in edits]
    return tuple(torch.stack(pictures) for pictures in zip(*pairs, strict=True))


# ---- the editors ----


def edit_all(model, edits, before, sampling, batch):
    """Edit the pictures `before` [count, 3, H, W] by an InstructPix2Pix -> pictures of the same shape, in [-1, 1].

    sampling: a `settings.Sampling`. An edit's noise has the seed of its scene's layout, so that it depends neither on
    the batch nor on the model, and editors can be compared edit by edit.
    """
    edited = []
    for part in tqdm(batches(len(edits), batch), desc="editing", unit="batch", leave=False):
        pictures = model.sample(
            model.encode_text([edit.instruction for edit in edits[part]]),
            model.encode_image(before[part]),
            [edit.before.layout for edit in edits[part]],
            sampling.text_guidance,
            sampling.image_guidance,
            sampling.steps,
        )
        edited.append(pictures.clamp(-1, 1).cpu())
    return torch.cat(edited)


def through_vae(model, pictures, batch):
    """Encode and decode pictures [count, 3, H, W]: the best that an editor with this autoencoder can show."""
    scaling, parts = model.vae.config.scaling, batches(len(pictures), batch)
    decoded = [model.decode(model.encode_image(pictures[part]) * scaling) for part in parts]
    return torch.cat(decoded).clamp(-1, 1).cpu()


def batches(count, size):
    """The slices that cut `count` things into batches."""
    return [slice(start, start + size) for start in range(0, count, size)]


# ---- the measures ----


def measure(pictures, edits, before, after, judge, batch=63):
    """How well do `pictures` show `edits`? All pictures [count, 3, 64, 64] in [-1, 1], before and after the true ones.

    Returns a dict for JSON: shares in [0, 1], and "failed", the positions of the edits that did not succeed. The mean
    "l1_outside" is over the edits that leave anything outside their region (None if there are none).
    """
    device = next(judge.parameters()).device
    readings = [reading for part in batches(len(edits), batch) for reading in judge.read(pictures[part].to(device))]
    right = np.array([reading == truth(edit.after) for reading, edit in zip(readings, edits, strict=True)])
    l1, counts = (values.numpy() for values in l1_outside(pictures, before, after))
    success = right & (l1 <= TOUCHED)
    kinds, new = np.array([edit.kind for edit in edits]), np.array([edit.new_phrasing for edit in edits])
    return {
        "count": len(edits),
        "success": share(success),
        "interval": wilson(int(success.sum()), len(edits)),
        "attributes": share(right),
        "l1_outside": share(l1[counts]),
        "known_phrasings": share(success[~new]),
        "new_phrasings": share(success[new]),
        "kinds": {kind: share(success[kinds == kind]) for kind in KINDS},
        "failed": np.flatnonzero(~success).tolist(),
    }


def share(values):
    """The mean as a plain number, None of nothing."""
    return float(np.mean(values)) if len(values) else None


def edited_region(before, after):
    """Where an edit may change the picture: wherever the true pair differs, and MARGIN pixels around.

    before, after [B, 3, H, W] in [-1, 1] -> bool [B, 1, H, W].
    """
    changed = ((after - before).abs() / 2).amax(dim=1, keepdim=True) > CHANGED
    return F.max_pool2d(changed.float(), 2 * MARGIN + 1, stride=1, padding=MARGIN).bool()


def l1_outside(pictures, before, after):
    """The mean distance, in [0, 1], to the TRUE edited picture outside the edited region: what was to be left alone.

    All [B, 3, H, W] in [-1, 1]. Returns (distances [B], does it count? [B]): where the edit is everywhere, as that of a
    medium, and less than 1 % of the picture is outside, the distance is 0 and says nothing.
    """
    outside = ~edited_region(before, after)
    error = ((pictures - after).abs() / 2).mean(dim=1, keepdim=True)
    counts = outside.float().mean(dim=(1, 2, 3)) >= 0.01
    mean = (error * outside).sum(dim=(1, 2, 3)) / outside.sum(dim=(1, 2, 3)).clamp(min=1)
    return mean * counts, counts


def wilson(successes, count, z=1.96):
    """The 95 % interval [low, high] of a share (Wilson 1927); unlike p +- z sigma it stays within [0, 1]."""
    p, spread = successes / count, z * z / count
    middle = (p + spread / 2) / (1 + spread)
    half = (spread * (p * (1 - p) + spread / 4)) ** 0.5 / (1 + spread)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def clip_scores(clip, tokenizer, pictures, edits, before, batch=63):
    """The paper's measures (Sec. 3.1.2 and 4), means over the edits; `pictures` and `before` as for `measure`."""
    device, scores = clip.logit_scale.device, []
    for part in batches(len(edits), batch):
        images = [(x[part].to(device) + 1) / 2 for x in (before, pictures)]
        captions = [caption(edit.before) for edit in edits[part]], [caption(edit.after) for edit in edits[part]]
        found = clip.edit_similarities(*images, *(tokenizer(texts).to(device) for texts in captions))
        scores.append(torch.stack([found[name] for name in ("clip_sim_image", "clip_sim_dir", "clip_sim_1")]))  # [3, B]
    names = "image_image", "directional", "image_caption"
    return dict(zip(names, torch.cat(scores, dim=1).mean(dim=1).tolist(), strict=True))


# ---- what is written ----


def tables(results):
    """The results in Markdown: {title: table}, the overall one first."""
    columns = "success [95 % interval]", "all attributes right", "L1 outside", "known phrasings", "new phrasings"
    first, second = table(columns), table(KINDS)
    for name, row in results["rows"].items():
        interval = " to ".join(f"{100 * end:.1f}" for end in row["interval"])
        l1 = "none" if row["l1_outside"] is None else f"{row['l1_outside']:.4f}"
        phrasings = [percent(row["known_phrasings"]), percent(row["new_phrasings"])]
        first += line(name, f"**{percent(row['success'])}** [{interval} %]", percent(row["attributes"]), l1, *phrasings)
        second += line(name, *(percent(row["kinds"][kind]) for kind in KINDS))
    third = table(["before to edited picture", "directional", "edited picture to its caption"])
    for name, scores in results["clip"].items():
        third += line(name, *(f"{score:.3f}" for score in scores.values()))
    named = {"Overall": first, "Success by the kind of edit": second, "Mean CLIP similarities": third}
    return {title: "\n".join(lines) for title, lines in named.items()}


def table(columns):
    """The first lines of a table with these columns."""
    return [*line("", *columns), "|---" * (1 + len(columns)) + "|"]


def line(*cells):
    """One line of a table."""
    return [f"| {' | '.join(cells)} |"]


def percent(value):
    """A share for people."""
    return "none" if value is None else f"{100 * value:.1f} %"


def sheet(edits, before, edited, after, failed):
    """A contact sheet of the first two edits of every kind, one in a known and one in a new phrasing, a kind a row."""
    pictures, labels = [], []
    for position in (start + kind for kind in range(len(KINDS)) for start in (0, len(KINDS))):
        pictures += [to_image(x[position]) for x in (before, edited, after)]
        labels += [edits[position].instruction, "fails" if position in failed else "succeeds", ""]
    pictures = [picture.resize((128, 128), Image.Resampling.NEAREST) for picture in pictures]
    title = "The first edits of every kind, not chosen: in words known from training, and in new ones"
    return grid(pictures, 6, labels, ["before", "ours", "true"] * 2, KINDS, title)


def write(out, results, pictures):
    """world.json, world.md and world.png in the folder `out`."""
    settings = results["settings"]
    use = "validation edits, to choose settings by" if settings["validation"] else "held-out edits"
    texts = ["# Edits whose right answer is known", f"{settings['count']} {use}: `{settings['command']}`", MEANING]
    for name, chosen in settings["sampling"].items():
        texts.append(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in chosen.items()))
    texts += [f"## {title}\n\n{text}" for title, text in tables(results).items()]
    save_png(pictures, out / "world.png")
    with written_whole(out / "world.json") as beside:
        write_json(beside, results)
    with written_whole(out / "world.md") as beside:
        beside.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


# ---- the program ----


def parse(arguments=None):
    """The command line. Raises UserError for values out of range."""
    parser = Parser(prog="evaluate.py", description="Measure editors, and the generated pairs that they learn from.")
    programs = parser.add_subparsers(dest="program", required=True, metavar="world|pairs")
    mini = Path("models/mini")

    world = programs.add_parser("world", help="success on held-out edits of the miniature's world")
    world.set_defaults(run=evaluate_world)
    add = world.add_argument
    add("--model", default=mini / "editor", metavar="M", help="the editor: a folder or a file (default: %(default)s)")
    add("--bound", metavar="M", help="an editor trained on true pairs, to compare with")
    add("--count", type=int, default=504, metavar="N", help="edits, a multiple of 14 (default: 504)")
    add("--batch", type=int, default=63, metavar="B", help="edits at a time (default: 63)")
    add("--cfg-text", type=float, metavar="S", help="text guidance s_T (default: each model's own)")
    add("--cfg-image", type=float, metavar="S", help="image guidance s_I (default: each model's own)")
    add("--validation", action="store_true", help="use other edits, to choose the guidance scales by")

    pairs = programs.add_parser("pairs", help="what Prompt-to-Prompt keeps, and what the CLIP filter is worth")
    pairs.set_defaults(run=evaluate_pairs, cfg_text=None, cfg_image=None)
    add = pairs.add_argument
    add("--sd", default=mini / "sd", metavar="M", help="the text-to-image model (default: %(default)s)")
    add("--count", type=int, default=256, metavar="N", help="pairs of each sort (default: 256)")
    add("--batch", type=int, default=32, metavar="B", help="pairs at a time (default: 32)")
    add("--guidance", type=float, nargs=2, default=(3.0, 6.0), metavar=("LOW", "HIGH"), help="range (default: 3 6)")
    add("--candidates", type=Path, metavar="FILE", help="a data set's candidates.jsonl, for the filter's quantiles")

    for program in (world, pairs):
        add = program.add_argument
        add("--judge", default=mini / "judge.safetensors", metavar="FILE", help="(default: %(default)s)")
        add("--clip", default=mini / "clip", metavar="DIR", help="CLIP, for its similarities (default: %(default)s)")
        add("--seed", type=int, default=0, metavar="S", help="of the edits (default: 0)")
        add("--steps", type=int, metavar="N", help="sampling steps (default: each model's own)")
        add("--device", default="cpu", metavar="D", help="cpu, cuda, ... (default: cpu)")
        add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
        out = Path("runs/evaluate")
        add("--out", type=Path, default=out, metavar="DIR", help="for the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("count", "batch", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} should be at least 1, not {value}")
    check_sampling(options.steps, options.cfg_text, options.cfg_image, None)
    return options


def evaluate_world(options, command):
    """Measure an editor, and what it should be compared with, on held-out edits."""
    edits = held_out_edits(options.count, options.seed, options.validation)
    paths = {EDITOR: options.model, **({BOUND: options.bound} if options.bound else {})}
    models = {name: InstructPix2Pix.load(path, options.device) for name, path in paths.items()}
    judge, (clip, tokenizer) = Judge.load(options.judge).to(options.device), load_clip(options.clip, options.device)
    asked = {"steps": options.steps, "text_guidance": options.cfg_text, "image_guidance": options.cfg_image}
    asked = {key: value for key, value in asked.items() if value is not None}
    sampling = {name: replace(model.sampling, **asked) for name, model in models.items()}
    make_folder(options.out)
    before, after = true_pictures(edits)
    edited = {name: edit_all(models[name], edits, before, sampling[name], options.batch) for name in models}
    floor = through_vae(models[EDITOR], after, options.batch)
    compared = {**edited, COPY: before, FLOOR: floor, TRUE: after}
    rows = {name: measure(x, edits, before, after, judge, options.batch) for name, x in compared.items()}
    shown = {**edited, "true picture": after}
    similar = {name: clip_scores(clip, tokenizer, x, edits, before, options.batch) for name, x in shown.items()}
    settings = plain(options) | {"command": command}
    settings["sampling"] = {name: asdict(chosen) for name, chosen in sampling.items()}
    results = {"settings": settings, "rows": rows, "clip": similar}
    write(options.out, results, sheet(edits, before, edited[EDITOR], after, rows[EDITOR]["failed"]))
    print(next(iter(tables(results).values())))
    print(f"\n{options.out} holds world.md, world.json and world.png")


def evaluate_pairs(options, command):
    """Measure pairs of one text-to-image model: with and without Prompt-to-Prompt, with and without the filter."""
    model = TextToImage(load(options.sd, options.device))
    judge, (clip, tokenizer) = Judge.load(options.judge).to(options.device), load_clip(options.clip, options.device)
    make_folder(options.out)
    edits = one_sided_edits(options.count, options.seed)
    ways, shown = measure_pairs(model, judge, edits, options.guidance, options.steps, options.batch)
    rng = np.random.default_rng([8_004, options.seed])
    edits = [random_edit(rng, KINDS[number % len(KINDS)], test=True) for number in range(options.count)]
    wanted = Filter.read(options.clip)
    arguments = options.guidance, wanted, options.steps, options.batch
    found = measure_right(model, judge, clip, tokenizer, edits, *arguments)
    results = {"settings": plain(options) | {"command": command}, "ways": ways, "filter": found}

    independent = next(iter(ways.values()))["change"]
    first = table(["change in the half not named, L1", "of that with independent noise", "both pictures right"])
    for way, row in ways.items():
        first += line(way, f"{row['change']:.4f}", f"{row['change'] / independent:.2f}", percent(row["both_right"]))
    second = table(["kept", "both pictures right, of all", "of those kept"])
    second += line(str(asdict(wanted)), *(percent(found[name]) for name in ("yield", "right_all", "right_kept")))
    texts = ["# Generated pairs", f"`{command}`", "\n".join(first), "\n".join(second)]
    if options.candidates:
        results["candidates"] = quantiles = measure_filter(options.candidates)
        third = table(["5 %", "25 %", "50 %", "75 %", "95 %"])
        for part in ("all", "kept"):
            for name, values in quantiles[part].items():
                third += line(f"{part}, {name}", *(f"{value:.3f}" for value in values))
        texts += [f"Of the data set's candidates, {percent(quantiles['yield'])} are kept.", "\n".join(third)]
    images = [to_image(x) for pictures in shown.values() for pair in pictures for x in pair]
    large = [image.resize((128, 128), Image.Resampling.NEAREST) for image in images]
    columns = len(large) // len(shown)
    titles = ["before", "after"] * (columns // 2)
    save_png(grid(large, columns, None, titles, list(shown)), options.out / "pairs.png")
    with written_whole(options.out / "pairs.json") as beside:
        write_json(beside, results)
    with written_whole(options.out / "pairs.md") as beside:
        beside.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print("\n\n".join(texts[2:]))
    print(f"\n{options.out} holds pairs.md, pairs.json and pairs.png")


def plain(options):
    """The command line's values as JSON holds them."""
    values = {key: value for key, value in vars(options).items() if key != "run"}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def make_folder(folder):
    """Make a folder for results. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error


def main(arguments=None):
    """Do what the command line asks for."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        torch.zeros(1, device=options.device).item()
    except Exception as error:  # torch has another one for every device that it was not made for
        raise UserError(f"this machine or this torch has no device {options.device}; try --device cpu") from error
    command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if arguments is None else arguments)])
    options.run(options, command)


if __name__ == "__main__":
    run_program(main)
