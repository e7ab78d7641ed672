"""Intervals against reference values, each other, and the cases where the usual ones break."""

import numpy as np
import pytest
from scipy import stats

from vlm_core.stats import estimate_mean, interval
from vlm_core.stats.intervals import cluster_totals

from .test_permutation import DARWIN


def skewed(n=60, per_cluster=3, seed=0):
    rng = np.random.default_rng(seed)
    effect = rng.beta(1, 4, size=(n, 1)) + rng.normal(0, 0.05, size=(n, per_cluster))
    return np.clip(effect, -1, 1).ravel(), np.repeat(np.arange(n), per_cluster)


def test_few_clusters_use_student_t():
    # Fisher 1935, section 17: t = 2.148 on 14 degrees of freedom for Darwin's maize.
    found = estimate_mean(DARWIN, range(15), bounds=None)
    assert found.method == "Student t on cluster means"
    assert found.value / found.standard_error == pytest.approx(2.148, abs=5e-4)
    assert found.p_above(0) == pytest.approx(stats.t.sf(2.148, 14), abs=1e-4)


def test_bca_agrees_with_an_independent_implementation():
    effect, clusters = skewed()
    sums = np.bincount(clusters, effect)
    n, mean = sums.size, effect.mean()
    weights = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=200_000)
    draws = np.sort(weights @ sums / (3 * n))
    z0 = stats.norm.ppf((np.mean(draws < mean - 1e-9) + np.mean(draws < mean + 1e-9)) / 2)
    deviation = sums - sums.mean()
    acceleration = np.sum(deviation**3) / (6 * np.sum(deviation**2) ** 1.5)
    for alpha in (0.05, 0.01):
        reach = stats.t.isf(alpha, n - 1) * np.sqrt(n / (n - 1))
        expected = []
        for z in (-reach, reach):
            level = stats.norm.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z)))
            expected.append(np.quantile(draws, level))
        found = estimate_mean(effect, clusters)
        assert found.method == "BCa cluster bootstrap, t-expanded"
        assert found.bounds(alpha) == pytest.approx(expected, abs=0.1 * found.standard_error)


def test_bca_percentiles_are_expanded_by_student_t():
    effect = np.sort(skewed(n=30, per_cluster=1)[0])
    # sqrt(30/29) t(29) at one-sided 1 % is 2.504, where the normal has 2.326.
    level = stats.norm.sf(np.sqrt(30 / 29) * stats.t.isf(0.01, 29))
    assert stats.norm.isf(level) == pytest.approx(2.504, abs=5e-4)
    expected = stats.bootstrap((effect,), np.mean, confidence_level=1 - 2 * level, rng=0).confidence_interval
    assert estimate_mean(effect, range(30)).bounds(0.01) == pytest.approx(expected)


def test_bounds_nest_and_mirror_around_the_median():
    found = estimate_mean(*skewed())
    lowers = [found.bounds(alpha)[0] for alpha in (0.001, 0.01, 0.05, 0.2)]
    assert lowers == sorted(lowers)
    assert found.bounds(0.9) == found.bounds(1 - 0.9)[::-1]
    assert found.bounds(0.5) == (found.value, found.value)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.3])
def test_p_values_are_the_levels_at_which_bounds_reach_the_limit(alpha):
    found = estimate_mean(*skewed())
    lower, upper = found.bounds(alpha)
    assert found.p_above(lower) == pytest.approx(alpha, rel=0.1)
    assert found.p_below(upper) == pytest.approx(alpha, rel=0.1)


def test_p_values_are_never_zero_and_reach_one():
    found = estimate_mean(*skewed())
    assert found.p_above(-0.9) == pytest.approx(1e-4, rel=1e-9)
    assert found.p_above(0.9) == 1.0


def test_more_resamples_where_the_level_is_small():
    # 25 draws beyond the bound of a family of 100 at 30 clusters need more than the usual 9,999.
    assert estimate_mean(*skewed(n=30), smallest_alpha=0.05 / 100).resolution < 1e-5 * 2


def test_the_mean_is_over_items_and_the_variance_over_clusters():
    effect = np.array([1.0] * 90 + [0.0] * 30)
    clusters = np.concatenate([np.repeat(np.arange(30), 3), np.arange(30, 60)])
    found = estimate_mean(effect, clusters)
    assert found.value == 0.75
    assert (found.n_items, found.n_clusters) == (120, 60)
    # Ratio estimator by hand: residuals 3 - 3 * 0.75 and 0 - 0.75, mean cluster size 2.
    by_hand = np.std(np.repeat([0.75, -0.75], 30) / 2, ddof=1) / np.sqrt(60)
    assert found.standard_error == pytest.approx(by_hand)


def test_repeating_items_of_a_cluster_adds_no_evidence():
    effect, clusters = skewed(per_cluster=1)
    once, often = estimate_mean(effect, clusters), estimate_mean(np.repeat(effect, 10), np.repeat(clusters, 10))
    assert often.bounds(0.05) == pytest.approx(once.bounds(0.05))


# Clopper-Pearson for 0 of n, one-sided 95 %: R 4.3 binom.test(0, 50, alternative = "less")$conf.int is 0.05815508.
def test_zero_variance_gives_the_exact_binomial_bound():
    found = estimate_mean(np.zeros(50), range(50))
    assert found.bounds(0.05) == pytest.approx((-0.05815508, 0.05815508))
    assert found.method.startswith("exact binomial bound, 0 of 50 clusters")
    assert found.p_below(0.05) == pytest.approx(0.95**50, rel=1e-2)


def test_zero_variance_elsewhere_than_zero_reaches_to_the_limits():
    share = 1 - 0.05 ** (1 / 40)
    found = estimate_mean(np.full(40, 0.5), range(40))
    assert found.bounds(0.05) == pytest.approx((0.5 - 1.5 * share, 0.5 + 0.5 * share))


def test_zero_variance_with_unequal_clusters_fears_the_largest():
    clusters = np.concatenate([np.arange(40), np.zeros(9, int)])
    share = 1 - 0.05 ** (1 / 40)
    weighted = share * 10 / (share * 10 + (1 - share) * 49 / 40)
    assert estimate_mean(np.zeros(49), clusters).bounds(0.05)[1] == pytest.approx(weighted)


def test_zero_variance_without_limits_has_no_interval():
    assert estimate_mean(np.full(40, 3.2), range(40), bounds=None) is None


@pytest.mark.parametrize("losses", [1, 3, 10])
def test_rare_losses_get_the_clopper_pearson_bound(losses):
    effect = np.zeros(150)
    effect[:losses] = 1
    found = estimate_mean(effect, range(150))
    exact = stats.binomtest(losses, 150, alternative="less").proportion_ci(0.95, method="exact").high
    assert found.method == f"Gaffke order-statistic bound, {losses} of 150 clusters deviating"
    assert found.bounds(0.05)[1] == pytest.approx(exact, rel=0.03)


def test_one_small_loss_never_looks_better_than_none():
    none, one = np.zeros(50), np.zeros(50)
    one[0] = 0.25
    assert estimate_mean(one, range(50)).bounds(0.05)[1] > estimate_mean(none, range(50)).bounds(0.05)[1]


def test_rare_unbounded_effects_fall_back_on_the_bootstrap():
    effect = np.zeros(150)
    effect[:3] = 4.0
    assert estimate_mean(effect, range(150), bounds=None).method.startswith("BCa")


def test_rare_effects_of_unequal_scenes_move_smoothly():
    clusters = np.concatenate([np.arange(60), np.arange(0, 60, 2)])
    effect = np.where(clusters == 1, 0.5, np.where(clusters == 2, 0.25, 0.0))
    before, after = (estimate_mean(x, clusters) for x in (effect, effect - 1e-6))
    assert before.method.startswith("Gaffke")
    assert after.bounds(0.05) == pytest.approx(before.bounds(0.05), abs=2e-6)


def test_the_unit_of_an_effect_does_not_matter():
    # Tenths do not add up exactly; resamples that tie with the estimate must still be counted as ties.
    votes = np.random.default_rng(0).integers(-1, 2, 37)
    whole, tenths = (estimate_mean(votes * unit, range(37), bounds=None) for unit in (1.0, 0.1))
    assert tenths.bounds(0.05) == pytest.approx(np.multiply(whole.bounds(0.05), 0.1), abs=1e-11)


def crossed(seed_means, n=60, noise=0.2, seed=0):
    rng = np.random.default_rng(seed)
    y = np.asarray(seed_means)[:, None] + rng.normal(0, 0.1, n) + rng.normal(0, noise, (len(seed_means), n))
    k = len(seed_means)
    return y.ravel(), np.tile(np.arange(n), k), np.repeat(np.arange(k), n)


def test_seeds_widen_the_interval_by_student_t_on_their_means():
    effect, clusters, seeds = crossed([0.2, 0.3, 0.4])
    found = estimate_mean(effect, clusters, seeds, bounds=None)
    means = effect.reshape(3, -1).mean(axis=1)
    averaged = estimate_mean(effect.reshape(3, -1).mean(axis=0), range(60), bounds=None)
    seed_reach = stats.t.isf(0.05, 2) * means.std(ddof=1) / np.sqrt(3)
    expected = averaged.value - np.hypot(averaged.value - averaged.bounds(0.05)[0], seed_reach)
    assert found.bounds(0.05)[0] == pytest.approx(expected)
    assert "Student t on 3 seed means" in found.method
    assert (found.n_items, found.n_clusters, found.n_seeds) == (60, 60, 3)


def test_more_seeds_narrow_the_interval_and_more_rows_of_one_do_not_replace_them():
    three = estimate_mean(*crossed([0.2, 0.3, 0.4]), bounds=None)
    nine = estimate_mean(*crossed([0.2, 0.3, 0.4] * 3), bounds=None)
    width = three.bounds(0.05)[1] - three.bounds(0.05)[0]
    assert nine.bounds(0.05)[1] - nine.bounds(0.05)[0] < width / 2
    many_items = estimate_mean(*crossed([0.2, 0.3, 0.4], n=600), bounds=None)
    assert many_items.bounds(0.05)[1] - many_items.bounds(0.05)[0] > 0.8 * width


def test_seeds_ignore_row_order():
    effect, clusters, seeds = crossed([0.2, 0.3, 0.4])
    rows = np.random.default_rng(5).permutation(effect.size)
    shuffled = estimate_mean(effect[rows], clusters[rows], seeds[rows], bounds=None)
    assert shuffled.bounds(0.05) == estimate_mean(effect, clusters, seeds, bounds=None).bounds(0.05)


def test_identical_seeds_leave_the_cluster_bound():
    effect, clusters = skewed(per_cluster=1)
    crossed_once = estimate_mean(np.tile(effect, 3), np.tile(clusters, 3), np.repeat(range(3), effect.size))
    assert crossed_once.bounds(0.05) == pytest.approx(estimate_mean(effect, clusters).bounds(0.05))


def test_totals_ignore_row_order_and_cluster_names():
    effect, clusters = skewed()
    rows = np.random.default_rng(3).permutation(effect.size)
    names = np.array([f"scene-{(7 * c) % 60:02d}" for c in clusters])
    for found, expected in zip(cluster_totals(effect[rows], names[rows]), cluster_totals(effect, clusters)):
        assert np.array_equal(found, expected)


def test_totals_refuse_unmatched_ids():
    with pytest.raises(ValueError, match="3 effects and 2 cluster ids"):
        cluster_totals([1.0, 2.0, 3.0], [0, 1])


def test_descriptive_interval_is_close_to_the_deciding_one():
    effect, clusters = skewed()
    quick, slow = interval(effect, clusters, 0.9), estimate_mean(effect, clusters)
    assert quick.method == "percentile cluster bootstrap, t-expanded"
    assert (quick.lower, quick.upper) == pytest.approx(slow.bounds(0.05), abs=0.3 * slow.standard_error)
    assert quick == interval(effect, clusters, 0.9)


def test_descriptive_interval_without_variance_or_limits_says_there_is_none():
    found = interval(np.full(40, 3.2), range(40))
    assert found.estimate == pytest.approx(3.2)
    assert np.isnan(found.lower) and np.isnan(found.upper)
    assert found.method.startswith("none")


@pytest.mark.parametrize("effect", [[], [1.0, np.nan], [[1.0, 0.0]]])
def test_descriptive_interval_refuses_what_it_cannot_read(effect):
    with pytest.raises(ValueError, match="finite numbers"):
        interval(effect, range(len(effect)))


def test_perfect_accuracy_is_not_certain():
    found = interval(np.ones(100), np.arange(100) // 2, bounds=(0.0, 1.0))
    assert found.upper == 1.0
    assert found.lower == pytest.approx(0.025 ** (1 / 50))


def test_an_interval_over_seeds_and_clusters_is_the_crossed_one():
    rng = np.random.default_rng(5)
    seeds, clusters = np.repeat(np.arange(3), 60), np.tile(np.arange(60) // 2, 3)
    values = (rng.random(180) < 0.6 + 0.1 * seeds).astype(float)
    found = interval(values, clusters, seeds=seeds, bounds=(0.0, 1.0))
    crossed = estimate_mean(values, clusters, seeds, bounds=(0.0, 1.0), smallest_alpha=0.025, fast=True)
    assert (found.lower, found.upper) == pytest.approx(crossed.bounds(0.025), abs=1e-12) and found.n_items == 60
    pooled = interval(values, clusters, bounds=(0.0, 1.0))
    assert found.lower < pooled.lower and pooled.upper < found.upper
