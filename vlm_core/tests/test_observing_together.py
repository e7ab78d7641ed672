"""Observers do not notice each other: what all see in one call is what each sees alone, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_core import (
    At,
    AttentionEntropy,
    AttentionMass,
    DirectLogits,
    FullAttention,
    HeadGradients,
    HeadOutputs,
    HiddenStates,
    ImageAttention,
    ImageGradients,
    IntegratedGradients,
    KeyValues,
    KnockOut,
    LogitLens,
    MaskIoU,
    RelativeDistance,
    RotaryBias,
    SinkMass,
    Sinks,
    TopTokens,
    ZeroHeads,
    observe,
)
from vlm_core.observation.image_attention import TopShare
from vlm_core.observation.likeness import TokenLikeness
from vlm_core.observation.recording_config import KINDS
from vlm_core.tests.tiny import make_items

EVERY = [
    AttentionMass(),
    AttentionMass("text", ("image", "object", "bos")),
    AttentionEntropy("all", ("all", "object")),
    SinkMass("text", Sinks((1, 5), 1.5)),
    MaskIoU(queries="text"),
    MaskIoU(),
    ImageAttention(),
    ImageAttention("question"),
    TopTokens(3),
    TopTokens(30, "text", "image"),
    TopShare(),
    TopShare("text", 0.5),
    TokenLikeness(),
    TokenLikeness(("image", "object")),
    FullAttention(),
    RelativeDistance(),
    RotaryBias(),
    HeadOutputs("last"),
    HeadOutputs("mean"),
    HeadOutputs("norm"),
    DirectLogits("candidates"),
    HiddenStates(),
    HiddenStates((0, 3), "image tokens"),
    LogitLens(top=3, words="candidates"),
    LogitLens((1,), "image", top=0, full=True),
    KeyValues(),
    KeyValues("object"),
    HeadGradients(),
    ImageGradients(),
    IntegratedGradients(steps=2),
    At(AttentionMass(), layers=(1,), heads=(3, 0)),
    At(FullAttention(), heads=(2,)),
    At(HeadOutputs("mean"), layers=(0, 2)),
]


def halves(item, encoded):
    return {"object": encoded.image.numpy() & (np.arange(len(encoded)) % 2 == 0)}


def arrays(seen):
    return seen if isinstance(seen, dict) else {"": seen}


def test_every_kind_is_here():
    assert {type(one) for one in EVERY} == {*KINDS.values(), At}


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject"])
@pytest.mark.parametrize("intervention", [None, (ZeroHeads([(1, 2)]), KnockOut("question", "object", (1, 2)))])
def test_all_together_see_what_each_sees_alone(request, fixture, intervention):
    subject, items = request.getfixturevalue(fixture), make_items(5)

    def seen(observers):
        return observe(subject, items, observers, intervention, batch_rows=3, groups=halves)

    alone = [arrays(seen(one)) for one in EVERY]
    together = [arrays(one) for one in seen(EVERY)]
    backwards = [arrays(one) for one in seen(EVERY[::-1])][::-1]
    for observer, expected, *others in zip(EVERY, alone, together, backwards, strict=True):
        assert any(np.isfinite(array).any() and np.ptp(array[np.isfinite(array)]) > 0 for array in expected.values()), observer
        for other in others:
            assert other.keys() == expected.keys(), observer
            for key, array in expected.items():
                assert other[key].dtype == array.dtype, observer
                np.testing.assert_allclose(other[key], array, rtol=1e-5, atol=1e-6, err_msg=f"{observer} {key}")
