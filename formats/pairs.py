"""Edited pairs from other hands, one row after another: tables, two folders of images, parquet, the Hugging Face hub.

What a row's columns are called tells which is which. The guesses fit, among others, the hub's data sets
fusing/instructpix2pix-1000-samples, timbrooks/instructpix2pix-clip-filtered and osunlp/MagicBrush, a row for each turn.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path

from cli import SUFFIXES, UserError, reported_as

from PIL import Image

from formats.hub import WAIT, in_time
from formats.tables import read_rows, text_of
from images import open_image

# What the columns are called, best first, without words of FILLER: "before_image", "image before", "before" are alike.
STEMS = {
    "before": ("before", "input", "original", "source", "src", ""),
    "after": ("after", "output", "edited", "target", "result"),
    "edit": ("edit prompt", "edit instruction", "instruction", "edit", "instr", "prompt", "text"),
    "caption": ("caption", "original prompt", "source caption", "input caption", "input"),
    "output": ("output", "edited prompt", "target caption", "output caption"),
    "url": ("url",),
}
FILLER = {"image", "images", "img", "file", "name", "filename", "path"}
FILE_NAME = ("", "before", "input", "id", "key")  # what names an image beside its instruction
NEEDED = ("before", "after", "edit")
HEADERS = [stem.replace(" ", "_") for stems in STEMS.values() for stem in stems if stem]
TEXTS = r"(?!readme|license|dataset_info|state)[^/]*\.(txt|csv|tsv|jsonl?)"
KINDS = (r".*\.parquet", r"(.*/)?metadata\.(jsonl|csv)", TEXTS)


class ImageBytes(io.BytesIO):
    """An image file that lies inside another file, which `place` names."""

    def __repr__(self):
        """What Pillow and `open_image` call it in messages."""
        return self.place


@dataclass
class Row:
    """A pair as its source has it. What is wrong with it is said when it is used, so that a row can be skipped."""

    place: str  # for messages
    cells: dict | UserError  # "before", "after", "edit" and, where there are such columns, "caption", "output", "url"
    folder: Path  # where the paths of its images begin

    def prompt(self):
        """{"caption", "edit", "output", "url"}: texts, but a missing url is None. Raises UserError."""
        if isinstance(self.cells, UserError):
            raise self.cells
        with reported_as(self.place):
            if not (edit := text_of(self.cells, ["edit"])):
                raise ValueError("the instruction is empty")
        others = (self.cells.get(name) for name in ("caption", "output", "url"))
        caption, output, url = (value if isinstance(value, str) else "" for value in others)
        return {"caption": caption, "edit": edit, "output": output, "url": url or None}

    def images(self):
        """(before, after), RGB images of one size. Raises UserError."""
        before, after = (open_image(self.file(name)) for name in ("before", "after"))
        (width, height), (w, h) = before.size, after.size
        if abs(width * h - height * w) > 0.01 * width * h:
            raise UserError(f"{self.place}: the images differ in shape, {width}x{height} and {w}x{h}")
        return before, after if (w, h) == before.size else after.resize(before.size, Image.Resampling.LANCZOS)

    def file(self, name):
        """The cell of an image as `open_image` takes it: a path, or the file's bytes."""
        value = self.cells[name]
        if isinstance(value, dict):  # as the datasets library writes images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            data = ImageBytes(value)
            data.place = f"{self.place}, the image {name}"
            return data
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.place}: the image {name} is missing")
        return self.folder / value.strip().replace("\\", "/")  # tables from Windows


def read_pairs(source, columns=None):
    """Yield a `Row` for every pair of a source, read as needed. Raises UserError.

    source: a table or a parquet file; a folder of such; a folder with two folders of equal file names and a file of
    instructions; or a data set's hub id. columns: what before, after and instruction are called; None to guess.
    """
    path, folders = Path(source), None
    if path.is_dir():
        names = listing(path)
        if "seeds.json" in names:
            raise UserError(f"{path} has the authors' layout already; use it as it is: --data {path}")
        inside = {folder.name.lower(): folder for folder in path.iterdir() if folder.is_dir()}
        pair = columns[:2] if columns else [guess(inside, STEMS[name]) for name in NEEDED[:2]]
        folders = [inside[name] for name in pair] if set(pair) <= set(inside) else None
        paths = [path / name for name in choose(names, path)]
        if folders and len(paths) > 1:
            raise UserError(f"{path} holds {len(paths)} texts, such as {paths[0].name}; leave one there")
    elif path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        paths = [path]
    else:
        paths = fetch(str(source))
    for path in paths:
        with open(path, "rb") as file:
            parquet = file.read(4) == b"PAR1"
        if not parquet and path.suffix == ".parquet":
            raise UserError(f"{path} is no parquet file; fetch it anew (a clone needs `git lfs pull`)")
        rows = read_parquet(path, columns) if parquet else read_rows(path, HEADERS, skip=True)
        found = None
        for place, row in rows_of_folders(path, list(rows), folders, columns) if folders else rows:
            if isinstance(row, dict):
                found = found or find_columns(path, row, columns)
                row = {name: row.get(column) for name, column in found.items()}
            yield Row(place, row, path.parent)


def guess(names, stems):
    """Which of these names is one of the stems but for FILLER; of several the longest; None if there is none."""
    words = {name: [word for word in re.findall(r"[^\W_]+", name.lower()) if word not in FILLER] for name in names}
    found = ([name for name in names if name and " ".join(words[name]) == stem] for stem in stems)
    return next((max(some, key=len) for some in found if some), None)


def find_columns(path, row, columns):
    """{"before", "after", "edit", and what else there is of STEMS: the row's column}. Raises UserError."""
    found = dict(zip(NEEDED, columns or (), strict=False))
    for name, stems in STEMS.items():
        column = found.get(name) or guess([column for column in row if column not in found.values()], stems)
        if column in row:
            found[name] = column
        elif "" in row:
            raise UserError(f"{path} is plain text; it needs folders before/ and after/ beside it, or see --columns")
        elif name in NEEDED:
            there = ", ".join(map(repr, row))
            raise UserError(f"{path}: no column for {name}; there are {there}; say --columns BEFORE,AFTER,EDIT")
    return found


def rows_of_folders(path, rows, folders, columns):
    """Add the images in two folders to the rows of a file: by name, or to a plain text in the order of names."""
    before, after, edit = columns or NEEDED
    first = next((row for _, row in rows if isinstance(row, dict)), {})
    if guess(first, STEMS["after"]) or before in first:  # it names both images
        return rows
    images = [{file.stem: f"{folder.name}/{file.name}" for file in folder.iterdir()
               if file.suffix.lower() in SUFFIXES and file.name[0] != "."} for folder in folders]  # fmt: skip
    if "" in first:
        if alone := sorted(images[0].keys() ^ images[1].keys()):
            raise UserError(f"{folders[0]} and {folders[1]} need equal file names; {alone[0]} is in one of them alone")
        names = sorted(images[0], key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)])
        rows = rows * len(names) if len(rows) == 1 else rows  # one instruction for all
        if len(rows) != len(names):
            raise UserError(f"{path} has {len(rows)} instructions for the {len(names)} images in {folders[0]}")
        if names != sorted(names):
            print(f"{path}: the first lines are for {', '.join(names[:3])}, the last one for {names[-1]}")
        rows = [(place, {edit: row[""]}) for place, row in rows]
    else:
        if (column := guess(first, FILE_NAME)) is None:
            raise UserError(f"{path}: no column file_name; there are {', '.join(map(repr, first))}")
        names = [isinstance(row, dict) and Path(str(row.get(column)).replace("\\", "/")).stem for _, row in rows]
    return [
        (place, {**row, before: images[0].get(name), after: images[1].get(name)} if isinstance(row, dict) else row)
        for (place, row), name in zip(rows, names, strict=True)
    ]


def read_parquet(path, columns):
    """Yield (place, row) of a parquet file, of which a row group at most is in memory. Raises UserError."""
    options = {"pre_buffer": False, "buffer_size": 1 << 20}  # without them it keeps the whole file
    with reported_as(f"{path} cannot be read"), pyarrow_parquet().ParquetFile(path, **options) as file:
        names = {name.lower(): name for name in file.schema_arrow.names}
        needed = [names[column] for column in find_columns(path, names, columns).values()]
        batches = file.iter_batches(batch_size=1, columns=needed, use_threads=False)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}, row {number}", {name.lower(): value for name, value in row.items()}


def pyarrow_parquet():
    """The module that reads parquet. Raises UserError where it is missing."""
    try:
        from pyarrow import parquet  # here, since it is optional
    except ImportError as error:
        advice = "install it by `pip install -r requirements-parquet.txt`"
        raise UserError(f"pyarrow, which reads parquet files, is not installed here; {advice}") from error
    return parquet


def listing(folder):
    """The files in a folder, three levels deep, as sorted relative paths; without hidden ones."""
    found = (path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth) if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if "/." not in f"/{name}"]


def choose(names, source):
    """Those of a data set's files that hold rows, of the training split where there are several. Raises UserError."""
    for kind in KINDS:
        if found := [name for name in names if re.fullmatch(kind, name, re.IGNORECASE)]:
            chosen = [name for name in found if "train" in name.lower()] or found
            if len(chosen) < len(found):
                print(f"{source}: the training split alone is read, {len(chosen)} of {len(found)} files")
            return chosen
    raise UserError(f"{source} holds no pairs: no parquet file, no table, no text with instructions")


def fetch(name):
    """Yield the local paths of a hub data set's files with rows, each downloaded when its turn comes.

    Where the hub does not answer, those that are in its cache. Raises UserError.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # here, since it takes a second

    where = {"repo_id": name, "repo_type": "dataset"}
    try:
        info = in_time(WAIT, lambda: HfApi().dataset_info(name, timeout=WAIT, files_metadata=True))
    except Exception as error:  # of many kinds
        with reported_as(f"{name} is neither here nor in the hub's cache, and the hub does not give it"):
            try:
                folder = Path(snapshot_download(**where, local_files_only=True))
            except Exception:
                raise error from None
        print(f"the hub does not give {name}; what its cache holds of it is used")
        yield from (folder / file for file in choose(listing(folder), name))
        return
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files = choose(sorted(sizes), name)
    parquet = files[0].endswith(".parquet")
    if parquet:
        pyarrow_parquet()
    size = sum(sizes[file] for file in (files if parquet else sizes)) / 1e9
    licence = info.card_data and info.card_data.get("license") or "see its page"
    print(f"{name}: {size:.2f} GB in {len(files)} files, each downloaded once, when it is needed; licence: {licence}")
    for file in files:
        with reported_as(f"{file} of {name} cannot be downloaded; the same command resumes"):
            # a table has its images beside it
            path = Path(hf_hub_download(filename=file, **where) if parquet else snapshot_download(**where))
        yield path if parquet else path / file
