"""Arrival depths: hand-made arrivals are found where they are, and cuts are those of the tokens meant."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_core import KnockOut, sweep
from vlm_core.tables import wide
from vlm_core.tests.tracing_items import make_pairs
from vlm_core.tracing.places import token_places
from vlm_core.tracing.sequence import ROUTES, Arrivals, arrivals

N = 8


def made(**layers):
    """Arrivals of which every item's information comes through in single layers: route → (layer, share) pairs."""
    size = np.array([1.0, 2.0, 4.0, 8.0])
    lost, before = {}, {}
    for route, pairs in layers.items():
        still = [sum(share for layer, share in pairs if layer >= start) for start in range(N)]
        upto = [sum(share for layer, share in pairs if layer <= stop) for stop in range(N)]
        lost[route], before[route] = size[:, None] * np.array(still), size[:, None] * np.array(upto)
    return Arrivals(tuple("abcd"), tuple("aabb"), ("t",) * 4, N, lost, before)


ONE = np.ones((1, 2))


@pytest.mark.parametrize("layer", range(N))
def test_what_arrives_in_one_layer_arrives_at_its_depth(layer):
    found = made(text=[(layer, 1.0)])
    np.testing.assert_allclose(found.depth("text")(ONE), layer / N)
    np.testing.assert_allclose(found.depth_before("text")(ONE), layer / N)
    np.testing.assert_allclose(found.curve("text")[0], [1.0 if start <= layer else 0.0 for start in range(N)])


def test_depth_is_the_mean_of_what_arrives_bit_by_bit_and_lag_a_difference():
    found = made(text=[(0, 0.5), (2, 0.5)], image=[(3, 0.25), (7, 0.75)])
    weights = np.array([[1.0, 1.0], [2.0, 0.0]])
    np.testing.assert_allclose(found.depth("text")(weights), 1 / N)
    np.testing.assert_allclose(found.depth("image")(weights), 6 / N)
    np.testing.assert_allclose(found.lag()(weights), 5 / N)
    np.testing.assert_allclose(found.lag(before=True)(weights), 5 / N)
    np.testing.assert_allclose(found.lag("text", "image")(weights), -5 / N)


def test_items_count_as_much_as_they_lose():
    found = made(text=[(0, 1.0)], image=[(4, 1.0)])
    found.lost["image"][2:] = found.lost["image"][2:, :1] * (np.arange(N) <= 6)  # two items, 12 of 15 nats, arrive later
    np.testing.assert_allclose(found.depth("image")(ONE), (3 * 4 + 12 * 6) / 15 / N)
    np.testing.assert_allclose(found.depth("image")(np.array([[1.0, 0.0]])), 4 / N)


@pytest.fixture(scope="module")
def items():
    return make_pairs(4)


def test_cuts_are_those_of_the_tokens_meant(subject, items):
    found, places, n_layers = arrivals(subject, items), token_places(subject, items), subject.anatomy.n_layers
    assert list(found.lost) == list(ROUTES) and found.n_layers == n_layers
    for number, item in enumerate(items):
        named = places(item)
        steps = np.arange(len(named["role"]))
        image = tuple(np.flatnonzero(~(named["context"] | (steps == len(steps) - 1))).tolist())
        asked, read = (tuple(np.flatnonzero(one).tolist()) for one in (named["asked"], named["role"] | (steps == len(steps) - 1)))
        assert len(read) == 2
        edges = {"text": (read, asked), "image": (asked + read, image), "image, direct": (read, image)}
        for route, (queries, keys) in edges.items():
            rows = {"none": None}
            rows |= {f"from {layer}": KnockOut(queries, keys, range(layer, n_layers)) for layer in range(n_layers)}
            rows |= {f"up to {layer}": KnockOut(queries, keys, range(layer + 1)) for layer in range(n_layers)}
            plain = wide(sweep(subject, [item], rows), "margin").iloc[0]
            for layer in range(n_layers):
                np.testing.assert_allclose(found.lost[route][number, layer], plain["none"] - plain[f"from {layer}"], atol=1e-4)
                np.testing.assert_allclose(found.lost_before[route][number, layer], plain["none"] - plain[f"up to {layer}"], atol=1e-4)
        assert not np.allclose(found.lost["text"][number], found.lost["image"][number], atol=1e-3)


def test_answers_of_several_tokens_are_cut_off_too(subject, items):
    """What reads an answer's later tokens is the answer itself: cut off like the last token of the prompt."""
    longer = [{**item, "candidates": ["dark red", "dark blue", "light green"], "answer": "dark blue"} for item in items]
    found = arrivals(subject, longer)
    (whole,) = (found.lost["image"][:, 0],)
    rows = {"none": None, "blind": KnockOut("question", "image", range(subject.anatomy.n_layers))}
    plain = wide(sweep(subject, longer, rows), "margin")
    np.testing.assert_allclose(whole, plain["none"] - plain["blind"], atol=1e-4)
    text = [KnockOut(group, "asked", range(subject.anatomy.n_layers)) for group in ("role", "last", "answer")]
    cut = wide(sweep(subject, longer, {"none": None, "cut": tuple(text)}, groups=token_places(subject, longer)), "margin")
    np.testing.assert_allclose(found.lost["text"][:, 0], cut["none"] - cut["cut"], atol=1e-4)
