"""Generate training data the paper's way: captions and instructions, then pairs of images, then a filter (Sec. 3.1).

    python datagen.py text   --captions captions.txt --out runs/edits.jsonl       # by a language model
    python datagen.py finetune --out runs/chats.jsonl      # a language model that writes edits better: the paper's way
    python datagen.py images --edits runs/edits.jsonl --out runs/pairs --samples 4
    python datagen.py browse runs/pairs                    # a page to look at it with
    python datagen.py calibrate --edits runs/edits.jsonl --clip MY_CLIP           # once for another CLIP

`text` and `images` may be stopped at any time; the same command resumes. Under torchrun its processes divide the work;
or run them with --shard 0/4, 1/4, ... and name all their files of texts, edits_*of4.jsonl, to --edits.
(The miniature's own edits are written by `python -m mini.datagen`.)
"""

import argparse
import hashlib
import os
import shutil
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import cli

import numpy as np
import torch
from tqdm import tqdm

from dataset import Filter, Pair, begin_data_set, folder_name, read_metadata, write_edit, write_seeds
from formats import checkpoint, hub
from formats.configs import Config
from formats.weights import fingerprint, write_json
from gpu.compiled import NOTICE, compile_model
from images import to_image, to_tensor
from language.captions import FIELDS, read_edits
from p2p import CONTROLS, P_RANGE, PairNoise, sample_pairs
from pages.browse import write_page
from stable_diffusion import StableDiffusion

ROOT = Path(__file__).resolve().parent


class Sampler:
    """Samples candidates, a pair of images each, and their CLIP similarities (Sec. 3.1.2)."""

    def __init__(self, edits, options):
        """With the models and settings that the command line names, or else the models' own, put into `options`."""
        if options.threads:
            torch.set_num_threads(options.threads)
        options.clip = hub.find(options.clip, "clip")  # whose folder may hold thresholds
        dtype = getattr(torch, options.dtype)
        parts = checkpoint.load(options.weights, options.device, dtype, vae=options.vae, kind="sd")
        self.model = model = StableDiffusion(parts)
        self.fingerprint = fingerprint(parts.unet, parts.vae, parts.text_encoder)
        if options.compile or (options.compile is None and torch.device(options.device).type == "cuda"):
            print(NOTICE)
            compile_model(model)
        model.vae.float()  # a small part of the work, and bfloat16 has fewer levels than an image
        self.clip, self.tokenizer = checkpoint.load_clip(options.clip, options.device)
        self.edits, self.options, own = edits, options, model.sampling
        options.steps = options.steps or own.steps
        options.resolution = options.resolution or own.resolution
        options.sampler, options.schedule = options.sampler or own.sampler, options.schedule or own.schedule
        options.guidance = options.guidance or [own.text_guidance, 2 * own.text_guidance]  # the range to draw from
        if options.resolution % parts.side_multiple:
            raise cli.UserError(f"--resolution should be a multiple of {parts.side_multiple} for this model")

    def sample(self, jobs):
        """The candidates of `jobs`, (an edit's number, a seed) each, sampled in one batch: a list of Pair."""
        model, options = self.model, self.options
        side = options.resolution // model.vae.config.factor
        before, after = ([self.edits[number][field] for number, _ in jobs] for field in ("caption", "output"))
        shape, seeds = (model.vae.config.latent_channels, side, side), [seed for _, seed in jobs]
        p = [self.edits[number]["p"] or P_RANGE for number, _ in jobs]
        noise = PairNoise(seeds, shape, options.guidance, p, model.device)
        # x: twice [B, 3, H, W]
        how = options.steps, options.sampler, options.schedule
        x = sample_pairs(model, before, after, noise, *how, control=options.control)
        if not all(half.isfinite().all() for half in x):
            raise cli.UserError("the networks gave NaN or Inf: damaged weights, or --dtype float16 is too narrow")
        images = [[to_image(image) for image in half] for half in x]
        # CLIP sees what will be on disk: whole numbers, in [0, 1]
        seen = [torch.stack([to_tensor(image) for image in half]).add(1).div(2).to(model.device) for half in images]
        ids = (self.tokenizer(texts).to(model.device) for texts in (before, after))
        scores = {"p2p_threshold": noise.p, "cfg_scale": noise.guidance, **self.clip.edit_similarities(*seen, *ids)}
        same = torch.tensor([first == second for first, second in zip(before, after, strict=True)])
        scores["clip_sim_dir"][same] = 1.0  # no change is asked for, and none is made: their cosine has no meaning
        pairs = []
        for index, (_, seed) in enumerate(jobs):
            metadata = {"seed": seed, **{name: round(values[index].item(), 6) for name, values in scores.items()}}
            pairs.append(Pair(images[0][index], images[1][index], metadata))
        return pairs

    def sample_all(self, jobs):
        """The same in batches."""
        size = self.options.batch_size
        return [pair for i in range(0, len(jobs), size) for pair in self.sample(jobs[i : i + size])]


def make_images(options):
    """Sample and filter pairs for every edit, in the authors' layout.

    An edit is done when its folder is there, and folders appear whole. Numbers depend a little on what is computed in
    one batch, so edits are sampled in fixed groups, as many as fill a batch, whichever of them are still missing:
    stopped and restarted, or with another number of processes, a run ends in the same files.
    """
    sampler = Sampler(read_edits(*options.edits), options)
    given = {field.name: getattr(options, f"min_{field.name}") for field in fields(Filter)}
    wanted = replace(Filter.read(options.clip), **{name: value for name, value in given.items() if value is not None})
    names = {f"min_{name}": float(value) for name, value in asdict(wanted).items()}
    settings = settings_of(sampler, "samples", "keep", "batch_size")
    paths = {name: getattr(options, name) for name in ("weights", "vae", "clip")}  # where models are, which may change
    begin_data_set(options.out, {"program": "datagen.py images", **paths, **settings, **names}, noted=paths)
    (rank, world), count = options.shard, len(sampler.edits)
    size = max(1, options.batch_size // options.samples)
    groups = [range(first, min(first + size, count)) for first in range(0, count, size)][rank::world]
    for path in options.out.glob(".[0-9]*.tmp"):  # what a killed process left of these edits
        if any(int(path.name.split(".")[1]) in group for group in groups):
            shutil.rmtree(path, ignore_errors=True)
    with tqdm(total=sum(map(len, groups)), desc="pairs", unit="edit", mininterval=5) as bar:
        for group in groups:
            missing = [number for number in group if not (options.out / folder_name(number)).exists()]
            if missing:
                make_group(sampler, group, missing, wanted, options)
            bar.update(len(group))
    pairs = write_seeds(options.out)
    print(f"{options.out}: {pairs} pairs so far, of {count} edits" + ("" if pairs else refusals(options.out, wanted)))


def refusals(out, wanted):
    """Say which of a filter's thresholds refused how many of a data set's candidates."""
    found = [scores for path in out.glob("[0-9]*/candidates.jsonl") for scores in read_metadata(path)]
    counts = Counter(name for scores in found for name in wanted.refused_by(scores)).most_common()
    each = (f"--min-{name.replace('_', '-')} {getattr(wanted, name)} refused {count}" for name, count in counts)
    return f"; of {len(found)} candidates " + ", ".join(each)


def make_group(sampler, group, missing, wanted, options):
    """Sample the candidates of a group of edits; write the folders that are missing."""
    per_edit = range(options.samples)  # no two candidates of a data set have the same seed
    jobs = [(number, options.seed + number * options.samples + i) for number in group for i in per_edit]
    made = sampler.sample_all(jobs)
    for number in missing:
        candidates = [pair for pair, (of, _) in zip(made, jobs, strict=True) if of == number]
        passed = [pair for pair in candidates if wanted.keeps(pair.metadata)]
        best = sorted(passed, key=lambda pair: -pair.metadata["clip_sim_dir"])[: options.keep]
        edit = sampler.edits[number]
        prompt = {**{field: edit[field] for field in FIELDS}, "url": edit.get("url")}
        write_edit(options.out, number, prompt, best, [pair.metadata for pair in candidates])


def settings_of(sampler, *more):
    """What sampling depends on: the texts of the edits, the models' weights, and numbers, `more` of them."""
    options = sampler.options
    names = ("steps", "sampler", "schedule", "resolution", "control", "guidance", "seed", "dtype", *more)
    return {
        "model_fingerprint": sampler.fingerprint,
        "clip_fingerprint": fingerprint(sampler.clip),
        "edits": hashlib.sha256(b"".join(path.read_bytes() for path in options.edits)).hexdigest(),
        "device": torch.device(options.device).type,  # random numbers are drawn there
        **{name: getattr(options, name) for name in names},
    }


def calibrate(options):
    """Write a CLIP's filter.json: each threshold is what a fraction of a sample of candidates does not reach."""
    sampler = Sampler(read_edits(*options.edits)[: options.count], options)
    settings = settings_of(sampler, "count", "fractions", "batch_size")
    path = Path(options.clip) / "filter.json"
    if path.exists():
        if Config.read(path).values.get("calibrated") != settings:
            raise cli.UserError(f"{path} is there already, made otherwise; remove it to calibrate anew")
        print(f"{path} is there already")
        return
    jobs = [(number, options.seed + number) for number in range(len(sampler.edits))]
    scores = [pair.metadata for pair in sampler.sample_all(jobs)]
    names = [("clip_sim_0", "clip_sim_1"), ("clip_sim_image",), ("clip_sim_dir",)]  # in the order of Filter's fields
    worst = [[min(score[name] for name in group) for score in scores] for group in names]
    chosen = Filter(*(round(float(np.quantile(*pair)), 3) for pair in zip(worst, options.fractions, strict=True)))
    kept = sum(chosen.keeps(score) for score in scores) / len(scores)
    with cli.atomic_write(path) as beside:
        write_json(beside, {**asdict(chosen), "calibrated": settings})
    print(f"{path}: {asdict(chosen)} keep {100 * kept:.0f} % of {len(scores)} candidates")


def write_text(options):
    """The commands `text` and `finetune`."""
    from language import finetune, writer  # here, since openai takes a second to import

    (finetune.finetune if options.command == "finetune" else writer.write_edits)(options)


def shard(text):
    """The type of --shard: "I/N", part I of N, counted from 0."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"should be I/N with I from 0 to N - 1, such as 0/4 to 3/4, not {text}")
    return int(part), int(parts)


def parse(arguments=None):
    """The command line."""
    parser = cli.Parser(prog="datagen.py", description="Generate training data: instructions, then pairs of images.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_text_commands(commands)
    add_image_commands(commands)
    own = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"  # set by torchrun
    for name in ("text", "images"):
        add = commands.choices[name].add_argument
        add("--shard", type=shard, default=own, metavar="I/N", help="do part I of N: 0/N, 1/N, ...")
    return parser.parse_args(arguments)


def add_text_commands(commands):
    """`text` and `finetune`."""
    text = commands.add_parser("text", help="captions -> instructions and captions after the edit")
    add = text.add_argument
    add("--captions", type=Path, required=True, metavar="FILE", help="a caption a line, CSV or JSON lines")
    add("--out", type=Path, required=True, metavar="FILE.jsonl")
    add("--model", default="gpt-4o-mini", metavar="NAME", help="the language model (default: %(default)s)")
    add("--few-shot", type=cli.between(0), default=8, metavar="N", help="examples to show; 0 if tuned (default: 8)")
    add("--concurrency", type=cli.WHOLE, default=16, metavar="N", help="requests at a time (default: 16)")
    add("--moderate", action="store_true", help="drop what the moderation endpoint flags")
    add("--max-tokens-total", type=cli.WHOLE, metavar="N", help="stop before more tokens are used in this run")

    tune = commands.add_parser("finetune", help="fine-tune a language model on hand-written triplets")
    add = tune.add_argument
    add("--out", type=Path, default=Path("runs/chats.jsonl"), metavar="FILE.jsonl", help="(default: %(default)s)")
    add("--model", default="gpt-4o-mini-2024-07-18", metavar="NAME", help="to start from (default: %(default)s)")
    add("--epochs", type=cli.WHOLE, default=1, metavar="N", help="(default: 1, as in the paper)")
    add("--dry-run", action="store_true", help="check and convert, and send nothing")
    add("--job", metavar="ID", help="only follow a job that was started before")
    for command in (text, tune):
        command.set_defaults(run=write_text)
        triplets = ROOT / "data/edit_examples.jsonl"
        command.add_argument("--examples", type=Path, default=triplets, metavar="FILE", help="triplets to show")


def add_image_commands(commands):
    """`images`, `calibrate` and `browse`."""
    images = commands.add_parser("images", help="pairs of images for such edits, filtered by CLIP")
    images.set_defaults(run=make_images)
    add = images.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the data set, in the authors' layout")
    add("--samples", type=cli.WHOLE, default=100, metavar="N", help="candidates for each edit (default: 100)")
    add("--keep", type=cli.WHOLE, default=4, metavar="N", help="pairs kept of an edit, at most (default: 4)")
    for field in fields(Filter):
        name = field.name.replace("_", "-")
        add(f"--min-{name}", type=float, metavar="X", help=f"threshold (default: the CLIP's own, else {field.default})")

    thresholds = commands.add_parser("calibrate", help="the filter's thresholds for a CLIP of one's own: filter.json")
    thresholds.set_defaults(run=calibrate)
    add = thresholds.add_argument
    add("--count", type=cli.WHOLE, default=256, metavar="N", help="candidates to sample, one an edit (default: 256)")
    failing, names = "fractions that fail each threshold (default: 0.2 0.05 0.2)", ("TEXT", "IMAGE", "DIR")
    add("--fractions", type=cli.FRACTION, nargs=3, default=[0.2, 0.05, 0.2], metavar=names, help=failing)

    browse = commands.add_parser("browse", help="one page that shows a data set, to be opened in any browser")
    browse.set_defaults(run=lambda o: print(write_page(o.data, o.out or o.data / "index.html", o.count)))
    add = browse.add_argument
    add("data", type=Path, metavar="DIR", help="the data set, in the authors' layout")
    add("--count", type=cli.WHOLE, default=2000, metavar="N", help="pairs to show, spread over all (default: 2000)")
    add("--out", type=Path, metavar="FILE.html", help="(default: DIR/index.html)")

    for command in (images, thresholds):
        add = command.add_argument
        add("--edits", type=Path, nargs="+", required=True, metavar="FILE", help="of datagen.py text, joined")
        add("--weights", default="mini", metavar="PATH", help="a text-to-image model, such as sd15 (default: mini)")
        add("--vae", metavar="PATH", help="an autoencoder to use instead of the model's, such as the fine-tuned vae")
        add("--clip", default="mini", metavar="PATH", help="the CLIP that filters, such as clip (default: mini)")
        add("--control", choices=CONTROLS, default="self", help="what Prompt-to-Prompt shares (default: self)")
        add("--steps", type=cli.STEPS, metavar="N", help="denoising steps (default: the model's)")
        cli.add_sampler(add)
        add("--guidance", type=cli.SCALE, nargs=2, metavar=("LOW", "HIGH"), help="(default: 1 to 2 times the model's)")
        add("--resolution", type=cli.PIXELS, metavar="R", help="pixels a side (default: the model's)")
        add("--batch-size", type=cli.WHOLE, default=16, metavar="B", help="pairs sampled at once (default: 16)")
        add("--seed", type=cli.SEED, default=0, metavar="S", help="of the first candidate (default: 0)")
        add("--compile", action=argparse.BooleanOptionalAction, help="compile the networks first (default: on a GPU)")
        add("--device", default="cpu", metavar="D", help="cpu or cuda, under torchrun a GPU for each process")
        add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
        add("--threads", type=cli.WHOLE, metavar="N", help="CPU threads (default: all cores)")


def main(arguments=None):
    """Check the settings and run one of the commands."""
    options = parse(arguments)
    if hasattr(options, "device"):
        options.device = cli.own_device(options.device)
        cli.check_device(options.device)
    options.run(options)


if __name__ == "__main__":
    cli.run_program(main)
