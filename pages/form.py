"""A page is one file: the head that all pages share, its data, and a body of its own. It asks no network."""

import base64
import inspect
import json
from pathlib import Path

from cli import atomic_write

from images import to_jpeg

HERE = Path(__file__).resolve().parent


def fill(name, data):
    """The page whose body is the file of this name, with its data, anything that JSON can hold."""
    head, style, script, body = (
        (HERE / file).read_text(encoding="utf-8") for file in ("head.html", "style.css", "shared.js", name)
    )
    head = head.replace("/* STYLE */", style).replace("/* SHARED */", script)
    return head.replace('"DATA"', json.dumps(data).replace("<", "\\u003c")) + body  # "<" could end the script


def write(name, data, out):
    """`fill` to a file, whole or not at all."""
    with atomic_write(out) as beside:
        beside.write_text(fill(name, data), encoding="utf-8")


def data_url(data, kind="image/jpeg"):
    """Bytes as a URL that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def jpeg_url(image, quality=90):
    """An image as a URL that holds it."""
    return data_url(to_jpeg(image, quality=quality, subsampling=0))


def where(function):
    """Where a function stands: "ip2p.py, line 25: guided_eps"."""
    function = inspect.unwrap(getattr(function, "func", function))  # of a partial
    path = Path(function.__code__.co_filename).relative_to(HERE.parent)
    return f"{path.as_posix()}, line {function.__code__.co_firstlineno}: {function.__qualname__}"
