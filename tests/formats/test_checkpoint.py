"""Reading and writing weights, against files that diffusers wrote and reads."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from cli import UserError

import diffusers
import pytest
import torch
import transformers
from random_model import random_model, randomise, small_tokenizer
from reference import clip_reference, real_vocabulary, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clip_image import CLIP, CLIPImageConfig
from clip_text import CLIP_L_TEXT, CLIPText, CLIPTextConfig, CLIPTokenizer
from formats import checkpoint, configs
from formats.checkpoint import Model, load, load_clip, save_clip, save_folder, save_single_file
from formats.configs import Config
from formats.weights import check_finite, extend_input, fingerprint, read_tensors, renamed
from unet import INSTRUCT_PIX2PIX, UNet
from vae import STABLE_DIFFUSION_VAE, VAE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    return random_model(seed=3)


@pytest.fixture
def folder(model, tmp_path):
    save_folder(model, tmp_path / "folder")
    return tmp_path / "folder"


@pytest.fixture
def single(model, folder):
    """A single file with its tokenizer beside it."""
    save_single_file(model, folder / "single.safetensors")
    return folder / "single.safetensors"


def rewrite(path, change):
    """Change a safetensors file's {name: tensor} in place; its header's text stays."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata=metadata)


def assert_equal(ours, theirs):
    """Two {name: tensor} hold the same."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def same_weights(ours, other):
    for name in checkpoint.PARTS:
        mine, theirs = getattr(ours, name), getattr(other, name)
        assert mine.config == theirs.config
        assert_equal(mine.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("layout", ["folder", "single"])
def test_a_model_comes_back(layout, model, request):
    again = load(request.getfixturevalue(layout))
    same_weights(model, again)
    assert again.sampling == model.sampling
    assert again.tokenizer(["the night"]).tolist() == model.tokenizer(["the night"]).tolist()
    assert not any(weight.requires_grad for weight in again.unet.parameters())
    assert not again.unet.training


def test_byte_order_marks_change_nothing(model, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "model")
    for path in [*folder.rglob("*.json"), *folder.rglob("*.txt")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    again = load(folder)
    same_weights(model, again)
    assert again.tokenizer(["the night"]).tolist() == model.tokenizer(["the night"]).tolist()


def test_half_precision_files(model, tmp_path):
    paths = tmp_path / "half", tmp_path / "half" / "single.safetensors"
    for path, save in zip(paths, (save_folder, save_single_file), strict=True):
        save(model, path, torch.float16)
        torch.testing.assert_close(load(path).unet.conv_in.weight, model.unet.conv_in.weight, rtol=1e-3, atol=1e-3)
        assert {weight.dtype for weight in load(path, dtype=torch.bfloat16).vae.parameters()} == {torch.bfloat16}


def test_a_folder_that_diffusers_wrote(tmp_path):
    """Its own classes, its own random weights, its own files: read by us, and computed the same."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer.vocabulary), bos_token_id=tokenizer.start, eos_token_id=tokenizer.end,
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, layers_per_block=2,
    )
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), in_channels=8, cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8,
    )
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae, transformers.CLIPTextModel(text), unet=unet, requires_safety_checker=False,
        tokenizer=transformers.CLIPTokenizer(tokenizer.vocabulary, tokenizer.merges, model_max_length=24),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**configs.SCHEDULER_FIXED),
        safety_checker=None, feature_extractor=None,
    )
    pipeline.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    z, context, t = torch.randn(1, 8, 16, 16), torch.randn(1, 24, 32), torch.tensor([3.5])
    with torch.no_grad():
        assert relative_error(ours.unet(z, t, context), pipeline.unet(z, t, context).sample) <= 1e-5
        assert relative_error(ours.vae.decode(z[:, :4]), pipeline.vae.decode(z[:, :4]).sample) <= 1e-5
        ids = ours.tokenizer(["the night"])
        assert relative_error(ours.text_encoder(ids), pipeline.text_encoder(ids).last_hidden_state) <= 1e-5


def test_single_files_have_the_original_names():
    """As many as in the released files, and the ones that everybody knows."""
    with torch.device("meta"):
        networks = [UNet(INSTRUCT_PIX2PIX), VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT)]
    shapes = {
        part.prefix + name: list(weight.shape)
        for part, network in zip(checkpoint.PARTS.values(), networks, strict=True)
        for name, weight in renamed(network, "original", None).items()
    }
    assert len(shapes) == 686 + 248 + 196
    known = {
        "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": [10240, 1280],
        "model.diffusion_model.output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
        "model.diffusion_model.output_blocks.8.2.conv.weight": [640, 640, 3, 3],
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": [3072, 768],
    }
    assert {name: shapes.get(name) for name in known} == known


def test_diffusers_reads_our_single_file(model, folder, single):
    """Its own conversion of original names, made without us, finds every weight."""
    offline = {"config": str(folder), "local_files_only": True}
    unet = diffusers.UNet2DConditionModel.from_single_file(single, subfolder="unet", **offline)
    vae = diffusers.AutoencoderKL.from_single_file(single, subfolder="vae", **offline)
    assert_equal(unet.state_dict(), renamed(model.unet, "diffusers", None))
    assert_equal(vae.state_dict(), renamed(model.vae, "diffusers", None))


RAW, EMA = "model.diffusion_model.", "model_ema.diffusion_model"
AVERAGES = {  # of a raw weight -> (its average, whether it is taken, what is said)
    "of a training": (lambda w: 1.01 * w, True, r"are taken; they differ from the raw ones \(--ema no\) by 1.0%"),
    "of before a merge": (lambda w: w + 0.3 * torch.randn_like(w), False, r"as after a merge; the raw ones are taken"),
    "NaN": (lambda w: w * torch.nan, False, "hold NaN or Inf; the raw ones are taken"),
    "zero": (torch.zeros_like, False, "zero or missing in part; the raw ones are taken"),
    "of another size": (lambda w: w[:1].clone(), False, "zero or missing in part; the raw ones are taken"),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_averaged_weights_are_taken_if_they_are_sane(case, model, single, capsys):
    average, taken, said = AVERAGES[case]

    def change(tensors):
        raw = {name: tensor for name, tensor in tensors.items() if name.startswith(RAW)}
        ema = {EMA + name.removeprefix(RAW).replace(".", ""): average(tensor) for name, tensor in raw.items()}
        return {**tensors, **ema, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(22000)}

    rewrite(single, change)
    raw = model.unet.conv_out.weight
    assert torch.equal(load(single).unet.conv_out.weight, average(raw) if taken else raw)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
    same_weights(load(single, ema="no"), model)
    if case != "of another size":
        assert not torch.equal(load(single, ema="yes").unet.conv_out.weight, raw)
    assert not capsys.readouterr().err  # what was asked for needs no words


def test_averaged_weights_alone(model, single, capsys):
    def change(tensors):
        named = {EMA + n.removeprefix(RAW).replace(".", "") if n.startswith(RAW) else n: t for n, t in tensors.items()}
        return {name: tensor for name, tensor in named.items() if not name.endswith("modelout2bias")} if cut else named

    cut = False
    with pytest.raises(UserError, match="holds no averaged weights"):
        load(single, ema="yes")
    rewrite(single, change)
    same_weights(load(single), model)
    assert "since it holds no raw ones" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no raw weights"):
        load(single, ema="no")
    cut = True
    rewrite(single, change)
    with pytest.raises(UserError, match="1 of .* missing, such as model_ema.diffusion_modelout2bias"):
        load(single)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265192196\n"
NOT_WEIGHTS = [
    (b"", "is empty; download it again"), (POINTER, "is a git-lfs pointer"),
    (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "is a web page"),
    (b'{"error": "Access to model x is restricted"}', 'is a text, not weights; it begins: {"error": "Access'),
    ("Zugriff für Geübte\n".encode(), "is a text, not weights"), (b"GGUF\3\0\0\0", "is a GGUF file"),
    (b"\x1f\x8b\x08\0", "is a gzip archive"), (bytes(range(256)), "is neither a .safetensors nor a PyTorch file"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), NOT_WEIGHTS, ids=[said for _, said in NOT_WEIGHTS])
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x"])
def test_what_is_no_file_of_weights_is_called_what_it_is(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["x.ckpt", "X.SAFETENSORS", "x.safetensors.part1", "x"])
def test_a_files_name_does_not_matter(name, model, single):
    same_weights(load(single.rename(single.with_name(name))), model)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.001])
@pytest.mark.parametrize("written", ["safetensors", "archive", "pickle"])
def test_a_download_that_was_cut_off(written, kept, tmp_path):
    path, tensors = tmp_path / "x.safetensors", {f"x{i}": torch.ones(1000) for i in range(100)}
    if written == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=written == "archive")
    assert_equal(read_tensors(path)[0], tensors)
    content = path.read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=f"is cut off(: it has| after) {path.stat().st_size:,} "):
        read_tensors(path)


PARTS_OF_A_FILE = [("model.diffusion_model.", "no UNet"), ("first_stage_model.", "no autoencoder; name one by --vae")]


@pytest.mark.parametrize(("prefix", "said"), [*PARTS_OF_A_FILE, ("cond_stage_model.", "no text encoder")])
def test_a_part_that_is_missing_is_named(prefix, said, model, folder, single):
    rewrite(single, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(prefix)})
    with pytest.raises(UserError, match=said):
        load(single)
    if prefix == "first_stage_model.":
        vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
        same_weights(load(single, vae=vae), model)  # its own file, whose sizes stand beside it
        (vae.parent / "config.json").unlink()
        with pytest.raises(UserError, match="has shape"):
            load(single, vae=vae)  # and is else of Stable Diffusion's sizes


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["v_pred", "ztsnr"], "v-prediction"), (["encoder.conv_in.weight"], "an autoencoder alone"),
        (["unet.conv_in.lora_A.weight"], "a LoRA"), (["lora_te_x.alpha", "lora_te_x.hada_w1_a"], "a LoRA"),
        (["mid_block.attn1.processor.to_q_lora.up.weight"], "a LoRA"), (["down_blocks.0.x.weight"], "one part"),
        (["control_model.x.weight"], "ControlNet"), (["emb_params"], "textual inversion"),
    ],
)  # fmt: skip
def test_other_kinds_of_files_are_named(names, said, tmp_path):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.001, 0.002]}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"a_later_invention": 1}),
        ("unet/config.json", {"resnet_out_scale_factor": 2.0}), ("unet/config.json", {"timestep_post_act": "silu"}),
        ("unet/config.json", {"time_embedding_act_fn": "gelu"}), ("unet/config.json", {"dual_cross_attention": True}),
        ("vae/config.json", {"shift_factor": 0.1}), ("vae/config.json", {"use_quant_conv": False}),
        ("text_encoder/config.json", {"hidden_act": "gelu_new"}),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_computed_is_refused_by_name(file, change, folder):
    values = json.loads((folder / file).read_text())
    harmless = {"_name": "x", "sample_size": 64, "later": None, "another": False}
    (folder / file).write_text(json.dumps(values | (harmless if "text" not in file and "sched" not in file else {})))
    load(folder)
    (folder / file).write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=f"{file}: {next(iter(change))} is "):
        load(folder)


def test_every_scheduler_of_diffusers_for_stable_diffusion_is_known(folder):
    for kind in ("PNDM", "DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM"):
        scheduler = getattr(diffusers, f"{kind}Scheduler")(**configs.SCHEDULER_FIXED)
        scheduler.save_pretrained(folder / "scheduler")
        load(folder)


def test_a_single_file_has_its_tokenizer_beside_it(model, tmp_path):
    os.umask(umask := os.umask(0o027))
    save_single_file(model, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask  # as any file of the user's
    load(tmp_path / "x.safetensors")
    save_single_file(model, tmp_path / "again.safetensors")
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="is the tokenizer of another model"):
        save_single_file(model, tmp_path / "third.safetensors")
    assert not (tmp_path / "third.safetensors").exists()


def test_a_missing_shard_is_named(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    with pytest.raises(UserError, match="-00002-of-00002.safetensors cannot be read: No such file"):
        load(folder)


def test_the_folder_of_a_training_stands_for_its_editor(model, folder, tmp_path):
    (tmp_path / "run" / "states").mkdir(parents=True)
    with pytest.raises(UserError, match="train.py export --run"):
        load(tmp_path / "run")
    folder.rename(tmp_path / "run" / "model")
    same_weights(load(tmp_path / "run"), model)


def test_a_file_in_place_of_a_folder(single):
    with pytest.raises(UserError, match="is a file; give the folder in which CLIP"):
        load_clip(single)
    with pytest.raises(UserError, match="is a file; give the folder of the tokenizer"):
        load(single, tokenizer=single)


def test_a_fingerprint_is_of_the_weights(model, folder, single):
    networks = [[getattr(m, name) for name in checkpoint.PARTS] for m in (model, load(folder), load(single))]
    assert len({fingerprint(*three) for three in networks}) == 1
    half = [UNet(model.unet.config) for _ in range(2)]
    half[0].load_state_dict({name: 0.5 * weight for name, weight in model.unet.state_dict().items()})
    half[1].load_state_dict(half[0].state_dict())
    assert fingerprint(half[0]) == fingerprint(half[1]) != fingerprint(model.unet)
    half[1].state_dict()["middle.resblock1.conv1.weight"][3, 2, 0, 0] = torch.nan
    check_finite(half[0], "x")
    with pytest.raises(UserError, match="x: tensor mid_block.resnets.0.conv1.weight holds NaN or Inf"):
        check_finite(half[1], "x")


def test_older_and_newer_names_of_the_same(model, folder, single):
    """The VAE's attention under all four names, the text tower with and without its extra level, schedule buffers."""

    def rename(path, *renames):
        def change(tensors):
            for old, new in renames:
                tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
            return {name: x.flatten(1) if "attn_1.to" in name and x.dim() == 4 else x for name, x in tensors.items()}

        rewrite(path, change)

    rename(single, ("attn_1.q", "attn_1.to_q"), ("attn_1.k", "attn_1.to_k"), ("attn_1.v", "attn_1.to_v"))
    rename(single, ("attn_1.proj_out", "attn_1.to_out.0"), ("transformer.text_model.", "transformer."))
    rewrite(single, lambda tensors: {**tensors, "betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)})
    same_weights(load(single), model)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    rename(vae, ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    rename(folder / "text_encoder" / "model.safetensors", ("text_model.", ""))
    same_weights(load(folder), model)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 2020"])
def test_a_plain_ckpt(model, single, archive):
    """What the authors published: a pickle. It is opened as plain weights or not at all."""
    path, tensors = single.with_suffix(".ckpt"), load_file(single)
    torch.save({"state_dict": tensors, "steps": 22000}, path, _use_new_zipfile_serialization=archive)
    assert_equal(read_tensors(path)[0], tensors)
    with pytest.raises(UserError, match="has shape"):
        load(path)  # it lacks our note of its sizes, is taken for Stable Diffusion's, and misfits


def test_a_vae_file_of_its_own(tmp_path):
    """With and without the prefix, as the published fine-tuned autoencoders have it. Full size, some 330 MB."""
    vae = randomise(VAE(STABLE_DIFFUSION_VAE), seed=6)
    for prefix in ("", "first_stage_model."):
        tensors = {prefix + name: tensor.half() for name, tensor in renamed(vae, "original", None).items()}
        save_file({**tensors, "loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
        again = checkpoint.load_vae(tmp_path / "vae.safetensors")
        assert torch.equal(again.decoder.conv_out.weight, vae.decoder.conv_out.weight.half())


def test_a_hub_id_comes_from_the_cache(model, tmp_path, monkeypatch):
    """The layout of the hub's cache, made by hand; nothing is fetched."""
    import huggingface_hub

    cache = tmp_path / "models--someone--editor"
    snapshot = cache / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.parent.mkdir(parents=True)
    save_folder(model, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    same_weights(load("someone/editor"), model)
    with pytest.raises(UserError, match="someone/absent is not in"):
        load("someone/absent")


def test_extending_the_input_adds_zeros_only():
    unet = random_model(in_channels=4).unet
    extended = extend_input(unet, in_channels=8)
    assert extended.config == replace(unet.config, in_channels=8)
    z, image, context, t = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32), torch.ones(2)
    with torch.no_grad():
        torch.testing.assert_close(extended(torch.cat([z, image], 1), t, context), unet(z, t, context))
    assert extended.conv_in.weight[:, 4:].count_nonzero() == 0
    assert extended.conv_out.weight.data_ptr() == unet.conv_out.weight.data_ptr()


@pytest.mark.parametrize("path", ["theirs", "ours"])
def test_clip_in_transformers_layout(path, tmp_path):
    tokenizer = small_tokenizer()
    text = CLIPTextConfig(len(tokenizer.vocabulary), 24, 32, 2, 4, end_token=tokenizer.end, projection=20)
    clip = randomise(CLIP(text, CLIPImageConfig(32, 8, 48, 2, 4, projection=20)), seed=7).eval()
    if path == "ours":
        save_clip(clip, tokenizer, tmp_path / path)
        theirs = transformers.CLIPModel.from_pretrained(tmp_path / path)
        assert_equal(theirs.state_dict(), renamed(clip, "diffusers", None))
    else:
        clip_reference(clip).save_pretrained(tmp_path / path)
        tokenizer.save(tmp_path / path)
    again, its_tokenizer = load_clip(tmp_path / path)
    assert again.config == clip.config
    assert_equal(again.state_dict(), clip.state_dict())
    assert its_tokenizer(["the night"]).tolist() == tokenizer(["the night"]).tolist()


def test_the_published_configurations_are_understood():
    """What unet/config.json and text_encoder/config.json of the public models say."""
    unet = {
        "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 8, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    assert configs.unet_from(Config(unet, "test")) == INSTRUCT_PIX2PIX
    text = {"eos_token_id": 2, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    assert configs.text_from(Config(text, "test")) == CLIP_L_TEXT
    for key, value in {"use_linear_projection": True, "class_embed_type": "timestep", "norm_eps": 1e-6}.items():
        with pytest.raises(UserError, match=key):
            configs.unet_from(Config({**unet, key: value}, "test"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what memory belongs to")
def test_the_weights_are_the_mapped_file(folder):
    """Neither initialised nor copied: every weight of the UNet lies where its file is mapped into memory."""
    unet = load(folder).unet
    path = str((folder / "unet" / "diffusion_pytorch_model.safetensors").resolve())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    for weight in unet.parameters():
        assert any(first <= weight.data_ptr() < last for first, last in spans)


MEASURE = """
import re, sys
sys.path.insert(0, sys.argv[2])
from formats import checkpoint
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = checkpoint.load(sys.argv[1])
total = sum(float(weight.sum()) for n in (model.unet, model.vae, model.text_encoder) for weight in n.parameters())
assert total == total
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak")
def test_loading_a_full_size_file_takes_its_size_in_memory(tmp_path):
    """4.3 GB in float32, every weight touched: under 1.15 times the file."""
    tokenizer = CLIPTokenizer(*real_vocabulary())
    with torch.device("meta"):
        networks = UNet(INSTRUCT_PIX2PIX), VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT)
    networks = [network.to_empty(device="cpu") for network in networks]
    for network in networks:
        for weight in network.parameters():
            torch.nn.init.constant_(weight, 0.5)
    path = tmp_path / "full.safetensors"
    save_single_file(Model(*networks, tokenizer), path)
    tokenizer.save(tmp_path)
    del networks
    assert path.stat().st_size > 4.2e9
    command = [sys.executable, "-c", MEASURE, str(path), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 * path.stat().st_size < int(run.stdout) < 1.15 * path.stat().st_size
