"""CLIP for the miniature's world, and its tokenizer, from nothing: the second stage of `mini.pretrain`."""

import json

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from clip_image import CLIP, CLIPImageConfig
from clip_text import END, START, CLIPTextConfig, CLIPTokenizer
from formats.checkpoint import save_clip
from mini.scenes import to_images
from mini.world import KINDS, SIZE, caption, random_edit

MINI_IMAGE = CLIPImageConfig(size=SIZE, patch=8, width=128, layers=4, heads=4, projection=128)
MINI_TOKENS = 24


def world_texts():
    """Captions and instructions of training, a few of every kind: what the tokenizer and CLIP read."""
    rng = np.random.default_rng(0)
    edits = [random_edit(rng, kind) for kind in KINDS for _ in range(1500)]
    return [text for edit in edits for text in (caption(edit.before), edit.instruction, caption(edit.after))]


def train_tokenizer(texts, tokens=MINI_TOKENS):
    """A byte-level BPE in CLIP's format: after the merges, every word of the world is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.pre_tokenizer = CLIPTokenizer({START: 0, END: 1}, []).bpe.pre_tokenizer
    letters, end = sorted(pre_tokenizers.ByteLevel.alphabet()), "</w>"
    learning = {"initial_alphabet": letters, "end_of_word_suffix": end, "min_frequency": 2, "vocab_size": 2000}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**learning, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: the bytes, the bytes that end a word, the merges, the two special tokens
    pieces = letters + [letter + end for letter in letters] + [a + b for a, b in merges] + [START, END]
    return CLIPTokenizer({piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges, tokens)


def clip_stage(options, settings, drawn, pixels, held_out, images):
    """Both towers by the contrastive loss (Radford et al. 2021), on captions and images.

    Captions hold no instructions, so the text tower would never learn their words. A second loss, on texts alone,
    pulls an instruction towards the difference of the captions after and before it. No edited image is shown.
    Each process contrasts its own rows of the total batch.
    """
    device, tokenizer = options.device, train_tokenizer(world_texts())
    size = len(tokenizer.vocabulary)
    text = CLIPTextConfig(size, MINI_TOKENS, 128, layers=4, heads=4, end_token=tokenizer.end, projection=128)
    clip = CLIP(text, MINI_IMAGE).to(device)
    for name, weight in clip.named_parameters():
        if "embedding" in name:  # small, as CLIP's authors start from; torch's own are fifty times larger
            nn.init.normal_(weight, std=0.02)
    captions = tokenizer([caption(scene) for scene in drawn])
    rng = np.random.default_rng(settings.seed)
    edits = [random_edit(rng) for _ in range(min(20_000, options.scenes))]
    triplets = [(caption(edit.before), edit.instruction, caption(edit.after)) for edit in edits]
    triplets = torch.stack([tokenizer(triplet) for triplet in triplets], dim=1)  # [3, edits, L]

    def loss_of(network, draws):
        chosen, picked = draws.integers(len(drawn)).numpy(), draws.integers(len(edits)).numpy()
        ids = triplets[:, picked[: max(1, len(picked) // 4)]]
        x = (to_images(pixels[chosen], device) + 1) / 2
        with options.autocast():
            image = network.image.features(x).float()
            words = network.text.features(captions[chosen].to(device)).float()
            before, instruction, after = network.text.features(ids.flatten(0, 1).to(device)).float().chunk(3)
        scale = network.logit_scale.exp().clamp(max=100)
        turn = F.normalize(after - before, dim=-1)
        loss = contrast(scale * image @ words.T, captions[chosen])
        return loss + 0.5 * contrast(10 * instruction @ turn.T, ids[1])

    def finish(clip):
        save_clip(clip, tokenizer, options.out / "clip_model", torch.float16)
        texts = [caption(scene) for scene in held_out]
        best = (clip.image.features((images + 1) / 2) @ clip.text.features(tokenizer(texts).to(device)).T).argmax(1)
        right = [texts[found] == text for found, text in zip(best.tolist(), texts, strict=True)]
        return {f"image to caption, first of {len(texts)}": float(np.mean(right))}

    return clip, loss_of, None, finish


def contrast(logits, ids):
    """The symmetric contrastive loss of logits [B, B]; texts that are equal (ids [B, L]) count as right alike."""
    same = (ids[:, None] == ids[None]).all(2).float().to(logits.device)
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
