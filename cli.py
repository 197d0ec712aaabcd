"""Failing cleanly: a mistake of the user's ends in one line, and no file is ever left half-written."""

import argparse
import errno
import importlib.util
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

if importlib.util.find_spec("torch") is None:  # every program imports this module before torch
    advice = "torch is not installed here; run `make demo` once, then `source .venv/bin/activate`"
    print(f"{Path(sys.argv[0]).name}: {advice}", file=sys.stderr)
    sys.exit(2)


class UserError(Exception):
    """Something the user can put right. The text is one line: what was wrong, and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))  # a file's name may hold line breaks, too


class Parser(argparse.ArgumentParser):
    """argparse, answering a mistake in one line."""

    def error(self, message):
        """Say what was wrong and leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (--help shows what is possible)\n")


def run_program(main):
    """Call `main()`; turn a UserError into one line and exit code 2, Ctrl-C into a quiet exit 130."""
    name = Path(sys.argv[0]).name
    if sys.stdout:  # None where it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of a file's name
    try:
        main()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; nothing half-written is left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone; let Python's own last flush go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@contextmanager
def atomic_write(path, writer=None):
    """Give a path beside `path` to write to (a file or a folder), and rename it to `path` when the block ends well.

    writer: tells those apart that may write at the same time; None for processes of one machine.

    When the block fails, whatever was written is removed and `path` is as it was before. Raises UserError where
    the system refuses the writing (no such folder, no permission, disk full).
    """
    path = Path(path)
    make_folder(path.parent)
    beside = path.parent / f".{path.name[:40]}.{writer or os.getpid()}.tmp"  # no longer than a file's name may be
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # there may be nothing to remove, nor a folder where it could have been
            beside.unlink()
        shutil.rmtree(beside, ignore_errors=True)


def append_whole(path, data):
    """Append bytes to a file, all or nothing. Raises UserError where the system refuses."""
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


# ---- what the command line may say ----


def check_sampling(steps, text_guidance, image_guidance, resolution):
    """Raise UserError for a value out of range; None stands for the model's default and passes."""
    if steps is not None and not 1 <= steps <= 1000:
        raise UserError(f"the steps should be between 1 and 1000, not {steps}")
    for name, scale in (("text", text_guidance), ("image", image_guidance)):
        if scale is not None and not 0 <= scale <= 100:
            raise UserError(f"the {name} guidance should be between 0 and 100, not {scale}")
    if resolution is not None and not 64 <= resolution <= 4096:
        raise UserError(f"the resolution should be between 64 and 4096 pixels, not {resolution}")


def check_instruction(instruction):
    """Raise UserError for an empty one, and for bytes that were no text when the command line was read."""
    if not instruction.strip():
        raise UserError('the instruction is empty; say what to change, such as "make it night"')
    if any("\ud800" <= letter <= "\udfff" for letter in instruction):
        raise UserError("the instruction is not valid UTF-8 text; check the terminal's encoding")


def check_device(name):
    """Raise UserError unless torch can compute on the device of this name. Imports torch."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch has another one for every device that it was not made for
        raise UserError(f"this machine or this torch has no device {name}; try --device cpu") from error


def check_device_name(name):
    """Raise UserError unless it is the name of a device, which need not be there. Imports torch."""
    import torch

    try:
        torch.device(name)
    except RuntimeError as error:
        raise UserError(f"there is no kind of device {name}; try cpu or cuda") from error


def own_device(name):
    """The device for this process: "cuda" is the one GPU, or of several that of this process of torchrun's."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if name == "cuda" and rank else name


def check_seeds(seeds):
    """Raise UserError unless there are seeds and the random generators take them all."""
    if not seeds or not all(0 <= seed < 2**63 for seed in seeds):
        raise UserError(f"a seed should be a whole number from 0 to {2**63 - 1}")


def plain(options):
    """The command line's values as JSON holds them."""
    values = {key: value for key, value in vars(options).items() if key != "run"}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def make_folder(folder):
    """Make a folder for results. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error


def keep_settings(path, settings):
    """Write what a result depends on to a JSON file the first time, compare it every other time.

    So a program goes on with its own work and never replaces what another command line made. Raises UserError.
    """
    path, settings = Path(path), json.loads(json.dumps(settings, default=str))
    if not path.exists():
        with atomic_write(path) as beside:
            beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if different:
        name = different[0]
        change = f"{name} {begun.get(name)}, not {settings.get(name)}"
        raise UserError(f"{path.parent} was begun with {change}; use the same settings, or another output")
