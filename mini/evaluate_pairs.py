"""How much Prompt-to-Prompt keeps, and what the CLIP filter is worth (`evaluate.py pairs`).

Both are measured on generated pairs of the miniature world, whose captions say what the images should show.
"""

from dataclasses import asdict

import numpy as np
import torch

from dataset import Filter
from formats.checkpoint import load_clip
from images import enlarge, grid, to_image
from mini.evaluate_world import SIMILARITIES, clip_similarities, percent, table, write_results
from mini.judge import Judge, right
from mini.scenes import in_batches
from mini.world import KINDS, caption, random_edit
from p2p import P_RANGE, PairNoise, sample_pairs
from stable_diffusion import StableDiffusion

NOISE = {  # name: (the same noise for both images?, range of p)
    "independent noise": (False, (0.0, 0.0)),
    "shared noise": (True, (0.0, 0.0)),
    "Prompt-to-Prompt, p ~ U(0.1, 0.9)": (True, P_RANGE),
}


def one_sided_edits(count, seed=0):
    """Edits of one of two things, whose other half should stay as it is."""
    edits = []
    for number in range(count):
        rng = np.random.default_rng([8_003, seed, number])
        while len((edit := random_edit(rng, ("colour", "shape", "size")[number % 3], test=True)).before.things) < 2:
            pass
        edits.append(edit)
    return edits


def sample(model, judge, edits, guidance, steps, batch_size, p=P_RANGE, shared=True, desc="pairs"):
    """One Prompt-to-Prompt pair for each of N Edits; model: a `StableDiffusion`, guidance, p: ranges to draw from.

    shared: False takes the second images from pairs of other seeds. Returns images before and after, [N, 3, H, W] each,
    in [-1, 1], and whether the judge reads all attributes of both scenes in them, [N].
    """
    side = model.sampling.resolution // model.vae.config.factor
    shape = (model.vae.config.latent_channels, side, side)

    def compute(edits, seeds):
        texts = [caption(edit.before) for edit in edits], [caption(edit.after) for edit in edits]
        x, y = sample_pairs(model, *texts, PairNoise(seeds, shape, guidance, p, model.device), steps)
        if not shared:
            seeds = [seed + 1_000_000 for seed in seeds]
            _, y = sample_pairs(model, *texts, PairNoise(seeds, shape, guidance, p, model.device), steps)
        return torch.stack([x, y], dim=1).clamp(-1, 1).cpu()

    x, y = in_batches(compute, batch_size, edits, range(len(edits)), desc=desc).unbind(1)
    found = right(judge, x, [edit.before for edit in edits]) & right(judge, y, [edit.after for edit in edits])
    return x, y, found


def measure_pairs(model, judge, edits, *how):
    """Sample pairs for `edits` (of `one_sided_edits`) in the ways of NOISE; how: guidance, steps and batch size.

    Returns ({way: measures}, {way: the first pairs [<= 8, 2, 3, H, W]}). "change": the mean L1, in [0, 1], between the
    two images in the half that the edit does not name; "both_right": the fraction of pairs that show their captions.
    """
    measured, shown = {}, {}
    other_half = [int(edit.before.left != edit.after.left) for edit in edits]  # 0: left, 1: right
    for way, (shared, p) in NOISE.items():
        before, after, found = sample(model, judge, edits, *how, p, shared, desc=way)
        error = ((after - before).abs() / 2).unflatten(3, (2, -1)).mean((1, 2, 4))  # [N, halves]
        change = error[range(len(edits)), other_half].mean().item()
        measured[way] = {"change": change, "both_right": float(found.mean())}
        shown[way] = torch.stack([before[:8], after[:8]], dim=1)
    return measured, shown


def measure_right(model, judge, clip, tokenizer, edits, wanted, *how):
    """Are filtered pairs better? Sample one pair for each Edit; wanted: a `dataset.Filter`, how: see `measure_pairs`.

    Returns the fraction that the filter keeps, and the fraction of pairs that show their captions, of all and of those
    kept (None if there are none): {"yield", "right_all", "right_kept"}.
    """
    before, after, found = sample(model, judge, edits, *how)
    scores = clip_similarities(clip, tokenizer, edits, before, after, how[-1]).T.tolist()
    kept = np.array([wanted.keeps(dict(zip(SIMILARITIES, row, strict=True))) for row in scores])
    right_kept = float(found[kept].mean()) if kept.any() else None
    return {"yield": float(kept.mean()), "right_all": float(found.mean()), "right_kept": right_kept}


def evaluate_pairs(options, settings):
    """Measure pairs of one text-to-image model: with and without Prompt-to-Prompt, with and without the filter."""
    model, judge = StableDiffusion.load(options.sd, options.device), Judge.load(options.judge, options.device)
    clip, tokenizer = load_clip(options.clip, options.device)
    wanted = Filter.read(options.clip)
    options.out.mkdir(parents=True, exist_ok=True)
    how = options.guidance, options.steps, options.batch_size
    ways, shown = measure_pairs(model, judge, one_sided_edits(options.count, options.seed), *how)
    rng = np.random.default_rng([8_004, options.seed])
    edits = [random_edit(rng, KINDS[number % len(KINDS)], test=True) for number in range(options.count)]
    found = measure_right(model, judge, clip, tokenizer, edits, wanted, *how)

    independent = ways["independent noise"]["change"]
    columns = "change in the half not named, L1", "relative to independent noise", "both images right"
    rows = {}
    for way, row in ways.items():
        rows[way] = [f"{row['change']:.4f}", f"{row['change'] / independent:.2f}", percent(row["both_right"])]
    thresholds = ", ".join(f"{name} {value}" for name, value in asdict(wanted).items())
    cells = ["none" if fraction is None else percent(fraction) for fraction in found.values()]
    filtered = table(["kept", "both images right, of all", "of those kept"], {thresholds: cells})
    texts = ["# Generated pairs", f"`{settings['command']}`", table(columns, rows), filtered]
    print("\n\n".join(texts[2:]))
    large = [enlarge(to_image(x)) for images in shown.values() for x in images.flatten(0, 1)]
    columns = len(large) // len(shown)
    image = grid(large, columns, None, ["before", "after"] * (columns // 2), list(shown))
    write_results(options.out, "pairs", {"settings": settings, "ways": ways, "filter": found}, texts, image)
