"""Image files, tensors and grids. Inside a program an image is an RGB PIL image, or a tensor [3, H, W] in [-1, 1]."""

import io
import json
import logging
import sys
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

from cli import UserError, atomic_write, reported_as

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

# What people have; not every format that Pillow knows, since some (EPS) start other programs. JPEG covers MPO, which
# many telephones write.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # it would tell a user what the exception says as well
SRGB = ImageCms.createProfile("sRGB")
PNG = b"\x89PNG\r\n\x1a\n"
# the chunks beside the pixels that matter: transparency, profile, and what may hold the orientation
NEEDED = b"tRNS", b"iCCP", b"eXIf", b"iTXtXML:com.adobe.xmp", b"tEXtRaw profile", b"zTXtRaw profile"
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20  # of a profile, too: a printer's has some megabytes
SMALLEST_SIDE = 8
LARGEST_ASPECT = 8


def open_image(path):
    """An image file as an upright RGB image: EXIF orientation applied, transparency over white, first frame.

    path: of the file, or its bytes as a BytesIO. Grey, palette, 16-bit and CMYK images are converted. Raises
    UserError for what cannot be read or edited.
    """
    with reported_as(f"{path} cannot be read as an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubts about damaged metadata; a damaged image raises
        data = path.read() if isinstance(path, io.BytesIO) else Path(path).read_bytes()
        data = without_metadata(data) if data.startswith(PNG) else data
        try:
            file = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            other = f"damaged, or none of {', '.join(FORMATS)}"
            other = "HEIC or a video; export it as JPEG" if data[4:8] == b"ftyp" else other
            raise ValueError(f"it is {other}") from None
        if file.format == "JPEG" and b"\xff\xd9" not in data[-64:]:
            file = with_end_marker(data)
        image = to_rgb(file, path)
    check_size(image, path)
    return image


def without_metadata(data):
    """The bytes of a PNG without what neither changes its pixels nor turns it, which may be damaged or very large."""
    parts, place = [PNG], len(PNG)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4])
        chunk = data[place : place + 12 + length]  # length, kind, content, checksum
        damaged = zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:])
        if chunk[4:5].isupper() or (chunk[4:].startswith(NEEDED) and not damaged):  # upper case: its pixels
            parts.append(chunk)
        place += len(chunk)
    return b"".join(parts)


def with_end_marker(data):
    """Open a JPEG that lacks its end marker. Raises ValueError where more is missing than that.

    A decoder fills in what is missing. So the image is whole if the last bytes there are belong to its last rows.
    """
    image, shorter = (Image.open(io.BytesIO(part + b"\xff\xd9")) for part in (data, data[:-2]))
    changed = np.nonzero(np.asarray(image) != np.asarray(shorter))[0]
    if len(changed) and changed.min() < image.height - 16:
        raise ValueError("it is cut off")
    return image


def check_size(image, name="the image"):
    """Raise UserError for an image too small or too long to edit."""
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise UserError(f"{name} is {width}x{height}; at least {SMALLEST_SIDE} pixels a side are needed to edit it")
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise UserError(f"{name} is {width}x{height}, longer than {LARGEST_ASPECT} times its width; crop it first")


def to_rgb(image, name="the image"):
    """Any PIL image -> upright sRGB, transparency over white, the full range of deep images brought to 8 bits."""
    with suppress(Exception):  # an orientation that cannot be read
        image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":  # deeper than 8 bits; Pillow's own conversion would clip
        image = to_8_bits(image, name)
    colours = convert_profile(image, profile, name) if profile else image.convert("RGB")
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[1] == 0:
            print(f"{name}: all of it is transparent; the transparency is ignored", file=sys.stderr)
            return colours
        colours = Image.composite(colours, Image.new("RGB", image.size, "white"), alpha)
    return colours


def to_8_bits(image, name):
    """A grey image of deeper levels -> 8 bits. What is white is guessed for the formats that do not say it."""
    values = np.array(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or Inf")
    low, high = float(values.min()), float(values.max())
    black, white = 0.0, next((full for full in (1.0, 255.0, 65535.0) if high <= full), high)
    if image.mode != "F":
        white = max(white, 65535.0 if image.mode.startswith("I;16") else 255.0)
    elif low < 0 or high < white / 16 or high > 65535:
        black, white = low, max(high, low + 1e-6)
        print(f"{name}: its values, {low:g} to {high:g}, are taken as black to white", file=sys.stderr)
    values[values == image.info.get("transparency")] = white  # a 16-bit PNG may name one level
    values -= black  # in place, since such images are large
    values *= 255 / (white - black)
    return Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8))


def convert_profile(image, profile, name):
    """An image with an embedded ICC profile -> sRGB: the colours that a viewer shows. A damaged profile is ignored."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        if (mode == "CMYK") != (image.mode == "CMYK"):
            raise ValueError("it is for other colours")
        return ImageCms.profileToProfile(image.convert(mode), profile, SRGB, outputMode="RGB")
    except Exception as error:  # lcms has its own kinds
        print(f"{name}: its colour profile is ignored: {error or type(error).__name__}", file=sys.stderr)
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


def fit_mask(mask, image, resolution):
    """The mask of an image, white where it may change -> "L", as large as it is edited.

    Raises UserError where the mask has another size than the image.
    """
    if mask.size != image.size:
        sizes = "{}x{}, the image {}x{}".format(*mask.size, *image.size)
        raise UserError(f"the mask is {sizes}; it should be as large as the image")
    return resize_and_crop(mask.convert("L"), resolution)


def put_back(edited, image, mask=None):
    """`image` at its own size, with `edited` where `resize_and_crop` took it from, through the mask."""
    scale = min(image.width / edited.width, image.height / edited.height)
    size = round(edited.width * scale), round(edited.height * scale)
    place = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    whole = image.copy()
    whole.paste(edited.resize(size, Image.Resampling.LANCZOS), place)
    return Image.composite(whole, image, mask.convert("L")) if mask else whole


def outside_dimmed(image, mask):
    """An image, darker where its mask "L" is black: it shows what may change."""
    return Image.composite(image, image.point(lambda level: level // 3), mask)


def thumbnail(image, side=256):
    """An image in the middle of a white square."""
    return ImageOps.pad(enlarge(image, side), (side, side), Image.Resampling.LANCZOS, "white")


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
