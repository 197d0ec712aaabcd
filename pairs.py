"""Captions and instructions in, pairs of pictures out: Prompt-to-Prompt samples them, CLIP filters them (Sec. 3.1.2).

Of every edit many candidates are sampled, each with a seed, a share p and a guidance scale of its own, and the best of
those that pass the filter are kept. The work is cut into groups of edits in a way that depends on the command line
alone, and a group that was not finished is made again: so on a CPU a run that was killed ends in the very files of one
that was not, although numbers depend a little on what is computed in one batch.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError, append_whole, atomic_write, make_folder
from clip_image import CLIP
from clip_text import CLIPTokenizer
from dataset import Filter, Pair, folder_name, write_edit, write_seeds
from formats import checkpoint
from formats.configs import Config
from formats.weights import write_json
from gpu import shared_maps
from gpu.compiled import NOTICE, compile_model
from images import to_image, to_tensor
from language.captions import FIELDS, read_edits
from p2p import PairNoise, sample_pairs
from stable_diffusion import StableDiffusion


@dataclass
class Sampler:
    """What turns jobs, (an edit's number, a seed) each, into candidates."""

    edits: list
    model: StableDiffusion
    clip: CLIP
    tokenizer: CLIPTokenizer
    guidance: tuple  # the range of guidance scales
    steps: int
    resolution: int
    control: str

    @classmethod
    def load(cls, edits, options):
        """With the models and settings that the command line names."""
        if options.threads:
            torch.set_num_threads(options.threads)
        parts = checkpoint.load(options.weights, options.device, getattr(torch, options.dtype))
        model = StableDiffusion(parts)
        if options.compile or (options.compile is None and torch.device(options.device).type == "cuda"):
            print(NOTICE)
            compile_model(model)
        model.vae.float()  # a small part of the work, and bfloat16 has fewer levels than a picture
        resolution = options.resolution or model.sampling.resolution
        if resolution % parts.side_multiple:
            asked = f"the resolution should be a multiple of {parts.side_multiple} for this model"
            raise UserError(f"{asked}, not {resolution}")
        own = model.sampling.text_guidance
        guidance = tuple(options.guidance or (own, 2 * own))
        clip, tokenizer = checkpoint.load_clip(options.clip, options.device)
        steps = options.steps or model.sampling.steps
        return cls(edits, model, clip, tokenizer, guidance, steps, resolution, options.control)

    def sample(self, jobs):
        """The candidates of `jobs`, sampled in one batch: a list of Pair."""
        model, latent = self.model, self.model.vae.config
        before, after = ([self.edits[number][field] for number, _ in jobs] for field in ("caption", "output"))
        side = self.resolution // latent.factor
        shape = (latent.latent_channels, side, side)
        noise = PairNoise([seed for _, seed in jobs], shape, self.guidance, device=model.device)
        wrap = shared_maps(model.device)
        pictures = sample_pairs(model, before, after, noise, self.steps, control=self.control, wrap=wrap)
        if not all(half.isfinite().all() for half in pictures):
            raise UserError("the networks gave values that are not numbers: damaged weights, or too coarse a --dtype")
        images = [[to_image(x) for x in half] for half in pictures]
        # CLIP sees what will be on disk: whole numbers, in [0, 1]
        seen = [torch.stack([to_tensor(image) for image in half]).add(1).div(2).to(model.device) for half in images]
        ids = (self.tokenizer(texts).to(model.device) for texts in (before, after))
        scores = self.clip.edit_similarities(*seen, *ids)
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

    def sample_all(self, jobs, batch):
        """The same in batches."""
        return [pair for i in range(0, len(jobs), batch) for pair in self.sample(jobs[i : i + batch])]


# ---- the data set ----


def make_images(options):
    """Sample and filter pairs for every edit, in the authors' layout; `candidates.jsonl` keeps every score."""
    edits = read_edits(options.edits)
    part, parts = options.shard
    mine = range(part, len(edits), parts)
    sampler = Sampler.load(edits, options)
    wanted = thresholds(options)
    size = max(1, options.batch // options.samples)  # edits in a group
    log = options.out / ("candidates.jsonl" if parts == 1 else f"candidates_{part}of{parts}.jsonl")
    check_settings(options, sampler, wanted)
    done, end = finished(log, mine, size)
    if done and read_prompt(options.out, mine[done - 1]) != prompt_of(edits[mine[done - 1]]):
        raise UserError(f"{options.out} was begun with other edits than those of {options.edits}; take another folder")
    if options.dry_run:
        estimate(sampler, mine[done:], wanted, options)
        return
    make_folder(options.out)
    keep_settings(options, sampler, wanted)
    clean(options.out, mine)
    if log.exists():
        os.truncate(log, end)
    start, kept = time.monotonic(), 0
    with tqdm(total=len(mine), initial=done, desc="pairs", unit="edit", mininterval=5) as bar:
        for first in range(done, len(mine), size):
            numbers = mine[first : first + size]
            made = sampler.sample_all(jobs_of(numbers, options), options.batch)
            lines = []
            for place, number in enumerate(numbers):
                candidates = made[place * options.samples : (place + 1) * options.samples]
                passed = [pair for pair in candidates if wanted.keeps(pair.metadata)]
                best = sorted(passed, key=lambda pair: -pair.metadata["clip_sim_dir"])[: options.keep]
                write_edit(options.out, number, prompt_of(edits[number]), best)
                lines.append(noted(number, best, candidates))
                kept += len(best)
            append_whole(log, "".join(lines).encode())
            bar.update(len(numbers))
            bar.set_postfix(kept=kept)
    total = write_seeds(options.out, writer=f"{part}of{parts}")
    print(f"{options.out}: {total} pairs so far, of {len(edits)} edits ({time.monotonic() - start:.0f} s)")


def jobs_of(numbers, options):
    """(edit's number, seed) of every candidate of these edits; no two candidates of a data set share a seed."""
    first = options.seed
    return [(number, first + number * options.samples + i) for number in numbers for i in range(options.samples)]


def noted(number, best, candidates):
    """The line of an edit in candidates.jsonl."""
    kept, scores = [pair.metadata["seed"] for pair in best], [pair.metadata for pair in candidates]
    return json.dumps({"edit": number, "kept": kept, "candidates": scores}) + "\n"


def prompt_of(edit):
    """What prompt.json holds of an edit."""
    return {**{field: edit[field] for field in FIELDS}, "url": edit.get("url")}


def read_prompt(root, number):
    """The prompt.json of an edit that was made; None where it is gone."""
    path = root / folder_name(number) / "prompt.json"
    return Config.read(path).values if path.exists() else None


def thresholds(options):
    """The CLIP's own filter, or what the command line says instead."""
    given = {field.name: getattr(options, f"min_{field.name}") for field in fields(Filter)}
    return Filter(**{**asdict(Filter.read(options.clip)), **{k: v for k, v in given.items() if v is not None}})


def settings_of(options, sampler, wanted):
    """Whatever the files of a data set depend on, but for the edits; of models only where they are."""
    models = {name: getattr(options, name) for name in ("weights", "clip")}
    return {
        **{name: str(Path(path).resolve()) if Path(path).exists() else path for name, path in models.items()},
        **{name: getattr(options, name) for name in ("samples", "keep", "batch", "seed", "dtype", "control")},
        "device": torch.device(options.device).type,  # random numbers are drawn there
        "shards": options.shard[1],
        "steps": sampler.steps,
        "guidance": list(sampler.guidance),
        "resolution": sampler.resolution,
        **{f"min_{name}": float(value) for name, value in asdict(wanted).items()},
    }


def check_settings(options, sampler, wanted):
    """Raise UserError if the data set was begun with other settings."""
    path = options.out / "settings.json"
    if path.exists():
        begun = Config.read(path).values
        for name, value in settings_of(options, sampler, wanted).items():
            if begun.get(name) != value:
                change = f"{name} {begun.get(name)}, now it is {value}"
                raise UserError(f"{options.out} was begun with {change}; take the same settings, or another folder")


def keep_settings(options, sampler, wanted):
    """Note in settings.json how a data set is made."""
    part, parts = options.shard
    with atomic_write(options.out / "settings.json", writer=f"{part}of{parts}") as beside:
        write_json(beside, settings_of(options, sampler, wanted))


def clean(root, numbers):
    """Remove what a killed process left half-written of edits with these numbers."""
    for path in root.glob(".[0-9]*.tmp"):
        name = path.name[1:].split(".")[0]
        if name.isdecimal() and int(name) in numbers:
            shutil.rmtree(path, ignore_errors=True)


def finished(log, mine, size):
    """(how many of the edits `mine` are done, in whole groups of `size`; the bytes of their lines in the log)."""
    done = end = count = length = 0
    try:
        with open(log, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if json.loads(line)["edit"] != mine[count]:
                    raise ValueError("its edits are others")
                count, length = count + 1, length + len(line)
                if count % size == 0 or count == len(mine):
                    done, end = count, length
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{log} is damaged; remove it, and its edits are made anew ({error})") from error
    return done, end


# ---- before all that: how long, how large, and by which thresholds ----


def estimate(sampler, numbers, wanted, options):
    """Say how long these edits would take and how large they would be, from one batch, which is not kept."""
    if not numbers:
        print("nothing is left to do")
        return
    step = max(1, len(numbers) // options.batch)
    jobs = [jobs_of([number], options)[0] for number in numbers[::step][: options.batch]]
    sampler.sample(jobs)  # the first batch takes longer than all others
    start = time.monotonic()
    made = sampler.sample(jobs)
    seconds = (time.monotonic() - start) / len(jobs)
    with TemporaryDirectory() as folder:
        write_edit(folder, 0, prompt_of(sampler.edits[numbers[0]]), made)
        pair_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*.*")) / len(made)
    line_bytes = len(noted(0, [], made)) / len(made)
    share = sum(wanted.keeps(pair.metadata) for pair in made) / len(made)
    total, kept = len(numbers) * options.samples, len(numbers) * min(options.keep, share * options.samples)
    part, parts = options.shard
    of = f" (part {part} of {parts})" if parts > 1 else ""
    print(f"{len(numbers):,} edits{of} with {options.samples} candidates each: {total:,} candidates")
    print(f"time: about {duration(total * seconds)} ({seconds:.3g} s a candidate, in batches of {len(jobs)})")
    size = f"{(kept * pair_bytes + total * line_bytes) / 1e6:,.1f} MB"
    print(f"size: about {size}: {kept:,.0f} pairs of {pair_bytes / 1e3:.1f} kB, if {share:.0%} of the candidates pass")


def duration(seconds):
    """A time for people."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def calibrate(options):
    """Set a CLIP's thresholds: each is what the worst candidates of a sample, a share of them, do not reach."""
    sampler = Sampler.load(read_edits(options.edits)[: options.count], options)
    jobs = [(number, options.seed + number) for number in range(len(sampler.edits))]
    scores = []
    for first in tqdm(range(0, len(jobs), options.batch), desc="calibrating", unit="batch", leave=False):
        scores += [pair.metadata for pair in sampler.sample(jobs[first : first + options.batch])]

    names = [("clip_sim_0", "clip_sim_1"), ("clip_sim_image",), ("clip_sim_dir",)]  # in the order of Filter's fields
    worst = [[min(score[name] for name in group) for score in scores] for group in names]
    chosen = Filter(*(round(float(np.quantile(*pair)), 3) for pair in zip(worst, options.shares, strict=True)))
    kept = sum(chosen.keeps(score) for score in scores) / len(scores)
    with atomic_write(Path(options.clip) / "filter.json") as beside:
        write_json(beside, asdict(chosen))
    print(f"{options.clip}/filter.json: {asdict(chosen)} keep {100 * kept:.0f} % of {len(scores)} candidates")
