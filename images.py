"""Image files, tensors and grids. Inside a program an image is an RGB PIL image, or a tensor [3, H, W] in [-1, 1]."""

import io
import json
import logging
import warnings

from cli import UserError, atomic_write, reported_as

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

# What people have; not every format that Pillow knows, since some (EPS) start other programs. JPEG covers MPO, which
# many telephones write.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # it would tell a user what the exception says as well
SMALLEST_SIDE = 8
LARGEST_ASPECT = 8


def open_image(path):
    """An image file as an upright RGB image: EXIF orientation applied, transparency over white, first frame.

    Grey, palette, 16-bit and CMYK images are converted. Raises UserError for what cannot be read or edited.
    """
    with reported_as(f"{path} cannot be read as an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubts about damaged metadata; a damaged image raises
        with Image.open(path, formats=FORMATS) as file:
            image = to_rgb(file)
    check_size(image, path)
    return image


def check_size(image, name="the image"):
    """Raise UserError for an image too small or too long to edit."""
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise UserError(f"{name} is {width}x{height}; at least {SMALLEST_SIDE} pixels a side are needed to edit it")
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise UserError(f"{name} is {width}x{height}, longer than {LARGEST_ASPECT} times its width; crop it first")


def to_rgb(image):
    """Any PIL image -> upright RGB, transparency over white, the full range of deep images brought to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # deeper than 8 bits; Pillow's own conversion would clip
        values = np.array(image, dtype=np.float32)
        if image.mode == "F" and values.min() >= 0 and values.max() <= 1:
            full = 1.0
        else:
            full = 255.0 if values.max() <= 255 and not image.mode.startswith("I;16") else 65535.0
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or Inf")
        values[values == image.info.get("transparency")] = full  # a 16-bit PNG may name one level
        values *= 255 / full  # in place, since such images are large
        image = Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def edit_size(width, height, resolution):
    """The size (width, height) at which an image is edited: multiples of 64, the longer side near `resolution`.

    The released edit_cli.py's rule in exact integers. The shorter side is what it would be with the longer side at
    `resolution`, rounded up to k * 64; the longer side follows in proportion, rounded down.
    """
    short, long = min(width, height), max(width, height)
    k = -(-short * resolution // (64 * long))
    return width * k // short * 64, height * k // short * 64


def resize_and_crop(image, resolution):
    """Resize by `edit_size`, cropping what is left over evenly from both sides."""
    return ImageOps.fit(image, edit_size(*image.size, resolution), method=Image.Resampling.LANCZOS)


def to_tensor(image):
    """RGB image -> [3, H, W], float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return (2 * (pixels.float() / 255) - 1).permute(2, 0, 1)


def to_image(x):
    """[3, H, W], about in [-1, 1] -> RGB image. Clamped, then truncated, not rounded, as the released code does."""
    pixels = 255 * ((x.detach().float() + 1) / 2).clamp(0, 1)
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def save_png(image, path, settings=None):
    """Write a PNG, whole or not at all; `settings` (anything JSON can hold) goes along as its text field "ip2p"."""
    info = PngInfo()
    if settings is not None:
        text = json.dumps(settings, ensure_ascii=False)
        # a file name that is no UTF-8 holds lone surrogates, which only JSON's own escapes can carry
        info.add_itxt("ip2p", text.encode("utf-8", "backslashreplace").decode())
    with atomic_write(path) as beside:
        image.save(beside, format="PNG", pnginfo=info)


def to_jpeg(image, **settings):
    """The bytes of a JPEG file. Pillow, left to write the file itself, takes no notice of a disk that is full."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def read_settings(path):
    """The settings that `save_png` left in a file. Raises UserError where there are none."""
    with reported_as(f"{path} cannot be read as a PNG"), Image.open(path, formats=("PNG",)) as file:
        file.load()  # text may also stand behind the pixels
        settings = json.loads(file.text.get("ip2p", "null"))
    if not isinstance(settings, dict):
        raise UserError(f"{path} carries no settings; only a PNG written by sample.py can be repeated")
    return settings


def enlarge(image, least=128):
    """A small image, each pixel drawn as a square, so that its shorter side has about `least` pixels; else itself."""
    factor = max(1, least // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(images, columns, labels=None, column_titles=(), row_titles=(), title="", beside=None):
    """Lay images of one size out in rows, with text where given: a label under each, titles above and at the left.

    images: RGB images, row by row. beside: (title, image), an image of the same size at the far left, halfway down.
    Returns one RGB image.
    """
    width, height = images[0].size
    rows = -(-len(images) // columns)
    text_height = max(11, min(28, width // 16))
    font = ImageFont.load_default(text_height)
    gap, line = max(2, width // 64), round(1.6 * text_height)

    label_lines = [wrap(text, font, width) for text in labels or [""] * len(images)]
    row_height = height + line * max(map(len, label_lines)) + gap
    margin = gap + max((round(font.getlength(text)) + 3 * gap for text in row_titles), default=0)
    left = margin + (width + gap if beside else 0)
    sheet_width = left + columns * (width + gap)
    title_lines = wrap(title, font, sheet_width - 2 * gap)
    top = gap + line * (len(title_lines) + bool(column_titles))

    sheet = Image.new("RGB", (sheet_width, top + rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)

    def write(text, x, y, anchor="mm"):
        draw.text((x, y), text, fill="black", font=font, anchor=anchor)

    for number, text in enumerate(title_lines):
        write(text, gap, gap + line * (number + 0.5), "lm")
    for column, text in enumerate(column_titles):
        write(text, left + column * (width + gap) + width / 2, top - line / 2)
    for row, text in enumerate(row_titles):
        write(text, left - 2 * gap, top + row * row_height + height / 2, "rm")
    if beside:
        y = top + (rows * row_height - height) // 2
        sheet.paste(beside[1], (gap, y))
        write(beside[0], gap + width / 2, y - line / 2)
    for number, (image, lines) in enumerate(zip(images, label_lines, strict=True)):
        x, y = left + number % columns * (width + gap), top + number // columns * row_height
        sheet.paste(image, (x, y))
        for index, text in enumerate(lines):
            write(text, x + width / 2, y + height + line * (index + 0.5))
    return sheet


def wrap(text, font, width):
    """Break a text into lines of at most `width` pixels, between words; a word longer than that stands alone."""
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
