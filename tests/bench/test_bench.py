"""python -m bench: it runs, all variants give the same numbers, the table is right. Nothing is said about times."""

import re
import subprocess
import sys
from concurrent.futures import Future
from contextlib import contextmanager

from cli import UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from attention import reference
from bench import __main__ as bench
from bench import parts, process
from bench.parts import ATTENTION, LADDER, ON_CUDA, PARTS, Settings

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--small", "--size", "64", "--runs", "2"]
TINY = Settings("cpu", "float32", 64, True)


class Here:
    """In place of a process of its own: this one, which has imported everything already."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_process(monkeypatch):
    """No process is started and nothing is repeated."""

    @contextmanager
    def own_process():
        yield Here()

    for name in bench.QUIET:
        monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.setattr(bench, "own_process", own_process)
    monkeypatch.setattr(process, "SHORT", 0)
    yield
    process.prepared.cache_clear()


def rows_of(text):
    """The table: {first cell: the others}."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {what.strip(): [cell.strip() for cell in cells] for what, *cells in lines[2:]}


def check(rows, groups, largest_error):
    """All variants of a CPU are there, in order, and their numbers are of the right kind."""
    chosen = [(title, variants) for title, (group, variants, _) in PARTS.items() if group in groups]
    assert list(rows) == [f"{title}: {one}" for title, variants in chosen for one in variants if one not in ON_CUDA]
    for time, ratio, spread, memory, error in rows.values():
        low, high = map(float, spread.split(" to "))
        assert float(time.removesuffix(" s")) > 0
        assert 0 <= low <= float(ratio.strip("*")) <= high
        assert re.fullmatch(r"\d+\.\d\d GB|unknown", memory)
        assert 0 <= float(error) <= largest_error


@pytest.mark.parametrize("groups", [["text", "attention"], pytest.param(bench.GROUPS, marks=pytest.mark.slow)])
def test_parts_in_this_process(in_process, capsys, groups):
    bench.main([*SMALL, "--only", ",".join(groups)])
    captured = capsys.readouterr()
    rows = rows_of(captured.out)
    check(rows, groups, 1e-5)
    assert all(cells[-1] == "0.0e+00" for what, cells in rows.items() if what.startswith("load"))
    assert f"- command: `python -m bench {' '.join(SMALL)} --only {','.join(groups)}`\n" in captured.out
    assert all(line.startswith("bench: ") for line in captured.err.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_within_the_tolerance(in_process, capsys, dtype):
    bench.main([*SMALL, "--only", "unet,vae,text,attention", "--dtype", dtype])
    check(rows_of(capsys.readouterr().out), ["unet", "vae", "text", "attention"], bench.TOLERANCE[dtype])


@pytest.mark.slow
def test_with_processes_of_their_own():
    command = [sys.executable, "-m", "bench", *SMALL, "--only", "text"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check(rows_of(done.stdout), ["text"], 1e-5)


def output(title, variant):
    return process.first_output(title, variant, TINY)


@pytest.mark.slow
@pytest.mark.parametrize("variant", LADDER)
def test_every_variant_of_the_ladder_gives_the_same_numbers(in_process, monkeypatch, variant):
    """Also those for CUDA, though not compiled; and each runs what it says."""
    seen, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(parts, "compiled", lambda network, mode: seen.append(mode) or network)
    monkeypatch.setattr(parts, "reference", lambda *x: seen.append("reference") or reference(*x))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **how: seen.append("fused") or fused(*x, **how))
    ours = output("UNet step, trick by trick", variant)
    assert ("reference" in seen) == (variant == "reference attention")
    assert (None in seen or "reduce-overhead" in seen) == (variant in ON_CUDA)
    assert ("reduce-overhead" in seen) == ("graphs" in variant)
    assert bench.relative_error(ours, output("UNet step, trick by trick", LADDER[-1])) <= 1e-5


@pytest.mark.parametrize("variant", ATTENTION)
def test_every_way_to_share_a_map_gives_the_same_numbers(in_process, monkeypatch, variant):
    """torch's memory-efficient kernel is for CUDA alone; what would be compiled runs as it is."""
    if variant == "Triton kernel":
        pytest.importorskip("triton", reason="triton is not installed (requirements-triton.txt)")
    if variant == "memory-efficient":
        monkeypatch.setattr(parts, "sdpa_kernel", lambda backend: lambda function: function)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    title = "one map for two values"
    assert bench.relative_error(output(title, variant), output(title, ATTENTION[-1])) <= 1e-5


def test_the_pair_is_controlled(in_process, monkeypatch):
    """A control that does nothing gives another output, and nothing is timed."""
    monkeypatch.setattr("p2p.PairControl.next_step", lambda self, *step: setattr(self, "any_active", False))
    monkeypatch.setattr(bench, "timed", None)
    with pytest.raises(UserError, match=r"of a Prompt-to-Prompt pair, ours: the output differs by \d"):
        bench.main([*SMALL, "--only", "p2p"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "500"], "--size should be a multiple of 64, not 500"),
        (["--only", "unet,clip"], f"--only knows {', '.join(bench.GROUPS)}, not 'clip'"),
        (["--device", "cuda"], "this machine or this torch has no device cuda; try --device cpu"),
    ],
)
def test_mistakes(arguments, message, monkeypatch):
    monkeypatch.setattr("torch.zeros", None)  # stands for a device that is not there
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        bench.parse(arguments)
