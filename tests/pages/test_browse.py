"""datagen.py browse: the page of a data set, read by a real browser where there is one."""

import base64
import io
import json
import re

from cli import UserError

import numpy as np
import pytest
from PIL import Image

import datagen
from dataset import Pair, write_edit, write_seeds

SCORES = {  # (edit, seed): image-text twice, image-image, direction
    (0, 1): (0.30, 0.40, 0.90, 0.50),
    (0, 2): (0.25, 0.20, 0.80, 0.60),
    (7, 3): (0.35, 0.30, 0.70, 0.30),
    (12, 4): (0.40, 0.45, 0.95, 0.70),
}
# candidates that are no pairs; of edit 9 there is no other
REFUSED = {(7, 30): (0.1, 0.1, 0.5, 0.1), (12, 40): (0.1, 0.3, 0.9, 0.9), (9, 50): (0.1, 0.1, 0.4, 0.0)}
TEXTS = {0: "make it night", 7: 'as a </script><b>"mosaic"', 9: "nothing came of it", 12: "füge einen Baum hinzu"}


def noted(seed, scores):
    names = ("clip_sim_0", "clip_sim_1", "clip_sim_image", "clip_sim_dir")
    return {"seed": seed, "p2p_threshold": seed / 100, "cfg_scale": 8.0 - seed, **dict(zip(names, scores, strict=True))}


def image(seed, size=(64, 48)):
    return Image.fromarray(np.full((*size[::-1], 3), 20 * seed, np.uint8))


@pytest.fixture
def root(tmp_path):
    """Four edits, four pairs, seven candidates."""
    root = tmp_path / "data"
    root.mkdir()
    for edit, text in TEXTS.items():
        prompt = {"caption": f"caption {edit}", "edit": text, "output": f"output {edit}", "url": None}
        every = [noted(seed, scores) for (number, seed), scores in {**SCORES, **REFUSED}.items() if number == edit]
        kept = [line for line in every if (edit, line["seed"]) in SCORES]
        write_edit(root, edit, prompt, [Pair(image(x["seed"]), image(x["seed"] + 1), x) for x in kept], every)
    write_seeds(root)
    thresholds = {"min_image_text": 0.2, "min_image_image": 0.6, "min_direction": 0.2}
    (root / "settings.json").write_text(json.dumps({"keep": 2, **thresholds}))
    return root


def page_data(path):
    """What the page holds."""
    return json.loads(re.search(r"^const data = (.*);$", path.read_text(encoding="utf-8"), re.MULTILINE)[1])


def pixels(url):
    data = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
    return Image.open(io.BytesIO(data))


def test_the_page_holds_it_all(root, capsys):
    datagen.main(["browse", str(root)])
    assert capsys.readouterr().out == f"{root / 'index.html'}: 4 of 4 pairs\n"
    data = page_data(root / "index.html")
    assert [(int(edit["folder"]), edit["edit"]) for edit in data["edits"]] == list(TEXTS.items())
    assert (data["total"], data["keep"], data["every"]) == (4, 2, True)
    assert data["thresholds"] == {"image_text": 0.2, "image_image": 0.6, "direction": 0.2}
    pairs = []
    for edit in data["edits"]:
        number, candidates = int(edit["folder"]), [list(x.values()) for x in edit["candidates"]]
        every = [(seed, scores) for (of, seed), scores in {**SCORES, **REFUSED}.items() if of == number]
        assert candidates == [[seed / 100, 8.0 - seed, *scores] for seed, scores in every]
        for place, seed, images in edit["pairs"]:
            assert candidates[place][0] == int(seed) / 100
            pairs.append((number, int(seed)))
            for side, url in enumerate(images):
                assert np.array_equal(pixels(url), image(int(seed) + side))
    assert pairs == list(SCORES)
    text = (root / "index.html").read_text(encoding="utf-8")
    assert "</script><b>" not in text
    assert not re.search(r'(src|href)="?http|url\(|@import|fetch\(', text)


def test_a_data_set_of_the_authors_tools(tmp_path, capsys):
    """Older keys, other folders, and nothing noted of the pairs."""
    folder = tmp_path / "shard-00" / "0454444"
    folder.mkdir(parents=True)
    (folder / "prompt.json").write_text('{"input": "a", "edit": "as a cat", "output": "b", "url": "http://x"}')
    for side in (0, 1):
        image(side + 1).save(folder / f"4294967295_{side}.jpg", quality=100)
    (tmp_path / "seeds.json").write_text('[["shard-00/0454444", ["4294967295"]]]')
    datagen.main(["browse", str(tmp_path)])
    assert "1 of 1 pairs" in capsys.readouterr().out
    data = page_data(tmp_path / "index.html")
    (edit,) = data["edits"]
    assert (edit["caption"], edit["edit"], edit["output"], edit["folder"]) == ("a", "as a cat", "b", "0454444")
    assert [list(candidate.values()) for candidate in edit["candidates"]] == [[None] * 6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: [path.unlink() for path in root.rglob("*.json*")], "seeds.json cannot be read"),
        (lambda root: (root / "settings.json").write_text("{"), "settings.json cannot be read"),
        (lambda root: (root / "0000000/metadata.jsonl").write_text("{}"), "metadata.jsonl cannot be read"),
    ],
)
def test_mistakes(root, change, words):
    change(root)
    with pytest.raises(UserError, match=words):
        datagen.main(["browse", str(root)])
    assert not (root / "index.html").exists()


def test_in_a_browser(browser, choose, root):
    """Pairs, order, search and thresholds, as a person would use them."""
    datagen.main(["browse", str(root)])
    browser.get((root / "index.html").as_uri())

    def listed():
        """[(instruction, is it dimmed?)]"""
        script = "return [...document.querySelectorAll('article')].map(x => [x.children[1].textContent, x.className])"
        return [(text, name == "out") for text, name in browser.execute_script(script)]

    def summary():
        return browser.execute_script("return document.getElementById('summary').textContent")

    def coloured():
        """How many pixels of the plot have the colour of a candidate that passes."""
        script = "const plot = document.getElementById('plot'), [w, h] = [plot.width, plot.height]; "
        pixels = browser.execute_script(script + "return [...plot.getContext('2d').getImageData(0, 0, w, h).data]")
        return sum(pixels[i + 3] == 255 for i in range(0, len(pixels), 4))

    assert browser.find_element("id", "axes").text == "p 0.01 to 0.50, guidance -42.0 to 7.0 up"
    night, mosaic, tree = (TEXTS[edit] for edit in (0, 7, 12))
    assert listed() == [(night, False), (night, False), (mosaic, False), (tree, False)]
    passing = "4 of 7 candidates of these edits would pass (57 %), and 4 of them be kept, at most 2 of an edit."
    assert summary().startswith(passing)
    numbers = browser.execute_script("return document.querySelector('article dl').textContent")
    assert numbers == "number0000000p0.01guidance7.00before–text0.30after–text0.40image–image0.90direction0.50"
    sizes = browser.execute_script("return [...document.images].map(x => [x.naturalWidth, x.naturalHeight])")
    assert sizes == [[64, 48]] * 8

    choose("sort", "clip_sim_image")
    assert [text for text, _ in listed()] == [mosaic, night, night, tree]
    choose("down", True)
    assert [text for text, _ in listed()] == [tree, night, night, mosaic]
    choose("find", "MAKE night")
    assert [text for text, _ in listed()] == [night, night]
    choose("find", "")

    choose("direction", 0.55)
    assert listed() == [(tree, False), (night, True), (night, False), (mosaic, True)]
    choose("hide", True)
    assert listed() == [(tree, False), (night, False)]
    assert "Of the 4 pairs on this page 2 would stay" in summary()
    choose("direction", 0.0)
    choose("image_image", 0.0)
    choose("image_text", 0.1)  # now a candidate without images is among the best two of its edit
    assert summary().startswith("7 of 7 candidates of these edits would pass (100 %), and 7 of them be kept")
    before = coloured()
    choose("direction", 1.0)
    assert 0 < coloured() < before
    browser.find_element("id", "back").click()
    assert summary().startswith(passing)
    browser.execute_script("shown = 2; draw()")
    assert len(listed()) == 2
    browser.find_element("id", "more").click()
    assert len(listed()) == 4
