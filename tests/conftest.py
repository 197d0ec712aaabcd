"""What the tests of the programs share: tiny models on disk, and sample.py run inside the test's own process."""

import os
import re
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

# Before anything imports huggingface_hub: no test may look at the network, nor at what its user has downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = str(Path(tempfile.gettempdir()) / "no-hub-cache-for-tests")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "ip2p-compiled-in-tests"))

from cli import run_program

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import tiny_model

from formats.checkpoint import save_folder, save_single_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny editor as a folder. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(tiny_model(), folder)
    return folder


@pytest.fixture(scope="session")
def single_file(tmp_path_factory):
    """The same editor as a single file, its tokenizer/ beside it. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model()
    save_single_file(model, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


@pytest.fixture(scope="module")
def one_thread():
    """Tiny networks gain nothing from threads, and on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def colourful(width, height, seed=0):
    """A smooth RGB image without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png_header(width, height):
    """A PNG file as far as its size, and a beginning of data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


class Run(NamedTuple):
    """How a program ended: its exit code, the lines of stdout, and those of stderr without the progress bar."""

    code: int
    out: list[str]
    err: list[str]


def lines_of(stderr):
    """stderr's lines, without those that are empty or belong to a progress bar."""
    lines = re.split(r"[\r\n]|\x1b\[A", stderr)  # a bar below another one goes up again
    return [line for line in lines if line.strip() and not re.match(r"\w+: +\d+(%|it)", line)]


def contents(folder):
    """{path: bytes} of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run_main(capsys, monkeypatch):
    """A program (its module, its arguments) as its own `__main__` runs it, but in this process."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_program(module.main)
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Run(code, captured.out.splitlines(), lines_of(captured.err))

    return run


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium. A test that ends well must leave its console without errors."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
    flags += ["window-size=1280,3000"]
    for flag in [*flags, "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(shutil.which("chromedriver")))
    yield driver
    entries = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    errors = [entry for entry in entries if "400 (Bad Request)" not in entry["message"]]  # the page shows these
    driver.quit()
    assert not errors


@pytest.fixture
def choose(browser):
    """Put a control to a value, as its own events would tell the page."""

    def put(name, value):
        key = "checked" if isinstance(value, bool) else "value"
        event = "new Event('input', {bubbles: true})"
        script = f"const [x, value] = arguments; x.{key} = value; x.dispatchEvent({event})"
        browser.execute_script(script, browser.find_element("id", name), value)

    return put
