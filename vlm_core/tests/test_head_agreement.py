"""Agreement, depth and correlation over tasks: what was planted is found with bounds that hold it, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vlm_core.heads.agreement import attention_agreement, attribution_depth, scene_agreement, wording_agreement
from vlm_core.heads.attribution import HeadAttribution

FEW = {"n_resamples": 500}


def attribution(per_item, per_scene=2, name="s"):
    clusters = tuple(f"{name}{i // per_scene:03d}" for i in range(len(per_item)))
    return HeadAttribution(per_item, tuple(f"{name}{i}" for i in range(len(per_item))), clusters, "margin", 100, np.ones((len(per_item), 3)))


def drawn(truth, noise, n=24, seed=0, **options):
    rng = np.random.default_rng(seed)
    return attribution(truth + noise * rng.normal(size=(n, *truth.shape)), **options)


TRUTH = np.random.default_rng(7).normal(size=(4, 6)) ** 3


def test_one_ranking_in_all_scenes_agrees_and_noise_does_not():
    same = scene_agreement({"a": drawn(TRUTH, 0.01), "b": drawn(-TRUTH, 0.01, name="t")}, **FEW)
    assert same.by_task["a"] > 0.97 and same.estimate.value > 0.97
    nothing = {f"t{k}": drawn(np.zeros((4, 6)), 1.0, seed=k, name=f"s{k}-") for k in range(40)}
    halves = scene_agreement(nothing, **FEW)
    assert halves.estimate.value == pytest.approx(0.5, abs=0.06)
    assert scene_agreement(nothing, parts=4, **FEW).estimate.value == pytest.approx(0.25, abs=0.05)
    lower, upper = halves.estimate.bounds(0.05)
    assert lower < halves.estimate.value < upper < 0.7


def test_parts_are_disjoint_scenes_of_equal_number():
    # every scene has a ranking of its own, both of its items the same: only rankings of whole scenes can come out
    maps = np.repeat(np.random.default_rng(0).normal(size=(2, 4, 6)), 2, axis=0)
    four = np.concatenate([maps, maps])  # scenes 0 and 2 are alike, 1 and 3 are alike
    found = {scene_agreement({"a": attribution(four)}, seed=seed, **FEW).by_task["a"] for seed in range(12)}
    split = stats.spearmanr(maps[0].ravel(), maps[2].ravel()).statistic
    assert len(found) > 1 and min(found) == pytest.approx((1 + split) / 2) and max(found) == pytest.approx(1.0)


def test_bounds_of_scene_agreement_cover_what_new_scenes_give():
    def sample(seed):
        return scene_agreement({name: drawn(TRUTH, 2.0, seed=10 * seed + k, name=name) for k, name in enumerate("abc")}, seed=seed, n_resamples=400)

    found = [sample(seed).estimate for seed in range(60)]
    truth = np.mean([one.value for one in found])
    missed = sum(one.bounds(0.05)[0] > truth for one in found), sum(one.bounds(0.05)[1] < truth for one in found)
    assert max(missed) <= 8  # 3 expected; 9 or more have a chance of 0.3 %
    width = np.mean([one.bounds(0.05)[1] - one.bounds(0.05)[0] for one in found])
    assert width == pytest.approx(2 * 1.65 * np.std([one.value for one in found]), rel=0.4)


def test_two_wordings_agree_by_spearman_and_are_of_one_set_of_scenes():
    one, other = drawn(TRUTH, 0.1), drawn(TRUTH + np.random.default_rng(1).normal(size=TRUTH.shape), 0.1, seed=1)
    found = wording_agreement({"a": (one, other)}, **FEW)
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
    assert found.by_task["a"] == pytest.approx((1 * 0.25 + 1 * 0.5 + 3 * 1.0) / 5)
    assert found.by_task["b"] == pytest.approx((3 * 0.25 + 1 * 0.75 + 1 * 1.0) / 5)
    assert found.estimate.value == pytest.approx((found.by_task["a"] + found.by_task["b"]) / 2)
    lower, upper = found.estimate.bounds(0.05)
    assert 0 < lower < found.estimate.value < upper < 1
    nothing = attribution_depth({"a": drawn(-np.ones((4, 2)), 0.01)}, **FEW)
    assert nothing.by_task["a"] == pytest.approx(np.mean([0.25, 0.5, 0.75, 1.0])) and nothing.estimate is None


def test_correlation_of_attention_and_attribution_is_spearmans():
    rng = np.random.default_rng(3)
    one = drawn(TRUTH, 0.5)
    masses = {"a": rng.random((24, 4, 6)), "b": np.exp(one.per_item)}
    found = attention_agreement({"a": one, "b": one}, masses, **FEW)
    for task in masses:
        rho = stats.spearmanr(one.coefficients.ravel(), masses[task].mean(0).ravel()).statistic
        assert found.by_task[task] == pytest.approx(rho)
    assert found.by_task["b"] > 0.8
    lower, upper = found.estimate.bounds(0.05)
    assert -1 < lower < found.estimate.value < upper < 1


def test_scenes_that_a_draw_leaves_out_entirely_are_no_crash():
    few = {"a": drawn(TRUTH, 1.0, n=8), "b": drawn(TRUTH, 1.0, n=200, name="t")}
    # in a quarter of the draws one half of the four scenes is missing: as no agreement these would stretch the bounds to nothing
    found = scene_agreement(few, **FEW).estimate
    assert found.bounds(0.05)[0] > found.value - 0.15
    with pytest.raises(ValueError, match="a has 4 scenes: 3 parts need at least 6"):
        scene_agreement({"a": few["a"]}, parts=3)


def test_without_any_task_there_is_no_estimate():
    for found in (scene_agreement({}), wording_agreement({}), attribution_depth({}), attention_agreement({}, {})):
        assert found.by_task == {} and found.estimate is None
