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
    threshold_agreement,
)
from vlm_core.stats import estimate_statistic
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
    found = layer_test(values)
    flat = stats.kruskal(*[values[:, layer].ravel() for layer in range(4)])
    assert found.p_items == pytest.approx(flat.pvalue) and found.epsilon_items == pytest.approx(flat.statistic / (values.size - 1))
    assert found.p_heads == pytest.approx(stats.kruskal(*values.mean(0)).pvalue)
    assert found.p_within[2] == pytest.approx(stats.kruskal(*values[:, 2].T).pvalue)
    statistic = between_minus_within(values, clusters)
    whole = statistic(np.ones((1, 20)))[0]
    assert whole == pytest.approx(found.epsilon_items - np.mean(found.epsilon_within))
    assert statistic(np.full((1, 20), 3.0))[0] == pytest.approx(whole)
    lower, upper = estimate_statistic(statistic, clusters).bounds(0.05)
    assert lower > 0 if sign > 0 else upper < 0
    assert found.p_heads < 0.001 if sign > 0 else found.p_heads > 0.05


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


def test_agreement_of_thresholds_is_that_of_the_worst():
    rng = np.random.default_rng(0)
    base = rng.random((30, 2, 5))
    per_item = np.stack([base, base * 2, base.mean() - base], axis=-1)
    clusters = tuple(f"scene-{k // 2}" for k in range(30))
    impact = HeadImpact(per_item, per_item, ("mean", "0.75", "0.9"), tuple(map(str, range(30))), clusters)
    ones = np.ones((2, 15))
    np.testing.assert_allclose(threshold_agreement(impact, "0.75")(ones), 1.0)
    np.testing.assert_allclose(threshold_agreement(impact)(ones), -1.0)
    alone = HeadImpact(per_item[..., :1], per_item[..., :1], ("mean",), impact.items, clusters)
    with pytest.raises(ValueError, match="one threshold only"):
        threshold_agreement(alone)


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
        layer_test(np.ones((3, 1, 4)))
