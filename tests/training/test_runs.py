"""What is around the training loop and needs no training to be tested."""

import torch

from training import runs


def test_the_one_gpu_needs_no_number(monkeypatch):
    """torch.cuda.set_device refuses "cuda"."""
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert [runs.join("cuda"), runs.join("cuda:1")] == ["cuda", "cuda:1"]
    assert chosen == [0, 1]


def test_the_moving_average():
    """In place, and with it alone."""
    ema = {name: torch.full((2,), value) for name, value in (("a", 1.0), ("b", -2.0))}
    weights = {"b": torch.tensor([8.0, -2.0]), "a": torch.tensor([1.0, 3.0])}
    average = ema["a"]
    runs.update_ema(ema, weights, 0.75)
    assert ema["a"] is average
    assert [ema["a"].tolist(), ema["b"].tolist()] == [[1.0, 1.5], [0.5, -2.0]]
    assert [weights["a"].tolist(), weights["b"].tolist()] == [[1.0, 3.0], [8.0, -2.0]]
