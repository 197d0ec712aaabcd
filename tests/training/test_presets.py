"""train.py's command line: what --help tells, and what follows from the machine."""

import os

from cli import fast_format, fast_precision

import pytest
import torch

from training.presets import parse


def test_help_tells_of_export_and_presets(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "train.py export --help" in text
    assert "paper: resolution 256, max-resize 288, batch-size 32, total-batch-size 1024" in text
    assert "12gb, as paper but: max-resize 256" in text
    assert "trainable lora" in text.partition("12gb, as paper")[2].partition("mini, as paper")[0]


@pytest.mark.parametrize(("processes", "cores", "expected"), [(1, 2, 2), (1, 16, 9), (2, 3, 1), (8, 4, 1)])
def test_no_more_workers_than_cores(monkeypatch, processes, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert parse(["--data=x", "--init=y", "--out=z", "--workers=9"]).workers == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # only Linux has it
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert parse(["--data=x", "--init=y", "--out=z", "--workers=9"]).workers == expected


def test_a_torch_without_mkldnn(monkeypatch):
    """As on Apple's processors: the question whether it can multiply bfloat16 is not there to be asked."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert (fast_precision("cpu"), fast_format("cpu")) == ("no", "float32")


def test_a_processor_that_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    assert (fast_precision("cpu"), fast_format("cpu")) == ("bf16", "bfloat16")
