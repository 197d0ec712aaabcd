"""What evaluate.py measures in the miniature world: editors on edits whose true result is known, and generated pairs.

All scenes are held-out compositions; the editors' edits are worded plainly, as in training, and as it never words them.
"""

import json
from dataclasses import asdict, replace

from cli import UserError, atomic_write

import numpy as np
import torch
import torch.nn.functional as F

from dataset import Filter
from formats import hub
from formats.checkpoint import load_clip
from gpu.savings import Savings
from images import grid, save_png, to_image, to_tensor
from ip2p import InstructPix2Pix
from mini.drawing import render
from mini.faults import VISIBLE, fault
from mini.judge import Judge, in_batches, right
from mini.wording import CLASSES, STYLES
from mini.world import KINDS, P_RANGE, random_edit
from p2p import P_RANGE as PAPERS_P_RANGE
from p2p import PairNoise, sample_pairs
from stable_diffusion import StableDiffusion

CHANGED = 0.02  # a pixel whose true change is larger, in any channel in [0, 1], belongs to the edited region ...
MARGIN = 8  # ... and so do the pixels at most this far from it: one latent, which an edit changes as a whole
TOUCHED = 0.05  # the largest mean L1 outside the region, in [0, 1], at which an edit still succeeds
EDITOR, BOUND = "this editor", "the same, trained on true pairs (upper bound)"
COPY, FLOOR, TRUE = "copy the input", "true image through the VAE (floor)", "true image (the judge's own error)"
MEANING = f"""\
A success: the judge reads every attribute of the edited image as in the true edited scene, and outside the edited
region the image differs from the true one by at most {TOUCHED} (mean L1 in [0, 1]). Edits that leave less than 1 % of
the image outside, as those of the medium do, are judged by the attributes alone and do not count in the mean L1.
Clean: a success without a fault that anyone would see, as a second moon or a ghost of what was removed (mini/faults.py:
averaged colours differ nowhere by more than {VISIBLE}). Wordings: plain templates; whatever training uses; and
constructions and words that it never uses."""
SIMILARITIES = ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image")


def held_out_edits(count, seed=0, validation=False):
    """`count` edits, all kinds equally often, and of each kind all wordings.

    Equal seeds give equal edits; fewer edits are the first of more. validation: a separate stream of edits.
    """
    if count % (len(KINDS) * len(CLASSES)):
        multiple = len(KINDS) * len(CLASSES)
        raise UserError(f"the count of edits should be a multiple of {multiple} (kinds x wordings), not {count}")
    edits, stream = [], 8_002 if validation else 8_001
    for number in range(count):
        rng, wording = np.random.default_rng([stream, seed, number]), CLASSES[number // len(KINDS) % len(CLASSES)]
        edits.append(random_edit(rng, KINDS[number % len(KINDS)], test=True, wording=wording))
    return edits


def true_images(edits):
    """The images before and after the edits: two tensors [count, 3, 128, 128] in [-1, 1]."""
    pairs = [(to_tensor(render(edit.before)), to_tensor(render(edit.after))) for edit in edits]
    return tuple(torch.stack(images) for images in zip(*pairs, strict=True))


def edit_all(model, edits, before, sampling, batch_size, savings=None):
    """Edit the images `before` [count, 3, H, W] by an InstructPix2Pix -> images of the same shape, in [-1, 1].

    An edit's seed is its scene's layout, whatever the batch size and the model, so that editors can be compared.
    """

    def compute(edits, before):
        text, image = model.encode_text([edit.instruction for edit in edits]), model.encode_image(before)
        how = sampling.text_guidance, sampling.image_guidance, sampling.steps
        more = {"sampler": sampling.sampler, "schedule": sampling.schedule, "savings": savings}
        return model.sample(text, image, [edit.before.layout for edit in edits], *how, **more).clamp(-1, 1).cpu()

    return in_batches(compute, batch_size, edits, before, desc="editing")


def measure(images, edits, before, after, judge):
    """How well do `images` show `edits`? All images [count, 3, 128, 128] in [-1, 1]; before, after: the true ones.

    Returns fractions in [0, 1]; l1_outside is the mean of the edits that leave anything outside.
    """
    attributes = right(judge, images, [edit.after for edit in edits])
    l1, counts = (values.numpy() for values in l1_outside(images, before, after))
    success = attributes & (l1 <= TOUCHED)
    spotless = np.array([ok and fault(*of) <= VISIBLE for ok, *of in zip(success, images, edits, strict=True)])

    def by(name, values):
        of = np.array([getattr(edit, name) for edit in edits])
        return {value: fractions(success[of == value], spotless[of == value]) for value in values}

    return {
        "count": len(edits),
        "success": float(success.mean()),
        "interval": wilson(int(success.sum()), len(edits)),
        "attributes": float(attributes.mean()),
        "l1_outside": float(l1[counts].mean()),
        "clean": float(spotless.mean()),
        "wordings": by("wording", CLASSES),
        "styles": by("style", STYLES),
        "kinds": by("kind", KINDS),
        "failed": np.flatnonzero(~success).tolist(),
    }


def fractions(*counted):
    """The means of arrays of bools; None of empty ones."""
    return [float(values.mean()) if len(values) else None for values in counted]


def edited_region(before, after):
    """Where an edit may change the image: the true images [B, 3, H, W] in [-1, 1] -> bool [B, 1, H, W]."""
    changed = ((after - before).abs() / 2).amax(dim=1, keepdim=True) > CHANGED
    return F.max_pool2d(changed.float(), 2 * MARGIN + 1, stride=1, padding=MARGIN).bool()


def l1_outside(images, before, after):
    """The mean L1 distance, in [0, 1], to the TRUE edited image outside the edited region; all [B, 3, H, W] in [-1, 1].

    Returns (distances [B], does it count? bool [B]): where less than 1 % of the image is outside, as in edits of the
    medium, the distance is 0 and does not count.
    """
    outside = ~edited_region(before, after)
    error = ((images - after).abs() / 2).mean(dim=1, keepdim=True)
    counts = outside.float().mean(dim=(1, 2, 3)) >= 0.01
    mean = (error * outside).sum(dim=(1, 2, 3)) / outside.sum(dim=(1, 2, 3)).clamp(min=1)
    return mean * counts, counts


def wilson(successes, count, z=1.96):
    """The 95 % interval [low, high] of a fraction (Wilson 1927); unlike p +- z sigma it stays within [0, 1]."""
    p, spread = successes / count, z * z / count
    middle = (p + spread / 2) / (1 + spread)
    half = (spread * (p * (1 - p) + spread / 4)) ** 0.5 / (1 + spread)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def clip_scores(clip, tokenizer, images, edits, before, batch_size=63):
    """The paper's metrics (Sec. 3.1.2 and 4), means over the edits; `images` and `before` as for `measure`."""
    similarities = clip_similarities(clip, tokenizer, edits, before, images, batch_size)
    _, image_caption, directional, image_image = similarities.mean(dim=1).tolist()
    return {"image_image": image_image, "directional": directional, "image_caption": image_caption}


def tables(results):
    """The results in Markdown: {title: table}, the overall one first."""
    overall, parts = {}, {title: {} for title in ("wordings", "kinds", "styles")}
    for name, row in results["rows"].items():
        low, high = row["interval"]
        success = f"**{percent(row['success'])}** [{100 * low:.1f} to {percent(high)}]"
        overall[name] = [success, percent(row["clean"]), percent(row["attributes"]), f"{row['l1_outside']:.4f}"]
        for title, table_rows in parts.items():
            table_rows[name] = [" / ".join(map(percent, pair)) for pair in row[title].values()]
    scores = {name: [f"{score:.3f}" for score in row.values()] for name, row in results["clip"].items()}
    columns = "success [95 % interval]", "clean", "all attributes right", "L1 outside"
    of_scores = "before to edited image", "directional", "edited image to its caption"
    return {
        "Overall": table(columns, overall),
        "Success / clean, by the wording": table(CLASSES, parts["wordings"]),
        "Success / clean, by the kind of edit": table(KINDS, parts["kinds"]),
        "Success / clean, by the style of the request": table(STYLES, parts["styles"]),
        "Mean CLIP similarities": table(of_scores, scores),
    }


def evaluate_world(options, settings):
    """Measure an editor on held-out edits, next to what it should be compared with."""
    edits, size = held_out_edits(options.count, options.seed, options.validation), options.batch_size
    paths = {EDITOR: options.model} | ({BOUND: options.bound} if options.bound else {})
    models = {name: InstructPix2Pix.load(path, options.device) for name, path in paths.items()}
    judge, clip = Judge.load(options.judge, options.device), load_clip(options.clip, options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    asked = {"steps": options.steps, "text_guidance": options.cfg_text, "image_guidance": options.cfg_image}
    asked |= {"sampler": options.sampler, "schedule": options.schedule}
    asked = {key: value for key, value in asked.items() if value is not None}
    sampling = {name: replace(model.sampling, **asked) for name, model in models.items()}
    before, after = true_images(edits)
    how = size, Savings.of(options)
    edited = {name: edit_all(model, edits, before, sampling[name], *how) for name, model in models.items()}

    def through_vae(x):  # the best result possible; encode_image does not scale, decode takes scaled latents
        editor = models[EDITOR]
        return editor.decode(editor.encode_image(x) * editor.vae.config.scaling).clamp(-1, 1).cpu()

    compared = {**edited, COPY: before, FLOOR: in_batches(through_vae, size, after), TRUE: after}
    rows = {name: measure(x, edits, before, after, judge) for name, x in compared.items()}
    scored = {**edited, "true image": after}
    scores = {name: clip_scores(*clip, x, edits, before, size) for name, x in scored.items()}
    settings["sampling"] = {name: asdict(chosen) for name, chosen in sampling.items()}
    results = {"settings": settings, "rows": rows, "clip": scores}

    use = "validation edits, to choose settings by" if options.validation else "held-out edits"
    texts = ["# Edits whose true result is known", f"{len(edits)} {use}: `{settings['command']}`", MEANING]
    for name, chosen in settings["sampling"].items():
        texts.append(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in chosen.items()))
    texts += [f"## {title}\n\n{text}" for title, text in tables(results).items()]
    print(tables(results)["Overall"])
    images, labels = [], []  # two edits of every kind, a plain one and one in a wording that is held out; a row a kind
    for position in (start + kind for kind in range(len(KINDS)) for start in (0, 2 * len(KINDS))):
        images += [before[position], edited[EDITOR][position], after[position]]
        success = "fails" if position in rows[EDITOR]["failed"] else "succeeds"
        labels += [edits[position].instruction, success, ""]
    title = "The first edits of every kind, not selected: plainly worded, and in wordings that training never uses"
    layout = 6, labels, ["before", "ours", "true"] * 2, KINDS, title
    write_results(options.out, "world", results, texts, images, layout)


# ---- generated pairs ----


def generate(model, judge, edits, guidance, steps, batch_size):
    """One Prompt-to-Prompt pair for each of N Edits; model: a `StableDiffusion`, guidance: the range to draw from.

    Returns images before and after, [N, 3, H, W] each, in [-1, 1], and whether the judge reads all attributes of both
    scenes in them, [N].
    """
    side = model.sampling.resolution // model.vae.config.factor
    shape = (model.vae.config.latent_channels, side, side)

    def compute(edits, seeds):
        p = [PAPERS_P_RANGE if edit.before.background == edit.after.background else P_RANGE for edit in edits]
        noise = PairNoise(seeds, shape, guidance, p, model.device)
        x = sample_pairs(model, *zip(*(edit.captions for edit in edits), strict=True), noise, steps)
        return torch.stack(x, dim=1).clamp(-1, 1).cpu()

    x, y = in_batches(compute, batch_size, edits, range(len(edits)), desc="pairs").unbind(1)
    found = right(judge, x, [edit.before for edit in edits]) & right(judge, y, [edit.after for edit in edits])
    return x, y, found


def pair_rows(edits, found, kept):
    """Of all pairs and of those of each kind: their number, and the fractions that are right, kept, right if kept.

    found, kept [N]: are both images right, does the filter keep the pair? A fraction of no pairs is None.
    """
    rows = {}
    for name in ("all", *KINDS):
        chosen = np.array([name in ("all", edit.kind) for edit in edits])
        counted = {"right": found[chosen], "kept": kept[chosen], "right_kept": found[chosen & kept]}
        fractions = {key: float(values.mean()) if len(values) else None for key, values in counted.items()}
        rows[name] = {"pairs": int(chosen.sum()), **fractions}
    return rows


def evaluate_pairs(options, settings):
    """Measure pairs of a text-to-image model on held-out edits, and what the CLIP's filter does with them."""
    model, judge = StableDiffusion.load(options.sd, options.device), Judge.load(options.judge, options.device)
    folder = hub.find(options.clip, "clip")
    clip, wanted = load_clip(folder, options.device), Filter.read(folder)
    options.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([8_004, options.seed])
    edits = [random_edit(rng, KINDS[number % len(KINDS)], test=True) for number in range(options.count)]
    before, after, found = generate(model, judge, edits, options.guidance, options.steps, options.batch_size)
    scores = clip_similarities(*clip, edits, before, after, options.batch_size)
    scores[2, [index for index, edit in enumerate(edits) if edit.before == edit.after]] = 1  # as in datagen.py
    scores = scores.T.tolist()
    kept = np.array([wanted.keeps(dict(zip(SIMILARITIES, row, strict=True))) for row in scores])
    rows = pair_rows(edits, found, kept)

    columns = "pairs", "both images right", "kept by the filter", "both right, of those kept"
    cells = {name: [str(row["pairs"]), *map(percent, [*row.values()][1:])] for name, row in rows.items()}
    thresholds = ", ".join(f"{name} {value}" for name, value in asdict(wanted).items())
    texts = ["# Generated pairs", f"`{settings['command']}`; the filter: {thresholds}", table(columns, cells)]
    print(texts[-1])
    images = torch.stack([before[:8], after[:8]], dim=1).flatten(0, 1)
    captions = [text for edit in edits[:8] for text in edit.captions]
    layout = 8, captions, ["before", "after"] * 4
    write_results(options.out, "pairs", {"settings": settings, "rows": rows}, texts, images, layout)


# ---- both ----


def clip_similarities(clip, tokenizer, edits, before, after, batch_size):
    """`CLIP.edit_similarities` of images [N, 3, H, W] in [-1, 1] and the captions of N edits: SIMILARITIES, [4, N]."""
    device = clip.logit_scale.device

    def compute(edits, before, after):
        images = ((x.to(device) + 1) / 2 for x in (before, after))
        texts = zip(*(edit.captions for edit in edits), strict=True)
        found = clip.edit_similarities(*images, *(tokenizer(captions).to(device) for captions in texts))
        return torch.stack([found[name] for name in SIMILARITIES], dim=1)

    return in_batches(compute, batch_size, edits, before, after).T.contiguous()


def percent(fraction):
    """A fraction in [0, 1] in percent; None that of nothing."""
    return "none" if fraction is None else f"{100 * fraction:.1f} %"


def table(columns, rows):
    """A table in Markdown. columns: their titles, rows: {title: cells}."""
    lines = [f"| {' | '.join(cells)} |" for cells in [["", *columns], *([title, *rows[title]] for title in rows)]]
    lines.insert(1, "|---" * (1 + len(columns)) + "|")
    return "\n".join(lines)


def write_results(out, name, results, paragraphs, images, layout):
    """Write NAME.json, NAME.md and NAME.png into the folder `out`; images [3, H, W], layout: as for `grid`."""
    save_png(grid([to_image(x) for x in images], *layout), out / f"{name}.png")
    for ending, text in (("json", json.dumps(results, indent=2, default=str)), ("md", "\n\n".join(paragraphs))):
        with atomic_write(out / f"{name}.{ending}") as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    print(f"\n{out} holds {name}.md, {name}.json and {name}.png")
