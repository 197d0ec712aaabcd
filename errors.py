"""Failing cleanly: a mistake of the user's ends in one line, and no file is ever left half-written."""

import argparse
import errno
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path


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
def written_whole(path, writer=None):
    """Give a path beside `path` to write to (a file or a folder), and rename it to `path` when the block ends well.

    writer: tells those apart that may write at the same time; None for processes of one machine.

    When the block fails, whatever was written is removed and `path` is as it was before. Raises UserError where
    the system refuses the writing (no such folder, no permission, disk full).
    """
    path = Path(path)
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
