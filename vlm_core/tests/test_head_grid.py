"""The ablation grid measures what its cells say, and on planted heads every way to take them away costs, random heads nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vlm_core import (
    HeadId,
    MeanHeads,
    RedirectHeads,
    ReplaceImageKV,
    ResampleHeads,
    ZeroHeads,
    capture_activations,
    head_means,
    image_kv_means,
    sweep,
)
from vlm_core.heads.grid import MODES, ablation_grid, grid_table, removals
from vlm_core.tests.planted import next_token_logits, planted_subject, with_answers_the_image_raises
from vlm_core.tests.tiny import WORDS, make_items

PLANTED = [HeadId(0, 1), HeadId(2, 3)]


@pytest.fixture(scope="module")
def planted():
    """A subject, items, a ranking with the planted heads first, and all removals."""
    subject, items = planted_subject(PLANTED), make_items(8)
    means, outputs = image_kv_means(subject, items), head_means(subject, items)
    items = with_answers_the_image_raises(subject, items, PLANTED, means)
    ranking = [*PLANTED, *(head for head in subject.heads if head not in PLANTED)]
    return subject, items, ranking, removals(subject, items, means, outputs, seed=3), (means, outputs)


def test_removals_are_the_interventions_they_are_named_after(planted):
    subject, items, _, found, (means, outputs) = planted
    assert tuple(found) == MODES
    heads = [HeadId(1, 2)]
    assert found["image-KV"](0, heads) == ReplaceImageKV(heads, means, queries="text")
    assert found["zero"](0, heads) == ZeroHeads(heads, "question")
    assert found["mean"](0, heads) == MeanHeads(heads, outputs, "question")
    other = {**items[0], "image": items[2]["image"]}  # item 1 shares the scene of item 0
    assert found["resample"](0, heads) == ResampleHeads(heads, capture_activations(subject, other, "head"), "question")
    placebo = found["placebo"](0, heads)
    assert isinstance(placebo, RedirectHeads) and placebo.queries == "question"
    assert removals(subject, items, means, outputs, modes=("placebo",), seed=3)["placebo"](5, heads) == placebo
    assert removals(subject, items, means, outputs, modes=("placebo",), seed=4)["placebo"](5, heads) != placebo


def test_cells_are_sweeps_of_those_heads(planted):
    subject, items, ranking, found, _ = planted
    rows = ablation_grid(subject, items, ranking, found, [("zero", 2), ("resample", 2), ("image-KV", 4)], draws=6, seed=1)
    assert rows[["mode", "target", "heads"]].drop_duplicates().apply(tuple, axis=1).tolist() == [
        ("none", "top", 0),
        *((mode, target, 2) for mode in ("zero", "resample") for target in ("top", "layer-matched", "random")),
        *(("image-KV", target, 4) for target in ("top", "layer-matched", "random")),
    ]
    assert (rows.groupby(["mode", "target", "heads"]).size() == 8).all()  # every item in every cell
    plain = sweep(subject, items, {"none": None, "zero": ZeroHeads(PLANTED, "question")}, metrics=("correct",))
    for mode in ("none", "zero"):
        mine = rows[(rows["mode"] == mode) & (rows["target"] == "top")]
        assert mine["correct"].tolist() == plain[plain["intervention"] == mode]["value"].tolist()
    one = [sweep(subject, [item], [found["resample"](i, PLANTED)], metrics=("correct",))["value"].item() for i, item in enumerate(items)]
    assert rows[(rows["mode"] == "resample") & (rows["target"] == "top")]["correct"].tolist() == one


def test_cells_of_top_heads_alone_are_what_they_are_beside_random_ones(planted):
    subject, items, ranking, found, _ = planted
    cells = [("zero", 2), ("mean", 2), ("zero", 4)]
    whole, part = (ablation_grid(subject, items, ranking, found, cells, top_only=only, draws=6) for only in ((), [("mean", 2), ("zero", 4)]))
    left_out = ((whole["mode"] == "mean") | (whole["heads"] == 4)) & (whole["target"] != "top")
    assert left_out.any() and part["target"].nunique() == 3
    pd.testing.assert_frame_equal(whole[~left_out].reset_index(drop=True), part)
    with pytest.raises(ValueError, match=r"top_only names the cell \('zero', 3\), which is not measured"):
        ablation_grid(subject, items, ranking, found, cells, top_only=[("zero", 3)])


def test_random_sets_are_averaged_per_item_and_the_same_for_all_modes(planted):
    subject, items, ranking, found, _ = planted
    asked = []

    def remembered(mode):
        def removal(number, heads):
            asked.append((mode, number, tuple(heads)))
            return found[mode](number, heads)

        return removal

    rows = ablation_grid(
        subject, items, ranking, {mode: remembered(mode) for mode in ("zero", "mean")}, [("zero", 2), ("mean", 2)], draws=8, draws_per_item=3
    )
    sets = {mode: sorted((number, heads) for m, number, heads in asked if m == mode) for mode in ("zero", "mean")}
    assert sets["zero"] == sets["mean"]
    assert len(sets["zero"]) == 8 * (1 + 3 + 3)  # top, then three sets of either kind an item
    assert set(rows["correct"]) <= {0.0, 1 / 3, 2 / 3, 1.0}


def right_only_with(subject, item, heads, means):
    """The item with two candidates, of which the right one wins if these heads see the image and the other one if not."""
    words = [word for word in WORDS if word not in (":", "?")]
    ids = subject.tokenizer.convert_tokens_to_ids(words)
    sees, blind = (next_token_logits(subject, item, row)[ids].numpy() for row in (None, ReplaceImageKV(heads, means, queries="text")))
    gap = np.minimum(sees[:, None] - sees[None], blind[None] - blind[:, None])
    right, wrong = np.unravel_index(int(gap.argmax()), gap.shape)
    assert gap.max() > 0
    return {**item, "task": "t", "answer": words[right], "candidates": [words[right], words[wrong]]}


def test_taking_planted_heads_away_costs_everything_and_random_ones_only_where_they_are_these(planted):
    subject, items, ranking, found, (means, _) = planted
    items = [right_only_with(subject, item, PLANTED, means) for item in items]
    rows = ablation_grid(subject, items, ranking, found, [(mode, 2) for mode in ("image-KV", "zero")], draws=8, draws_per_item=8)
    table = grid_table(rows).set_index(["mode", "target", "heads"])
    assert table.loc[("none", "top", 0), ["accuracy", "drop"]].tolist() == [1.0, 0.0]
    assert table.loc[("image-KV", "top", 2), "drop"] == 1.0
    # of 66 pairs of heads 45 hold neither of the planted ones: taking the image from these is nothing
    assert table.loc[("image-KV", "random", 2), "drop"] < 0.5
    assert table.loc[("zero", "random", 2), "drop"] > 0.0


def test_where_top_heads_fill_their_layers_no_matched_set_is_made_up(planted):
    subject, items, _, found, _ = planted
    filled = [HeadId(1, head) for head in range(4)]
    ranking = [*filled, *(head for head in subject.heads if head not in filled)]
    rows = ablation_grid(subject, items[:3], ranking, found, [("zero", 4)], draws=3)
    assert set(rows["target"]) == {"top", "random"}


def test_grid_tables_by_hand():
    rows = pd.DataFrame(
        [(f"i{k}", f"s{k // 2}", task, mode, target, heads, value)
         for task, full in (("a", 1.0), ("b", 0.5))
         for mode, target, heads, values in (("none", "top", 0, [full] * 8), ("zero", "top", 2, [0.0, 1.0] * 4), ("zero", "random", 2, [1.0] * 8))
         for k, value in enumerate(values)],
        columns=["item", "cluster", "task", "mode", "target", "heads", "correct"],
    )  # fmt: skip
    table = grid_table(rows).set_index(["task", "mode", "target"])
    assert table.loc[("a", "zero", "top"), ["heads", "items", "accuracy", "drop"]].tolist() == [2, 8, 0.5, 0.5]
    assert table.loc[("b", "zero", "top"), "drop"] == 0.0 and table.loc[("b", "zero", "random"), "drop"] == -0.5
    assert (table["lower"] <= table["accuracy"]).all() and (table["accuracy"] <= table["upper"]).all()


def test_bad_cells_modes_and_items_are_refused(planted):
    subject, items, ranking, found, (means, outputs) = planted
    with pytest.raises(ValueError, match=r"cell \('melt', 2\): there is no such removal, only image-KV, zero"):
        ablation_grid(subject, items, ranking, found, [("melt", 2)])
    for count in (0, 12):
        with pytest.raises(ValueError, match=f"cell \\('zero', {count}\\): expected a number of heads from 1 to 11"):
            ablation_grid(subject, items, ranking, found, [("zero", count)])
    with pytest.raises(ValueError, match="unknown mode 'melt': choose from image-KV, zero"):
        removals(subject, items, means, outputs, modes=("melt",))
    with pytest.raises(ValueError, match="all items are of one scene"):
        removals(subject, items[:2], means, outputs)
    assert np.array_equal(list(removals(subject, items[:2], means, outputs, modes=("zero",))), ["zero"])
