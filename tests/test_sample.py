"""sample.py: every mistake a user can make is answered in one line and writes nothing; --again repeats to the pixel."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, colourful, lines_of, png_header, tiny_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import images
import sample
from formats.checkpoint import save_folder, save_single_file
from images import edit_size, open_image, read_settings, save_png
from ip2p import InstructPix2Pix

pytestmark = pytest.mark.usefixtures("one_thread")

BEGINNING = "sample.py: "


@pytest.fixture
def photo(tmp_path):
    """A picture to edit, in a folder of its own."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "photo.png"
    colourful(60, 50).save(path)
    return path


@pytest.fixture
def edit(run_sample, photo, model_folder, tmp_path):
    """sample.py with a picture, an instruction, a tiny model and an output that fit; arguments given change them."""
    (tmp_path / "out").mkdir()

    def run(*arguments, **changes):
        options = {
            "image": photo,
            "instr": "make it night",
            "weights": model_folder,
            "out": tmp_path / "out" / "x.png",
            "steps": 2,
            **changes,
        }
        given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not None]
        return run_sample(*given, *arguments)

    return run


def contents(folder):
    """{path: hash} of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def refused(edit, tmp_path):
    """Run and check that it was refused in one line that holds the `words`, and that no file was touched."""

    def run(words, *arguments, **changes):
        before = contents(tmp_path)
        result = edit(*arguments, **changes)
        check_refusal(result, words)
        assert contents(tmp_path) == before
        return result

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


# ---- a true process ----


def process(*arguments, cwd, **environment):
    """sample.py as a user starts it."""
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_mistake_in_a_true_process(tmp_path):
    colourful(60, 50).save(tmp_path / "photo.png")
    colourful(60, 50).save(tmp_path / "damaged.tif")
    tiff = (tmp_path / "damaged.tif").read_bytes()
    samples = struct.pack("<HHII", 277, 3, 1, 3)
    assert samples in tiff
    (tmp_path / "damaged.tif").write_bytes(tiff.replace(samples, struct.pack("<HHII", 277, 3, 1, 166)))
    before = contents(tmp_path)
    for arguments, word in [
        (["--image", "photo.png", "--instr", " "], "instruction is empty"),
        (["--image", "photo.png"], "--instr"),
        (["--image", "photo.png", "--instr", "x", "--steps", "many"], "--steps"),
        (["--nonsense"], "--nonsense"),
        (["--image", "damaged.tif", "--instr", "x", "--weights", "."], "damaged.tif"),  # Pillow logs that, too
        (["--image", "photo.png", "--instr", "x", "--weights", "missing.safetensors"], "missing.safetensors"),
    ]:
        done = process(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        *reports, message = done.stderr.splitlines()
        assert reports in ([], ["sample.py: loading missing.safetensors"])
        assert message.startswith(BEGINNING)
        assert word in message
    assert contents(tmp_path) == before


def test_an_edit_in_a_true_process(tmp_path, model_folder):
    """File names outside ASCII, and a terminal that knows nothing else."""
    colourful(60, 50).save(tmp_path / "사진 1.png")
    done = process(
        *["--image", "사진 1.png", "--instr", "make it night", "--weights", model_folder, "--steps", 1],
        *["--out", "밤.png"],
        cwd=tmp_path,
        PYTHONIOENCODING="ascii",
    )
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


# ---- the picture ----


def test_pictures_that_cannot_be_edited(refused, photo, tmp_path):
    whole = photo.read_bytes()
    files = {
        "empty.png": (b"", "cannot be read"),
        "truncated.png": (whole[: len(whole) // 2], "cannot be read"),
        "text.jpg": (b"hello, this is no picture\n", "cannot be read"),
        "bomb.png": (png_header(30000, 30000), "million pixels"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        refused([name, words], image=tmp_path / name)
    for size in [(1, 1), (4000, 20), (20, 4000), (7, 7)]:
        Image.new("RGB", size).save(tmp_path / "odd.png")
        refused(["odd.png", f"{size[0]}x{size[1]}"], image=tmp_path / "odd.png")
    refused(["there is no image", "missing.png"], image=tmp_path / "missing.png")
    refused("is a folder", image=tmp_path)
    refused("--image", image=None)
    refused("--image", image="")


def test_names_longer_than_any_file_s(refused, edit, run_sample, tmp_path):
    for key in ("image", "weights", "tokenizer", "vae", "out"):
        refused("xxx.png", **{key: tmp_path / ("x" * 300 + ".png")})
    assert edit(out=tmp_path / "out" / ("x" * 251 + ".png")).code == 0  # as long as it may be
    assert run_sample("--again", "x" * 300 + ".png").code == 2
    assert run_sample("--again", next((tmp_path / "out").iterdir()), "--out", tmp_path / "y.png").code == 0


def test_a_message_is_one_line_whatever_the_names(refused, tmp_path):
    refused("missing", image=tmp_path / "two\nlines missing.png")
    refused("missing", weights=tmp_path / "two\nlines missing.safetensors")


# ---- the instruction ----


def test_an_empty_instruction(refused):
    refused("--instr", instr=None)
    for text in ("", " ", "\t\n "):
        refused("instruction is empty", instr=text)


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


@pytest.mark.parametrize("text", ["밤으로 바꿔 줘", "🌙", "«été»", "a\u0301 \u2019s", "\u0130", "x\u0000y", "\ufeffa"])
def test_instructions_in_any_script(edit, text, tmp_path):
    assert edit(instr=text, steps=1).code == 0
    assert read_settings(tmp_path / "out" / "x.png")["instr"] == text


def test_an_instruction_that_is_no_text(refused):
    refused("instruction", instr=b"caf\xe9".decode("utf-8", "surrogateescape"))


# ---- the output ----


def test_outputs_that_cannot_be_written(refused, edit, photo, tmp_path, monkeypatch):
    refused(["cannot make the folder", "photo.png"], out=photo / "x.png")  # below a regular file
    refused(".png", out=tmp_path / "out" / "x.jpg")
    refused(".png", out=tmp_path / "out" / "x")
    (tmp_path / "folder.png").mkdir()
    refused("is a folder", out=tmp_path / "folder.png")
    refused(["cannot write", "xxx"], out=tmp_path / ("x" * 300 + ".png"))

    def full(image, target, **options):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(["cannot write", "x.png", "No space left"])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_a_folder_that_nobody_can_write_to(refused):
    refused(["cannot write", "/proc"], out="/proc/x.png")


def test_the_input_is_never_overwritten(refused, edit, photo, tmp_path):
    refused("overwrite the input", out=photo)
    refused("overwrite the input", out=photo.parent / ".." / "in" / "photo.png")
    hard = tmp_path / "hard.png"
    os.link(photo, hard)
    refused("overwrite the input", out=hard)
    soft = tmp_path / "soft.png"
    soft.symlink_to(photo)
    refused("overwrite the input", out=soft)
    refused("overwrite the input", image=soft, out=photo)

    variant = tmp_path / "out" / "x_seed8.png"
    shutil.copy(photo, variant)
    refused("overwrite the input", image=variant, num=2, seed=7)
    assert edit(image=variant, num=2, seed=9).code == 0
    assert edit(image=variant, seed=8).code == 0  # one edit writes no x_seed8.png


def test_an_output_is_replaced(edit, tmp_path):
    (tmp_path / "out" / "x.png").write_bytes(b"old")
    assert edit().code == 0
    assert pixels(tmp_path / "out" / "x.png").shape == (64, 64, 3)
    assert edit(out=tmp_path / "out" / "X.PNG").code == 0


# ---- numbers and choices ----


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("steps", ["0", "-1", "1001", "99999999999999999999", "1.5", "nan", "x", ""]),
        ("cfg_text", ["-0.1", "100.1", "nan", "inf", "-inf", "1e400", "x", ""]),
        ("cfg_image", ["-0.1", "100.1", "nan", "inf", "-inf", "1e400", "x", ""]),
        ("resolution", ["0", "63", "4097", "-512", "512.0", "nan", "x", ""]),
        ("seed", ["-1", "9223372036854775808", "1.5", "nan", "x", ""]),
        ("num", ["0", "-1", "1001", "1.5", "inf", "x", ""]),
        ("dtype", ["float64", "int8", "x", ""]),
    ],
)
def test_values_out_of_range(option, values, refused):
    word = {"cfg_text": "text", "cfg_image": "image"}.get(option, option)
    for value in values:
        refused(word, **{option: value})


def test_the_last_of_many_seeds_must_be_in_range_too(refused):
    refused("seed", seed=2**63 - 2, num=3)


def test_values_at_the_ends_of_their_ranges(edit, tmp_path):
    assert edit(cfg_text=0, cfg_image=0, seed=0, steps=1).code == 0
    assert edit(cfg_text=100, cfg_image=100, seed=2**63 - 1, steps=1).code == 0
    assert edit(resolution=64, steps=1000 // 200).code == 0
    assert edit("--num=2", seed=2**63 - 2, steps=1).code == 0


def test_options_that_exclude_each_other(refused):
    refused(["--num", "--sweep"], "--sweep", "--num=2")


@pytest.mark.parametrize("device", ["nonsense", "", "meta", "cuda:99", "vulkan", "hpu", "opengl", "cpu:x", "한"])
def test_devices_that_are_not_there(device, refused):
    refused(["no device", "--device cpu"], device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_where_there_is_none(refused):
    refused(["no device cuda", "--device cpu"], device="cuda")


# ---- the weights ----


def test_weights_that_are_not_there(refused, tmp_path):
    refused(["no weights", "missing.safetensors"], weights=tmp_path / "missing.safetensors")
    refused("no weights", weights=tmp_path / "missing")
    refused(["nobody/nothing", "cannot be fetched"], weights="nobody/nothing")
    refused(["unet/", "out"], weights=tmp_path / "out")


def changed(folder, name, change, to):
    """A copy of a model's folder in which one .safetensors file's {name: tensor} went through `change`."""
    shutil.copytree(folder, to)
    path = to / name
    tensors = load_file(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path)
    return to


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        (UNET_FILE, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        (UNET_FILE, "conv_in.weight"),
        (VAE_FILE, "encoder.mid_block.attentions.0.to_q.weight"),
        (TEXT_FILE, "text_model.encoder.layers.0.mlp.fc1.bias"),
    ],
)
def test_folders_with_a_tensor_wrong(file, tensor, refused, model_folder, tmp_path):
    def lose(tensors):
        del tensors[tensor]

    def add(tensors):
        tensors["a.surplus.weight"] = torch.zeros(2)

    def reshape(tensors):
        tensors[tensor] = torch.cat([tensors[tensor]] * 2)

    def make_whole(tensors):
        tensors[tensor] = tensors[tensor].to(torch.int32)

    cases = [(lose, [tensor, "missing"]), (add, ["a.surplus.weight", "unknown"]), (reshape, [tensor, "shape"])]
    cases.append((make_whole, [tensor, "int32"]))
    for number, (change, words) in enumerate(cases):
        folder = changed(model_folder, file, change, tmp_path / f"model{number}")
        refused([file.split("/")[0], *words], weights=folder)


def test_weights_files_that_are_damaged(refused, model_folder, tmp_path):
    folder = tmp_path / "model"
    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        whole = (model_folder / file).read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        for content in (
            b"",
            whole[:5],
            whole[: len(whole) // 2],
            whole[:-1],
            whole + b"x",
            b"\xff" * 8 + whole[8:],  # a header longer than any file
            whole[:8] + b"x" * length + whole[8 + length :],
            whole[:8] + b" " * length + whole[8 + length :],
            struct.pack("<Q", 2) + b"[]",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(model_folder, folder)
            (folder / file).write_bytes(content)
            refused([file, "damaged"], weights=folder)
        (folder / file).write_bytes(struct.pack("<Q", 2) + b"{}")
        refused([file.split("/")[0], "missing"], weights=folder)
        (folder / file).unlink()
        refused([file.split("/")[0], "no weights"], weights=folder)
        (folder / file).mkdir()
        refused(file, weights=folder)


def test_configurations_that_are_wrong(refused, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    for name, content, words in [
        ("unet/config.json", "{", "unet/config.json"),
        ("unet/config.json", '{"block_out_channels": [8, 16]}', "down_block_types"),
        ("vae/config.json", "[]", "vae/config.json"),
        ("text_encoder/config.json", '{"hidden_act": "relu"}', "hidden_act"),
        ("text_encoder/config.json", "[" * 100_000, "text_encoder/config.json"),
        ("scheduler/scheduler_config.json", '{"prediction_type": "v_prediction"}', "prediction_type"),
        ("sampling.json", '{"steps": 0}', ["sampling.json", "steps"]),
        ("sampling.json", '{"steps": NaN}', ["sampling.json", "steps"]),
        ("sampling.json", '{"resolution": "512"}', "sampling.json"),
        ("sampling.json", '{"text_guidance": 1e999}', ["sampling.json", "text guidance"]),
    ]:
        before = (folder / name).read_bytes()
        (folder / name).write_text(content)
        refused(words, weights=folder)
        (folder / name).write_bytes(before)
    (folder / "unet/config.json").unlink()
    refused("unet/config.json is missing", weights=folder)


def test_folders_of_other_models(refused, model_folder, tmp_path):
    save_folder(tiny_model(in_channels=4), tmp_path / "text to image")
    refused(["text-to-image", "4 channels", "InstructPix2Pix"], weights=tmp_path / "text to image")
    save_folder(tiny_model(in_channels=9), tmp_path / "inpainting")
    refused(["inpainting", "9 channels"], weights=tmp_path / "inpainting")
    for kind in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
        folder = tmp_path / kind
        shutil.copytree(model_folder, folder)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        refused([kind, "only Stable Diffusion 1.x"], weights=folder)


def test_single_files_of_other_models(refused, tmp_path):
    save_single_file(tiny_model(in_channels=4), tmp_path / "sd.safetensors")
    save_single_file(tiny_model(in_channels=9), tmp_path / "inpainting.safetensors")
    tiny_model().tokenizer.save(tmp_path)
    refused(["sd.safetensors", "text-to-image", "4 channels"], weights=tmp_path / "sd.safetensors")
    refused(["inpainting.safetensors", "inpainting", "9 channels"], weights=tmp_path / "inpainting.safetensors")

    first = "model.diffusion_model.input_blocks.0.0.weight"
    for name, tensors, words in [
        ("xl", ["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", first], "XL"),
        ("xl2", [first, "model.diffusion_model.label_emb.0.0.weight"], "XL"),
        ("sd2", ["cond_stage_model.model.ln_final.weight", first], "Stable Diffusion 2"),
        ("sd3", ["model.diffusion_model.joint_blocks.0.context_block.attn.proj.weight"], "Stable Diffusion 3"),
        ("flux", ["double_blocks.0.img_attn.proj.weight"], "Flux"),
        ("lora", ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "LoRA"),
        ("other", ["some.weight"], ["no Stable Diffusion", "some.weight"]),
        ("nothing", [], "no tensors"),
        ("part", [first], ["685 of 686", "missing"]),
    ]:
        path = tmp_path / f"{name}.safetensors"
        save_file({tensor: torch.zeros(320, 4, 3, 3) for tensor in tensors}, path)
        refused([path, *([words] if isinstance(words, str) else words)], weights=path)
    save_file({first: torch.tensor(1.0)}, tmp_path / "scalar.safetensors")
    refused("scalar.safetensors", weights=tmp_path / "scalar.safetensors")


def test_single_files_with_a_tensor_wrong(refused, single_file, tmp_path):
    shutil.copytree(single_file.parent / "tokenizer", tmp_path / "tokenizer")
    with safe_open(single_file, framework="pt") as file:
        metadata = file.metadata()
    path = tmp_path / "changed.safetensors"
    names = [
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ]
    for name in names:
        for change, word in [(None, "missing"), (torch.zeros(3, 3), "shape"), ("int", "int64")]:
            tensors = load_file(single_file)
            old = tensors.pop(name)
            if change is not None:
                tensors[name] = old.long() if change == "int" else change
            save_file(tensors, path, metadata)
            refused([path, name, word], weights=path)
        tensors = load_file(single_file)
        tensors[f"{name}.more"] = torch.zeros(1)
        save_file(tensors, path, metadata)
        refused([path, f"{name}.more", "unknown"], weights=path)
    for noted in ("{", "[]", "[" * 100_000, '{"unet": 1}', "\x00", '{"unet": {"block_out_channels": [8, "x"]}}'):
        save_file(load_file(single_file), path, {"ip2p": noted})
        refused(path, weights=path)


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
    for name in ("new.ckpt", "old.ckpt", "bare.ckpt"):
        refused([name, "run code", ".safetensors"], weights=tmp_path / name)
        assert not marker.exists()
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / UNET_FILE).unlink()
    torch.save(Trap(marker), folder / "unet" / "diffusion_pytorch_model.bin")
    refused(["unet", "run code"], weights=folder)
    assert not marker.exists()
    os.unlink(folder / "unet" / "diffusion_pytorch_model.bin")

    for name, content in [("text.ckpt", b"hello"), ("empty.ckpt", b""), ("picture.bin", b"\x89PNG\r\n\x1a\n")]:
        (tmp_path / name).write_bytes(content)
        refused(name, weights=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused(["list.ckpt", "no tensors"], weights=tmp_path / "list.ckpt")


def test_tokenizers_that_are_missing_or_do_not_fit(refused, edit, model_folder, single_file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    shutil.rmtree(folder / "tokenizer")
    refused("holds no tokenizer", weights=folder)
    assert edit(weights=folder, tokenizer=single_file.parent).code == 0
    refused(["holds no tokenizer", "out"], weights=folder, tokenizer=tmp_path / "out")
    refused(["tokenizer", "missing"], weights=folder, tokenizer=tmp_path / "missing")

    alone = tmp_path / "alone.safetensors"
    shutil.copy(single_file, alone)
    refused(["alone.safetensors", "--tokenizer"], weights=alone)

    other = tmp_path / "other"
    shutil.copytree(model_folder / "tokenizer", other)
    vocabulary = json.loads((other / "vocab.json").read_text())
    for change in (
        {**vocabulary, "new": len(vocabulary)},
        {**vocabulary, "<|endoftext|>": 0, "!": vocabulary["<|endoftext|>"]},
    ):
        (other / "vocab.json").write_text(json.dumps(change))
        refused(["other", "not the one"], tokenizer=other)
    del vocabulary["<|endoftext|>"]
    for content, word in [
        (json.dumps(vocabulary), "endoftext"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"a": "b"}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"a": 1e99}', "cannot be read"),
    ]:
        (other / "vocab.json").write_text(content)
        refused([word, "other"], tokenizer=other)


def test_an_autoencoder_that_does_not_fit(refused, single_file, tmp_path):
    refused(["no weights", "missing"], vae=tmp_path / "missing")
    refused("config.json", vae=tmp_path / "out")
    refused([single_file, "shape"], vae=single_file)  # tiny, where a file alone is taken for Stable Diffusion's
    model = tiny_model()
    model.unet = tiny_model(in_channels=4).unet
    save_folder(model, tmp_path / "model")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    refused(["x.safetensors", "missing"], vae=tmp_path / "x.safetensors")


def test_damaged_numbers_are_noticed(refused, model_folder, tmp_path):
    def spoil(tensors):
        tensors["conv_out.bias"][0] = float("nan")

    refused("NaN or Inf", weights=changed(model_folder, UNET_FILE, spoil, tmp_path / "model"))


# ---- edits that succeed ----


def test_one_edit(edit, photo, model_folder, tmp_path):
    result = edit(seed=3, steps=3, cfg_text=5.0, cfg_image=1.25)
    out = tmp_path / "out" / "x.png"
    assert result.code == 0
    assert result.out == [str(out)]
    assert [line.split()[1] for line in result.err] == ["loading", "editing", "done"]
    note = read_settings(out)
    assert note == {
        "image": str(photo),
        "instr": "make it night",
        "weights": str(model_folder),
        "tokenizer": None,
        "vae": None,
        "steps": 3,
        "cfg_text": 5.0,
        "cfg_image": 1.25,
        "resolution": 64,
        "seed": 3,
        "num": 1,
        "sweep": False,
        "device": note["device"],
        "dtype": note["dtype"],
        "compile": False,
        "low_memory": False,
    }
    model = InstructPix2Pix.load(model_folder)
    made = model.edit(open_image(photo), "make it night", 5.0, 1.25, 3, seed=3)
    assert np.array_equal(pixels(out), made)
    assert list((tmp_path / "out").iterdir()) == [out]


def test_the_model_s_own_defaults(edit, tmp_path):
    assert edit(steps=None).code == 0
    settings = read_settings(tmp_path / "out" / "x.png")
    assert [settings[key] for key in ("steps", "cfg_text", "cfg_image", "resolution")] == [2, 4.0, 1.5, 64]


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


def test_another_autoencoder_is_used(edit, tmp_path):
    assert edit().code == 0
    before = pixels(tmp_path / "out" / "x.png")
    save_folder(tiny_model(seed=50), tmp_path / "other")
    assert edit(vae=tmp_path / "other").code == 0
    assert not np.array_equal(pixels(tmp_path / "out" / "x.png"), before)
    assert read_settings(tmp_path / "out" / "x.png")["vae"] == str(tmp_path / "other")


def test_compiling_on_a_cpu_is_refused(refused):
    refused("--compile does not pay on a CPU", "--compile")


def test_low_memory_is_close(edit, tmp_path):
    assert edit(resolution=192).code == 0
    normal = pixels(tmp_path / "out" / "x.png").astype(int)
    assert edit("--low-memory", resolution=192).code == 0
    low = pixels(tmp_path / "out" / "x.png").astype(int)
    assert read_settings(tmp_path / "out" / "x.png")["low_memory"] is True
    assert normal.shape == (192, 192, 3)
    assert abs(normal - low).mean() < 4  # tiles of the autoencoder see less of the picture
    assert edit("--low-memory").code == 0
    low = pixels(tmp_path / "out" / "x.png").astype(int)
    assert edit().code == 0
    assert abs(pixels(tmp_path / "out" / "x.png").astype(int) - low).max() <= 2  # one tile: rounding alone differs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(edit, dtype, tmp_path):
    result = edit(dtype=dtype)
    assert result.code == 0, result.err
    assert read_settings(tmp_path / "out" / "x.png")["dtype"] == dtype


def test_variants(edit, tmp_path):
    result = edit("--num=6", seed=5)
    out = tmp_path / "out"
    names = [f"x_seed{seed}.png" for seed in range(5, 11)]
    assert result.code == 0
    assert result.out == [str(out / name) for name in [*names, "x.png"]]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "x.png"])
    notes = [read_settings(out / name) for name in names]
    assert [(note["seed"], note["num"]) for note in notes] == [(seed, 1) for seed in range(5, 11)]
    pictures = [pixels(out / name) for name in names]
    assert len({picture.tobytes() for picture in pictures}) == 6
    sheet = pixels(out / "x.png")
    for picture in pictures:
        assert contains(sheet, picture)
    assert 4 * 128 < sheet.shape[1] < 5 * 128  # four in a row

    assert edit(seed=7).code == 0  # alone, or in a batch with others: the same noise
    assert abs(pixels(out / "x.png").astype(int) - pictures[2]).max() <= 2


def contains(sheet, picture):
    """Whether a picture lies somewhere on a sheet, to the pixel; small ones are drawn there at twice their size."""
    picture = picture.repeat(2, axis=0).repeat(2, axis=1)
    height, width = picture.shape[:2]
    rows, columns = (sheet == picture[0, 0]).all(axis=2).nonzero()
    return any(
        np.array_equal(sheet[y : y + height, x : x + width], picture) for y, x in zip(rows, columns, strict=True)
    )


def test_sweep(edit, photo, tmp_path):
    result = edit("--sweep", seed=4)
    out = tmp_path / "out" / "x.png"
    assert result.code == 0
    assert result.out == [str(out)]
    assert [path.name for path in out.parent.iterdir()] == ["x.png"]
    sheet = pixels(out)
    width, height = edit_size(60, 50, 64)
    assert sheet.shape[1] > (1 + len(sample.SWEEP_TEXT)) * width
    assert sheet.shape[0] > len(sample.SWEEP_IMAGE) * height
    assert contains(sheet, np.array(images.resize_and_crop(open_image(photo), 64)))
    note = read_settings(out)
    assert note["sweep"] is True
    assert note["seed"] == 4


def test_a_sweep_stays_within_the_ranges(edit):
    assert edit("--sweep", cfg_text=90, cfg_image=90, steps=1).code == 0


# ---- --again ----


def test_again_is_the_same_to_the_pixel(edit, run_sample, tmp_path):
    out = tmp_path / "out"
    assert edit(seed=3, cfg_text=5.5, resolution=128).code == 0
    assert run_sample("--again", out / "x.png").out == [str(out / "x_again.png")]
    assert np.array_equal(pixels(out / "x.png"), pixels(out / "x_again.png"))
    assert read_settings(out / "x_again.png") == read_settings(out / "x.png")
    assert run_sample("--again", out / "x_again.png", "--out", out / "x_again.png").code == 0
    assert np.array_equal(pixels(out / "x.png"), pixels(out / "x_again.png"))


def test_again_of_variants_and_sheets(edit, run_sample, tmp_path):
    out = tmp_path / "out"
    assert edit("--num=6", seed=5).code == 0
    for name in ("x_seed5", "x_seed8", "x_seed9", "x_seed10"):
        result = run_sample("--again", out / f"{name}.png")
        assert result.out == [str(out / f"{name}_again.png")]
        assert np.array_equal(pixels(out / f"{name}.png"), pixels(out / f"{name}_again.png"))
        assert read_settings(out / f"{name}_again.png") == read_settings(out / f"{name}.png")
    # a repeated variant can itself be repeated
    result = run_sample("--again", out / "x_seed8_again.png", "--out", out / "twice.png")
    assert np.array_equal(pixels(out / "x_seed8.png"), pixels(out / "twice.png"))
    result = run_sample("--again", out / "x.png")
    assert result.out[-1] == str(out / "x_again.png")
    assert len(result.out) == 7
    assert np.array_equal(pixels(out / "x.png"), pixels(out / "x_again.png"))
    assert np.array_equal(pixels(out / "x_seed6.png"), pixels(out / "x_again_seed6.png"))


def test_again_of_a_sweep(edit, run_sample, tmp_path):
    out = tmp_path / "out"
    assert edit("--sweep", seed=5).code == 0
    assert run_sample("--again", out / "x.png").code == 0
    assert np.array_equal(pixels(out / "x.png"), pixels(out / "x_again.png"))


def test_again_with_changes(edit, run_sample, model_folder, tmp_path):
    out = tmp_path / "out"
    assert edit(seed=3).code == 0
    assert run_sample("--again", out / "x.png", "--instr", "the thing", "--out", out / "y.png").code == 0
    then, now = read_settings(out / "x.png"), read_settings(out / "y.png")
    assert now == {**then, "instr": "the thing"}
    assert not np.array_equal(pixels(out / "x.png"), pixels(out / "y.png"))
    assert edit(seed=3, instr="the thing").code == 0
    assert np.array_equal(pixels(out / "x.png"), pixels(out / "y.png"))

    result = run_sample("--again", out / "x.png", "--num", 2)
    assert [os.path.basename(line) for line in result.out] == ["x_again_seed3.png", "x_again_seed4.png", "x_again.png"]
    assert edit("--num=3", seed=3).code == 0
    result = run_sample("--again", out / "x_seed4.png", "--seed", 9, "--num", 1)
    assert result.out == [str(out / "x_seed4_again.png")]
    assert run_sample("--again", out / "x.png", "--dtype", "bfloat16", "--num", 1).code == 0


def test_again_of_what_carries_no_settings(run_sample, photo, tmp_path):
    for path, word in [
        (photo, "no settings"),
        (tmp_path / "missing.png", "there is no file"),
        (tmp_path, "cannot be read"),
    ]:
        result = run_sample("--again", path)
        check_refusal(result, [path, word])
    photo.write_bytes(photo.read_bytes()[:200])
    check_refusal(run_sample("--again", photo), str(photo))


DAMAGE = [
    ("image", [5, [], "", "missing\x00.png"]),
    ("instr", ["", " "]),
    ("weights", [5, [], "x\x00y"]),
    ("steps", ["x", [], -1, 1.5, 10**30]),
    ("cfg_text", ["x", [], -1, float("nan"), float("inf")]),
    ("resolution", ["x", 1.5, 0, [64]]),
    ("seed", ["x", -1, 1.5, 2**70]),
    ("num", ["x", 0, 1.5, 10**9]),
    ("sweep", [5, "yes"]),
    ("device", [5, "nonsense"]),
    ("dtype", ["nonsense", "int8", 5]),
]


@pytest.mark.parametrize(("key", "values"), DAMAGE, ids=[key for key, _ in DAMAGE])
def test_again_with_damaged_settings(key, values, edit, run_sample, tmp_path):
    out = tmp_path / "out" / "x.png"
    assert edit(steps=1).code == 0
    note, image = read_settings(out), Image.open(out).convert("RGB")
    for value in values:
        save_png(image, out, {**note, key: value})
        result = run_sample("--again", out, "--out", tmp_path / "y.png")
        check_refusal(result, [])
        assert not (tmp_path / "y.png").exists(), value


def test_again_with_no_settings_of_ours(edit, run_sample, tmp_path):
    out = tmp_path / "out" / "x.png"
    assert edit(steps=1).code == 0
    image = Image.open(out).convert("RGB")
    for value in (None, 5, [], "x", {}, {"settings": {}}):
        save_png(image, out, value)
        check_refusal(run_sample("--again", out), [])
