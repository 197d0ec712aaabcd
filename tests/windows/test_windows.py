"""The programs run where Python is as on Windows (`sitecustomize.py` beside this file); on macOS it spawns as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, contents
from dataset_of_true_pairs import write_pairs
from random_model import tiny_model

from formats.checkpoint import save_folder

IN_A_ROW = """
import sys, datagen, sample, train
from mini import datagen as texts, pretrain
train.main([*sys.argv[1:], "--max-steps=2", "--workers=0"])
train.main(["export", "--run=run", "--out=editor"])
for out in ("out.png", "out.png"):
    sample.main(["--weights=editor", "--image=pairs/0000000/0_0.jpg", "--instr=night", f"--out={out}"])
texts.main(["text", "--count=1", "--out=edits.jsonl"])
datagen.main(["images", "--edits=edits.jsonl", "--samples=1", "--steps=1", "--out=made"])
pretrain.kept_pixels(pretrain.scenes(2), pretrain.Path("scenes.npy"))
"""


def run(folder, *arguments):
    """Python with these arguments in a folder, as on Windows."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path / "pairs", 20)
    save_folder(tiny_model(in_channels=4), tmp_path / "sd")
    return tmp_path


def test_the_programs(folder):
    """Images are read by a spawned process; when the run resumes, its model is replaced."""
    flags = ["--preset=24gb", "--resolution=64", "--data=pairs", "--init=sd", "--out=run", "--mixed-precision=no"]
    flags += ["--batch-size=2", "--total-batch-size=2", "--sampling-steps=1", "--workers=1", "--resume"]
    for program in ([ROOT / "train.py", "--max-steps=1"], ["-c", IN_A_ROW]):
        done = run(folder, *program, *flags)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    assert contents(folder / "editor") == contents(folder / "run" / "model")
    assert {"out.png", "made", "scenes.npy"} <= {path.name for path in folder.iterdir()}


def test_files_that_are_held_are_noticed(folder):
    """What the test above relies on."""
    hold = "import os; from safetensors import safe_open; file = safe_open(PATH, 'np')"
    hold = hold.replace("PATH", "'sd/vae/diffusion_pytorch_model.safetensors'")
    done = run(folder, "-c", f"{hold}\ntry: os.rename('sd', 'other')\nexcept PermissionError: print('held')")
    assert done.stdout == "held\n"
