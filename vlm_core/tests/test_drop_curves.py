"""Where tokens are dropped, what a grid of drops measures, and which drop is chosen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import vlm_core.reduction.curves
from vlm_core import NotMeasurable, sweep
from vlm_core.reduction import Debiased, FastV
from vlm_core.reduction.curves import (
    Cell,
    asked_by,
    choose_drop,
    choose_recipe,
    drop_table,
    early,
    harmless,
    holds_exactly,
    losses,
    mid_depth,
    reducers,
    row_of,
    spread,
    three_quarters,
    unavailable,
)
from vlm_core.tests.tiny import make_items, tiny_subject


def deep(n_layers, n_deepstack=0):
    return SimpleNamespace(anatomy=SimpleNamespace(n_layers=n_layers, n_deepstack=n_deepstack))


@pytest.mark.parametrize(("n_layers", "expected"), [(6, (3, 4)), (32, (16, 18, 19, 21)), (3, (2,)), (2, (1,)), (1, (0,))])
def test_mid_depth_of_common_depths(n_layers, expected):
    assert mid_depth(deep(n_layers)) == expected


@pytest.mark.parametrize("n_layers", range(2, 100))
def test_mid_depth_is_half_to_two_thirds_of_any_depth(n_layers):
    layers = mid_depth(deep(n_layers))
    assert list(layers) == sorted(set(layers)) and 1 <= len(layers) <= 4
    assert 2 * layers[0] >= n_layers and layers[-1] < n_layers
    assert len(layers) == 1 or 3 * layers[-1] <= 2 * n_layers


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [(6, (0, 1, 2, 3, 4, 5)), (32, (0, 4, 9, 13, 18, 22, 27, 31)), (3, (0, 1, 2)), (1, (0,)), (8, tuple(range(8)))],
)
def test_spread_covers_the_depth(n_layers, expected):
    assert spread(deep(n_layers)) == expected
    assert len(spread(deep(n_layers), most=2)) == min(2, n_layers)


@pytest.fixture(scope="module")
def sensitive():
    """A subject of two layers whose answers depend on which tokens stay."""
    return tiny_subject(layers=2, seed=2)


@pytest.fixture(scope="module")
def grid_items():
    """Items whose image tokens all differ: pictures of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    return [{**item, "image": Image.fromarray(noise)} for item, noise in zip(make_items(10, seed=4), pixels, strict=True)]


LAYERS, KEEPS = (0, 1), (0.0, 0.25, 0.5, 1.0)
POLICIES = {"random": "random", "stride": "stride", "fastv": FastV()}


@pytest.fixture(scope="module")
def table(sensitive, grid_items):
    return drop_table(sensitive, grid_items, layers=LAYERS, keeps=KEEPS, policies=POLICIES, seed=3)


def test_every_cell_is_that_drop_measured_alone(sensitive, grid_items, table):
    assert list(table.columns) == ["item", "cluster", "task", "layer", "keep", "policy", "correct", "margin"]
    for (layer, keep, policy), rows in table.groupby(["layer", "keep", "policy"]):
        alone = sweep(sensitive, grid_items, {"it": row_of(POLICIES[policy], layer, keep, seed=3)}, metrics=("margin", "correct"))
        margin, alone = (alone[alone["metric"] == metric] for metric in ("margin", "correct"))
        np.testing.assert_allclose(rows["margin"], margin["value"], rtol=1e-4, atol=1e-4)
        assert rows["item"].tolist() == alone["item"].tolist() == [item["id"] for item in grid_items]
        assert rows["cluster"].tolist() == alone["cluster"].tolist() and rows["task"].tolist() == alone["task"].tolist()
        assert rows["correct"].tolist() == alone["value"].tolist(), (layer, keep, policy)
    patterns = table.groupby(["layer", "keep", "policy"])["correct"].apply(tuple)
    assert patterns.nunique() > 4  # else the comparison above would see nothing


def test_only_what_reads_a_layer_before_the_first_is_left_out(table):
    cells = set(table[["layer", "keep", "policy"]].itertuples(index=False, name=None))
    every = {(layer, keep, policy) for layer in LAYERS for keep in KEEPS for policy in POLICIES}
    assert every - cells == {(0, 0.25, "fastv"), (0, 0.5, "fastv")}


def test_alike_cells_run_once(monkeypatch, sensitive, grid_items):
    ran = []

    def counting(subject, items, interventions, **options):
        ran.append(interventions)
        return sweep(subject, items, interventions, **options)

    monkeypatch.setattr(vlm_core.reduction.curves, "sweep", counting)
    drop_table(sensitive, grid_items[:2], layers=LAYERS, keeps=KEEPS, policies=POLICIES)
    (interventions,) = ran
    # untouched; nothing kept, per layer; two fractions of two policies at layer 0 and of three at layer 1
    assert len(interventions) == 1 + 2 + 4 + 6
    assert sum(one is None for one in interventions.values()) == 1


def test_close_fractions_stay_apart(sensitive, grid_items):
    """Alike to six digits, and yet one of 17 image tokens more or less."""
    close = (7 / 17 + 1e-9, 7 / 17 - 1e-9, 0.5)
    table = drop_table(sensitive, grid_items[:3], layers=(1,), keeps=close, policies={"stride": "stride"})
    assert table.groupby("keep").size().to_dict() == dict.fromkeys(close, 3)
    for keep in close:
        assert choose_drop(table, keep) == Cell(1, keep, "stride")
    with pytest.raises(ValueError, match="no rows at keep = 0.4117647058"):
        choose_drop(table, 7 / 17)


def test_progress_counts_rows(sensitive, grid_items):
    seen = []
    drop_table(sensitive, grid_items[:2], layers=(1,), keeps=(0.5,), policies={"stride": "stride"}, progress=lambda *row: seen.append(row))
    assert seen[-1] == (2, 2)


def graded(accuracy):
    rows = [(layer, keep, policy, float(i < right), 1.0) for (layer, keep, policy), right in accuracy.items() for i in range(10)]
    return pd.DataFrame(rows, columns=["layer", "keep", "policy", "correct", "margin"])


def test_the_best_cell_at_the_fraction_is_chosen():
    table = graded({(3, 0.5, "random"): 6, (3, 0.5, "attention"): 8, (4, 0.5, "stride"): 7, (3, 1.0, "random"): 10, (4, 0.25, "stride"): 9})
    assert choose_drop(table, 0.5) == Cell(3, 0.5, "attention")
    assert choose_drop(table, 0.25) == Cell(4, 0.25, "stride")


def test_ties_go_to_the_best_over_all_tasks_then_to_the_surest_the_earliest_layer_and_the_first_policy():
    layers = graded({(4, 0.5, "random"): 8, (3, 0.5, "attention"): 8, (5, 0.5, "stride"): 8})
    assert choose_drop(layers, 0.5)[::2] == (3, "attention")
    policies = graded({(2, 0.5, "random"): 7, (3, 0.5, "stride"): 8, (3, 0.5, "attention"): 8})
    assert choose_drop(policies, 0.5).policy == "stride"
    assert choose_drop(policies[::-1], 0.5).policy == "attention"
    tasks = pd.concat([policies.assign(task="a"), graded({(3, 0.5, "stride"): 2, (3, 0.5, "attention"): 5}).assign(task="b")])
    assert choose_drop(tasks, 0.5, "a").policy == "attention"
    assert choose_drop(tasks[tasks["task"] == "a"], 0.5, "a").policy == "stride"
    wider = policies.assign(margin=policies["policy"].map({"random": 9.0, "stride": 1.0, "attention": 2.0}))
    assert choose_drop(wider, 0.5).policy == "attention", "of what is as often right, the surer"
    with pytest.raises(ValueError, match="no rows at keep = 0.5 of task 'c'"):
        choose_drop(tasks, 0.5, "c")


def test_a_fraction_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="no rows at keep = 0.75"):
        choose_drop(graded({(3, 0.5, "random"): 6}), 0.75)


def measured(cells, n=150, full=1.0):
    """A table of two tasks in which ``cells`` lose every so-manieth item: ``{cell: lost in task a, in task b}``."""
    rows = []
    for task in ("a", "b"):
        for i in range(n):
            item = (f"{task}{i}", f"scene{i}", task)
            rows.append((*item, 0, 1.0, "random", full))
            for cell, lost in cells.items():
                rows.append((*item, *cell, full - float(i < lost[task == "b"])))
    return pd.DataFrame(rows, columns=["item", "cluster", "task", "layer", "keep", "policy", "correct"])


CHEAP, DEAR, LOSSY = Cell(1, 0.25, "fastv"), Cell(4, 0.5, "random"), Cell(0, 0.125, "stride")


def test_losses_are_paired_by_item():
    table = measured({CHEAP: (6, 0)}).sample(frac=1, random_state=0)
    found = losses(table, CHEAP)
    assert found.groupby("task")["loss"].mean().to_dict() == {"a": 0.04, "b": 0.0}
    assert set(found.loc[found["loss"] > 0, "item"]) == {f"a{i}" for i in range(6)}
    with pytest.raises(ValueError, match="has no rows of Cell"):
        losses(table, DEAR)
    with pytest.raises(ValueError, match="the untouched subject"):
        losses(table[table["keep"] < 1], CHEAP)


def test_what_loses_little_is_harmless():
    table = measured({DEAR: (0, 0), CHEAP: (3, 3), LOSSY: (60, 0)})
    assert harmless(table, 0.05) == [DEAR, CHEAP]
    assert harmless(table, 0.5) == [DEAR, CHEAP, LOSSY]
    assert harmless(table, 0.01) == [DEAR]
    assert harmless(measured({LOSSY: (60, 0)}), 0.05) == []


def test_every_task_is_spared():
    """Two items in a hundred over all, but all of them in one task of four."""
    table = measured({CHEAP: (9, 0)})
    others = measured({CHEAP: (0, 0)})
    others = others.assign(task=others["task"].map({"a": "c", "b": "d"}), item="other " + others["item"])
    table = pd.concat([table, others], ignore_index=True)
    assert harmless(table, 0.061) == [CHEAP]
    assert harmless(table, 0.059) == []


def test_the_recipe_is_the_fastest_of_what_saves_most_operations():
    operations, saved = {CHEAP: 0.6, DEAR: 0.2, LOSSY: 0.9}.get, {CHEAP: 0.1, DEAR: 0.5, LOSSY: 0.3}

    def seconds(cells):
        return [saved[cell] for cell in cells]

    assert choose_recipe([DEAR, CHEAP, LOSSY], operations, seconds) == DEAR
    assert choose_recipe([DEAR, CHEAP, LOSSY], operations, seconds, timed=2) == LOSSY, "what is not timed cannot be chosen"
    assert choose_recipe([CHEAP, DEAR], operations, lambda cells: [0.1] * len(cells)) == CHEAP
    assert choose_recipe([], operations, seconds) is None
    asked = []
    choose_recipe([DEAR, CHEAP, LOSSY], operations, lambda cells: asked.extend(cells) or [0.0] * len(cells), timed=1)
    assert asked == [LOSSY], "the clock runs for no more than it must"


def test_the_references_come_first_and_more_last(sensitive):
    found = reducers(sensitive, mine=FastV())
    assert list(found)[:3] == ["random", "stride", "pooling"] and list(found)[-1] == "mine" and "fastv" in found
    assert [name for name, one in found.items() if not holds_exactly(one)] == ["pyramid"]
    assert not any("adaptive" in name for name in found), "a policy that keeps as many as it likes is compared with none"


def test_stages_are_left_out_where_they_do_not_fit(sensitive, grid_items):
    pyramid = reducers(sensitive)["pyramid"]
    table = drop_table(sensitive, grid_items[:2], layers=LAYERS, keeps=(0.5, 1.0), policies={"stride": "stride", "pyramid": pyramid})
    assert set(table.loc[table["keep"] < 1, "policy"]) == {"stride"}
    deeper = tiny_subject(layers=6)
    row = reducers(deeper)["pyramid"](1, 0.5)
    assert [part.layer for part in row] == [1, 3, 4] and reducers(deeper)["pyramid"](4, 0.5) is None


def test_early_is_the_second_of_thirty_two():
    assert [early(deep(n)) for n in (2, 6, 24, 32, 80)] == [1, 1, 2, 2, 5]
    assert [asked_by(deep(n)) for n in (6, 32, 80)] == [2, 2, 5]
    assert [three_quarters(deep(n)) for n in (1, 6, 32)] == [0, 4, 24]


def test_layers_that_get_visual_features_anew_are_left_alone():
    """Qwen3-VL adds them to the first three: tokens go later."""
    subject = deep(28, n_deepstack=3)
    assert early(subject) == asked_by(subject) == 3 and spread(subject)[0] == 3 and mid_depth(subject)[0] == 14
    assert mid_depth(deep(4, n_deepstack=3)) == (3,)


@pytest.mark.parametrize(("layer", "n_layers"), [(early, 1), (asked_by, 1), (asked_by, 2)])
def test_a_subject_too_shallow_is_said_to_be(layer, n_layers):
    with pytest.raises(NotMeasurable, match=f"has {n_layers} layer"):
        layer(deep(n_layers))


def test_what_the_subject_lacks_is_named(monkeypatch, sensitive, grid_items):
    from vlm_core.tests.test_policies import Asks

    policies = {"stride": "stride", "fastv": FastV(), "asks": Asks()}
    assert unavailable(sensitive, grid_items[:2], policies) == {}

    def nowhere(*args):
        raise NotMeasurable("its image tokens have no places")

    monkeypatch.setattr("vlm_core.subjects.embed.visuals", nowhere)
    assert unavailable(sensitive, grid_items[:2], policies) == {"asks": "its image tokens have no places"}


def test_a_subject_without_rotary_positions_lacks_what_reads_without_them(monkeypatch, sensitive, grid_items):
    policies = {"stride": "stride", "debiased": Debiased(), "fastv": FastV()}
    assert unavailable(sensitive, grid_items[:2], policies) == {}
    monkeypatch.setattr("vlm_core.seam.run.unrotated", lambda *call: None)
    missing = unavailable(sensitive, grid_items[:2], policies)
    assert list(missing) == ["debiased"] and "layer 0 has no rotary positions" in missing["debiased"]
