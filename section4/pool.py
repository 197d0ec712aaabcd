"""Data sets for Fig. 10 from one pool of candidates: what the CLIP filter keeps, and as many pairs drawn randomly.

    python datagen.py images ... --min-image-text -1 --min-image-image -1 --min-direction -1 --keep 16 --out P
    python -m section4.pool P --out runs/ablation --clip mini    # makes filtered and random there

An edit counts once in training, however many pairs it has, so the random set has as many pairs of the same edits: only
the choice among an edit's candidates differs, and not how many edits or pairs there are.
"""

import shutil
from pathlib import Path

from cli import SEED, WHOLE, Parser, UserError, atomic_write, run_program

import numpy as np
from tqdm import tqdm

from dataset import Filter, begin_data_set, read_metadata, read_seeds, write_seeds
from formats import hub


def chosen(candidates, wanted, keep, rng):
    """Of an edit's candidates, lines of metadata: (those that a `Filter` keeps, as many drawn randomly).

    keep: at most so many, the highest directional similarity first, as `datagen.py images` does.
    """
    kept = sorted(filter(wanted.keeps, candidates), key=lambda line: -line["clip_sim_dir"])[:keep]
    return kept, [candidates[i] for i in rng.choice(len(candidates), len(kept), replace=False)]


def copy_edit(source, target, lines):
    """Copy the folder of an edit with the pairs of these lines of metadata, whole or not at all."""
    with atomic_write(target) as beside:
        beside.mkdir()
        shutil.copy(source / "prompt.json", beside)
        for line in lines:
            for side in (0, 1):
                shutil.copy(source / f"{line['seed']}_{side}.jpg", beside)
        whole = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        seeds = {line["seed"] for line in lines}
        numbered = zip(read_metadata(source / "metadata.jsonl"), whole, strict=True)
        (beside / "metadata.jsonl").write_text("".join(text for line, text in numbered if line["seed"] in seeds))


def main(arguments=None):
    """Write both data sets."""
    parser = Parser(prog="section4.pool", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("pool", type=Path, metavar="POOL", help="a data set of all candidates, made without a filter")
    add("--out", type=Path, required=True, metavar="DIR", help="for the two data sets")
    add("--clip", default="mini", metavar="DIR", help="whose thresholds are the filter's (default: %(default)s)")
    add("--keep", type=WHOLE, default=4, metavar="N", help="pairs of an edit, at most (default: %(default)s)")
    add("--seed", type=SEED, default=0, metavar="S", help="of the random choice (default: %(default)s)")
    options = parser.parse_args(arguments)
    wanted, names = Filter.read(hub.find(options.clip, "clip")), ("filtered", "random")
    entries, rng, total = read_seeds(options.pool), np.random.default_rng(options.seed), 0
    settings = {"program": "section4.pool", "pool": options.pool, "keep": options.keep, "seed": options.seed}
    for name in names:
        begin_data_set(options.out / name, {**settings, "clip": options.clip})
    for folder, seeds in tqdm(entries, unit="edit"):
        candidates, total = read_metadata(options.pool / folder / "metadata.jsonl"), total + len(seeds)
        for name, lines in zip(names, chosen(candidates, wanted, options.keep, rng), strict=True):
            if lines and not (options.out / name / folder).exists():
                copy_edit(options.pool / folder, options.out / name / folder, lines)
    counts = [write_seeds(options.out / name) for name in names]
    if not counts[0]:
        raise UserError(f"the filter keeps none of the {total} candidates in {options.pool}")
    print(f"{options.out}: {counts[0]} pairs filtered, {counts[1]} drawn randomly, of {total} candidates")


if __name__ == "__main__":
    run_program(main)
