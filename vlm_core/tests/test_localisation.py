"""Localisation heads: the bend of a curve, scatter over the image, and the choice of heads against slow ways to the same."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_core import SinkMass, Sinks, attention_map, observe
from vlm_core.families.anatomy import HeadId
from vlm_core.families.layout import Layout
from vlm_core.heads.localisation import elbow, localisation_heads, set_scores, spatial_entropy


def grids(*shapes: tuple[int, int], extra: int = 0) -> Layout:
    """Tokens of some grids, row by row, and ``extra`` tokens without a place."""
    parts = []
    for number, (rows, columns) in enumerate(shapes):
        row, column = (index.ravel() for index in np.indices((rows, columns)))
        corners = np.stack([column / columns, row / rows, (column + 1) / columns, (row + 1) / rows], axis=1)
        parts.append((np.full(row.size, number), row, column, corners))
    nowhere = np.full(extra, -1)
    grid, row, column = (np.concatenate([*(part[index] for part in parts), nowhere]) for index in range(3))
    corners = np.concatenate([*(part[3] for part in parts), np.full((extra, 4), np.nan)])
    n = len(grid)
    kind = np.where(grid < 0, "cls", "patch")
    return Layout(np.arange(n), np.zeros(n, int), kind, np.zeros(n, int), grid, row, column, corners, ((8, 8),))


def drawn(*rows: str) -> np.ndarray:
    return np.array([float(digit) for row in rows for digit in row])


def test_the_elbow_is_a_value_of_the_curve_wherever_it_bends():
    flat_then_steep = [0.001, 0.002, 0.003, 0.004, 0.4, 0.8]
    assert elbow(flat_then_steep) == 0.004
    assert elbow(np.array(flat_then_steep[::-1]).reshape(2, 3)) == 0.004
    assert elbow([0.0, 0.5, 0.6, 0.7, 0.8]) == 0.5
    assert elbow([0.3, 0.1, 0.2]) == 0.1 and elbow([0.2, 0.2]) == 0.2
    with pytest.raises(ValueError, match="finite"):
        elbow([0.1, np.nan])


def test_entropy_counts_connected_components_by_their_weight():
    layout = grids((4, 4))
    apart = drawn("1000", "0000", "0000", "0001")
    three_to_one = drawn("9009", "9000", "0000", "0000")
    touching = drawn("1000", "0100", "0010", "0000")
    maps = np.stack([apart, three_to_one, touching, np.ones(16), np.zeros(16)])
    two_parts = -(2 / 3) * np.log(2 / 3) - (1 / 3) * np.log(1 / 3)
    np.testing.assert_allclose(spatial_entropy(maps, layout), [np.log(2), two_parts, 0.0, np.inf, np.inf], atol=1e-12)
    faint = np.full(16, 0.01)
    faint[3] += 1e-4
    assert spatial_entropy(faint, layout) == np.inf


def test_components_end_with_their_grid_and_tokens_without_a_place_do_not_count():
    side_by_side = grids((1, 2), (1, 2), extra=1)
    touching_ends = np.array([0.0, 1.0, 1.0, 0.0, 0.0])
    assert spatial_entropy(touching_ends, side_by_side) == pytest.approx(np.log(2))
    assert spatial_entropy(np.array([0.0, 1.0, 1.0, 0.0, 100.0]), side_by_side) == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match="one value per image token"):
        spatial_entropy(np.ones(4), side_by_side)


def scatter(values: np.ndarray) -> float:
    """Entropy of one map ``[4, 4]`` by flood fill."""
    above = np.maximum(values - values.mean(), 0.0)
    left, weights = {tuple(cell) for cell in np.argwhere(above > 1e-3)}, []
    while left:
        todo, weight = [left.pop()], 0.0
        while todo:
            row, column = todo.pop()
            weight += above[row, column]
            around = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            todo += around
        weights.append(weight)
    share = np.array(weights) / sum(weights) if weights else np.array([])
    return float(-(share * np.log(share)).sum()) if weights else np.inf


def test_heads_are_those_chosen_most_often_among_the_candidates(subject, items):
    found = localisation_heads(subject, items, top=2, chosen=3, batch_rows=5)
    maps = np.stack([attention_map(subject, item) for item in items])
    mass = maps.sum(-1)
    np.testing.assert_allclose(found.mass, mass.mean(0), rtol=1e-5)
    assert found.threshold == pytest.approx(elbow(mass.mean(0)))
    np.testing.assert_array_equal(found.candidates, found.mass >= found.threshold)
    assert 3 <= found.candidates.sum() < found.candidates.size
    entropy = np.array([[[scatter(head[1:].reshape(4, 4)) for head in layer] for layer in item] for item in maps])  # the first token is CLS
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-6)
    count = np.zeros(mass.shape[1:])
    for number in range(len(items)):
        ranked = sorted(
            (HeadId(*map(int, head)) for head in np.argwhere(found.candidates)),
            key=lambda head: (round(entropy[number][head], 9), -mass[number][head]),
        )
        for head in ranked[: min(3, max(2, int(found.candidates.sum()) // 2))]:
            count[head] += np.isfinite(entropy[number][head])
    np.testing.assert_allclose(found.frequency, count / len(items))
    best = sorted(np.argwhere(found.candidates).tolist(), key=lambda head: (-count[tuple(head)], -found.mass[tuple(head)]))
    assert found.heads == tuple(HeadId(*head) for head in best[:2])


def test_sink_aware_heads_look_at_the_image_beside_its_sinks(subject, items):
    sinks = Sinks((2,), 0.5)
    plain, aware = (localisation_heads(subject, items, top=1, sinks=one) for one in (None, sinks))
    sunk = observe(subject, items, SinkMass("last", sinks))[..., 1].mean(0)
    eligible = (plain.mass >= 0.2) & (sunk <= 0.5 * plain.mass)
    np.testing.assert_array_equal(aware.candidates, plain.candidates & eligible)
    assert 0 < aware.candidates.sum() < plain.candidates.sum()
    everything = localisation_heads(subject, items, sinks=Sinks((0,), 0.0))
    assert everything.heads == () and not everything.candidates.any() and not everything.frequency.any()


def test_scores_of_sets_are_means_over_their_heads():
    per_item = np.random.default_rng(0).random((5, 2, 3))
    found = set_scores(per_item, [[(0, 1), (1, 2)], [HeadId(1, 0)]])
    np.testing.assert_allclose(found, [(per_item[:, 0, 1] + per_item[:, 1, 2]) / 2, per_item[:, 1, 0]])


def test_no_items_no_heads(subject):
    with pytest.raises(ValueError, match="at least one"):
        localisation_heads(subject, [])


def test_of_heads_with_one_spot_the_one_that_looks_more_is_chosen(subject, items, monkeypatch):
    from vlm_core.heads import localisation

    monkeypatch.setattr(localisation, "spatial_entropy", lambda maps, layout: np.zeros(maps.shape[:-1]))
    found = localisation_heads(subject, items, top=1, chosen=1)
    mass = np.stack([attention_map(subject, item) for item in items]).sum(-1).reshape(len(items), -1)
    most = np.bincount(np.where(found.candidates.ravel(), mass, -1.0).argmax(1), minlength=mass.shape[1]) / len(items)
    np.testing.assert_allclose(found.frequency.ravel(), most)
