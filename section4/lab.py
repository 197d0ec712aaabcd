"""What the commands of Section 4 share: their flags, the models they load, and results that a stopped run finds again.

Results of a batch of edits are one file, OUT/scores/NAME/000000.json, which is there whole or not at all.
"""

import json
from copy import copy
from functools import cached_property
from pathlib import Path

from cli import SEED, STEPS, WHOLE, UserError, atomic_write, keep_settings

import numpy as np
import torch
from tqdm import tqdm

from formats.checkpoint import load_clip
from images import save_png, to_image, to_tensor
from ip2p import InstructPix2Pix
from mini.evaluation import TOUCHED, l1_outside
from mini.judge import Judge, right
from section4.edits import add_edits
from stable_diffusion import StableDiffusion

MINI = Path("models/mini")
NOTED = "command", "device", "threads", "out", "methods", "points"  # settings that change no result that is there


def add_models(parser, count, batch_size=16):
    """Add the flags of the models, the edits and the results to a command's parser."""
    add = parser.add_argument
    add("--weights", default="mini", metavar="PATH", help="the editor (default: %(default)s)")
    add("--sd", default="mini", metavar="PATH", help="text-to-image, for the baselines (default: %(default)s)")
    several = "CLIP; a second one is another judge of the same edits, as in Fig. 23 (default: mini)"
    add("--clip", nargs="+", default=["mini"], metavar="DIR", help=several)
    add("--judge", default=MINI / "judge.safetensors", metavar="FILE", help="of the world (default: %(default)s)")
    add_edits(add)
    add("--count", type=WHOLE, default=count, metavar="N", help="edits (default: %(default)s)")
    add("--seed", type=SEED, default=0, metavar="S", help="of the edits (default: 0)")
    add("--steps", type=STEPS, metavar="N", help="sampling steps (default: each model's own)")
    add("--batch-size", type=WHOLE, default=batch_size, metavar="B", help="edits at a time (default: %(default)s)")


def world_only(options):
    """Raise UserError where a command that needs the world's truth is given other edits."""
    if options.edits:
        raise UserError("this command needs the true result of every edit, which only the miniature's world knows")


class Lab:
    """The models of a command, and where its results go."""

    def __init__(self, options):
        """Begin, or resume, OUT. Raises UserError where it was begun with other settings."""
        self.options, self.out, self.steps = options, options.out, options.steps
        self.inverted = None, None  # the last batch that Prompt-to-Prompt has inverted, and its inversion
        self.editor = InstructPix2Pix.load(options.weights, options.device)
        self.clips = [load_clip(path, options.device) for path in options.clip]  # each with its tokenizer
        self.out.mkdir(parents=True, exist_ok=True)
        keep_settings(self.out / "settings.json", vars(options), noted=NOTED)

    @cached_property
    def sd(self):
        """The text-to-image model of the baselines."""
        return StableDiffusion.load(self.options.sd, self.options.device)

    @cached_property
    def judge(self):
        """The judge of the world."""
        return Judge.load(self.options.judge, self.options.device)

    @property
    def side(self):
        """Pixels a side of the images that all methods edit."""
        return self.editor.sampling.resolution

    @torch.no_grad()
    def score(self, cases, images):
        """How good are the RGB images of these cases, `side` pixels a side? {score: list of N numbers}.

        image, direction, caption: the similarities of Sec. 3.1.2, and again as image_2, ... for a second CLIP;
        l1_input: the mean L1 to the image before, in [0, 1]. Where there is an image after: l1_true. In the world:
        success (as evaluate.py world counts it) and l1_outside. Raises UserError for a case without captions.
        """
        pairs = [case.images(self.side) for case in cases]
        x, before = (torch.stack([to_tensor(image) for image in some]) for some in (images, [a for a, _ in pairs]))
        scores = {"l1_input": ((x - before).abs() / 2).mean(dim=(1, 2, 3)).tolist()}
        texts = captions_of(cases)
        for number, (clip, tokenizer) in enumerate(self.clips):
            device = clip.logit_scale.device
            shown = [((pixels + 1) / 2).to(device) for pixels in (before, x)]
            found = clip.edit_similarities(*shown, *(tokenizer(some).to(device) for some in texts))
            for name, key in (("image", "clip_sim_image"), ("direction", "clip_sim_dir"), ("caption", "clip_sim_1")):
                scores[name + f"_{number + 1}" * (number > 0)] = found[key].tolist()
        if all(after for _, after in pairs):
            after = torch.stack([to_tensor(image) for _, image in pairs])
            scores["l1_true"] = ((x - after).abs() / 2).mean(dim=(1, 2, 3)).tolist()
        if cases[0].scenes:
            outside, _ = l1_outside(x, before, after)
            good = right(self.judge, x, [case.scenes.after for case in cases]) & (outside <= TOUCHED).numpy()
            scores |= {"success": good.astype(float).tolist(), "l1_outside": outside.tolist()}
        return scores

    def run(self, cases, jobs):
        """Edit and score all cases by all jobs, {name: a function of some cases -> their images}.

        Returns {name: {score: array [N]}}. What is in OUT already is not computed again.
        """
        size, todo, paths = self.options.batch_size, [], {name: [] for name in jobs}
        for start in range(0, len(cases), size):
            for name, edit in jobs.items():
                paths[name].append(self.out / "scores" / name / f"{start:06d}.json")
                if not paths[name][-1].exists():
                    todo.append((paths[name][-1], edit, cases[start : start + size]))
        with tqdm(total=sum(len(some) for *_, some in todo), unit="edit", smoothing=0.05, disable=not todo) as bar:
            for path, edit, some in todo:
                bar.set_description(path.parent.name)
                write_json(path, self.score(some, edit(some)))
                bar.update(len(some))
        return {name: joined(map(read_json, own)) for name, own in paths.items()}

    def edited(self, cases, jobs):
        """Edit all cases by all jobs, as in `run`; returns [[the path of each job's image] of each case]."""
        folders = [self.out / "images" / f"{number:05d}" for number in range(len(cases))]
        paths = [[folder / f"{name}.png" for name in jobs] for folder in folders]
        size = self.options.batch_size
        todo = [(column, start) for start in range(0, len(cases), size) for column in range(len(jobs))
                if not all(own[column].exists() for own in paths[start : start + size])]  # fmt: skip
        for column, start in tqdm(todo, unit="batch", disable=not todo):
            some = slice(start, start + size)
            for own, image in zip(paths[some], [*jobs.values()][column](cases[some]), strict=True):
                save_png(image, own[column])
        return paths

    def with_editor(self, path):
        """The same with another editor."""
        other = copy(self)
        other.editor = InstructPix2Pix.load(path, self.options.device)
        return other

    def through_vae(self, images):
        """RGB images -> what the autoencoder makes of them."""
        latents = self.editor.encode_image(torch.stack([to_tensor(image) for image in images]))
        return [to_image(x) for x in self.editor.decode(latents * self.editor.vae.config.scaling)]


def captions_of(cases):
    """(captions before, captions after) of some cases. Raises UserError where one is missing."""
    for case in cases:
        if not all(case.captions):
            wanted = "captions of the image before and after are needed here"
            raise UserError(f'{wanted}, and the edit "{case.instruction}" lacks one')
    return tuple(list(texts) for texts in zip(*(case.captions for case in cases), strict=True))


def joined(parts):
    """Dicts of lists -> one dict of arrays."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_json(path):
    """What a file of ours holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path, values):
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(values) + "\n", encoding="utf-8")
