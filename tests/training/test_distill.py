"""Distillation: the student's target is where the teacher ends, and a student of one branch learns it."""

import json

import numpy as np
import pytest
import torch
from dataset_of_true_pairs import write_pairs
from PIL import Image
from random_model import tiny_model
from reference import relative_error, unet_reference

import sample
import train
from diffusion import dpm_solver_2m
from formats.checkpoint import load, save_folder
from formats.export import choose_weights
from formats.weights import extend_input
from ip2p import InstructPix2Pix
from training import distill
from training.batches import Draws
from unet import timestep_embedding

B = 6


def as_student(model, scale=0.0):
    """The model with guidance scales as inputs, whose weights are zero or random."""
    model.unet = extend_input(model.unet, scales_width=32)
    torch.nn.init.normal_(model.unet.scales.weight, std=scale, generator=torch.Generator().manual_seed(0))
    return InstructPix2Pix(model)


@pytest.fixture(scope="module")
def teacher():
    return InstructPix2Pix(tiny_model())


@torch.no_grad()
def test_scales_as_inputs(teacher):
    """With new weights of zero they change nothing; with others they enter as diffusers' `timestep_cond` does."""
    z, t = torch.randn(B, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((B,), 500.0)
    text, scales = teacher.encode_text(["a"] * B), torch.linspace(1, 7, 2 * B).view(B, 2)
    assert torch.equal(as_student(tiny_model()).unet(z, t, text, scales=scales), teacher.unet(z, t, text))
    unet = as_student(tiny_model(), 0.1).unet
    both = timestep_embedding(100 * scales.flatten(), 16).view(B, 32)
    theirs = unet_reference(unet)(z, t, text, timestep_cond=both).sample
    assert relative_error(unet(z, t, text, scales=scales), theirs) < 1e-5
    assert relative_error(theirs, teacher.unet(z, t, text)) > 1e-2


@torch.no_grad()
def test_a_perfect_student_has_no_error_and_ends_where_the_teacher_does(teacher):
    """A student that gives the teacher's own targets, an Euler step after the other."""
    draws = Draws(0, 0, B, slice(None))
    latent, image_latent, noise = (draws.normal(4, 8, 8) for _ in range(3))
    text, null_text = teacher.encode_text(["a", "b"] * (B // 2)), teacher.null_text
    seen = []

    def predict_eps(z, t, text, scales):
        seen.append((z, t, text, scales))
        return torch.zeros_like(z[:, :4])

    given = teacher, 2, draws, latent, image_latent, text, null_text, noise
    assert distill.loss(predict_eps, *given).min() > 0
    ((z, t, text, scales),) = seen
    assert t.tolist() == pytest.approx([999] * 3 + [499] * 3)
    sigmas = teacher.schedule.sigmas(2 * distill.TEACHER_STEPS, "trailing")
    ends, half = [], distill.TEACHER_STEPS
    for rows, segment in ((slice(3), sigmas[: half + 1]), (slice(3, 6), sigmas[half:])):
        denoise = teacher.denoiser(text[rows], image_latent[rows], *scales[rows].T[..., None, None, None])
        ends.append(dpm_solver_2m(denoise, latent[rows] + segment[0] * noise[rows], segment))
    first, last = sigmas[0].item(), sigmas[half].item()
    x = latent + torch.tensor([first] * 3 + [last] * 3)[:, None, None, None] * noise
    eps = torch.cat([(x[:3] - ends[0]) / (first - last), (x[3:] - ends[1]) / last])
    draws = Draws(0, 0, B, slice(None))
    [draws.normal(4, 8, 8) for _ in range(3)]
    given = teacher, 2, draws, *given[3:]
    assert distill.loss(lambda *_, **__: eps, *given).max() < 1e-6
    assert scales.min() >= 1
    assert scales.max(0).values.tolist() <= [7, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An editor, and a data set."""
    root = tmp_path_factory.mktemp("distill")
    save_folder(tiny_model(), root / "editor")
    write_pairs(root / "pairs", 12)
    return root


@pytest.fixture(scope="module")
def trained(folders):
    """The folder of a run of 16 steps."""
    flags = ["--preset=mini", "--mixed-precision=no", "--batch-size=4", "--max-steps=16", "--lr=0.01", "--seed=1"]
    own = [f"--data={folders / 'pairs'}", f"--distill={folders / 'editor'}", f"--out={folders / 'run'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "MEASURED", 8)  # which takes most of the time
        train.main([*flags, *own, "--sampling-steps=2", "--ema-decay=0.9"])
    return folders / "run"


def test_a_student_learns_and_says_how_it_samples(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation"] < 0.9 * lines[0]["validation"]
    sampling = load(trained / "model").sampling
    assert (sampling.steps, sampling.sampler, sampling.schedule) == (2, "euler", "trailing")


@torch.no_grad()
def test_one_branch_a_step_in_any_file(folders, trained, run_main, tmp_path):
    """Half precision in a folder and in a file give one edit; it takes two evaluations of one row; scales change it."""
    out = tmp_path / "student.safetensors"
    assert run_main(train, "export", "--run", trained, "--out", out).code == 0
    model, rows = InstructPix2Pix.load(trained / "model"), []
    model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    image = folders / "pairs" / "0000000" / "0_0.jpg"
    edited = np.asarray(model.edit(image, "make it night"))
    assert rows == [1, 1]
    assert np.array_equal(np.asarray(InstructPix2Pix.load(out).edit(image, "make it night")), edited)
    assert not np.array_equal(np.asarray(model.edit(image, "make it night", text_guidance=1.0)), edited)
    assert model.region(Image.open(image), "the hat").size == (64, 64)
    edit = "--image", image, "--instr=night", "--weights", out, "--out", tmp_path / "x.png"
    for flag, words in (("--negative=a", "none for a negative text"), ("--null-every=2", "nothing can be left out")):
        code, _, err = run_main(sample, *edit, flag)
        assert (code, words in err[-1]) == (2, True)


@pytest.mark.parametrize("trainable", ["full", "attention", "lora"])
def test_what_takes_the_scales_is_always_trained(trainable):
    unet = as_student(tiny_model()).unet
    choose_weights(unet, trainable, rank=2)
    assert unet.scales.weight.requires_grad


def test_what_is_refused(folders, trained, run_main):
    own = ["--data", folders / "pairs", "--distill", folders / "editor", "--out", folders / "other", "--preset=mini"]
    assert "a multiple of the student's 4 steps" in run_main(train, *own, "--batch-size=6").err[-1]
    assert "not allowed with" in run_main(train, *own, "--init=mini").err[-1]
    own[2:4] = "--init", trained / "model"
    assert "is a distilled editor, which --distill trains" in run_main(train, *own).err[-1]
