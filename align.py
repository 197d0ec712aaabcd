"""Which token of one caption corresponds to which of another: Prompt-to-Prompt's cross-attention control needs it.

A token mapper M [L, L] holds in row i and column j the weight with which the target's token j takes the map of the
source's token i. Attention with the source's map in place of the target's is A_source M (Hertz et al. 2022, Sec. 3.2).
Captions are [start, tokens..., end, padding...] with L positions; start, end and padding correspond to their like.
"""

import re
from dataclasses import dataclass

from cli import UserError

import torch


@dataclass(frozen=True)
class Alignment:
    """How the tokens of B caption pairs correspond."""

    mapper: torch.Tensor  # M [B, L, L]: in row i, column j the weight of source token i in target token j
    shared: torch.Tensor  # a [B, L]: 1 where a target token has a counterpart, 0 where it is new and keeps its own map

    @classmethod
    def of(cls, tokenizer, sources, targets, device="cpu"):
        """For lists of B captions: a word swap where both have as many words, else a refinement."""
        pairs = zip(sources, targets, strict=True)
        rows = [(swap if len(s.split()) == len(t.split()) else refine)(tokenizer, s, t) for s, t in pairs]
        return cls(*(torch.stack(parts).to(device) for parts in zip(*rows, strict=True)))


def swap(tokenizer, source, target):
    """Word swap: each word of the target uses the map of the word at its place. Returns (M [L, L], a [L]).

    A word of m tokens in place of one of n: token by token if n = m, else each of the m gets 1/m of the sum of all n,
    as in the released code.
    """
    mapper = torch.zeros(tokenizer.tokens, tokenizer.tokens)
    mapper[0, 0] = 1
    for ours, theirs in zip(word_tokens(tokenizer, source), word_tokens(tokenizer, target), strict=True):
        i, j = (torch.tensor(positions, dtype=torch.long) for positions in (ours, theirs))
        if len(i) == len(j):
            mapper[i, j] = 1
        else:
            mapper[i[:, None], j] = 1 / max(1, len(j))
    join_ends(mapper, count_tokens(tokenizer, source), count_tokens(tokenizer, target))
    return mapper, torch.ones(tokenizer.tokens)


def refine(tokenizer, source, target):
    """Refinement: the tokens that both captions have, in order, share a map; new ones keep their own. As `swap`.

    The longest common subsequence of tokens is what global alignment with gap 0, match 1 and mismatch -1 finds.
    """
    ids = [tokenizer([text])[0].tolist()[: count_tokens(tokenizer, text)] for text in (source, target)]
    mapper, shared = torch.zeros(tokenizer.tokens, tokenizer.tokens), torch.zeros(tokenizer.tokens)
    for i, j in common_subsequence(*ids):
        mapper[i, j] = shared[j] = 1
    join_ends(mapper, len(ids[0]), len(ids[1]))
    shared[len(ids[1]) :] = 1
    return mapper, shared


def phrase_tokens(tokenizer, text, phrase):
    """The positions of all tokens of a word or phrase in a caption, wherever it stands there: "cat", "red hat".

    Case and the width of spaces do not matter. Raises UserError if it is not there, or was cut off.
    """
    wanted = r"\s+".join(re.escape(word) for word in phrase.split())
    found = [match.span() for match in re.finditer(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE)] if wanted else []
    positions = tokens_within(tokenizer, text, found)
    if not positions:
        raise UserError(f'the caption "{text}" does not hold the words "{phrase}"')
    return positions


def word_tokens(tokenizer, text):
    """For every word between spaces, the positions of its tokens; none for words that were cut off."""
    return [tokens_within(tokenizer, text, [word.span()]) for word in re.finditer(r"\S+", text)]


def tokens_within(tokenizer, text, spans):
    """The positions of the tokens that overlap one of these spans (start, end) of letters."""
    offsets = tokenizer.bpe.encode(text).offsets[: tokenizer.tokens - 2]
    places = enumerate(offsets, 1)  # the start token is at 0
    return [place for place, (first, last) in places if any(first < end and last > start for start, end in spans)]


def count_tokens(tokenizer, text):
    """Positions before the end token: the start token and the caption's own, as far as they fit."""
    return 1 + min(len(tokenizer.bpe.encode(text).ids), tokenizer.tokens - 2)


def join_ends(mapper, ours, theirs):
    """Map the end token at position `ours` to that at `theirs`, and the padding after it one by one, in place.

    Padding that the source has more of is mapped to the target's last position, so that no attention is lost.
    """
    for i in range(ours, len(mapper)):
        mapper[i, min(theirs + i - ours, len(mapper) - 1)] = 1


def common_subsequence(source, target):
    """The longest common subsequence of two lists: the positions (i, j) of its members, rising."""
    best = [[()] * (len(target) + 1) for _ in range(len(source) + 1)]  # of what is left from (i, j) on
    for i in reversed(range(len(source))):
        for j in reversed(range(len(target))):
            if source[i] == target[j]:
                best[i][j] = ((i, j), *best[i + 1][j + 1])
            else:
                best[i][j] = max(best[i + 1][j], best[i][j + 1], key=len)
    return best[0][0]
