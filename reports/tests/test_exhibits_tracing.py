"""Tables and figures of where information flows, against hand computations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from reports import exhibits
from reports.tests.test_exhibits import evidence, left  # noqa: F401
from vlm_core.stats import interval
from vlm_core.tracing.background import CONDITIONS, Background
from vlm_core.tracing.patching import PLACES, Patching
from vlm_core.tracing.sequence import Arrivals
from vlm_core.tracing.windows import WindowLosses

IDS = tuple("abcdefgh")
ABOUT = (IDS, tuple(f"s{k // 2}" for k in range(8)), ("t",) * 8)


@pytest.fixture
def patching():
    rng = np.random.default_rng(0)
    clean, corrupted = rng.uniform(3, 5, 8), rng.uniform(-1, 0, 8)
    denoised, noised = (rng.uniform(-1, 5, (8, 2, len(PLACES))) for _ in range(2))
    heads = [rng.uniform(-1, 5, (8, 3, 2, 2)) for _ in range(2)]
    return Patching(*ABOUT, (1, 2), PLACES, 3, clean, corrupted, corrupted, denoised, noised, ("object", "last"), *heads)


def test_patching_curves_are_shares_with_intervals(evidence, patching):  # noqa: F811
    exhibits.tracing.patching_curves(evidence, "paired image", patching, {"sufficient": "Said.", "necessary": "Said."})
    tables, figures = left(evidence)
    rows = tables["patching-curves.csv"]
    assert [figure["kind"] for figure in figures] == ["keep_curves"] * 2
    gap = (patching.clean - patching.corrupted).sum()
    assert len(rows) == 2 * len(PLACES)  # the last table left: the other direction's rows
    for row in rows.itertuples():
        moved = patching.clean[:, None, None] - patching.noised
        expected = moved[:, row.layer - 1, PLACES.index(row.place)].sum() / gap
        assert row.share == pytest.approx(expected) and row.lower < row.share < row.upper
    assert [series["name"] for series in figures[0]["data"]["series"]] == [place for place in PLACES if place != "all"]
    assert figures[0]["data"]["in_order"]


def test_head_maps_show_every_head_in_every_place_and_of_how_many_items(evidence, patching):  # noqa: F811
    exhibits.tracing.patching_heads(evidence, "noise", patching, {"sufficient": "Said."})
    tables, figures = left(evidence)
    shares = patching.share("sufficient", "heads")
    for k, (figure, where) in enumerate(zip(figures, ("the object's image tokens", "the last token"), strict=True)):
        np.testing.assert_allclose(figure["data"]["values"], shares[..., k])
        assert figure["title"].endswith(f"at {where} (n = 8)")
    rows = tables["patching-heads.csv"]
    assert rows["share"].tolist() == pytest.approx(shares[..., 1].ravel().tolist())  # the last table left: the last place's rows
    assert set(rows["place"]) == {"last"} and set(rows["items"]) == {8}


def test_the_window_map_has_costs_with_intervals(evidence):  # noqa: F811
    rng = np.random.default_rng(1)
    cut = {"correct": rng.integers(0, 2, (8, 2, 3)).astype(float), "margin": rng.normal(size=(8, 2, 3))}
    cut["correct"][:, 0, 0] = 1.0
    full = {"correct": np.ones(8), "margin": np.full(8, 2.0)}
    windows = {"early": (0,), "middle": (1, 2), "late": (3,)}
    losses = WindowLosses(*ABOUT, ("x → y", "y → z"), windows, 4, full, cut, full)
    exhibits.tracing.window_map(evidence, losses, ("x → y", "late"))
    tables, (figure,) = left(evidence)
    np.testing.assert_allclose(figure["data"]["values"], 1 - cut["correct"].mean(0))
    found = interval(1 - cut["correct"][:, 1, 2], ABOUT[1])
    row = tables["knockout-windows.csv"].iloc[5]
    assert (row["edge"], row["window"], row["layers"], row["lower"], row["upper"]) == ("y → z", "late", "3", found.lower, found.upper)
    assert row["margin_lost"] == pytest.approx(2 - cut["margin"][:, 1, 2].mean())
    assert figure["data"]["lower"][1][2] == found.lower and figure["data"]["columns"] == ["early 0", "middle 1–2", "late 3"]


def test_a_cell_says_its_interval():
    from reports.drawings import claims as drawings

    data = {"rows": ["a"], "columns": ["b"], "values": [[0.5]], "lower": [[0.25]], "upper": [[0.75]], "row_label": "edge"}
    _, tips = drawings.layer_heatmap(data)
    assert list(tips.values()) == ["edge a, tokens kept b: 0.50 (0.25 to 0.75)"]
    _, tips = drawings.layer_heatmap({key: value for key, value in data.items() if key not in ("lower", "upper")})
    assert list(tips.values()) == ["edge a, tokens kept b: 0.50"]


def test_lines_in_order_are_not_turned():
    from reports.drawings import claims as drawings

    series = [{"name": str(k), "points": [{"x": x, "y": k * (1 - x)} for x in (0, 1)]} for k in (1, 2)]
    for in_order in (False, True):
        figure, _ = drawings.keep_curves({"series": series, "in_order": in_order})
        assert figure.axes[0].xaxis_inverted() is not in_order


def test_arrival_curves_fall_from_one(evidence):  # noqa: F811
    size = np.arange(1.0, 9.0)[:, None]
    more = {"text": 0.0, "image": 0.1}
    lost = {route: size * [1.0, 7 * share, 0.0] + [[0.0, share, 0.0]] for route, share in more.items()}
    found = Arrivals(*ABOUT, 3, lost, lost)
    exhibits.tracing.arrival_curves(evidence, found)
    tables, (figure,) = left(evidence)
    rows = tables["arrival-curves.csv"].set_index(["route", "layer"])
    assert rows.loc[("text", 0), "share_not_arrived"] == rows.loc[("image", 0), "share_not_arrived"] == 1.0
    assert rows.loc[("image", 1), "share_not_arrived"] == pytest.approx((0.7 * 36 + 0.8) / 36)
    assert rows.loc[("image", 1), "margin_lost"] == pytest.approx((0.7 * 36 + 0.8) / 8)
    assert [series["name"] for series in figure["data"]["series"]] == ["text", "image"]


def test_background_bars_are_accuracies(evidence):  # noqa: F811
    rng = np.random.default_rng(2)
    correct = pd.DataFrame({name: rng.integers(0, 2, 8).astype(float) for name in CONDITIONS}, index=list(IDS))
    correct.insert(0, "cluster", ABOUT[1])
    correct.insert(1, "task", ["t", "u"] * 4)
    exhibits.tracing.background(evidence, Background(correct, {}), CONDITIONS)
    tables, (figure,) = left(evidence)
    assert {bar["label"]: bar["value"] for bar in figure["data"]["bars"]} == pytest.approx(correct[list(CONDITIONS)].mean().to_dict())
    rows = tables["background.csv"].set_index(["task", "condition"])
    assert rows.loc[("u", "full"), "accuracy"] == correct[correct["task"] == "u"]["full"].mean() and rows.loc[("t", "full"), "items"] == 4
