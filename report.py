"""What programs share that report results: tables, and a folder to write to."""

from pathlib import Path

import numpy as np

from errors import UserError


def table(columns):
    """The first lines of a table with these columns."""
    return [*line("", *columns), "|---" * (1 + len(columns)) + "|"]


def line(*cells):
    """One line of a table."""
    return [f"| {' | '.join(cells)} |"]


def percent(value):
    """A share for people."""
    return "none" if value is None else f"{100 * value:.1f} %"


def share(values):
    """The mean as a plain number, None of nothing."""
    return float(np.mean(values)) if len(values) else None


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
