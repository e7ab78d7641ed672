"""Windows of layers and what cutting edges in them costs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vlm_core import KnockOut, sweep
from vlm_core.tables import wide
from vlm_core.tests.tracing_items import make_pairs, square
from vlm_core.tracing.places import token_places
from vlm_core.tracing.windows import EDGES, PUBLISHED, WindowLosses, depth_windows, knock_out_windows


def test_windows_of_the_published_depth_are_the_published_ones():
    found = depth_windows(32)
    assert {name: (layers[0], layers[-1]) for name, layers in found.items()} == PUBLISHED
    assert all(layers == tuple(range(layers[0], layers[-1] + 1)) for layers in found.values())


@pytest.mark.parametrize("n_layers", [1, 2, 3, 6, 12, 26, 40])
def test_windows_keep_their_place_at_every_depth(n_layers):
    found = depth_windows(n_layers)
    assert len(set(found.values())) == len(found) and all(found.values())
    assert all(0 <= layer < n_layers for layers in found.values() for layer in layers)
    starts = [layers[0] for layers in found.values()]
    assert starts == sorted(starts) and list(found.values())[-1][-1] == n_layers - 1
    if n_layers >= 6:
        assert list(found) == list(PUBLISHED)
        for name, layers in found.items():
            assert abs(layers[0] / n_layers - PUBLISHED[name][0] / 32) <= 0.5 / n_layers + 1e-9
            assert abs((layers[-1] + 1) / n_layers - (PUBLISHED[name][1] + 1) / 32) <= 0.5 / n_layers + 1e-9


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        depth_windows(0)
    with pytest.raises(ValueError, match="window 'odd' is layers 3 to 32, outside 32 layers"):
        depth_windows(6, {"odd": (3, 32)})


@pytest.fixture(scope="module")
def items():
    return make_pairs(5)


@pytest.fixture(scope="module")
def losses(subject, items):
    return knock_out_windows(subject, items, square, windows={"first": (0,), "rest": (1, 2)})


def test_every_cell_is_the_knock_out_of_its_tokens(subject, items, losses):
    places = token_places(subject, items, square)
    assert losses.items == tuple(item["id"] for item in items) and losses.n_layers == 3
    for number, item in enumerate(items):
        named = places(item)
        last = len(named["object"]) - 1
        image = named["object"] | named["background"]
        asking = np.arange(len(image)) > np.flatnonzero(image)[-1]
        asking[last] = False
        at = {"image": image, "object": named["object"], "background": image & ~named["object"], "question": asking}
        at = {name: tuple(np.flatnonzero(members).tolist()) for name, members in at.items()} | {"last": (last,)}
        rows = {
            (edge, window): KnockOut(at[edge.split(" → ")[1]], at[edge.split(" → ")[0]], layers)
            for edge in EDGES
            for window, layers in losses.windows.items()
        }
        rows |= {("blind", ""): KnockOut(tuple([*at["question"], last]), at["image"], (0, 1, 2)), ("nothing", ""): None}
        table = sweep(subject, [item], {", ".join(label): row for label, row in rows.items()})
        for metric in ("correct", "margin"):
            plain = wide(table, metric).iloc[0]
            for edge in EDGES:
                for window in losses.windows:
                    expected = plain["nothing, "] - plain[f"{edge}, {window}"]
                    np.testing.assert_allclose(losses.at(edge, window, metric)[number], expected, atol=1e-4, err_msg=f"{edge} {window}")
            np.testing.assert_allclose(losses.blind[metric][number], plain["blind, "], atol=1e-4)
            np.testing.assert_allclose(losses.full[metric][number], plain["nothing, "], atol=1e-4)


def test_edges_can_be_ones_own(subject, items):
    found = knock_out_windows(subject, items, square, windows={"all": range(3)}, edges={"mine": ("last", "object")})
    same = knock_out_windows(subject, items, square, windows={"all": range(3)})
    np.testing.assert_allclose(found.at("mine", "all", "margin"), same.at("object → last", "all", "margin"), atol=1e-6)
    assert list(depth_windows(3)) == list(knock_out_windows(subject, items[:1], square, edges={"mine": ("last", "object")}).windows)


def test_the_worst_cell_of_hand_made_losses():
    cut = np.ones((4, 2, 3))
    cut[:, 1, 2] = [0, 0, 1, 1]
    cut[:, 0, 0] = [0, 0, 1, 1]
    cut[:, 1, 0] = [1, 0, 1, 1]
    margins = np.zeros((4, 2, 3))
    margins[:, 0, 0], margins[:, 1, 2], margins[:, 0, 1] = -1.0, -2.0, -9.0
    about = (tuple("abcd"), tuple("abcd"), ("t",) * 4, ("x", "y"), {"early": (0,), "middle": (1,), "late": (2,)}, 3)
    full = {"correct": np.ones(4), "margin": np.zeros(4)}
    losses = WindowLosses(*about, full, {"correct": cut, "margin": margins}, full)
    assert losses.worst() == ("y", "late")  # alike in accuracy, more in margin
    assert losses.worst("margin", "correct") == ("x", "middle")
    np.testing.assert_array_equal(losses.at("y", "late"), [1, 1, 0, 0])
    assert losses.runner_up("y", "late") == "early"  # one item of four against none
    assert losses.runner_up("x", "early") == "middle"  # alike in accuracy, more in margin
    assert losses.runner_up("x", "middle", "margin", "correct") == "early"
    swapped = dataclasses.replace(losses, cut={"correct": cut, "margin": -margins})
    assert swapped.worst() == ("x", "early")
    single = dataclasses.replace(losses, windows={"early": (0,)})
    with pytest.raises(ValueError, match=r"3 layers have one window only \(early\)"):
        single.runner_up("y", "early")
