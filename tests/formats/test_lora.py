"""LoRA: nothing at first, W + B A after, merged or not, and the same image in diffusers."""

import json
import re
from types import SimpleNamespace

from cli import UserError

import pytest
import torch
from random_model import tiny_model
from reference import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from formats.checkpoint import load, save_folder
from formats.export import export, load_editor
from formats.lora import adapted_layers, add_lora, apply_lora, merge_lora, write_lora
from formats.names import foreign_names

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs():
    generator = torch.Generator().manual_seed(1)
    z, context = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 24, 16, generator=generator)
    return z, torch.tensor([3, 700]), context


def learned(unet):
    """A UNet with LoRA of rank 3 whose B is no longer zero."""
    add_lora(unet, 3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted_layers(unet).values():
            b = layer.parametrizations.weight[0].b
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    return unet


def test_at_first_it_changes_nothing_and_only_the_narrow_parts_are_trained():
    plain, unet = tiny_model().unet, tiny_model().unet
    add_lora(unet, 3)
    output = unet(*inputs())
    assert torch.equal(output, plain(*inputs()))
    trained = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * len(adapted_layers(unet))
    assert all(name.endswith((".a", ".b")) and 3 in weight.shape for name, weight in trained.items())
    output.square().mean().backward()
    assert all(weight.grad.any() for name, weight in trained.items() if name.endswith(".b"))
    assert all(weight.grad is None for name, weight in unet.named_parameters() if name not in trained)


@torch.no_grad()
def test_merging_keeps_the_function_and_leaves_a_plain_unet():
    plain, unet = tiny_model().unet, learned(tiny_model().unet)
    expected = unet(*inputs())
    assert relative_error(expected, plain(*inputs())) > 0.01
    merge_lora(unet)
    assert relative_error(unet(*inputs()), expected) <= 1e-6
    assert unet.state_dict().keys() == plain.state_dict().keys()
    change = (unet.conv_in.weight - plain.conv_in.weight).flatten(1)
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 3


@torch.no_grad()
@pytest.mark.parametrize("channels", [8, 4])
def test_diffusers_loads_an_exported_lora(tmp_path, channels):
    """On top of the editor that the training began with, be it an editor or an extended Stable Diffusion."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionInstructPix2PixPipeline

    save_folder(tiny_model(in_channels=channels), tmp_path / "base")
    settings = {"init": str(tmp_path / "base"), "trainable": "lora", "rank": 3}
    settings |= dict.fromkeys(("sampling_steps", "cfg_text", "cfg_image", "distill"))
    model, _ = load_editor(SimpleNamespace(**settings))
    save_folder(model, tmp_path / "editor")  # the base as it is, or with zero channels added
    learned(model.unet)
    weights = {name: weight for name, weight in model.unet.named_parameters() if weight.requires_grad}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    export(tmp_path, {"ema": weights}, tmp_path / "lora.safetensors", lora=True)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata()["base_model"].startswith(str(tmp_path / "base"))
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "editor")
    before = pipeline.unet(*inputs()).sample
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    ours = model.unet(*inputs())
    assert relative_error(ours, before) > 0.01
    assert relative_error(ours, pipeline.unet(*inputs()).sample) <= 1e-5


def kohya(name):
    """Our file's name of a factor -> kohya's."""
    module, side = re.fullmatch(r"unet\.(.+)\.lora_(A|B)\.weight", name).groups()
    return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight"


def processor(name):
    """The names of diffusers before 2024."""
    for now, before in (("to_out.0", "to_out"), (".lora_A", "_lora.down"), (".lora_B", "_lora.up")):
        name = name.replace(now, before)
    return re.sub(r"(attn\d)\.", r"\1.processor.", name)


NAMINGS = {
    "ours": lambda name: name,
    "kohya": kohya,
    "diffusers before": processor,
    "diffusers in between": lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "peft": lambda name: name.replace("unet.", "base_model.model.").replace(".weight", ".default.weight"),
}


@torch.no_grad()
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_lora_is_merged_whatever_its_layers_are_called(naming, scale, tmp_path):
    unet = learned(tiny_model().unet)
    write_lora(unet, tmp_path / "ours.safetensors", base="a test")
    tensors = {NAMINGS[naming](name): tensor for name, tensor in load_file(tmp_path / "ours.safetensors").items()}
    if naming == "kohya":  # which notes a factor for alpha / rank, here 2
        tensors |= {n.replace("lora_up.weight", "alpha"): torch.tensor(6.0) for n in tensors if "lora_up" in n}
        scale /= 2
    save_file(tensors, tmp_path / "x.safetensors")
    save_folder(tiny_model(), tmp_path / "base")
    merged = load(tmp_path / "base", lora=f"{tmp_path / 'x.safetensors'}:{scale}").unet
    plain, expected = tiny_model().unet.state_dict(), merge(unet).state_dict()
    strength = scale * 2 if naming == "kohya" else scale
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, plain[name] + strength * (expected[name] - plain[name]))


def merge(unet):
    merge_lora(unet)
    return unet


@torch.no_grad()
def test_an_editors_lora_makes_an_editor_of_a_text_to_image_model(tmp_path):
    """As training from it had begun; and the text encoder's layers are merged, too."""
    save_folder(tiny_model(in_channels=4), tmp_path / "sd")
    write_lora(learned(tiny_model().unet), tmp_path / "x.safetensors", base="a test")
    model = load(tmp_path / "sd", lora=tmp_path / "x.safetensors")
    assert model.unet.config.in_channels == 8
    assert model.unet.conv_in.weight[:, 4:].any()
    text = tiny_model().text_encoder
    name = foreign_names(text)["blocks.0.to_q.weight"].diffusers.removesuffix(".weight").replace(".", "_")
    a, b = torch.ones(2, text.config.width), torch.ones(text.config.width, 2)
    save_file({f"lora_te_{name}.lora_down.weight": a, f"lora_te_{name}.lora_up.weight": b}, tmp_path / "te.safetensors")
    merged = load(tmp_path / "sd", lora=tmp_path / "te.safetensors").text_encoder.blocks[0].to_q.weight
    torch.testing.assert_close(merged, text.blocks[0].to_q.weight + 2)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("lora_unet_mid_block_attentions_7_proj_in.lora_down.weight", (2, 8), "which this model lacks"),
        ("lora_unet_conv_in.lora_up.weight", (8, 2, 1, 1), "conv_in has one factor alone"),
        ("lora_unet_conv_in.hada_w1_a", (8, 2), "no plain LoRA: it holds lora_unet_conv_in.hada_w1_a"),
        ("unet.conv_in.lora_magnitude_vector", (8,), "no plain LoRA"),
        ("unet.conv_in.lora_A.weight", (), "one factor alone"),
    ],
)
def test_what_is_no_lora_for_this_model(name, shape, said, tmp_path):
    save_file({name: torch.zeros(shape)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        apply_lora(tiny_model(), tmp_path / "x.safetensors:0.7")


def test_a_lora_of_other_sizes(tmp_path):
    sides = {"down": torch.zeros(2, 9, 3, 3), "up": torch.zeros(8, 2, 1, 1)}
    save_file({f"lora_unet_conv_in.lora_{n}.weight": t for n, t in sides.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is made for another model: the sizes of conv_in differ"):
        apply_lora(tiny_model(), tmp_path / "x.safetensors")
