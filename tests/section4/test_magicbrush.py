"""MagicBrush's metrics and DINO against transformers, and the layout of MagicBrush."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import colourful
from random_model import randomise, small_tokenizer
from reference import clip_reference, relative_error
from safetensors.torch import save_file

import evaluate
from clip_image import CLIP, DINO, CLIPImageConfig
from clip_text import CLIPTextConfig
from formats.checkpoint import load_dino, save_clip
from formats.weights import renamed

pytestmark = pytest.mark.usefixtures("one_thread")
TURNS = {"30": 1, "139": 3}


@pytest.fixture(scope="module")
def clip():
    tokenizer = small_tokenizer()
    text = CLIPTextConfig(len(tokenizer.vocabulary), tokenizer.tokens, 16, 1, 2, end_token=tokenizer.end, projection=8)
    return randomise(CLIP(text, CLIPImageConfig(28, 7, 16, 1, 2, projection=8)), 0).eval(), tokenizer


@pytest.fixture(scope="module")
def dino():
    """(ours, transformers' with the same weights)."""
    config = CLIPImageConfig(28, 7, 24, 2, 3, activation="gelu", projection=24)
    ours = randomise(DINO(config), 1).eval()
    theirs = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
                               image_size=28, patch_size=7, layer_norm_eps=1e-6), add_pooling_layer=False)  # fmt: skip
    weights = {}
    for name, value in renamed(ours, "diffusers", None).items():
        if name.startswith("embeddings.") and "patch" not in name:
            value = value.reshape(1, -1, 24)
        for old, new in (("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
                         ("attention.attention.key", "attention.k_proj"), ("intermediate.dense", "mlp.fc1"),
                         ("attention.attention.value", "attention.v_proj"),
                         ("attention.output.dense", "attention.o_proj"), (".output.dense", ".mlp.fc2")):  # fmt: skip
            name = name.replace(old, new)
        weights[name] = value
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip, dino):
    """Edits, true images and captions in MagicBrush's layout, and the models on disk."""
    root, seed, captions = tmp_path_factory.mktemp("magicbrush"), 0, {}
    save_clip(*clip, root / "clip")
    (root / "dino").mkdir()
    weights = renamed(dino[0], "diffusers", None)
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        weights[name] = weights[name].reshape(1, -1, 24)
    pooler = {"pooler.dense.weight": torch.zeros(24, 24), "pooler.dense.bias": torch.zeros(24)}
    save_file(weights | pooler, root / "dino" / "model.safetensors")
    values = {"image_size": 28, "patch_size": 7, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    (root / "dino" / "config.json").write_text(json.dumps(values | {"hidden_act": "gelu", "layer_norm_eps": 1e-12}))
    for name, turns in TURNS.items():
        for part in ("generated", "truth"):
            (root / part / name).mkdir(parents=True)
        captions[name] = {f"{name}-output{turn}.png": f"turn {turn} of {name}" for turn in range(1, turns + 1)}
        for turn in range(1, turns + 1):
            edits = [f"{name}_1"] if turn == 1 else [f"{name}_inde_{turn}", f"{name}_iter_{turn}"]
            for place in [f"truth/{name}/{name}-output{turn}", *(f"generated/{name}/{edit}" for edit in edits)]:
                size = (61, 47) if "truth" in place else (50, 50)
                colourful(*size, seed := seed + 1).save(root / f"{place}.png")
        colourful(61, 47).save(root / "truth" / name / f"{name}-mask1.png")
    (root / "captions.json").write_text(json.dumps(captions))
    return root


def arguments(folder, out):
    named = {"generated": "generated", "truth": "truth", "captions": "captions.json", "clip": "clip", "dino": "dino"}
    return ["magicbrush", *(f"--{name}={folder / place}" for name, place in named.items()), f"--out={out}"]


def test_dino_equals_transformers(dino, folder):
    x = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dino[1](x).last_hidden_state[:, 0]
        assert relative_error(dino[0](x), expected) < 1e-5
        assert relative_error(load_dino(folder / "dino")(x), expected) < 1e-5


@torch.no_grad()
def independent(clip, dino, folder, edit, name, turn):
    """The five metrics by transformers' image processor, model and tokens, and by numpy."""
    from PIL import Image

    def features(model, image, resize, mean, std):
        processor = transformers.CLIPImageProcessorPil if hasattr(transformers, "CLIPImageProcessorPil") else None
        processor = (processor or transformers.CLIPImageProcessor)(
            size={"shortest_edge": resize}, crop_size=28, image_mean=mean, image_std=std)  # fmt: skip
        return model(torch.as_tensor(np.array(processor(image)["pixel_values"])))

    image = Image.open(folder / "truth" / name / f"{name}-output{turn}.png")
    made = Image.open(folder / "generated" / name / f"{edit}.png")
    ours, true = np.asarray(made.resize(image.size)) / 255, np.asarray(image) / 255
    theirs = clip_reference(clip[0])

    def clip_features(x):
        return theirs.visual_projection(theirs.vision_model(pixel_values=x).pooler_output)[0]

    def dino_features(x):
        return dino[1](x).last_hidden_state[0, 0]

    openai = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    imagenet = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    a, b = (features(clip_features, one, 28, *openai) for one in (made, image))
    c, d = (features(dino_features, one, 32, *imagenet) for one in (made, image))
    ids = clip[1]([f"turn {turn} of {name}"])
    text = theirs.text_projection(theirs.text_model(input_ids=ids).pooler_output)[0]
    cosines = [torch.cosine_similarity(*pair, dim=0).item() for pair in ((a, b), (c, d), (a, text))]
    return [np.abs(ours - true).mean(), np.square(ours - true).mean(), *cosines]


def test_the_metrics_equal_those_of_transformers(clip, dino, folder, tmp_path):
    evaluate.main(arguments(folder, tmp_path / "out"))
    single, multi, published = json.loads((tmp_path / "out" / "magicbrush.json").read_text())
    edits = [("30_1", "30", 1), ("139_1", "139", 1), ("139_inde_2", "139", 2), ("139_inde_3", "139", 3)]
    for row, chosen in ((single, edits), (multi, [("30_1", "30", 1), ("139_iter_3", "139", 3)])):
        expected = np.mean([independent(clip, dino, folder, *one) for one in chosen], axis=0)
        assert [row[key] for key in ("l1", "l2", "clip_i", "dino", "clip_t")] == pytest.approx(expected, abs=1e-5)
    assert published["clip_i"] == 0.8524


def test_a_missing_turn_is_named(folder, tmp_path, run_main):
    (folder / "generated" / "139" / "139_inde_2.png").rename(folder / "kept.png")
    code, _, (line,) = run_main(evaluate, *arguments(folder, tmp_path))
    (folder / "kept.png").rename(folder / "generated" / "139" / "139_inde_2.png")
    assert code == 2
    assert "139 holds 2 single edits" in line
