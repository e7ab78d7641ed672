"""Pooled shares against sums written out."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_core.tracing.shares import estimate_share, pooled_share, pooled_shares


def test_a_pooled_share_is_a_ratio_of_sums():
    part, whole = np.array([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]]), np.array([2.0, 4.0, -1.0])
    np.testing.assert_allclose(pooled_share(part, whole), [4 / 5, 6 / 5])
    np.testing.assert_allclose(pooled_share(part, part + 1), [4 / 7, 6 / 9])


def test_weights_count_clusters():
    part, whole, clusters = np.array([[1.0], [3.0], [7.0]]), np.array([2.0, 4.0, 8.0]), ["b", "a", "b"]
    shares = pooled_shares(part, whole, clusters)
    np.testing.assert_allclose(shares(np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 2.0]]))[:, 0], [11 / 14, 3 / 4, 8 / 10, 19 / 24])


def test_nothing_of_nothing_is_nothing():
    np.testing.assert_array_equal(pooled_share(np.array([[1.0], [2.0]]), np.array([1.0, -1.0])), [0.0])


def test_one_whole_for_every_item():
    with pytest.raises(ValueError, match=r"parts of shape \(3, 2\) and wholes of shape \(2,\): give one whole per item"):
        pooled_share(np.zeros((3, 2)), np.zeros(2))


def test_a_share_that_never_varies_has_the_bounds_of_no_deviating_cluster():
    whole = np.array([1.0, 0.0, 1.0, 2.0] * 10)
    found = estimate_share(whole, whole, range(40), (-1.0, 1.0))
    u = 1 - 0.01 ** (1 / 40)
    # with a share u of clusters like the largest, all of it lost and as much again
    assert found.bounds(0.01) == pytest.approx((((1 - u) * 1.0 - u * 2.0) / ((1 - u) * 1.0 + u * 2.0), 1.0))
    assert (found.value, found.n_items, found.n_clusters) == (1.0, 40, 40) and "0 of 40 clusters" in found.method
    varied = estimate_share(whole * (np.arange(40) % 3 > 0), whole, range(40), (-1.0, 1.0))
    assert "bootstrap" in varied.method and varied.bounds(0.05)[0] < varied.value < 1
    assert estimate_share(0 * whole, 0 * whole, range(40), (-1.0, 1.0)) is None
    with pytest.raises(ValueError, match="a whole is negative"):
        estimate_share(whole, whole - 1, range(40), (-1.0, 1.0))
