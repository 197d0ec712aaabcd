"""The README is true: its commands and snippets run as printed, its names, links and line counts are those of the code.

Blocks marked `sh` and `python` run, in their order, in one copy of the checkout (a training and the explain pages among
the slow tests); what needs a download, a GPU, a key or more than a minute is marked `text`.
"""

import os
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SLOW = re.compile("train.py|--explain")
BLOCKS = [
    pytest.param(language, code, marks=[pytest.mark.slow] * bool(SLOW.search(code)), id=code.splitlines()[0][:40])
    for language, code in re.findall(r"^```(sh|python)\n(.*?)^```$", README, flags=re.M | re.S)
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("readme") / "ip2p", ignore=ignored)


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_commands_and_snippets_run_as_printed(checkout, language, code):
    shell = ["bash", "-e", "-c"] if language == "sh" else ["python", "-c"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*shell, code], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("path", "printed"), re.findall(r"^  (\w+\.py) .* (\d+)$", README, flags=re.M))
def test_line_counts(path, printed):
    lines = (ROOT / path).read_text().count("\n")
    assert abs(int(printed) - lines) <= max(5, 0.1 * lines), f"{path} has {lines} lines"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)(.+?)\)|`([\w/]+/[\w.]+)`", README))))
def test_links_and_paths(path):
    assert (ROOT / "".join(path)).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+\.(?!py|png|jpg|jsonl)[\w.]+)`", README))))
def test_names_of_the_code(name):
    assert pydoc.locate(name) is not None
