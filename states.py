"""A training run on disk: states to resume from, each of them whole, of which the newest few are kept."""

import torch

from errors import UserError, written_whole

FOLDER = "states"


def save_state(run, step, parts, keep):
    """Write RUN/states/STEP.pt, whole or not at all, and remove all but the `keep` newest. Raises UserError.

    run: a Path, parts: what resuming needs, of tensors, numbers, texts, lists and dicts.
    """
    path = run / FOLDER / f"{step:08d}.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as beside:
            torch.save({"step": step, **parts}, beside)
    except RuntimeError as error:  # torch's own writer says so of a full disk
        raise UserError(f"cannot write {path}; is the disk full?") from error
    for old in state_paths(run)[:-keep]:
        old.unlink()
    return path


def newest_state(run):
    """What the newest whole state holds, or None where there is none. Raises UserError if all are damaged."""
    paths = state_paths(run)
    for path in reversed(paths):
        try:
            parts = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(parts["step"], int):
                return parts
        except Exception as error:  # torch.load meets damaged files with exceptions of every kind
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            print(f"{path} is damaged and left aside ({reason})")
    if paths:
        raise UserError(f"all states in {run / FOLDER} are damaged; remove that folder to start anew")
    return None


def state_paths(run):
    """The states of a run, oldest first."""
    return sorted((run / FOLDER).glob("[0-9]*.pt"))
