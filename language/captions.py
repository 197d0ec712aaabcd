"""The files of captions and of triplets: read as needed, since they may be large, and only grown, a line a record."""

import json

from cli import UserError, keep_settings, reported_as

from formats.tables import read_rows, text_of

FIELDS = ("caption", "edit", "output")
NAMES = {  # our name first, then the authors' (their prompts, their data set on the hub) and LAION's; "" is a line
    "caption": ("caption", "input", "original_prompt", "text", ""),
    "edit": ("edit", "edit_prompt", "instruction"),
    "output": ("output", "edited_prompt"),
    "url": ("url",),
}


def read_captions(path):
    """Yield (caption, url or None) of a file with a caption a line, or of CSV, JSON lines. Raises UserError."""
    for place, row in read_rows(path, NAMES["caption"][:-1]):
        with reported_as(place):
            caption, url = text_of(row, NAMES["caption"]), text_of(row, NAMES["url"], needed=False)
        if caption:
            yield caption, url or None


def read_edits(*paths):
    """The triplets of all these files: a list of dicts with the texts of FIELDS, and url. Raises UserError.

    A triplet may have "p": [LOW, HIGH], the range of Prompt-to-Prompt's p for its pairs; None without.
    """
    edits = []
    for path in paths:
        for place, row in read_rows(path, NAMES["edit"]):
            with reported_as(place):
                edit = {field: text_of(row, names, field != "url") for field, names in NAMES.items()}
                if empty := [field for field in FIELDS if not edit[field]]:
                    raise ValueError(f"{empty[0]} is empty")
                p = row.get("p")
                if p is not None and not 0 <= float(p[0]) <= float(p[1]) <= 1:
                    raise ValueError(f"p should be [LOW, HIGH] within 0 and 1, not {p}")
            edits.append(edit | {"url": edit["url"] or None, "p": p})
    if not edits:
        raise UserError(f"{paths[0]} holds no edits; datagen.py text writes such files")
    return edits


def normal(text):
    """A caption as it is compared: without case, outer spaces and final marks."""
    return text.strip().rstrip(".!?").strip().lower()


def unique(captions, counts):
    """Yield the (caption, url) whose caption and url have not come before; counts["duplicates"] are the others."""
    seen = {hash("")}  # of no letter but marks; hashes stand for the texts, since there may be millions
    for caption, url in captions:
        keys = {hash(normal(caption))} | ({hash(("url", url))} if url else set())
        if seen.isdisjoint(keys):
            yield caption, url
        else:
            counts["duplicates"] += 1
        seen |= keys


def begin_file(out, settings):
    """Keep the settings of a file in OUT.settings.json beside it. Raises UserError where `out` was made otherwise."""
    beside = out.with_suffix(".settings.json")
    if out.exists() and not beside.exists():
        raise UserError(f"{out} is there already, made otherwise; use another --out")
    keep_settings(beside, settings)


def read_done(path):
    """Hashes of the captions in a file of records, which is made if need be; a torn last line is cut off."""
    done, whole = set(), 0
    with reported_as(f"{path} cannot be read"), open(path, "a+b") as file:
        file.seek(0)
        for line in file:
            if line.endswith(b"\n"):
                done.add(hash(normal(json.loads(line)["caption"])))
                whole += len(line)
        file.truncate(whole)
    return done
