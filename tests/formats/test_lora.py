"""LoRA: nothing at first, W + B A after, merged or not, and the same image in diffusers."""

import json
from types import SimpleNamespace

import pytest
import torch
from random_model import tiny_model
from reference import relative_error
from safetensors import safe_open

from formats.checkpoint import save_folder
from formats.export import export, load_editor
from formats.lora import adapted_layers, add_lora, merge_lora

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
    settings |= {"sampling_steps": None, "cfg_text": None, "cfg_image": None}
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
