"""CLIP's text tower (Radford et al. 2021): it turns an instruction into the context that the UNet attends to.

Stable Diffusion conditions on the LAST hidden states [B, L, E], all L = 77 of them, padding included. CLIP itself,
which measures edits, uses one vector a text: the state at the end token, projected (`CLIPText.features`).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cli import reported_as

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import nn

from attention import fused, join_heads, split_heads

START, END = "<|startoftext|>", "<|endoftext|>"


def quick_gelu(x):
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.functional.gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """Everything that may differ between two text towers."""

    vocabulary: int = 49408
    tokens: int = 77  # L
    width: int = 768  # E
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"
    end_token: int = 49407
    projection: int | None = None  # width of the space shared with the images; None: the tower only conditions


CLIP_L_TEXT = CLIPTextConfig()


class CLIPText(nn.Module):
    """Token ids to context, and to CLIP's text feature."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.tokens, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.activation) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width, eps=1e-5)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None

    def forward(self, ids):
        """ids [B, L] -> the last hidden states after the final norm [B, L, E]. Only future tokens are masked."""
        h = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h, causal=True)
        return self.norm_out(h)

    def features(self, ids):
        """ids [B, L] -> unit vectors [B, projection], comparable with those of `CLIPImage.features`."""
        end = (ids == self.config.end_token).int().argmax(dim=1)  # the first end token; the padding repeats it
        pooled = self(ids)[torch.arange(len(ids), device=ids.device), end]
        return nn.functional.normalize(self.projection(pooled), dim=-1)


class Block(nn.Module):
    """A pre-norm transformer layer, the same in CLIP's text and image towers."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.heads, self.activation = heads, ACTIVATIONS[activation]
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x, causal=False):
        """x [B, N, E] -> [B, N, E]; causal: token i sees the tokens up to i."""
        h = self.norm1(x)
        q, k, v = (split_heads(project(h), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(join_heads(fused(q, k, v, causal=causal)))
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm2(x))))


class CLIPTokenizer:
    """CLIP's byte-level BPE: text to `tokens` ids, start token first, padded with the end token.

    Text is NFC-normalised, lower-cased, and white space collapsed; curly quotes become straight ones, which is the only
    difference from transformers' CLIPTokenizer.
    """

    SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

    def __init__(self, vocabulary, merges, tokens=77):
        """vocabulary: {token: id}; merges: [(left, right), ...] in order of rank; tokens: L."""
        self.vocabulary, self.merges, self.tokens = vocabulary, merges, tokens
        self.start, self.end = vocabulary[START], vocabulary[END]
        bpe = BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
        self.bpe = Tokenizer(bpe)
        straight = [normalizers.Replace(Regex(f"[{curly}]"), mark) for curly, mark in (("‘’", "'"), ("“”", '"'))]
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        self.bpe.normalizer = normalizers.Sequence([*straight, normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(self.SPLIT), "removed", invert=True)
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.bpe.decoder = decoders.ByteLevel()
        self.bpe.add_special_tokens([START, END])

    def __call__(self, texts):
        """A list of B texts -> ids [B, tokens], int64. What does not fit is cut off (see `cut_off`)."""
        rows = []
        for text in texts:
            ids = [self.start, *self.bpe.encode(text).ids[: self.tokens - 2], self.end]
            rows.append(ids + [self.end] * (self.tokens - len(ids)))
        return torch.tensor(rows)

    def cut_off(self, text):
        """The end of `text` that does not fit, or ''."""
        pieces = self.bpe.encode(text)
        room = self.tokens - 2
        return text[pieces.offsets[room][0] :].strip() if len(pieces.ids) > room else ""

    def unknown(self, text):
        """The words of `text` that a model of few words does not know: they are spelt in several tokens.

        CLIP's own vocabulary of 49,408 tokens spells rare words so, too, and is trained on them; to it all are known.
        """
        words = re.findall(r"[^\W\d_]+", text) if len(self.vocabulary) < 10_000 else []
        return [word for word in words if len(self.bpe.encode(word).ids) > 1]

    @classmethod
    def load(cls, folder, tokens=77):
        """From a folder with `vocab.json` and `merges.txt`, or with a `tokenizer.json`. Raises UserError."""
        folder = Path(folder)
        needed = "vocab.json and merges.txt, or tokenizer.json, are needed"
        with reported_as(f"the tokenizer in {folder} cannot be read ({needed})"):
            if (folder / "vocab.json").exists():
                vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8-sig"))
                merges = (folder / "merges.txt").read_text(encoding="utf-8-sig").splitlines()
            else:
                model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8-sig"))["model"]
                vocabulary, merges = model["vocab"], model["merges"]
            # a merge is "left right", or ["left", "right"]; merges.txt opens with a line that names its version
            pairs = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges if m[:8] != "#version"]
            pairs = [pair for pair in pairs if pair]
            if not all(isinstance(i, int) and i >= 0 for i in vocabulary.values()) or any(len(p) != 2 for p in pairs):
                raise ValueError("not a vocabulary of ids and merges of two tokens")
            return cls(vocabulary, pairs, tokens)

    def save(self, folder):
        """Write `vocab.json`, `merges.txt` and the configuration that transformers reads into an existing folder."""
        folder = Path(folder)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.tokens}
        config |= {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
