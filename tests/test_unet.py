"""The UNet against diffusers', number by number."""

from dataclasses import replace

import diffusers
import pytest
import torch
from random_model import randomise
from reference import relative_error, unet_reference, with_weights_of

from attention import fused, reference
from unet import INSTRUCT_PIX2PIX, STABLE_DIFFUSION, Level, UNet, UNetConfig, timestep_embedding

SMALL = {
    "two levels": UNetConfig((Level(32, True, 2), Level(64, True, 4)), resblocks=1, context_width=24, groups=8),
    "as the paper, thinner": UNetConfig(
        (Level(32, True, 8), Level(64, True, 8), Level(128, True, 8), Level(128, False, 8)),
        in_channels=8,
        context_width=48,
    ),
    "attention at the bottom only": UNetConfig(
        (Level(24, False, 3), Level(48, False, 3), Level(72, True, 3)), resblocks=3, context_width=16, groups=12
    ),
    "one level, one head": UNetConfig((Level(16, True, 1),), resblocks=1, in_channels=3, out_channels=5, groups=4),
    "no attention but the middle's": UNetConfig((Level(16, False, 2), Level(32, False, 4)), groups=4),
}
TIMES = torch.tensor([999.0, 499.5, 0.25])  # one of them a fraction that no training step has


def inputs(config, height, width, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(TIMES), config.in_channels, height, width, generator=generator)
    return z, torch.randn(len(TIMES), tokens, config.context_width, generator=generator)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (14, 10)])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_small_networks_agree_with_diffusers(name, size):
    config = SMALL[name]
    unet = randomise(UNet(config), seed=1).eval()
    z, context = inputs(config, *size)
    theirs = unet_reference(unet)(z, TIMES, context).sample
    assert relative_error(unet(z, TIMES, context), theirs) <= 1e-5


def test_convolutions_see_contiguous_images():
    """On a GPU the gradient of a 1x1 convolution has its input's strides; another layout is copied and warned of."""
    unet, seen = UNet(SMALL["two levels"]), []
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].is_contiguous()))
    z, context = inputs(unet.config, 8, 8)
    unet(z, TIMES, context)
    assert len(seen) > 10
    assert all(seen)


@pytest.mark.slow
@pytest.mark.parametrize("config", [STABLE_DIFFUSION, INSTRUCT_PIX2PIX], ids=["4 channels", "8 channels"])
@torch.no_grad()
def test_full_size_agrees_with_diffusers(config):
    with torch.device("meta"):
        unet, theirs = UNet(config), diffusers.UNet2DConditionModel(
            in_channels=config.in_channels, cross_attention_dim=768, attention_head_dim=8
        )
    unet = randomise(unet.to_empty(device="cpu"), seed=2).eval()
    assert all(weight.std() > 1e-3 for weight in unet.parameters())
    with_weights_of(unet, theirs)
    for size in [(64, 64), (32, 48)]:
        z, context = inputs(config, *size, tokens=77)
        expected = theirs(z, TIMES, context).sample
        assert expected.std() > 0.1
        assert relative_error(unet(z, TIMES, context), expected) <= 1e-5


@torch.no_grad()
def test_attention_is_a_parameter():
    """Every attention layer calls `attend`, in a fixed order, saying where it is; the result is what it returns."""
    config = SMALL["as the paper, thinner"]
    unet = randomise(UNet(config), seed=3).eval()
    z, context = inputs(config, 16, 16)
    calls = []

    def traced(q, k, v, layer):
        assert q.shape[2] == layer.size[0] * layer.size[1]
        assert k.shape == v.shape
        assert k.shape[2] == (7 if layer.cross else q.shape[2])
        calls.append(layer)
        return reference(q, k, v, layer)

    out = unet(z, TIMES, context, attend=traced)
    assert relative_error(out, unet(z, TIMES, context)) <= 1e-5
    assert [layer.index for layer in calls[::2]] == list(range(16))  # 2 + 2 + 2 down, 1 in the middle, 3 + 3 + 3 up
    assert [layer.cross for layer in calls] == [False, True] * 16
    assert [layer.place for layer in calls[::2]] == ["down"] * 6 + ["middle"] + ["up"] * 9
    assert [layer.size[0] for layer in calls[::2]] == [16, 16, 8, 8, 4, 4, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16]

    silenced = unet(z, TIMES, context, attend=lambda q, k, v, layer: 0 * fused(q, k, v))
    assert relative_error(silenced, out) > 1e-2


@torch.no_grad()
def test_more_input_channels_change_nothing_else():
    assert replace(STABLE_DIFFUSION, in_channels=8) == INSTRUCT_PIX2PIX
    with torch.device("meta"):
        four, eight = UNet(STABLE_DIFFUSION).state_dict(), UNet(INSTRUCT_PIX2PIX).state_dict()
    assert len(four) == 686
    different = [name for name in four if four[name].shape != eight[name].shape]
    assert four.keys() == eight.keys()
    assert different == ["conv_in.weight"]


def test_timestep_embedding_has_cosines_first():
    embedded = timestep_embedding(torch.tensor([0.0, 1.5]), 8)
    assert embedded[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(embedded[1, :2], torch.tensor([1.5, 0.15]).cos())
    torch.testing.assert_close(embedded[1, 4:6], torch.tensor([1.5, 0.15]).sin())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_on_a_gpu_stays_close(dtype):
    unet = randomise(UNet(SMALL["as the paper, thinner"]), seed=4).eval()
    z, context = inputs(unet.config, 32, 32)
    exact = unet(z, TIMES, context)
    unet.to("cuda", dtype)
    half = unet(z.to("cuda", dtype), TIMES.cuda(), context.to("cuda", dtype))
    assert relative_error(half.cpu(), exact) <= (3e-2 if dtype == torch.bfloat16 else 5e-3)
