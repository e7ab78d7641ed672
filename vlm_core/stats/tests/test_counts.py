"""Counts of clusters against what was expected: χ² and w by SciPy and by hand, p-values by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vlm_core.stats import goodness_of_fit


def counts_of(rng, n_clusters: int, per_item: int, spread: float, share=(0.25,) * 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two items a cluster, which share where they are looked at: the larger ``spread``, the more."""
    share = np.asarray(share)
    own = rng.dirichlet(share / spread, size=n_clusters) if spread else np.tile(share, (n_clusters, 1))
    observed = np.array([rng.multinomial(per_item, one) for one in own.repeat(2, axis=0)])
    return observed, np.tile(per_item / 4, observed.shape), np.arange(n_clusters).repeat(2)


def test_the_statistic_is_pearsons_and_w_its_effect_size():
    observed, expected, clusters = counts_of(np.random.default_rng(0), 20, 16, 0.5)
    found = goodness_of_fit(observed, expected, clusters)
    assert found.chi2 == pytest.approx(stats.chisquare(observed.sum(0), expected.sum(0)).statistic)
    assert found.w == pytest.approx(np.sqrt(sum((observed.sum(0) / 640 - 0.25) ** 2 / 0.25)))
    assert found.n_counted == 640 and found.n_clusters == 20


def test_by_hand():
    """Two clusters of 10 against 5 + 5: differences (3, -3) and (1, -1), χ² = 16/10 + 16/10; only both signs alike reach it."""
    found = goodness_of_fit([[8, 2], [6, 4]], [[5, 5], [5, 5]], ["a", "b"], n_resamples=4000)
    assert found.chi2 == pytest.approx(3.2) and found.w == pytest.approx(0.4)
    assert found.p_value == pytest.approx(0.5, abs=0.04)
    assert goodness_of_fit([[8, 2], [6, 4]], [[5, 5], [5, 5]], ["a", "a"]).p_value == 1.0  # one cluster tells nothing
    assert goodness_of_fit([[5, 5]] * 3, [[5, 5]] * 3, range(3)).p_value == 1.0


def test_categories_that_cannot_be_met_are_left_out():
    observed, expected, clusters = counts_of(np.random.default_rng(1), 10, 8, 0.5)
    wider = [np.insert(one, 2, 0, axis=1) for one in (observed, expected)]
    assert goodness_of_fit(*wider, clusters) == goodness_of_fit(observed, expected, clusters)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_p_values_are_uniform_where_nothing_is_favoured(spread):
    """However much tokens of a scene lie together. χ² of tokens as if each were by itself would reject most of these sets."""
    rng = np.random.default_rng(3)
    sets = [counts_of(rng, 40, 16, spread) for _ in range(300)]
    p_values = [goodness_of_fit(*one, n_resamples=399, rng=rng).p_value for one in sets]
    rejected = np.mean(np.array(p_values) <= 0.05)
    assert abs(rejected - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 300)
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    naive = np.mean([stats.chisquare(one[0].sum(0), one[1].sum(0)).pvalue <= 0.05 for one in sets])
    assert naive > 0.5 if spread else naive < 0.1


def test_what_is_favoured_is_found():
    rng = np.random.default_rng(4)
    p_values = [goodness_of_fit(*counts_of(rng, 40, 16, 0.5, (0.1, 0.2, 0.3, 0.4)), n_resamples=399, rng=rng).p_value for _ in range(50)]
    assert np.mean(np.array(p_values) <= 0.05) > 0.9


def test_bad_counts_are_refused():
    for observed, expected, message in (
        ([[1, 2]], [[1, 1, 1]], "shapes"),
        ([1, 2], [1, 2], "shapes"),
        ([[1, -1]], [[0, 0]], "at least 0"),
        ([[1, np.nan]], [[1, 1]], "finite"),
        ([[1, 2]], [[1, 1]], "as many counted as expected"),
        ([[0, 0]], [[0, 0]], "nothing was counted"),
        ([[1, 1]], [[2, 0]], "category 1 was met"),
    ):
        with pytest.raises(ValueError, match=message):
            goodness_of_fit(observed, expected, ["a"])
    with pytest.raises(ValueError, match="cluster ids"):
        goodness_of_fit([[1, 1]], [[1, 1]], ["a", "b"])
