"""Prompt-to-Prompt: the same as with attention maps in memory, when it acts, and the random numbers of pairs."""

from itertools import islice

from cli import UserError

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import random_model, tiny_model
from reference import relative_error

import p2p
from align import Alignment, phrase_tokens
from attention import Layer, fused
from diffusion import euler_ancestral
from formats.checkpoint import save_folder
from p2p import CONTROLS, P_RANGE, LocalBlend, PairControl, PairNoise, main, sample_pairs
from stable_diffusion import StableDiffusion

pytestmark = pytest.mark.usefixtures("one_thread")

BEFORE, AFTER, OTHER = "a red house by the sea", "a blue tree at night", "nothing"
SHAPE = (4, 16, 16)
SELF, CROSS = (Layer(0, "down", cross, (4, 4)) for cross in (False, True))


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(random_model(seed=3, in_channels=4))


def with_maps(p, steps, step, kinds="self", alignment=None, scale=None):
    """The control as Hertz et al. have it: maps in memory, and the target's replaced by the source's, row by row."""

    def attend(q, k, v, layer):
        maps = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)  # [4B, H, N, M]
        pairs = len(q) // 4
        for row in range(pairs):
            null_before, null_after, before, after = range(row, 4 * pairs, pairs)
            active = p[row] * (steps - 1) > step
            if active and not layer.cross and kinds != "cross":
                maps[null_after] = maps[null_before]
                maps[after] = maps[before]
            if active and layer.cross and kinds != "self":
                borrowed = torch.einsum("hns,st->hnt", maps[before], alignment.mapper[row])
                a = alignment.shared[row]
                maps[after] = borrowed * a + maps[after] * (1 - a)
            if scale is not None and layer.cross:
                maps[after] = maps[after] * scale[row]
        return maps @ v

    return attend


def control(p, steps, step, kinds="self", alignment=None, scale=None):
    """Ours, as it is at this step."""
    attend = PairControl(steps, torch.tensor(p), kinds, alignment, scale)
    for passed in range(step):
        attend.next_step(passed, 1.0, None)
    return attend


def largest(x, y):
    return (x - y).abs().max().item()


# ---- one attention layer ----


@pytest.mark.parametrize("step", range(5))
def test_a_layer_equals_that_with_maps(step):
    """Three pairs: one that is never controlled, one at first, one till the last step but one."""
    share, generator = [0.0, 0.4, 0.9], torch.Generator().manual_seed(step)
    q, k, v = torch.randn(3, 12, 2, 16, 8, generator=generator)
    ours, theirs = (make(share, 5, step)(q, k, v, SELF) for make in (control, with_maps))
    assert largest(ours, theirs) <= 1e-5
    free = with_maps([0.0] * 3, 5, step)(q, k, v, SELF)
    changed = [row for row in range(12) if largest(ours[row], free[row]) > 0.1]
    assert changed == {0: [4, 5, 10, 11], 1: [4, 5, 10, 11], 4: []}.get(step, [5, 11])  # second images, both halves


TEXTS = [  # a swap of words of unequal token counts, a refinement, a swap of many
    ("a red tree by the sea", "a red mushroom by the sea"),
    ("a house at night", "a small red house at night"),
    ("a red house by the sea", "the blue tree at the night"),
]


def alignment_and_scale(model):
    """Of TEXTS, and a scale that singles out words of the captions after."""
    alignment, scale = Alignment.of(model.tokenizer, *zip(*TEXTS, strict=True)), torch.ones(3, model.tokenizer.tokens)
    for row, (words, factor) in enumerate((("red mushroom", -2.0), ("small", 3.0), ("tree", 0.0))):
        scale[row, phrase_tokens(model.tokenizer, TEXTS[row][1], words)] = factor
    return alignment, scale


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_attention_equals_that_with_maps(model, step, dtype):
    """Swap, refinement and re-weighting in a batch of three pairs."""
    (alignment, scale), generator = alignment_and_scale(model), torch.Generator().manual_seed(step)
    q = 2 * torch.randn(12, 2, 16, 8, generator=generator, dtype=dtype)
    k, v = torch.randn(2, 12, 2, model.tokenizer.tokens, 8, generator=generator, dtype=dtype)
    exact = Alignment(alignment.mapper.to(dtype), alignment.shared.to(dtype))
    for factors in (None, scale.to(dtype)):
        ours = control([0.9, 0.4, 1.0], 5, step, "cross", alignment, factors)(q, k, v, CROSS)
        theirs = with_maps([0.9, 0.4, 1.0], 5, step, "cross", exact, factors)(q, k, v, CROSS)
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) <= 1e-5
    free = with_maps([0.0] * 3, 5, step)(q, k, v, SELF)
    assert relative_error(control([0.9] * 3, 5, 0, "cross", alignment)(q, k, v, SELF), free) <= 1e-5


# ---- the whole network ----


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("kinds", CONTROLS)
def test_the_unet_equals_that_with_maps(model, kinds, step):
    (alignment, scale), generator = alignment_and_scale(model), torch.Generator().manual_seed(step)
    z = torch.randn(3, *SHAPE, generator=generator).repeat(4, 1, 1, 1)
    t = torch.tensor([700.0, 30.5, 250.0]).repeat(4)
    texts = [text for side in zip(*TEXTS, strict=True) for text in side]
    context = torch.cat([model.null_text.expand(6, -1, -1), model.encode_text(texts)])
    context = context + 0.3 * torch.randn(context.shape, generator=generator)  # so that the null halves differ, too
    chosen = [0.3, 0.8, 0.6], 5, step, kinds, alignment, None if kinds == "self" else scale
    ours, theirs, free = (
        model.unet(z, t, context, attend) for attend in (control(*chosen), with_maps(*chosen), with_maps([0] * 3, 5, 0))
    )
    assert relative_error(ours, theirs) <= 1e-5
    for first in (slice(0, 3), slice(6, 9)):  # the first images never depend on the control
        assert relative_error(ours[first], free[first]) <= 1e-5


# ---- pairs ----


def pairs(model, before, after, seeds, p=P_RANGE, steps=4, **settings):
    return sample_pairs(model, before, after, PairNoise(seeds, SHAPE, (3.0, 6.0), p), steps, **settings)


@torch.no_grad()
def test_a_pair_equals_one_written_out(model):
    """Every step of the sampler by hand, with maps in memory; numbers drawn in the order of the released code."""
    steps, seed = 5, 17
    generator = torch.Generator().manual_seed(seed)
    sigmas = model.schedule.sigmas(steps)
    x = torch.randn(1, *SHAPE, generator=generator).repeat(2, 1, 1, 1) * sigmas[0].item()
    p = 0.1 + 0.8 * torch.rand(1, generator=generator).item()
    guidance = 3 + 3 * torch.rand(1, generator=generator).item()
    assert 0.25 < p < 1
    context = torch.cat([model.null_text, model.null_text, model.encode_text([BEFORE, AFTER])])
    for step in range(steps):
        sigma, following = sigmas[step].item(), sigmas[step + 1].item()
        z = (x / (sigma**2 + 1) ** 0.5).repeat(2, 1, 1, 1)
        t = torch.full((4,), model.schedule.t(sigma).item())
        null, text = model.unet(z, t, context, with_maps([p], steps, step)).chunk(2)
        eps = null + guidance * (text - null)
        up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
        x = x + eps * ((following**2 - up**2) ** 0.5 - sigma)
        if following > 0:
            x = x + up * torch.randn(1, *SHAPE, generator=generator)
    expected = model.vae.decode(x / model.vae.config.scaling)

    before, after = pairs(model, [BEFORE], [AFTER], [seed], steps=steps)
    assert before.shape == after.shape == (1, 3, 64, 64)
    assert relative_error(before, expected[:1]) <= 1e-4
    assert relative_error(after, expected[1:]) <= 1e-4
    assert relative_error(after, before) > 0.1


@pytest.mark.parametrize("control", CONTROLS)
def test_a_batch_equals_its_pairs_one_by_one(model, control):
    befores, afters = ([pair[side] for pair in TEXTS] for side in (0, 1))
    seeds = [7, 2**40, 7]
    together = pairs(model, befores, afters, seeds, control=control)
    for row, seed in enumerate(seeds):
        alone = pairs(model, [befores[row]], [afters[row]], [seed], control=control)
        for many, one in zip(together, alone, strict=True):
            assert relative_error(many[row], one[0]) <= 1e-4
    assert largest(together[1][2], together[1][0]) > 0.1


@pytest.mark.parametrize("control", CONTROLS)
def test_pairs_that_fail_are_given_up_and_the_others_are_as_before(model, control):
    """From 40 % of the steps on, in smaller batches; the second of three is given up, then all are."""
    befores, afters = ([pair[side] for pair in TEXTS] for side in (0, 1))
    seeds, rows, shown = [7, 8, 9], [], []
    hook = model.unet.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))

    def fails(before, after):
        shown.append((before, after))
        return torch.tensor([False, True, False])

    whole = pairs(model, befores, afters, seeds, steps=5, p=(0.8, 0.9), control=control)
    rows.clear()
    part = pairs(model, befores, afters, seeds, steps=5, p=(0.8, 0.9), control=control, fails=fails)
    assert rows == [12, 12, 8, 8, 8]
    for x, y, (guess,) in zip(whole, part, zip(*shown, strict=True), strict=True):
        assert relative_error(y[::2], x[::2]) <= 1e-4
        assert relative_error(y[1], x[1]) > 0.01
        assert guess.shape == x.shape
    rows.clear()
    pairs(model, befores, afters, seeds, steps=5, fails=lambda x, y: torch.ones(3, dtype=torch.bool))
    hook.remove()
    assert rows == [12, 12]


# ---- local blending ----


def test_the_mask_is_where_words_are_looked_at():
    """Maps made by hand: only one query of each image looks at the word; pooling adds its neighbours."""
    words = torch.zeros(2, 5)
    words[0, 1] = words[1, 3] = 1
    blend = LocalBlend(words, 10, size=(4, 4), threshold=0.5)
    q, k = torch.zeros(4, 1, 16, 2), torch.zeros(4, 1, 5, 2)
    k[2, 0, 1] = k[3, 0, 3] = q[2, 0, 0] = q[3, 0, 15] = torch.tensor([9.0, 0.0])
    v = torch.randn(4, 1, 5, 2, generator=torch.Generator().manual_seed(0))
    attend = blend.watch(fused)
    with pytest.raises(UserError, match="local blending needs cross-attention at 4x4"):
        blend.mask(8, 8)
    assert torch.equal(attend(q, k, v, CROSS), fused(q, k, v, CROSS))
    attend(q[:, :, :4], k, v, Layer(0, "middle", True, (2, 2)))  # another size, not looked at
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, :4] = expected[4:, 4:] = True
    assert torch.equal(blend.mask(8, 8)[0, 0], expected)


def test_blending_watches_the_maps_that_are_used(model):
    """With cross-attention control, the second image looks with the first one's maps, as in the released code."""
    alignment, generator = alignment_and_scale(model)[0], torch.Generator().manual_seed(0)
    words = torch.zeros(6, model.tokenizer.tokens)
    words[:, 2] = 1
    q, (k, v) = torch.randn(12, 2, 16, 8, generator=generator), torch.randn(2, 12, 2, 24, 8, generator=generator)
    chosen, blend = ([0.9] * 3, 5, 0, "cross", alignment), LocalBlend(words, 5, size=(4, 4))
    blend.watch(control(*chosen))(q, k, v, CROSS)
    column = torch.zeros(12, 2, 24, 1)
    column[6:, :, 2] = 1
    expected = with_maps(*chosen)(q, k, column, CROSS)[6:, ..., 0].mean(1)
    assert relative_error(blend.seen, expected) <= 1e-5


@torch.no_grad()
def test_blending_starts_at_a_fifth_of_the_steps_and_leaves_the_first_image_alone(model):
    """From then on the second latent is the first one outside the mask, after every step, as in the released code."""
    marks = torch.zeros(2, model.tokenizer.tokens)
    for row, (text, words) in enumerate(((BEFORE, "house"), (AFTER, "tree"))):
        marks[row, phrase_tokens(model.tokenizer, text, words)] = 1
    blend, apart = LocalBlend(marks, 10, size=(8, 8), threshold=0.95), []

    def sampler(denoise, x, sigmas, noise, callback):
        def watched(x, sigma):
            mask = blend.mask(16, 16)[0] if blend.step else torch.zeros(1, dtype=torch.bool)  # of the steps so far
            denoised = denoise(x, sigma)
            apart.append(torch.where(mask, 0, (x[1] - x[0]).abs()).max().item())
            return denoised

        latent = euler_ancestral(watched, x, sigmas, noise, callback)
        apart.append(torch.where(blend.mask(16, 16)[0], 0, (latent[1] - latent[0]).abs()).max().item())
        return latent

    free = pairs(model, [BEFORE], [AFTER], [5], steps=10)
    blended = pairs(model, [BEFORE], [AFTER], [5], steps=10, sampler=sampler, blend=blend)
    assert [value < 1e-4 for value in apart] == [True, False, False] + [True] * 8  # equal noise; steps 0 and 1 are free
    assert 0 < blend.mask(16, 16).float().mean() < 1
    assert relative_error(blended[0], free[0]) <= 1e-5
    assert largest(blended[1], free[1]) > 0.01


# ---- the program ----


def test_the_program_draws_fig_3(tmp_path, capsys):
    out = tmp_path / "new" / "pair.png"
    texts = [f"a painting of a large red house on the left {where}" for where in ("by the sea", "at night")]
    common = ["--source", texts[0], "--target", texts[1], "--steps", "2", "--num", "1", "--out", str(out)]
    common += ["--p", "0", "0.9", "--control", "both", "--reweight", "night=2", "--blend", "sea", "night"]
    main(common)
    shown = capsys.readouterr()
    assert shown.out.strip() == str(out)
    assert "/4 [" in shown.err  # steps of the pairs and of the image with other noise
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 128
        whole = np.asarray(sheet).astype(int)
    main([*common, "--low-memory"])  # one P at a time
    assert "/6 [" in capsys.readouterr().err
    with Image.open(out) as sheet:
        assert np.abs(np.asarray(sheet) - whole).max() <= 1


def test_the_programs_resolution_and_number_format(tmp_path):
    save_folder(tiny_model(in_channels=4), tmp_path / "sd")
    sheets = []
    for number, dtype in enumerate(("float32", "bfloat16")):
        out = tmp_path / f"{number}.png"
        flags = ["--weights", str(tmp_path / "sd"), "--dtype", dtype, "--resolution", "144", "--num", "1"]
        main(["--source", "a house", "--target", "a sea", "--out", str(out), *flags])
        sheets.append(np.asarray(Image.open(out)).astype(int))
    assert sheets[0].shape[1] > 6 * 144
    assert 0 < np.abs(sheets[1] - sheets[0]).mean() < 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--reweight", "day=2"], 'does not hold the words "day"'),
        (["--blend", "sea", "sea"], 'does not hold the words "sea"'),
        (["--p", "1.5"], "--p: should be from 0 to 1"),
        (["--device", "abacus"], "no device abacus"),
        (["--resolution", "100"], "--resolution should be a multiple of 16"),
    ],
)
def test_mistakes_are_answered(tmp_path, run_main, wrong, message):
    out = tmp_path / "pair.png"
    source = ["--source", "a house by the sea", "--target", "a house at night"]
    code, _, lines = run_main(p2p, *source, "--out", out, *wrong)
    assert (code, len(lines)) == (2, 1 + lines[0].startswith("loading "))
    assert message in lines[-1]
    assert not out.exists()


# ---- random numbers ----


def test_on_a_gpu_p_and_the_scale_come_from_the_cpu(monkeypatch):
    """As in the released code, whose seeds its pairs can then be made from again; "meta" stands for a GPU here."""
    drawn, rand = [], torch.rand

    class Generator(torch._C.Generator):
        def __new__(cls, device="cpu"):
            drawn.append(device)
            return torch._C.Generator("cpu")

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.empty(shape, device="meta"))
    noise = PairNoise([11], (4, 2, 3), (7.5, 15.0), device="meta")
    assert drawn == ["meta", "cpu"]
    assert noise.p.device.type == "cpu"
    generator = torch._C.Generator("cpu")
    generator.manual_seed(11)
    assert noise.p.item() == pytest.approx(0.1 + 0.8 * rand((), generator=generator).item())


def draws(noise, count=3):
    """The noise of some steps [count, 2B, ...]."""
    return torch.stack(list(islice(noise, count)))


def test_numbers_are_drawn_in_the_order_of_the_released_code():
    noise = PairNoise([11], (4, 2, 3), (7.5, 15.0))
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(noise.first, torch.randn(1, 4, 2, 3, generator=generator).repeat(2, 1, 1, 1))
    assert noise.p.item() == pytest.approx(0.1 + 0.8 * torch.rand((), generator=generator).item())
    assert noise.guidance.item() == pytest.approx(7.5 + 7.5 * torch.rand((), generator=generator).item())
    for draw in draws(noise):
        assert torch.equal(draw, torch.randn(1, 4, 2, 3, generator=generator).repeat(2, 1, 1, 1))
