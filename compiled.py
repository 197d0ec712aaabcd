"""torch.compile, which makes few large operations of many small ones: of what, and where its work is kept."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch

from errors import UserError

SIZES = 64  # of inputs that one function may be compiled for


def compiled(function, **settings):
    """A function or module, compiled when it is first called, anew for each size of its inputs.

    That takes minutes. What comes of it is kept in the user's cache folder, where the next run finds it in seconds.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "ip2p" / "compiled"))  # else below /tmp
    torch._dynamo.config.optimize_ddp = False  # or what is compiled within DistributedDataParallel is cut into pieces
    return torch.compile(function, dynamic=False, recompile_limit=SIZES, isolate_recompiles=True, **settings)


@contextmanager
def compiling(advice):
    """Where compiled code is called. Raises UserError with this advice if it cannot be compiled."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit, InductorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the networks could not be compiled here ({reason}); {advice}") from error
