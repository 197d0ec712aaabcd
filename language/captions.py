"""The files of captions and of triplets: read as needed, since they may be large, and only grown, a line a record."""

import csv
import json

from cli import UserError, keep_settings, reported_as

FIELDS = ("caption", "edit", "output")
CAPTIONS, URLS = ("caption", "input", "TEXT"), ("url", "URL")  # ours, the authors' and LAION's names
PARSERS = {".txt": lambda line: {"caption": line}, ".jsonl": json.loads, ".csv": dict}


def read_captions(path):
    """Yield (caption, url or None) from a .txt (a caption a line), .jsonl or .csv file. Raises UserError."""
    kinds = ".txt, .jsonl or .csv"
    with reported_as(f"{path} cannot be read as {kinds}"), open(path, encoding="utf-8-sig", newline="") as file:
        parse = PARSERS[path.suffix]
        for number, line in enumerate(csv.DictReader(file, restval="") if path.suffix == ".csv" else file, 1):
            with reported_as(f"{path}, record {number}: a text named {' or '.join(CAPTIONS)} is needed"):
                record = parse(line)
                caption = next(record[name] for name in CAPTIONS if name in record).strip()
                url = next((record[name] for name in URLS if record.get(name)), "").strip()
            yield caption, url or None


def read_edits(path):
    """The triplets of a .jsonl file: a list of dicts with the texts of FIELDS. Raises UserError."""
    edits = []
    with reported_as(f"{path} cannot be read; datagen.py text writes such files"), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            with reported_as(f"{path}, line {number}: the texts {', '.join(FIELDS)} are needed"):
                edit = json.loads(line)
                edit["caption"] = next(edit[name] for name in CAPTIONS if name in edit)
                if not all(edit[field].strip().encode() for field in FIELDS):
                    raise ValueError("one of them is empty")
            edits.append(edit)
    if not edits:
        raise UserError(f"{path} holds no edits")
    return edits


def normal(text):
    """A caption as it is compared: without case, outer spaces and final marks."""
    return text.strip().rstrip(".!?").strip().lower()


def unique(captions, counts):
    """Yield the (caption, url) whose caption and url have not come before; counts["duplicates"] are the others."""
    seen = {hash("")}  # empty captions are skipped, too; hashes stand for the texts, since there may be millions
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
