"""torch.compile, which makes few large operations of many small ones: of what, and where its work is kept."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch

from cli import UserError

SIZES = 64  # of inputs that one function may be compiled for
NOTICE = "compiling with the first step, which takes minutes unless it was done before"  # what programs say


def compiled(function, **settings):
    """A function or module, compiled when it is first called, anew for each size of its inputs.

    That takes minutes. What comes of it is kept in the user's cache folder, where the next run finds it in seconds.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "ip2p" / "compiled"))  # else below /tmp
    torch._dynamo.config.optimize_ddp = False  # or what is compiled within DistributedDataParallel is cut into pieces
    return torch.compile(function, dynamic=False, recompile_limit=SIZES, isolate_recompiles=True, **settings)


def compile_networks(unet, vae, **settings):
    """Compile, in place, what a sampler calls at every step, and the decoder; settings: of torch.compile.

    Convolutions' weights go to channels_last, the better of the two layouts for compiled code where it was measured
    (the UNet on a CPU, bench/ladder-cpu.md). Decoding in bands stays as it is: each band would be code of its own.
    """
    for network in (unet, vae):
        network.to(memory_format=torch.channels_last)
    unet.predict = compiled(unet.predict, fullgraph=True, **settings)
    usual, fast = vae.decode, compiled(vae.decode, fullgraph=True, **settings)
    vae.decode = lambda z, low_memory=False: usual(z, low_memory) if low_memory else fast(z)


@contextmanager
def compiling(advice):
    """Where compiled code is called. Raises UserError with this advice if it cannot be compiled."""
    try:
        yield
    except Exception as error:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # here, since it takes a second
        from torch._inductor.exc import InductorError

        if not isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit, InductorError)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the networks could not be compiled here ({reason}); {advice}") from error
