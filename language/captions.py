"""Captions in, triplets out: what a language model's work is read from and kept in (Sec. 3.1.1).

Input files may be larger than memory, so they are read as they are needed. Output files only grow, a line a record, so
that a run that was stopped at any moment can resume.
"""

import csv
import hashlib
import json
from pathlib import Path

from cli import UserError, append_whole, keep_settings, reported_as

FIELDS = ("caption", "edit", "output")
CAPTIONS, URLS = ("caption", "input", "TEXT"), ("url", "URL")  # ours, the authors' and LAION's names


def first_of(record, names):
    """The value of the first of these names that a record has; None where it has none of them."""
    return next((record[name] for name in names if name in record), None)


def read_captions(path):
    """Yield (caption, url or None) from a .txt (a caption a line), .jsonl or .csv file. Raises UserError."""
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl", ".csv"):
        raise UserError(f"{path}: captions are read from .txt, .jsonl and .csv files")
    newline = "" if path.suffix == ".csv" else None
    with reported_as(f"{path} cannot be read"), open(path, encoding="utf-8-sig", newline=newline) as file:
        records = csv.DictReader(file, restval="") if path.suffix == ".csv" else file
        if path.suffix == ".csv" and not {*CAPTIONS} & {*(records.fieldnames or ())}:
            raise UserError(f"{path}: the first line should name the columns, one of them caption or TEXT")
        for number, record in enumerate(records, 1):
            with reported_as(f"{path}, record {number}: a caption, and perhaps a url, are needed"):
                if path.suffix != ".csv":
                    record = json.loads(record) if path.suffix == ".jsonl" else {"caption": record}
                caption, url = first_of(record, CAPTIONS).strip(), (first_of(record, URLS) or "").strip()
            yield caption, url or None


def read_edits(path):
    """The triplets of a .jsonl file: a list of dicts with the texts of FIELDS. Raises UserError."""
    edits = []
    with reported_as(f"{path} cannot be read; datagen.py text writes such files"), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            with reported_as(f"{path}, line {number}: the texts {', '.join(FIELDS)} are needed"):
                edit = json.loads(line)
                edit["caption"] = first_of(edit, CAPTIONS)
                if not all(edit[field].strip().encode() for field in FIELDS):
                    raise ValueError("one of them is empty")
            edits.append(edit)
    if not edits:
        raise UserError(f"{path} holds no edits")
    return edits


def normal(text):
    """A caption as it is compared: without case, outer spaces and final marks."""
    return text.strip().rstrip(".!?").strip().lower()


def fingerprint(text):
    """Eight bytes that stand for a text, since millions of captions have to be remembered."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class Unique:
    """Iterate over the (caption, url) whose caption and whose url have not come before; count the others."""

    def __init__(self, captions):
        self.captions, self.skipped = captions, 0

    def __iter__(self):
        """Empty captions are left out, too."""
        seen, urls = set(), set()
        for caption, url in self.captions:
            key, place = fingerprint(normal(caption)), fingerprint(url) if url else None
            if not normal(caption) or key in seen or place in urls:
                self.skipped += 1
            else:
                yield caption, url
            seen.add(key)
            if place:
                urls.add(place)


def begin_file(out, settings):
    """Keep the settings of a file in OUT.settings.json beside it. Raises UserError where `out` was made otherwise."""
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder")
    beside = out.with_suffix(".settings.json")
    if out.exists() and not beside.exists():
        raise UserError(f"{out} is there already, made otherwise; use another --out")
    keep_settings(beside, settings)


class Records:
    """A file of JSON lines that only grows; each line is written whole."""

    def __init__(self, path):
        """Read what is there; a torn last line is cut off. `keys`: its captions' fingerprints. Raises UserError."""
        self.path, self.keys = Path(path), set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            whole = 0
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    with reported_as(f"{self.path}, line {number} is damaged; remove it, and it is written anew"):
                        self.keys.add(fingerprint(normal(json.loads(line)["caption"])))
                    whole += len(line)
            file.truncate(whole)

    def append(self, record):
        """Write one record, whole or not at all. Raises UserError."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
        append_whole(self.path, line + b"\n")
