"""Measure an editor on edits of the miniature's world, whose right answer is known (`evaluate.py world`).

The edits lead from held-out compositions to held-out compositions, half of them in phrasings that training never uses.
An edit SUCCEEDS when the judge reads every attribute of the edited picture as those of the true edited scene, and what
the edit should not touch is left alone: outside the edited region the picture differs from the true one by at most 0.05
on average. Choose guidance scales with `--validation`, on edits that the report does not use.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import UserError, atomic_write, check_seeds, make_folder, plain
from formats.checkpoint import load_clip
from formats.weights import write_json
from images import enlarge, grid, save_png, to_image, to_tensor
from ip2p import InstructPix2Pix
from mini.judge import Judge, truth
from mini.report import line, percent, share, table
from mini.world import KINDS, Edit, caption, random_edit, render

CHANGED = 0.02  # a pixel whose true change is larger, in any channel in [0, 1], belongs to the edited region ...
MARGIN = 4  # ... and so do the pixels this near to it: one cell of the latent, which an edit changes as a whole
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


def sheet(edits, before, edited, after, failed):
    """A contact sheet of the first two edits of every kind, one in a known and one in a new phrasing, a kind a row."""
    pictures, labels = [], []
    for position in (start + kind for kind in range(len(KINDS)) for start in (0, len(KINDS))):
        pictures += [enlarge(to_image(x[position])) for x in (before, edited, after)]
        labels += [edits[position].instruction, "fails" if position in failed else "succeeds", ""]
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
    with atomic_write(out / "world.json") as beside:
        write_json(beside, results)
    with atomic_write(out / "world.md") as beside:
        beside.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


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
