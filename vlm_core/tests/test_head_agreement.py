"""Agreement, depth and correlation over tasks: what was planted is found with bounds that hold it, and nothing where there is nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from vlm_core.errors import NotMeasurable
from vlm_core.heads.agreement import SPLITS, attention_agreement, attribution_depth, scene_agreement, wording_agreement
from vlm_core.heads.attribution import HeadAttribution
from vlm_core.stats import kendall_w

FEW = {"n_resamples": 500}


def attribution(per_item, per_scene=2, name="s", names=None):
    clusters = tuple(names or (f"{name}{i // per_scene:03d}" for i in range(len(per_item))))
    ids = tuple(f"{name}{i}" for i in range(len(per_item)))
    return HeadAttribution(per_item, ids, clusters, "margin", 100, np.ones((len(per_item), 3)))


def drawn(truth, noise, n=24, seed=0, **options):
    rng = np.random.default_rng(seed)
    return attribution(truth + noise * rng.normal(size=(n, *truth.shape)), **options)


TRUTH = np.random.default_rng(7).normal(size=(4, 6)) ** 3


def test_one_ranking_in_all_scenes_agrees_and_noise_does_not():
    same = scene_agreement({"a": drawn(TRUTH, 0.01), "b": drawn(-TRUTH, 0.01, name="t")})
    assert same.by_task["a"] > 0.97 and same.estimate.value > 0.97
    nothing = {f"t{k}": drawn(np.zeros((4, 6)), 1.0, seed=k, name=f"s{k}-") for k in range(20)}
    halves = scene_agreement(nothing)
    assert halves.estimate.value == pytest.approx(0.5, abs=0.06)
    assert scene_agreement(nothing, parts=4).estimate.value == pytest.approx(0.25, abs=0.05)
    lower, upper = halves.estimate.bounds(0.05)
    assert lower < halves.estimate.value < upper < 0.7


def test_parts_are_disjoint_scenes_of_equal_number():
    # every scene has a ranking of its own, both of its items the same: only rankings of whole scenes can come out
    maps = np.repeat(np.random.default_rng(0).normal(size=(2, 4, 6)), 2, axis=0)
    four = np.concatenate([maps, maps])  # scenes 0 and 2 are alike, 1 and 3 are alike
    rho = stats.spearmanr(maps[0].ravel(), maps[2].ravel()).statistic
    # halves hold {0, 1} and {2, 3} or {0, 3} and {1, 2}, which agree wholly, or {0, 2} and {1, 3}
    for seed in range(6):
        found = scene_agreement({"a": attribution(four)}, seed=seed).by_task["a"]
        (apart,) = [k for k in range(SPLITS + 1) if found == pytest.approx(1 - k / SPLITS * (1 - (1 + rho) / 2), abs=1e-9)]
        assert stats.binom.cdf(apart, SPLITS, 1 / 3) > 1e-3 < stats.binom.sf(apart - 1, SPLITS, 1 / 3)


@dataclasses.dataclass
class Population:
    """Tasks whose scenes have maps around a true one, noisier where heads matter more; wordings share half of the noise."""

    noise: float
    common: float = 0.5
    n: int = 16
    tasks: int = 2

    def maps(self, rng, n):
        """``[wording, task, scene, head]``"""
        truth = np.random.default_rng(3).normal(size=(self.tasks, 1, 48)) ** 3
        own = rng.standard_t(4, size=(2, self.tasks, n, 48)) * np.sqrt(1 - self.common)
        scenes = rng.standard_t(4, size=(self.tasks, n, 48)) * np.sqrt(self.common)
        return truth + self.noise * (0.3 + np.abs(truth)) * (own + scenes)

    def expected(self, draws=1500):
        """W of rankings of scenes drawn anew: of two different halves, and of all in two wordings."""
        rng, found = np.random.default_rng(17), []
        for _ in range(draws):
            drawn = self.maps(rng, self.n)
            halves = np.stack([drawn[0, :, : self.n // 2].mean(1), drawn[0, :, self.n // 2 :].mean(1)], axis=1)
            found.append((kendall_w(halves).mean(), kendall_w(drawn.mean(2).swapaxes(0, 1)).mean()))
        return np.mean(found, axis=0)

    def estimates(self, seed):
        first, second = (
            # neighbouring tasks share half of their scenes' names
            {
                f"t{k}": attribution(one.reshape(-1, 6, 8), 1, names=[f"s{i + k * self.n // 2}" for i in range(self.n)])
                for k, one in enumerate(wording)
            }
            for wording in self.maps(np.random.default_rng([seed, 5]), self.n)
        )
        return scene_agreement(first, seed=seed).estimate, wording_agreement({task: (first[task], second[task]) for task in first}).estimate


@pytest.mark.parametrize("noise", [1.0, 2.0, 30.0])
def test_bounds_of_agreement_hold_what_scenes_drawn_anew_are_expected_to_give(noise):
    # expected W of halves 0.87, 0.69, 0.50 and of wordings 0.96, 0.87, 0.71
    population, runs = Population(noise), 120
    found = [population.estimates(seed) for seed in range(runs)]
    for expected, estimates in zip(population.expected(), zip(*found, strict=True), strict=True):
        values, errors = (np.array([getattr(one, name) for one in estimates]) for name in ("value", "standard_error"))
        assert values.mean() == pytest.approx(expected, abs=4 * values.std() / np.sqrt(runs))
        for alpha in (0.05, 0.05 / 30):
            bounds = np.array([one.bounds(alpha) for one in estimates])
            for missed in ((bounds[:, 0] > expected).sum(), (bounds[:, 1] < expected).sum()):
                assert stats.binomtest(int(missed), runs, alpha, alternative="greater").pvalue > 1e-3, (expected, alpha, missed)
        # conservative, by how much: standard errors are 1.3 to 2.2 times the spread that they stand for
        assert 1.05 < np.sqrt(np.square(errors).mean()) / values.std() < 2.6


def test_few_heads_have_too_few_rankings_for_bounds():
    few = {"a": drawn(np.arange(11.0)[None], 1.0)}
    with pytest.raises(NotMeasurable, match="there are 11 heads to rank: .* need 12 or more"):
        scene_agreement(few)
    with pytest.raises(NotMeasurable, match="11 heads"):
        wording_agreement({"a": (few["a"], few["a"])})
    assert scene_agreement({"a": drawn(np.arange(12.0)[None], 1.0)}).estimate is not None


def test_two_wordings_agree_by_spearman_and_are_of_one_set_of_scenes():
    one, other = drawn(TRUTH, 0.1), drawn(TRUTH + np.random.default_rng(1).normal(size=TRUTH.shape), 0.1, seed=1)
    found = wording_agreement({"a": (one, other)})
    rho = stats.spearmanr(one.coefficients.ravel(), other.coefficients.ravel()).statistic
    assert found.by_task == {"a": pytest.approx((1 + rho) / 2)}
    lower, upper = found.estimate.bounds(0.05)
    assert lower < found.estimate.value < upper
    with pytest.raises(ValueError, match="a: the attributions are of different scenes"):
        wording_agreement({"a": (one, drawn(TRUTH, 0.1, name="u"))})


def test_depth_is_the_mean_layer_weighted_by_what_is_positive():
    per_item = np.zeros((6, 4, 2))
    per_item[:, 0, 1], per_item[:, 3, 0], per_item[:, 2, 1] = 1.0, 3.0, -5.0
    per_item[0, 1, 0] = 6.0  # one item in six
    found = attribution_depth({"a": attribution(per_item, 1), "b": attribution(per_item[:, ::-1] * 10, 1, "t")}, **FEW)
    assert found.by_task["a"] == pytest.approx((1 * 0.125 + 1 * 0.375 + 3 * 0.875) / 5)
    assert found.by_task["b"] == pytest.approx((3 * 0.125 + 1 * 0.625 + 1 * 0.875) / 5)
    assert found.estimate.value == pytest.approx((found.by_task["a"] + found.by_task["b"]) / 2)
    lower, upper = found.estimate.bounds(0.05)
    assert 0 < lower < found.estimate.value < upper < 1
    nothing = attribution_depth({"a": drawn(-np.ones((4, 2)), 0.01)}, **FEW)
    assert nothing.by_task["a"] == pytest.approx(0.5) and nothing.estimate is None


@pytest.mark.parametrize("layers", [1, 2, 3, 12])
def test_layers_that_weigh_the_same_lie_at_one_half(layers):
    assert attribution_depth({"a": attribution(np.ones((6, layers, 2)), 1)}, **FEW).by_task["a"] == pytest.approx(0.5)


def test_depth_draws_enough_for_the_level_asked_for():
    found = {alpha: attribution_depth({"a": drawn(TRUTH, 1.0)}, smallest_alpha=alpha, n_resamples=100).estimate for alpha in (0.05, 0.001)}
    assert found[0.001].resolution < 1e-3 < found[0.05].resolution


def test_items_are_counted_once_however_many_rankings_they_are_in():
    one, other = drawn(TRUTH, 0.5), drawn(TRUTH, 0.5, seed=1)
    elsewhere = drawn(TRUTH, 0.5, n=10, name="t")
    estimates = [
        scene_agreement({"a": one, "b": elsewhere}).estimate,
        wording_agreement({"a": (one, other), "b": (elsewhere, elsewhere)}).estimate,
        attribution_depth({"a": one, "b": elsewhere}, **FEW).estimate,
    ]
    assert [(found.n_items, found.n_clusters) for found in estimates] == [(34, 17)] * 3
    assert attention_agreement(one, np.random.default_rng(0).random((24, 4, 6))).estimate.n_items == 24


def test_correlation_of_attention_and_attribution_is_spearmans_over_the_root_of_the_reliability():
    rng = np.random.default_rng(3)
    one = drawn(TRUTH, 0.5)
    for masses in (rng.random((24, 4, 6)), np.exp(one.per_item)):
        found = attention_agreement(one, masses)
        assert found.measured == pytest.approx(stats.spearmanr(one.coefficients.ravel(), masses.mean(0).ravel()).statistic)
        assert found.estimate.value == pytest.approx(found.measured / np.sqrt(found.reliability))
        lower, upper = found.estimate.bounds(0.05)
        assert lower < found.estimate.value < upper
    halves = scene_agreement({"a": one}).by_task["a"]
    between = 2 * halves - 1
    assert found.reliability == pytest.approx(2 * between / (1 + between))
    with pytest.raises(ValueError, match="expected that of the attribution"):
        attention_agreement(one, masses[:3])


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_noise_does_not_hide_that_attention_goes_with_attribution(noise):
    # ρ of the true maps is at the limit of ±0.3: a claim that it lies within is false, and noise in the attribution makes it no truer
    rng, runs = np.random.default_rng(1), 150
    truth = rng.normal(size=(6, 8))
    against = next(
        one for one in (0.31 * truth + np.random.default_rng(k).normal(size=truth.shape) for k in range(10_000))
        if 0.3 <= stats.spearmanr(truth.ravel(), one.ravel()).statistic < 0.303
    )  # fmt: skip
    found = []
    for _ in range(runs):
        per_item = truth + noise * rng.standard_t(4, size=(24, *truth.shape))
        found.append(attention_agreement(attribution(per_item, 1), against + 0.1 * rng.normal(size=per_item.shape)))
    within = sum(one.estimate.bounds(0.05)[1] < 0.3 for one in found)
    assert stats.binomtest(within, runs, 0.05, alternative="greater").pvalue > 1e-3, within
    assert np.mean([one.estimate.value for one in found]) == pytest.approx(0.3, abs=0.03)
    if noise > 1:
        assert np.mean([one.measured for one in found]) < 0.26


def test_an_attribution_of_noise_alone_tells_nothing_of_attention():
    masses = np.exp(drawn(TRUTH, 0.1).per_item)
    found = [attention_agreement(drawn(np.zeros((4, 6)), 1.0, seed=seed), masses).estimate for seed in range(40)]
    bounds = [one.bounds(0.05) for one in found]
    assert sum(-0.3 < lower and upper < 0.3 for lower, upper in bounds) <= 5  # 2 in 40 are meant


def test_tasks_of_few_and_of_many_scenes_are_bounded_together():
    few = {"a": drawn(TRUTH, 1.0, n=8), "b": drawn(TRUTH, 1.0, n=200, name="t")}
    assert attribution_depth(few, **FEW).estimate.n_clusters == 104
    with pytest.raises(ValueError, match="a has 4 scenes: 3 parts need at least 6"):
        scene_agreement({"a": few["a"]}, parts=3)


def test_without_any_task_there_is_no_estimate():
    for found in (scene_agreement({}), wording_agreement({}), attribution_depth({})):
        assert found.by_task == {} and found.estimate is None
