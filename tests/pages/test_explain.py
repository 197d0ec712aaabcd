"""The explain pages: the maps are attention's own, no pixel changes, and what the pages say is true."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from conftest import colourful
from PIL import Image
from random_model import random_model, tiny_model

import p2p
import sample
from attention import Layer, fused
from editing.record import Recorder, spread
from formats.checkpoint import save_folder
from images import open_image, read_settings, resize_and_crop, to_tensor
from ip2p import InstructPix2Pix
from pages.explain import size_rule, write_edit_page

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "make the night brighter"


def recorded(model, image, steps=4, **options):
    """(the recorder of an edit, the edited image)."""
    recorder = Recorder(model, [TEXT], [0], [0], steps)
    more = {"attend": recorder.watch(fused), "trace": recorder.trace, "callback": recorder.next_step, "seed": 1}
    return recorder, model.edit(image, TEXT, steps=steps, **more, **options)


def page_data(path):
    """What a page holds."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="?http|@import|fetch\(', text)
    return json.loads(re.search(r"^const data = (.*);$", text, re.MULTILINE)[1])


def unpacked(text, *shape):
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape) / 255


def check_maps(recorder, q, k, layer):
    """The recorder's maps of a layer beside the map in memory."""
    attention_map = (q[:1] @ k[:1].transpose(2, 3) / q.shape[3] ** 0.5).softmax(3).mean(1)  # [1, N, M]
    if layer.cross:
        ours, theirs = recorder.cross_maps(fused, q, k, q.dtype, layer).flatten(2), attention_map @ recorder.columns
        theirs = theirs.transpose(1, 2)
        assert torch.allclose(theirs.sum(1), torch.ones(len(theirs), q.shape[2]))  # every token is in a column
    else:
        (height, width), (rows, columns) = layer.size, recorder.grid
        y, x = np.mgrid[:height, :width]
        cells = torch.from_numpy((y * rows // height * columns + x * columns // width).flatten())
        places = [[int((i + 0.5) * n / m) for i in range(m)] for n, m in ((height, rows), (width, columns))]
        places = [i * width + j for i in places[0] for j in places[1]]
        ours = recorder.self_maps(fused, q, k, q.dtype, layer)
        theirs = torch.zeros_like(ours).index_add_(2, cells, attention_map[:, places])
    assert (ours - theirs).abs().max() <= 1e-6


def test_maps_equal_those_in_memory_in_every_layer():
    model, seen = InstructPix2Pix(random_model()), []
    recorder = Recorder(model, [TEXT], [0], [0], 1)

    def checked(q, k, v, layer):
        recorder.grid = recorder.grid or (8, 5)
        if layer.cross or min(layer.size) >= 8:
            check_maps(recorder, q, k, layer)
            seen.append(layer)
        return fused(q, k, v)

    model.edit(colourful(80, 64), TEXT, steps=1, attend=checked)
    seen = {(layer.cross, layer.size[0]) for layer in seen}
    assert seen == {(cross, side) for cross in (True, False) for side in (32, 16, 8)}


@pytest.mark.slow
def test_maps_equal_those_in_memory_in_a_full_size_layer():
    model = InstructPix2Pix(tiny_model())
    recorder, size = Recorder(model, [TEXT], [0], [0], 1), (64, 64)
    recorder.columns = torch.nn.functional.pad(recorder.columns, (0, 0, 0, 77 - recorder.columns.shape[1]))
    recorder.columns[0, 24:, -1] = 1
    recorder.grid = 16, 16
    generator = torch.Generator().manual_seed(0)
    q, k, own = (torch.randn(3, 8, n, 40, generator=generator) for n in (4096, 77, 4096))
    check_maps(recorder, 3 * q, k, Layer(0, "down", True, size))
    check_maps(recorder, 3 * q, own, Layer(0, "down", False, size))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun"])
def test_what_is_recorded(sampler):
    """The steps of a run: Eq. 3 holds for the clean guesses, and the last of them is the result."""
    model, image = InstructPix2Pix(tiny_model()), colourful(64, 64)
    recorder, edited = recorded(model, image, steps=10, sampler=sampler, resolution=64)
    assert edited == model.edit(image, TEXT, steps=10, seed=1, sampler=sampler, resolution=64)  # to the bit
    assert recorder.sigmas == model.schedule.sigmas(10)[:-1].tolist()
    assert recorder.words == (["make", "the", "night", "brighter", "(start)", "(end and padding)"],)
    assert (len(recorder.cross), len(recorder.own), len(recorder.guesses)) == (8, 8, 9)
    panels = recorder.guidance()
    guided = panels["null"] + 1.5 * panels["to_image"] + 4 * panels["to_text"]
    assert torch.allclose(guided, panels["result"], atol=1e-4)
    assert torch.allclose(panels["result"][-1], recorder.last[0], atol=1e-5)


def test_spread():
    assert [spread(1, 8), spread(3, 8), spread(100, 4)] == [[0], [0, 1, 2], [0, 33, 66, 99]]


def test_size_rule():
    """What it says is what was done."""
    said = size_rule((100, 60), resize_and_crop(colourful(100, 60), 128).size)
    assert said.startswith("The image of 100x60 pixels was resized to 213x128, and 21 columns and 0 rows were cropped")
    assert said.endswith("192x128, both multiples of 64.")


def test_sample_writes_the_same_image_with_a_page(run_main, tmp_path, model_folder):
    colourful(90, 60).save(tmp_path / "x.png")
    page, given = tmp_path / "page.html", ["--image", tmp_path / "x.png", "--instr", TEXT, "--weights", model_folder]
    assert run_main(sample, *given, "--out", tmp_path / "a.png").code == 0
    result = run_main(sample, *given, "--out", tmp_path / "b.png", "--explain", page)
    assert result.out == [str(tmp_path / "b.png"), str(page)]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    data = page_data(page)
    assert (data["title"], data["settings"]["seed"], len(data["sigma"])) == (TEXT, 0, 2)
    assert "explain" not in read_settings(tmp_path / "b.png")
    assert data["code"]["guidance"].startswith("ip2p.py, line ")


@pytest.mark.slow
def test_a_page_of_100_steps_at_512_pixels_has_less_than_4_mb(tmp_path):
    """With latents and images of noise, which no format makes small."""
    recorder = Recorder(InstructPix2Pix(tiny_model()), ["make the house a tall castle made of ice"], [0], [0], 100)
    generator = torch.Generator().manual_seed(0)
    photo = np.random.default_rng(0).integers(0, 60, (512, 512, 3), np.uint8)
    photo = Image.fromarray(photo // 2 + np.array(colourful(512, 512)) // 4 * 3)
    x = to_tensor(photo.resize((256, 256)))[None]
    recorder.grid, recorder.last = (16, 16), torch.randn(1, 4, 64, 64, generator=generator)
    recorder.sigmas = recorder.model.schedule.sigmas(100)[:-1].tolist()
    recorder.latents = list(torch.randn(100, 5, 4, 64, 64, generator=generator))
    recorder.guesses = [(torch.randn(1, 4, 32, 32, generator=generator), x)] * 23
    recorder.cross = list(torch.rand(8, 1, 16, 10, 16, 16, generator=generator))
    recorder.own = list(torch.rand(8, 1, 256, 256, generator=generator))
    recorder.maps = {Layer(i, "down", True, (64, 64)): None for i in range(16)}
    settings = {"cfg_text": 4.0, "cfg_image": 1.5, "sampler": "euler_ancestral", "seed": 1}
    write_edit_page(recorder, tmp_path / "page.html", TEXT, photo, photo, photo, settings)
    assert (tmp_path / "page.html").stat().st_size < 4_000_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num=2"], "shows one edit"),
        (["--sweep"], "shows one edit"),
        (["--then=more"], "shows one edit"),
        (["--low-memory"], "cannot be used together"),
        (["--null-every=2"], "cannot be used together"),
        (["--explain=page.png"], "ends in .html"),
    ],
)
def test_mistakes(run_main, tmp_path, model_folder, arguments, words):
    colourful(64, 64).save(tmp_path / "x.png")
    given = ["--image", tmp_path / "x.png", "--instr", TEXT, "--weights", model_folder, "--out", tmp_path / "a.png"]
    result = run_main(sample, *given, "--explain", tmp_path / "x.html", *arguments)
    assert (result.code, len(result.err), result.out) == (2, 1, [])
    assert words in result.err[0]


def shown(browser, name):
    return browser.find_element("id", name).text


def test_the_page_of_an_edit_in_a_browser(browser, choose, tmp_path):
    """Every control; the numbers are Python's."""
    model, image = InstructPix2Pix(random_model()), colourful(64, 64)
    recorder, edited = recorded(model, image, steps=10, resolution=64)
    settings = {"cfg_text": 4.0, "cfg_image": 1.5, "sampler": "euler_ancestral", "seed": 1}
    write_edit_page(recorder, tmp_path / "page.html", TEXT, image, image, edited, settings)
    browser.get((tmp_path / "page.html").as_uri())
    words, places = (browser.find_element("xpath", f"//article[h2='{title}']") for title in ("Words", "Places"))
    maps = torch.stack([step[0] for step in recorder.cross])  # [steps, layers, W, rows, columns]

    def share(values):
        return f"gets {100 * values.mean():.1f} % of the attention, at most {100 * values.max():.1f} % of a place"

    word = words.find_elements("tag name", "button")[1]
    word.click()
    assert word.get_attribute("aria-pressed") == "true"
    assert share(maps.mean((0, 1))[1]) in words.text
    choose("step", 9)
    choose("average", False)
    assert share(maps[7].mean(0)[1]) in words.text
    browser.execute_script("const [x] = arguments; x.value = 2; x.oninput()", words.find_element("tag name", "select"))
    assert share(maps[7][1, 1]) in words.text

    sigma = recorder.sigmas[9]
    assert shown(browser, "now") == f"step 10 of 10, σ {sigma:.3f}, t {model.schedule.t(sigma):.1f}"
    _, full, only_image, null, _ = recorder.latents[9]
    rms = [f"{(a - b).square().mean().sqrt():.4f}" for a, b in ((only_image, null), (full, only_image))]
    assert re.findall(r"RMS of ε ([\d.]+)", browser.find_element("tag name", "main").text) == rms

    mark = places.find_element("css selector", "[tabindex]")
    mark.send_keys("\ue013")  # arrow up
    row, column = (side // 2 for side in recorder.grid)
    place = (row - 1) * recorder.grid[1] + column
    most = 100 * recorder.own[7][0, place].max()
    assert f"row {row}, column {column + 1} looks most at one that gets {most:.1f} %" in places.text
    browser.execute_script("arguments[0].click()", browser.find_element("id", "play"))
    assert shown(browser, "play") == "Pause"
    browser.execute_script("document.querySelector('.compare + input').value = 0")
    sizes = browser.execute_script("return [...document.images].map(x => x.naturalWidth)")
    side = recorder.last.shape[3]
    assert sizes == [512] * 2 + [side, 64] + [side] * 6 + [512] * 2


def test_the_page_of_a_pair_in_a_browser(browser, run_main, tmp_path):
    save_folder(tiny_model(in_channels=4), tmp_path / "model")
    page, given = tmp_path / "page.html", ["--source", "a red house", "--target", "a blue house", "--num", 1]
    given += ["--p", 0, 0.5, "--weights", tmp_path / "model", "--out", tmp_path / "x.png", "--steps", 5]
    given += ["--explain", page]
    assert run_main(p2p, *given).out == [str(tmp_path / "x.png"), str(page)]
    data = page_data(page)
    assert data["borrows"] == [True, True, False, False, False]  # p > i / (n - 1)
    assert data["matches"] == [["a", ["a"]], ["blue", ["red"]], ["house", ["house"]]]
    rows, columns = data["grid"]
    for subject in data["subjects"]:
        shape = 5, len(data["layers"]), len(subject["words"]), rows * columns
        maps = unpacked(subject["maps"], *shape) * np.array(subject["scales"])[:, None]
        assert np.allclose(maps.sum(2), 1, atol=0.02)
    browser.get(page.as_uri())
    assert "blue" in browser.find_element("xpath", "//article[h2='Which words stand for which']").text
    bar = browser.find_element("id", "borrows")
    assert bar.get_attribute("title") == "maps are borrowed at 2 of 5 steps"
    assert bar.size["width"] == pytest.approx(0.4 * browser.find_element("id", "step").size["width"], abs=1)
    assert open_image(tmp_path / "x.png").width > 100
