"""Making the miniature's models from nothing: the parts one by one, then all stages at toy size."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from random_model import randomise
from reference import relative_error

from clip_text import CLIPTokenizer
from formats.checkpoint import load, load_clip, load_vae
from mini import pretrain
from mini.drawing import SIZE
from mini.judge import Judge
from mini.pretrain import contrast, normalise_latents, train_tokenizer
from mini.wording import all_words
from stable_diffusion import StableDiffusion
from training.runs import read_metrics
from vae import VAE, VAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture
def program(run_main):
    return partial(run_main, pretrain)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_latents_are_normalised_and_images_stay():
    """Every channel apart; the mode's image is the same as before, and so is a sample's with the same noise."""
    vae = randomise(VAE(VAEConfig(channels=(8, 16), resblocks=1, groups=4, scaling=1.0)), seed=1).eval()
    vae.quant_conv.weight[:4] *= torch.tensor([0.1, 1.0, 5.0, 2.0])[:, None, None, None]
    vae.quant_conv.bias[:4] += torch.tensor([3.0, -1.0, 0.0, 10.0])
    x = normal(6, 3, 32, 32).tanh()
    noise = normal(6, 4, 16, 16, seed=1)
    before = vae.encode(x)
    mode, sample = vae.decode(before.mode()), vae.decode(before.sample(noise))
    assert relative_error(sample, mode) > 0.05

    normalise_latents(vae, before.mode())
    after = vae.encode(x)
    latents = after.mode()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    assert relative_error(vae.decode(latents), mode) <= 1e-4
    assert relative_error(vae.decode(after.sample(noise)), sample) <= 1e-4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(all_words())


def test_the_tokenizer_equals_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = CLIPTokenizer.load(tmp_path, 40)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = [*all_words()[::5], "", "unknown words, naïve 밤 😀 123!", "word " * 50]
    ids = theirs(texts, padding="max_length", truncation=True, max_length=40, return_tensors="pt").input_ids
    assert tokenizer(texts).tolist() == again(texts).tolist() == ids.tolist()


def test_contrast_is_least_for_logits_that_are_right():
    """With all texts different that is 0; texts that are equal share the image between them, log 2 for a pair."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 3]])
    assert contrast(50 * torch.eye(3), ids).item() == pytest.approx(0, abs=1e-6)
    assert contrast(torch.zeros(3, 3), ids).item() == pytest.approx(np.log(3))
    assert contrast(-5 * torch.eye(3), ids) > 5

    pair = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]])
    same = (pair[:, None] == pair).all(2).float()
    least = contrast(50 * same, pair).item()
    assert least == pytest.approx(0.5 * np.log(2), abs=1e-6)
    assert contrast(50 * torch.eye(4), pair) > least + 1
    assert all(contrast(50 * same + normal(4, 4, seed=seed), pair) > least for seed in range(20))


TOY = ["--scenes=64", "--test-scenes=8", "--max-steps=2", "--total-batch-size=4", "--device=cpu"]


def results_of(folder, stage):
    values = json.loads((folder / stage / "results.json").read_text(encoding="utf-8"))
    assert values.pop("minutes of training") > 0
    return values


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What all stages leave, after two steps each. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("pretrain") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "MINI_SAMPLING", replace(pretrain.MINI_SAMPLING, steps=3))
        pretrain.main(["all", "--out", str(folder), *TOY])
        yield folder


def test_all_stages_work(trained):
    for stage in pretrain.STAGES:
        results = results_of(trained, stage)
        assert results
        assert all(np.isfinite(value) for value in results.values())
        log = (trained / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(log[-1])["step"] == 2
    for path in ("vae/samples.png", "sd/samples.png", "judge.safetensors", "scenes_64.npy"):
        assert (trained / path).stat().st_size > 0


def test_a_second_call_finds_all_done(trained, program):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    code, out, _ = program("all", "--out", trained, *TOY)
    assert code == 0
    assert out == [f"{stage}: done already; remove {trained / stage} to train it anew" for stage in pretrain.STAGES]
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@torch.no_grad()
def test_what_it_leaves_can_be_opened(trained):
    """By our own loaders, as float32 throughout, and by diffusers, which draws the same image."""
    clip, tokenizer = load_clip(trained / "clip_model")
    model = load(trained / "sd_model")
    vae, alone = load_vae(trained / "sd_model"), load_vae(trained / "vae_model")
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), alone.parameters(), strict=True))
    assert model.tokenizer.vocabulary == tokenizer.vocabulary
    assert model.sampling == pretrain.MINI_SAMPLING
    ids = tokenizer(["a sketch of a large blue tree in the snow"])
    assert torch.equal(model.text_encoder(ids), clip.text(ids))
    assert Judge.load(trained / "judge.safetensors").read(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 8)

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(trained / "sd_model")
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "np"}
    image = pipeline("a red ball", generator=torch.Generator().manual_seed(0), **settings).images[0]
    ours = StableDiffusion(model).sample(["a red ball"], [0], steps=2)[0]
    ours = ((ours + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
    assert ours.shape == image.shape == (SIZE, SIZE, 3)
    assert np.abs(ours - image).max() < 0.02  # its own noise levels are rounded


@pytest.mark.parametrize("stage", ["judge", "vae", "clip", "sd"])
def test_a_stage_that_was_stopped_in_its_last_moments(trained, program, tmp_path, stage):
    """After training, but before its results were noted: it ends as it would have, from the state that it kept."""
    folder = tmp_path / "mini"
    shutil.copytree(trained, folder)
    (folder / stage / "results.json").unlink()
    code, out, errors = program(stage, "--out", folder, *TOY)
    assert (code, errors) == (0, [])
    assert out[0] == f"{folder / stage}: from step 2"
    assert out[1].startswith(f"{stage}: ")
    assert results_of(folder, stage) == pytest.approx(results_of(trained, stage))


@pytest.mark.slow
def test_two_processes_equal_one(trained, tmp_path):
    """Under torchrun: the examples of one process with twice the batch, and its weights but for rounding."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "mini.pretrain", "vae"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path), *TOY], cwd=ROOT, env=environment, check=True, timeout=200)
    ours, theirs = (load_vae(folder / "vae_model").state_dict() for folder in (tmp_path, trained))
    values = [torch.cat([value.flatten() for value in one.values()]) for one in (ours, theirs)]
    assert relative_error(*values) <= 0.01
    lines = [read_metrics(folder / "vae" / "metrics.jsonl")[1:] for folder in (tmp_path, trained)]  # behind step 0
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["judge", "--max-steps=0"], "--max-steps: should be at least 1, not 0"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["judge", "--device=cuda:99"], "cuda:99"),
        (["judge", "--out=FILE"], "FILE"),
        (["sd"], "vae_model"),
    ],
)
def test_a_users_mistakes(program, tmp_path, monkeypatch, arguments, words):
    """One line, exit code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("hello")
    code, out, errors = program(*TOY, *arguments)
    assert (code, out) == (2, [])
    assert len(errors) == 1
    assert words in errors[0]
