"""What a student's function does: images made with it in its place, by the bundled models."""

import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import train
from attention import reference
from dataset import Filter, Pair, begin_data_set, write_edit, write_seeds
from formats.checkpoint import load_clip
from formats.hub import MINI
from images import enlarge, grid, open_image, save_png, to_image
from ip2p import InstructPix2Pix
from p2p import PairNoise, sample_pairs
from stable_diffusion import StableDiffusion

SCENE, INSTRUCTION, WORDS = Path("examples/scene.png"), "paint the house blue", "the house"
CAPTIONS = (
    "a painting of a large red house on the left by the sea",
    "a painting of a large red house and a small green tree by the sea",
)


def show_edit(folder):
    """Edit the bundled scene by two samplers, and in a region alone; returns the path of the sheet."""
    model, scene = InstructPix2Pix.load("mini"), open_image(SCENE)
    ways = {"euler_ancestral": {}, "euler": {"sampler": "euler"}}
    ways |= {f"only {WORDS}": {"mask": model.region(scene, WORDS)}}
    images = [model.edit(scene, INSTRUCTION, steps=10, attend=reference, **way) for way in ways.values()]
    images, path = [enlarge(image, 256) for image in (scene, *images)], folder / "edit.png"
    save_png(grid(images, 4, ["before", *ways], title=INSTRUCTION), path)
    return path


def show_pair(folder):
    """Two pairs of images by Prompt-to-Prompt, and what CLIP's filter says of them; returns the path of the sheet."""
    images, labels, keeps = [], [], Filter.read(MINI / "clip")
    for seed, pair in sampled_pairs().items():
        refused = keeps.refused_by(pair.metadata)
        images += [pair.before, pair.after]
        labels += [f"seed {seed}", f"direction {pair.metadata['clip_sim_dir']:.2f}: {'refused' if refused else 'kept'}"]
    path = folder / "pair.png"
    save_png(grid([enlarge(image, 256) for image in images], 4, labels, title=" -> ".join(CAPTIONS)), path)
    return path


def sampled_pairs():
    """{seed: a `Pair` of the two CAPTIONS, with its similarities as metadata}."""
    model, (clip, tokenizer), seeds = StableDiffusion.load("mini"), load_clip("mini"), (0, 1)
    side = model.sampling.resolution // model.vae.config.factor
    noise = PairNoise(seeds, (model.vae.config.latent_channels, side, side), (model.sampling.text_guidance,) * 2)
    texts = [[caption] * len(seeds) for caption in CAPTIONS]
    halves = sample_pairs(model, *texts, noise, steps=10, control="both")
    scores = clip.edit_similarities(*((x.clamp(-1, 1) + 1) / 2 for x in halves), *map(tokenizer, texts))
    pairs = {}
    for row, seed in enumerate(seeds):
        metadata = {"seed": seed, **{name: values[row].item() for name, values in scores.items()}}
        pairs[seed] = Pair(*(to_image(half[row]) for half in halves), metadata)
    return pairs


def show_training(folder):
    """Train an editor, by LoRA, on one pair for some steps; returns the path of the sheet of its edit."""
    data, out = folder / "pairs", folder / "editor"
    for old in (data, out):
        shutil.rmtree(old, ignore_errors=True)
    begin_data_set(data, {"program": "exercises"})
    prompt = {"caption": CAPTIONS[0], "edit": "add a small green tree", "output": CAPTIONS[1], "url": None}
    for number, pair in enumerate(sampled_pairs().values()):  # two edits: of one, none would be left to train on
        write_edit(data, number, prompt, [pair])
    write_seeds(data)
    flags = {"preset": "mini", "data": data, "init": "mini", "out": out, "overfit": 1, "batch-size": 4}
    flags |= {"max-steps": 20, "trainable": "lora", "rank": 16, "lr": 1e-2, "warmup-steps": 0, "sampling-steps": 10}
    with redirect_stdout(io.StringIO()):  # what its settings are
        train.main([f"--{name}={value}" for name, value in flags.items()])
    return out / "samples.png"
