"""The programs run where Python is as on Windows (`sitecustomize.py` beside this file); on macOS it spawns as well."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, contents
from dataset_of_true_pairs import write_pairs
from random_model import tiny_model

from formats.checkpoint import save_folder

IN_A_ROW = """
import os, sys, datagen, sample, safetensors, train
from mini import datagen as texts, pretrain
train.main([*sys.argv[1:], "--max-steps=2", "--workers=0"])
train.main(["export", "--run=run", "--out=editor"])
for out in ("out.png", "out.png"):
    sample.main(["--weights=editor", "--image=pairs/0000000/0_0.jpg", "--instr=night", f"--out={out}"])
texts.main(["text", "--count=1", "--out=edits.jsonl"])
datagen.main(["images", "--edits=edits.jsonl", "--samples=1", "--steps=1", "--out=made"])
pretrain.kept_pixels(pretrain.scenes(2), pretrain.Path("scenes.npy"))
with safetensors.safe_open("sd/vae/diffusion_pytorch_model.safetensors", "pt"):
    try:
        os.rename("sd", "other")
    except PermissionError:
        print("as on Windows")
"""


@pytest.mark.slow
def test_the_programs(tmp_path):
    """Images are read by a spawned process; when the run resumes, its model is replaced."""
    write_pairs(tmp_path / "pairs", 20)
    save_folder(tiny_model(in_channels=4), tmp_path / "sd")
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": paths}, "capture_output": True, "text": True}
    flags = ["--preset=24gb", "--resolution=64", "--data=pairs", "--init=sd", "--out=run", "--mixed-precision=no"]
    flags += ["--batch-size=2", "--total-batch-size=2", "--sampling-steps=1", "--workers=1", "--resume"]
    for program in ([ROOT / "train.py", "--max-steps=1"], ["-c", IN_A_ROW]):
        done = subprocess.run([sys.executable, *program, *flags], **how, timeout=300)
        assert done.returncode == 0, done.stderr
        assert not re.search("Warning|Traceback", done.stderr)
    assert done.stdout.endswith("as on Windows\n")
    assert contents(tmp_path / "editor") == contents(tmp_path / "run" / "model")
    assert {"out.png", "made", "scenes.npy"} <= {path.name for path in tmp_path.iterdir()}
