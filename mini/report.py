"""What the two evaluations share: CLIP's similarities, tables in Markdown, and the files of a result."""

import json

from cli import atomic_write

import torch

from images import save_png
from mini.scenes import in_batches
from mini.world import caption

SIMILARITIES = ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image")


def clip_similarities(clip, tokenizer, edits, before, after, batch_size):
    """`CLIP.edit_similarities` of images [N, 3, H, W] in [-1, 1] and the captions of N edits: SIMILARITIES, [4, N]."""
    device = clip.logit_scale.device

    def compute(edits, before, after):
        images = ((x.to(device) + 1) / 2 for x in (before, after))
        texts = [caption(edit.before) for edit in edits], [caption(edit.after) for edit in edits]
        found = clip.edit_similarities(*images, *(tokenizer(captions).to(device) for captions in texts))
        return torch.stack([found[name] for name in SIMILARITIES], dim=1)

    return in_batches(compute, batch_size, edits, before, after).T.contiguous()


def percent(fraction):
    """A fraction in [0, 1] in percent."""
    return f"{100 * fraction:.1f} %"


def table(columns, rows):
    """A table in Markdown. columns: their titles, rows: {title: cells}."""
    lines = [f"| {' | '.join(cells)} |" for cells in [["", *columns], *([title, *rows[title]] for title in rows)]]
    lines.insert(1, "|---" * (1 + len(columns)) + "|")
    return "\n".join(lines)


def write_results(out, name, results, paragraphs, image):
    """Write NAME.json, NAME.md and NAME.png into the folder `out`, and say so."""
    save_png(image, out / f"{name}.png")
    for ending, text in (("json", json.dumps(results, indent=2, default=str)), ("md", "\n\n".join(paragraphs))):
        with atomic_write(out / f"{name}.{ending}") as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    print(f"\n{out} holds {name}.md, {name}.json and {name}.png")
