"""The machinery tested on itself: simulated false-support rates, coverage and power.

Seeds are fixed. Each assertion also states how far a right implementation could stray: ``plausible`` fails at a
one-in-10,000 excess over the claimed rate, so it would pass under nearly every other seed.
"""

import numpy as np
import pytest
from scipy import stats

from vlm_core.stats import Claim, Equivalence, NonInferiority, Superiority, Verdict, decide, estimate_mean, intervals, verdict
from vlm_core.stats.intervals import bca_bounds, student_bounds
from vlm_core.stats.power import clusters_needed, minimum_detectable_effect

FAMILY_ALPHA = 0.05 / 7


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "N_RESAMPLES", 999)


def plausible(hits, trials, rate, *, at_most=False):
    """Whether a count of hits is no surprise at the stated rate (or, with ``at_most``, at any rate below it)."""
    alternative = "greater" if at_most else "two-sided"
    return stats.binomtest(int(hits), int(trials), rate, alternative=alternative).pvalue > 1e-4


def misses(draw, truth, alphas=(0.05, FAMILY_ALPHA), trials=600, **options):
    """[level, side] how often the lower bound lies above the truth and the upper below it."""
    found = np.zeros((len(alphas), 2), dtype=int)
    for trial in range(trials):
        effect, clusters, *seeds = draw(np.random.default_rng([trial, 11]))
        estimate = estimate_mean(effect, clusters, *seeds, rng=trial, **options)
        for row, alpha in enumerate(alphas):
            lower, upper = estimate.bounds(alpha)
            found[row] += lower > truth, upper < truth
    return found


def losses(n, lost, gained=0.0):
    """Independent items of which a share is lost and a share gained by the intervention."""

    def draw(rng):
        u = rng.random(n)
        return (u < lost).astype(float) - (u > 1 - gained), np.arange(n)

    return draw


# BCa: the vectorised bounds that estimate_mean calls


@pytest.mark.parametrize("n", [30, 100])
def test_bca_misses_as_often_as_it_says_for_smooth_effects(n):
    trials, missed = 2000, np.zeros(2)
    for chunk in range(20):
        rng = np.random.default_rng(chunk)
        sums = rng.normal(0.1, 0.2, size=(trials // 20, n))
        lower, upper = bca_bounds(sums, np.ones_like(sums), rng, 499)(0.05)
        missed += np.sum(lower > 0.1), np.sum(upper < 0.1)
    assert plausible(missed[0], trials, 0.05) and plausible(missed[1], trials, 0.05)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        pytest.param(losses(60, 0.3, 0.2), 0.1, id="drop of 10 points, n=60"),
        pytest.param(losses(150, 0.12, 0.02), 0.1, id="mostly losses, n=150"),
    ],
)
def test_votes_are_covered(draw, truth):
    for row, alpha in zip(misses(draw, truth), (0.05, FAMILY_ALPHA)):
        assert plausible(row[0], 600, alpha, at_most=True) and plausible(row[1], 600, alpha, at_most=True)


def test_scenes_of_unequal_size_are_covered_for_the_mean_over_items():
    sizes = np.arange(1, 7)
    rates = 0.1 + 0.05 * sizes  # larger scenes are harder: the mean over scenes is another number
    truth = np.sum(sizes * rates) / sizes.sum()

    def draw(rng):
        size = rng.choice(sizes, 60)
        clusters = np.repeat(np.arange(60), size)
        scene_rate = np.clip(rates[size - 1] + rng.uniform(-0.1, 0.1, 60), 0, 1)
        return (rng.random(clusters.size) < scene_rate[clusters]).astype(float), clusters

    missed = misses(draw, truth, alphas=(0.05,))
    assert all(plausible(count, 600, 0.05) for count in missed[0])


# Rare losses: where Student t and the bootstrap support false claims


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        pytest.param(losses(30, 0.08, 0.03), 0.05, id="losses and gains, n=30"),
        pytest.param(losses(60, 0.05), 0.05, id="losses only, n=60"),
        pytest.param(losses(150, 0.05), 0.05, id="losses only, n=150"),
    ],
)
def test_rare_losses_never_support_non_inferiority_too_often(draw, truth):
    for row, alpha in zip(misses(draw, truth, trials=1500), (0.05, FAMILY_ALPHA)):
        assert plausible(row[0], 1500, alpha, at_most=True) and plausible(row[1], 1500, alpha, at_most=True)


def test_the_same_check_catches_student_t():
    trials, wrong = 1500, 0
    for trial in range(trials):
        effect, _ = losses(60, 0.05)(np.random.default_rng([trial, 11]))
        wrong += student_bounds(effect.mean(), effect.std(ddof=1) / np.sqrt(60), 59)(0.05)[1] < 0.05
    assert not plausible(wrong, trials, 0.05, at_most=True)


def test_few_clusters_are_covered():
    missed = misses(lambda rng: (rng.normal(0.1, 0.1, 8), np.arange(8)), 0.1, bounds=None, trials=1500)
    for row, alpha in zip(missed, (0.05, FAMILY_ALPHA)):
        assert plausible(row[0], 1500, alpha) and plausible(row[1], 1500, alpha)


# Seeds crossed with scenes


def crossed(seed_sd, n_seeds=3, n=40, scene_sd=0.25, noise_sd=0.3):
    def draw(rng):
        table = 0.3 + rng.normal(0, seed_sd, (n_seeds, 1)) + rng.normal(0, scene_sd, n)
        table = table + rng.normal(0, noise_sd, (n_seeds, n))
        return table.ravel(), np.tile(np.arange(n), n_seeds), np.repeat(np.arange(n_seeds), n)

    return draw


@pytest.mark.parametrize("seed_sd", [0.0, 0.05, 0.2])
def test_three_seeds_are_enough_to_be_honest(seed_sd):
    for row, alpha in zip(misses(crossed(seed_sd), 0.3, bounds=None, trials=400), (0.05, FAMILY_ALPHA)):
        assert plausible(row[0], 400, alpha, at_most=True) and plausible(row[1], 400, alpha, at_most=True)


def test_where_only_seeds_vary_coverage_is_that_of_student_t():
    missed = misses(crossed(0.2, scene_sd=0.01, noise_sd=0.01), 0.3, bounds=None, trials=400)
    assert plausible(missed[0].sum(), 400, 0.1)


def test_the_same_check_catches_pooling_the_seeds():
    def pooled(rng):
        effect, _, _ = crossed(0.2)(rng)
        return effect, np.arange(effect.size)

    missed = misses(pooled, 0.3, alphas=(0.05,), bounds=None, trials=200)
    assert not plausible(missed[0, 0], 200, 0.05, at_most=True)


# Whole decisions


@pytest.fixture
def verdicts_only(monkeypatch):
    """Skip the search for p-values, the slow half of a decision, where only verdicts are counted."""
    monkeypatch.setattr(verdict, "_own_p", lambda kind, estimate, limit: 0.5)


def claim(test, **options):
    return Claim("H1.null", "A claim that is just not true.", "effect", test, "simulation", **options)


def decisions(test, mean, trials=200, n=50, sd=0.2, family_size=1):
    found = []
    for trial in range(trials):
        effect = np.random.default_rng([trial, 5]).normal(mean, sd, n)
        found.append(
            decide(claim(test), effect, clusters=range(n), bounds=None, rng=trial, family_size=family_size)
        )
    return found


@pytest.mark.parametrize(
    ("test", "mean"),
    [(Superiority(0.1), 0.1), (NonInferiority(0.1), 0.1), (Equivalence(0.1), 0.1), (Equivalence(0.1), -0.1)],
)
def test_a_claim_on_its_limit_is_rarely_decided_either_way(test, mean, verdicts_only):
    found = [decision.verdict for decision in decisions(test, mean)]
    assert plausible(found.count(Verdict.SUPPORTED), 200, 0.05)
    assert plausible(found.count(Verdict.REFUTED), 200, 0.05)


def test_p_values_are_uniform_on_the_limit():
    p = [decision.p_value for decision in decisions(Superiority(0.1), 0.1)]
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_a_family_of_null_claims_rarely_holds_a_false_support(verdicts_only):
    families = 50
    found = decisions(Superiority(0.1), 0.1, trials=4 * families, family_size=4)
    false = np.array([decision.verdict is Verdict.SUPPORTED for decision in found]).reshape(families, 4).any(axis=1)
    assert plausible(false.sum(), families, 0.05, at_most=True)


@pytest.mark.parametrize(
    ("test", "mean"),
    [(Superiority(0.1), 0.2), (NonInferiority(0.1), 0.0), (Equivalence(0.1), 0.0), (Superiority(0.1), 0.0)],
)
def test_the_stated_number_of_clusters_decides_the_declared_effect(test, mean, verdicts_only):
    pilot = estimate_mean(np.random.default_rng(0).normal(0, 0.3, 2000), range(2000), bounds=None)
    n = clusters_needed(pilot, test, 0.05, None)
    expected = Verdict.REFUTED if (test, mean) == (Superiority(0.1), 0.0) else Verdict.SUPPORTED
    found = [decision.verdict for decision in decisions(test, mean, n=n, sd=0.3)]
    assert plausible(found.count(expected), 200, 0.8)


def test_the_detectable_effect_is_detected_four_times_in_five(verdicts_only):
    test = Superiority(0.1)
    design = estimate_mean(np.random.default_rng(1).normal(0, 0.2, 80), range(80), bounds=None)
    mean = 0.1 + minimum_detectable_effect(design, test, 0.05) * 0.2 / (design.standard_error * np.sqrt(80))
    found = [decision.verdict for decision in decisions(test, mean, n=80)]
    assert plausible(found.count(Verdict.SUPPORTED), 200, 0.8)


def test_the_detectable_effect_is_measured_on_the_side_that_decides():
    design = estimate_mean(np.random.default_rng(3).beta(0.5, 5, 60), range(60))
    lower, upper = design.bounds(0.05)
    drop, loss, same = (
        minimum_detectable_effect(design, test, 0.05) for test in (Superiority(0.1), NonInferiority(0.1), Equivalence(0.1))
    )
    assert loss - drop == pytest.approx((upper - design.value) - (design.value - lower))
    assert loss > drop and same > loss


def test_seeds_put_a_floor_under_the_detectable_effect():
    test = Superiority(0.1)
    design = estimate_mean(*crossed(0.05, n=100)(np.random.default_rng(2)), bounds=None)
    now, vast = (minimum_detectable_effect(design, test, 0.05, cluster_ratio=ratio) for ratio in (1, 1e9))
    floor = (stats.t.isf(0.05, 2) + stats.t.ppf(0.8, 2)) * design.seed_error
    assert vast == pytest.approx(floor, rel=1e-3)
    assert now > vast
