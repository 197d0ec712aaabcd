"""The edit as a whole against diffusers' pipeline, guidance, and the training loss."""

from cli import UserError

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from random_model import random_model, randomise
from reference import edit_reference, real_vocabulary, relative_error

from clip_text import CLIP_L_TEXT, CLIPText, CLIPTokenizer
from diffusion import NoiseSchedule, Sampling, euler, seeded_noise
from formats.checkpoint import Model, save_folder, save_single_file
from images import resize_and_crop, to_tensor
from ip2p import InstructPix2Pix, drop_conditions, guided_eps, loss
from unet import INSTRUCT_PIX2PIX, UNet
from vae import STABLE_DIFFUSION_VAE, VAE

INSTRUCTION = "make it the night, while nothing is moving"


def image_of(width=192, height=128, seed=0):
    """Coarse random colours, smooth as photographs are."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "folder"
    model = random_model(seed=1)
    save_folder(model, folder)
    save_single_file(model, folder / "single.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return InstructPix2Pix.load(folder)


def difference(ours, theirs):
    """The largest difference of two uint8 images."""
    return np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max()


def test_an_edit_equals_that_of_diffusers(folder, model):
    """Its own pipeline, opened from our folder, at equal noise levels and noise; and our single file gives the same."""
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    for seed, size in ((0, (192, 128)), (7, (128, 128))):
        image = image_of(*size, seed=seed)
        edited = model.edit(image, INSTRUCTION, seed=seed, resolution=max(size))
        assert edited.size == size
        assert np.asarray(edited).std() > 20
        assert difference(edited, edit_reference(pipeline, model, image, INSTRUCTION, seed)) <= 1
    single = InstructPix2Pix.load(folder / "single.safetensors")
    assert difference(single.edit(image, INSTRUCTION, seed=7), edited) == 0


@pytest.mark.slow
def test_a_full_size_edit_equals_that_of_diffusers(tmp_path):
    """Stable Diffusion's sizes and CLIP's vocabulary, three steps at 256x192."""
    networks = UNet(INSTRUCT_PIX2PIX), VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT)
    networks = [randomise(network, seed).eval() for seed, network in enumerate(networks)]
    sampling = Sampling(steps=3, resolution=256)
    save_folder(Model(*networks, CLIPTokenizer(*real_vocabulary()), sampling), tmp_path / "model")
    del networks
    model = InstructPix2Pix.load(tmp_path / "model")
    image = image_of(256, 192)
    edited = model.edit(image, INSTRUCTION, seed=3)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "model")
    assert np.asarray(edited).std() > 20
    assert difference(edited, edit_reference(pipeline, model, image, INSTRUCTION, 3)) <= 1


def test_a_batch_of_seeds_equals_them_one_by_one(model):
    image = image_of()
    together = model.edit(image, INSTRUCTION, seed=[3, 11, 3])
    alone = [model.edit(image, INSTRUCTION, seed=seed) for seed in (3, 11)]
    assert difference(together[0], together[2]) <= 1
    assert difference(together[0], alone[0]) <= 1
    assert difference(together[1], alone[1]) <= 1
    assert difference(alone[0], alone[1]) > 20


def test_guidance_may_differ_within_a_batch(model):
    image = image_of()
    pair = model.edit(image, INSTRUCTION, text_guidance=[1, 9], image_guidance=[2.0, 1.0], seed=[5, 5])
    assert difference(pair[0], model.edit(image, INSTRUCTION, 1, 2.0, seed=5)) <= 1
    assert difference(pair[1], model.edit(image, INSTRUCTION, 9, 1.0, seed=5)) <= 1
    assert difference(*pair) > 20


def test_low_memory_gives_the_same(model, monkeypatch):
    """One row of the batch after another."""
    batches, forward = [], model.unet.forward

    def counted(z, *others):
        batches.append(len(z))
        return forward(z, *others)

    monkeypatch.setattr(model.unet, "forward", counted)
    usual = model.edit(image_of(), INSTRUCTION, seed=2)
    assert batches == [3] * 10
    batches.clear()
    frugal = model.edit(image_of(), INSTRUCTION, seed=2, low_memory=True)
    assert batches == [1] * 30
    assert difference(usual, frugal) <= 1


def test_another_sampler_and_no_guidance(model):
    """With both scales 1, Eq. 3 leaves the plain conditional guess."""
    image = image_of()
    edited = model.edit(image, INSTRUCTION, 1, 1, seed=4, sampler="euler")
    image_latent = model.encode_image(to_tensor(resize_and_crop(image, 128))[None])
    text = model.encode_text([INSTRUCTION])

    def predict_eps(z, t):
        return model.unet(torch.cat([z, image_latent], 1), torch.tensor([t]), text)

    sigmas = model.schedule.sigmas(10)
    noise = next(seeded_noise(image_latent.shape[1:], [4]))
    with torch.no_grad():
        latent = euler(model.schedule.denoiser(predict_eps), noise * sigmas[0].item(), sigmas)
        x = model.vae.decode(latent / model.vae.config.scaling)[0]
    assert difference(((x + 1) / 2).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy(), edited) <= 1


def test_the_image_latent_is_the_unscaled_mode(model):
    x = to_tensor(image_of())[None]
    with torch.no_grad():
        assert torch.equal(model.encode_image(x), model.vae.encode(x).mode())


def test_eq_3():
    full, image, null = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guided_eps(full, image, null, 1, 1), full)
    torch.testing.assert_close(guided_eps(full, image, null, 0, 1), image)
    torch.testing.assert_close(guided_eps(full, image, null, 0, 0), null)
    torch.testing.assert_close(guided_eps(full, image, null, 7.5, 1.5), 7.5 * full - 6 * image - 0.5 * null)


def test_dropping_conditions():
    """One draw an example: text only, both, image only, none."""
    u = torch.tensor([0.0, 0.049, 0.05, 0.099, 0.10, 0.149, 0.15, 0.99])
    text, image, null = torch.ones(8, 3, 2), torch.ones(8, 4, 2, 2), torch.full((1, 3, 2), 7.0)
    new_text, new_image = drop_conditions(text, image, null, u)
    assert new_text[:, 0, 0].tolist() == [7, 7, 7, 7, 1, 1, 1, 1]
    assert new_image[:, 0, 0, 0].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert torch.equal(text, torch.ones(8, 3, 2))

    many = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    text, image = drop_conditions(torch.ones(100_000, 1, 1), torch.ones(100_000, 1, 1, 1), torch.zeros(1, 1, 1), many)
    text, image = text.flatten() == 1, image.flatten() == 1
    for share in (~text & image, ~text & ~image, text & ~image):
        assert share.float().mean().item() == pytest.approx(0.05, abs=0.003)


def test_eq_1_equals_a_step_written_with_diffusers():
    """The loss and its gradient, computed apart with diffusers' UNet and scheduler."""
    from reference import unet_reference

    model = random_model(seed=8)
    unet = model.unet.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    latent, image, noise = torch.randn(3, 4, 4, 16, 16, generator=generator)
    text, null = torch.randn(4, 24, 32, generator=generator), torch.randn(1, 24, 32, generator=generator)
    t, u = torch.tensor([0, 300, 700, 999]), torch.tensor([0.5, 0.01, 0.07, 0.12])
    ours = loss(unet, NoiseSchedule(), latent, image, text, null, t, noise, u)
    assert ours.shape == (4,)
    ours.mean().backward()

    theirs = unet_reference(random_model(seed=8).unet).requires_grad_(True)
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    text_seen = torch.stack([text[0], null[0], null[0], text[3]])
    image_seen = torch.stack([image[0], image[1], torch.zeros_like(image[2]), torch.zeros_like(image[3])])
    noisy = scheduler.add_noise(latent, noise, t)
    eps = theirs(torch.cat([noisy, image_seen], 1), t, text_seen).sample
    expected = torch.nn.functional.mse_loss(eps, noise)
    expected.backward()
    assert ours.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(unet.conv_in.weight.grad, theirs.conv_in.weight.grad) <= 1e-5
    assert relative_error(unet.conv_out.weight.grad, theirs.conv_out.weight.grad) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_guidance": -1}, "text guidance"),
        ({"image_guidance": float("nan")}, "image guidance"),
        ({"resolution": 8}, "resolution"),
        ({"seed": []}, "seed"),
        ({"text_guidance": [1, 2], "seed": [1, 2, 3]}, "one has 2, another 3"),
        ({"steps": 2.5}, "steps should be a whole number between 1 and 1000, not 2.5"),
        ({"resolution": (64, 64)}, "resolution should be a whole number"),
        ({"text_guidance": "2"}, "text guidance"),
        ({"seed": 1.5}, "seed"),
        ({"instruction": None}, "should be a text, not NoneType"),
        ({"instruction": ["a", 3]}, "should be a text, not int"),
        ({"instruction": []}, "not empty: one has"),
        ({"instruction": ["a", "b"], "seed": [1, 2, 3]}, "one has 2, another 3"),
        ({"image": None}, "should be one of PIL's, a file's path, or an array"),
        ({"image": np.zeros((64, 64, 3))}, "should be one of PIL's, a file's path, or an array"),
        ({"image": np.zeros((4, 64, 3), np.uint8)}, "at least 8 pixels"),
        ({"image": "no/such.png"}, "no/such.png cannot be read"),
        ({"mask": image_of(64, 64)}, "the mask is 64x64, the image 192x128"),
    ],
)
def test_settings_out_of_range(model, settings, message):
    with pytest.raises(UserError, match=message):
        model.edit(**{"image": image_of(), "instruction": INSTRUCTION} | settings)


def test_images_and_instructions_of_other_types(model, tmp_path):
    """A path and an array are the image; each of a list of instructions is edited by, with its own seed or the same."""
    image = image_of()
    image.save(tmp_path / "x.png")
    expected = model.edit(image, INSTRUCTION, steps=2, seed=3)
    for same in (str(tmp_path / "x.png"), tmp_path / "x.png", np.asarray(image)):
        assert difference(model.edit(same, INSTRUCTION, steps=np.int64(2), seed=np.int64(3)), expected) == 0
    for seeds in (3, [3, 3]):
        edited = model.edit(image, [INSTRUCTION, "add a boat"], steps=2, seed=seeds)
        assert difference(edited[0], expected) <= 1
        assert difference(edited[1], model.edit(image, "add a boat", steps=2, seed=3)) <= 1


def test_a_batch_of_images_equals_them_one_by_one(model):
    images, texts = [image_of(), image_of(seed=1)], [INSTRUCTION, "make it winter"]
    together = model.edit(images, texts, seed=[3, 4])
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        assert difference(together[number], model.edit(image, text, seed=3 + number)) <= 1
    with pytest.raises(UserError, match="edited at one size"):
        model.edit([image_of(), image_of(128, 128)], INSTRUCTION)


def test_outside_a_mask_nothing_changes(model):
    image, mask = image_of(128, 128), Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 90, 90))
    edited, black = np.array(model.edit(image, INSTRUCTION, mask=mask)), np.array(mask) == 0
    assert np.array_equal(edited[black], np.array(image)[black])
    assert abs(edited.astype(int) - np.array(image))[~black].mean() > 20
    everywhere = Image.new("L", (128, 128), 255)
    assert difference(model.edit(image, INSTRUCTION, mask=everywhere), model.edit(image, INSTRUCTION)) <= 1
    # inside, too, the sampler has seen the input outside the mask
    assert difference(edited[45:85, 45:85], np.array(model.edit(image, INSTRUCTION))[45:85, 45:85]) > 20


def test_the_guess_outside_a_mask_is_the_input(model):
    latent, mask, guesses = torch.randn(1, 4, 8, 8), torch.zeros(1, 1, 8, 8), []
    mask[..., :4] = 1
    text = model.encode_text([INSTRUCTION])

    def callback(step, sigma, denoised):
        guesses.append(denoised)

    model.sample(text, latent, [0], 7.5, 1.5, 3, mask=mask, callback=callback)
    for guess in guesses:
        assert torch.equal(guess[..., 4:], (latent * model.vae.config.scaling)[..., 4:])
        assert (guess - latent * model.vae.config.scaling)[..., :4].abs().min() > 0


def test_a_negative_text_takes_the_place_of_the_empty_one(model):
    image = image_of(128, 128)
    usual, negative = model.edit(image, INSTRUCTION), model.edit(image, INSTRUCTION, negative="the ship of the fog")
    assert difference(usual, negative) > 20
    assert difference(model.edit(image, INSTRUCTION, negative=""), usual) == 0
    # guidance by 1 and 1 is the full prediction alone, whatever is empty
    alike = [model.edit(image, INSTRUCTION, 1, 1, negative=text) for text in ("", "the ship of the fog")]
    assert difference(*alike) <= 1


def test_a_region_is_where_removing_the_words_changes_the_prediction(model, monkeypatch):
    def predict_eps(z, t, text, **others):
        eps = torch.zeros_like(z[:, :4])
        if torch.equal(text[0], model.encode_text(["remove the hat"])[0]):
            eps[0, :, : z.shape[2] // 2, : z.shape[3] // 6] = 1.0
        return eps

    monkeypatch.setattr(model, "predict_eps", predict_eps)
    region = np.array(model.region(image_of(), "the hat"))
    assert region.shape == (128, 192)
    assert (region[:56, :28] == 255).all()
    assert (region[:, 96:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_edit_on_a_gpu(folder, dtype):
    model = InstructPix2Pix.load(folder, "cuda", dtype)
    edited = np.asarray(model.edit(image_of(), INSTRUCTION)).astype(float)
    assert edited.std() > 20
