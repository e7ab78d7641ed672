"""A sweep as one row an item."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vlm_core import ZeroHeads, sweep
from vlm_core.tables import wide


def long(rows):
    return pd.DataFrame(rows, columns=["item", "cluster", "task", "intervention", "metric", "value"])


ROWS = [
    ("z", "s1", "color", "full", "correct", 1.0),
    ("z", "s1", "color", "full", "margin", 3.5),
    ("z", "s1", "color", "cut", "correct", 0.0),
    ("z", "s1", "color", "cut", "margin", -1.0),
    ("a", "s2", "shape", "full", "correct", 0.0),
    ("a", "s2", "shape", "full", "margin", -2.0),
]


def test_one_row_an_item_in_the_order_measured():
    table = wide(long(ROWS))
    assert table.index.tolist() == ["z", "a"]
    assert table.columns.tolist() == ["cluster", "task", "full", "cut"]
    assert table["cluster"].tolist() == ["s1", "s2"] and table["task"].tolist() == ["color", "shape"]
    assert table["full"].tolist() == [1.0, 0.0]
    assert table.loc["z", "cut"] == 0.0 and np.isnan(table.loc["a", "cut"])


def test_another_metric():
    assert wide(long(ROWS), "margin")["full"].tolist() == [3.5, -2.0]


def test_what_cannot_be_reshaped_is_refused():
    with pytest.raises(ValueError, match="the sweep has no metric 'logit': it measured correct, margin"):
        wide(long(ROWS), "logit")
    with pytest.raises(ValueError, match="an item was measured twice under one intervention"):
        wide(long([*ROWS, ROWS[0]]))


def test_a_real_sweep_keeps_its_values(subject, items):
    swept = sweep(subject, items, {"full": None, "cut": ZeroHeads([(0, 1)])}, metrics=("margin",))
    table = wide(swept, "margin")
    assert table.index.tolist() == [item["id"] for item in items]
    for label in ("full", "cut"):
        assert table[label].tolist() == swept[swept["intervention"] == label]["value"].tolist()
    assert table["cluster"].tolist() == [item["scene_id"] for item in items]
