"""python -m bench.gpu at toy size on a CPU: its parts run, and it survives those that fail."""

import gc
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from bench import gpu, parts, whole

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--small", "--device", "cpu"]


@pytest.mark.parametrize(("part", "rows"), [("ceilings", 3), ("edits", 5), ("training", 3)])
def test_parts(capsys, monkeypatch, part, rows):
    monkeypatch.setattr(gc, "collect", lambda: None)  # it would take most of the time here
    gpu.main([part, *SMALL])
    header, _, *lines = capsys.readouterr().out.splitlines()
    numbers = dict(gpu.ROW.match(line).groups() for line in lines)
    assert len(numbers) == rows
    assert all(float(number) > 0 for number in numbers.values())
    assert {line.count("|") for line in lines} == {header.count("|")}
    assert part != "ceilings" or {gpu.PRODUCTS, gpu.OPERATIONS} < {*numbers}


def test_a_preset_that_does_not_fit_is_a_result(capsys, monkeypatch):
    monkeypatch.setattr(whole, "training_step", lambda *_: torch.empty(2**60))
    monkeypatch.setattr(torch, "OutOfMemoryError", RuntimeError)  # what a CPU raises
    gpu.main(["training", *SMALL])
    assert capsys.readouterr().out.count("out of memory") == 3


def test_all_of_it_survives_what_fails_and_adds_to_its_files(tmp_path, monkeypatch):
    known = {f"{title}: {variant}" for title, (_, variants, _) in parts.PARTS.items() for variant in variants}
    assert {row for pair in gpu.CHOICES.values() for row in pair} <= known
    with_graphs, without = gpu.CHOICES["CUDA graphs"]
    rows = {with_graphs: "0.009 s", without: "1.5e-02 s", gpu.PRODUCTS: "760 TFLOP/s", gpu.OPERATIONS: "2.4 TFLOP"}
    table = "\n".join(["noise", *(f"| {what} | {value} |" for what, value in rows.items())])
    hangs = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    faked = [(30, ["-c", "raise SystemExit(3)"]), (0, ["-c", f"print({table!r})"]), (-28, ["-c", hangs])]
    monkeypatch.setattr(gpu, "commands", lambda options: faked)
    for _ in range(2):
        with pytest.raises(SystemExit, match="failed: -c raise SystemExit"):
            gpu.main([*SMALL, "--out", str(tmp_path)])
    log, results = ((tmp_path / name).read_text() for name in ("log.txt", "results.md"))
    assert (log.count("\nnoise\n"), results.count("\nnoise\n")) == (2, 0)
    for text in (f"- torch {torch.__version__}", "with exit code 3", "was killed", "channels_last: not measured."):
        assert results.count(text) == 2
    assert f'- CUDA graphs: use it. "{with_graphs}" takes 0.60 of the time' in results
    assert "266.7 TFLOP/s, 35% of what matrix products reach." in results


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", *SMALL, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "results.md").read_text().count("This part ended well") == 5
