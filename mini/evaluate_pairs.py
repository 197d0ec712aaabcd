"""How much Prompt-to-Prompt keeps, and what the CLIP filter is worth: measured on pairs of the miniature's world.

Both questions are about generated pairs, whose captions say what they should show (`evaluate.py pairs`).
"""

import json
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError, atomic_write, make_folder, plain
from dataset import Filter
from formats.checkpoint import load, load_clip
from formats.weights import write_json
from images import enlarge, grid, save_png, to_image
from mini.judge import Judge, truth
from mini.report import line, percent, table
from mini.world import KINDS, caption, random_edit
from p2p import P_RANGE, PairNoise, sample_pairs
from stable_diffusion import StableDiffusion

NOISE = {  # name: (the same noise for both pictures?, range of p)
    "independent noise": (False, (0.0, 0.0)),
    "shared noise": (True, (0.0, 0.0)),
    "Prompt-to-Prompt, p ~ U(0.1, 0.9)": (True, P_RANGE),
}


def one_sided_edits(count, seed=0):
    """Edits of one of two things, whose other half should stay as it is: a list of (Edit, is it the left one?)."""
    edits = []
    for number in range(count):
        rng = np.random.default_rng([8_003, seed, number])
        while True:
            edit = random_edit(rng, ("colour", "shape", "size")[number % 3], test=True)
            if len(edit.before.things) == 2:
                break
        edits.append((edit, edit.before.left != edit.after.left))
    return edits


def measure_pairs(model, judge, edits, guidance, steps=None, batch=32):
    """Sample pairs for `edits` (see `one_sided_edits`) in the ways of NOISE, and measure them.

    model: a `StableDiffusion`, guidance: a range to draw from. For each way: "change" is the mean L1, in [0, 1],
    between the two pictures in the half that the edit does not name; "both_right" the share of pairs whose pictures both show
    all that their captions say. Returns ({way: measures}, {way: a few pairs [pairs, 2, 3, H, W]}).
    """
    measured, shown = {}, {}
    side = model.sampling.resolution // model.vae.config.factor
    shape = (model.vae.config.latent_channels, side, side)
    for way, (shared, p) in NOISE.items():
        changes, right, pictures = [], [], []
        for start in tqdm(range(0, len(edits), batch), desc=way, leave=False):
            part = edits[start : start + batch]
            before, after = ([caption(scene) for scene in side] for side in zip(*scenes_of(part), strict=True))
            seeds = range(start, start + len(part))
            pair = sample_pairs(model, before, after, PairNoise(seeds, shape, guidance, p, model.device), steps)
            if not shared:  # the second picture of another seed's pair
                others = PairNoise([seed + 1_000_000 for seed in seeds], shape, guidance, p, model.device)
                pair = pair[0], sample_pairs(model, before, after, others, steps)[1]
            pair = [x.clamp(-1, 1) for x in pair]
            pictures.append(torch.stack(pair, dim=1)[:4])
            half = pair[0].shape[-1] // 2
            error = ((pair[1] - pair[0]).abs() / 2).mean((1, 2))  # [B, width]
            for row, (_, left) in zip(error, part, strict=True):
                changes.append((row[half:] if left else row[:half]).mean().item())
            readings = zip(*(judge.read(x) for x in pair), strict=True)
            for found, wanted in zip(readings, scenes_of(part), strict=True):
                right.append(all(f == truth(w) for f, w in zip(found, wanted, strict=True)))
        measured[way] = {"change": float(np.mean(changes)), "both_right": float(np.mean(right))}
        shown[way] = torch.cat(pictures)[:8]
    return measured, shown


def measure_right(model, judge, clip, tokenizer, edits, guidance, wanted, steps=None, batch=32):
    """Are filtered pairs better? Sample one Prompt-to-Prompt pair for each of `edits`, a list of world.Edit.

    wanted: a `dataset.Filter`. Returns the share that it keeps, and the share of pairs whose pictures both show all
    that their captions say, among all and among those kept: {"yield", "right_all", "right_kept"}.
    """
    side = model.sampling.resolution // model.vae.config.factor
    kept, right = [], []
    for start in tqdm(range(0, len(edits), batch), desc="filter", leave=False):
        part = edits[start : start + batch]
        before, after = [caption(edit.before) for edit in part], [caption(edit.after) for edit in part]
        shape = (model.vae.config.latent_channels, side, side)
        noise = PairNoise(range(start, start + len(part)), shape, guidance, device=model.device)
        pair = [x.clamp(-1, 1) for x in sample_pairs(model, before, after, noise, steps)]
        ids = (tokenizer(texts).to(model.device) for texts in (before, after))
        scores = clip.edit_similarities(*((x + 1) / 2 for x in pair), *ids)
        readings = zip(*(judge.read(x) for x in pair), strict=True)
        for row, (edit, found) in enumerate(zip(part, readings, strict=True)):
            kept.append(wanted.keeps({name: values[row].item() for name, values in scores.items()}))
            scenes = zip(found, (edit.before, edit.after), strict=True)
            right.append(all(reading == truth(scene) for reading, scene in scenes))
    chosen = [r for r, k in zip(right, kept, strict=True) if k]
    return {
        "yield": float(np.mean(kept)),
        "right_all": float(np.mean(right)),
        "right_kept": float(np.mean(chosen)) if chosen else None,
    }


def scenes_of(edits):
    """(scene before, scene after) of each edit."""
    return [(edit.before, edit.after) for edit, _ in edits]


def measure_filter(paths):
    """What the filter did to a data set, from the candidates.jsonl of its shards: {"yield", "all", "kept"}.

    "all" and "kept" hold the quantiles 5, 25, 50, 75 and 95 % of every CLIP similarity. Raises UserError.
    """
    everything, kept = [], []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    entry = json.loads(line)
                    everything += entry["candidates"]
                    kept += [candidate for candidate in entry["candidates"] if candidate["seed"] in entry["kept"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read, or is no list of candidates: {error}") from error
    if not everything:
        raise UserError(f"{' and '.join(map(str, paths))}: there are no candidates")

    def quantiles(candidates):
        names = [name for name in everything[0] if name.startswith("clip_sim")] if candidates else []
        return {
            name: np.quantile([candidate[name] for candidate in candidates], (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
            for name in names
        }

    return {"yield": len(kept) / len(everything), "all": quantiles(everything), "kept": quantiles(kept)}


def evaluate_pairs(options, command):
    """Measure pairs of one text-to-image model: with and without Prompt-to-Prompt, with and without the filter."""
    quantiles = measure_filter(options.candidates) if options.candidates else None
    model = StableDiffusion(load(options.sd, options.device))
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
    thresholds = ", ".join(f"{name} {value}" for name, value in asdict(wanted).items())
    second += line(thresholds, *(percent(found[name]) for name in ("yield", "right_all", "right_kept")))
    texts = ["# Generated pairs", f"`{command}`", "\n".join(first), "\n".join(second)]
    if quantiles:
        results["candidates"] = quantiles
        third = table(["5 %", "25 %", "50 %", "75 %", "95 %"])
        for part in ("all", "kept"):
            for name, values in quantiles[part].items():
                third += line(f"{part}, {name}", *(f"{value:.3f}" for value in values))
        texts += [f"Of the data set's candidates, {percent(quantiles['yield'])} are kept.", "\n".join(third)]
    large = [enlarge(to_image(x)) for pictures in shown.values() for pair in pictures for x in pair]
    columns = len(large) // len(shown)
    titles = ["before", "after"] * (columns // 2)
    save_png(grid(large, columns, None, titles, list(shown)), options.out / "pairs.png")
    with atomic_write(options.out / "pairs.json") as beside:
        write_json(beside, results)
    with atomic_write(options.out / "pairs.md") as beside:
        beside.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print("\n\n".join(texts[2:]))
    print(f"\n{options.out} holds pairs.md, pairs.json and pairs.png")
