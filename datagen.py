"""Generate training data the paper's way: captions and instructions, then pairs of pictures, then a filter (Sec. 3.1).

    python datagen.py text   --writer rules --count 5000 --out runs/mini/edits.jsonl
    python datagen.py text   --writer openai --captions captions.txt --out runs/edits.jsonl
    python datagen.py finetune --out runs/chats.jsonl      # a language model that writes edits better: the paper's way
    python datagen.py images --edits runs/mini/edits.jsonl --out runs/mini/pairs --samples 4
    python datagen.py browse runs/mini/pairs               # a page to look at it with
    python datagen.py calibrate --edits runs/mini/edits.jsonl --clip MY_CLIP     # once for a CLIP of one's own

`text --writer openai` and `images` may be stopped at any time; the same command goes on where it was.
"""

import json
import math
import os
from argparse import BooleanOptionalAction
from dataclasses import fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import (
    Parser,
    UserError,
    atomic_write,
    check_device,
    check_sampling,
    check_seeds,
    make_folder,
    own_device,
    run_program,
)
from dataset import Filter, Pair, write_edit, write_seeds
from language.captions import FIELDS, Unique, read_captions
from mini.world import caption, edit_scene, held_out, random_edit, read_caption, render
from p2p import CONTROLS
from pages.browse import write_page
from pairs import calibrate, make_images

ROOT = Path(__file__).resolve().parent


# ---- text: captions, instructions, captions after the edit ----


def write_text(options):
    """Triplets by a language model, or by the miniature's own rules."""
    if options.writer == "rules":
        return write_rules(options)
    if not options.captions:
        raise UserError("--writer openai needs --captions, a .txt, .jsonl or .csv file")
    from language.writer import write_edits  # openai takes a second to import

    return write_edits(options)


def finetune_text(options):
    """Fine-tune a language model on the hand-written triplets."""
    from language.finetune import finetune

    finetune(options)


def write_rules(options):
    """Triplets of the miniature's world, by its own rules: {"caption", "edit", "output", "url"}, a line each."""
    rng = np.random.default_rng(options.seed)
    edits = edits_of_captions(options.captions, rng) if options.captions else random_edits(options.count, rng)
    count = 0
    with atomic_write(options.out) as beside, open(beside, "w", encoding="utf-8") as file:
        for record in edits:
            print(json.dumps(record), file=file)
            count += 1
        if not count:
            raise UserError(f"{options.captions} holds no captions to edit")
    print(f"{options.out}: {count} triplets")


def random_edits(count, rng):
    """As many triplets of random scenes."""
    for _ in range(count):
        yield triplet(random_edit(rng))


def edits_of_captions(path, rng):
    """A triplet for every caption of a file, but for repeated ones and for scenes that are kept to be measured on."""
    captions, kept_out = Unique(read_captions(path)), 0
    for text, url in captions:
        try:
            scene = read_caption(text)
        except ValueError as error:
            raise UserError(f"{path}: {error}; --writer openai reads any caption") from error
        kept_out += held_out(scene)
        if not held_out(scene):
            yield triplet(edit_scene(scene, rng), url)
    if captions.skipped or kept_out:
        again = f"{captions.skipped} captions that are empty or came before"
        print(f"left out: {again}, {kept_out} of scenes kept to be measured on")


def triplet(edit, url=None):
    """An edit of the miniature's world as a record."""
    texts = (caption(edit.before), edit.instruction, caption(edit.after))
    return {**dict(zip(FIELDS, texts, strict=True)), "url": url}


def write_true(options):
    """Pairs of TRUE pictures, drawn by the miniature's world: never for an editor of ours, only for its upper bound."""
    rng = np.random.default_rng(options.seed)
    make_folder(options.out)
    for number in tqdm(range(options.count), desc="drawing", unit="pair", mininterval=5, leave=False):
        edit = random_edit(rng)
        pair = Pair(render(edit.before), render(edit.after), {"seed": edit.before.layout})
        write_edit(options.out, number, triplet(edit), [pair])
    print(f"{options.out}: {write_seeds(options.out)} true pairs")


# ---- the command line ----


def shard(text):
    """Read "1/4" as (1, 4): the second of four parts."""
    part, parts = (int(number) for number in text.split("/"))
    if not 0 <= part < parts:
        raise ValueError
    return part, parts


def write_html(options):
    """The page of a data set."""
    print(write_page(options.data, options.out or options.data / "index.html", options.count))


def own_shard():
    """The part of a process that torchrun started, of as many as there are; else everything."""
    parts = int(os.environ.get("WORLD_SIZE") or 1)
    return (int(os.environ["RANK"]), parts) if parts > 1 else (0, 1)


def parse(arguments=None):
    """The command line."""
    parser = Parser(prog="datagen.py", description="Generate training data: instructions, then pairs of pictures.")
    commands = parser.add_subparsers(dest="command", required=True)

    text = commands.add_parser("text", help="captions, instructions and captions after the edit")
    text.set_defaults(run=write_text)
    add = text.add_argument
    add("--writer", choices=["rules", "openai"], default="rules", help="the miniature's rules, or a language model")
    add("--out", type=Path, required=True, metavar="FILE.jsonl")
    add("--count", type=int, default=5000, metavar="N", help="rules without --captions: how many (default: 5000)")
    add("--seed", type=int, default=0, metavar="S", help="rules: of the edits (default: 0)")
    add("--captions", type=Path, metavar="FILE", help="captions to edit, in a .txt, .jsonl or .csv file")
    add("--model", default="gpt-4o-mini", metavar="NAME", help="openai: the language model (default: %(default)s)")
    add("--few-shot", type=int, default=8, metavar="N", help="openai: examples to show; 0 if fine-tuned (default: 8)")
    add("--concurrency", type=int, default=16, metavar="N", help="openai: requests at a time (default: 16)")
    add("--moderate", action="store_true", help="openai: drop what the moderation endpoint flags")
    add("--max-tokens-total", type=int, metavar="N", help="openai: stop before more tokens are used in this run")
    add("--timeout", type=float, default=60, metavar="S", help="openai: seconds for an answer (default: 60)")
    add("--shard", type=shard, default=own_shard(), metavar="I/N", help="openai: part I of N (default: torchrun's)")

    tune = commands.add_parser("finetune", help="fine-tune a language model on hand-written triplets")
    tune.set_defaults(run=finetune_text)
    add = tune.add_argument
    add("--out", type=Path, default=Path("runs/chats.jsonl"), metavar="FILE.jsonl", help="(default: %(default)s)")
    add("--model", default="gpt-4o-mini-2024-07-18", metavar="NAME", help="to start from (default: %(default)s)")
    add("--epochs", type=int, default=1, metavar="N", help="(default: 1, as in the paper)")
    add("--dry-run", action="store_true", help="check and convert, and send nothing")
    add("--job", metavar="ID", help="only follow a job that was started before")
    for command in (text, tune):
        add = command.add_argument
        add("--examples", type=Path, default=ROOT / "data/edit_examples.jsonl", metavar="FILE", help="triplets to show")
        add("--retries", type=int, default=8, metavar="N", help="of a request that fails (default: 8)")

    true = commands.add_parser("true", help="true pairs of the miniature's world, to compare with (upper bound)")
    true.set_defaults(run=write_true)
    add = true.add_argument
    add("--count", type=int, default=5000, metavar="N", help="how many (default: 5000)")
    add("--seed", type=int, default=0, metavar="S")
    add("--out", type=Path, required=True, metavar="DIR", help="the data set, in the authors' layout")

    images = commands.add_parser("images", help="pairs of pictures for such edits, filtered by CLIP")
    images.set_defaults(run=make_images)
    add = images.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the data set, in the authors' layout")
    add("--samples", type=int, default=100, metavar="N", help="candidates an edit (default: 100)")
    add("--keep", type=int, default=4, metavar="N", help="pairs kept of an edit, at most (default: 4)")
    add("--shard", type=shard, default=own_shard(), metavar="I/N", help="part I of N, from 0 (default: torchrun's)")
    add("--dry-run", action="store_true", help="say how long it takes and how large it gets, and make nothing")
    for field in fields(Filter):
        name = field.name.replace("_", "-")
        add(f"--min-{name}", type=float, metavar="X", help=f"threshold (default: the CLIP's own, else {field.default})")

    thresholds = commands.add_parser("calibrate", help="the filter's thresholds for a CLIP of one's own: filter.json")
    thresholds.set_defaults(run=calibrate)
    add = thresholds.add_argument
    add("--count", type=int, default=256, metavar="N", help="candidates to sample, one an edit (default: 256)")
    add(
        "--shares",
        type=float,
        nargs=3,
        default=(0.2, 0.05, 0.2),
        metavar=("TEXT", "IMAGE", "DIR"),
        help="how many should fail each threshold (default: 0.2 0.05 0.2)",
    )

    browse = commands.add_parser("browse", help="one page that shows a data set, to be opened in any browser")
    browse.set_defaults(run=write_html)
    add = browse.add_argument
    add("data", type=Path, metavar="DIR", help="the data set, in the authors' layout")
    add("--count", type=int, default=2000, metavar="N", help="pairs on it, spread over all, at most (default: 2000)")
    add("--out", type=Path, metavar="FILE.html", help="(default: DIR/index.html)")

    for command in (images, thresholds):
        add = command.add_argument
        add("--edits", type=Path, required=True, metavar="FILE.jsonl", help="from datagen.py text")
        add("--weights", default=str(ROOT / "models/mini/sd"), metavar="PATH", help="a text-to-image model")
        add("--clip", default=str(ROOT / "models/mini/clip"), metavar="PATH", help="the CLIP that filters")
        add("--control", choices=CONTROLS, default="self", help="what Prompt-to-Prompt borrows (default: self)")
        add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
        add("--guidance", type=float, nargs=2, metavar=("LOW", "HIGH"), help="(default: 1 to 2 times the model's)")
        add("--resolution", type=int, metavar="R", help="pixels a side (default: the model's)")
        add("--batch", type=int, default=16, metavar="B", help="pairs sampled at once (default: 16)")
        add("--seed", type=int, default=0, metavar="S", help="of the first candidate (default: 0)")
        add("--compile", action=BooleanOptionalAction, help="compile the networks first (default: on a GPU)")
        add("--device", default="cpu", metavar="D", help="cpu or cuda, under torchrun a GPU for each process")
        add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
        add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Check the settings and run one of the commands."""
    options = parse(arguments)
    for name in ("count", "samples", "keep", "steps", "batch", "threads", "concurrency", "max_tokens_total", "epochs"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} should be at least 1, not {value}")
    if not 0 < getattr(options, "timeout", 1) < 1e6:
        raise UserError(f"--timeout should be a number of seconds above 0, not {options.timeout}")
    for name in ("few_shot", "retries"):
        if getattr(options, name, 0) < 0:
            raise UserError(f"--{name.replace('_', '-')} should be at least 0, not {getattr(options, name)}")
    if not all(0 <= share < 1 for share in getattr(options, "shares", ())):
        raise UserError("--shares should be from 0 to below 1")
    for name in vars(options):
        if name.startswith("min_") and not math.isfinite(getattr(options, name) or 0):
            raise UserError(f"--{name.replace('_', '-')} should be a number")
    if hasattr(options, "seed"):
        check_seeds([options.seed])
    if hasattr(options, "device"):
        for scale in options.guidance or (None,):
            check_sampling(options.steps, scale, None, options.resolution)
        options.device = own_device(options.device)
        check_device(options.device)
    options.run(options)


if __name__ == "__main__":
    run_program(main)
