"""A training run on disk: states to resume from, each of them whole, of which the newest few are kept."""

import os

import torch

from cli import UserError, atomic_write

FOLDER = "states"


def save_state(run, step, parts, keep):
    """Write RUN/states/STEP.pt, whole or not at all, and remove all but the `keep` newest. Raises UserError.

    run: a Path, parts: what resuming needs, of tensors, numbers, texts, lists and dicts.
    """
    path = run / FOLDER / f"{step:08d}.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for torn in path.parent.glob(".*.tmp"):  # of a process that was killed
            torn.unlink()
        with atomic_write(path) as beside:
            torch.save({"step": step, **parts}, beside)
            with open(beside, "rb") as file:
                os.fsync(file.fileno())  # older ones are removed only when this one is on the disk
    except RuntimeError as error:  # torch's own writer says so of a full disk
        raise UserError(f"cannot write {path}; is the disk full? ({' '.join(str(error).split())[:100]})") from error
    paths = state_paths(run)
    for old in [*paths[: max(0, paths.index(path) + 1 - keep)], *paths[paths.index(path) + 1 :]]:
        old.unlink()  # the later ones are damaged, or the run would have gone on from them
    return path


def newest_state(run):
    """What the newest whole state holds, or None where there is none. Raises UserError if all are damaged."""
    paths = state_paths(run)
    for path in reversed(paths):
        try:
            parts = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(parts["step"], int):
                return parts
        except (OSError, MemoryError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # torch.load meets damaged files with exceptions of every kind
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            print(f"{path} is damaged and left aside ({reason})")
    if paths:
        raise UserError(f"all states in {run / FOLDER} are damaged; remove that folder to start anew")
    return None


def state_paths(run):
    """The states of a run, oldest first."""
    return sorted((run / FOLDER).glob("[0-9]*.pt"))
