"""An image that several prompts ask about passes the vision tower once."""

from __future__ import annotations

import pytest
import torch

from vlm_core import Subject, ZeroHeads, sweep
from vlm_core.subjects.embed import capture, encode_items
from vlm_core.sweeps.features import encode_distinct, image_features, takes_features, with_features
from vlm_core.tests.family_models import BUILDERS
from vlm_core.tests.tiny import make_items


@pytest.fixture
def shared_items():
    items = make_items(5)
    # Items 0, 2 and 4 ask about one image (as equal copies), 1 and 3 about their own.
    return [{**item, "image": items[0]["image"].copy()} if number % 2 == 0 else item for number, item in enumerate(items)]


def count_images(subject):
    seen = []
    handle = subject.model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[0]))
    return seen, handle


def test_encodings_are_those_of_each_item_alone(subject, shared_items):
    seen, handle = count_images(subject)
    try:
        encoded = encode_distinct(subject, shared_items)
    finally:
        handle.remove()
    assert sum(seen) == 3
    for one, item in zip(encoded, shared_items, strict=True):
        (alone,) = encode_items(subject, [item])
        assert torch.equal(one.ids, alone.ids)
        assert torch.equal(one.image, alone.image)
        torch.testing.assert_close(one.embeds, alone.embeds, rtol=1e-5, atol=1e-6)
    assert (encoded[0].embeds[encoded[0].image] - encoded[1].embeds[encoded[1].image]).abs().max() > 0.1


def test_a_sweep_encodes_every_image_once(subject, shared_items):
    seen, handle = count_images(subject)
    try:
        table = sweep(subject, shared_items, [None, ZeroHeads([(1, 1)])], metrics=("logprob",))
    finally:
        handle.remove()
    assert sum(seen) == 3
    singly = [sweep(subject, [item], [None, ZeroHeads([(1, 1)])], metrics=("logprob",)) for item in shared_items]
    expected = [value for one in singly for value in one["value"]]
    assert table["value"].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_takes_its_own_features(name):
    model, inputs = BUILDERS[name]()
    subject = Subject(model, name=name)
    if not takes_features(subject):
        assert name == "mllama" or name.startswith(("blip2", "instructblip"))
        return
    with torch.inference_mode():
        (expected,) = capture(subject, inputs)
        features = image_features(subject, inputs)
        assert "pixel_values" not in with_features(inputs, features)
        (encoded,) = capture(subject, with_features(inputs, features))
    assert torch.equal(encoded.embeds, expected.embeds)
    assert len(encoded.deepstack) == len(expected.deepstack)
    for one, other in zip(encoded.deepstack, expected.deepstack, strict=True):
        assert torch.equal(one, other)
    assert (encoded.positions is None) == (expected.positions is None)
    assert encoded.positions is None or torch.equal(encoded.positions, expected.positions)
