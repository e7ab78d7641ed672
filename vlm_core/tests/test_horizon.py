"""The layer from which images are needed no more: bounds by the interval itself, the reading from the last layer on by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vlm_core import information_horizon
from vlm_core.reduction.curves import drop_table
from vlm_core.stats import estimate_mean
from vlm_core.tests.tiny import make_items

LAYERS = (0, 2, 4, 5)


def table(loss: dict[str, tuple[float, ...]], n: int = 200, full: float = 0.9, rng: np.random.Generator | None = None) -> pd.DataFrame:
    """A drop table of tasks whose accuracy falls by so much when all tokens go from each of ``LAYERS``; two items a scene.

    Without ``rng`` exactly so many items are lost, the last ones first; with it on average, other ones at every layer.
    """
    rows = []
    for task, losses in loss.items():
        for item in range(n):
            about = {"item": f"{task}-{item}", "cluster": f"scene-{item // 2}", "task": task, "policy": "stride"}
            level = (item + 0.5) / n
            for layer, lost in zip(LAYERS, losses, strict=True):
                right = level < full
                stays = level < full - lost if rng is None else right and rng.random() > lost / full
                correct = {1.0: right, 0.0: stays, 0.5: False}
                rows += [{**about, "layer": layer, "keep": keep, "correct": float(one)} for keep, one in correct.items()]
    return pd.DataFrame(rows)


def test_the_first_layer_from_which_nothing_is_lost():
    found = information_horizon(table({"colour": (0.5, 0.4, 0.0, 0.0), "blind": (0.0,) * 4, "text": (0.6, 0.5, 0.4, 0.3)}), 0.05)
    for column in ("layer", "estimated"):
        assert found.horizons.loc[["colour", "blind"], column].tolist() == [4, 0] and found.horizons[column].isna()["text"]
    assert found.horizons["accuracy"].tolist() == pytest.approx([0.9] * 3)
    assert (found.horizons["n_items"] == 200).all() and (found.horizons["n_clusters"] == 100).all()


def test_a_layer_after_which_one_fails_is_no_horizon():
    found = information_horizon(table({"dip": (0.5, 0.0, 0.4, 0.0)}), 0.05)
    assert found.horizons.loc["dip", "layer"] == found.horizons.loc["dip", "estimated"] == 5


def test_an_estimate_below_the_margin_is_not_enough():
    """Four items in a hundred are lost, five are allowed: the estimate passes at layer 2, its bound does not."""
    found = information_horizon(table({"few": (0.5, 0.04, 0.0, 0.0)}), 0.05)
    at = found.curves.set_index("layer").loc[2]
    assert at["loss"] == pytest.approx(0.04) and at["lower"] < 0.04 < 0.05 < at["upper"]
    assert found.horizons.loc["few", ["layer", "estimated"]].tolist() == [4, 2]


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_bounds_are_those_of_the_paired_losses(alpha):
    rows = table({"one": (0.3, 0.2, 0.1, 0.02)}, n=80, rng=np.random.default_rng(2))
    found = information_horizon(rows, 0.05, alpha)
    for layer in LAYERS:
        own = rows[rows["layer"] == layer].pivot(index=["item", "cluster"], columns="keep", values="correct").reset_index()
        expected = estimate_mean(own[1.0] - own[0.0], own["cluster"], smallest_alpha=alpha)
        at = found.curves.set_index("layer").loc[layer]
        assert at["loss"] == pytest.approx(expected.value)
        assert (at["lower"], at["upper"]) == pytest.approx(expected.bounds(alpha)) and at["method"] == expected.method
        assert (at["n_items"], at["n_clusters"]) == (80, 40)
    assert found.margin == 0.05 and found.alpha == alpha


@pytest.mark.parametrize(("n_scenes", "passes"), [(58, False), (59, True)])
def test_how_many_scenes_a_margin_takes(n_scenes, passes):
    found = information_horizon(table({"lossless": (0.0,) * 4}, n=2 * n_scenes), 0.05)
    assert pd.notna(found.horizons.loc["lossless", "layer"]) == passes and found.horizons.loc["lossless", "n_clusters"] == n_scenes


def test_items_may_come_in_any_order():
    rows = table({"one": (0.3, 0.1, 0.02, 0.0), "two": (0.5, 0.0, 0.0, 0.0)}, n=60)
    one, other = (information_horizon(some, 0.1) for some in (rows, rows.sample(frac=1.0, random_state=0)))
    both = (found.curves.sort_values(["task", "layer"], ignore_index=True) for found in (one, other))
    pd.testing.assert_frame_equal(*both)
    pd.testing.assert_frame_equal(one.horizons.sort_index(), other.horizons.sort_index())


def test_a_layer_passes_wrongly_no_more_often_than_declared():
    """Losses of exactly the margin at every layer: some layer passes in at most 5 of 100 sets (and three binomial errors).

    Were each layer tested by itself, one of the four would pass in about 18.
    """
    rng, passed, any_of_four = np.random.default_rng(0), 0, 0
    for _ in range(100):
        own = information_horizon(table({"null": (0.4,) * 4}, n=80, rng=rng), 0.4)
        passed += pd.notna(own.horizons.loc["null", "layer"])
        any_of_four += (own.curves["upper"] < 0.4).any()
    assert passed <= 11 < any_of_four


def test_of_a_subject(subject):
    items = make_items(8)
    measured = drop_table(subject, items, layers=(0, 1, 2), keeps=(0.0, 1.0), policies={"random": "random", "stride": "stride"})
    found = information_horizon(measured, 0.5)
    assert found.curves["task"].unique().tolist() == ["color", "shape"] and found.curves["layer"].tolist() == [0, 1, 2] * 2
    full = measured[(measured["keep"] == 1) & (measured["task"] == "color")].drop_duplicates("item")["correct"].mean()
    assert found.horizons.loc["color", "accuracy"] == full and found.horizons.loc["color", "n_items"] == 4


def test_bad_tables_are_refused():
    rows = table({"one": (0.3, 0.2, 0.1, 0.0)}, n=10)
    for broken, message in (
        (rows.drop(columns="cluster"), "no column 'cluster'"),
        (rows[rows["keep"] > 0], "must hold keep = 0 and keep = 1"),
        (rows[~((rows["item"] == "one-3") & (rows["layer"] == 4))], "task 'one': some item has no finite answer"),
        (rows.assign(correct=rows["correct"].where(rows["item"] != "one-1")), "task 'one': some item has no finite answer"),
    ):
        with pytest.raises(ValueError, match=message):
            information_horizon(broken, 0.05)
    for options in ({"margin": 0.0}, {"margin": 1.0}, {"margin": 0.05, "alpha": 0.5}):
        with pytest.raises(ValueError, match="margin must lie between 0 and 1"):
            information_horizon(rows, **options)
