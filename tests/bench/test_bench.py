"""bench.py: it runs, both sides get the same numbers, and the table has its shape. Nothing is said about times."""

import re
import subprocess
import sys
from concurrent.futures import Future
from contextlib import contextmanager

from cli import UserError

import numpy as np
import pytest
from conftest import ROOT

from bench import __main__ as bench
from bench import sides as bench_sides
from bench.__main__ import Row

pytestmark = pytest.mark.usefixtures("one_thread")

HEADER = "| | ours | diffusers | ratio | its range | peak, ours | peak, diffusers | difference |"
NETWORKS = ["UNet step, batch 3", "VAE encoder", "VAE decoder", "text encoder"]
TRAINING = "training step without its optimizer, batch 1, half the size"
LOADS = ["load one file", "load one file, read all weights", "load a folder", "load a folder, read all weights"]


class Here:
    """In place of a process of its own: this one, which has imported everything already."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """What bench.py sets for the processes that it starts is put back after the test."""
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def in_process(monkeypatch):
    """No process is started, and nothing is repeated."""

    @contextmanager
    def own_process():
        yield Here()

    monkeypatch.setattr(bench, "own_process", own_process)
    monkeypatch.setattr(bench_sides, "SHORT", 1e-9)
    yield
    bench_sides.prepared.cache_clear()


def cells_of(text, other="diffusers"):
    """The lines of the table that compares with `other`: {first cell: [the others]}."""
    lines = [*text.splitlines(), ""]
    start = lines.index(HEADER.replace("diffusers", other)) + 2
    rows = {}
    for line in lines[start : lines.index("", start)]:
        what, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[what] = cells
    return rows


def check_cells(cells, largest_error):
    """A line's numbers are of the right kind."""
    ours, theirs, ratio, spread, *peaks, error = cells
    assert all(re.fullmatch(r"[\d.e-]+ s", seconds) and float(seconds[:-2]) > 0 for seconds in (ours, theirs))
    low, high = map(float, spread.split(" to "))
    assert 0 <= low <= float(ratio.strip("*")) <= high
    assert all(re.fullmatch(r"\d+\.\d\d GB|unknown", peak) for peak in peaks)
    assert 0 <= float(error) <= largest_error


def test_every_part_in_this_process(in_process, capsys):
    bench.main(["--small", "--size", "64", "--runs", "2"])
    captured = capsys.readouterr()
    rows = cells_of(captured.out)
    assert list(rows) == [*NETWORKS, TRAINING, *LOADS]
    for what, cells in rows.items():
        check_cells(cells, 0 if what in LOADS else 1e-5)  # loaded weights are the same to the bit
    assert "- command: `python -m bench --small --size 64 --runs 2`\n" in captured.out
    assert re.search(r"^- versions: torch \S+, diffusers \S+, transformers \S+", captured.out, re.MULTILINE)
    assert re.search(r"^- date: \d{4}-\d\d-\d\d$", captured.out, re.MULTILINE)
    assert captured.out.count(" times that.\n") == 2
    assert all(line.startswith("bench.py: ") for line in captured.err.splitlines())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_within_the_tolerance(in_process, capsys, dtype):
    bench.main(["--small", "--size", "64", "--runs", "1", "--only", "unet,encode,decode,text", "--dtype", dtype])
    rows = cells_of(capsys.readouterr().out)
    assert list(rows) == NETWORKS
    for cells in rows.values():
        check_cells(cells, bench.TOLERANCE[dtype])


def test_with_processes_of_their_own():
    command = [sys.executable, "-m", "bench", "--small", "--size", "64", "--runs", "1", "--only", "text"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = cells_of(done.stdout)
    assert list(rows) == ["text encoder"]
    check_cells(rows["text encoder"], 1e-5)


def test_a_pair_beside_one_with_maps(in_process, capsys):
    """And nothing of diffusers, when only that was asked for."""
    bench.main(["--small", "--size", "64", "--runs", "2", "--only", "p2p-layer,p2p"])
    out = capsys.readouterr().out
    rows = cells_of(out, "with maps")
    assert list(rows) == ["one layer of self-attention", "UNet step, batch 4: one pair"]
    for cells in rows.values():
        check_cells(cells, 1e-5)
    assert HEADER not in out


def test_the_pair_is_controlled(in_process, monkeypatch):
    """A control that does nothing gives another output, and nothing is timed."""
    monkeypatch.setattr("p2p.PairControl.of_first", lambda self, x: x)
    for part in ("p2p-layer", "p2p"):
        with pytest.raises(UserError, match="the outputs of the two sides differ"):
            bench.main(["--small", "--size", "64", "--only", part])


def test_ratios_are_taken_pair_by_pair():
    runs = [((1.0, 5_000_000_000), (2.0, None)), ((9.0, 6_000_000_000), (3.0, None)), ((4.0, None), (4.0, None))]
    (cells,) = cells_of("\n".join(bench.table([Row("this", runs, 1e-7)]))).values()
    assert cells == ["4 s", "3 s", "**1.000**", "0.500 to 3.000", "6.00 GB", "unknown", "1.0e-07"]


def test_different_outputs_are_not_timed(in_process, monkeypatch):
    monkeypatch.setattr(bench, "first_output", lambda side, *_: np.array([1.0, 2.0 if side == "ours" else 2.1]))
    with pytest.raises(UserError, match=r"UNet step, batch 3: the outputs of the two sides differ by 4\.\de-02"):
        bench.main(["--small", "--only", "unet"])
    monkeypatch.setattr(bench, "first_output", lambda *_: np.array([float("nan")]))
    with pytest.raises(UserError, match="differ by nan"):
        bench.main(["--small", "--only", "unet"])


PARTS = "unet, encode, decode, text, train, p2p-layer, p2p, load, ladder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "500"], "--size should be a multiple of 64, not 500"),
        (["--size", "0"], "--size should be a multiple of 64, not 0"),
        (["--runs", "0"], "--runs should be at least 1, not 0"),
        (["--only", "unet,vae"], f"--only knows {PARTS}, not 'vae'"),
        (["--only", ""], f"--only knows {PARTS}, not ''"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        bench.parse(arguments)


def test_cuda_must_be_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device; try --device cpu"):
        bench.main(["--device", "cuda"])


def test_diffusers_must_be_there(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "diffusers" else name)
    with pytest.raises(UserError, match=r"^diffusers must be installed: pip install -r requirements-dev\.txt$"):
        bench.parse([])


@pytest.mark.parametrize("arguments", [["--dtype", "int8"], ["--device", "tpu"], ["--nonsense"], ["--runs", "x"]])
def test_arguments_that_argparse_refuses_are_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        bench.parse(arguments)
    assert end.value.code == 2
    assert re.fullmatch(r"bench\.py: .*\n", capsys.readouterr().err)
