"""CLIP's towers against transformers', and the tokenizer against its CLIPTokenizer."""

import random
from dataclasses import replace

import pytest
import torch
import transformers
from random_model import randomise
from reference import clip_reference, real_vocabulary, relative_error, text_reference

from clip_image import CLIP, CLIP_L_IMAGE, CLIPImageConfig
from clip_text import CLIP_L_TEXT, CLIPText, CLIPTextConfig, CLIPTokenizer

HARD = [  # accents apart from their letters, spaces of every width, control characters, other scripts, too
    "", " ", "make it night", "Make It NIGHT!!!", "  a\tb\n\nc  ",
    "don't stop, it's what they've wanted; we'll see, I'm sure you're 'right'",
    "the cats' tails, rock 'n' roll, o'clock, y'all'd've", "she's SHE'S she'S",
    "1234567890 3.14159 1,000,000 -40°C 50% $9.99 #1 2nd", "a1b2c3 mp3 4K 1080p h2o",
    "naïve café déjà vu, Ångström, señor, Zürich, straße, ŁÓDŹ", "cafe\u0301 nai\u0308ve", "사진을 밤으로 바꿔 줘",
    "말을 용으로 바꾸세요 dragon", "夜にしてください", "把它变成夜晚", "сделай это ночью", "اجعلها ليلا",
    "κάνε το νύχτα", "ทำให้เป็นกลางคืน", "इसे रात बनाओ", "😀", "turn the 🐱 into a 🐶🔥",
    "👩\u200d👩\u200d👧\u200d👦 family", "🏳️\u200d🌈 flag 🇰🇷", "👍🏽 skin tone", "a\u00a0b\u2003c\u3000d",
    "a\u200bb", "line\r\nbreak\x0bvertical\x0cform", "tab\there",
    "(photo:1.3), [masterpiece], {best}, <lora:x:1>", "C++ && || != == -> => <= >= :: // /* */",
    "https://example.org/a?b=c&d=%20#e", "user@example.org", "hyphen-ated en–dash em—dash ellipsis… dots...",
    "quotes \"double\" 'single' `back`", "slash/and\\backslash", "under_score and CamelCase",
    "½ ¼ ² ³ ™ © ® € £ ¥ § ¶", "∑ ∫ √ ∞ ≠ ≤ ≥ π", "→ ← ↑ ↓ ★ ☆ ♥ ♪", "ﬁ ﬂ ligatures", "ＦＵＬＬ ｗｉｄｔｈ １２３",
    "Ⅳ Ⅻ ① ②", "İstanbul ıI", "ẞ ß SS", "ǅ ǈ titlecase", "&amp; &lt;b&gt; &#39;",
    "<|startoftext|> in the middle", "stop<|endoftext|>here", "<|endoftext|>", "a" * 300, "word " * 200,
    "supercalifragilisticexpialidocious antidisestablishmentarianism", "\u0000 null \u0007 bell",
    "\ufeffbyte order mark", "\ufffd replacement", "\U0001f9d1\U0001f3fb\u200d\U0001f4bb", "ñ" * 100, "한" * 100,
    "'", "''' \"\"\"", "!" * 120,
    "make the sky look like Van Gogh's 'Starry Night', 1889, oil on canvas -- dramatic, 8k",
    "swap sunflowers with roses", "as if it were a Pixar movie (2012)", "x'y'z 'tis 'twas",
    "\u1e9b\u0323 \u0344 \u212b",
]


@pytest.fixture(scope="module")
def tokenizers():
    """(ours, transformers')."""
    vocabulary, merges = real_vocabulary()
    assert len(vocabulary) == 49408
    return CLIPTokenizer(vocabulary, merges), transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)


def theirs_of(tokenizer, texts):
    padded = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return padded.input_ids


def test_hard_strings_give_the_same_ids(tokenizers):
    ours, theirs = tokenizers
    assert len(set(HARD)) >= 60
    for text in HARD:
        assert ours([text]).tolist() == theirs_of(theirs, [text]).tolist(), repr(text)


def test_random_strings_give_the_same_ids(tokenizers):
    ours, theirs = tokenizers
    draw = random.Random(0)
    ranges = [(32, 127), (160, 0x250), (0x370, 0x500), (0x2000, 0x2070), (0xAC00, 0xAD00), (0x1F300, 0x1F600)]
    for _ in range(300):
        text = "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(40)))
        text = text.translate({ord(quote): None for quote in "\u2018\u2019\u201c\u201d"})
        assert ours([text]).tolist() == theirs_of(theirs, [text]).tolist(), repr(text)


def test_known_ids(tokenizers):
    """The ids that the released models saw; no other implementation is involved."""
    ids = tokenizers[0](["a photo of a cat", ""])
    assert ids.shape == (2, 77)
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert ids[1].tolist() == [49406] + [49407] * 76


def test_curly_quotes_are_straightened(tokenizers):
    ours, _ = tokenizers
    assert ours(["it\u2019s \u201cnight\u201d \u2018now\u2019"]).tolist() == ours(["it's \"night\" 'now'"]).tolist()


def test_what_is_cut_off_is_quoted(tokenizers):
    ours, _ = tokenizers
    assert ours.cut_off("make it night") == ""
    assert ours.cut_off("word " * 75) == ""
    assert ours.cut_off("Cat " * 75 + "Turn the SKY blue") == "Turn the SKY blue"
    assert ours(["word " * 500])[0, -1] == 49407


def test_a_tokenizer_survives_being_saved(tokenizers, tmp_path):
    ours, _ = tokenizers
    ours.save(tmp_path)
    again = CLIPTokenizer.load(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        assert again([text]).tolist() == ours([text]).tolist() == theirs_of(theirs, [text]).tolist()
    theirs.save_pretrained(tmp_path / "theirs")  # recent versions write tokenizer.json only
    (tmp_path / "theirs" / "vocab.json").unlink(missing_ok=True)
    assert CLIPTokenizer.load(tmp_path / "theirs")(HARD).tolist() == ours(HARD).tolist()


SMALL_TEXT = {
    "small": CLIPTextConfig(vocabulary=600, tokens=24, width=32, layers=2, heads=4, end_token=599),
    "one layer, gelu": CLIPTextConfig(
        vocabulary=100, tokens=9, width=24, layers=1, heads=1, activation="gelu", end_token=98
    ),
}


@pytest.mark.parametrize("name", SMALL_TEXT)
@torch.no_grad()
def test_small_text_towers_agree_with_transformers(name):
    config = SMALL_TEXT[name]
    text = randomise(CLIPText(config), seed=1).eval()
    ids = torch.randint(0, config.end_token, (5, config.tokens), generator=torch.Generator().manual_seed(0))
    ids[:, -3:] = config.end_token
    assert relative_error(text(ids), text_reference(text)(ids).last_hidden_state) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_full_size_text_tower_agrees_with_transformers(tokenizers):
    text = randomise(CLIPText(CLIP_L_TEXT), seed=2).eval()
    assert len(text.state_dict()) == 196
    ids = tokenizers[0](HARD[2:22])
    theirs = text_reference(text)(ids).last_hidden_state
    assert theirs.shape == (20, 77, 768)
    assert relative_error(text(ids), theirs) <= 1e-5


def clips_agree(clip, ids, pixels, size):
    theirs = clip_reference(clip)
    expected = theirs(input_ids=ids, pixel_values=pixels)
    projected = theirs.visual_projection(theirs.vision_model(pixel_values=pixels).pooler_output)
    assert relative_error(clip.image(pixels), projected) <= 1e-5
    assert relative_error(clip.text.features(ids), expected.text_embeds) <= 1e-5
    images = torch.rand(len(pixels), 3, 50, 70, generator=torch.Generator().manual_seed(3))
    same = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    expected = theirs(input_ids=ids, pixel_values=(same - mean) / std)
    assert relative_error(clip.image.features(images), expected.image_embeds) <= 1e-5
    assert relative_error(clip(ids, images), expected.logits_per_image) <= 1e-5
    half = len(images) // 2  # edits from the first half to the second
    found = clip.edit_similarities(images[:half], images[half:], ids[:half], ids[half:])
    (image0, image1), (text0, text1) = (x.split(half) for x in (expected.image_embeds, expected.text_embeds))
    vectors = (image0, text0), (image1, text1), (image1 - image0, text1 - text0), (image0, image1)
    for name, (x, y) in zip(("0", "1", "dir", "image"), vectors, strict=True):
        cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
        torch.testing.assert_close(found.pop(f"clip_sim_{name}"), cosine, rtol=0, atol=1e-5)
    assert not found


@torch.no_grad()
def test_small_clip_agrees_with_transformers():
    text = replace(SMALL_TEXT["small"], projection=20)
    clip = randomise(CLIP(text, CLIPImageConfig(32, 8, 48, 3, 4, projection=20)), seed=3).eval()
    ids = torch.randint(0, 599, (4, 24), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((3, 10, 22, 23)):  # the first end token counts, wherever it stands
        ids[row, end:] = 599
    clips_agree(clip, ids, torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), 32)


@pytest.mark.slow
@torch.no_grad()
def test_full_size_clip_agrees_with_transformers(tokenizers):
    clip = randomise(CLIP(replace(CLIP_L_TEXT, projection=768), CLIP_L_IMAGE), seed=4).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    clips_agree(clip, tokenizers[0](["a cat", "make it a very long night"]), pixels, 224)
