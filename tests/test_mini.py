"""The bundled miniature: it draws what it is told, diffusers opens it, and the whole chain can be made again."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

import datagen
import evaluate
import pretrain
import train
from checkpoint import load, load_clip
from judge import Judge
from scenes import share_right, training_scene
from text2image import TextToImage
from world import caption

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "models" / "mini"


def test_the_bundled_model_draws_what_64_held_out_captions_say():
    """pretrain.py sd measures 256; the bar leaves room for the smaller number."""
    scenes = [training_scene(index, test=True) for index in range(64)]
    x = TextToImage(load(MINI / "sd")).sample([caption(scene) for scene in scenes], range(64))
    judge = Judge.load(MINI / "judge.safetensors")
    assert share_right(judge, x, scenes) >= 0.9
    assert share_right(judge, x, scenes[1:] + scenes[:1]) < 0.1


def test_the_demo_draws_its_sheet(tmp_path):
    out = tmp_path / "demo.png"
    subprocess.run([sys.executable, ROOT / "examples" / "demo.py", out], check=True, capture_output=True)
    assert Image.open(out).width > 4 * 192


def test_diffusers_opens_the_bundled_text_to_image_model():
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(MINI / "sd")
    pipeline.set_progress_bar_config(disable=True)
    caption = "a painting of a large red house on the left by the sea"
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(caption, 64, 64, num_inference_steps=20, guidance_scale=4.0, generator=generator)
    clip, tokenizer = load_clip(MINI / "clip")
    changes = {"red": "blue", "left": "right", "by the sea": "at night"}
    others = [caption, *(caption.replace(*change) for change in changes.items())]
    pixels = torch.from_numpy(np.asarray(drawn.images[0]).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        likeness = clip.image.features(pixels) @ clip.text.features(tokenizer(others)).T
    assert likeness.argmax() == 0


def test_the_bundle_is_small_and_holds_no_links():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40 * 2**20
    assert max(path.stat().st_size for path in files) < 16e6
    assert not any(path.is_symlink() for path in MINI.rglob("*"))


def test_the_whole_chain_at_toy_scale(tmp_path, capsys):
    """From nothing to an editor that evaluate.py measures; nothing is learnt in so few steps."""
    mini, pairs = tmp_path / "mini", tmp_path / "pairs"
    toy = ["--scenes", "64", "--test-scenes", "8", "--steps", "2", "--batch", "4", "--threads", "1"]
    pretrain.main(["all", "--out", str(mini), *toy])
    datagen.main(["text", "--count", "40", "--out", str(mini / "edits.jsonl")])
    sd, clip = str(mini / "sd_model"), str(mini / "clip_model")
    models = ["--edits", str(mini / "edits.jsonl"), "--weights", sd, "--clip", clip]
    datagen.main(["calibrate", *models, "--count", "8", "--steps", "2"])
    datagen.main(["images", *models, "--out", str(pairs), "--samples", "2", "--keep", "2", "--steps", "2"])
    kept = sum(len(seeds) for _, seeds in json.loads((pairs / "seeds.json").read_text()))
    assert 20 < kept < 80  # the filter works, at thresholds that most candidates pass
    train.main(["--data", str(pairs), "--init", sd, "--out", str(tmp_path / "run"), "--steps", "2"])
    editor = tmp_path / "run" / "model"
    assert load(editor).unet.config.in_channels == 8
    tools = ["--judge", str(mini / "judge.safetensors"), "--clip", clip, "--steps", "2"]
    out = tmp_path / "results"
    evaluate.main(["world", "--model", str(editor), *tools, "--count", "14", "--out", str(out)])
    evaluate.main(["pairs", "--sd", sd, *tools, "--count", "6", "--out", str(out)])
    names = {f"{name}.{ending}" for name in ("world", "pairs") for ending in ("json", "md", "png")}
    assert {path.name for path in out.iterdir()} == names
    assert "holds pairs.md" in capsys.readouterr().out
