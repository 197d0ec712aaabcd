"""torch.compile, which makes few large operations of many small ones: of what, and where its work is kept."""

import os
from pathlib import Path

import torch


def compiled(function, **settings):
    """A function or module, compiled when it is first called, anew for each size of its inputs.

    That takes minutes. What comes of it is kept in the user's cache folder, where the next run finds it in seconds.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "ip2p" / "compiled"))  # else below /tmp
    return torch.compile(function, dynamic=False, **settings)
