"""Where tokens are dropped, what a grid of drops measures, and which drop is chosen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import vlm_core.tokens
from vlm_core import DropTokens, sweep
from vlm_core.tests.tiny import make_items, tiny_subject
from vlm_core.tokens import POLICIES, choose_drop, drop_table, mid_depth, spread


def deep(n_layers):
    return SimpleNamespace(anatomy=SimpleNamespace(n_layers=n_layers))


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


@pytest.fixture(scope="module")
def table(sensitive, grid_items):
    return drop_table(sensitive, grid_items, layers=LAYERS, keeps=KEEPS, seed=3)


def test_every_cell_is_that_drop_measured_alone(sensitive, grid_items, table):
    assert list(table.columns) == ["item", "cluster", "task", "layer", "keep", "policy", "correct"]
    for (layer, keep, policy), rows in table.groupby(["layer", "keep", "policy"]):
        alone = sweep(sensitive, grid_items, {"it": DropTokens(layer, keep, policy, seed=3)}, metrics=("correct",))
        assert rows["item"].tolist() == alone["item"].tolist() == [item["id"] for item in grid_items]
        assert rows["cluster"].tolist() == alone["cluster"].tolist() and rows["task"].tolist() == alone["task"].tolist()
        assert rows["correct"].tolist() == alone["value"].tolist(), (layer, keep, policy)
    patterns = table.groupby(["layer", "keep", "policy"])["correct"].apply(tuple)
    assert patterns.nunique() > 4  # else the comparison above would see nothing


def test_only_attention_before_any_layer_is_left_out(table):
    cells = set(table[["layer", "keep", "policy"]].itertuples(index=False, name=None))
    every = {(layer, keep, policy) for layer in LAYERS for keep in KEEPS for policy in POLICIES}
    assert every - cells == {(0, 0.25, "attention"), (0, 0.5, "attention")}


def test_alike_cells_run_once(monkeypatch, sensitive, grid_items):
    ran = []

    def counting(subject, items, interventions, **options):
        ran.append(interventions)
        return sweep(subject, items, interventions, **options)

    monkeypatch.setattr(vlm_core.tokens, "sweep", counting)
    drop_table(sensitive, grid_items[:2], layers=LAYERS, keeps=KEEPS)
    (interventions,) = ran
    # untouched; nothing kept, per layer; two fractions of two policies at layer 0 and of three at layer 1
    assert len(interventions) == 1 + 2 + 4 + 6
    assert sum(one is None for one in interventions.values()) == 1


def test_close_fractions_stay_apart(sensitive, grid_items):
    """Alike to six digits, and yet one of 17 image tokens more or less."""
    close = (7 / 17 + 1e-9, 7 / 17 - 1e-9, 0.5)
    table = drop_table(sensitive, grid_items[:3], layers=(1,), keeps=close, policies=("stride",))
    assert table.groupby("keep").size().to_dict() == dict.fromkeys(close, 3)
    for keep in close:
        assert choose_drop(table, keep) == DropTokens(1, keep, "stride")
    with pytest.raises(ValueError, match="no rows at keep = 0.4117647058"):
        choose_drop(table, 7 / 17)


def test_progress_counts_rows(sensitive, grid_items):
    seen = []
    drop_table(sensitive, grid_items[:2], layers=(1,), keeps=(0.5,), policies=("stride",), progress=lambda *row: seen.append(row))
    assert seen[-1] == (2, 2)


def graded(accuracy):
    rows = [(layer, keep, policy, float(i < right)) for (layer, keep, policy), right in accuracy.items() for i in range(10)]
    return pd.DataFrame(rows, columns=["layer", "keep", "policy", "correct"])


def test_the_best_cell_at_the_fraction_is_chosen():
    table = graded({(3, 0.5, "random"): 6, (3, 0.5, "attention"): 8, (4, 0.5, "stride"): 7, (3, 1.0, "random"): 10, (4, 0.25, "stride"): 9})
    assert choose_drop(table, 0.5, seed=11) == DropTokens(3, 0.5, "attention", seed=11)
    assert choose_drop(table, 0.25) == DropTokens(4, 0.25, "stride")


def test_ties_go_to_the_earliest_layer_then_the_simplest_policy():
    layers = graded({(4, 0.5, "random"): 8, (3, 0.5, "attention"): 8, (5, 0.5, "stride"): 8})
    assert (choose_drop(layers, 0.5).layer, choose_drop(layers, 0.5).policy) == (3, "attention")
    policies = graded({(3, 0.5, "attention"): 8, (3, 0.5, "stride"): 8, (2, 0.5, "random"): 7})
    assert choose_drop(policies, 0.5).policy == "stride"
    assert choose_drop(graded({(3, 0.5, policy): 8 for policy in reversed(POLICIES)}), 0.5).policy == "random"


def test_a_fraction_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="no rows at keep = 0.75"):
        choose_drop(graded({(3, 0.5, "random"): 6}), 0.75)
