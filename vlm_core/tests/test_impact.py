"""Head Impact is what its definition says on a model's own attention, and its comparisons are those of the textbook tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from vlm_core.heads.impact import (
    HeadImpact,
    between_minus_within,
    head_impact,
    kendall_tau,
    layer_ranking,
    layer_test,
    least_layer_p,
    threshold_agreement,
)
from vlm_core.stats import estimate_statistic, jackknife_statistic
from vlm_core.tests.tiny import make_items

SIDE = 16


def square(item) -> np.ndarray:
    """A block of 6 x 6 pixels (it touches 4 to 9 patches of 4 x 4), elsewhere in every item."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    row, column = divmod(7 * int(item["id"].split("-")[1]), 10)
    mask[row : row + 6, column : column + 6] = True
    return mask


def shown_tokens(mask) -> np.ndarray:
    """``[17]``: the CLS token shows nothing, a patch shows what lies in its 4 x 4 pixels."""
    patches = mask.reshape(4, 4, 4, 4).any((1, 3)).ravel()
    return np.concatenate([[False], patches])


def attention_while_answering(subject, item) -> np.ndarray:
    """``[layer, head, image token]`` by the model's own eager attention, averaged over the positions that predict the answer's tokens."""
    batch = subject.encode_items([item])
    answer = subject.continuation(item["answer"])
    inputs = dict(batch.inputs)
    extra = torch.tensor([answer[:-1]], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        maps = subject.model(**inputs, output_attentions=True).attentions
    n = batch.image.shape[1]
    image = np.flatnonzero(batch.image[0].numpy())
    return np.stack([layer[0, :, n - 1 :].mean(1)[:, image].numpy() for layer in maps])


@pytest.mark.parametrize("multi_token", [False, True])
def test_impact_is_the_overlap_of_what_is_above_the_threshold(eager_subject, multi_token):
    items = make_items(8, multi_token=multi_token)
    assert not multi_token or max(len(eager_subject.continuation(item["answer"])) for item in items) == 2
    found = head_impact(eager_subject, items, square, thresholds=("mean", "mean + sd", 0.7, 0.9), batch_rows=3)
    levels = {
        "mean": lambda row: row.mean(),
        "mean + sd": lambda row: row.mean() + row.std(),
        "0.7": lambda row: np.quantile(row, 0.7),
        "0.9": lambda row: np.quantile(row, 0.9),
    }
    assert found.items == tuple(item["id"] for item in items)
    for number, item in enumerate(items):
        maps, mask = attention_while_answering(eager_subject, item), shown_tokens(square(item))
        for layer, head in np.ndindex(maps.shape[:2]):
            for name, level in levels.items():
                high = maps[layer, head] > level(maps[layer, head])
                expected = (high & mask).sum() / (high | mask).sum()
                assert found.at(name)[number, layer, head] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(found.scores, found.at("mean").mean(0))
    assert np.ptp(found.scores) > 0.05


def test_elsewhere_is_the_mask_of_the_next_item_of_the_task_in_another_scene(subject, items):
    # Tasks alternate and two neighbours share a scene: the next of the same task is two items on.
    partner = {item["id"]: square(items[(number + 2) % len(items)]) for number, item in enumerate(items)}
    found, swapped = head_impact(subject, items, square), head_impact(subject, items, partner)
    np.testing.assert_array_equal(found.elsewhere, swapped.per_item)
    difference = (found.at("mean") - swapped.at("mean")).mean((1, 2))
    np.testing.assert_allclose(found.own_minus_elsewhere(), difference)


def test_items_that_do_not_show_their_object_are_left_out(subject, items):
    masks = {item["id"]: square(item) for item in items}
    masks["item-4"] = np.zeros((SIDE, SIDE), dtype=bool)
    found = head_impact(subject, items, masks)
    # item-2 would be compared with item-4's mask, which shows nothing
    assert [item["id"] for item in items if item["id"] not in found.items] == ["item-2", "item-4"]
    with pytest.raises(ValueError, match="no item shows its object"):
        head_impact(subject, items, {item["id"]: np.zeros((SIDE, SIDE), dtype=bool) for item in items})


def test_refusals(subject, items):
    with pytest.raises(ValueError, match="lack 'mean'"):
        head_impact(subject, items, square, thresholds=(0.9,))
    with pytest.raises(ValueError, match="all items are of one scene"):
        head_impact(subject, items[:2], square)
    with pytest.raises(ValueError, match="no threshold 'half' was measured"):
        head_impact(subject, items[:4], square).at("half")


def cube(layer_effect: float, head_effect: float, noise: float = 0.05) -> np.ndarray:
    rng = np.random.default_rng(1)
    layers, heads = np.arange(4)[:, None] * layer_effect, np.arange(6)[None] * head_effect
    return layers + heads + noise * rng.standard_normal((40, 4, 6))


@pytest.mark.parametrize(("layer_effect", "head_effect", "sign"), [(1.0, 0.0, 1), (0.0, 1.0, -1)])
def test_layers_against_heads_of_a_layer(layer_effect, head_effect, sign):
    values, clusters = cube(layer_effect, head_effect), np.repeat(np.arange(20), 2)
    found = layer_test(values, clusters)
    flat = stats.kruskal(*[values[:, layer].ravel() for layer in range(4)])
    assert found.p_items == pytest.approx(flat.pvalue) and found.epsilon_items == pytest.approx(flat.statistic / (values.size - 1))
    assert found.p_heads == pytest.approx(stats.kruskal(*values.mean(0)).pvalue)
    assert found.epsilon_within[2] == pytest.approx(stats.kruskal(*values[:, 2].T).statistic / (40 * 6 - 1))
    blocks = values[:, 2].reshape(20, 2, 6).mean(1)  # a scene is one block, however many items it has
    friedman = stats.friedmanchisquare(*blocks.T)
    assert found.p_within[2] == pytest.approx(friedman.pvalue) and found.w_within[2] == pytest.approx(friedman.statistic / (20 * 5))
    statistic = between_minus_within(values, clusters)
    whole = statistic(np.ones((1, 20)))[0]
    assert whole == pytest.approx(found.epsilon_items - np.mean(found.epsilon_within))
    assert statistic(np.full((1, 20), 3.0))[0] == pytest.approx(whole)
    lower, upper = jackknife_statistic(statistic, clusters).bounds(0.05)
    assert lower > 0 if sign > 0 else upper < 0
    assert found.p_heads < 0.001 if sign > 0 else found.p_heads > 0.05


@pytest.mark.parametrize("layer_effect", [0.3, 0.0])
def test_bounds_of_layers_against_heads_hold_where_those_of_a_bootstrap_do_not(layer_effect):
    fixed = np.random.default_rng(1)
    effects = layer_effect * fixed.normal(size=(6, 1)) + 0.3 * fixed.normal(size=(6, 8))

    def sample(seed):
        rng = np.random.default_rng([seed, 5])
        return effects + rng.normal(size=(60, 6, 8)) + 0.5 * rng.normal(size=(60, 1, 1))

    mean = np.mean([between_minus_within(sample(1000 + seed), range(60))(np.ones((1, 60)))[0] for seed in range(200)])
    missed = {"jackknife": 0, "bootstrap": 0}
    for seed in range(80):
        statistic = between_minus_within(sample(seed), range(60))
        missed["jackknife"] += jackknife_statistic(statistic, range(60)).bounds(0.05)[0] > mean
        missed["bootstrap"] += estimate_statistic(statistic, range(60), n_resamples=300, rng=seed).bounds(0.05)[0] > mean
    assert missed["jackknife"] <= stats.binom.isf(1e-3, 80, 0.05) < missed["bootstrap"]


def test_a_resample_counts_every_cluster_as_often_as_it_is_drawn():
    values, clusters = cube(0.3, 0.2, noise=0.5), np.repeat(np.arange(20), 2)
    weights = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20)).astype(float)
    times = weights[clusters].astype(int)
    overall = np.repeat(stats.rankdata(values).reshape(values.shape), times, axis=0)
    between = np.square(overall.mean((0, 2)) - overall.mean()).mean() / overall.var()
    within = []
    for layer in range(4):
        ranks = np.repeat(stats.rankdata(values[:, layer]).reshape(40, 6), times, axis=0)
        within.append(np.square(ranks.mean(0) - ranks.mean()).mean() / ranks.var())
    assert between_minus_within(values, clusters)(weights[None])[0] == pytest.approx(between - np.mean(within))


def test_kendall_tau_is_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (2, 3, 4, 12))
    found = kendall_tau(first, second)
    for index in np.ndindex(3, 4):
        assert found[index] == pytest.approx(stats.kendalltau(first[index], second[index]).statistic)
    assert kendall_tau(np.zeros(4), np.arange(4)) == 0.0


def test_heads_that_differ_on_every_image_differ_although_images_differ_more():
    rng = np.random.default_rng(0)
    values = 5 * rng.standard_normal((40, 1, 1)) + 0.2 * np.arange(6) + 0.1 * rng.standard_normal((40, 3, 6))
    found = layer_test(values, np.arange(40))
    assert max(found.p_within) < 1e-6
    assert min(stats.kruskal(*values[:, layer].T).pvalue for layer in range(3)) > 0.05  # an unpaired test does not see it


def thresholds(seed, n=60):
    """Head Impact over ``n`` scenes of 48 heads at two thresholds, whose means differ a little."""
    fixed = np.random.default_rng(0)
    base, other = fixed.normal(size=48), 0.35 * fixed.normal(size=48)
    rng = np.random.default_rng([seed, 9])
    noise = 2 * rng.normal(size=(n, 48))
    per_item = np.stack([base + noise, base + other + noise + 0.5 * rng.normal(size=(n, 48))], axis=-1).reshape(n, 6, 8, 2)
    names = tuple(f"scene {k:03d}" for k in range(n))
    return HeadImpact(per_item, per_item, ("mean", "0.9"), names, names)


def test_agreement_of_thresholds_is_that_of_their_rankings():
    rng = np.random.default_rng(0)
    base = rng.random((30, 2, 5))
    per_item = np.stack([base, base * 2, base.mean() - base], axis=-1)
    clusters = tuple(f"scene-{k // 2:02d}" for k in range(30))
    impact = HeadImpact(per_item, per_item, ("mean", "0.75", "0.9"), tuple(map(str, range(30))), clusters)
    ones = np.ones((2, 15))
    np.testing.assert_allclose(threshold_agreement(impact, "0.75")(ones), 1.0)
    np.testing.assert_allclose(threshold_agreement(impact, "0.9")(ones), -1.0)
    mixed = thresholds(0, 20)
    weights = np.random.default_rng(1).multinomial(20, np.full(20, 1 / 20)).astype(float)
    rankings = [np.tensordot(weights, mixed.at(name), 1).ravel() for name in mixed.thresholds]
    assert threshold_agreement(mixed, "0.9")(weights[None])[0] == pytest.approx(stats.kendalltau(*rankings).statistic)


def test_bounds_of_the_agreement_hold_where_those_of_a_bootstrap_do_not():
    mean = np.mean([threshold_agreement(thresholds(1000 + seed), "0.9")(np.ones((1, 60)))[0] for seed in range(200)])
    missed = {"jackknife": np.zeros(2), "bootstrap": np.zeros(2)}
    for seed in range(60):
        one = thresholds(seed)
        statistic = threshold_agreement(one, "0.9")
        found = {"jackknife": jackknife_statistic(statistic, one.clusters)}
        found["bootstrap"] = estimate_statistic(statistic, one.clusters, n_resamples=300, rng=seed)
        for name, estimate in found.items():
            lower, upper = estimate.bounds(0.05)
            missed[name] += lower > mean, upper < mean
    assert missed["jackknife"].max() <= stats.binom.isf(1e-3, 60, 0.05)
    assert missed["bootstrap"].sum() > stats.binom.isf(1e-3, 60, 0.1)


@pytest.mark.parametrize(("n_layers", "n"), [(28, 4), (26, 4), (32, 4), (24, 4), (12, 2), (6, 1), (2, 1)])
def test_layers_are_ranked_and_their_number_goes_with_the_depth(n_layers, n):
    means = np.random.default_rng(0).permutation(n_layers)
    found = layer_ranking(means[:, None] + np.array([[-0.2, 0.2]]), seed=3)
    assert [means[layer] for layer in found.order] == list(range(n_layers))[::-1]
    assert found.top == tuple(sorted(found.order[:n])) and found.bottom == tuple(sorted(found.order[-n:]))
    assert len(set(found.random)) == n and not set(found.random) & set(found.top)
    assert n_layers == 2 or not set(found.random) & set(found.bottom)
    assert layer_ranking(means[:, None], seed=3).random == found.random


def test_layers_that_cannot_be_ranked_are_refused():
    with pytest.raises(ValueError, match="no top 3 and bottom 3"):
        layer_ranking(np.ones((5, 2)), n=3)
    with pytest.raises(ValueError, match="finite scores"):
        layer_ranking(np.array([[1.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="two layers and heads or more"):
        layer_test(np.ones((3, 1, 4)), range(3))


def test_the_least_p_between_layers_is_that_of_layers_fully_apart():
    # H = 12 / (n (n + 1)) * sum of squared rank sums / heads - 3 (n + 1): ranks 1 2 | 3 4 | 5 6
    assert least_layer_p(3, 2) == pytest.approx(stats.chi2.sf(12 / 42 * (9 + 49 + 121) / 2 - 21, 2))
    values = np.random.default_rng(0).random((300, 4, 3))
    assert min(stats.kruskal(*one).pvalue for one in values) >= least_layer_p(4, 3)
    assert least_layer_p(1, 8) == 1.0 and least_layer_p(12, 1) > 0.4 and least_layer_p(6, 8) < 0.001
