"""What a command of Section 4 leaves behind: NAME.json and NAME.csv of points, NAME.md to read, NAME.png to look at."""

import csv
import json

from cli import atomic_write

from mini.evaluation import table, wilson
from section4.statistics import means
from training.plot import plot


def write_report(out, name, rows, paragraphs, panels):
    """rows: a list of dicts with equal keys, numbers and texts; paragraphs: Markdown; panels: as for `plot`."""
    for ending, text in (("json", json.dumps(rows, indent=1)), ("md", "\n\n".join(paragraphs))):
        with atomic_write(out / f"{name}.{ending}") as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    with atomic_write(out / f"{name}.csv") as beside, open(beside, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(panels, out / f"{name}.png")
    print("\n\n".join(paragraphs[2:]))
    print(f"\n{out} holds {name}.png, {name}.md, {name}.csv and {name}.json")


def row_of(name, scores, keys, weights):
    """A row: the means of these scores [N], each with its 95 % interval, as KEY, KEY_low, KEY_high.

    Successes, which are 0 or 1, have Wilson's interval, the others one by the bootstrap's `weights`.
    """
    row = {"name": name}
    for key in keys:
        if key == "success":
            mean, ends = scores[key].mean(), wilson(float(scores[key].sum()), len(scores[key]))
        else:
            mean, ends = means(scores[key], weights)
        row |= {key: float(mean), f"{key}_low": float(ends[0]), f"{key}_high": float(ends[1])}
    return row


def rows_table(rows, titles, digits=3):
    """Rows of `row_of` as a table in Markdown; titles: {key: the column's title}; digits: behind the point."""
    return table(titles.values(), {row["name"]: [cell(row, key, digits) for key in titles] for row in rows})


def cell(row, key, digits):
    """A value of a row as a text, with its interval where it has one; fractions that are successes in percent."""
    value, low, high = (row.get(f"{key}{ending}") for ending in ("", "_low", "_high"))
    if isinstance(value, str) or value is None:
        return value or ""
    digits, factor = (1, 100) if key.endswith("success") else (digits, 1)
    text = f"{factor * value:.{digits}f}" + " %" * (factor == 100)
    return text if low is None else f"{text} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"
