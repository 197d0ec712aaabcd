"""The exercises: an empty function fails and says why, the original passes, two typical mistakes of each are caught."""

from functools import partial

from cli import UserError

import numpy as np
import pytest
from conftest import ROOT

import diffusion
from exercises import __main__ as program
from exercises.place import definition, emptied, in_place, original
from exercises.stations import STATIONS
from images import open_image

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ("align.refine",)
MISTAKES = {  # of each function two, as (what is right, what is written instead)
    "diffusion.NoiseSchedule.add_noise": [
        ("abar.sqrt() * z + (1 - abar).sqrt() * noise", "(1 - abar).sqrt() * z + abar.sqrt() * noise"),
        ("(1 - abar).sqrt() * noise", "(1 - abar) * noise"),
    ],
    "attention.reference": [(" * scale", ""), ("dim=-1", "dim=-2")],
    "unet.timestep_embedding": [("angles.cos(), angles.sin()", "angles.sin(), angles.cos()"), ("-math", "math")],
    "diffusion.euler_ancestral": [("(sigma_down - sigma)", "(next_sigma - sigma)"), ("* sigma_up", "* next_sigma")],
    "diffusion.euler": [("(x - denoised) / sigma", "(x - denoised)"), ("(next_sigma - sigma)", "(sigma - next_sigma)")],
    "stable_diffusion.StableDiffusion.denoiser": [
        ("eps_null, eps_text = ", "eps_text, eps_null = "), ("eps_null + guidance", "eps_text + guidance"),
    ],
    "ip2p.guided_eps": [
        ("(eps_image - eps_null) + text_guidance", "(eps_image - eps_null) + image_guidance"),
        ("(eps_full - eps_image)", "(eps_full - eps_null)"),
    ],
    "ip2p.drop_conditions": [("u < 0.10", "u < 0.05"), ("(u < 0.15)", "(u <= 0.15)")],
    "ip2p.loss": [("[z_t, image_latent]", "[image_latent, z_t]"), ("dim=(1, 2, 3)", "")],
    "formats.weights.extend_input": [
        ("(0, 0, 0, 0, 0, extended.config.in_channels - first.shape[1])",
         "(0, 0, 0, 0, extended.config.in_channels - first.shape[1], 0)"),
        ("nn.functional.pad(first, (0, 0, 0, 0, 0, extended.config.in_channels - first.shape[1]))",
         "torch.cat([first, first], dim=1)"),
    ],
    "stable_diffusion.LatentDiffusion.encode_image": [
        (".mode().float()", ".mode().float() * self.vae.config.scaling"),
        (".mode()", ".sample(torch.randn(1))"),
    ],
    "align.refine": [("mapper[i, j] = shared[j]", "mapper[j, i] = shared[j]"), ("shared[len(ids[1]) :] = 1", "")],
    "p2p.PairControl.of_first": [
        ("null_after = torch.where(active, null_before, null_after)\n", "pass\n"),
        ("torch.where(active, before, after)", "torch.where(active, after, before)"),
    ],
    "clip_image.CLIP.edit_similarities": [
        ("image1 - image0, text1 - text0", "image1 - image0, text0 - text1"), ("(image1, text1)", "(image1, text0)"),
    ],
    "dataset.Filter.refused_by": [("min(text", "max(text"), ("not x >= getattr", "not x > getattr")],
    "training.runs.update_ema": [("now, 1 - decay)", "now, decay)"), ("ema.values()", "weights.values()")],
    "formats.lora.LowRank.forward": [("weight + ", ""), ("self.b @ self.a", "self.a.T @ self.b.T")],
}  # fmt: skip


def passes(station, text, folder):
    """Is a file with this text judged as right?"""
    path = folder / "mine.py"
    path.write_text(text)
    with in_place(original(station), path):
        return program.judge(station)


@pytest.mark.parametrize(
    "station", [pytest.param(s, id=s.function, marks=[pytest.mark.slow] * (s.function not in FAST)) for s in STATIONS]
)
def test_a_station_knows_right_from_wrong(station, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    source = definition(original(station))[0]
    assert passes(station, source, tmp_path)
    capsys.readouterr()
    assert not passes(station, emptied(original(station), "mine.py"), tmp_path)
    assert "NotImplementedError: mine.py has no body yet: write it there" in capsys.readouterr().out
    for right, wrong in MISTAKES[station.function]:
        assert source.count(right) == 1
        assert not passes(station, source.replace(right, wrong), tmp_path), f"{wrong} for {right} is not noticed"


def test_the_table():
    assert [station.function for station in STATIONS] == list(MISTAKES)
    for station in STATIONS:
        sizes = [len(hint) for hint in station.hints]
        assert sizes == sorted(sizes), station.title


@pytest.mark.parametrize(
    ("text", "said"),
    [("def", "cannot be run: invalid syntax"), ("import none_such", "No module named"), ("", "lacks the function")],
)
def test_a_file_that_cannot_be_run(text, said, tmp_path):
    with pytest.raises(UserError, match=said):
        passes(STATIONS[0], text, tmp_path)
    assert original(STATIONS[0]).__code__.co_filename == diffusion.__file__


@pytest.fixture
def exercises(tmp_path, monkeypatch, run_main):
    """The program, with a student's folders of their own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(program, "MINE", tmp_path / "mine")
    monkeypatch.setattr(program, "RUNS", tmp_path / "runs")
    return partial(run_main, program)


def test_from_the_list_to_a_hint(exercises, tmp_path):
    number = 1 + list(MISTAKES).index(FAST[0])
    assert len(exercises().out) == len(STATIONS) + 1
    failed = exercises(number)
    path = tmp_path / "mine" / f"{number:02}_refine.py"
    assert (failed.code, path.exists()) == (1, True)
    assert "--hint 1 helps" in failed.out[-1]
    path.write_text(path.read_text().replace("raise ", "return "))
    before = path.read_bytes()
    assert exercises(number).code == 1
    assert path.read_bytes() == before  # what a student wrote stays
    assert exercises(number, "--hint", 2).out == list(STATIONS[number - 1].hints[:2])
    assert [line for line in exercises().out if " * " in line] == [line for line in exercises().out if "refine" in line]
    assert exercises(len(STATIONS) + 1).code == 2


@pytest.mark.slow
@pytest.mark.parametrize("function", ["ip2p.guided_eps", "align.refine", "formats.lora.LowRank.forward"])
def test_what_passes_is_shown(exercises, function, tmp_path):
    number = 1 + list(MISTAKES).index(function)
    path = tmp_path / program.file_of(number)
    path.parent.mkdir()
    path.write_text(definition(original(STATIONS[number - 1]))[0])
    shown = exercises(number)
    assert shown.code == 0
    assert np.asarray(open_image(shown.out[-1])).std() > 20
