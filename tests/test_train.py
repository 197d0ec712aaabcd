"""train.py: what the editor starts from, what it is shown, and a tiny run from a data set to a model folder."""

import json
import re
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import lines_of, tiny_model
from PIL import Image
from reference import relative_error
from safetensors.torch import load_file

import train
from checkpoint import load, save_folder
from dataset import EditDataset, Pair, write_edit, write_seeds
from diffusion import NoiseSchedule
from errors import UserError, run_program
from images import to_tensor
from ip2p import InstructPix2Pix, loss
from settings import Sampling
from train import LatentPairs
from training import fast_training, fit, random_at
from weights import extend_input
from world import caption, random_edit, render

pytestmark = pytest.mark.usefixtures("one_thread")


def write_pairs(root, count, size=(64, 64), different=None):
    """A data set of true pairs, one an edit; of `different` edits that come again and again, if given."""
    root.mkdir()
    for number in range(count):
        edit = random_edit(np.random.default_rng(number % (different or count)))
        prompt = {"caption": caption(edit.before), "edit": edit.instruction, "output": caption(edit.after), "url": None}
        before, after = (render(scene).resize(size) for scene in (edit.before, edit.after))
        write_edit(root, number, prompt, [Pair(before, after, {"seed": number})])
    write_seeds(root)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty pairs: 18 for training, one for validation. Shared: copy before changing it."""
    return write_pairs(tmp_path_factory.mktemp("train") / "pairs", 20)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("train") / "sd"
    save_folder(tiny_model(in_channels=4), folder)
    return folder


@pytest.fixture(scope="module")
def latents(data):
    """(model, its LatentPairs of the training split)."""
    model = tiny_model()
    return model, LatentPairs(model, EditDataset(data), "cpu")


def command(data, init, out, **changed):
    """The command line, with some values changed."""
    values = {"data": data, "init": init, "out": out, "steps": 4, "batch": 3, "lr": 1e-3} | changed
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


@pytest.fixture
def program(capsys, monkeypatch):
    """train.py with the arguments given: (exit code, lines of stdout, lines of stderr without progress bars)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_program(train.main)
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        errors = [line for line in lines_of(captured.err) if not re.match(r"\w+: +\d+(%|it)", line)]
        return code, captured.out.splitlines(), errors

    return run


@pytest.fixture
def at_start(monkeypatch):
    """Run train.main only as far as the training loop; returns (unet, loss_of, plan)."""

    def start(*arguments):
        caught = []

        def fit(unet, loss_of, plan, *rest, **settings):
            caught.extend([unet, loss_of, plan])
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "fit", fit)
        with pytest.raises(KeyboardInterrupt):
            train.main(list(map(str, arguments)))
        return caught

    return start


def weights_of(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


# ---- where it starts ----


@torch.no_grad()
def test_at_first_the_picture_does_not_matter(data, init, tmp_path, at_start):
    """The new weights are zero, all others are Stable Diffusion's: the same prediction, whatever the picture."""
    unet, _, _ = at_start(*command(data, init, tmp_path / "out"))
    sd = load(init).unet
    assert unet.config.in_channels == 8
    assert torch.equal(unet.conv_in.weight[:, :4], sd.conv_in.weight)
    assert not unet.conv_in.weight[:, 4:].any()
    assert all(weight.requires_grad for weight in unet.parameters())
    generator = torch.Generator().manual_seed(0)
    z, context = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 24, 16, generator=generator)
    t = torch.tensor([0, 500, 999])
    expected = sd(z, t, context)
    for scale in (0, 1, 30):
        picture = scale * torch.randn(3, 4, 16, 16, generator=generator)
        assert relative_error(unet(torch.cat([z, picture], dim=1), t, context), expected) <= 1e-5
    assert relative_error(unet(torch.cat([z + picture, picture], dim=1), t, context), expected) > 0.1


def test_an_editor_may_be_trained_further(data, model_folder, tmp_path, at_start):
    unet, _, _ = at_start(*command(data, model_folder, tmp_path / "out"))
    assert torch.equal(unet.conv_in.weight, load(model_folder).unet.conv_in.weight)


def test_the_plan_is_the_command_lines(data, init, tmp_path, at_start):
    _, _, plan = at_start(*command(data, init, tmp_path / "out", seed=5, ema=0.9))
    assert (plan.steps, plan.batch, plan.lr, plan.seed, plan.ema) == (4, 3, 1e-3, 5, 0.9)
    _, _, plan = at_start(f"--data={data}", f"--init={init}", f"--out={tmp_path / 'out'}")
    assert (plan.steps, plan.batch, plan.lr, plan.seed, plan.ema) == (10_000, 32, 1e-4, 0, 0.9999)


@torch.no_grad()
@pytest.mark.parametrize("flag", [[], ["--balanced"]])
def test_the_loss_is_eq_1(data, init, tmp_path, at_start, flag):
    """Drawn anew in the same order: pairs, their noise, times, noise, and which conditions are dropped."""
    unet, loss_of, _ = at_start(*command(data, init, tmp_path / "out"), *flag)
    model, schedule = load(init), NoiseSchedule()
    pairs = LatentPairs(model, EditDataset(data), "cpu")
    generator = random_at(0, 7)
    latent, image_latent, text = pairs.batch(40, generator)
    t = torch.randint(1000, (40,), generator=generator)
    noise, u = torch.randn(latent.shape, generator=generator), torch.rand(40, generator=generator)
    each = loss(unet, schedule, latent, image_latent, text, model.text_encoder(model.tokenizer([""])), t, noise, u)
    assert u.min() < 0.10  # else the texts would not be dropped
    if flag:
        snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
        each = each * ((snr.clamp(max=5) + 1) / snr).clamp(max=20)
        assert snr.max() > 50
        assert snr.min() < 1 / 19  # else the weight would not be limited
    ours = loss_of(7, random_at(0, 7), 40)
    assert ours.item() == pytest.approx(each.mean().item(), rel=1e-4)
    assert loss_of(8, random_at(0, 8), 40).item() != pytest.approx(ours.item(), rel=1e-4)


# ---- latents ----


@torch.no_grad()
def encoded(model, x):
    """Pictures as the data set's latents should be: in the number format of training."""
    with fast_training("cpu"):
        return model.vae.encode(x)


def test_latents_are_those_of_the_pictures(data, latents):
    """Unscaled: the mode for the picture before; mean and spread for the one after. As it is, and mirrored."""
    model, pairs = latents
    assert pairs.before.shape == pairs.after.shape == pairs.spread.shape == (18, 2, 4, 16, 16)
    before, after, _ = zip(*EditDataset(data), strict=True)
    for mirrored in (0, 1):
        x_before, x_after = (torch.stack(x).flip(3) if mirrored else torch.stack(x) for x in (before, after))
        target = encoded(model, x_after)
        expected = encoded(model, x_before).mode(), target.mode(), target.logvar.float().exp().sqrt()
        for ours, theirs in zip((pairs.before, pairs.after, pairs.spread), expected, strict=True):
            assert relative_error(ours[:, mirrored], theirs) <= 0.01
    for x in (pairs.before, pairs.after):
        assert relative_error(x[:, 0], x[:, 1]) > 0.05  # mirrored pictures, not twice the same ...
        assert relative_error(x[:, 0].flip(3), x[:, 1]) > 0.02  # ... nor mirrored latents
    assert relative_error(pairs.before, pairs.after) > 0.05


def test_texts_are_those_of_the_instructions(data, latents):
    model, pairs = latents
    instructions = [instruction for _, _, instruction in EditDataset(data)]
    assert len(set(instructions)) > 10
    with torch.no_grad():
        expected = model.text_encoder(model.tokenizer(instructions))
        null_text = model.text_encoder(model.tokenizer([""]))
    assert relative_error(pairs.contexts[pairs.text], expected) <= 1e-5
    assert relative_error(pairs.null_text, null_text) <= 1e-5
    assert pairs.null_text.shape == (1, 24, 16)
    assert len(pairs.contexts) == 1 + len(set(instructions))


def test_a_batch_is_of_whole_pairs(latents):
    """The condition: the mode, unscaled. The target: near its mean, scaled. The text of the same pair."""
    _, pairs = latents
    latent, image_latent, text = pairs.batch(64, random_at(0, 0))
    assert latent.shape == image_latent.shape == (64, 4, 16, 16)
    assert latent.dtype == image_latent.dtype == torch.float32
    known = pairs.before.float().flatten(0, 1)
    nearest = torch.cdist(image_latent.flatten(1), known.flatten(1)).argmin(1)
    assert torch.equal(image_latent, known[nearest])
    number, mirrored = nearest // 2, nearest % 2
    z = (latent / pairs.scaling - pairs.after[number, mirrored].float()) / pairs.spread[number, mirrored].float()
    assert z.mean().abs() < 0.02
    assert z.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(text, pairs.contexts[pairs.text[number]])
    assert pairs.scaling == 0.5


def test_batches_are_drawn_by_chance(latents):
    """Every pair as often, half of them mirrored, both pictures alike; equal generators draw the same."""
    _, pairs = latents
    first, again, other = (pairs.batch(5, random_at(0, step)) for step in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    _, image_latent, _ = pairs.batch(2000, random_at(0, 2))
    known = pairs.before.float().flatten(0, 1).flatten(1)
    counts = torch.bincount(torch.cdist(image_latent.flatten(1), known).argmin(1), minlength=36).view(18, 2)
    assert counts.sum(1).min() > 70
    assert counts.sum(1).max() < 160
    assert counts.sum(0)[1].item() == pytest.approx(1000, abs=100)


def test_a_target_is_a_sample(latents):
    """Of one pair: spread as the autoencoder says, about its mean."""
    model, _ = latents
    x = to_tensor(render(random_edit(np.random.default_rng(0)).before))
    one = LatentPairs(model, [(x, x, "make it night")], "cpu")
    latent, image_latent, _ = one.batch(3000, random_at(0, 0))
    mirrored = (image_latent - one.before[0, 1]).abs().flatten(1).max(1).values < 1e-3
    for side in (0, 1):
        found = latent[mirrored == bool(side)]
        mean, spread = (part[0, side].float() * 0.5 for part in (one.after, one.spread))
        assert (found.mean(0) - mean).abs().max() < 0.15 * spread.max()
        assert relative_error(found.std(0), spread) < 0.05


# ---- the program ----


@pytest.fixture(scope="module")
def trained(data, init, tmp_path_factory):
    """What a tiny run leaves. Shared: copy before changing it."""
    out = tmp_path_factory.mktemp("train") / "run"
    arguments = command(data, init, out, **{"sampling-steps": 3, "cfg-text": 5, "cfg-image": 1.25})
    train.main(arguments)
    return out


def test_a_run_leaves_an_editor(init, trained):
    assert {path.name for path in trained.iterdir()} == {"log.jsonl", "model", "samples.png", "state.pt"}
    model = load(trained / "model")
    assert model.unet.config.in_channels == 8
    assert model.sampling == Sampling(steps=3, text_guidance=5.0, image_guidance=1.25, resolution=64)
    assert model.tokenizer.vocabulary == load(init).tokenizer.vocabulary
    edited = InstructPix2Pix(model).edit(Image.new("RGB", (64, 64), "red"), "make it night")
    assert edited.size == (64, 64)
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4
    assert 0 < log[-1]["loss"] < 100
    with Image.open(trained / "samples.png") as sheet:
        assert sheet.width > 3 * 128
        assert sheet.height > 128


def test_only_the_unet_is_trained(init, trained):
    """The autoencoder and the text encoder are those of --init to the last bit, as float16."""
    for part in ("vae", "text_encoder"):
        before, after = weights_of(init, part), weights_of(trained / "model", part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].half(), after[name]) for name in before)
    before, after = load(init).unet.state_dict(), torch.load(trained / "state.pt")["network"]
    assert after["conv_in.weight"][:, 4:].any()
    after["conv_in.weight"] = after["conv_in.weight"][:, :4]
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_the_editor_is_the_moving_average(trained):
    state = torch.load(trained / "state.pt")
    unet = load(trained / "model").unet.state_dict()
    assert state["average"].keys() == unet.keys()
    assert all(torch.equal(state["average"][name].half().float(), unet[name]) for name in unet)
    assert not all(torch.equal(state["network"][name], state["average"][name]) for name in unet)


def test_sampling_defaults_are_inits_own(data, init, tmp_path, program):
    code, out, errors = program(*command(data, init, tmp_path / "out", steps=1))
    assert (code, errors) == (0, [])
    assert out == ["18 pairs, 18 different instructions", str(tmp_path / "out" / "model")]
    assert load(tmp_path / "out" / "model").sampling == load(init).sampling


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    data, init, trained, program, tmp_path, monkeypatch, stop_at
):
    """To the last bit."""
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > stop_at:
            raise KeyboardInterrupt
        return loss(*arguments)

    arguments = command(data, init, tmp_path / "run", **{"sampling-steps": 3, "cfg-text": 5, "cfg-image": 1.25})
    monkeypatch.setattr(train, "fit", partial(fit, save_every=-1))
    monkeypatch.setattr(train, "loss", interrupted)
    assert program(*arguments)[0] == 130
    assert torch.load(tmp_path / "run" / "state.pt")["step"] == stop_at
    assert not (tmp_path / "run" / "model").exists()

    monkeypatch.setattr(train, "loss", loss)
    assert program(*arguments)[0] == 0
    for path in (trained / "model").rglob("*"):
        if path.is_file():
            assert (tmp_path / "run" / "model" / path.relative_to(trained / "model")).read_bytes() == path.read_bytes()
    assert (tmp_path / "run" / "samples.png").read_bytes() == (trained / "samples.png").read_bytes()


def test_a_finished_run_writes_the_same_model_again(data, init, trained, program, tmp_path):
    """And may note other sampling defaults in it."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    assert program(*command(data, init, out, **{"cfg-text": 6}))[0] == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (out / "model" / name).read_bytes() == (trained / "model" / name).read_bytes()
    assert load(out / "model").sampling == Sampling(steps=2, text_guidance=6.0, image_guidance=1.5, resolution=64)
    assert program(*command(data, init, out, steps=6))[0] == 0  # or go on
    assert (out / "model" / name).read_bytes() != (trained / "model" / name).read_bytes()
    assert torch.load(out / "state.pt")["step"] == 6


def test_seeds_differ(data, init, trained, program, tmp_path):
    assert program(*command(data, init, tmp_path / "other", seed=1))[0] == 0
    ours, theirs = (weights_of(folder / "model", "unet") for folder in (trained, tmp_path / "other"))
    assert not torch.equal(ours["conv_in.weight"], theirs["conv_in.weight"])


def test_it_learns(init, program, tmp_path):
    """Two pairs, over and over: a much smaller loss, and by far better than saying nothing."""
    data = write_pairs(tmp_path / "pairs", 20, different=2)
    assert program(*command(data, init, tmp_path / "run", steps=100, batch=4, lr=0.01, ema=0.9))[0] == 0
    before, after = load(init), load(tmp_path / "run" / "model")
    before.unet = extend_input(before.unet, 8)
    pairs = LatentPairs(before, EditDataset(data), "cpu")
    generator = random_at(99, 0)
    latent, image_latent, text = pairs.batch(64, generator)
    t, noise = torch.randint(1000, (64,), generator=generator), torch.randn(latent.shape, generator=generator)

    @torch.no_grad()
    def mean_loss(model):
        all_conditions = torch.ones(64)
        examples = latent, image_latent, text, pairs.null_text, t, noise, all_conditions
        return loss(model.unet, NoiseSchedule(), *examples).mean().item()

    assert mean_loss(before) > 1
    assert mean_loss(after) < 0.55


# ---- small data sets, and a user's mistakes ----


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_pairs_are_enough(init, program, tmp_path, count):
    """There are none for validation then: the sheet shows what it was trained on."""
    data = write_pairs(tmp_path / "pairs", count)
    code, out, errors = program(*command(data, init, tmp_path / "run", steps=1))
    assert (code, errors) == (0, [])
    assert out[0].startswith(f"{len(EditDataset(data))} pairs, ")
    assert load(tmp_path / "run" / "model").unet.config.in_channels == 8
    assert (tmp_path / "run" / "samples.png").exists()


def resize(path, size):
    Image.open(path).resize(size).save(path)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("number", [0, 3, 18])  # 18: of the validation split
def test_pictures_of_several_sizes(data, init, program, tmp_path, both, number):
    """Of one pair and another, or within a pair."""
    folder = tmp_path / "pairs"
    shutil.copytree(data, folder)
    for side in (0, 1) if both else (1,):
        resize(folder / f"{number:07d}" / f"{number}_{side}.jpg", (96, 64))
    code, _, errors = program(*command(folder, init, tmp_path / "out"))
    assert code == 2
    among = "the pictures of the data set differ in size; one size for all is needed"
    (error,) = errors
    assert error.endswith(among if both else f"the pictures of seed {number} differ in size")


def test_pictures_that_differ_within_every_pair(latents):
    x, y = torch.zeros(3, 64, 64), torch.zeros(3, 32, 64)
    with pytest.raises(UserError, match="differ in size; one size for all is needed"):
        LatentPairs(latents[0], [(x, y, "a"), (x, y, "b")], "cpu")


def test_pictures_that_differ_from_a_later_batch_on(latents):
    """Each batch of 64 is encoded apart."""
    x, y = torch.zeros(3, 16, 16), torch.zeros(3, 32, 16)
    with pytest.raises(UserError, match="differ in size; one size for all is needed"):
        LatentPairs(latents[0], [(x, x, "a")] * 64 + [(y, y, "b")], "cpu")


def test_pictures_that_the_unet_cannot_halve(init, program, tmp_path):
    data = write_pairs(tmp_path / "pairs", 4, size=(64, 68))
    code, out, errors = program(*command(data, init, tmp_path / "out"))
    message = "train.py: the pictures are 64x68; this model needs sides that are multiples of 8 pixels"
    assert (code, out, errors) == (2, [], [message])
    assert not (tmp_path / "out").exists()


def test_other_errors_are_not_called_so(latents):
    """A picture that the autoencoder cannot take is no matter of sizes that differ."""
    x = torch.zeros(5, 64, 64)
    with pytest.raises(RuntimeError, match="channels"):
        LatentPairs(latents[0], [(x, x, "a")], "cpu")


def test_a_damaged_pair_is_named(data, init, program, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(data, folder)
    (folder / "0000003" / "3_0.jpg").write_bytes(b"hello")
    code, _, errors = program(*command(folder, init, tmp_path / "out"))
    assert code == 2
    assert len(errors) == 1
    assert "3_0.jpg cannot be read as a picture" in errors[0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": None}, "--data"),
        ({"init": None}, "--init"),
        ({"out": None}, "--out"),
        ({"data": "nowhere"}, "nowhere holds no seeds.json; datagen.py images makes such a folder"),
        ({"data": "FOLDER"}, "FOLDER holds no seeds.json"),
        ({"init": "nowhere"}, "there are no weights at nowhere"),
        ({"init": "INPAINTING"}, "a Stable Diffusion inpainting checkpoint"),
        ({"out": "FILE"}, "FILE"),
        ({"out": "FILE/run"}, "FILE/run"),
        ({"lr": 0}, "--lr should be between 0 and 1, not 0.0"),
        ({"lr": -1e-4}, "--lr should be between 0 and 1, not -0.0001"),
        ({"lr": 1}, "--lr should be between 0 and 1, not 1.0"),
        ({"lr": "nan"}, "--lr should be between 0 and 1, not nan"),
        ({"lr": "fast"}, "argument --lr"),
        ({"ema": 1}, "--ema should be from 0 to below 1, not 1.0"),
        ({"ema": -0.1}, "--ema should be from 0 to below 1"),
        ({"ema": "nan"}, "--ema should be from 0 to below 1"),
        ({"steps": 0}, "--steps should be at least 1, not 0"),
        ({"batch": 0}, "--batch should be at least 1, not 0"),
        ({"threads": -1}, "--threads should be at least 1, not -1"),
        ({"sampling-steps": 0}, "--sampling-steps should be at least 1, not 0"),
        # what checkpoint.load would refuse to read in the end
        ({"sampling-steps": 1001}, "steps should be between 1 and 1000, not 1001"),
        ({"cfg-text": -1}, "text guidance should be between 0 and 100, not -1.0"),
        ({"cfg-text": "nan"}, "text guidance should be between 0 and 100, not nan"),
        ({"cfg-image": 1000}, "image guidance should be between 0 and 100, not 1000.0"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**8}, "--seed should be between 0 and 99999999, not 100000000"),
        ({"device": "abacus"}, "no device abacus"),
    ],
)
def test_mistakes(data, init, program, tmp_path, monkeypatch, changed, words):
    """One line, exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("hello")
    (tmp_path / "FOLDER").mkdir()
    save_folder(tiny_model(in_channels=9), tmp_path / "INPAINTING")
    values = {"data": data, "init": init, "out": "out"} | changed
    code, out, errors = program(*command(values.pop("data"), values.pop("init"), values.pop("out"), **values))
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("train.py: ")
    assert words in errors[0]
    assert out == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER", "INPAINTING"]
