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
