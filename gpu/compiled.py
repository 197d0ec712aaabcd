"""torch.compile on a GPU, where it makes few large kernels of many small ones. On a CPU it does not pay."""

import os
from pathlib import Path

from cli import UserError

import torch

NOTICE = "compiling with the first step, which takes minutes unless it was done before"  # what programs say


def compiled(network, **settings):
    """A network, compiled at its first call, once for each size of its inputs; settings: of torch.compile.

    The result is kept in the user's cache folder, where the next run finds it in seconds. Raises UserError for one
    on a CPU.
    """
    if next(network.parameters()).device.type == "cpu":
        raise UserError("--compile does not pay on a CPU (bench/README.md): leave it out")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "ip2p" / "compiled"))  # else below /tmp
    # torch gives up at its 8th size otherwise
    return torch.compile(network, dynamic=False, fullgraph=True, recompile_limit=64, **settings)


def compile_model(model, **settings):
    """Compile, in place, what a sampler calls at every step, and the decoder. model: a `LatentDiffusion`.

    settings: of torch.compile, for the UNet. mode="reduce-overhead" replays it as a CUDA graph, which makes an edit
    twice as fast again (bench/gpu.md).
    """
    model.unet.to(memory_format=torch.channels_last)
    model.vae.decoder.to(memory_format=torch.channels_last)
    model.unet = compiled(model.unet, **settings)
    model.vae.decoder = compiled(model.vae.decoder)
