"""Speed on a GPU: a Triton kernel for Prompt-to-Prompt, and torch.compile."""

import importlib.util

import torch


def shared_maps(device):
    """What `p2p.sample_pairs` may wrap its control in on this device: gpu.kernel.SharedMaps, or None.

    The kernel needs triton, which torch's builds for CUDA bring along; AMD's GPUs, which torch calls cuda as well, are
    left to torch.
    """
    if torch.device(device).type != "cuda" or not torch.version.cuda or not importlib.util.find_spec("triton"):
        return None
    from gpu.kernel import SharedMaps  # here, because it needs triton

    return SharedMaps
