"""Which token of one caption stands for which of another: what Prompt-to-Prompt's cross-attention control goes by.

A token mapper M [L, L] holds in row i and column j the share of the source's token i that the target's token j takes
over. Attention with the source's map instead of the target's is then A_source M (Hertz et al. 2022, Sec. 3.2). Captions
are [start, tokens..., end, padding...] with L positions; the start, the end and the padding stand for their like.
"""

import re
from dataclasses import dataclass

import torch

from cli import UserError


@dataclass(frozen=True)
class Alignment:
    """How the tokens of B pairs of captions correspond."""

    mapper: torch.Tensor  # M [B, L, L]: rows source tokens, columns target tokens
    shared: torch.Tensor  # a [B, L]: 1 where a target token has a counterpart, 0 where it is new and looks for itself

    @classmethod
    def stack(cls, alignments):
        """Those of several pairs as one."""
        return cls(
            torch.cat([alignment.mapper for alignment in alignments]),
            torch.cat([alignment.shared for alignment in alignments]),
        )

    def to(self, device):
        """The same on another device."""
        return Alignment(self.mapper.to(device), self.shared.to(device))


def swap(tokenizer, source, target):
    """Word swap: each word of the target takes over the map of the word at its place. An Alignment of one pair.

    A word of m tokens in place of one of n: token by token if n = m, else each of the m gets an equal share of all n,
    so that in total as much is looked at. Raises UserError where the captions differ in their number of words.
    """
    words = [text.split() for text in (source, target)]
    if len(words[0]) != len(words[1]):
        counts = f"{len(words[0])} and {len(words[1])}"
        raise UserError(f"a word swap needs as many words in both captions, not {counts}; refinement does without that")
    spans = [word_tokens(tokenizer, text) for text in (source, target)]
    mapper = torch.zeros(tokenizer.tokens, tokenizer.tokens)
    mapper[0, 0] = 1
    for ours, theirs in zip(*spans, strict=True):
        i, j = (torch.tensor(positions, dtype=torch.long) for positions in (ours, theirs))
        if len(i) == len(j):
            mapper[i, j] = 1
        else:
            mapper[i[:, None], j] = 1 / max(1, len(j))
    join_ends(mapper, *(count_tokens(tokenizer, text) for text in (source, target)))
    return Alignment(mapper[None], torch.ones(1, tokenizer.tokens))


def refine(tokenizer, source, target):
    """Refinement: the tokens that both captions have, in order, share a map; new ones have their own. For one pair.

    The longest common subsequence of tokens, which is what global alignment with gap 0, match 1 and mismatch -1 finds.
    """
    ids = [tokenizer([text])[0].tolist()[: 1 + count_tokens(tokenizer, text)] for text in (source, target)]
    mapper, shared = torch.zeros(tokenizer.tokens, tokenizer.tokens), torch.zeros(tokenizer.tokens)
    for i, j in common_subsequence(*ids):
        mapper[i, j] = shared[j] = 1
    join_ends(mapper, *(len(part) - 1 for part in ids))
    shared[len(ids[1]) :] = 1
    return Alignment(mapper[None], shared[None])


def align(tokenizer, source, target):
    """The alignment of one pair that its captions allow: a word swap if they have as many words, else a refinement."""
    same = len(source.split()) == len(target.split())
    return (swap if same else refine)(tokenizer, source, target)


def scale_of(tokenizer, text, weights):
    """Re-weighting: {words of the caption: factor} -> c [1, L], what each token's attention is multiplied by.

    Raises UserError for words that the caption lacks.
    """
    scale = torch.ones(1, tokenizer.tokens)
    for phrase, factor in weights.items():
        scale[0, phrase_tokens(tokenizer, text, phrase)] = factor
    return scale


def phrase_tokens(tokenizer, text, phrase):
    """The positions of all tokens of a word or phrase in a caption, wherever it stands there: "cat", "red hat".

    Case and the width of spaces do not matter. Raises UserError if it is not there, or was cut off.
    """
    wanted = r"\s+".join(re.escape(word) for word in phrase.split())
    found = [match.span() for match in re.finditer(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE)] if wanted else []
    offsets = tokenizer.bpe.encode(text).offsets[: tokenizer.tokens - 2]
    positions = [
        position
        for position, (first, last) in enumerate(offsets, 1)
        if any(first < end and last > start for start, end in found)
    ]
    if not positions:
        raise UserError(f'the caption "{text}" does not hold the words "{phrase}"')
    return positions


def word_tokens(tokenizer, text):
    """For every word between spaces, the positions of its tokens; of words that were cut off, none."""
    offsets = tokenizer.bpe.encode(text).offsets[: tokenizer.tokens - 2]
    return [
        [position for position, (first, _) in enumerate(offsets, 1) if word.start() <= first < word.end()]
        for word in re.finditer(r"\S+", text)
    ]


def count_tokens(tokenizer, text):
    """Positions before the end token: the start token and the caption's own, as far as they fit."""
    return 1 + min(len(tokenizer.bpe.encode(text).ids), tokenizer.tokens - 2)


def join_ends(mapper, ours, theirs):
    """Map the end token at position `ours` to that at `theirs`, and the padding after it one by one, in place.

    What padding the source has more of is mapped to the target's last position, so that nothing is lost.
    """
    tokens = len(mapper)
    for i in range(ours, tokens):
        mapper[i, min(theirs + i - ours, tokens - 1)] = 1


def common_subsequence(source, target):
    """The longest common subsequence of two lists: the positions (i, j) of its members, rising."""
    lengths = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]  # of what is left from (i, j) on
    for i in reversed(range(len(source))):
        for j in reversed(range(len(target))):
            if source[i] == target[j]:
                lengths[i][j] = 1 + lengths[i + 1][j + 1]
            else:
                lengths[i][j] = max(lengths[i + 1][j], lengths[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(source) and j < len(target):
        if source[i] == target[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
