"""One reader of text files, whatever program wrote them: a text a line, CSV with a header, JSON lines, a JSON list.

What a file holds decides, its suffix only that a `.csv` or `.tsv` has a header. UTF-8 and UTF-16, byte order marks,
all line ends, blank lines and the delimiters , ; and tab are read alike. Names of columns are given in lower case.
"""

import csv
import json
import re
from pathlib import Path

from cli import UserError, reported_as


def read_rows(path, names=(), skip=False):
    """Yield (place, row) of every record, read as needed. Raises UserError.

    place: "PATH, line 3", for messages; row: {column in lower case: value}, of a plain text {"": line}.
    names: columns in lower case; a first line with one of them is the header of a CSV, whatever the file's suffix.
    skip: yield (place, UserError) for a record that is broken, and go on with the next one.
    """
    with reported_as(f"{path} cannot be read (text in UTF-8, CSV or JSON is expected)"):
        with open(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with open(path, encoding=encoding) as file:
            for place, row in parse(file, Path(path).suffix.lower(), names):
                if isinstance(row, dict):
                    row = {name.strip().lower(): value for name, value in row.items()}
                else:
                    wrong = row if isinstance(row, ValueError) else f"a JSON object is needed, not {row!r:.40}"
                    row = UserError(f"{path}, {place}: {wrong}")
                    if not skip:
                        raise row
                yield f"{path}, {place}", row


def parse(file, suffix, names):
    """Yield (place in the file, row) of an open file; a ValueError is a row that is broken."""
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    if "\0" in first or re.match(r"version https://git-lfs|\s*<(!doctype|html)", first, re.IGNORECASE):
        raise ValueError("it is a binary file, a web page or a git-lfs pointer")
    delimiter = max(",;\t", key=first.count)
    header = [cell.strip().lower() for cell in next(csv.reader([first[:10_000]], delimiter=delimiter), [])]
    if re.match(r'\s*\[\s*([{"\]]|$)', first):
        for number, row in enumerate(json.load(file), 1):
            yield f"record {number}", {"": row} if isinstance(row, str) else row
    elif suffix in (".csv", ".tsv") or set(names) & set(header):
        yield from parse_csv(file, delimiter)
    else:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line) if first.lstrip().startswith("{") else {"": line.strip()}
                except ValueError as error:
                    row = ValueError(f"this is no JSON: {error}")
                yield f"line {number}", row


def parse_csv(file, delimiter):
    """The same of a CSV; the first row that is not blank is the header."""
    reader, header = csv.reader(file, delimiter=delimiter, strict=True), None
    for cells in reader:
        if not "".join(cells).strip():
            continue
        if header is None:
            header = cells
        elif len(cells) > len(header):
            wrong = f"{len(cells)} cells, but the header has {len(header)}; texts with a {delimiter!r} need quotes"
            yield f"line {reader.line_num}", ValueError(wrong)
        else:
            cells += [""] * (len(header) - len(cells))
            yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))


def text_of(row, names, needed=True):
    """The text, without outer spaces, in the first of these columns that has one; "" if all are empty.

    Raises ValueError where it is no text, and, if it is needed, where the row has none of the columns.
    """
    if needed and not set(names) & set(row):
        wanted, found = " or ".join(filter(None, names)), ", ".join(filter(None, row)) or "a plain text"
        raise ValueError(f"a text named {wanted} is needed, but there is {found}")
    value = next((row[name] for name in names if row.get(name)), "")
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not a text")
    value.encode()  # half a character, as "\ud800" in JSON, ends here
    return value.strip()
