"""How far something moves which heads matter: nothing where orders are the same, whatever the noise; all of it where they are not."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_core import DropTokens, ReplaceImageKV, image_kv_means, sweep
from vlm_core.heads.agreement import moved_heads
from vlm_core.heads.rankings import without_each_head
from vlm_core.tests.tiny import make_items


def noisy(order, n, noise, rng, shape=(4, 5)):
    """``[item, layer, head]``: worth by ``order``, with noise of its own in every item."""
    return (np.asarray(order, dtype=float)[None] + noise * rng.normal(size=(n, len(order)))).reshape(n, *shape)


def one_task(n):
    return ["t"] * n


def scenes(n):
    return [f"s{i // 2}" for i in range(n)]


def test_the_same_order_under_more_noise_has_not_moved():
    rng, order = np.random.default_rng(0), np.linspace(-1, 1, 20)
    found = [moved_heads(noisy(order, 60, 1.0, rng), noisy(order, 60, 4.0, rng), scenes(60), one_task(60)) for _ in range(40)]
    values = np.array([one.estimate.value for one in found])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(40) + 0.02
    supported = sum(one.estimate.bounds(0.05)[0] > 0 for one in found)
    assert supported <= 6, "one-sided at 5 %: six of forty or more have a chance of 1.4 %"


def test_another_order_has_moved():
    rng, order = np.random.default_rng(1), np.linspace(-1, 1, 20)
    found = moved_heads(noisy(order, 60, 1.0, rng), noisy(rng.permutation(order), 60, 1.0, rng), scenes(60), one_task(60))
    assert found.estimate.bounds(0.01)[0] > 0.3 and found.across < 0.5 and min(found.reliabilities) > 0.8


def test_a_task_whose_numbers_shrink_has_moved_no_head():
    """Four tasks of an order each, which stays what it is; in two of them everything is worth a fifth."""
    rng = np.random.default_rng(2)
    orders = [rng.permutation(np.linspace(-1, 1, 20)) for _ in range(4)]
    tasks = [f"t{number}" for number in range(4) for _ in range(40)]
    supported = 0
    for _ in range(10):
        before = np.concatenate([noisy(order, 40, 0.5, rng) for order in orders])
        after = np.concatenate([scale * noisy(order, 40, 0.5, rng) for order, scale in zip(orders, (1.0, 0.2, 1.0, 0.2), strict=True)])
        supported += moved_heads(before, after, scenes(160), tasks).estimate.bounds(0.05)[0] > 0
    assert supported <= 3, "one-sided at 5 %: more than three of ten have a chance of 0.1 %"


def test_by_hand_without_noise():
    """Every half of the scenes gives the same order: within 1, across the rank correlation of the two orders."""
    before, after = np.tile([1.0, 2.0, 3.0], (8, 1, 1)), np.tile([1.0, 3.0, 2.0], (8, 1, 1))
    after[:4] *= 2  # so that scenes differ, in no order
    found = moved_heads(before, after, scenes(8), one_task(8))
    assert found.estimate is None, "the same whichever scene is left out"
    assert found.across == pytest.approx(0.5) and found.reliabilities == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("before", "after", "clusters", "sentence"),
    [
        (np.zeros((8, 2, 2)), np.zeros((8, 2, 3)), scenes(8), "of the same items and heads"),
        (np.zeros((8, 2, 2)), np.zeros((8, 2, 2)), scenes(6), "of the same items and heads"),
        (np.zeros((4, 2, 2)), np.zeros((4, 2, 2)), scenes(4), "2 scenes"),
    ],
)
def test_what_does_not_fit_is_refused(before, after, clusters, sentence):
    with pytest.raises(ValueError, match=sentence):
        moved_heads(before, after, clusters, one_task(len(before)))


def test_heads_are_left_out_under_what_is_in_force(subject):
    items = make_items(3)
    means = image_kv_means(subject, items)
    drop = DropTokens(1, 0.3, "stride")

    def remove(heads):
        return ReplaceImageKV(tuple(heads), means, queries="text")

    found = without_each_head(subject, items, remove, under=drop)
    rows = {"full": drop, "one": (remove([(2, 1)]), drop), "all": (remove(subject.image_heads), drop)}
    table = sweep(subject, items, rows, metrics=("margin",)).pivot(index="item", columns="intervention", values="value").loc[list(found.items)]
    np.testing.assert_allclose(found.untouched, table["full"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.without[:, 2, 1], table["one"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.without_any, table["all"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found.untouched, without_each_head(subject, items, remove).untouched)
