"""Intervals, curves at equal height, rank correlation and the area under the ROC curve, by hand."""

import numpy as np
import pytest

from section4.statistics import at_height, auc, interval, means, ranks, resamples, spearman


def test_bootstrap_intervals_are_those_of_the_mean():
    """Of a normal sample the interval is the mean +- 1.96 standard errors, about."""
    values = np.random.default_rng(0).standard_normal(400)
    mean, (low, high) = means(values, resamples(400))
    assert mean == pytest.approx(values.mean())
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.015)
    assert interval(np.arange(1001.0)).tolist() == [25, 975]


def test_curves_at_equal_height():
    rising, falling = np.array([[0, 1.0], [10, 2.0]]), np.array([[5, 3.0], [1, 1.0]])
    found = at_height(np.stack([rising, falling]), np.array([1.0, 1.5, 2.0]))
    assert found.tolist() == [[0, 5, 10], [1, 2, 3]]


def test_ranks_and_their_correlation():
    assert ranks([3, 1, 1, 7]).tolist() == [2, 0.5, 0.5, 3]
    a = np.array([1.0, 2, 3, 4])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)


def test_areas():
    success = np.array([0, 0, 1, 1.0])
    assert auc(np.array([1, 2, 3, 4.0]), success) == 1
    assert auc(np.array([1, 3, 2, 4.0]), success) == 0.75
    assert auc(np.array([1, 1, 1, 1.0]), success) == 0.5
    repeated = auc(np.array([1, 3, 2, 4.0]), success, np.array([0, 1, 1, 1.0]))  # without the first
    assert repeated == 0.5
