"""Rows of kept tokens: what the seam left over, counted by hand; uniform keeping has no bias, a policy that takes the bottom has it all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from vlm_core import DropTokens, Subject, kept_rows
from vlm_core.interventions.policy import Ranked, Seen
from vlm_core.reduction import FastV
from vlm_core.reduction.kept_tokens import kept_tokens
from vlm_core.stats import goodness_of_fit, interval
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.test_policies import kept
from vlm_core.tests.test_seam import logits
from vlm_core.tests.tiny import make_items

N_IMAGE = 17  # a class token, then 4 x 4 patches


@dataclass(frozen=True, eq=False)
class Bottom(Ranked):
    """Keeps the tokens that come last."""

    name: ClassVar[str] = "bottom"

    def scores(self, seen: Seen) -> torch.Tensor:
        return seen.ordinals.float()


@dataclass(frozen=True, eq=False)
class ClassToken(Ranked):
    """Keeps the tokens that come first."""

    name: ClassVar[str] = "class token"

    def scores(self, seen: Seen) -> torch.Tensor:
        return -seen.ordinals.float()


@pytest.mark.parametrize("policy", ["random", "stride", FastV(), FastV("all")])
def test_rows_are_those_of_what_the_seam_left(subject, items, policy):
    drop = DropTokens(1, 0.4, policy)
    found = kept_rows(subject, items[:5], drop, batch_rows=3)
    assert found.drop == drop and found.counts.shape == found.candidates.shape == (5, 4)
    assert (found.candidates == 4).all()
    batch = subject.encode_items(items[:5])
    with subject.intervene(drop, batch) as run:
        logits(subject, batch)
        left = [kept(run, batch, row) for row in range(5)]
    for number, own in enumerate(left):
        assert len(own) == 7
        rows = [(token - 1) // 4 for token in own if token > 0]
        assert found.counts[number].tolist() == [rows.count(row) for row in range(4)]
        assert found.position[number] == pytest.approx(np.mean([(row + 0.5) / 4 for row in rows]))
        assert found.uniform[number] == pytest.approx(0.5)
    for own, (layout, chosen) in zip(left, kept_tokens(subject, items[:5], drop, batch_rows=3), strict=True):
        assert len(layout) == chosen.size == N_IMAGE and np.flatnonzero(chosen).tolist() == sorted(own)
    assert found.clusters == tuple(item["scene_id"] for item in items[:5]) and found.items[4] == "item-4"


def test_a_policy_that_takes_the_bottom_is_found_out(subject):
    found = kept_rows(subject, make_items(80), DropTokens(1, 4 / N_IMAGE, Bottom()))
    assert (found.counts == [0, 0, 0, 4]).all() and (found.expected == 1.0).all()
    assert found.bias() == pytest.approx([0.375] * 80)
    fit = found.fit()
    # all four in one row of four: w = sqrt(3)
    assert fit.w == pytest.approx(np.sqrt(3)) and fit.p_value < 0.001 and fit.n_clusters == 40 and fit.n_counted == 320
    assert found.histogram().to_dict("list") == {"row": [0, 1, 2, 3], "kept": [0.0, 0.0, 0.0, 1.0], "uniform": [0.25] * 4}
    # none of 40 scenes deviates: the share of those that may, times how far they could, 0 being the top
    could = 1 - 0.025 ** (1 / 40)
    assert found.interval().estimate == pytest.approx(0.375) and found.interval().lower == pytest.approx(0.375 - 0.875 * could)


def test_uniform_keeping_has_no_bias(subject):
    found = kept_rows(subject, make_items(80), DropTokens(0, 0.5))
    own = found.interval(0.999)
    assert own.lower < 0.0 < own.upper and own.upper - own.lower < 0.1
    assert found.fit().p_value > 0.001 and found.fit().w < 0.2
    assert found.bias().std() > 0.01


def test_statistics_are_of_scenes(subject, items):
    found = kept_rows(subject, items, DropTokens(1, 0.4, FastV()))
    assert found.fit() == goodness_of_fit(found.counts, found.expected, found.clusters)
    assert found.interval() == interval(found.position - found.uniform, found.clusters, bounds=(-0.5, 0.5))
    np.testing.assert_allclose(found.expected.sum(1), found.counts.sum(1))


def test_rows_may_be_coarser_than_the_grid(subject, items):
    fine, coarse = (kept_rows(subject, items[:3], DropTokens(1, 0.4, FastV()), n_rows=n) for n in (None, 2))
    np.testing.assert_array_equal(coarse.counts, fine.counts.reshape(3, 2, 2).sum(2))
    np.testing.assert_array_equal(coarse.position, fine.position)


def test_tiles_lie_where_they_were_cut_from():
    """Half of all tokens evenly spaced, in tiles and their thumbnail: no row is favoured, and rows of tiles count on the whole image."""
    processor, model = PROCESSORS["idefics3"]()
    subject = Subject(model, processor, name="tiled")
    item = make_items(1, size=64)[0]
    layout = subject.layout(item["image"], item["prompt"])
    assert len(set(layout.grid.tolist())) > 1
    found = kept_rows(subject, [item], DropTokens(1, 1.0, "stride"), n_rows=4)
    heights = layout.boxes[layout.placed(), 1::2].mean(1)
    assert found.counts[0].tolist() == found.candidates[0].tolist() == np.histogram(heights, bins=4, range=(0, 1))[0].tolist()
    assert found.bias()[0] == 0.0


def test_what_has_no_answer_is_refused(subject, items):
    for drop, message in (
        (DropTokens(1, 0.0), "no choice among all image tokens"),
        (DropTokens(1, 0.5, tokens=(3, 4, 5)), "no choice among all image tokens"),
        (DropTokens(1, 1 / N_IMAGE, ClassToken()), "item 'item-0' keeps no token that has a place"),
    ):
        with pytest.raises(ValueError, match=message):
            kept_rows(subject, items[:2], drop)
    with pytest.raises(TypeError, match="must be a DropTokens"):
        kept_rows(subject, items[:2], FastV())
    with pytest.raises(ValueError, match="no items"):
        kept_rows(subject, [], DropTokens(1, 0.5))
    for name, message in (("blip-2", "none has a place"), ("mllama", "outside the token sequence")):
        processor, model = PROCESSORS[name]()
        with pytest.raises(ValueError, match=message):
            kept_rows(Subject(model, processor, name=name), make_items(2), DropTokens(1, 0.5))
