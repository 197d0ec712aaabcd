"""python -m bench: it runs, all variants give the same numbers, the table is right. Nothing is said about times."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from cli import UserError

import pytest
import torch
from conftest import ROOT

from bench import __main__ as bench
from bench import parts

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--small", "--size", "64", "--runs", "2"]


@pytest.fixture
def in_process(monkeypatch):
    """No process is started."""
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))


def check(text, groups, largest_error):
    """All variants of a CPU are in the table, in order, and their numbers are of the right kind."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = {what.strip(): [cell.strip() for cell in cells] for what, *cells in lines[2:]}
    chosen = [(title, variants) for title, (group, variants, _) in parts.PARTS.items() if group in groups]
    shown = [f"{title}: {one}" for title, variants in chosen for one in variants if one not in parts.ON_CUDA]
    assert list(rows) == shown
    for time, ratio, spread, memory, error in rows.values():
        low, high = map(float, spread.split(" to "))
        assert float(time.removesuffix(" s")) > 0
        assert 0 <= low <= float(ratio.strip("*")) <= high
        assert re.fullmatch(r"\d+\.\d\d GB|unknown", memory)
        assert 0 <= float(error) <= largest_error


@pytest.mark.parametrize("groups", [["train", "p2p"], pytest.param(bench.GROUPS[:-1], marks=pytest.mark.slow)])
def test_parts_in_this_process(in_process, capsys, groups):
    bench.main([*SMALL, "--only", ",".join(groups)])
    check(capsys.readouterr().out, groups, 1e-5)


@pytest.mark.slow
def test_half_precision_with_processes_of_their_own():
    command = [sys.executable, "-m", "bench", *SMALL, "--only", "unet,vae", "--dtype", "bfloat16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check(done.stdout, ["unet", "vae"], bench.TOLERANCE["bfloat16"])


@pytest.mark.parametrize("variant", [one for one in parts.ON_CUDA if not one.startswith("diffusers")])
def test_what_needs_a_gpu_gives_the_same_numbers(monkeypatch, variant):
    """What would be compiled runs as it is."""
    for module, name in ((parts, "compiled"), (torch, "compile")):
        monkeypatch.setattr(module, name, lambda network, **settings: network)
    title = next(title for title, (_, variants, _) in parts.PARTS.items() if variant in variants)
    options = bench.parse(SMALL)
    ours, base = (parts.first_output(title, one, options) for one in (variant, parts.PARTS[title][1][-1]))
    torch.testing.assert_close(ours, base, rtol=1e-4, atol=1e-5)


def test_outputs_are_compared_before_anything_is_timed(in_process, monkeypatch):
    """Here a pair without control."""
    monkeypatch.setattr("p2p.PairControl.next_step", lambda self, *step: setattr(self, "any_active", False))
    monkeypatch.setattr(bench, "timed", None)
    with pytest.raises(UserError, match=r"no maps in memory: the output differs by \d"):
        bench.main([*SMALL, "--only", "p2p"])


def test_a_trace_of_a_step(tmp_path):
    bench.main([*SMALL, "--trace", str(tmp_path / "new" / "trace.json")])
    events = json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    assert {"aten::conv2d", "aten::scaled_dot_product_attention"} <= {event["name"] for event in events}


def test_a_group_that_is_not_there():
    with pytest.raises(UserError, match=f"^--only knows {', '.join(bench.GROUPS)}, not 'clip'$"):
        bench.parse(["--only", "unet,clip"])
