"""What all programs share: a mistake of the user's ends in one line, and no file is ever left half-written."""

import argparse
import errno
import importlib.util
import json
import math
import numbers
import os
import re
import shutil
import sys
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path

if importlib.util.find_spec("torch") is None:  # every program imports this module before torch
    advice = "torch is not installed here; run `make demo` once, then `source .venv/bin/activate`"
    print(f"{Path(sys.argv[0]).name}: {advice}", file=sys.stderr)
    sys.exit(2)


class UserError(Exception):
    """Something the user can put right. The text is one line: what was wrong, and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse, answering a mistake in one line."""

    def error(self, message):
        """Say what was wrong and leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (--help shows what is possible)\n")


def html_file(text):
    """The type of an option that names a page to write."""
    if not text.lower().endswith((".html", ".htm")) or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"should be a file that ends in .html, not {text}")
    return Path(text)


def between(least, most=math.inf, kind=int):
    """The type of an option that is a number in this range, ends included."""

    def number(text):
        if not least <= kind(text) <= most:
            wanted = f"from {least} to {most}" if most < math.inf else f"at least {least}"
            raise argparse.ArgumentTypeError(f"should be {wanted}, not {text}")
        return kind(text)

    return number


WHOLE, FRACTION, SEED = between(1), between(0, 1, float), between(0, 10**18)
SAMPLERS = "euler_ancestral", "euler", "heun", "dpm_solver_2m", "dpm_solver_2m_sde", "unipc"  # of diffusion.py
SCHEDULES = "authors", "karras", "trailing"  # of noise levels, see `NoiseSchedule.sigmas`
STEPS, SCALE, PIXELS = between(1, 1000), between(0, 100, float), between(64, 4096)  # as in `check_sampling`


def add_sampler(add):
    """Add --sampler and --schedule to a command line, by its `add_argument`."""
    add("--sampler", choices=SAMPLERS, help="the solver (default: the model's own; the authors': euler_ancestral)")
    add("--schedule", choices=SCHEDULES, help="how the noise levels are spaced (default: the model's own)")


def add_savings(parser):
    """Add what evaluations may leave out (gpu/savings.py) to a command line's parser."""
    add = parser.add_argument_group("faster, with a slightly different result").add_argument
    add("--cfg-above", type=between(0, kind=float), metavar="SIGMA", help="guidance only at higher noise levels")
    add("--cfg-below", type=between(0, kind=float), metavar="SIGMA", help="guidance only at lower noise levels")
    add("--null-every", type=WHOLE, metavar="K", help="evaluate the null branch every K-th time")
    add("--deep-every", type=WHOLE, metavar="K", help="evaluate the UNet's inner levels every K-th time")


def as_flags(settings):
    """Settings, as a PNG carries them, as the arguments that give them."""
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            yield flag
        elif value is not None and value is not False:
            yield from (f"{flag}={one}" for one in (value if isinstance(value, list) else [value]))


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}  # of images


def find_images(name):
    """The image files that a name stands for: itself, those of a folder, or those that match a pattern."""
    if os.path.isdir(name):
        found = [str(path) for path in sorted(Path(name).iterdir()) if path.suffix.lower() in SUFFIXES]
    else:
        found = [name] if os.path.exists(name) or not set(name) & set("*?[") else sorted(glob(name))
    if not found:
        raise UserError(f"there are no images in {name}")
    return found


def name_outputs(folder, paths, *taken):
    """A PNG in a folder for each of some files; those of equal names are numbered, and no name is `taken`."""
    names = []
    for path in paths:
        numbers = ("", *(f"_{number}" for number in range(2, len(paths) + 2)))
        own = (f"{Path(path).stem}{number}.png" for number in numbers)
        names.append(next(name for name in own if name not in (*taken, *names)))
    return [Path(folder) / name for name in names]


def run_program(main):
    """Call `main()`; a mistake or what the system refuses ends in one line and exit code 2, Ctrl-C in a quiet 130."""
    name = Path(sys.argv[0]).name
    if sys.stdout:  # None where it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of a file's name
    try:
        main()
    except BrokenPipeError:  # the reader of our output has ended; Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        known = isinstance(error, OSError) and error.filename
        message = f"{error.filename}: {error.strerror}" if known else str(error)
        print(f"{name}: {' '.join(message.splitlines())}", file=sys.stderr)  # a file's name may hold line breaks
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; nothing half-written is left behind", file=sys.stderr)
        sys.exit(130)


@contextmanager
def reported_as(sentence, kinds=Exception):
    """Turn an exception of these kinds into a UserError: the sentence, and the exception's own words.

    It is for what reads a file, since decoders and parsers meet damaged files with exceptions of every kind.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{sentence}: {reason}") from error


@contextmanager
def memory_reported(advice):
    """Turn the exceptions that mean that memory ran out into a UserError with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            raise UserError(f"there is not enough memory; {advice}") from error
        raise


@contextmanager
def atomic_write(path):
    """Give a path beside `path` to write to (a file or a folder), and rename it to `path` when the block ends well.

    Parent folders are made. When the block fails, whatever was written is removed and `path` is as it was before.
    Raises UserError where the system refuses (no permission, disk full).
    """
    path = Path(path)
    beside = path.parent / f".{path.name[:40]}.{os.getpid()}.tmp"  # no longer than a file's name may be
    try:
        with reported_as(f"cannot write {path}", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            os.replace(beside, path)
    finally:
        with suppress(OSError):  # there may be nothing to remove, nor a folder where it could have been
            beside.unlink()
        shutil.rmtree(beside, ignore_errors=True)


def append_whole(path, data):
    """Append bytes to a file, all or nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if file.write(data) < len(data):  # one call of the system: what it cannot do at all raises
            file.truncate(size)
            raise OSError(errno.ENOSPC, "the disk is full", str(path))


def keep_settings(path, settings, noted=()):
    """Write what a result depends on to a JSON file the first time, compare it every other time.

    So a program resumes its own work and never replaces what another command line made. noted: names of settings that
    may change, such as paths: the file always holds the latest. Raises UserError.
    """
    path, settings = Path(path), json.loads(json.dumps(settings, default=str))
    if path.exists():
        with reported_as(f"{path} cannot be read"):
            begun = json.loads(path.read_text(encoding="utf-8"))
            for name in {**begun, **settings}:
                if begun.get(name) != settings.get(name) and name not in noted:
                    change = f"{name} {begun.get(name)}, not {settings.get(name)}"
                    advice = "use the same settings, or another output"
                    raise UserError(f"{path}: the output was begun with {change}; {advice}")
        if begun == settings:
            return
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_sampling(steps, text_guidance, image_guidance, resolution, sampler, schedule):
    """Raise UserError for a value that is out of range, or no number, or no whole number where one is needed."""
    for value, names in ((sampler, SAMPLERS), (schedule, SCHEDULES)):
        if value not in names:
            raise UserError(f"{value!r} should be one of {', '.join(names)}")
    for name, value, kind, least, most in [
        ("steps", steps, numbers.Integral, 1, 1000), ("resolution", resolution, numbers.Integral, 64, 4096),
        ("text guidance", text_guidance, numbers.Real, 0, 100),
        ("image guidance", image_guidance, numbers.Real, 0, 100),
    ]:  # fmt: skip
        if not (isinstance(value, kind) and least <= value <= most):
            whole = "a whole number " if kind is numbers.Integral else ""
            raise UserError(f"the {name} should be {whole}between {least} and {most}, not {value!r}")


def check_instruction(instruction):
    """Raise UserError for what is no text, for an empty one, and for bytes that were none on the command line."""
    if not isinstance(instruction, str):
        raise UserError(f"the instruction should be a text, not {type(instruction).__name__}")
    if not instruction.strip():
        raise UserError('the instruction is empty; say what to change, such as "make it night"')
    if any("\ud800" <= letter <= "\udfff" for letter in instruction):
        raise UserError("the instruction is not valid UTF-8 text; check the terminal's encoding")


def check_seeds(seeds):
    """Raise UserError unless there are seeds and the random generators take them all."""
    if not seeds or not all(isinstance(seed, numbers.Integral) and 0 <= seed < 2**63 for seed in seeds):
        raise UserError(f"a seed should be a whole number from 0 to {2**63 - 1}")


def check_device(name):
    """Raise UserError unless torch can compute on the device of this name."""
    import torch  # here, so that programs can answer mistakes before they load it

    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch has another one for every device that it was not made for
        raise UserError(f"this machine or this torch has no device {name}; try --device cpu") from error


def fast_precision(device):
    """The number format in which a device computes fastest: "bf16" where it can multiply it, else "fp16" or "no"."""
    import torch

    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    known = torch.backends.mkldnn.is_available()  # not on Apple's processors
    return "bf16" if known and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"


def fast_format(device):
    """The number format in which an edit is fast: on a GPU the authors', on a CPU bfloat16 if it can multiply it."""
    if device.startswith("cuda"):
        return "float16"
    return "bfloat16" if fast_precision(device) == "bf16" else "float32"


def own_device(name):
    """The device for this process: "cuda" is the one GPU, or of several that of this process of torchrun's."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if name == "cuda" and rank else name
