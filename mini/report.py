"""Tables in Markdown."""

import numpy as np


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
