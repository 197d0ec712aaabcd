"""Pictures: every kind that people have, the resize rule, pixels to numbers and back, grids, and PNGs with settings."""

import errno
import io
import math
import struct
import zlib
from fractions import Fraction

from cli import UserError

import numpy as np
import pytest
import torch
from conftest import colourful, png_header
from PIL import Image, ImageCms, TiffImagePlugin

from images import edit_size, grid, open_image, read_settings, resize_and_crop, save_png, to_image, to_rgb, to_tensor

# ---- opening ----


def opened(image, path, **options):
    """Save an image and open it as the programs do: uint8 [H, W, 3]."""
    image.save(path, **options)
    return np.array(open_image(path))


def difference(a, b):
    """The largest difference between two images, in levels."""
    a, b = np.asarray(a, dtype=int), np.asarray(b, dtype=int)
    assert a.shape == b.shape
    return abs(a - b).max()


# What the EXIF standard says about the tag: where row 0 and column 0 of the stored pixels are in the upright image.
ORIENTATIONS = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = np.array(colourful(48, 32))
    rows, columns = ORIENTATIONS[orientation]
    stored = upright if rows in ("top", "bottom") else upright.transpose(1, 0, 2)
    stored = stored[::-1] if rows in ("bottom", "right") else stored
    stored = stored[:, ::-1] if columns in ("right", "bottom") else stored
    stored = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(opened(stored, tmp_path / "x.png", exif=exif), upright)
    assert np.array_equal(opened(stored, tmp_path / "x.webp", exif=exif, lossless=True), upright)
    assert difference(opened(stored, tmp_path / "x.jpg", exif=exif, quality=100, subsampling=0), upright) <= 4
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = orientation
    assert np.array_equal(opened(stored, tmp_path / "x.tif", tiffinfo=tags), upright)


def over_white(colours, alpha):
    """Exact alpha compositing: colours [H, W, 3] and alpha [H, W], both 0..255."""
    alpha = alpha[..., None] / 255
    return colours * alpha + 255 * (1 - alpha)


def test_alpha_is_laid_over_white(tmp_path):
    colours, alpha = np.array(colourful(40, 30)), np.array(colourful(40, 30, seed=1).convert("L"))
    alpha[:8], alpha[8:16] = 0, 255
    mask = Image.fromarray(alpha)
    rgba = Image.fromarray(colours)
    rgba.putalpha(mask)
    for ending, options in [("png", {}), ("webp", {"lossless": True, "exact": True}), ("tif", {})]:
        assert difference(opened(rgba, tmp_path / f"rgba.{ending}", **options), over_white(colours, alpha)) <= 1

    grey = Image.fromarray(colours).convert("L")
    la = Image.merge("LA", [grey, mask])
    greys = np.repeat(np.array(grey)[..., None], 3, axis=2)
    for ending in ("png", "tif"):
        assert difference(opened(la, tmp_path / f"la.{ending}"), over_white(greys, alpha)) <= 1

    palette = Image.fromarray(colours).quantize(32)
    pa = palette.convert("PA")
    pa.putalpha(mask)
    assert pa.mode == "PA"
    expected = over_white(np.array(palette.convert("RGB")), alpha)
    assert difference(to_rgb(pa), expected) <= 1
    assert difference(opened(pa, tmp_path / "pa.tif"), expected) <= 1


def test_a_transparent_colour_becomes_white(tmp_path):
    image = Image.new("RGB", (24, 16), (250, 20, 30))
    image.paste((10, 200, 30), (12, 0, 24, 8))
    expected = np.array(image)
    expected[(expected == (250, 20, 30)).all(2)] = 255
    palette = image.quantize(4)
    index = palette.getpixel((0, 0))
    assert np.array_equal(opened(image, tmp_path / "rgb.png", transparency=(250, 20, 30)), expected)
    assert np.array_equal(opened(palette, tmp_path / "p.png", transparency=index), expected)
    assert np.array_equal(opened(palette, tmp_path / "p.gif", transparency=index), expected)


def test_deep_images_keep_their_range(tmp_path):
    deep = np.linspace(0, 65535, 40 * 25).reshape(25, 40).round().astype(np.uint16)
    expected = np.repeat((deep / 65535 * 255).round()[..., None], 3, axis=2)
    for ending in ("png", "tif"):
        assert np.array_equal(opened(Image.fromarray(deep), tmp_path / f"deep.{ending}"), expected)
    big_endian = Image.frombytes("I;16B", (40, 25), deep.astype(">u2").tobytes())
    assert np.array_equal(opened(big_endian, tmp_path / "big.tif"), expected)
    assert np.array_equal(opened(Image.fromarray(deep.astype(np.int32)), tmp_path / "i.tif"), expected)
    dark = np.full((10, 10), 200, np.uint16)
    assert opened(Image.fromarray(dark), tmp_path / "dark.png").max() == 1  # and not 200 of 255
    assert np.array_equal(opened(Image.fromarray(deep), tmp_path / "x.png", transparency=0)[0, 0], [255] * 3)


def test_cmyk_jpeg(tmp_path):
    inks = np.array(colourful(32, 32).convert("CMYK")).astype(int)
    inks[..., 3] = np.array(colourful(32, 32, seed=3).convert("L")) // 2
    image = Image.fromarray(inks.astype(np.uint8), mode="CMYK")
    expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    assert difference(opened(image, tmp_path / "cmyk.jpg", quality=100, subsampling=0), expected) <= 6
    assert difference(opened(image, tmp_path / "cmyk.tif"), expected) <= 1


def icc_profile(name, red, green, blue, gamma):
    """A minimal RGB profile (ICC, version 2): the primaries as XYZ, and one power as the curve."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + bytes(80 - len(name) % 4)}
    tags |= {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    for letter, primary in (b"r", red), (b"g", green), (b"b", blue):
        tags |= {letter + b"XYZ": b"XYZ " + bytes(4) + fixed(*primary), letter + b"TRC": curve}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table, body = table + tag + struct.pack(">II", start + len(body), len(data)), body + data
    head = struct.pack(">I4sI4s4s4s12x4s28x", start + len(body), b"none", 2 << 24, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (head + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


P3 = icc_profile(b"P3", (0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407), 2.2)


def test_embedded_profiles_are_converted_to_srgb(tmp_path):
    image = colourful(40, 30)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(P3))
    shown = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"))  # by a viewer
    assert difference(shown, image) > 40
    rgba = image.copy()
    rgba.putalpha(255)
    for ending, options in [("png", {}), ("tif", {}), ("webp", {"lossless": True})]:
        assert difference(opened(image, tmp_path / f"x.{ending}", icc_profile=P3, **options), shown) == 0
        assert difference(opened(rgba, tmp_path / f"rgba.{ending}", icc_profile=P3, **options), shown) == 0
    assert difference(opened(image, tmp_path / "x.jpg", icc_profile=P3, quality=100, subsampling=0), shown) <= 16
    palette = image.quantize(64)
    seen = ImageCms.profileToProfile(palette.convert("RGB"), profile, ImageCms.createProfile("sRGB"))
    assert difference(opened(palette, tmp_path / "p.png", icc_profile=P3), seen) == 0


def test_profiles_that_do_not_fit_are_ignored_and_said(tmp_path, capsys):
    cmyk = colourful(40, 30).convert("CMYK")
    cmyk.save(tmp_path / "plain.tif")
    for image, path, profile in [(cmyk, "c.tif", P3), (colourful(40, 30), "x.png", b"abc" * 99)]:
        expected = open_image(tmp_path / "plain.tif") if image is cmyk else image
        assert difference(opened(image, tmp_path / path, icc_profile=profile), expected) == 0
        assert f"{path}: its colour profile is ignored: " in capsys.readouterr().err


def with_chunk(kind, content, damaged=False):
    """The bytes of a PNG with one more chunk before its pixels."""
    file = io.BytesIO()
    colourful(40, 30).save(file, "PNG")
    checksum = struct.pack(">I", zlib.crc32(kind + content) ^ damaged)
    added = struct.pack(">I", len(content)) + kind + content + checksum
    return file.getvalue()[:33] + added + file.getvalue()[33:]


@pytest.mark.parametrize(
    ("kind", "content", "damaged"),
    [
        (b"tEXt", b"workflow\0" + b"x" * 2**21, False),
        (b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2**28), False),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 2**21), False),
        (b"iCCP", b"printer\0\0" + zlib.compress(bytes(2**21)), False),
        (b"eXIf", b"no EXIF at all", False),
        (b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0", True),  # which would turn the image
        (b"tIME", b"", True),
    ],
)
def test_metadata_does_not_stop_an_image(kind, content, damaged, tmp_path):
    (tmp_path / "x.png").write_bytes(with_chunk(kind, content, damaged))
    assert difference(open_image(tmp_path / "x.png"), colourful(40, 30)) == 0


def test_a_missing_end_marker_does_not_stop_an_image(tmp_path):
    path = tmp_path / "x"
    for kind, options in [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True})]:
        whole = io.BytesIO()
        colourful(100, 90).save(whole, kind, **options)
        path.write_bytes(whole.getvalue())
        expected = open_image(path)
        path.write_bytes(whole.getvalue()[: -12 if kind == "PNG" else -2])
        assert difference(open_image(path), expected) == 0
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
        with pytest.raises(UserError, match="cut off|truncated"):
            open_image(path)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0, 1, False), (0, 255, False), (0, 65535, False), (-1, 1, True), (0, 3.7, True), (-20, 1e6, True)],
)
def test_floats_of_any_range_become_black_to_white(low, high, said, tmp_path, capsys):
    ramp = np.linspace(low, high, 40 * 30, dtype=np.float32).reshape(30, 40)
    read = opened(Image.fromarray(ramp), tmp_path / "x.tif")
    assert difference(read[..., 0], np.linspace(0, 255, 40 * 30).reshape(30, 40)) <= 1
    assert ("taken as black to white" in capsys.readouterr().err) == said


def test_an_image_that_is_transparent_everywhere_is_read_as_opaque(tmp_path, capsys):
    image = colourful(40, 30)
    image.putalpha(0)
    for ending in ("png", "tif"):
        assert difference(opened(image, tmp_path / f"x.{ending}"), image.convert("RGB")) == 0
        assert "the transparency is ignored" in capsys.readouterr().err


def test_what_cannot_be_opened_is_named(tmp_path):
    whole = io.BytesIO()
    colourful(100, 100).save(whole, "PNG")
    (tmp_path / "folder.png").mkdir()
    for name, content, words in [
        ("truncated.png", whole.getvalue()[: len(whole.getvalue()) // 2], "cannot be read"),
        ("text.png", b"hello, this is no image", "cannot be read"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n", "cannot be read"),
        ("bomb.png", png_header(30000, 30000), "exceeds limit of 178956970 pixels"),
        ("photo.heic", b"\0\0\0\x18ftypheic" + bytes(99), "it is HEIC or a video; export it as JPEG"),
        ("page.png", b"<!DOCTYPE html><html>", "it is damaged, or none of PNG, JPEG"),
        ("missing.png", None, "cannot be read as an image"),
        ("folder.png", None, "cannot be read as an image"),
    ]:
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            open_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_sizes_that_cannot_be_edited(tmp_path):
    for size in [(7, 40), (40, 7), (8, 65), (8, 64)]:
        colourful(*size).save(tmp_path / "x.png")
        if size == (8, 64):
            assert open_image(tmp_path / "x.png").size == size
        else:
            with pytest.raises(UserError, match=f"x.png is {size[0]}x{size[1]}"):
                open_image(tmp_path / "x.png")


# ---- the resize rule ----


def authors_rule(width, height, resolution):
    """edit_cli.py's lines in floating point; and whether each of its roundings was far from a whole number."""
    factor = resolution / max(width, height)
    before_ceil = min(width, height) * factor / 64
    factor = math.ceil(before_ceil) * 64 / min(width, height)
    sides = int((width * factor) // 64) * 64, int((height * factor) // 64) * 64
    # exact arithmetic says where a float that should be whole may have fallen on the wrong side
    exact = Fraction(resolution * min(width, height), max(width, height) * 64)
    k = math.ceil(exact)
    longer = Fraction(k * max(width, height), min(width, height))
    whole = [value for value in (exact, longer) if value.denominator == 1]
    return sides, not whole and min(width, height) * factor / 64 == k


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((98, 98), 128, (128, 128)),  # these three lose 64 pixels to rounding in the authors' code
        ((49, 49), 512, (512, 512)),
        ((98, 500), 256, (64, 320)),
        ((768, 1024), 512, (384, 512)),
        ((1920, 1080), 512, (512, 320)),
        ((8, 64), 64, (64, 512)),
    ],
)
def test_sizes_of_edits(size, resolution, expected):
    assert edit_size(*size, resolution) == expected


def test_the_authors_rule_is_kept_wherever_it_is_sane():
    rng = np.random.default_rng(0)
    sizes = [(w, h) for w in range(8, 200, 7) for h in range(8, 200, 5)]
    sizes += [tuple(size) for size in rng.integers(8, 6000, (4000, 2)).tolist()]
    compared = 0
    for width, height in sizes:
        for resolution in (64, 128, 256, 300, 512, 768, 1000):
            theirs, sane = authors_rule(width, height, resolution)
            if sane:
                assert edit_size(width, height, resolution) == theirs, (width, height, resolution)
                compared += 1
    assert compared > 20_000


def test_resize_and_crop_crops_evenly():
    image = Image.new("RGB", (300, 100), "white")
    image.paste("red", (100, 0, 200, 100))
    fitted = np.array(resize_and_crop(image, 64))
    assert fitted.shape == (64, 192, 3)
    red = (fitted[32, :, 1] < 128).nonzero()[0]
    assert abs(red.min() - 64) <= 1
    assert abs(red.max() - 127) <= 1


# ---- pixels and numbers ----


def test_to_tensor_is_the_authors_formula():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    x = to_tensor(Image.fromarray(np.stack([levels, levels.T, levels], axis=2)))
    assert x.shape == (3, 16, 16)
    assert x.dtype == torch.float32
    assert x.min() == -1
    assert x.max() == 1
    theirs = 2 * torch.tensor(levels).float() / 255 - 1
    assert torch.equal(x[0], theirs)
    assert torch.equal(x[1], theirs.T)


def test_to_image_is_the_authors_formula():
    values = torch.cat([torch.linspace(-1.5, 1.5, 100_001), torch.tensor([-1.0, 1.0, 0.0, 1e30, -1e30])])
    x = values.expand(3, 1, -1)
    theirs = (255.0 * torch.clamp((x + 1.0) / 2.0, min=0.0, max=1.0)).type(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(to_image(x)), theirs)


# ---- grids ----

COLOURS = ["#e02020", "#20b020", "#2040e0", "#e0a020", "#a020c0", "#20c0c0", "#805030", "#ff80c0", "#708090", "#90ee90"]


def place(sheet, colour):
    """Where the pixels of one colour are, as (left, top, right, bottom), and that they fill this box."""
    rgb = np.array(Image.new("RGB", (1, 1), colour))[0, 0]
    rows, columns = (np.array(sheet) == rgb).all(axis=2).nonzero()
    box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (box[2] - box[0]) * (box[3] - box[1]), f"{colour} is covered in part"
    return tuple(int(edge) for edge in box)


def ink(sheet, left, top, right, bottom):
    """Whether there is writing in a box."""
    box = np.array(sheet.convert("L"))[max(0, int(top)) : int(bottom), max(0, int(left)) : int(right)]
    return bool((box < 100).any())


@pytest.mark.parametrize("size", [(64, 64), (512, 320)])
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 4)])
@pytest.mark.parametrize("labelled", [False, True])
def test_images_lie_row_by_row(size, count, columns, labelled):
    images = [Image.new("RGB", size, colour) for colour in COLOURS[:count]]
    labels = [f"seed {number}" for number in range(count)] if labelled else None
    sheet = grid(images, columns, labels)
    boxes = [place(sheet, colour) for colour in COLOURS[:count]]
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert (right - left, bottom - top) == size
        row, column = divmod(number, columns)
        assert left == boxes[column][0]
        assert top == boxes[row * columns][1]
        assert column == 0 or left > boxes[number - 1][2]
        assert row == 0 or top > boxes[number - columns][3]
        end = sheet.height if number + columns >= count else boxes[number + columns][1]
        assert ink(sheet, left, bottom, right, end) == labelled
    assert min(min(box[:2]) for box in boxes) > 0
    assert sheet.width > boxes[columns - 1][2]
    assert sheet.height > boxes[-1][3]


@pytest.mark.parametrize("words", ["more words than fit into one line of it", "x" * 200, "two\nlines \x00"])
def test_writing_covers_no_image(words):
    images = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    titles = {"column_titles": ["s_T = 3", "s_T = 5.25"], "row_titles": ["s_I = 1", "s_I = 1.5"]}
    labelled = grid(images[:4], 2, labels=[words] * 4, title=words)
    titled = grid(images[:4], 2, title=words, beside=("input", images[4]), **titles)
    for sheet, count in ((labelled, 4), (titled, 5)):
        boxes = [place(sheet, colour) for colour in COLOURS[:count]]
        assert all((right - left, bottom - top) == (64, 64) for left, top, right, bottom in boxes)
    assert boxes[4][2] < boxes[0][0]
    assert all(ink(titled, left, top - 16, right, top) for left, top, right, _ in (boxes[0], boxes[1], boxes[4]))


# ---- PNGs that carry settings ----


@pytest.mark.parametrize(
    "settings",
    [
        {"instr": "밤으로 바꿔 줘 🌙", "seed": 0, "cfg_text": 7.5, "sweep": False, "weights": None},
        {"instr": 'quotes " and \\ and \n new lines \t \x00 \x1f \u2028'},
        {"image": b"caf\xe9.png".decode("utf-8", "surrogateescape")},  # a file name that is not UTF-8
    ],
    ids=range(3),
)
def test_settings_come_back(settings, tmp_path):
    image = colourful(20, 10)
    save_png(image, tmp_path / "x.png", settings)
    assert read_settings(tmp_path / "x.png") == settings
    assert np.array_equal(Image.open(tmp_path / "x.png"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_files_without_settings_are_refused(tmp_path):
    path = tmp_path / "x.png"
    save_png(colourful(20, 10), path, {"a": 1})
    whole = path.read_bytes()
    for content in (whole[:100], b"hello", whole.replace(b"ip2p", b"text"), whole.replace(b'{"a": 1}', b'{"a": 1]')):
        path.write_bytes(content)
        with pytest.raises(UserError, match="x.png"):
            read_settings(path)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_image_is_written_whole_or_not_at_all(failure, tmp_path, monkeypatch):
    save_png(colourful(20, 10), tmp_path / "x.png", {"first": True})
    before = (tmp_path / "x.png").read_bytes()

    def half(image, path, **options):
        path.write_bytes(before[:50])
        raise failure

    monkeypatch.setattr(Image.Image, "save", half)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_png(colourful(30, 30), tmp_path / "x.png")
    if expected is UserError:
        assert "x.png" in str(caught.value)
        assert "No space left" in str(caught.value)
    assert (tmp_path / "x.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
