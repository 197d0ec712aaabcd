"""Failing cleanly: a mistake of the user's ends in one line, and no file is ever left half-written."""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The text is one line: what was wrong, and what to do."""


def run_program(main):
    """Call `main()`; turn a UserError into one line and exit code 2, Ctrl-C into a quiet exit 130."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; nothing half-written is left behind", file=sys.stderr)
        sys.exit(130)


@contextmanager
def written_whole(path):
    """Give a path beside `path` to write to (a file or a folder), and rename it to `path` when the block ends well.

    When the block fails, whatever was written is removed and `path` is as it was before. Raises UserError where
    the system refuses the writing (no such folder, no permission, disk full).
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)
