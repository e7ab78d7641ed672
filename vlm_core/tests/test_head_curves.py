"""Faithfulness and completeness are the ratios they are defined as, and planted heads alone have them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vlm_core import ReplaceImageKV, image_kv_means, sweep
from vlm_core.heads.curves import curves, fewest_heads, head_counts, recovery, share_of_effect
from vlm_core.heads.ranking import order_heads
from vlm_core.tests.planted import planted_subject, with_answers_the_image_raises
from vlm_core.tests.tiny import make_items

PLANTED = [(0, 1), (2, 3)]


@pytest.fixture(scope="module")
def planted():
    """A subject, items and the removal of the image from heads."""
    subject, items = planted_subject(PLANTED), make_items(8)
    means = image_kv_means(subject, items)
    items = with_answers_the_image_raises(subject, items, PLANTED, means)
    return subject, items, lambda heads: ReplaceImageKV(tuple(heads), means, queries="text")


def ranked(subject, first):
    return [*first, *(head for head in subject.heads if head not in first)]


def test_recovery_is_one_sweep_of_each_set_and_its_rest(planted):
    subject, items, remove = planted
    ranking = ranked(subject, [(2, 3), (1, 1)])
    table = recovery(subject, items, {"mine": ranking, "reversed": ranking[::-1]}, [1, 3], remove)
    assert len(table) == 8 * 2 * 2 and list(table["heads"].unique()) == [1, 3]
    sets = [None, remove(subject.heads), remove(ranking[:3]), remove(ranking[3:]), remove(ranking[:-3]), remove(ranking[-3:])]
    values = sweep(subject, items, dict(enumerate_labels(sets)), metrics=("margin",))["value"].to_numpy().reshape(8, 6)
    for name, only, without in (("mine", 3, 2), ("reversed", 4, 5)):
        rows = table[(table["ranking"] == name) & (table["heads"] == 3)]
        assert rows["item"].tolist() == [item["id"] for item in items]
        assert rows["cluster"].tolist() == [item["scene_id"] for item in items]
        for column, place in (("every", 0), ("none", 1), ("only", only), ("without", without)):
            np.testing.assert_allclose(rows[column], values[:, place], atol=1e-5)


def enumerate_labels(sets):
    return ((str(number), one) for number, one in enumerate(sets))


def test_planted_heads_carry_everything_and_others_nothing(planted):
    subject, items, remove = planted
    rankings = {"right": ranked(subject, PLANTED), "wrong": ranked(subject, PLANTED)[::-1]}
    found = curves(recovery(subject, items, rankings, [1, 2, 6], remove)).set_index(["ranking", "share", "heads"])["value"]
    assert found["right", "faithfulness", 2] == pytest.approx(1, abs=1e-3)
    assert found["right", "completeness", 2] == pytest.approx(0, abs=1e-3)
    assert found["wrong", "faithfulness", 6] == pytest.approx(0, abs=1e-3)
    assert found["wrong", "completeness", 6] == pytest.approx(1, abs=1e-3)
    assert abs(found["right", "faithfulness", 1] - 1) > 0.05  # one of two is not all


def test_one_side_alone_is_half_the_sweep(planted):
    subject, items, remove = planted
    table = recovery(subject, items[:6], {"mine": ranked(subject, PLANTED)}, [2], remove, sides=("only",))
    assert "without" not in table and set(curves(table)["share"]) == {"faithfulness"}


def hand_made(scale=1.0):
    """Two items a scene in four scenes; what heads carry differs from item to item."""
    rng = np.random.default_rng(0)
    every, none = rng.uniform(2, 3, 8), rng.uniform(-1, 0, 8)
    return pd.DataFrame(
        {
            "item": [f"i{k}" for k in range(8)], "cluster": [f"s{k // 2}" for k in range(8)], "task": "t", "ranking": "r", "heads": 1,
            "only": none + scale * rng.uniform(0.6, 0.9, 8) * (every - none), "without": none + rng.uniform(0, 0.3, 8) * (every - none),
            "every": every, "none": none,
        }
    )  # fmt: skip


def test_shares_are_ratios_of_sums_over_items():
    table = hand_made()
    found = curves(table).set_index("share")
    effect = (table["every"] - table["none"]).sum()
    assert found.loc["faithfulness", "value"] == pytest.approx((table["only"] - table["none"]).sum() / effect)
    assert found.loc["completeness", "value"] == pytest.approx((table["without"] - table["none"]).sum() / effect)
    assert (found["lower"] < found["value"]).all() and (found["value"] < found["upper"]).all()


def test_bounds_come_from_scenes_not_items():
    table = hand_made()
    estimate = share_of_effect(table["only"], table["every"], table["none"], table["cluster"])
    assert (estimate.n_items, estimate.n_clusters) == (8, 4)
    doubled = pd.concat([table, table.assign(item=table["item"] + "again")])
    again = share_of_effect(doubled["only"], doubled["every"], doubled["none"], doubled["cluster"])
    assert again.value == pytest.approx(estimate.value) and again.bounds(0.05) == pytest.approx(estimate.bounds(0.05))


def test_random_orders_are_one_line():
    tables = [hand_made(scale).assign(ranking=f"random/{i}") for i, scale in enumerate((0.5, 1.0))]
    found = curves(pd.concat([*tables, hand_made(0.2)]))
    assert found["ranking"].unique().tolist() == ["random", "r"]
    values = found[found["share"] == "faithfulness"].set_index("ranking")["value"]
    apart = [curves(table).query("share == 'faithfulness'")["value"].item() for table in tables]
    assert values["random"] == pytest.approx(np.mean(apart))


def test_an_image_without_effect_has_no_shares():
    table = hand_made().assign(every=1.0, none=1.0, only=1.0, without=1.0)
    assert share_of_effect(table["only"], table["every"], table["none"], table["cluster"]) is None
    assert curves(table)[["value", "lower", "upper"]].isna().all(axis=None)
    assert share_of_effect([], [], [], []) is None


def test_fewest_heads_are_the_first_above_the_limit():
    rows = [("a", 1, 0.5, 0.4), ("a", 2, 0.85, 0.7), ("a", 4, 0.9, 0.82), ("b", 1, 0.99, 0.9)]
    curve = pd.DataFrame([(r, k, "faithfulness", v, low) for r, k, v, low in rows], columns=["ranking", "heads", "share", "value", "lower"])
    assert fewest_heads(curve, "a", 0.8) == 2
    assert fewest_heads(curve, "a", 0.8, bound="lower") == 4
    assert fewest_heads(curve, "a", 0.95) is None
    assert fewest_heads(curve.assign(share="completeness"), "a", 0.8) is None


def test_head_counts_are_distinct_and_neither_none_nor_all():
    assert head_counts(48, (0.02, 0.001, 0.10, 0.5)) == (1, 4, 24)
    assert head_counts(4, (0.9, 1.0)) == (3,)
    assert head_counts(1024, (0.25, 0.02)) == (20, 256)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ranking: {"rankings": {"short": ranking[:-1]}}, "ranking 'short' must hold each of the 12 heads once"),
        (lambda ranking: {"rankings": {"twice": [ranking[0], *ranking[:-1]]}}, "ranking 'twice'"),
        (lambda ranking: {"counts": [0, 2]}, r"from 1 to 11, got \[0, 2\]"),
        (lambda ranking: {"counts": [12]}, "from 1 to 11"),
        (lambda ranking: {"counts": []}, "from 1 to 11"),
    ],
)
def test_rankings_and_counts_that_make_no_curve_are_refused(planted, change, says):
    subject, items, remove = planted
    options = {"rankings": {"mine": order_heads(np.zeros((3, 4)))}, "counts": [1]} | change(list(subject.heads))
    with pytest.raises(ValueError, match=says):
        recovery(subject, items, options["rankings"], options["counts"], remove)
