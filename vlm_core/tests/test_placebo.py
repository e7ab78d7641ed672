"""The placebo of an ablation moves the same heads as far, and leaves what they say: it costs less where heads carry the image, as much where not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import ReplaceImageKV, capture_activations, image_kv_means, placebo_losses
from vlm_core.heads.placebo import disturb_as_much
from vlm_core.tests.planted import planted_subject, with_answers_the_image_raises
from vlm_core.tests.tiny import make_items

PLANTED = [(0, 1), (2, 3)]


@pytest.fixture(scope="module")
def planted():
    subject, items = planted_subject(PLANTED), make_items(24)
    items[1] = {**items[1], "prompt": items[1]["prompt"] + " ?"}  # longer than the others: padded beside them
    means = image_kv_means(subject, items)
    return subject, with_answers_the_image_raises(subject, items, PLANTED, means), ReplaceImageKV(PLANTED, means, queries="text")


def test_heads_are_moved_as_far_as_the_removal_moves_them_and_no_others(planted):
    subject, items, removal = planted
    for number, found in enumerate(disturb_as_much(subject, items[:3], PLANTED, removal)):
        assert tuple(map(tuple, found.heads)) == tuple(PLANTED) and found.queries == "question"
        own, removed, moved = (capture_activations(subject, items[number], "head", intervention=one) for one in (None, removal, found))
        for layer, head in PLANTED:
            far, wanted = ((one.at("head", layer) - own.at("head", layer))[:, head] for one in (moved, removed))
            torch.testing.assert_close(far.norm(dim=-1), wanted.norm(dim=-1), atol=1e-5, rtol=1e-4)
            after_image = int(own.image.nonzero().max()) + 1
            assert (far[after_image:].norm(dim=-1) > 1e-4).all() and (far[:after_image].abs() < 1e-6).all()
            straight = torch.nn.functional.normalize(far[after_image:], dim=-1)
            torch.testing.assert_close(straight, straight[:1].expand_as(straight), atol=1e-3, rtol=0)  # one direction for all tokens
            assert abs(torch.nn.functional.cosine_similarity(far[-1], wanted[-1], dim=0)) < 0.99
        kept = (moved.at("head", 0) - own.at("head", 0))[:, [0, 2, 3]]
        assert kept.abs().max() < 1e-6


def test_directions_follow_the_seed(planted):
    subject, items, removal = planted
    one, same, other = (disturb_as_much(subject, items[:2], PLANTED, removal, seed) for seed in (3, 3, 4))
    assert one == same and one != other
    first, second = ((found.source.at("head", 0) - capture_activations(subject, item, "head").at("head", 0))[-1, 1]
                     for found, item in zip(one, items, strict=False))  # fmt: skip
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) < 0.99  # every item its own


def test_heads_that_carry_the_image_bear_a_disturbance_better_than_its_removal(planted):
    subject, items, removal = planted
    lost = placebo_losses(subject, items, PLANTED, removal)
    assert list(lost.columns) == ["cluster", "removed", "disturbed"] and len(lost) == len(items)
    assert lost["removed"].mean() > 0 and lost["removed"].mean() > 3 * abs(lost["disturbed"].mean())


def test_where_every_disturbance_costs_the_same_so_does_the_placebo(planted):
    """A subject with margins that fall by as much whatever is done to its heads, played by the sweep."""
    subject, items, removal = planted

    def fragile(items, interventions, metrics, assignments):
        from vlm_core import sweep

        table = sweep(subject, items, interventions, metrics=metrics, assignments=assignments)
        return table.assign(value=np.where(table["intervention"] == "full", 5.0, 1.0))

    lost = placebo_losses(subject, items, PLANTED, removal, measure=fragile)
    assert (lost["removed"] == 4.0).all() and (lost["disturbed"] == 4.0).all()


def test_no_heads_are_refused(planted):
    subject, items, removal = planted
    with pytest.raises(ValueError, match="a placebo needs heads to disturb"):
        disturb_as_much(subject, items, [], removal)
