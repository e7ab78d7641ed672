"""Bounds of arbitrary statistics against SciPy's bootstrap and by simulation; agreement and rank tests against their relatives."""

import numpy as np
import pytest
from scipy import stats

import vlm_core.stats.statistic as bootstrap
from vlm_core.stats import (
    Claim,
    Equivalence,
    Superiority,
    decide,
    estimate_statistic,
    friedman,
    jackknife_statistic,
    kendall_w,
    kruskal,
    per_cluster,
)
from vlm_core.stats.intervals import expanded_level


def correlation(x, y):
    """Pearson's correlation of weighted pairs, as ``estimate_statistic`` wants it."""

    def statistic(weights):
        total = weights.sum(1)
        mx, my = weights @ x / total, weights @ y / total
        cov = weights @ (x * y) / total - mx * my
        return cov / np.sqrt((weights @ x**2 / total - mx**2) * (weights @ y**2 / total - my**2))

    return statistic


def pairs(n=60, rho=0.5, seed=0):
    return np.random.default_rng(seed).multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=n).T


def test_bounds_are_scipys_bca_at_expanded_percentiles():
    x, y = pairs()
    ours = estimate_statistic(correlation(x, y), np.arange(60), rng=1)
    confidence = 1 - 2 * expanded_level(0.05, 60)
    theirs = stats.bootstrap(
        (x, y), lambda a, b: np.corrcoef(a, b)[0, 1], paired=True, vectorized=False, method="BCa", confidence_level=confidence, rng=2
    ).confidence_interval
    assert ours.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert ours.bounds(0.05) == pytest.approx(tuple(theirs), abs=0.012)  # two bootstraps of 9,999 draws
    assert ours.bounds(0.95) == pytest.approx(ours.bounds(0.05)[::-1])


def test_a_cluster_counts_once_however_many_items_it_has():
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=40), np.arange(40)
    once, thrice = (per_cluster(np.repeat(values, k), np.repeat(clusters, k)) for k in (1, 3))
    assert thrice == pytest.approx(3 * once)
    single = estimate_statistic(lambda w: w @ once / w.sum(1), clusters)
    tripled = estimate_statistic(lambda w: w @ thrice / (3 * w.sum(1)), np.repeat(clusters, 3))
    assert tripled.bounds(0.05) == pytest.approx(single.bounds(0.05))
    assert (single.n_clusters, tripled.n_items) == (40, 120)


def test_items_may_come_in_any_order():
    x, y = pairs(30)
    order = np.random.default_rng(3).permutation(30)
    names = np.array([f"scene {i:02d}" for i in range(30)])
    there = estimate_statistic(correlation(per_cluster(x, names), per_cluster(y, names)), names)
    back = estimate_statistic(correlation(per_cluster(x[order], names[order]), per_cluster(y[order], names[order])), names[order])
    assert there.bounds(0.01) == pytest.approx(back.bounds(0.01))


def test_bounds_cover_as_often_as_they_say():
    n, runs, missed = 40, 300, np.zeros(2)
    for seed in range(runs):
        x, y = pairs(n, 0.3, seed)
        lower, upper = estimate_statistic(correlation(x, y), np.arange(n), n_resamples=500, rng=seed).bounds(0.05)
        missed += (lower > 0.3, upper < 0.3)
    assert np.all(missed <= stats.binom.isf(1e-3, runs, 0.08)), missed  # nominal 0.05; the bootstrap of a correlation is a little short
    assert missed.sum() > 0


def test_what_has_no_bounds_makes_a_claim_invalid():
    assert estimate_statistic(lambda w: np.zeros(len(w)), range(20)) is None
    decision = decide(Claim("T.x", "s", "e", Superiority(0.1), "here"), None)
    assert decision.verdict.value == "invalid" and "zero variance" in decision.reason


@pytest.mark.parametrize(
    ("statistic", "clusters", "says"),
    [
        (lambda w: w.sum(1), [1, 2], "at least three"),
        (lambda w: np.full(len(w), np.nan), range(9), "NaN"),
        (lambda w: w, range(9), "one number a draw"),
    ],
)
def test_a_statistic_that_cannot_be_bounded_is_refused(statistic, clusters, says):
    with pytest.raises(ValueError, match=says):
        estimate_statistic(statistic, clusters)


def test_decide_reads_the_bounds_of_a_statistic():
    x, y = pairs(200, 0.0, 5)
    estimate = estimate_statistic(correlation(x, y), np.arange(200), limits=(-1, 1))
    claim = Claim("T.flat", "x does not predict y", "Pearson's r", Equivalence(0.3), "here")
    decision = decide(claim, estimate)
    assert (decision.lower, decision.upper) == estimate.bounds(0.05)
    assert decision.verdict.value == "supported" and decision.n_clusters == 200
    few = decide(claim, estimate_statistic(correlation(x[:20], y[:20]), np.arange(20)))
    assert few.verdict.value == "invalid" and "20" in few.reason


def test_effects_per_item_need_clusters():
    with pytest.raises(ValueError, match="cluster of each"):
        decide(Claim("T.x", "s", "e", Superiority(0.1), "here"), [0.1, 0.2])


def test_limits_cut_the_bounds():
    rng = np.random.default_rng(0)
    share = (rng.random(30) < 0.97).astype(float)
    share[0] = 0.0
    estimate = estimate_statistic(lambda w: 2 * (w @ share) / w.sum(1), np.arange(30), limits=(0, 1.95))
    assert estimate.bounds(0.01)[1] == 1.95


def test_the_jackknife_of_a_mean_is_the_t_interval_of_cluster_means():
    values = np.random.default_rng(0).normal(size=25)
    found = jackknife_statistic(lambda w: w @ values / w.sum(1), np.arange(25))
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert found.bounds(0.05) == pytest.approx(tuple(interval))
    assert (found.value, found.standard_error) == pytest.approx((values.mean(), stats.sem(values)))
    assert found.p_above(0.0) == pytest.approx(stats.ttest_1samp(values, 0, alternative="greater").pvalue, abs=1e-3)
    assert jackknife_statistic(lambda w: w @ values / w.sum(1), np.arange(25), limits=(-0.1, 0.1)).bounds(1e-4) == (-0.1, 0.1)


def test_the_jackknife_is_scipys_for_a_correlation_and_wide_for_an_interaction():
    x, y = pairs(40)
    left_out = [np.corrcoef(np.delete(x, i), np.delete(y, i))[0, 1] for i in range(40)]
    found = jackknife_statistic(correlation(x, y), np.arange(40), draws_at_once=7)
    assert found.standard_error == pytest.approx(np.sqrt(39 * np.var(left_out)))
    # nothing but interactions of two clusters: the error is √2 times too large (Efron & Stein)
    runs = np.random.default_rng(1).normal(size=(400, 60))
    found = [jackknife_statistic(lambda w, z=z: (w @ z / w.sum(1)) ** 2 - w @ z**2 / w.sum(1) ** 2, np.arange(60)) for z in runs]
    spread = np.std([one.value for one in found])
    assert np.sqrt(np.mean([one.standard_error**2 for one in found])) / spread == pytest.approx(np.sqrt(2), rel=0.15)


def test_a_statistic_that_cannot_be_jackknifed():
    assert jackknife_statistic(lambda w: np.zeros(len(w)), range(20)) is None
    with pytest.raises(ValueError, match="at least three"):
        jackknife_statistic(lambda w: w.sum(1), [1, 2])
    with pytest.raises(ValueError, match="NaN"):
        jackknife_statistic(lambda w: np.full(len(w), np.nan), range(9))


def test_kendall_w_is_friedmans_chi_square_rescaled():
    rng = np.random.default_rng(0)
    for scores in (rng.normal(size=(4, 9)), rng.integers(0, 3, size=(5, 12))):
        judges, things = scores.shape
        chi = stats.friedmanchisquare(*scores.T).statistic  # corrects for ties
        assert kendall_w(scores) == pytest.approx(chi / (judges * (things - 1)))
    assert kendall_w(np.stack([scores, scores])).shape == (2,)


def test_kendall_w_at_its_ends():
    order = np.arange(7.0)
    assert kendall_w([order, 10 * order, order - 3]) == pytest.approx(1)
    assert kendall_w([order, -order]) == pytest.approx(0)
    assert kendall_w(np.zeros((3, 5))) == 0
    with pytest.raises(ValueError, match="two or more"):
        kendall_w([[1.0, 2.0]])


def test_kruskal_gives_scipys_p_and_the_share_of_rank_variance():
    rng = np.random.default_rng(0)
    groups = [rng.normal(shift, 1, size=n) for shift, n in ((0, 8), (1, 9), (3, 7))]
    p_value, effect = kruskal(groups)
    assert p_value == stats.kruskal(*groups).pvalue
    # without ties ε² is the between-group share of the ranks' variance
    ranks = np.split(stats.rankdata(np.concatenate(groups)), [8, 17])
    between = sum(len(r) * (r.mean() - 12.5) ** 2 for r in ranks) / sum(((r - 12.5) ** 2).sum() for r in ranks)
    assert effect == pytest.approx(between)
    assert kruskal([[1.0, 1.0], [1.0]]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="none empty"):
        kruskal([[1.0], []])


def test_friedman_is_scipys_and_compares_within_blocks():
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=(12, 4)), rng.integers(0, 3, size=(9, 5)).astype(float)):
        p_value, w = friedman(values)
        theirs = stats.friedmanchisquare(*values.T)
        assert p_value == pytest.approx(theirs.pvalue) and w == pytest.approx(kendall_w(values))
    assert friedman(np.ones((6, 4))) == (1.0, 0.0)
    # blocks that lie far apart hide nothing: an unpaired test sees none of this
    paired = np.arange(30)[:, None] * 10 + np.arange(4) + rng.normal(scale=0.5, size=(30, 4))
    assert friedman(paired)[0] < 1e-6 < 0.9 < kruskal(list(paired.T))[0]
    assert 0 < friedman(np.arange(4000)[:, None] + np.arange(3))[0] <= 2.3e-16  # too small for a float: a bound, no 0
    with pytest.raises(ValueError, match="two or more of each"):
        friedman(np.ones((1, 4)))


@pytest.mark.parametrize("n", [5, 300])
def test_draws_kept_for_the_next_statistic_are_those_of_the_seed(n):
    values, clusters = np.random.default_rng(n).standard_normal(2 * n), np.repeat(np.arange(n), 2)
    sums = per_cluster(values, clusters)
    found = [
        estimate_statistic(lambda weights, k=k: weights @ sums**k / n, clusters, n_resamples=2500, rng=rng).bounds(0.025)
        for k in (1, 2)
        for rng in (7, np.random.default_rng(7))
    ]
    assert found[0] == found[1] and found[2] == found[3] and found[0] != found[2]
    other = estimate_statistic(lambda weights: weights @ sums / n, clusters, n_resamples=2500, rng=8)
    assert other.bounds(0.025) != found[0]


def test_draws_of_a_seed_are_made_once(monkeypatch):
    made, resamples = [], bootstrap._resamples
    monkeypatch.setattr(bootstrap, "_resamples", lambda *asked: made.append(asked) or resamples(*asked))
    bootstrap._known_resamples.cache_clear()
    for k in range(3):
        estimate_statistic(lambda weights, k=k: weights @ np.arange(k, k + 9.0), np.arange(9), rng=1234)
    assert len(made) == 1
    monkeypatch.setattr(bootstrap, "_KEPT_COUNTS", 0)
    estimate_statistic(lambda weights: weights @ np.arange(9.0), np.arange(9), rng=1234)
    assert len(made) == 2, "more than may be kept is drawn anew"
