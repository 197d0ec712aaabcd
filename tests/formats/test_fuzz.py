"""Damaged files, seeded: 500 checkpoints and 500 images either end in UserError, in one line, or still serve."""

import copy
import functools
import io
import json
import operator
import random
import resource
import shutil
import signal
import struct
import sys

from cli import UserError

import pytest
from conftest import colourful
from PIL import Image, features

from images import open_image
from ip2p import InstructPix2Pix

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = 30  # far more than any case takes, so that a hang is told from a busy machine


def flip(content, rng):
    """Change a few bytes, half of the times among the first, where formats keep what matters."""
    content, reach = bytearray(content), rng.choice([128, len(content)])
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        content[rng.randrange(min(reach, len(content)))] = rng.randrange(256)
    return bytes(content)


def truncate(content, rng):
    return content[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(content) + 1), len(content) - 1])]


def splice(content, rng):
    """Insert a piece of the file itself, zeros or random bytes, or put them in the place of others; or cut some out."""
    place, start, length = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1), rng.choice([1, 16, 1000])
    piece = rng.choice([content[start : start + length], bytes(length), rng.randbytes(length), b""])
    return content[:place] + piece + content[place + rng.choice([0, length]) :]


def foreign(content, rng):
    """Something else altogether."""
    page = b"<!DOCTYPE html><html>404</html>"
    return rng.choice([b"", b"\0" * 1000, page, b"\xff\xfe{\0}\0", b"null", b"[]", b"{}", rng.randbytes(500)])


BYTES = [*[flip] * 4, truncate, *[splice] * 4, foreign]
NESTED = json.loads("[" * 50 + "]" * 50)
ODD = [
    *[0, 1, -1, 2, 3, 7, 8, 16, 77, 320, 999, 1000, 2**31, 2**63, -(2**63), 10**30, 10**400, 1.5, 1e-300, 1e300],
    *[float("nan"), float("inf"), float("-inf"), -0.0, True, False, None, "", "x", "8", "\0", "\ud800", "x" * 1000],
    *[[], {}, [8], [8, 16], [0], [None], [[8]], {"a": 1}, NESTED, ["a"] * 1000, "two\nlines"],
    *["F16", "BF16", "F64", "I32", "U32", "I64", "BOOL", "F8_E4M3", "C64", "F4"],  # safetensors' number formats
]


def places(value, path=()):
    """The paths of everything in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def edit_json(value, rng):
    """Replace, rename, remove or scale things inside a JSON object."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        found = places(value)
        if not found:
            break
        *path, key = rng.choice(found)
        holder = functools.reduce(operator.getitem, path, value)
        way = rng.choice(["odd", "odd", "odd", "scale", "remove", "rename"])
        if way == "remove":
            del holder[key]
        elif way == "rename" and isinstance(holder, dict):
            holder[rng.choice([key + "x", "", "block_out_channels", "unet"])] = holder.pop(key)
        elif way == "scale" and type(holder[key]) in (int, float):
            holder[key] = rng.choice([-1, 0.5, 2, 3, 1000]) * holder[key] + rng.choice([0, 0, 1, -1])
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def damage_json(content, rng):
    return json.dumps(edit_json(json.loads(content), rng)).encode()


def damage_header(content, rng):
    """A .safetensors file whose header was edited: names, shapes, offsets, formats, our own note about the sizes."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if "ip2p" in header["__metadata__"] and rng.random() < 0.5:
        header["__metadata__"]["ip2p"] = json.dumps(edit_json(json.loads(header["__metadata__"]["ip2p"]), rng))
    else:
        header = edit_json(header, rng)
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damage_lines(content, rng):
    """A text file with lines removed, doubled, exchanged or changed."""
    lines = content.split(b"\n")
    for _ in range(rng.choice([1, 2, 5])):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        odd = rng.choice([b"", b"a", b"a b c", b"\xff \xfe", b"t h", "밤 밤".encode(), b"x" * 1000, b"q q"])
        lines[i] = rng.choice([odd, odd, lines[j], lines[i] * 2])
    return b"\n".join(lines)


def serves(name, action):
    """Whether a case succeeds; where it does not, it must end in UserError, in one line."""
    print(name)  # pytest shows it of a case that fails
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still running after {SECONDS} s"))
    signal.alarm(SECONDS)
    message = None
    try:
        action()
    except UserError as error:
        message = str(error)
    finally:
        signal.alarm(0)
    assert message is None or message.splitlines() == [message[:2000]]
    return message is None


@pytest.fixture(autouse=True)
def no_hoarding():
    """No case may need a gigabyte more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    unit = 1024 if sys.platform == "linux" else 1  # KiB there, bytes on a Mac
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 1 << 30


PHOTO = colourful(64, 64)
JSON_WAYS = [damage_json] * 8 + BYTES
TARGETS = [  # file, ways to damage it, how many cases
    ("unet/config.json", JSON_WAYS, 60),
    ("vae/config.json", JSON_WAYS, 40),
    ("text_encoder/config.json", JSON_WAYS, 50),
    ("unet/diffusion_pytorch_model.safetensors", [damage_header] * 6 + BYTES, 50),
    ("vae/diffusion_pytorch_model.safetensors", [damage_header] * 6 + BYTES, 30),
    ("text_encoder/model.safetensors", [damage_header] * 6 + BYTES, 30),
    ("tokenizer/vocab.json", JSON_WAYS, 65),
    ("tokenizer/merges.txt", [damage_lines] * 5 + BYTES, 40),
    ("scheduler/scheduler_config.json", JSON_WAYS, 20),
    ("sampling.json", JSON_WAYS, 20),
    ("", [damage_header] * 8 + BYTES, 85),  # the single file
    (None, [None], 10),  # files of the folder removed
]


def one_step(path):
    assert InstructPix2Pix.load(path).edit(PHOTO, "make the night", 7.5, 1.5, 1, resolution=64).size == (64, 64)


@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.slow)])  # a third of them in `make test`
@pytest.mark.parametrize(("file", "ways", "count"), TARGETS, ids=[target[0] or "" for target in TARGETS])
def test_damaged_checkpoints(file, ways, count, share, model_folder, single_file, tmp_path):
    count //= share
    whole = single_file if file == "" else model_folder
    path = tmp_path / "copy" / whole.name
    one_step(whole)

    succeeded = 0
    for seed in range(count):
        rng = random.Random(f"{file} {seed}")
        shutil.rmtree(path.parent, ignore_errors=True)  # not written into: tensors may still be mapped from it
        shutil.copytree(whole.parent, path.parent)
        if file is None:
            for gone in rng.sample(sorted(p for p in path.rglob("*") if p.is_file()), rng.choice([1, 2, 3])):
                gone.unlink()
        else:
            damaged = rng.choice(ways)((path / file).read_bytes(), rng)
            (path / file).unlink()
            (path / file).write_bytes(damaged)
        succeeded += serves(f"{file}, seed {seed}", lambda: one_step(path))
    assert succeeded < count  # some damage does damage


def seeds_of_images():
    """(ending, whole file) of images of every format, and of several kinds."""
    image, files = colourful(40, 30), []
    turned = Image.Exif()
    turned[274] = 6
    frames = {"save_all": True, "append_images": [colourful(40, 30, seed=1)]}
    for mode, ending, options in [
        ("RGB", "png", {"exif": turned}), ("RGBA", "png", {}), ("P", "png", {"transparency": 3}), ("I;16", "png", {}),
        ("RGB", "jpeg", {"exif": turned}), ("L", "jpeg", {"progressive": True}), ("CMYK", "jpeg", {}),
        ("RGBA", "webp", {"lossless": True}), ("RGB", "webp", frames), ("RGB", "gif", frames),
        ("RGB", "tiff", {}), ("RGB", "tiff", {"compression": "tiff_lzw"}), ("RGB", "tiff", {"compression": "jpeg"}),
        ("1", "tiff", {"compression": "group4"}), ("I;16", "tiff", {}), ("F", "tiff", {}),
        ("RGB", "bmp", {}), ("P", "bmp", {}), ("RGB", "ppm", {}),
        *([("RGB", "avif", {})] if features.check("avif") else []),
    ]:
        buffer = io.BytesIO()
        (image.convert("L") if mode in ("I;16", "F") else image).convert(mode).save(buffer, ending, **options)
        files.append((ending, buffer.getvalue()))
    return files


def test_damaged_images(tmp_path):
    files, succeeded = seeds_of_images(), 0

    def use(path):
        image = open_image(path)
        assert image.mode == "RGB"
        assert min(image.size) >= 8
        image.resize((8, 8)).tobytes()

    for seed in range(500):
        rng = random.Random(f"picture {seed}")
        ending, content = files[seed % len(files)]
        path = tmp_path / f"x.{rng.choice([ending, 'png'])}"
        path.write_bytes(rng.choice(BYTES)(content, rng))
        succeeded += serves(f"{ending}, seed {seed}", lambda path=path: use(path))
    assert 50 < succeeded < 450
