"""Attribution finds the heads that carry the image, and its linear model and random controls are what they say."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge

import vlm_core.heads.attribution
from vlm_core import HeadId, ImageKVMeans, ReplaceImageKV, image_kv_means
from vlm_core.heads.attribution import HeadAttribution, head_attribution
from vlm_core.heads.draws import (
    assign_draws,
    assign_shared,
    draw_losses,
    draw_means,
    draw_p,
    layer_free,
    layer_matched,
    matching_sets,
)
from vlm_core.heads.ranking import order_heads, top_heads, whole_heads
from vlm_core.tests.planted import next_token_logits, planted_subject, with_answers_the_image_raises
from vlm_core.tests.tiny import make_items

# -- planted heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["text", "all"])
@pytest.mark.parametrize("planted", [[(0, 1), (2, 3)], [(1, 0), (1, 2)], [(2, 2)]])
def test_planted_heads_are_found_by_id(planted, queries):
    subject, items = planted_subject(planted), make_items(12)
    means = image_kv_means(subject, items)
    others = ReplaceImageKV([head for head in subject.heads if head not in planted], means)
    for item in items[:3]:  # the surgery did what it says, and did not blind the model
        full = next_token_logits(subject, item, None)
        torch.testing.assert_close(next_token_logits(subject, item, others), full)
        assert (next_token_logits(subject, item, ReplaceImageKV(planted, means)) - full).abs().max() > 0.1
    items = with_answers_the_image_raises(subject, items, planted, means)
    found = head_attribution(subject, items, means, masks_per_item=40, keep_probability=0.8, queries=queries, seed=1)
    assert found.per_item.shape == (12, 3, 4)
    assert (found.n_items, found.n_masks) == (12, 40)
    assert set(found.ranking()[: len(planted)]) == set(planted)
    assert set(found.top(len(planted) / 12)) == set(planted)
    weakest = min(found.coefficients[head] for head in planted)
    assert max(abs(found.coefficients[head]) for head in subject.heads if head not in planted) < weakest / 3
    assert found.r2 > 0.7


# -- the linear model -------------------------------------------------------------------------------------------------


class SimulatedSweep:
    """Stands in for ``sweep``: the answer's logit is ``answer(item, mask number, kept heads)``; remembers the masks."""

    def __init__(self, answer, heads):
        self.answer, self.heads, self.kept = answer, heads, {}

    def __call__(self, subject, items, table, *, metrics, assignments, store, progress):
        rows = []
        for index, label in assignments:
            removed = set() if table[label] is None else set(table[label].heads)
            kept = np.array([head not in removed for head in self.heads], dtype=float)
            number = len(self.kept.setdefault(index, []))
            self.kept[index].append(kept)
            rows.append((items[index]["id"], label, metrics[0], self.answer(index, number, kept)))
        return pd.DataFrame(rows, columns=["item", "intervention", "metric", "value"])


def simulate(monkeypatch, answer, *, n_layers=3, n_heads=4, n_items=6, items=None, masks_per_item=20, sweep=None, **options):
    heads = [HeadId(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    subject = SimpleNamespace(image_heads=heads, anatomy=SimpleNamespace(n_layers=n_layers, n_heads=n_heads, image_layers=tuple(range(n_layers))))
    swept = SimulatedSweep(answer, heads)
    monkeypatch.setattr(vlm_core.heads.attribution, "sweep", sweep or swept)
    means = ImageKVMeans(torch.zeros(n_layers, n_heads, 2), torch.zeros(n_layers, n_heads, 2))
    items = items or [{"id": f"item-{i}", "scene_id": f"scene-{i}"} for i in range(n_items)]
    found = head_attribution(subject, items, means, masks_per_item=masks_per_item, **{"keep_probability": 0.8, **options})
    return found, swept


def linear(seed=3, n_items=6, n_heads=12):
    rng = np.random.default_rng(seed)
    effect, intercept = rng.normal(size=n_heads), 100 * rng.normal(size=n_items)
    return effect, lambda item, mask, kept: intercept[item] + float(kept @ effect)


def test_a_linear_model_with_item_intercepts_is_recovered(monkeypatch):
    effect, answer = linear()
    found, _ = simulate(monkeypatch, answer, masks_per_item=40)
    np.testing.assert_allclose(found.coefficients, effect.reshape(3, 4), atol=1e-2)
    assert found.r2 == pytest.approx(1.0, abs=1e-3)
    order = np.argsort(-effect)
    assert found.ranking() == [HeadId(*divmod(int(k), 4)) for k in order]


def test_coefficients_are_the_mean_of_least_squares_of_each_items_logit_on_its_mask(monkeypatch):
    effect, exact = linear()
    noise = np.random.default_rng(5).normal(scale=0.3, size=(6, 100))
    found, swept = simulate(monkeypatch, lambda item, mask, kept: exact(item, mask, kept) + noise[item, mask], masks_per_item=100)
    oracle = []
    for i in range(6):
        kept = np.array(swept.kept[i])
        logit = [exact(i, k, kept[k]) + noise[i, k] for k in range(100)]
        oracle.append(np.linalg.lstsq(np.column_stack([kept, np.ones(100)]), logit, rcond=None)[0][:12])
    np.testing.assert_allclose(found.per_item.reshape(6, 12), oracle, atol=0.06)  # ridge shrinks a little
    np.testing.assert_allclose(found.coefficients.ravel(), np.mean(oracle, axis=0), atol=0.04)
    assert 0.9 < found.r2 < 1.0


def test_ridge_is_scikit_learns_with_the_penalty_of_least_leave_one_out_error():
    rng = np.random.default_rng(2)
    penalties = vlm_core.heads.attribution._PENALTIES
    for masks, noise in ((30, 0.1), (30, 5.0), (9, 1.0)):  # as many masks as there are, or fewer than heads
        x = rng.random((3, masks, 12)) < 0.8
        y = x @ rng.normal(size=12) + noise * rng.normal(size=(3, masks))
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        found = vlm_core.heads.attribution._ridge(x, y)
        for item in range(3):
            errors = []
            for penalty in penalties:
                left_out = [
                    y[item, k] - Ridge(alpha=penalty).fit(np.delete(x[item], k, 0), np.delete(y[item], k)).predict(x[item, k : k + 1])[0]
                    for k in range(masks)
                ]
                errors.append(np.square(left_out).sum())
            best = penalties[int(np.argmin(errors))]
            np.testing.assert_allclose(found[item], Ridge(alpha=best, fit_intercept=False).fit(x[item], y[item]).coef_, atol=1e-6)


def test_items_have_their_own_coefficients_and_the_task_has_their_mean(monkeypatch):
    own = np.random.default_rng(9).normal(size=(6, 12))
    found, _ = simulate(monkeypatch, lambda item, mask, kept: float(kept @ own[item]), masks_per_item=60)
    np.testing.assert_allclose(found.per_item.reshape(6, 12), own, atol=0.05)
    np.testing.assert_allclose(found.coefficients.ravel(), own.mean(0), atol=0.02)
    assert found.r2 > 0.99 > 0.8 > found.r2_task


def test_what_an_item_is_given_depends_on_that_item_alone(monkeypatch):
    # every item has noise and effects of its own; whoever is measured beside it, wherever in the list, its numbers are the same
    rng = np.random.default_rng(11)
    own, noise = rng.normal(size=(8, 12)), rng.normal(size=(8, 30))

    def measured(numbers):
        items = [{"id": f"item-{number}", "scene_id": f"scene-{number}"} for number in numbers]
        return simulate(
            monkeypatch, lambda at, mask, kept: float(kept @ own[numbers[at]]) + noise[numbers[at], mask], items=items, masks_per_item=30
        )[0]

    whole = measured(range(8))
    for numbers in (range(4), [7, 2, 5], [6]):
        np.testing.assert_allclose(measured(numbers).per_item, whole.per_item[list(numbers)], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(measured(numbers).squares[:, :2], whole.squares[list(numbers), :2], rtol=1e-9)
    assert whole.r2_task < whole.r2 < 1


def test_the_target_is_what_is_modelled(monkeypatch):
    effect, answer = linear()
    asked = []

    def swept(subject, items, table, **options):
        asked.append(options["metrics"])
        return SimulatedSweep(answer, [HeadId(layer, head) for layer in range(3) for head in range(4)])(subject, items, table, **options)

    assert [simulate(monkeypatch, answer, sweep=swept, **options)[0].target for options in ({}, {"target": "logit"})] == ["margin", "logit"]
    assert asked == [("margin",), ("logit",)]


def test_pure_noise_is_not_explained(monkeypatch):
    noise = np.random.default_rng(7).normal(size=(6, 20))
    found, _ = simulate(monkeypatch, lambda item, mask, kept: noise[item, mask])
    assert found.r2 < 0.1
    assert np.abs(found.coefficients).max() < 0.2


def test_a_constant_logit_gives_nothing(monkeypatch):
    found, _ = simulate(monkeypatch, lambda item, mask, kept: 4.0)
    assert found.r2 == 0.0
    assert not found.coefficients.any()


def test_every_mask_is_predicted_by_models_that_never_saw_it(monkeypatch):
    # a mask whose answer is shifted for no reason of its own is as badly predicted as it is far off, wherever it lies
    effect, exact = linear()
    clean, _ = simulate(monkeypatch, exact, masks_per_item=60)
    assert clean.r2 > 0.999
    spoilt = []
    for poisoned in range(0, 60, 7):
        shift = 1000.0 * (np.arange(60) == poisoned)
        found, _ = simulate(monkeypatch, lambda i, k, kept, shift=shift: exact(i, k, kept) + shift[k], masks_per_item=60)
        spoilt.append(found.r2)
    # all of the variance is that mask's, and models of the others cannot know of it
    assert max(spoilt) < 0.01


def test_masks_follow_seed_and_keep_probability(monkeypatch):
    _, answer = linear(n_items=30)
    for probability in (0.5, 0.9):
        _, swept = simulate(monkeypatch, answer, n_items=30, keep_probability=probability)
        masks = np.array([swept.kept[item] for item in range(30)])
        assert masks.mean() == pytest.approx(probability, abs=0.02)
        assert len({masks[i].tobytes() for i in range(30)}) == 30  # every item has its own
    first, again, other = (simulate(monkeypatch, answer, n_items=30, seed=seed)[1].kept for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"masks_per_item": 4}, "masks_per_item is 4: attribution needs at least 5"),
        ({"keep_probability": 0.0}, "keep_probability is 0.0: expected a number between 0 and 1, both excluded"),
        ({"keep_probability": 1.0}, "keep_probability is 1.0"),
        ({"target": "accuracy"}, "target is 'accuracy'"),
    ],
)
def test_attribution_that_cannot_be_fitted_is_refused(subject, items, means, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        head_attribution(subject, items, means, **options)


def test_top_rounds_and_is_never_empty_and_ties_keep_head_order():
    scores = np.array([[0.0, 3.0, 0.0, 1.0], [0.0, 3.0, -1.0, 2.0]])
    assert order_heads(scores) == [(0, 1), (1, 1), (1, 3), (0, 3), (0, 0), (0, 2), (1, 0), (1, 2)]
    assert top_heads(scores, 0.01) == ((0, 1),)
    assert top_heads(scores, 0.25) == ((0, 1), (1, 1))
    assert top_heads(scores, 0.30) == ((0, 1), (1, 1))  # 2.4 heads
    assert top_heads(scores, 0.32) == ((0, 1), (1, 1))  # 2.56 heads: three would be more than 32 %
    assert whole_heads(10, 0.7) == 7 and whole_heads(8, 0.25) == 2 and whole_heads(9, 0.1) == 0
    assert len(top_heads(scores, 1.0)) == 8
    assert top_heads(scores, 1) == ((0, 1),)
    assert all(isinstance(head, HeadId) and type(head.layer) is int for head in top_heads(scores, 0.5))


def test_an_attribution_ranks_by_its_mean_over_items():
    per_item = np.array([[[4.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]])
    ranked = HeadAttribution(per_item, ("a", "b"), ("s", "s"), "margin", 5, np.array([[4.0, 1.0, 3.0], [4.0, 3.0, 4.0]]))
    assert ranked.coefficients.tolist() == [[2.0, 0.5], [1.5, 0.0]]
    assert ranked.top(2) == ((0, 0), (1, 0)) and ranked.ranking() == order_heads(ranked.coefficients)
    assert (ranked.r2, ranked.r2_task) == (0.5, 0.125)
    first = ranked.first(1)
    assert (first.coefficients.tolist(), first.items, first.clusters, first.n_items) == (per_item[0].tolist(), ("a",), ("s",), 1)
    assert (first.r2, first.r2_task) == (0.75, 0.25)


def test_attributions_of_different_items_are_pooled(monkeypatch):
    _, answer = linear(n_items=9)
    whole, _ = simulate(monkeypatch, answer, n_items=9)
    rest = {name: getattr(whole, name)[4:] for name in ("per_item", "items", "clusters", "squares")}
    parts = [whole.first(4), dataclasses.replace(whole, **rest)]
    both = HeadAttribution.pooled(parts)
    assert (both.items, both.clusters, both.n_masks, both.r2) == (whole.items, whole.clusters, whole.n_masks, whole.r2)
    assert np.array_equal(both.per_item, whole.per_item)
    with pytest.raises(ValueError, match="'item-0' is in several"):
        HeadAttribution.pooled([whole, parts[0]])
    with pytest.raises(ValueError, match="different targets"):
        HeadAttribution.pooled([parts[0], dataclasses.replace(parts[1], target="logit")])
    with pytest.raises(ValueError, match="no attributions"):
        HeadAttribution.pooled([])


@pytest.mark.parametrize(
    ("scores", "most", "says"),
    [(np.zeros((2, 2)), 0, "number of heads"), (np.zeros((2, 2)), 5, "1 to 4"), (np.zeros((2, 2)), 1.5, "share"), (np.full((2, 2), np.nan), 1, "NaN"), (np.zeros(4), 1, "layer, head")],
)  # fmt: skip
def test_scores_that_cannot_be_ranked_are_refused(scores, most, says):
    with pytest.raises(ValueError, match=says):
        top_heads(scores, most)


# -- random heads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def grid():
    """A subject of 4 layers and 5 heads, as far as drawing heads needs one."""
    heads = tuple(HeadId(layer, head) for layer in range(4) for head in range(5))
    return SimpleNamespace(heads=heads, image_heads=heads, anatomy=SimpleNamespace(n_layers=4, n_heads=5))


TARGETED = (HeadId(1, 0), HeadId(1, 4), HeadId(3, 2))


def test_matched_draws_have_as_many_heads_in_each_layer_and_are_never_the_targeted_set(grid):
    draws = layer_matched(TARGETED, grid, 400, seed=3)
    assert len(draws) == 400
    for draw in draws:
        assert Counter(layer for layer, _ in draw) == {1: 2, 3: 1}
        assert len(set(draw)) == 3
        assert set(draw) != set(TARGETED)
    assert {head for draw in draws for head in draw} == {HeadId(layer, head) for layer in (1, 3) for head in range(5)}
    assert len({frozenset(draw) for draw in draws}) == 10 * 5 - 1  # every other set there is
    assert layer_matched(TARGETED, grid, 9, seed=3) == draws[:9]
    assert layer_matched(TARGETED, grid, 9, seed=4) != draws[:9]


def test_a_filled_layer_stays_filled_and_filled_layers_alone_are_refused(grid):
    whole = [HeadId(0, head) for head in range(5)]
    assert all(set(whole) < set(draw) for draw in layer_matched([*whole, HeadId(2, 2)], grid, 8))
    with pytest.raises(ValueError, match="fill their layers: no other set matches them"):
        layer_matched(whole, grid, 8)


def test_free_draws_have_the_number_and_come_from_anywhere(grid):
    draws = layer_free(TARGETED, grid, 300, seed=1)
    assert len(draws) == 300
    assert all(len(set(draw)) == 3 and set(draw) != set(TARGETED) for draw in draws)
    assert {head for draw in draws for head in draw} == set(grid.heads)
    assert any(Counter(layer for layer, _ in draw) != {1: 2, 3: 1} for draw in draws)
    one_short = grid.heads[1:]
    assert all(set(draw) != set(one_short) for draw in layer_free(one_short, grid, 100))
    with pytest.raises(ValueError, match="the heads are all there are"):
        layer_free(grid.heads, grid, 1)


@pytest.mark.parametrize(("draws", "items", "each"), [(40, 36, 8), (7, 10, 3), (5, 4, 4), (3, 4, 9), (11, 7, 5)])
def test_draws_get_as_many_distinct_items_and_items_as_many_draws(draws, items, each):
    labels = [f"matched/{i}" for i in range(draws)]
    plan = assign_draws(labels, items, each, seed=2)
    mine = {label: [item for item, name in plan if name == label] for label in labels}
    assert [name for name in dict.fromkeys(name for _, name in plan)] == labels
    assert all(len(given) == len(set(given)) == min(each, items) for given in mine.values())
    counts = np.bincount([item for item, _ in plan], minlength=items)
    assert len(counts) == items and counts.max() - counts.min() <= 1
    assert plan == assign_draws(labels, items, each, seed=2)


def test_draws_without_items_are_refused():
    with pytest.raises(ValueError, match="items_per_draw is 0: a random draw needs at least one item"):
        assign_draws(["matched/0"], 4, 0)
    with pytest.raises(ValueError, match="there are no items"):
        assign_draws(["matched/0"], 0, 3)


@pytest.mark.parametrize(("draws", "items", "shared", "each"), [(40, 36, 8, 2), (3, 10, 4, 9), (5, 4, 9, 1)])
def test_every_draw_is_run_on_the_shared_items_and_every_other_item_on_a_few(draws, items, shared, each):
    labels = [f"matched/{i}" for i in range(draws)]
    plan, common = assign_shared(labels, items, shared, each, seed=2)
    assert len(common) == len(set(common)) == min(shared, items) and len(plan) == len(set(plan))
    for label in labels:
        assert set(common) <= {item for item, name in plan if name == label}
    counts = np.bincount([item for item, _ in plan], minlength=items)
    others = [item for item in range(items) if item not in common]
    assert (counts[common] == draws).all() and (counts[others] == min(each, draws)).all()
    assert (plan, common) == assign_shared(labels, items, shared, each, seed=2)
    assert items <= shared or common != assign_shared(labels, items, shared, each, seed=3)[1]


def test_draws_that_share_nothing_are_refused():
    with pytest.raises(ValueError, match="shared is 0: random draws are compared on the same items"):
        assign_shared(["matched/0"], 4, 0, 1)
    with pytest.raises(ValueError, match="0 random draws and 4 items"):
        assign_shared([], 4, 1, 1)


def test_draw_means_and_losses_by_hand():
    rows = [
        ("b", "matched/0", 1.0), ("a", "matched/0", 0.0), ("b", "matched/10", 0.0), ("c", "matched/10", 1.0), ("a", "matched/10", 1.0),
        ("a", "anywhere/0", 1.0), ("c", "matched-2/0", 0.0),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["item", "intervention", "value"])
    full = pd.Series({"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0})
    means = draw_means(table, "matched", full.index)
    assert means.index.tolist() == ["a", "b", "c", "d"]
    np.testing.assert_allclose(means, [0.5, 0.5, 1.0, np.nan])
    assert draw_means(table, "anywhere", full.index).dropna().to_dict() == {"a": 1.0}
    lost = draw_losses(table, "matched", full, ["a", "b"])  # c was not run on every draw
    assert lost.to_dict() == {"matched/0": 0.5, "matched/10": 0.5}
    assert draw_losses(table, "matched", full, ["b"]).to_dict() == {"matched/0": 0.0, "matched/10": 1.0}
    with pytest.raises(ValueError, match="not all run on the 2 shared items"):
        draw_losses(table, "matched", full, ["a", "c"])


def test_a_set_drawn_like_the_others_is_rarely_called_special(grid):
    """The p-value holds its level when the targeted set is any set that matches, however few there are and however few the items."""
    targeted = (HeadId(1, 0), HeadId(1, 4))
    sets = [tuple(HeadId(1, head) for head in pair) for pair in itertools.combinations(range(5), 2)]
    assert matching_sets(targeted, grid) == len(sets) == 10 and matching_sets(TARGETED, grid) == 50
    rng, runs, low = np.random.default_rng(0), 400, {0.1: 0, 0.2: 0, 0.5: 0}
    for seed in range(runs):
        worth = rng.random((5, 12)) < 0.4  # which heads which of 12 items needs
        mine = sets[rng.integers(len(sets))]
        cost = {one: float(worth[[head for _, head in one]].any(0).mean()) for one in sets}
        p = draw_p(cost[mine], [cost[draw] for draw in layer_matched(mine, grid, 60, seed)], len(sets))
        for level in low:
            low[level] += p <= level
    for level, count in low.items():
        assert stats.binomtest(count, runs, level, alternative="greater").pvalue > 1e-3, (level, count)
    assert low[0.5] > 0.2 * runs  # and it is not held by never speaking
    assert draw_p(1.0, np.zeros(999), 10**9) == pytest.approx(1 / 1000)
    assert draw_p(1.0, np.zeros(999), 4) == pytest.approx(1 / 4 + 3 / 4 / 1000)


def with_squares(whole, left, scenes):
    n = len(whole)
    squares = np.stack([whole, left, left], axis=1)
    return HeadAttribution(np.zeros((n, 1, 2)), tuple(map(str, range(n))), tuple(map(str, scenes)), "margin", 9, squares)


def test_the_lower_bound_of_r2_is_missed_as_often_as_it_says():
    rng = np.random.default_rng(0)

    def drawn(n):
        whole = np.exp(0.5 * rng.normal(size=n))
        return np.repeat(whole, 2), np.repeat(whole * rng.beta(2, 6, size=n), 2), np.repeat(np.arange(n), 2)

    whole, left, _ = drawn(200_000)
    truth = 1 - left.sum() / whole.sum()
    bounds = np.array([with_squares(*drawn(36)).r2_lower() for _ in range(400)])
    assert stats.binomtest(int((bounds > truth).sum()), 400, 0.05).pvalue > 1e-3
    one = with_squares(*drawn(36))
    assert one.r2_lower(0.01) < one.r2_lower() < one.r2
    # the two items of a scene are one: without it the bound would be closer
    apart = with_squares(one.squares[:, 0], one.squares[:, 1], range(72))
    assert one.r2_lower() < apart.r2_lower()


def test_a_bound_needs_three_scenes_and_something_to_explain():
    assert np.isnan(with_squares([1.0, 2.0], [0.1, 0.1], "ab").r2_lower())
    assert with_squares([0.0] * 4, [0.0] * 4, "abcd").r2_lower() == 0.0
    exact = with_squares([1.0] * 4, [0.1] * 4, "abcd")
    assert exact.r2_lower() == exact.r2 == pytest.approx(0.9)


def test_masks_that_models_were_fitted_to_are_not_unseen(monkeypatch):
    """Of four heads there are 16 masks, drawn over and over: what an answer is under each is known by heart, not predicted."""
    kept = np.random.default_rng(0).random((5, 128, 4)) < 0.95
    kept[0] = kept[0, :1]  # one item is shown one mask only
    by_heart = np.random.default_rng(1).normal(size=16)
    values = by_heart[kept @ (1, 2, 4, 8)]
    _, squares = vlm_core.heads.attribution._fit(kept, values)
    assert np.isnan(squares[0]).all() and np.isfinite(squares[1:]).any()
    expected = np.zeros(5)
    for item, fold in itertools.product(range(1, 5), range(5)):
        seen = np.arange(128) % 5 != fold
        known = {tuple(mask) for mask in kept[item, seen]}
        centre = values[item, seen].mean()
        expected[item] += sum((values[item, k] - centre) ** 2 for k in np.flatnonzero(~seen) if tuple(kept[item, k]) not in known)
    np.testing.assert_allclose(np.nan_to_num(squares[:, 0]), expected)
    nothing = HeadAttribution(np.zeros((5, 1, 4)), tuple("abcde"), tuple("vwxyz"), "margin", 128, np.full((5, 3), np.nan))
    assert np.isnan(nothing.r2) and np.isnan(nothing.r2_task) and np.isnan(nothing.r2_lower())
