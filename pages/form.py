"""A page is one file: a template, the style and script that all pages share, and its data. It asks no network."""

import base64
import inspect
import json
from pathlib import Path

from images import to_jpeg

HERE = Path(__file__).resolve().parent


def fill(name, data):
    """The HTML of the template of this name with its data, anything that JSON can hold."""
    html = (HERE / name).read_text(encoding="utf-8")
    for mark, shared in (("/* STYLE */", "style.css"), ("/* SHARED */", "shared.js")):
        html = html.replace(mark, (HERE / shared).read_text(encoding="utf-8"))
    # "<" could end the script that holds this
    return html.replace('"DATA"', json.dumps(data).replace("<", "\\u003c"))


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
