"""Exhibits of what H2 explores: tables say what was measured, figures what the tables say, captions how much it was."""

from __future__ import annotations

import base64
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reports import exhibits, figures
from vlm_core import DropTokens, HeadId
from vlm_core.heads.token_mass import TokenMass
from vlm_core.reduction.kept_rows import KeptRows
from vlm_core.reduction.redundancy import Redundancy
from vlm_core.reduction.relevance_maps import RelevanceMap
from vlm_core.reduction.utility import MarginalUtility

from .test_exhibits import evidence, left, one_figure  # noqa: F401 (a fixture)

SCENES, TASKS = ("s0", "s0", "s1", "s2"), ("color", "count", "color", "count")


def alike():
    """Two groups, three layers, one measure; the second group has no tokens in the first item."""
    values = np.arange(4 * 3 * 2, dtype=float).reshape(4, 3, 2, 1)
    values[0, :, 1] = np.nan
    return Redundancy(values, np.array([[9, 0], [9, 4], [9, 4], [9, 4]]), ("all", "object"), ("nearest",), tuple("abcd"), SCENES, TASKS)


def test_redundancy_is_a_line_a_group(evidence):  # noqa: F811
    found = alike()
    exhibits.tokens.redundancy(evidence, found, "nearest")
    tables, figure = one_figure(evidence)
    lines = {one["name"]: one["points"] for one in figure["data"]["series"]}
    assert list(lines) == ["all", "object"] and [point["x"] for point in lines["all"]] == [0, 1, 2]
    np.testing.assert_allclose([point["y"] for point in lines["all"]], found.of("nearest").mean(0))
    np.testing.assert_allclose([point["y"] for point in lines["object"]], np.nanmean(found.of("nearest", "object"), axis=0))
    rows = tables["token-redundancy.csv"]
    assert set(rows["task"]) == {"all", "color", "count"} and len(rows) == 3 * 3 * 2
    assert "all 9, object 3" in figure["caption"] and "4 confirmation items" in figure["caption"]


def test_utility_puts_groups_beside_random_ones(evidence):  # noqa: F811
    about = {"item": ["a", "b"], "cluster": ["s0", "s1"], "task": "color", "n_tokens": 3, "full": 9.0}
    groups = pd.concat(
        [
            pd.DataFrame({**about, "group": "all", "loss": [8.0, 6.0], "random": [8.0, 6.0]}),
            pd.DataFrame({**about, "group": "object", "loss": [5.0, 3.0], "random": [0.5, np.nan]}),
        ],
        ignore_index=True,
    )
    tokens = pd.DataFrame({"item": list("aabb"), "cluster": ["s0", "s0", "s1", "s1"], "task": "color", "full": 9.0, "loss": [0.1, 3.0, 0.1, -0.2]})
    found, late = MarginalUtility(1, tokens, groups), MarginalUtility(3, tokens.assign(loss=0.0), groups)
    exhibits.tokens.utility(evidence, found, {1: found, 3: late})
    tables, (cells, figure) = left(evidence)
    shares = tables["token-inert.csv"].set_index(["layer", "task"])["share"].to_dict()
    assert shares == {(1, "all"): 0.75, (1, "color"): 0.75, (3, "all"): 1.0, (3, "color"): 1.0}
    assert cells["data"]["rows"] == ["all", "color"] and cells["data"]["columns"] == [1, 3] and cells["data"]["values"] == [[0.75, 1.0], [0.75, 1.0]]
    bars = {bar["label"]: (bar["value"], bar["role"]) for bar in figure["data"]["bars"]}
    assert bars == {"all": (7.0, "targeted"), "object": (4.0, "targeted"), "object: as many random ones": (0.5, "random")}
    assert tables["token-utility.csv"]["layer"].tolist() == [1] * 4 + [3] * 4


def test_shares_of_heads_are_means_over_items_that_have_one(evidence):  # noqa: F811
    values = np.array([[[0.5, np.nan]], [[0.7, np.nan]], [[0.6, 0.9]], [[0.6, np.nan]]])
    exhibits.tokens.head_shares(evidence, TokenMass(values, 0.25, tuple("abcd"), SCENES, TASKS), [HeadId(0, 1)])
    _, figure = one_figure(evidence)
    np.testing.assert_allclose(figure["data"]["values"], [[0.6, 0.9]])
    assert figure["data"]["marks"] == [{"layer": 0, "head": 1}] and "25%" in figure["caption"]


def test_kept_rows_are_shares_from_the_top(evidence):  # noqa: F811
    counts = np.array([[0, 1, 3], [0, 2, 2], [1, 0, 3], [0, 1, 3]])
    candidates = np.full((4, 3), 4)
    position = np.array([0.7, 0.6, 0.65, 0.7])
    found = KeptRows(DropTokens(1, 1 / 3, "random"), counts, candidates, position, np.full(4, 0.5), tuple("abcd"), SCENES, TASKS)
    exhibits.tokens.kept_rows(evidence, found, "fastv")
    tables, figure = one_figure(evidence)
    np.testing.assert_allclose([bar["value"] for bar in figure["data"]["bars"]], [1 / 16, 4 / 16, 11 / 16])
    assert figure["data"]["chance"] == pytest.approx(1 / 3)
    lean = found.interval()
    assert f"{lean.estimate:+.3f} [{lean.lower:+.3f}, {lean.upper:+.3f}]" in figure["caption"]
    assert tables["token-kept-rows.csv"]["policy"].tolist() == ["fastv"] * 3


def seen(kept, dominant):
    """A 2 x 2 grid behind a token without a place; every token is a region but the first, which is one of its own."""
    grid, row, column = np.array([-1, 0, 0, 0, 0]), np.array([-1, 0, 0, 1, 1]), np.array([-1, 0, 1, 0, 1])
    scores = np.array([[9.0, 0, 0, 0, 2], [9.0, 0, 0, 1, 0], [9.0, 1, 0, 0, 0]])
    return RelevanceMap(
        "i", scores, grid, row, column, np.array([4, 0, 1, 2, 3]), dominant, np.ones((3, 5)) / 5, np.ones(5, int), np.array(kept), 0.5
    )


def test_two_questions_to_one_image_are_two_rows(evidence):  # noqa: F811
    items = [{"image": Image.new("RGB", (8, 8), (200, 200, 200)), "prompt": prompt} for prompt in ("which color?", "how many?")]
    named = ("participatory", "propositional", "perspectival", "propositional", "propositional")
    maps = [seen([True, True, False, False, False], named), seen([False, False, False, True, True], named)]
    exhibits.tokens.relevance(evidence, items, maps)
    _, figure = one_figure(evidence)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure["data"]["image"]))))
    side, step = exhibits.tokens.SHOWN_SIDE, exhibits.tokens.SHOWN_SIDE + exhibits.tokens.GAP
    assert sheet.shape == (2 * step, 6 * step, 3)

    def tile(row, column):
        """The middle of each quarter of a small picture, ``[2, 2, colour]``."""
        one = sheet[row * step : row * step + side, column * step : column * step + side]
        return one[side // 4 :: side // 2, side // 4 :: side // 2][:2, :2]

    plain = tile(0, 0)
    assert (plain == 200).all()
    changed = [(tile(0, column) != plain).any(-1).tolist() for column in (1, 2, 3)]
    assert changed == [[[False, False], [False, True]], [[False, False], [True, False]], [[True, False], [False, False]]]
    colours = exhibits.tokens._DOMINANT
    expected = [[colours["participatory"], colours["propositional"]], [colours["perspectival"], colours["propositional"]]]
    np.testing.assert_allclose(tile(0, 4), 0.5 * 200 + 0.5 * np.array(expected), atol=1)
    assert [(tile(row, 5) == 200).all(-1).tolist() for row in (0, 1)] == [[[True, False], [False, False]], [[False, False], [True, True]]]
    assert "“which color?” keeps 2 of 5 tokens; “how many?” keeps 2 of 5 tokens" in figure["caption"]
    assert "propositional 6, perspectival 2, participatory 2" in figure["caption"]


def test_kept_tokens_are_covered_grids_with_answers(evidence):  # noqa: F811
    about = dict(
        grid=np.array([-1, 0, 0, 0, 0]), row=np.array([-1, 0, 0, 1, 1]), column=np.array([-1, 0, 1, 0, 1]),
        boxes=np.array([[np.nan] * 4, [0.1, 0, 0.5, 0.5], [0.5, 0, 0.9, 0.5], [0.1, 0.5, 0.5, 1], [0.5, 0.5, 0.9, 1]]),
    )  # fmt: skip
    layout = type("Placed", (), {**about, "__len__": lambda self: 5})()
    items = [{"id": "a", "task": "color", "prompt": "which?", "answer": "red", "image": Image.new("RGB", (192, 96))}]
    all_, half = np.ones(5, dtype=bool), np.array([True, False, True, True, False])
    steps = [
        {"keep": 1.0, "left": [(layout, all_)], "outputs": ["red"], "correct": [True]},
        {"keep": 0.5, "left": [(layout, half)], "outputs": ["blue"], "correct": [False]},
    ]
    exhibits.tokens.kept_tokens(evidence, items, steps, "fastv", 1)
    figure = evidence.payload()["figures"][0]
    (example,) = figure["data"]["examples"]
    assert (example["width"], example["height"]) == (96, 48) and example["box"] == pytest.approx([0.1, 0, 0.9, 1])
    assert [step["rows"] for step in example["steps"]] == [["11", "11"], ["01", "10"]]
    assert [(step["kept"], step["of"], step["output"], step["correct"]) for step in example["steps"]] == [(5, 5, "red", True), (3, 5, "blue", False)]
    assert "1: 1 of 1, 0.5: 0 of 1" in figure["caption"]
    exhibits.tokens.kept_tokens(evidence, items, [], "fastv", 1)
    assert len(evidence.payload()["figures"]) == 1


def test_dropped_tokens_are_covered_run_by_run():
    assert figures.covered(["0011", "1111"], [0.0, 0.0, 1.0, 1.0], 40, 20) == "M0 0h20v10h-20z"
    assert figures.covered(["10.0"], [0.5, 0.0, 1.0, 0.5], 40, 20) == "M25 0h5v10h-5zM35 0h5v10h-5z"
