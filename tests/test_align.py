"""Which token stands for which: swaps of unequal words, refinements, phrases as a person names them."""

from cli import UserError

import pytest
import torch
from random_model import small_tokenizer

from align import Alignment, common_subsequence, count_tokens, phrase_tokens, refine, swap, word_tokens

TOKENIZER = small_tokenizer()
LENGTH = TOKENIZER.tokens


def pieces(text):
    """The caption's tokens as text, from position 1 on."""
    return [TOKENIZER.bpe.id_to_token(i).replace("</w>", "") for i in TOKENIZER.bpe.encode(text).ids]


def total(mapper):
    return mapper.sum(1)


def test_words_have_the_tokens_that_spell_them():
    text = "a  red\tmosaic, at night"
    tokens, words = pieces(text), word_tokens(TOKENIZER, text)
    assert ["".join(tokens[position - 1] for position in word) for word in words] == text.split()
    assert sorted(position for word in words for position in word) == list(range(1, len(tokens) + 1))
    assert count_tokens(TOKENIZER, text) == len(tokens) + 1


def test_a_swapped_word_takes_the_place_of_the_other():
    """Of other token counts: each of m gets an equal share of all n; what follows moves along; nothing is lost."""
    source, target = "a tree at night", "a mushrooms at night"
    ours, theirs = word_tokens(TOKENIZER, source)[1], word_tokens(TOKENIZER, target)[1]
    assert len(ours) != len(theirs)  # else the test would say little
    mapper = swap(TOKENIZER, source, target)[0]
    assert torch.allclose(mapper[ours][:, theirs], torch.full((len(ours), len(theirs)), 1 / len(theirs)))
    for i, j in zip(word_tokens(TOKENIZER, source)[2], word_tokens(TOKENIZER, target)[2], strict=True):
        assert mapper[i, j] == 1
    assert mapper[count_tokens(TOKENIZER, source), count_tokens(TOKENIZER, target)] == 1  # the ends
    assert torch.allclose(total(mapper), torch.ones(LENGTH))
    back = swap(TOKENIZER, target, source)[0]
    assert torch.allclose(total(back), torch.ones(LENGTH))


def test_captions_of_as_many_words_are_swapped_others_refined():
    sources, targets = ["red house", "red house"], ["blue tree", "a red house"]
    alignment = Alignment.of(TOKENIZER, sources, targets)
    for row, align in enumerate((swap, refine)):
        mapper, shared = align(TOKENIZER, sources[row], targets[row])
        assert torch.equal(alignment.mapper[row], mapper)
        assert torch.equal(alignment.shared[row], shared)


def test_a_refinement_keeps_what_both_have():
    source, target = "a house at night", "a red house at night"
    mapper, shared = refine(TOKENIZER, source, target)
    old, new = word_tokens(TOKENIZER, source), word_tokens(TOKENIZER, target)
    for i, j in zip([*old[0], *old[1]], [*new[0], *new[2]], strict=True):
        assert mapper[i, j] == 1
        assert mapper[i].sum() == mapper[:, j].sum() == 1
        assert shared[j] == 1
    assert not shared[new[1]].any()
    assert not mapper[:, new[1]].any()
    assert shared.sum() == LENGTH - len(new[1])


def test_the_longest_common_subsequence():
    def length(a, b):
        return len(common_subsequence(a, b))

    assert common_subsequence([1, 2, 3, 4], [2, 4]) == ((1, 0), (3, 1))
    assert common_subsequence([], [1]) == common_subsequence([1], [2]) == ()
    assert length("abcbdab", "bdcaba") == 4
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # against the textbook's recursion
        a, b = (torch.randint(3, (5,), generator=generator).tolist() for _ in range(2))

        def longest(x, y):
            if not x or not y:
                return 0
            return max(longest(x[1:], y), longest(x, y[1:]), (x[0] == y[0]) * (1 + longest(x[1:], y[1:])))

        pairs = common_subsequence(a, b)
        assert all(a[i] == b[j] for i, j in pairs)
        assert all(i < k and j < m for (i, j), (k, m) in zip(pairs, pairs[1:], strict=False))
        assert len(pairs) == longest(a, b)


def test_phrases_as_a_person_names_them():
    text = "a red house, a Red hat and a red  house"
    words = word_tokens(TOKENIZER, text)
    assert phrase_tokens(TOKENIZER, text, "red") == sorted([*words[1], *words[4], *words[8]])
    assert phrase_tokens(TOKENIZER, text, "RED hat") == [*words[4], *words[5]]
    both = phrase_tokens(TOKENIZER, text, "red house")
    assert both == [*words[1], *words[2][:-1], *words[8], *words[9]]  # without the comma
    assert phrase_tokens(TOKENIZER, text, "red house, a") == [*words[1], *words[2], *words[3]]


def test_words_that_were_cut_off():
    text = " ".join(["house"] * 100) + " night"
    with pytest.raises(UserError, match="does not hold"):
        phrase_tokens(TOKENIZER, text, "night")
    for align in (swap, refine):
        mapper = align(TOKENIZER, text, text.replace("house", "tree"))[0]
        assert torch.isfinite(mapper).all()
        assert mapper[0, 0] == mapper[LENGTH - 1, LENGTH - 1] == 1
    assert total(swap(TOKENIZER, text, text)[0]).tolist() == [1] * LENGTH
