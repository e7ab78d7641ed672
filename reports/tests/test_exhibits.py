"""Tables and figure data against hand computations, and every figure can be drawn."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reports import exhibits, figures
from reports.drawings import claims
from reports.evidence import Evidence
from vlm_core import HeadId
from vlm_core.heads.rankings import SingleHeads
from vlm_core.stats import interval

from . import sample_run


@pytest.fixture
def evidence():
    """What a test leaves, outside any claim; a figure is drawn where it is left."""
    return Evidence(None)


def left(evidence):
    """The tables by name and the figures, of which each is checked and drawn again from what was stored."""
    payload = evidence.payload()
    for number, figure in enumerate(payload["figures"]):
        figures.check(figure["kind"], figure["data"])
        svg = figures.render(figure["kind"], figure["data"], prefix=f"f{number}", label=figure["alt"])
        assert re.fullmatch(r"\s*<(svg|table|div)\b.*</\1>\s*", svg, re.DOTALL)
    tables = {table["name"]: pd.DataFrame(table["rows"], columns=table["columns"]) for table in payload["tables"]}
    return tables, payload["figures"]


def one_figure(evidence):
    tables, (figure,) = left(evidence)
    return tables, figure


def test_an_interval_of_an_accuracy_is_one():
    found = exhibits.shared.mean_with_interval(pd.Series([1, 0, 1, 1, 0, 1, 1, 1] * 5), np.repeat(np.arange(20), 2))
    expected = interval(np.array([1, 0, 1, 1, 0, 1, 1, 1] * 5, dtype=float), np.repeat(np.arange(20), 2), bounds=(0.0, 1.0))
    assert found == {"value": 0.75, "lower": expected.lower, "upper": expected.upper}
    few = exhibits.shared.mean_with_interval([0.5, 1.0, 0.5, 1.0], range(4))
    assert few["upper"] == 1.0 < interval(np.array([0.5, 1.0, 0.5, 1.0]), np.arange(4), bounds=(0.0, 1.0)).upper, "no accuracy is above 1"
    for constant in (0.0, 1.0):
        found = exhibits.shared.mean_with_interval(np.full(5, constant), np.arange(5))
        assert 0.0 <= found["lower"] <= found["value"] == constant <= found["upper"] <= 1.0
        assert found["lower"] < found["upper"]


# -- heads ------------------------------------------------------------------------------------------------------------


def test_head_ablation_rows_and_bars(evidence):
    full, cut, blind = (pd.Series(values, dtype=float) for values in ([1, 1, 1, 0] * 5, [1, 0, 0, 0] * 5, [0, 1, 0, 0] * 5))
    conditions = {"full": ("baseline", full), "top 2": ("targeted", cut), "other image": ("floor", blind)}
    exhibits.ablation.head_ablation(evidence, "color", conditions, np.arange(20) // 2, [HeadId(1, 2), HeadId(0, 3)], 0.25)
    tables, figure = one_figure(evidence)
    rows = tables["head-ablation.csv"]
    assert rows["task"].unique().tolist() == ["color"]
    assert rows["condition"].tolist() == ["full", "top 2", "other image"]
    assert rows["accuracy"].tolist() == [0.75, 0.25, 0.25]
    assert rows["drop"].tolist() == [0.0, 0.5, 0.5]
    assert rows["heads_removed"].iloc[1] == 2 and rows["heads_removed"].iloc[[0, 2]].isna().all()
    assert ((rows["lower"] < rows["accuracy"]) & (rows["accuracy"] < rows["upper"])).all()
    assert figure["kind"] == "accuracy_bars" and figure["data"]["chance"] == 0.25
    assert [(bar["label"], bar["role"], bar["value"]) for bar in figure["data"]["bars"]] == [
        ("full", "baseline", 0.75), ("top 2", "targeted", 0.25), ("other image", "floor", 0.25),
    ]  # fmt: skip
    assert "L1.H2, L0.H3" in figure["caption"]


def test_head_map_marks_the_targeted_heads(evidence):
    coefficients = np.array([[0.1, -0.2, 0.5], [0.0, 0.9, 0.3]])
    exhibits.heads.head_map(evidence, "count", coefficients, [HeadId(1, 1), HeadId(0, 2)], 0.834)
    _, figure = one_figure(evidence)
    assert figure["data"]["values"] == coefficients.tolist()
    assert [(mark["layer"], mark["head"]) for mark in figure["data"]["marks"]] == [(0, 2), (1, 1)]
    assert "R² on unseen masks 0.83" in figure["caption"] and "0.2, 1.1" in figure["alt"]
    assert "see the image." not in figure["caption"]


def test_head_maps_say_how_many_heads_see_the_image_where_not_all_do(evidence):
    coefficients = np.array([[np.nan] * 3, [0.0, 0.9, 0.3]])
    exhibits.heads.head_map(evidence, "count", coefficients, [HeadId(1, 1)], 0.834)
    drop = {name: {"drop": 0.1} for name in exhibits.heads.LETTERS}
    heads = {
        f"{layer}.0": {"layer": layer, "head": 0, "category": "routing", "drops": drop | {"cross-modal grounding": {"drop": seen}}}
        for layer, seen in enumerate((None, None, 0.2))
    }
    clusters = SimpleNamespace(labels=[0, 1, 1], k=2, silhouette=0.5, by_k={2: 0.5}, permuted=np.zeros(2), p_value=0.1)
    exhibits.heads.taxonomy(evidence, heads, clusters, 0.01, {"scenes": (SimpleNamespace(share=0.9, by_chance=0.4), {}, {})})
    one = SingleHeads(np.ones(2), np.zeros(2), np.full((2, 2, 2), [[np.nan] * 2, [0.5] * 2]), ("a", "b"), ("s", "t"), "logit")
    exhibits.ablation.single_head_costs(evidence, "count", one, 0.05)
    captions = [figure["caption"] for figure in left(evidence)[1]]
    said = [re.search(r"\d+ of \d+(?= heads see the image)", caption)[0] for caption in captions]
    assert said == ["3 of 6", "1 of 3", "2 of 4"]


def test_the_taxonomy_says_how_far_it_agrees_between_scenes_and_between_wordings(evidence):
    heads = {"0.0": {"layer": 0, "head": 0, "category": "routing", "drops": {name: {"drop": 0.1} for name in exhibits.heads.LETTERS}}}
    clusters = SimpleNamespace(labels=[0], k=2, silhouette=0.5, by_k={2: 0.5}, permuted=np.zeros(2), p_value=0.1)
    stability = {
        "scenes": (SimpleNamespace(share=0.9, by_chance=0.4), {"entropy": 0.5, "distance": 0.7}, {}),
        "wordings": (SimpleNamespace(share=np.nan, by_chance=np.nan), {"entropy": 0.8, "distance": np.nan}, {"questions": {"features": 14}}),
    }
    exhibits.heads.taxonomy(evidence, heads, clusters, 0.01, stability)
    _, figure = one_figure(evidence)
    scenes, wordings = (f"Between {exhibits.heads.AGREEMENTS[name]}, " for name in ("scenes", "wordings"))
    assert f"{scenes}90 % of heads have the same category (40 % by chance), and features of heads correlate by 0.50 to 0.70" in figure["caption"]
    assert f"{wordings}an unknown share of heads" in figure["caption"] and "by 0.80 to 0.80" in figure["caption"]
    (left_behind,) = evidence.payload()["artifacts"]
    kept = left_behind["content"]["stability"]
    assert kept["scenes"]["heads_with_the_same_category"] == 0.9 and kept["wordings"]["heads_with_the_same_category"] is None
    assert kept["wordings"]["questions"] == {"features": 14}
    assert kept["wordings"]["rank_correlation_of_features_over_heads"] == {"entropy": 0.8, "distance": None}


def test_null_draws_keep_every_draw(evidence):
    exhibits.heads.null_draws(evidence, "shape", np.array([0.0, 0.05, -0.025, 0.1]), np.float64(0.3), 0.2)
    _, figure = one_figure(evidence)
    assert figure["data"] == {"draws": [0.0, 0.05, -0.025, 0.1], "observed": 0.3, "p_value": 0.2, "x_label": "accuracy lost"}
    assert "against 4 layer-matched" in figure["title"] and "lose 0.30" in figure["alt"]


def test_attention_and_mask_lie_on_the_image(evidence):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    mask = np.array([[True, False, False], [False, False, True]])
    heat = np.array([[0.0, 1.0, 2.0], [3.0, np.nan, 5.0]])
    item = {"image": image, "prompt": "what ?", "answer": "red"}
    exhibits.heads.attention_overlay(evidence, item, heat, mask, "where it looks")
    _, figure = one_figure(evidence)
    data = figure["data"]
    assert data["values"] == [[0.0, 1.0, 2.0], [3.0, None, 5.0]]
    assert data["mask"] == [[1, 0, 0], [0, 0, 1]] and (data["prompt"], data["answer"]) == ("what ?", "red")
    shown = Image.open(io.BytesIO(base64.b64decode(data["image"])))
    assert shown.size == (256, 256)
    assert shown.getpixel((0, 0)) == image.getpixel((0, 0)) and shown.getpixel((255, 255)) == image.getpixel((7, 7))
    with pytest.raises(ValueError, match=r"at most 256 pixels a side, got \(3, 257\)"):
        exhibits.heads.attention_overlay(evidence, item, np.zeros((3, 257)), mask, "where it looks")


def test_a_wide_image_stays_wide(evidence):
    item = {"image": Image.new("RGB", (90, 30)), "prompt": "what ?", "answer": "red"}
    exhibits.heads.attention_overlay(evidence, item, np.ones((30, 90)), np.zeros((30, 90)), "where it looks")
    _, figure = one_figure(evidence)
    assert Image.open(io.BytesIO(base64.b64decode(figure["data"]["image"]))).size == (256, 85)


def test_heat_and_outline_are_drawn_over_the_whole_image_each_at_its_own_resolution():
    """A wide image; heat in its right half, strongest below; a mask of its left lower quarter."""
    out = io.BytesIO()
    Image.new("RGB", (60, 20)).save(out, "PNG")
    data = {"image": base64.b64encode(out.getvalue()).decode(), "values": [[0.0, 1.0], [None, 2.0]], "prompt": "p", "answer": "a"}
    mask = np.zeros((4, 6), int)
    mask[2:, :3] = 1
    figure, _ = claims.attention_overlay({**data, "mask": mask.tolist()})
    plain, seen = figure.axes
    assert len(plain.images) == 1 and not plain.patches
    photo, heat = seen.images
    assert photo.get_extent() == heat.get_extent() == [0, 60, 20, 0]
    np.testing.assert_allclose(heat.get_array()[..., 3], [[0, 0.375], [0, 0.75]])
    (outline,) = seen.patches
    corners = outline.get_path().get_extents()
    assert (corners.x0, corners.y0, corners.x1, corners.y1) == (0, 10, 30, 20)
    # Each side once: 3 columns of 10 wide and 2 rows of 5 high, top and bottom, left and right.
    ends = outline.get_path().vertices.reshape(-1, 2, 2)
    assert len(ends) == 2 * (3 + 2) and np.abs(ends[:, 1] - ends[:, 0]).sum() == 2 * (30 + 10)
    assert not claims.attention_overlay(data)[0].axes[1].patches


# -- tokens -----------------------------------------------------------------------------------------------------------


def grid(cells, n=10):
    """A `drop_table`: ``{(layer, keep, policy): right answers of n}``."""
    rows = [
        (f"item-{i}", f"scene-{i // 2}", "color", layer, keep, policy, float(i < right))
        for (layer, keep, policy), right in cells.items()
        for i in range(n)
    ]
    return pd.DataFrame(rows, columns=["item", "cluster", "task", "layer", "keep", "policy", "correct"])


def test_curves_are_means_of_the_layers_cells(evidence):
    table = grid(
        {
            (3, 1.0, "random"): 9, (3, 0.5, "random"): 6, (3, 0.25, "random"): 4, (3, 0.0, "random"): 1,
            (3, 1.0, "attention"): 9, (3, 0.5, "attention"): 8, (3, 0.25, "attention"): 7, (3, 0.0, "attention"): 1,
            (4, 0.5, "random"): 2, (4, 0.5, "attention"): 3,
        }
    )  # fmt: skip
    exhibits.tokens.drop_curves(evidence, table, "color", 3)
    tables, figure = one_figure(evidence)
    lines = {series["name"]: series for series in figure["data"]["series"]}
    assert {name: [(p["x"], p["y"]) for p in line["points"]] for name, line in lines.items()} == {
        "random": [(0.25, 0.4), (0.5, 0.6), (1.0, 0.9)],
        "attention": [(0.25, 0.7), (0.5, 0.8), (1.0, 0.9)],
    }
    assert {name: line["role"] for name, line in lines.items()} == {"random": "random", "attention": "targeted"}
    rows = tables["token-drop-curves.csv"]
    assert rows["layer"].unique().tolist() == [3, 4] and rows["items"].unique().tolist() == [10]
    assert rows[(rows["policy"] == "attention") & (rows["layer"] == 3)]["accuracy"].tolist() == [0.7, 0.8, 0.9]
    assert rows[rows["layer"] == 4][["policy", "keep", "accuracy"]].to_numpy().tolist() == [["random", 0.5, 0.2], ["attention", 0.5, 0.3]]
    point = lines["random"]["points"][1]
    expected = interval(np.array([1.0] * 6 + [0.0] * 4), np.arange(10) // 2, bounds=(0.0, 1.0))
    assert (point["lower"], point["upper"]) == (expected.lower, expected.upper)


def sensitivity(without, full=9):
    """Every token dropped from each layer, and half of them; ``without`` holds right answers of ten with none kept."""
    cells = {(layer, 0.0, "stride"): right for layer, right in enumerate(without)}
    cells |= {(layer, 0.5, "stride"): full - 1 for layer in range(len(without))}
    cells |= {(layer, 0.5, "random"): 0 for layer in range(len(without))}  # another policy's cell: not shown
    cells |= {(layer, 1.0, policy): full for layer in range(len(without)) for policy in ("stride", "random")}
    return grid(cells)


@pytest.mark.parametrize(
    ("without", "horizon"),
    [
        ((2, 5, 9, 9), 2),
        ((2, 9, 5, 9), 3),  # a layer that could spare them does not count while a later one could not
        ((9, 9, 9, 9), 0),
        ((2, 5, 9, 7), None),
        ((2, 5, 8, 9), 3),  # a loss of 0.1 is not less than 0.1
        ((2, 10, 10, 10), 1),  # nor is a gain a loss
    ],
)
def test_the_horizon_is_where_all_tokens_can_go_for_good(evidence, without, horizon):
    exhibits.tokens.layer_sensitivity(evidence, sensitivity(without), "color", "stride", 0.1 - 1e-9)
    tables, figure = one_figure(evidence)
    data = figure["data"]
    assert data["horizon"] == horizon
    assert (f"horizon at layer {horizon}" if horizon is not None else "no horizon") in figure["alt"]
    assert data["rows"] == [0, 1, 2, 3] and data["columns"] == [0.0, 0.5]
    np.testing.assert_allclose(data["values"], [[(9 - right) / 10, 0.1] for right in without], atol=1e-12)
    rows = tables["layer-sensitivity.csv"]
    assert list(rows.columns) == ["task", "policy", "layer", "keep", "accuracy_lost"]
    assert len(rows) == 8 and rows["policy"].unique().tolist() == ["stride"]
    np.testing.assert_allclose(rows[rows["keep"] == 0]["accuracy_lost"], [(9 - right) / 10 for right in without], atol=1e-12)


def spent(policy, keep, accuracy, saved):
    """One policy's costs, of layer 1."""
    whole = {"policy": policy, "layer": 1, "keep": keep, "accuracy": accuracy, "lower": accuracy - 0.02, "upper": accuracy + 0.02}
    return {**whole, "flops_saved": 2 * saved, "latency_saved": saved}


def test_the_front_is_what_nothing_beats_in_both(evidence):
    costs = [
        spent("all tokens", 1.0, 0.99, 0.0), spent("stride", 0.5, 0.90, 0.2), spent("fastv", 0.5, 0.95, 0.2), spent("random", 0.25, 0.90, 0.3),
        spent("slow", 0.25, 0.98, -0.1), spent("same", 0.25, 0.90, 0.1),
    ]  # fmt: skip
    exhibits.tokens.saved_against_lost(evidence, costs, "fastv, 0.5 from layer 1")
    tables, figure = one_figure(evidence)
    points = {point["name"]: point for point in figure["data"]["points"]}
    assert {name.split(",")[0] for name, point in points.items() if point["front"]} == {"all tokens", "fastv", "random"}
    assert [name for name, point in points.items() if point["chosen"]] == ["fastv, 0.5 from layer 1"]
    assert len(tables["token-costs.csv"]) == 6 and (tables["token-costs.csv"]["flops_saved"] == 2 * tables["token-costs.csv"]["latency_saved"]).all()


def test_only_the_best_of_many_policies_are_drawn(evidence):
    cells = {(3, 0.5, name): right for name, right in (("random", 1), ("pooling", 2), ("a", 3), ("b", 9), ("c", 4), ("d", 8))}
    exhibits.tokens.drop_curves(evidence, grid(cells | {(3, 1.0, "random"): 10}), "color", 3, shown=2)
    tables, figure = one_figure(evidence)
    assert [series["name"] for series in figure["data"]["series"]] == ["random", "pooling", "b", "d"]
    assert set(tables["token-drop-curves.csv"]["policy"]) == {"random", "pooling", "a", "b", "c", "d"}
    assert "Of 4 policies that look at the tokens, the best 2 are drawn" in figure["caption"]
    assert all(series["points"][-1]["y"] == 1.0 for series in figure["data"]["series"]), "everything kept is the same for all"


def test_losing_every_token_is_drawn_against_the_margin(evidence):
    table = sensitivity((2, 5, 9, 9))
    exhibits.tokens.horizon(evidence, "color", table, 0.05, 2)
    _, figure = one_figure(evidence)
    assert [point["y"] for point in figure["data"]["points"]] == [0.2, 0.5, 0.9, 0.9]
    assert figure["data"]["reference"] == pytest.approx(0.85) and "layer 2 (3/4 of the depth) is put to the test" in figure["caption"]


def test_a_cell_that_was_not_measured_is_shown_as_such(evidence):
    table = sensitivity((2, 5, 9))
    exhibits.tokens.layer_sensitivity(evidence, table[~((table["layer"] == 1) & (table["keep"] == 0.5))], "color", "stride", 0.05)
    tables, figure = one_figure(evidence)
    assert figure["data"]["values"][1][1] is None
    assert len(tables["layer-sensitivity.csv"].dropna()) == 5


def test_without_a_column_for_no_tokens_there_is_no_horizon(evidence):
    table = sensitivity((9, 9))
    exhibits.tokens.layer_sensitivity(evidence, table[table["keep"] > 0], "color", "stride", 0.05)
    _, figure = one_figure(evidence)
    assert figure["data"]["horizon"] is None and figure["data"]["columns"] == [0.5]


def test_trend_points_are_accuracies_by_layer(evidence):
    accuracies = pd.DataFrame({0: [0, 0, 0, 1.0] * 3, 2: [0, 1, 0, 1.0] * 3, 5: [1, 1, 0, 1.0] * 3})
    exhibits.tokens.layer_trend(evidence, "color", accuracies, np.arange(12) // 2, 0.9)
    _, figure = one_figure(evidence)
    assert [(point["x"], point["y"]) for point in figure["data"]["points"]] == [(0, 0.25), (2, 0.5), (5, 0.75)]
    assert figure["data"]["reference"] == 0.9
    assert all(point["lower"] < point["y"] < point["upper"] for point in figure["data"]["points"])


# -- pictures ---------------------------------------------------------------------------------------------------------


def overlay(number, heat=((1.0, 0.0), (0.0, 0.0))):
    mask = np.zeros((4, 4), dtype=bool)
    mask[2:, 2:] = True
    item = {"id": f"i{number}", "task": "t", "image": Image.new("RGB", (8, 8), (0, 0, 200))}
    return {"item": item, "heat": heat, "mask": mask, "iou": 0.25}


def test_overlays_are_small_pictures_with_heat_and_outline_row_by_row(evidence):
    blank = overlay(11, ((np.nan, 0.0), (0.0, 0.0)))
    exhibits.masks.overlays(evidence, "where a head looks", [*(overlay(number) for number in range(11)), blank])
    written, figure = one_figure(evidence)
    assert written["head-impact-overlays.csv"]["item"].tolist() == [f"i{number}" for number in range(12)]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure["data"]["image"]))))
    assert sheet.shape == (2 * 72, 10 * 72, 3)
    first, last = sheet[2:70, 2:70], sheet[72 + 2 : 72 + 70, 72 + 2 : 72 + 70]
    assert first[10, 10, 0] > 100 > first[10, 60, 0]  # heat where the head looks
    assert tuple(first[60, 10]) == (0, 0, 200) and tuple(last[10, 10]) == (0, 0, 200)
    assert (first[34, 34:] > 250).all() and tuple(first[50, 50]) == (0, 0, 200)  # an outline, not a filled shape
    assert (sheet[80:, 2 * 72 + 2 :] == 255).all() and "12 confirmation items" in figure["caption"] and "0.25" in figure["caption"]


def test_every_kind_of_figure_has_an_exhibit(evidence):
    exhibits.ablation.head_ablation(evidence, "t", {"full": ("baseline", pd.Series([1.0, 0.0]))}, [0, 1], [HeadId(0, 0)], 0.5)
    exhibits.heads.head_map(evidence, "t", [[0.1]], [HeadId(0, 0)], 0.5)
    exhibits.heads.null_draws(evidence, "t", [0.1, 0.2], 0.3, 0.5)
    exhibits.heads.attention_overlay(evidence, {"image": Image.new("RGB", (4, 4)), "prompt": "p", "answer": "a"}, [[1.0]], [[1]], "t")
    exhibits.tokens.drop_curves(evidence, grid({(0, 0.5, "stride"): 4, (0, 1.0, "stride"): 5}), "color", 0)
    exhibits.tokens.layer_sensitivity(evidence, sensitivity((1, 2)), "t", "stride", 0.05)
    exhibits.tokens.layer_trend(evidence, "t", pd.DataFrame({0: [1.0, 0.0], 1: [1.0, 1.0]}), [0, 1], 1.0)
    exhibits.tokens.saved_against_lost(evidence, [spent("all tokens", 1.0, 0.9, 0.0)], None)
    evidence._figures += sample_run.of_students(np.random.default_rng(0))
    exhibits.masks.overlays(evidence, "t", [overlay(0)])
    exhibits.heads.usage_map(evidence, [[0.0, 1.0]], ["count"], ["count-1"], {"task": 0.1, "colours": 0.0}, 0.5)
    _, drawn = left(evidence)
    # What a slider shows is tested where it is made (test_exhibits_tokens), nights are drawn from a history and left by no test.
    assert {figure["kind"] for figure in drawn} == figures.KINDS.keys() - {"kept_tokens", "nights"}


def test_a_figure_is_drawn_once(monkeypatch):
    """Saving a figure that lays itself out draws it a first time for nothing."""
    from matplotlib.figure import Figure

    draw, drawn = Figure.draw, []
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: drawn.append(1) or draw(self, renderer))
    assert "<svg" in figures.draw("accuracy_bars", {"bars": [{"label": "a", "value": 0.5}]})["svg"]
    assert len(drawn) == 1
