"""Generate training data the paper's way: captions and instructions, then pairs of pictures, then a filter (Sec. 3.1).

    python datagen.py text   --writer rules --count 5000 --out runs/mini/edits.jsonl
    python datagen.py text   --writer openai --captions captions.txt --out runs/edits.jsonl
    python datagen.py finetune --out runs/chats.jsonl      # a language model that writes edits better: the paper's way
    python datagen.py images --edits runs/mini/edits.jsonl --out runs/mini/pairs --samples 4
    python datagen.py calibrate --edits runs/mini/edits.jsonl --clip MY_CLIP     # once for a CLIP of one's own

`text --writer openai` and `images` may be stopped at any time; the same command goes on where it was.
"""

import json
import os
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from captions import FIELDS
from dataset import Filter, Pair, write_edit, write_seeds
from errors import Parser, UserError, run_program, written_whole
from images import to_image, to_tensor
from p2p import CONTROLS, PairNoise, sample_pairs
from report import make_folder
from settings import check_device, check_sampling, check_seeds
from text2image import TextToImage
from weights import write_json
from world import caption, random_edit, render

ROOT = Path(__file__).resolve().parent


# ---- text: captions, instructions, captions after the edit ----


def write_text(options):
    """Triplets by a language model, or by the miniature's own rules."""
    if options.writer == "rules":
        return write_rules(options)
    if not options.captions:
        raise UserError("--writer openai needs --captions, a .txt, .jsonl or .csv file")
    from writer import write_edits  # openai takes a second to import

    return write_edits(options)


def finetune_text(options):
    """Fine-tune a language model on the hand-written triplets."""
    from finetune import finetune

    finetune(options)


def write_rules(options):
    """Triplets of the miniature's world, by its own rules: {"caption", "edit", "output", "url"}, a line each."""
    rng = np.random.default_rng(options.seed)
    with written_whole(options.out) as beside, open(beside, "w", encoding="utf-8") as file:
        for _ in range(options.count):
            edit = random_edit(rng)
            texts = (caption(edit.before), edit.instruction, caption(edit.after))
            print(json.dumps({**dict(zip(FIELDS, texts, strict=True)), "url": None}), file=file)
    print(f"{options.out}: {options.count} triplets")


def write_true(options):
    """Pairs of TRUE pictures, drawn by the miniature's world: never for an editor of ours, only for its upper bound."""
    rng = np.random.default_rng(options.seed)
    make_folder(options.out)
    for number in tqdm(range(options.count), desc="drawing", unit="pair", mininterval=5, leave=False):
        edit = random_edit(rng)
        texts = (caption(edit.before), edit.instruction, caption(edit.after))
        pair = Pair(render(edit.before), render(edit.after), {"seed": edit.before.layout})
        write_edit(options.out, number, {**dict(zip(FIELDS, texts, strict=True)), "url": None}, [pair])
    print(f"{options.out}: {write_seeds(options.out)} true pairs")


def read_edits(path):
    """The triplets of a .jsonl file: a list of dicts with the texts of FIELDS. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(file)  # str.splitlines would also split at U+2028, which JSON may hold
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; datagen.py text writes one") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    edits = []
    for number, line in enumerate(lines, 1):
        try:
            edit = json.loads(line)
            complete = all(edit[field].strip().encode() for field in FIELDS)
        except (ValueError, KeyError, TypeError, AttributeError):
            complete = False
        if not complete:
            raise UserError(f"{path}, line {number}: the texts {', '.join(FIELDS)} are needed")
        edits.append(edit)
    if not edits:
        raise UserError(f"{path} holds no edits")
    return edits


# ---- images: many candidates an edit, and the best of those that pass the filter ----


def load_models(options):
    """(TextToImage, CLIP, its tokenizer, the range of guidance scales) that the command line names."""
    if options.threads:
        torch.set_num_threads(options.threads)
    parts = checkpoint.load(options.weights, options.device, getattr(torch, options.dtype))
    model = TextToImage(parts)
    model.vae.float()  # a small part of the work, and bfloat16 has fewer levels than a picture
    options.resolution = options.resolution or model.sampling.resolution
    if options.resolution % parts.side_multiple:
        asked = f"the resolution should be a multiple of {parts.side_multiple} for this model"
        raise UserError(f"{asked}, not {options.resolution}")
    own = model.sampling.text_guidance
    guidance = tuple(options.guidance or (own, 2 * own))
    return model, *checkpoint.load_clip(options.clip, options.device), guidance


def make_images(options):
    """Sample and filter pairs for every edit, in the authors' layout; `candidates.jsonl` keeps every score."""
    edits = read_edits(options.edits)
    model, clip, tokenizer, guidance = load_models(options)
    own = Filter.read(options.clip)
    given = {field.name: getattr(options, f"min_{field.name}") for field in fields(Filter)}
    wanted = Filter(**{**asdict(own), **{name: value for name, value in given.items() if value is not None}})
    make_folder(options.out)

    part, parts = options.shard
    log = options.out / ("candidates.jsonl" if parts == 1 else f"candidates_{part}of{parts}.jsonl")
    done = finished(log)
    mine = range(part, len(edits), parts)
    todo = [number for number in mine if number not in done]
    group = max(1, options.batch // options.samples)  # edits that are made at once
    start, kept = time.monotonic(), 0
    with tqdm(total=len(mine), initial=len(mine) - len(todo), desc="pairs", unit="edit", mininterval=5) as bar:
        for first in range(0, len(todo), group):
            numbers = todo[first : first + group]
            seeds = range(options.samples)
            jobs = [(number, options.seed + number * options.samples + i) for number in numbers for i in seeds]
            made = []
            for i in range(0, len(jobs), options.batch):
                batch = jobs[i : i + options.batch]
                made += sample_candidates(model, clip, tokenizer, edits, batch, guidance, options)
            for place, number in enumerate(numbers):
                candidates = made[place * options.samples : (place + 1) * options.samples]
                passed = [pair for pair in candidates if wanted.keeps(pair.metadata)]
                best = sorted(passed, key=lambda pair: -pair.metadata["clip_sim_dir"])[: options.keep]
                write_edit(options.out, number, prompt_of(edits[number]), best)
                with open(log, "a", encoding="utf-8") as file:
                    scores = [pair.metadata for pair in candidates]
                    kept_seeds = [pair.metadata["seed"] for pair in best]
                    print(json.dumps({"edit": number, "kept": kept_seeds, "candidates": scores}), file=file)
                kept += len(best)
            bar.update(len(numbers))
            bar.set_postfix(kept=kept)
    total = write_seeds(options.out)
    print(f"{options.out}: {total} pairs so far, of {len(edits)} edits ({time.monotonic() - start:.0f} s)")


def calibrate(options):
    """Set a CLIP's thresholds: each is what the worst candidates of a sample, a share of them, do not reach."""
    edits = read_edits(options.edits)[: options.count]
    model, clip, tokenizer, guidance = load_models(options)
    scores = []
    for first in tqdm(range(0, len(edits), options.batch), desc="calibrating", unit="batch", leave=False):
        jobs = [(number, options.seed + number) for number in range(first, min(first + options.batch, len(edits)))]
        made = sample_candidates(model, clip, tokenizer, edits, jobs, guidance, options)
        scores += [pair.metadata for pair in made]

    names = [("clip_sim_0", "clip_sim_1"), ("clip_sim_image",), ("clip_sim_dir",)]  # in the order of Filter's fields
    worst = [[min(score[name] for name in group) for score in scores] for group in names]
    chosen = Filter(*(round(float(np.quantile(*pair)), 3) for pair in zip(worst, options.shares, strict=True)))
    kept = sum(chosen.keeps(score) for score in scores) / len(scores)
    with written_whole(Path(options.clip) / "filter.json") as beside:
        write_json(beside, asdict(chosen))
    print(f"{options.clip}/filter.json: {asdict(chosen)} keep {100 * kept:.0f} % of {len(scores)} candidates")


def prompt_of(edit):
    """What prompt.json holds of an edit."""
    return {**{field: edit[field] for field in FIELDS}, "url": edit.get("url")}


def finished(path):
    """The numbers of the edits whose candidates are noted in candidates.jsonl; a torn last line is cut off."""
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        return {json.loads(line)["edit"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a damaged line; remove it, and that edit is made anew ({error})") from error


def sample_candidates(model, clip, tokenizer, edits, jobs, guidance, options):
    """Sample the pairs of `jobs`, a list of (edit's number, seed), in one batch: a list of Pair."""
    before, after = ([edits[number][field] for number, _ in jobs] for field in ("caption", "output"))
    side = options.resolution // model.vae.config.factor
    noise = PairNoise(
        [seed for _, seed in jobs], (model.vae.config.latent_channels, side, side), guidance, device=model.device
    )
    pictures = sample_pairs(model, before, after, noise, options.steps, control=options.control)
    if not all(half.isfinite().all() for half in pictures):
        raise UserError("the networks gave values that are not numbers: damaged weights, or too coarse a --dtype")
    images = [[to_image(x) for x in half] for half in pictures]
    # CLIP sees what will be on disk: whole numbers, in [0, 1]
    seen = [torch.stack([to_tensor(image) for image in half]).add(1).div(2).to(model.device) for half in images]
    scores = clip.edit_similarities(*seen, *(tokenizer(texts).to(model.device) for texts in (before, after)))
    pairs = []
    for index, (_, seed) in enumerate(jobs):
        metadata = {
            "seed": seed,
            "p2p_threshold": round(noise.p[index].item(), 6),
            "cfg_scale": round(noise.guidance[index].item(), 6),
            **{name: round(values[index].item(), 6) for name, values in scores.items()},
        }
        pairs.append(Pair(images[0][index], images[1][index], metadata))
    return pairs


# ---- the command line ----


def shard(text):
    """Read "1/4" as (1, 4): the second of four parts."""
    part, parts = (int(number) for number in text.split("/"))
    if not 0 <= part < parts:
        raise ValueError
    return part, parts


def own_shard():
    """The part of a process that torchrun started, of as many as there are; else everything."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def parse(arguments=None):
    """The command line."""
    parser = Parser(prog="datagen.py", description="Generate training data: instructions, then pairs of pictures.")
    commands = parser.add_subparsers(dest="command", required=True)

    text = commands.add_parser("text", help="captions, instructions and captions after the edit")
    text.set_defaults(run=write_text)
    add = text.add_argument
    add("--writer", choices=["rules", "openai"], default="rules", help="the miniature's rules, or a language model")
    add("--out", type=Path, required=True, metavar="FILE.jsonl")
    add("--count", type=int, default=5000, metavar="N", help="rules: how many (default: 5000)")
    add("--seed", type=int, default=0, metavar="S", help="rules: of the edits (default: 0)")
    add("--captions", type=Path, metavar="FILE", help="openai: captions to edit, in a .txt, .jsonl or .csv file")
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
        add("--device", default="cpu", metavar="D")
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
    if hasattr(options, "seed"):
        check_seeds([options.seed])
    if hasattr(options, "device"):
        for scale in options.guidance or (None,):
            check_sampling(options.steps, scale, None, options.resolution)
        check_device(options.device)
    options.run(options)


if __name__ == "__main__":
    run_program(main)
