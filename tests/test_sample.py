"""sample.py: every mistake a user can make is answered in one line and writes nothing; --again repeats to the pixel."""

import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial

from cli import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, colourful, contents, lines_of
from PIL import Image
from random_model import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
from formats.checkpoint import save_folder, save_single_file
from images import edit_size, open_image, read_settings, save_png
from ip2p import InstructPix2Pix

pytestmark = pytest.mark.usefixtures("one_thread")

BEGINNING = "sample.py: "


@pytest.fixture
def photo(tmp_path):
    """An image to edit, in a folder of its own."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "photo.png"
    colourful(60, 50).save(path)
    return path


@pytest.fixture
def run_sample(run_main):
    """sample.py with the arguments given."""
    return partial(run_main, sample)


@pytest.fixture
def edit(run_sample, photo, model_folder, tmp_path):
    """sample.py with an image, an instruction, a tiny model and an output that fit; arguments given change them."""
    (tmp_path / "out").mkdir()

    def run(*arguments, **changes):
        options = {"image": photo, "instr": "make it night", "weights": model_folder}
        options |= {"out": tmp_path / "out" / "x.png", "steps": 2, "dtype": "float32", **changes}
        given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not None]
        return run_sample(*given, *arguments)

    return run


@pytest.fixture
def refused(edit, tmp_path):
    """Run and check that it was refused in one line that holds the `words`, and that no file was touched."""

    def run(words, *arguments, **changes):
        before = contents(tmp_path)
        result = edit(*arguments, **changes)
        check_refusal(result, words)
        assert contents(tmp_path) == before

    return run


def check_refusal(result, words):
    """Exit code 2 and one line that begins with the program's name and holds the words."""
    assert result.code == 2, result
    assert result.out == []
    reports, message = result.err[:-1], result.err[-1]
    assert all(line.startswith((BEGINNING + "loading ", BEGINNING + "editing at ")) for line in reports), result.err
    assert message.startswith(BEGINNING)
    for word in words if isinstance(words, list) else [words]:
        assert str(word) in message


def pixels(path):
    with Image.open(path) as file:
        return np.array(file)


def test_an_edit_in_a_true_process(tmp_path, model_folder):
    """File names outside ASCII, and a terminal that knows nothing else."""
    colourful(60, 50).save(tmp_path / "사진 1.png")
    command = [sys.executable, ROOT / "sample.py", "--image", "사진 1.png", "--instr", "make it night", "--steps", "1"]
    command += ["--weights", model_folder, "--out", "밤.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert all(line.startswith(BEGINNING) for line in lines_of(done.stderr))
    assert read_settings(tmp_path / "밤.png")["image"] == "사진 1.png"
    assert {path.name for path in tmp_path.iterdir()} == {"사진 1.png", "밤.png"}


def test_nothing_heavy_is_imported_for_help_and_mistakes(tmp_path):
    """One process runs them all; then neither torch nor what it brings may be there."""
    code = """
import sys
from cli import run_program
import sample
edit = ["--image", "x.png", "--weights", "w", "--instr"]
for arguments in (["--help"], [], ["--nonsense"], ["--image"], [*edit, ""], [*edit, "x", "--steps", "0"],
                  [*edit, "x", "--seed", "x"], [*edit, "x", "--out", "missing/x.jpg"],
                  [*edit, "x", "--num", "2", "--sweep"]):
    sys.argv = ["sample.py", *arguments]
    try:
        run_program(sample.main)
    except SystemExit as end:
        assert end.code == (0 if arguments == ["--help"] else 2), (arguments, end.code)
    else:
        raise AssertionError(arguments)
heavy = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "huggingface_hub", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 8
    assert "--cfg-image" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals of another kind")
def test_ctrl_c_in_the_middle(tmp_path, model_folder):
    colourful(60, 50).save(tmp_path / "photo.png")
    before = contents(tmp_path)
    arguments = ["--image", "photo.png", "--instr", "x", "--weights", model_folder, "--steps", 1000, "--num", 4]
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # under nohup and in some CI, children are born deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    killer = threading.Timer(120, running.kill)
    killer.start()
    try:
        stderr = b""
        while not re.search(rb" [1-9]\d*/1000", stderr):  # the bar says that steps have been made
            some = os.read(running.stderr.fileno(), 65536)
            assert some, stderr
            stderr += some
        running.send_signal(signal.SIGINT)
        out, rest = running.communicate()
    finally:
        killer.cancel()
        running.kill()
    text = (stderr + rest).decode()
    assert running.returncode == 130, text
    assert out == b""
    assert "Traceback" not in text
    assert [line.split()[1] for line in lines_of(text)] == ["loading", "editing", "stopped;"]
    assert contents(tmp_path) == before


def test_a_closed_stdout_does_not_matter(edit, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    assert edit().code == 0
    assert (tmp_path / "out" / "x.png").exists()


def test_images_that_cannot_be_edited(refused, photo, tmp_path):
    (tmp_path / "truncated.png").write_bytes(photo.read_bytes()[:200])
    refused(["truncated.png", "cannot be read"], image=tmp_path / "truncated.png")
    refused(["cannot be read", "missing.png"], image=tmp_path / "missing.png")
    refused("--image", image=None)


def test_a_message_is_one_line_whatever_the_names(refused, tmp_path):
    refused("missing", weights=tmp_path / "two\nlines missing.safetensors")
    for key in ("image", "weights", "out"):
        refused("xxx.png", **{key: tmp_path / ("x" * 300 + ".png")})


def test_an_empty_instruction(refused):
    refused("--instr", instr=None)
    refused("instruction is empty", instr="\t\n ")
    refused("instruction", instr=b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_a_too_long_instruction_is_cut_off_with_a_warning(edit, tmp_path):
    text = "make the night " + "zq" * 30 + " and then\nsome more"
    result = edit(instr=text)
    assert result.code == 0
    warning = next(line for line in result.err if "too long" in line)
    quoted = re.search('"(.*)"$', warning)[1]
    assert quoted
    assert " ".join(text.split()).endswith(quoted)
    assert all(line.startswith(BEGINNING) for line in result.err)
    assert read_settings(tmp_path / "out" / "x.png")["instr"] == text
    seen = text[: len(text) - len(quoted)]
    assert not any("too long" in line for line in edit(instr=seen).err)


@pytest.mark.parametrize("text", ["밤으로 바꿔 줘", "🌙", "a\u0301 \u2019s", "x\u0000y"])
def test_instructions_in_any_script(edit, text, tmp_path):
    assert edit(instr=text, steps=1).code == 0
    assert read_settings(tmp_path / "out" / "x.png")["instr"] == text


# ---- the output ----


def test_outputs_that_cannot_be_written(refused, photo, tmp_path, monkeypatch):
    refused(["cannot write", "photo.png"], out=photo / "x.png")  # below a regular file
    refused(".png", out=tmp_path / "out" / "x.jpg")
    (tmp_path / "folder.png").mkdir()
    refused("a file that ends in .png", out=tmp_path / "folder.png")

    def full(image, target, **options):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(["cannot write", "x.png", "No space left"])


def test_the_input_is_never_overwritten(refused, edit, photo, tmp_path):
    refused("overwrite the input", out=photo.parent / ".." / "in" / "photo.png")
    soft = tmp_path / "soft.png"
    soft.symlink_to(photo)
    refused("overwrite the input", out=soft)
    variant = tmp_path / "out" / "x_seed8.png"
    shutil.copy(photo, variant)
    refused("overwrite the input", image=variant, num=2, seed=7)
    assert edit(image=variant, seed=8).code == 0  # one edit writes no x_seed8.png


# ---- numbers and choices ----


def test_values_out_of_range_and_options_that_exclude_each_other(refused):
    refused("steps", steps="1.5")
    refused("text", cfg_text="nan")
    refused("resolution", resolution="63")
    refused("dtype", dtype="int8")
    refused(["--num", "--sweep"], "--sweep", "--num=2")
    refused("--compile does not pay on a CPU", "--compile")


@pytest.mark.parametrize("device", ["nonsense", "", "meta", "cuda:99"])
def test_devices_that_are_not_there(device, refused):
    refused(["no device", "--device cpu"], device=device)


# ---- the weights ----


def test_weights_that_are_not_there(refused, tmp_path):
    refused(["no weights", "missing.safetensors"], weights=tmp_path / "missing.safetensors")
    refused("no weights", weights=tmp_path / "missing")
    refused(["nobody/nothing", "cannot be reached"], weights="nobody/nothing")
    refused(["no UNet", "out"], weights=tmp_path / "out")


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_weights_with_a_tensor_wrong(layout, refused, model_folder, single_file, tmp_path):
    shutil.copytree(model_folder if layout == "folder" else single_file.parent, tmp_path / "model")
    weights = tmp_path / "model" / ("" if layout == "folder" else single_file.name)
    path = weights / UNET_FILE if layout == "folder" else weights
    name = "conv_in.weight" if layout == "folder" else "first_stage_model.decoder.conv_out.bias"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    right = tensors[name]
    for change, words in [
        ({name: None}, [name, "missing"]),
        ({f"{name}.more": right.clone()}, [f"{name}.more", "unknown"]),
        ({name: torch.zeros(3, 3)}, [name, "shape"]),
        ({name: right.to(torch.int32)}, [name, "int32"]),
        ({name: right * math.nan}, "NaN or Inf"),
    ]:
        save_file({key: x for key, x in {**tensors, **change}.items() if x is not None}, path, metadata)
        refused(words, weights=weights)


def test_other_models(refused, tmp_path):
    save_folder(tiny_model(in_channels=4), tmp_path / "text to image")
    refused(["text-to-image", "4 channels", "InstructPix2Pix"], weights=tmp_path / "text to image")
    save_single_file(tiny_model(in_channels=9), tmp_path / "inpainting.safetensors")
    tiny_model().tokenizer.save(tmp_path)
    refused(["inpainting.safetensors", "9 channels"], weights=tmp_path / "inpainting.safetensors")

    first = "model.diffusion_model.input_blocks.0.0.weight"
    for name, tensors, word in [
        ("xl", [first, "model.diffusion_model.label_emb.0.0.weight"], "XL"),
        ("sd2", ["cond_stage_model.model.ln_final.weight", first], "Stable Diffusion 2"),
        ("sd3", ["model.diffusion_model.joint_blocks.0.context_block.attn.proj.weight"], "Stable Diffusion 3"),
        ("flux", ["double_blocks.0.img_attn.proj.weight"], "Flux"),
        ("lora", ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "LoRA"),
        ("other", ["some.weight"], "no UNet"),
        ("part", [first], "no autoencoder; name one by --vae"),
    ]:
        path = tmp_path / f"{name}.safetensors"
        save_file({tensor: torch.zeros(320, 4, 3, 3) for tensor in tensors}, path)
        refused([path, word], weights=path)


class Trap:
    """A pickle of this makes a folder when it is opened carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_run(refused, model_folder, tmp_path):
    marker = tmp_path / "the trap was sprung"
    weights = {"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 8, 3, 3)}}
    torch.save({**weights, "callbacks": Trap(marker)}, tmp_path / "new.ckpt")
    torch.save({**weights, "callbacks": Trap(marker)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Trap(marker)))
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / UNET_FILE).unlink()
    torch.save(Trap(marker), folder / "unet" / "diffusion_pytorch_model.bin")
    for name in ("new.ckpt", "old.ckpt", "bare.ckpt", "model"):
        refused("run code", weights=tmp_path / name)
        assert not marker.exists()


def test_tokenizers_that_are_missing_or_do_not_fit(refused, edit, model_folder, single_file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    shutil.rmtree(folder / "tokenizer")
    refused("vocab.json and merges.txt", weights=folder)
    assert edit(weights=folder, tokenizer=single_file.parent).code == 0
    refused(["tokenizer", "missing"], weights=folder, tokenizer=tmp_path / "missing")

    other = tmp_path / "other"
    shutil.copytree(model_folder / "tokenizer", other)
    vocabulary = json.loads((other / "vocab.json").read_text())
    for content, word in [(json.dumps({**vocabulary, "new": len(vocabulary)}), "not the one"), ("{", "cannot be read")]:
        (other / "vocab.json").write_text(content)
        refused([word, "other"], tokenizer=other)


def test_another_autoencoder(refused, edit, single_file, tmp_path):
    refused(["no weights", "missing"], vae=tmp_path / "missing")
    assert edit(vae=single_file).code == 0  # a whole model's, with our note of its sizes
    shared = pixels(tmp_path / "out" / "x.png")
    assert edit().code == 0
    before = pixels(tmp_path / "out" / "x.png")
    assert np.array_equal(before, shared)
    save_folder(tiny_model(seed=50), tmp_path / "other")
    assert edit(vae=tmp_path / "other").code == 0
    assert not np.array_equal(pixels(tmp_path / "out" / "x.png"), before)


# ---- edits that succeed ----


def test_one_edit(edit, photo, model_folder, tmp_path):
    result = edit(seed=3, steps=3, cfg_text=5.0)
    out = tmp_path / "out" / "x.png"
    assert result.out == [str(out)]
    assert [line.split()[1] for line in result.err] == ["loading", "editing", "done"]
    note = read_settings(out)
    expected = {"image": str(photo), "instr": "make it night", "weights": str(model_folder), "tokenizer": None}
    expected |= {"steps": 3, "cfg_text": 5.0, "cfg_image": 1.5, "resolution": 64, "seed": 3, "num": 1, "sweep": False}
    expected |= {"vae": None, "lora": None, "ema": None, "then": None, "negative": "", "mask": None, "region": None}
    expected |= {"device": note["device"], "dtype": note["dtype"], "compile": False, "low_memory": False}
    expected |= {"sampler": "euler_ancestral", "schedule": "authors"}
    expected |= dict.fromkeys(("cfg_above", "cfg_below", "null_every", "deep_every"))
    expected |= dict.fromkeys(("best", "caption_before", "caption_after", "clip"))
    assert note == {**expected, "full_size": False, "sheet": False, "batch_size": 1}
    model = InstructPix2Pix.load(model_folder)
    assert np.array_equal(pixels(out), model.edit(open_image(photo), "make it night", 5.0, 1.5, 3, seed=3))
    assert list((tmp_path / "out").iterdir()) == [out]


def test_weights_in_every_layout_give_the_same_edit(edit, model_folder, single_file, tmp_path):
    out = tmp_path / "out" / "x.png"
    assert edit().code == 0
    expected = pixels(out)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(single_file, alone)
    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder, pickled)
    for file in (UNET_FILE, TEXT_FILE):
        torch.save(load_file(pickled / file), (pickled / file).with_suffix(".bin"))
        (pickled / file).unlink()
    fp16_name = pickled / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    (pickled / VAE_FILE).rename(fp16_name)
    for changes in (
        {"weights": single_file},
        {"weights": alone, "tokenizer": model_folder / "tokenizer"},
        {"weights": alone, "tokenizer": model_folder},
        {"weights": pickled},
        {"vae": model_folder},
        {"vae": model_folder / "vae"},
    ):
        out.unlink()
        result = edit(**changes)
        assert result.code == 0, result.err
        assert np.array_equal(pixels(out), expected), changes


def test_variants(edit, tmp_path):
    result = edit("--num=4", seed=5)
    out = tmp_path / "out"
    names = [f"x_seed{seed}.png" for seed in range(5, 9)]
    assert result.out == [str(out / name) for name in [*names, "x.png"]]
    notes = [read_settings(out / name) for name in names]
    assert [(note["seed"], note["num"]) for note in notes] == [(seed, 1) for seed in range(5, 9)]
    variants = [pixels(out / name) for name in names]
    assert len({variant.tobytes() for variant in variants}) == 4
    assert edit(seed=7).code == 0
    assert abs(pixels(out / "x.png").astype(int) - variants[2]).max() <= 2  # alone or among others: equal noise


def test_sweep(edit, tmp_path):
    assert edit("--sweep", steps=None, seed=4, cfg_text=90).out == [str(tmp_path / "out" / "x.png")]
    width, height = edit_size(60, 50, 64)
    sheet, note = pixels(tmp_path / "out" / "x.png"), read_settings(tmp_path / "out" / "x.png")
    assert sheet.shape[1] > (1 + len(sample.SWEEP_TEXT)) * width
    assert sheet.shape[0] > len(sample.SWEEP_IMAGE) * height
    assert [note[key] for key in ("sweep", "steps", "cfg_image", "resolution")] == [True, 2, 1.5, 64]  # the model's own


# ---- the rest of the image ----


def test_full_size_puts_the_edit_back_through_the_mask(edit, refused, photo, tmp_path):
    mask = Image.new("L", (60, 50))
    mask.paste(255, (0, 0, 30, 50))
    mask.save(tmp_path / "mask.png")
    assert edit("--full-size", mask=tmp_path / "mask.png").code == 0
    result, whole = pixels(tmp_path / "out" / "x.png"), pixels(photo)
    assert np.array_equal(result[:, 30:], whole[:, 30:])
    assert abs(result.astype(int) - whole)[:, :30].mean() > 10
    mask.resize((30, 25)).save(tmp_path / "small.png")
    refused("the mask is 30x25, the image 60x50", mask=tmp_path / "small.png")
    refused("--full-size needs --mask or --region", "--full-size")
    refused("not allowed with argument", mask=tmp_path / "mask.png", region="the hat")


def test_a_region_is_shown_in_a_sheet(edit, tmp_path):
    out = tmp_path / "out"
    assert edit(region="the hat").out == [str(out / "x.png"), str(out / "x_sheet.png")]
    width, height = edit_size(60, 50, 64)
    assert pixels(out / "x_sheet.png").shape[1] > 3 * width
    assert edit("--sheet").out == [str(out / "x.png"), str(out / "x_sheet.png")]


def test_then_edits_the_result(edit, run_sample, model_folder, tmp_path):
    out = tmp_path / "out"
    assert edit("--then=the thing", "--then=the sea").code == 0
    model, image = InstructPix2Pix.load(model_folder), open_image(tmp_path / "in" / "photo.png")
    for text in ("make it night", "the thing", "the sea"):
        image = model.edit(image, text, steps=2)
    assert np.array_equal(pixels(out / "x.png"), image)
    assert run_sample("--again", out / "x.png").code == 0
    assert np.array_equal(pixels(out / "x_again.png"), image)


def test_another_sampler(edit, model_folder, photo, tmp_path):
    """By name; it is kept in the PNG."""
    assert edit(sampler="unipc", schedule="karras", steps=4).code == 0
    model = InstructPix2Pix.load(str(model_folder))
    expected = model.edit(photo, "make it night", steps=4, sampler="unipc", schedule="karras")
    assert np.array_equal(pixels(tmp_path / "out/x.png"), np.asarray(expected))
    assert not np.array_equal(np.asarray(model.edit(photo, "make it night", steps=4)), np.asarray(expected))
    settings = read_settings(tmp_path / "out/x.png")
    assert (settings["sampler"], settings["schedule"]) == ("unipc", "karras")
    with pytest.raises(UserError, match="'dpm' should be one of euler_ancestral, "):
        model.edit(photo, "make it night", sampler="dpm")


# ---- many images ----


@pytest.fixture
def photos(tmp_path):
    """A folder with 20 images of 3 sizes in 3 formats, and a broken one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        ending = ("png", "JPG", "webp")[number % 3]
        colourful(60, (50, 30, 70)[number // 7], seed=number).save(folder / f"{number:02d}.{ending}", quality=95)
    (folder / "13b.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def test_many_images_equal_single_edits(run_sample, photos, model_folder, tmp_path, monkeypatch):
    """And a broken one is skipped."""
    loaded, load = [], InstructPix2Pix.load
    monkeypatch.setattr(InstructPix2Pix, "load", lambda *arguments: loaded.append(1) or load(*arguments))
    settings = "--instr", "make it night", "--weights", model_folder, "--steps", 1
    result = run_sample("--image", photos, *settings, "--out", tmp_path / "many")
    assert result.code == f"sample.py: 1 of 21 images were skipped: {photos / '13b.png'}"  # exit code 1
    assert loaded == [1]
    names = [*(f"{number:02d}.png" for number in range(20)), "sheet.png"]
    assert result.out == [str(tmp_path / "many" / name) for name in names]
    for path in sorted(photos.glob("[0-9][0-9].*")):
        assert run_sample("--image", path, *settings, "--out", tmp_path / "one.png").code == 0
        assert np.array_equal(pixels(tmp_path / "many" / f"{path.stem}.png"), pixels(tmp_path / "one.png"))
        assert read_settings(tmp_path / "many" / f"{path.stem}.png") == read_settings(tmp_path / "one.png")


def test_images_and_instructions_are_matched(run_sample, photos, model_folder, tmp_path):
    (tmp_path / "texts.txt").write_text("\ufeffmake it night\r\n\r\nthe thing\r\n", encoding="utf-8")
    settings = "--instr", tmp_path / "texts.txt", "--weights", model_folder, "--steps", 1, "--out", tmp_path / "out"
    assert run_sample("--image", photos / "00.png", *settings).code == 0
    notes = [read_settings(tmp_path / "out" / name) for name in ("00.png", "00_2.png")]
    assert [note["instr"] for note in notes] == ["make it night", "the thing"]
    assert run_sample("--image", photos / "0[03].png", *settings, "--batch-size", 2).code == 0
    notes = [read_settings(tmp_path / "out" / name) for name in ("00.png", "03.png")]
    assert [note["instr"] for note in notes] == ["make it night", "the thing"]
    check_refusal(run_sample("--image", photos / "0[036].png", *settings), "3 images and 2 instructions")
    check_refusal(run_sample("--image", photos / "x*.png", *settings), "there are no images in")
    check_refusal(run_sample("--image", photos, *settings, "--out", tmp_path / "x.png", "--instr", "a"), "named like a")


def test_the_model_fits_the_images(run_sample, photo, tmp_path, monkeypatch):
    colourful(64, 64).save(tmp_path / "scene.png")
    named = []

    def load(path, *arguments):
        named.append(path)
        raise UserError("not loaded")

    monkeypatch.setattr(InstructPix2Pix, "load", load)
    for images in ([tmp_path / "scene.png"], [photo], [tmp_path / "scene.png", photo]):
        check_refusal(run_sample("--image", *images, "--instr", "make it night"), "not loaded")
    assert named == ["mini", "ip2p", "ip2p"]
    for wrong in (["--image", tmp_path / "no.png"], ["--image", photo, "--mask", tmp_path / "no.png"],
                  ["--image", photo, "--mask", tmp_path / "scene.png"]):  # told before a model is loaded
        check_refusal(run_sample(*wrong, "--instr", "make it night", "--weights", "x"), "")
    assert len(named) == 3


# ---- --again ----

FAST = ["--cfg-above=0.1", "--cfg-below=12", "--null-every=2", "--deep-every=2", "--sampler=unipc", "--schedule=karras"]


@pytest.mark.parametrize("flags", [["--cfg-text=5.5", "--resolution=128"], ["--num=3"], ["--sweep"], FAST])
def test_again_is_the_same_to_the_pixel(edit, run_sample, tmp_path, flags):
    out = tmp_path / "out"
    first = edit(*flags, seed=5).out
    again = run_sample("--again", out / "x.png").out
    assert again == [line.replace("/x", "/x_again") for line in first]
    for path, repeated in zip(first, again, strict=True):
        assert np.array_equal(pixels(path), pixels(repeated))
    assert read_settings(out / "x_again.png") == read_settings(out / "x.png")
    assert run_sample("--again", first[0], "--out", out / "y.png").code == 0
    assert np.array_equal(pixels(first[0]), pixels(out / "y.png"))


def test_again_with_changes(edit, run_sample, tmp_path):
    out = tmp_path / "out"
    assert edit(seed=3).code == 0
    assert run_sample("--again", out / "x.png", "--instr", "the thing", "--out", out / "y.png").code == 0
    assert read_settings(out / "y.png") == {**read_settings(out / "x.png"), "instr": "the thing"}
    assert edit(seed=3, instr="the thing").code == 0
    assert np.array_equal(pixels(out / "x.png"), pixels(out / "y.png"))


def test_again_of_what_carries_no_settings(run_sample, photo, tmp_path):
    check_refusal(run_sample("--again", photo), [photo, "no settings"])
    check_refusal(run_sample("--again", tmp_path / "missing.png"), "cannot be read")


def test_again_with_damaged_settings(edit, run_sample, tmp_path):
    out = tmp_path / "out" / "x.png"
    assert edit(steps=1).code == 0
    note, image = read_settings(out), Image.open(out).convert("RGB")
    damage = {"image": [], "weights": "x\x00y", "steps": 10**30, "cfg_text": float("nan"), "seed": 1.5, "sweep": "yes"}
    for damaged in (*({**note, key: value} for key, value in damage.items()), 5, [], {}, {"settings": {}}):
        save_png(image, out, damaged)
        check_refusal(run_sample("--again", out, "--out", tmp_path / "y.png"), [])
        assert not (tmp_path / "y.png").exists(), damaged
