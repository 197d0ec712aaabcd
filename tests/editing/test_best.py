"""sample.py --best: what is sampled, what is chosen, and that the choice can be repeated."""

import pytest
import torch
from conftest import colourful

import sample
from editing.best import agreement, candidates, directional
from images import open_image, read_settings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_given_scales_come_first_and_seeds_change_last():
    found = candidates(6, 7.5, 1.5, 3)
    assert found[0] == (7.5, 1.5, 3)
    assert [seed for *_, seed in found] == [3, 3, 3, 3, 4, 4]
    assert found[4] == (7.5, 1.5, 4)
    assert len({(s_t, s_i) for s_t, s_i, _ in found}) == 4
    assert candidates(2, 90, 1, 0)[1][0] == 100  # the largest that sample.py takes


def test_an_outlier_agrees_least():
    images = torch.tensor([0.1, 0.0, -0.1, 1.0, -0.8])[:, None, None, None].expand(5, 3, 8, 8)
    found = agreement(images)
    assert (found.argmax(), found.argmin()) == (1, 3)
    assert found[1].item() == pytest.approx(-(0.1 + 0.1 + 1.0 + 0.8) / 5)


def test_the_most_directional_above_the_floor_is_best():
    image, direction = torch.tensor([0.9, 0.8, 0.3, 0.75]), torch.tensor([0.1, 0.3, 0.9, 0.2])
    assert directional(image, direction, 0.7).argmax() == 1
    assert directional(image, direction, 0.2).argmax() == 2
    assert directional(image, direction, 0.95).argmax() == 0  # none reaches it: the nearest


@pytest.fixture
def edit(model_folder, tmp_path, run_main):
    colourful(64, 64).save(tmp_path / "x.png")
    own = "--weights", model_folder, "--image", tmp_path / "x.png", "--instr", "make it night", "--clip", "mini"
    return lambda *more: run_main(sample, *own, "--device", "cpu", "--out", tmp_path / "out.png", *more)


@pytest.mark.parametrize("more", [(), ("--caption-before", "a red house", "--caption-after", "a blue house")])
def test_the_choice_is_one_edit_that_can_be_repeated(edit, tmp_path, run_main, more):
    code, _, err = edit("--best", 5, *more)
    assert code == 0
    settings = read_settings(tmp_path / "out.png")
    assert any(f"of 5 the best is cfg_text {settings['cfg_text']:g}, cfg_image" in line for line in err)
    assert run_main(sample, "--again", tmp_path / "out.png", "--out", tmp_path / "again.png").code == 0
    assert open_image(tmp_path / "again.png").tobytes() == open_image(tmp_path / "out.png").tobytes()
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--best", 4, "--num", 2), "--best cannot be used together with --sweep or --num"),
        (("--best", 4, "--caption-before", "a"), "--caption-before and --caption-after belong together, and to --best"),
        (("--caption-before", "a", "--caption-after", "b"), "belong together, and to --best"),
        (("--best", 1), "--best: should be from 2 to 1000, not 1"),
    ],
)
def test_mistakes_end_in_one_line(edit, more, message):
    code, _, err = edit(*more)
    assert code == 2
    assert message in err[-1]
