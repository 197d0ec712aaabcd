"""Small data sets to train on in tests: true pairs of the miniature's world."""

import numpy as np

from dataset import Pair, write_edit, write_seeds
from mini.drawing import render
from mini.world import random_edit


def write_pairs(root, count, size=(64, 64), different=None):
    """A data set of true pairs, one an edit; of `different` edits that come again and again, if given."""
    root.mkdir()
    for number in range(count):
        edit = random_edit(np.random.default_rng(number % (different or count)))
        before, after = (render(scene).resize(size) for scene in (edit.before, edit.after))
        write_edit(root, number, edit.triplet(), [Pair(before, after, {"seed": number})])
    write_seeds(root)
    return root
