"""Tables and figures of ablations and rankings against hand computations."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from reports import exhibits
from reports.evidence import Evidence
from reports.tests.test_exhibits import left, one_figure
from vlm_core.heads.curves import curves
from vlm_core.heads.rankings import SingleHeads


@pytest.fixture
def evidence():
    """What a test leaves, outside any claim; a figure is drawn where it is left."""
    return Evidence(None)


def recovered(task, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for ranking in ("attribution", "single-head ablation", "gradient × gate", "attention mass", "random/0", "random/1"):
        for heads in (2, 10):
            only, without = rng.uniform(0, 4, 12), rng.uniform(0, 4, 12)
            rows += [(f"{task}{i}", f"{task}{i // 2}", task, ranking, heads, only[i], without[i], 4.0 + i, 0.5) for i in range(12)]
    return pd.DataFrame(rows, columns=["item", "cluster", "task", "ranking", "heads", "only", "without", "every", "none"])


def test_faithfulness_curves_are_lines_and_rows_of_a_task(evidence):
    table = recovered("color")
    exhibits.ablation.faithfulness_curves(evidence, "color", table, 20)
    written, (faithful, complete) = left(evidence)
    rows = written["faithfulness-curves.csv"]
    assert rows["task"].unique().tolist() == ["color"]
    assert len(rows) == 5 * 2 * 2 and set(rows["share_of_heads"]) == {0.1, 0.5}
    both = curves(table).set_index(["ranking", "share", "heads"])
    for figure, share in ((faithful, "faithfulness"), (complete, "completeness")):
        assert figure["data"]["y_label"] == share and figure["caption"].startswith("12 confirmation items") and "color" in figure["title"]
        assert [one["name"] for one in figure["data"]["series"]] == list(exhibits.ablation.ORDER)
        for one in figure["data"]["series"]:
            assert (one["role"] == "random") == (one["name"] == "random")
            for point, heads in zip(one["points"], (2, 10), strict=True):
                assert point["x"] == heads / 20
                assert [point[key] for key in ("y", "lower", "upper")] == both.loc[(one["name"], share, heads), ["value", "lower", "upper"]].tolist()


def test_without_any_usable_task_nothing_is_drawn(evidence):
    exhibits.ablation.depth_profile(evidence, {})
    exhibits.ablation.attention_against_attribution(evidence, {}, {})
    assert left(evidence) == ({}, [])


def test_the_grid_goes_to_table_1_and_bars_show_the_number_at_which_most_is_measured(evidence):
    cells = [("zero", "top", 7, 0.25), ("none", "top", 0, 1.0), ("image-KV", "top", 2, 0.25), ("image-KV", "random", 2, 1.0), ("image-KV", "top", 5, 0.0), ("image-KV", "random", 5, 0.75)]
    cells += [("zero", "top", 5, 0.5), ("zero", "layer-matched", 5, 0.75)]
    rows = pd.DataFrame(
        [(f"i{k}", f"s{k}", "t", mode, target, heads, float(k < 8 * right)) for mode, target, heads, right in cells for k in range(8)],
        columns=["item", "cluster", "task", "mode", "target", "heads", "correct"],
    )
    exhibits.ablation.ablation_grid(evidence, rows, "t", 0.25)
    written, (figure, first, lines) = left(evidence)
    table = written["head-ablation.csv"].set_index("condition")
    assert len(table) == 8 and table.loc["image-KV, random 5", ["heads_removed", "accuracy", "drop", "items"]].tolist() == [5, 0.75, 0.25, 8]
    assert [(bar["label"], bar["role"], bar["value"]) for bar in figure["data"]["bars"]] == [
        ("untouched", "baseline", 1.0), ("image-KV, top", "targeted", 0.0), ("image-KV, random", "random", 0.75),
        ("zero, top", "targeted", 0.5), ("zero, layer-matched", "random", 0.75),
    ]  # fmt: skip
    assert figure["title"].startswith("t: 5 heads") and figure["data"]["chance"] == 0.25 and "8 confirmation items" in figure["caption"]
    assert first["title"].startswith("Table 1") and first["data"]["columns"][1:] == ["heads", "untouched", "top heads", "random, same layers", "random, any layer"]
    rows = {row["label"]: [cell["text"] for cell in row["cells"]] for row in first["data"]["rows"]}
    assert rows == {"t, image-KV": ["5", "1.00", "0.00", "–", "0.75"], "t, zero": ["5", "1.00", "0.50", "0.75", "–"]}
    drawn = {one["name"]: [(point["x"], point["y"]) for point in sorted(one["points"], key=lambda point: point["x"])] for one in lines["data"]["series"]}
    assert drawn == {"zero": [(0, 1.0), (5, 0.5), (7, 0.25)], "image-KV": [(0, 1.0), (2, 0.25), (5, 0.0)]}


def test_one_number_of_heads_makes_no_line(evidence):
    cells = [("none", "top", 0), ("zero", "top", 5), ("zero", "random", 5)]
    rows = [(f"i{k}", f"s{k}", "t", *cell, float(k % 2)) for cell in cells for k in range(8)]
    exhibits.ablation.ablation_grid(evidence, pd.DataFrame(rows, columns=["item", "cluster", "task", "mode", "target", "heads", "correct"]), "t", 0.25)
    assert [figure["kind"] for figure in left(evidence)[1]] == ["accuracy_bars", "table"]


def test_single_heads_are_rows_and_a_map_of_the_items_they_change(evidence):
    without = np.array([[[10.0, 8.0]], [[9.9, 10.0]]])
    one = SingleHeads(np.array([10.0, 10.0]), np.zeros(2), without, ("a", "b"), ("s", "t"), "logit")
    exhibits.ablation.single_head_costs(evidence, "x", one, 0.05)
    written, figure = one_figure(evidence)
    rows = written["single-heads.csv"].set_index(["task", "head"])
    assert rows.loc[("x", 1), ["logit_lost", "share_changed"]].tolist() == pytest.approx([1.0, 0.5])
    assert rows.loc[("x", 0), "share_changed"] == 0.0  # 1 % is less than 5 %
    assert figure["data"]["values"] == [[0.0, 0.5]] and figure["title"].startswith("x:")
    assert "head 0.1" in figure["alt"] and "by 5 % of its size" in figure["caption"] and "2 confirmation items" in figure["caption"]


def test_depth_and_attention_are_those_of_the_mean_map(evidence):
    one = SimpleNamespace(coefficients=np.array([[3.0, -9.0], [0.5, 0.5]]))
    other = SimpleNamespace(coefficients=np.array([[-1.0, -1.0], [-1.0, -1.0]]))
    exhibits.ablation.depth_profile(evidence, {"a": one, "b": other})
    masses = {"a": np.arange(8.0).reshape(2, 2, 2)}
    exhibits.ablation.attention_against_attribution(evidence, {"a": one}, masses)
    written, figure = one_figure(evidence)
    assert written["attribution-by-layer.csv"]["share"].tolist() == [0.75, 0.25, 0.5, 0.5]
    assert [point["y"] for point in figure["data"]["points"]] == [0.625, 0.375] and figure["data"]["reference"] == 0.5
    rows = written["attention-and-attribution.csv"]
    assert rows["attribution"].tolist() == [3.0, -9.0, 0.5, 0.5] and rows["attention_mass"].tolist() == [2.0, 3.0, 4.0, 5.0]
