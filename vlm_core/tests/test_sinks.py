"""Sinks are found where they are planted, on this model's own dimensions, and their attention adds up."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from vlm_core import FullAttention, HiddenStates, SinkMass, Sinks, find_sinks, observe
from vlm_core.tests.tiny import make_items, tiny_subject


@pytest.fixture(scope="module")
def planted():
    """A model in which the word "image" stands out in dimension 5."""
    subject = tiny_subject(layers=3, hidden=512, intermediate=64)
    word = subject.tokenizer.convert_tokens_to_ids("image")
    with torch.no_grad():
        subject.anatomy.embedding.weight[word, 5] += 1000.0
        for layer in subject.anatomy.layers:
            # What the layers write must not drown it.
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    return subject


def test_the_planted_dimension_is_found(planted):
    sinks = find_sinks(planted, make_items(4))
    assert sinks.dimensions == (5,)
    assert 10.0 < sinks.threshold < 512**0.5


def test_sinks_are_keys_beyond_the_threshold(planted):
    items = make_items(6)
    sinks = find_sinks(planted, items)
    (mass,), maps, hidden = observe(planted, items, [SinkMass("text")]), *observe(
        planted, items, [FullAttention(), HiddenStates(positions="all")]
    )
    word = planted.tokenizer.convert_tokens_to_ids("image")
    for row, item in enumerate(items):
        batch = planted.encode_items([item])
        ids, image, n = batch.inputs["input_ids"][0], batch.image[0].numpy(), batch.image.shape[1]
        normed = hidden[row, :3, :n] / np.sqrt((hidden[row, :3, :n] ** 2).mean(-1, keepdims=True))
        sink = np.abs(normed[..., 5]) > sinks.threshold
        assert sink[0].tolist() == (ids == word).tolist()
        mean = maps[row, :, :, :n, :n][:, :, ~image].mean(2)
        expected = np.stack(
            [(mean * sink[:, None]).sum(-1), (mean * (sink & image)[:, None]).sum(-1), mean[..., 0]], axis=-1
        )
        np.testing.assert_allclose(mass[row], expected, rtol=1e-4, atol=1e-6)
    assert (mass[..., 0] > 0).any()
    # Standing out in other dimensions makes no sink.
    assert (observe(planted, items, SinkMass("text", Sinks((6, 7), sinks.threshold)))[..., 0] == 0).all()


def test_image_sinks_are_counted_apart(planted):
    items = make_items(3)
    # Every token is a sink where the threshold is nothing.
    seen = observe(planted, items, SinkMass(sinks=Sinks((0, 1), 0.0)))
    np.testing.assert_allclose(seen[..., 0], 1.0, rtol=1e-5)
    maps = observe(planted, items, FullAttention())
    for row, item in enumerate(items):
        image = planted.encode_items([item]).image[0].numpy()
        mean = maps[row, :, :, len(image) - 1, : len(image)]
        np.testing.assert_allclose(seen[row, ..., 1], mean[..., image].sum(-1), rtol=1e-4)


def test_a_model_without_outliers_has_no_sinks(subject):
    items = make_items(4)
    assert find_sinks(subject, items) == Sinks((), float("inf"))
    seen = observe(subject, items, SinkMass())
    assert (seen[..., :2] == 0).all() and (seen[..., 2] > 0).all()


def test_an_observer_with_sinks_survives_a_file(planted):
    observer = SinkMass("text").prepare(planted, make_items(3))
    assert SinkMass(**json.loads(json.dumps(asdict(observer)))) == observer


def test_bad_sinks_are_refused(planted):
    with pytest.raises(ValueError, match="there is no dimension 512: this model's residual stream has 512"):
        observe(planted, make_items(1), SinkMass(sinks=Sinks((512,), 3.0)))
    with pytest.raises(ValueError, match="ratio must exceed 1"):
        find_sinks(planted, make_items(1), ratio=1.0)
    with pytest.raises(ValueError, match="at least one item"):
        find_sinks(planted, [])
