"""Tables in Markdown, and the files of a result."""

import json

from cli import atomic_write

from images import save_png


def table(columns):
    """The first lines of a table with these columns."""
    return [*line("", *columns), "|---" * (1 + len(columns)) + "|"]


def line(*cells):
    """One line of a table."""
    return [f"| {' | '.join(cells)} |"]


def percent(fraction):
    """A fraction in [0, 1] in percent; None where there is nothing to count."""
    return "none" if fraction is None else f"{100 * fraction:.1f} %"


def write_results(out, name, results, paragraphs, image):
    """Write NAME.json, NAME.md and NAME.png into the folder `out`, and say so."""
    save_png(image, out / f"{name}.png")
    for ending, text in (("json", json.dumps(results, indent=2, default=str)), ("md", "\n\n".join(paragraphs))):
        with atomic_write(out / f"{name}.{ending}") as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    print(f"\n{out} holds {name}.md, {name}.json and {name}.png")
