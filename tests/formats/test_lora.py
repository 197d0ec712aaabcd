"""LoRA: nothing at first, W + B A after, merged or not, and the same picture in diffusers."""

import pytest
import torch
from conftest import tiny_model
from reference import relative_error
from safetensors.torch import load_file

from formats.checkpoint import save_folder
from formats.lora import adapted_layers, add_lora, merge_lora, write_lora

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(channels=8):
    generator = torch.Generator().manual_seed(1)
    z, context = torch.randn(2, channels, 16, 16, generator=generator), torch.randn(2, 24, 16, generator=generator)
    return z, torch.tensor([3, 700]), context


def learned(unet, rank=3):
    """A UNet with LoRA whose B is no longer zero."""
    add_lora(unet, rank)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted_layers(unet).values():
            b = layer.parametrizations.weight[0].b
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    return unet


@torch.no_grad()
def test_at_first_it_changes_nothing():
    plain, unet = tiny_model().unet, tiny_model().unet
    add_lora(unet, 3)
    assert torch.equal(unet(*inputs()), plain(*inputs()))


def test_only_the_narrow_parts_are_trained():
    unet = tiny_model().unet
    count = len(adapted_layers(unet))
    add_lora(unet, 3)
    trained = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * count
    assert all(name.endswith((".a", ".b")) and 3 in weight.shape for name, weight in trained.items())
    unet(*inputs()).square().mean().backward()
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
def test_diffusers_loads_the_file(tmp_path):
    """On top of the model that the training began with: the prediction of ours."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionInstructPix2PixPipeline

    model = tiny_model()
    save_folder(model, tmp_path / "model")
    learned(model.unet)
    write_lora(model.unet, tmp_path / "lora.safetensors")
    assert max(len(tensor.shape) for tensor in load_file(tmp_path / "lora.safetensors").values()) == 4
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "model")
    before = pipeline.unet(*inputs()).sample
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    ours = model.unet(*inputs())
    assert relative_error(ours, before) > 0.01
    assert relative_error(ours, pipeline.unet(*inputs()).sample) <= 1e-5
