"""How much Prompt-to-Prompt keeps, and what the CLIP filter is worth (`evaluate.py pairs`).

Both are measured on generated pairs of the miniature world, whose captions say what the images should show.
"""

import json
from dataclasses import asdict

from cli import UserError

import numpy as np
import torch
from tqdm import tqdm

from dataset import Filter
from formats.checkpoint import load, load_clip
from images import enlarge, grid, to_image
from mini.judge import Judge, truth
from mini.report import line, percent, table, write_results
from mini.world import KINDS, caption, random_edit
from p2p import P_RANGE, PairNoise, sample_pairs
from stable_diffusion import StableDiffusion

NOISE = {  # name: (the same noise for both images?, range of p)
    "independent noise": (False, (0.0, 0.0)),
    "shared noise": (True, (0.0, 0.0)),
    "Prompt-to-Prompt, p ~ U(0.1, 0.9)": (True, P_RANGE),
}


def one_sided_edits(count, seed=0):
    """Edits of one of two things, whose other half should stay as it is: a list of (Edit, is it the left one?)."""
    edits = []
    for number in range(count):
        rng = np.random.default_rng([8_003, seed, number])
        while len((edit := random_edit(rng, ("colour", "shape", "size")[number % 3], test=True)).before.things) < 2:
            pass
        edits.append((edit, edit.before.left != edit.after.left))
    return edits


def sample(model, edits, first_seed, guidance, steps, p=P_RANGE, shared=True):
    """Sample one Prompt-to-Prompt pair for each Edit -> two tensors [B, 3, H, W] in [-1, 1].

    guidance, p: ranges to draw from; shared: False takes the second images from pairs of other seeds.
    """
    side = model.sampling.resolution // model.vae.config.factor
    shape = (model.vae.config.latent_channels, side, side)
    before, after = [caption(edit.before) for edit in edits], [caption(edit.after) for edit in edits]

    def pair(first):
        noise = PairNoise(range(first, first + len(edits)), shape, guidance, p, model.device)
        return [x.clamp(-1, 1) for x in sample_pairs(model, before, after, noise, steps)]

    return pair(first_seed) if shared else (pair(first_seed)[0], pair(first_seed + 1_000_000)[1])


def both_right(judge, pair, edits):
    """For each pair: does the judge read all attributes of both scenes in its images?"""
    readings = zip(*(judge.read(x) for x in pair), strict=True)
    return [found == (truth(e.before), truth(e.after)) for found, e in zip(readings, edits, strict=True)]


def measure_pairs(model, judge, edits, guidance, steps=None, batch_size=32):
    """Sample pairs for `edits` (of `one_sided_edits`) in the ways of NOISE; model: a `StableDiffusion`.

    Returns ({way: measures}, {way: the first pairs [<= 8, 2, 3, H, W]}). "change": the mean L1, in [0, 1], between the
    two images in the half that the edit does not name; "both_right": the fraction of pairs that show their captions.
    """
    measured, shown = {}, {}
    for way, (shared, p) in NOISE.items():
        changes, right, images = [], [], []
        for start in tqdm(range(0, len(edits), batch_size), desc=way, leave=False):
            part, left = zip(*edits[start : start + batch_size], strict=True)
            pair = sample(model, part, start, guidance, steps, p, shared)
            images.append(torch.stack(tuple(pair), dim=1)[:8])
            error = ((pair[1] - pair[0]).abs() / 2).mean((1, 2))  # [B, width]
            halves = torch.stack([half.mean(1) for half in error.chunk(2, dim=1)])  # [2, B]: left, right
            changes += [halves[int(is_left), row].item() for row, is_left in enumerate(left)]
            right += both_right(judge, pair, part)
        measured[way] = {"change": float(np.mean(changes)), "both_right": float(np.mean(right))}
        shown[way] = torch.cat(images)[:8]
    return measured, shown


def measure_right(model, judge, clip, tokenizer, edits, guidance, wanted, steps=None, batch_size=32):
    """Are filtered pairs better? Sample one pair for each Edit; wanted: a `dataset.Filter`.

    Returns the fraction that the filter keeps, and the fraction of pairs that show their captions, of all and of those
    kept: {"yield", "right_all", "right_kept"}.
    """
    kept, right = [], []
    for start in tqdm(range(0, len(edits), batch_size), desc="filter", leave=False):
        part = edits[start : start + batch_size]
        pair = sample(model, part, start, guidance, steps)
        texts = [caption(edit.before) for edit in part], [caption(edit.after) for edit in part]
        ids = (tokenizer(captions).to(model.device) for captions in texts)
        scores = clip.edit_similarities(*((x + 1) / 2 for x in pair), *ids)
        kept += [wanted.keeps({name: x[row].item() for name, x in scores.items()}) for row in range(len(part))]
        right += both_right(judge, pair, part)
    chosen = [r for r, k in zip(right, kept, strict=True) if k]
    means = {"yield": float(np.mean(kept)), "right_all": float(np.mean(right))}
    return {**means, "right_kept": float(np.mean(chosen)) if chosen else None}


def measure_filter(root):
    """What the filter did to the data set in `root`: {"yield", "all", "kept"}.

    "all" and "kept" hold the quantiles 5, 25, 50, 75 and 95 % of every CLIP similarity. Raises UserError.
    """
    found = {"candidates": [], "metadata": []}
    try:
        for name, entries in found.items():
            for path in sorted(root.glob(f"[0-9]*/{name}.jsonl")):
                for text in path.read_text(encoding="utf-8").splitlines():
                    scores = json.loads(text)
                    entries.append([scores[f"clip_sim_{part}"] for part in ("0", "1", "dir", "image")])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not found["candidates"]:
        raise UserError(f"{root} holds no candidates.jsonl in the folders of its edits; datagen.py images writes them")

    def quantiles(entries):
        values = np.quantile(entries, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0).T.tolist() if entries else []
        return dict(zip(("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"), values, strict=False))

    everything, kept = found.values()
    return {"yield": len(kept) / len(everything), "all": quantiles(everything), "kept": quantiles(kept)}


def evaluate_pairs(options, settings):
    """Measure pairs of one text-to-image model: with and without Prompt-to-Prompt, with and without the filter."""
    candidates = measure_filter(options.data) if options.data else None
    model = StableDiffusion(load(options.sd, options.device))
    judge, (clip, tokenizer) = Judge.load(options.judge).to(options.device), load_clip(options.clip, options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    edits, how = one_sided_edits(options.count, options.seed), (options.steps, options.batch_size)
    ways, shown = measure_pairs(model, judge, edits, options.guidance, *how)
    rng, wanted = np.random.default_rng([8_004, options.seed]), Filter.read(options.clip)
    edits = [random_edit(rng, KINDS[number % len(KINDS)], test=True) for number in range(options.count)]
    found = measure_right(model, judge, clip, tokenizer, edits, options.guidance, wanted, *how)
    results = {"settings": settings, "ways": ways, "filter": found, "candidates": candidates}

    independent = next(iter(ways.values()))["change"]
    first = table(["change in the half not named, L1", "relative to independent noise", "both images right"])
    for way, row in ways.items():
        first += line(way, f"{row['change']:.4f}", f"{row['change'] / independent:.2f}", percent(row["both_right"]))
    second = table(["kept", "both images right, of all", "of those kept"])
    thresholds = ", ".join(f"{name} {value}" for name, value in asdict(wanted).items())
    second += line(thresholds, *(percent(found[name]) for name in ("yield", "right_all", "right_kept")))
    texts = ["# Generated pairs", f"`{settings['command']}`", "\n".join(first), "\n".join(second)]
    if candidates:
        third = table(["5 %", "25 %", "50 %", "75 %", "95 %"])
        for part in ("all", "kept"):
            for name, values in candidates[part].items():
                third += line(f"{part}, {name}", *(f"{value:.3f}" for value in values))
        texts += [f"{percent(candidates['yield'])} of the data set's candidates are kept.", "\n".join(third)]
    print("\n\n".join(texts[2:]))
    large = [enlarge(to_image(x)) for images in shown.values() for pair in images for x in pair]
    columns = len(large) // len(shown)
    image = grid(large, columns, None, ["before", "after"] * (columns // 2), list(shown))
    write_results(options.out, "pairs", results, texts, image)
