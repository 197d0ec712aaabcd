"""Intervals by resampling the edits, and how well one number tells another."""

import numpy as np

RESAMPLES = 1000


def resamples(count, seed=0):
    """How often each of `count` edits is drawn in each of RESAMPLES resamples, as fractions: [RESAMPLES, count]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count


def means(values, weights):
    """Values [..., N] -> (their means [...], the 95 % bootstrap intervals [..., 2]) with weights from `resamples`."""
    values = np.asarray(values, dtype=float)
    return values.mean(axis=-1), interval(values @ weights.T)


def interval(resampled):
    """[..., RESAMPLES] -> the middle 95 % [..., 2]."""
    return np.moveaxis(np.percentile(resampled, (2.5, 97.5), axis=-1), 0, -1)


def at_height(points, heights):
    """The x of a curve [..., n, 2] at the heights y [m], linear between its points, at an end beyond it: [..., m]."""
    flat = points.reshape(-1, *points.shape[-2:])
    found = np.empty((len(flat), len(heights)))
    for row, (x, y) in zip(found, flat.swapaxes(1, 2), strict=True):
        order = np.argsort(y)
        row[:] = np.interp(heights, y[order], x[order])
    return found.reshape(*points.shape[:-2], len(heights))


def ranks(values):
    """The ranks of the last axis, from 0; equal values share their mean rank."""
    values = np.asarray(values, dtype=float)
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (equal - 1) / 2


def spearman(a, b):
    """Spearman's rank correlation over the last axis; NaN where one of them does not vary."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (ranks(a), ranks(b)))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def auc(values, success, weights=None):
    """How often a success has the larger value, ties half: the area under the ROC curve of values [n]; 0.5 is chance.

    success [n] of 0 and 1; weights [n]: how often each counts.
    """
    weights = np.ones(len(values)) if weights is None else weights
    unique, index = np.unique(values, return_inverse=True)
    good, bad = (np.bincount(index, weights * side, len(unique)) for side in (success, 1 - success))
    with np.errstate(invalid="ignore"):
        return (good * (np.cumsum(bad) - bad / 2)).sum() / (good.sum() * bad.sum())
