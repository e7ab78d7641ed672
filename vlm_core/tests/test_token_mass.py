"""How few image tokens hold a head's attention: by sorting whole maps, and for heads whose attention is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import FullAttention, Subject, attention_map, observe, token_mass
from vlm_core.heads.token_mass import TokenMass
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import make_items, tiny_subject


def slowly(row: np.ndarray, share: float) -> float:
    """The share of the largest ones, one by one."""
    rest, total, top = sorted(row, reverse=True), sum(row), 0.0
    for _ in range(max(1, round(share * len(row)))):
        top += rest.pop(0)
    return top / total


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_the_most_attended_tokens_one_by_one(subject, items, share):
    found = token_mass(subject, items[:3], share=share)
    assert found.per_item.shape == (3, subject.anatomy.n_layers, subject.anatomy.n_heads) and found.share == share
    for number, item in enumerate(items[:3]):
        expected = np.apply_along_axis(slowly, 2, attention_map(subject, item), share)
        np.testing.assert_allclose(found.per_item[number], expected, rtol=1e-5)
    assert found.items == ("item-0", "item-1", "item-2") and found.clusters[2] == "scene-1" and found.tasks[1] == "shape"


def test_other_queries_than_the_last(subject, items):
    found = token_mass(subject, items[:2], queries="question")
    image = subject.encode_items(items[:1]).image[0].numpy()
    maps = observe(subject, items[:1], FullAttention())[0]
    asked = np.arange(len(image)) > np.flatnonzero(image)[-1]
    expected = np.apply_along_axis(slowly, 2, maps[:, :, asked][..., image].mean(2), 0.25)
    np.testing.assert_allclose(found.per_item[0], expected, rtol=1e-4)
    assert not np.allclose(found.per_item, token_mass(subject, items[:2]).per_item)


def test_a_head_that_attends_evenly_gives_the_top_quarter_its_share(items):
    even = tiny_subject(seed=5)
    with torch.no_grad():
        even.anatomy.layers[1].self_attn.q_proj.weight[8:16] = 0
    found = token_mass(even, items[:4])
    np.testing.assert_allclose(found.per_item[:, 1, 1], 4 / 17, rtol=1e-5)
    assert (np.delete(found.per_item.reshape(4, -1), 5, axis=1) > 0.25).all()


def test_layers_without_the_image_and_tiles_that_only_fill_up():
    processor, model = PROCESSORS["mllama"]()
    subject, items = Subject(model, processor, name="mllama"), make_items(3)
    found = token_mass(subject, items).per_item
    crossed = sorted(subject.anatomy.cross_layers)
    assert np.isnan(np.delete(found, crossed, axis=1)).all()
    for number, item in enumerate(items):
        real = subject.layout(item["image"], item["prompt"]).kind != "padding"
        assert 0 < real.sum() < len(real)
        expected = np.apply_along_axis(slowly, 2, attention_map(subject, item)[crossed][:, :, real], 0.25)
        np.testing.assert_allclose(found[number, crossed], expected, rtol=1e-4)


@pytest.fixture
def known():
    values = np.array([[[0.5, 0.7], [0.9, np.nan]], [[0.3, 0.3], [np.nan, np.nan]]])
    return TokenMass(values, 0.25, ("a", "b"), ("s", "t"), ("x", "y"))


def test_chosen_heads_against_others_by_hand(known):
    np.testing.assert_allclose(known.of([(0, 0), (1, 0)]), [0.7, 0.3])
    assert np.isnan(known.of([(1, 0), (1, 1)])[1])
    table = known.compare([(1, 0), (0, 0)])
    assert table.columns.tolist() == ["item", "cluster", "task", "heads", "others", "difference"]
    np.testing.assert_allclose(table[["heads", "others", "difference"]], [[0.7, 0.7, 0.0], [0.3, 0.3, 0.0]], atol=1e-12)
    assert table["cluster"].tolist() == ["s", "t"]
    np.testing.assert_allclose(known.compare([(1, 0)], [(0, 0)])["difference"].iloc[0], 0.4)


def test_bad_heads_and_shares_are_refused(known, subject, items):
    for arguments, message in (
        (([(0, 0)], [(0, 0), (0, 1)]), "is among the heads and the others"),
        (([(2, 0)],), "there is no head"),
        (([],), "no heads"),
        (([(0, 0), (0, 1), (1, 0), (1, 1)],), "no heads"),
    ):
        with pytest.raises(ValueError, match=message):
            known.compare(*arguments)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share of TopShare must lie above 0"):
            token_mass(subject, items[:1], share=share)
