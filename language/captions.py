"""Captions in, triplets out: what a language model's work is read from and kept in (Sec. 3.1.1).

Input files may be larger than memory, so they are read as they are needed. Output files only grow, a line a record, so
that a run which was stopped at any moment can go on.
"""

import csv
import hashlib
import json
import os
import time
from pathlib import Path

from cli import UserError

FIELDS = ("caption", "edit", "output")
FSYNC_EVERY = 2.0  # seconds


def read_captions(path):
    """Yield (caption, url or None) from a .txt (a caption a line), .jsonl or .csv file. Raises UserError."""
    path = Path(path)
    readers = {".txt": read_txt, ".jsonl": read_jsonl, ".csv": read_csv}
    if path.suffix not in readers:
        raise UserError(f"{path}: captions are read from .txt, .jsonl and .csv files")
    try:
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
            yield from readers[path.suffix](file, path)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_txt(file, path):
    """A caption a line."""
    for line in file:
        yield line.strip(), None


def read_csv(file, path):
    """A row each; the first one names the columns."""
    rows = csv.DictReader(file)
    if "caption" not in (rows.fieldnames or ()):
        raise UserError(f"{path}: the first line should name the columns, one of them caption")
    for row in rows:
        yield (row["caption"] or "").strip(), row.get("url") or None


def read_jsonl(file, path):
    """A JSON object a line."""
    for number, line in enumerate(file, 1):
        try:
            record = json.loads(line)
            caption, url = record["caption"].strip(), record.get("url") or None
            if not isinstance(url, str | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: a JSON object with a caption is needed") from error
        yield caption, url


def read_edits(path):
    """The triplets of a .jsonl file: a list of dicts with the texts of FIELDS. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(file)  # str.splitlines would also split at U+2028, which JSON may hold
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; datagen.py text writes one") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    edits = []
    for number, line in enumerate(lines, 1):
        try:
            edit = json.loads(line)
            complete = all(edit[field].strip().encode() for field in FIELDS)
        except (ValueError, KeyError, TypeError, AttributeError):
            complete = False
        if not complete:
            raise UserError(f"{path}, line {number}: the texts {', '.join(FIELDS)} are needed")
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


class Records:
    """A file of JSON lines that only grows: each goes to the system at once, and to the disk every few seconds."""

    def __init__(self, path):
        """Open for appending; a torn last line is cut off. `keys`: its captions' fingerprints. Raises UserError."""
        self.path, self.keys = Path(path), set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                file.seek(0)
                whole = 0
                for number, line in enumerate(file, 1):
                    if line.endswith(b"\n"):
                        self.keys.add(self.key_of(line, number))
                        whole += len(line)
                file.truncate(whole)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - until `close`
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.size, self.synced = whole, time.monotonic()

    def key_of(self, line, number):
        """The fingerprint of a line's caption."""
        try:
            return fingerprint(normal(json.loads(line)["caption"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}, line {number} is damaged; remove it, and it is written anew") from error

    def append(self, record):
        """Write one record, whole or not at all. Raises UserError."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
            self.size += len(line)
            if time.monotonic() - self.synced > FSYNC_EVERY:
                self.sync()
        except OSError as error:
            os.truncate(self.path, self.size)
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def sync(self):
        """Bring everything to the disk."""
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def close(self):
        """The same, and let go of the file."""
        self.sync()
        self.file.close()
