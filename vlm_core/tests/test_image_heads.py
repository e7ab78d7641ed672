"""Where some layers only see the image, what is said of heads' sight of it is said of those layers' heads."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm_core import NotMeasurable, ReplaceImageKV, Subject, arrivals, head_attribution, image_kv_means, without_each_head
from vlm_core.families.anatomy import HeadId
from vlm_core.heads.agreement import attribution_depth, scene_agreement, wording_agreement
from vlm_core.heads.attribution import HeadAttribution
from vlm_core.heads.curves import recovery
from vlm_core.heads.draws import layer_free
from vlm_core.heads.ranking import image_map, order_heads, top_heads
from vlm_core.heads.rankings import SingleHeads
from vlm_core.heads.semantics import usage
from vlm_core.heads.taxonomy import PathEffects, categorise, path_effects
from vlm_core.tests import family_processors

SEEING = tuple(HeadId(layer, head) for layer in (1, 3) for head in range(4))


@pytest.fixture(scope="module")
def crossed():
    """A tiny Mllama: layers 1 and 3 of 4 see the image."""
    processor, model = family_processors.mllama()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)
    return Subject(model, processor)


@pytest.fixture(scope="module")
def items():
    colours = ("red", "green", "blue")
    return [
        {
            "id": f"i{number}", "scene_id": f"s{number}", "task": "color", "image": Image.new("RGB", (32, 32), colour),
            "prompt": "what color ?", "answer": colour, "candidates": list(colours),
        }
        for number, colour in enumerate(colours * 2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def means(crossed, items):
    return image_kv_means(crossed, items)


def without_image(means):
    return lambda heads: ReplaceImageKV(tuple(heads), means, queries="text")


def test_heads_that_see_the_image_are_those_of_its_layers(crossed):
    assert crossed.image_heads == crossed.anatomy.image_heads == SEEING
    _, whole = family_processors.llava()
    assert Subject(whole).image_heads == Subject(whole).heads


def test_other_heads_have_no_attribution_and_no_rank(crossed, items, means):
    found = head_attribution(crossed, items, means, masks_per_item=8)
    assert np.isfinite(found.per_item[:, [1, 3]]).all() and np.isnan(found.per_item[:, [0, 2]]).all()
    assert found.per_item[:, [1, 3]].any()
    assert sorted(found.ranking()) == list(SEEING)
    assert len(found.top(0.5)) == 4
    table = recovery(crossed, items, {"attribution": found.ranking()}, [2], without_image(means))
    assert (table["every"] != table["none"]).any()
    assert all(set(drawn) <= set(SEEING) for drawn in layer_free(SEEING[:2], crossed, 20))


def test_single_heads_count_those_that_see(crossed, items, means):
    found = without_each_head(crossed, items, without_image(means))
    assert np.isnan(found.without[:, [0, 2]]).all() and np.isfinite(found.without[:, [1, 3]]).all()
    by_hand = SingleHeads(np.ones(1), np.zeros(1), np.array([[[np.nan, np.nan], [1.0, 0.5]]]), ("a",), ("s",), "logit")
    assert by_hand.unchanged(0.05) == 0.5


def test_paths_that_a_head_does_not_have_define_no_category(crossed, items, means):
    effects = path_effects(crossed, items, means)
    there = {name: np.isfinite(drops).all((0, 2)).tolist() for name, drops in effects.drops.items()}
    assert there == {
        "cross-modal grounding": [False, True, False, True],
        "vision summarisation": [False] * 4,
        "instruction following": [True, False, True, False],
        "routing": [True, False, True, False],
    }
    found = categorise(effects, draws=10)
    assert found.counts()["vision summarisation"] == 0
    assert not (found.category[[0, 2]] == "cross-modal grounding").any()
    assert all(one["evidence"] for one in found.as_dict().values())
    by_hand = {"cross-modal grounding": [[[np.nan], [0.5]]], "routing": [[[0.3], [np.nan]]]}
    known = PathEffects({name: np.array(drops * 2) for name, drops in by_hand.items()}, dict.fromkeys(by_hand, ("s", "t")))
    assert categorise(known, draws=10).category.ravel().tolist() == ["routing", "cross-modal grounding"]


def test_routes_are_cut_where_they_run(crossed, items):
    found = arrivals(crossed, items)
    assert found.lost["image"][:, 0].any() and found.lost["text"][:, 0].any()
    assert (found.lost["image"][:, 0] == found.lost["image"][:, 1]).all()  # layer 0 sees no image
    assert (found.lost["text"][:, 3] == 0).all()  # layer 3 sees no text


def test_maps_keep_their_shape(crossed):
    whole = image_map(crossed.anatomy, np.arange(8.0))
    assert np.array_equal(whole[[1, 3]].ravel(), np.arange(8.0)) and np.isnan(whole[[0, 2]]).all()
    assert np.array_equal(image_map(crossed.anatomy, np.arange(16.0).reshape(4, 4))[3], [12.0, 13.0, 14.0, 15.0])
    assert order_heads(whole) == list(SEEING)[::-1]
    assert len(top_heads(whole, 0.25)) == 2


@pytest.mark.parametrize("scores", [[[np.nan, 1.0]], [[np.nan, np.nan]]], ids=["one head", "every head"])
def test_a_head_without_a_score_among_others_is_an_error(scores):
    with pytest.raises(ValueError, match="has no score"):
        order_heads(scores)


def test_agreement_and_depth_are_of_the_layers_that_see():
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(12, 2, 8))
    names = tuple(f"s{number}" for number in range(12))

    def ranked(maps):
        return HeadAttribution(maps, names, names, "margin", 8, np.ones((12, 3)))

    dense, sparse = ranked(seen), ranked(np.stack([np.full((12, 8), np.nan), seen[:, 0], np.full((12, 8), np.nan), seen[:, 1]], axis=1))
    for measure in (scene_agreement, lambda found: wording_agreement({"t": [found["t"], found["t"]]}), attribution_depth):
        assert measure({"t": sparse}).by_task == measure({"t": dense}).by_task
    assert np.array_equal(usage(sparse.per_item)[0], usage(dense.per_item)[0])


def test_what_is_not_there_is_told_from_what_is_wrong(crossed):
    with pytest.raises(NotMeasurable, match="lacks 'replace_tokens'"):
        crossed.anatomy.require("replace_tokens")
    with pytest.raises(ValueError) as wrong:
        crossed.anatomy.require("image_kv", [0])
    assert not isinstance(wrong.value, NotMeasurable)
