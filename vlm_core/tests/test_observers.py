"""Observers reduce inside the layer, to the numbers that the plain model's own tensors give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import (
    AttentionMass,
    HeadId,
    HeadOutputs,
    HiddenStates,
    ImageAttention,
    Subject,
    ZeroHeads,
    attention_map,
    head_means,
    image_kv_means,
    observe,
)
from vlm_core.tests.tiny import make_items, tiny_llava


@pytest.fixture(scope="module")
def plain():
    """The weights of ``subject`` on eager attention, without the seam."""
    subject = Subject(*tiny_llava(attention="eager"))
    subject.seam.remove()
    return subject


def eager_attentions(plain, item):
    batch = plain.encode_items([item])
    with torch.inference_mode():
        layers = plain.model(**batch.inputs, output_attentions=True).attentions
    return torch.stack(layers)[:, 0], batch.image[0]


@pytest.mark.parametrize("queries", ["last", "text", "image", "all"])
def test_attention_mass_equals_sums_over_the_full_map(subject, plain, queries):
    items = make_items(4)
    seen = observe(subject, items, AttentionMass(queries))
    assert seen.shape == (4, 3, 4, 4)
    for row, item in enumerate(items):
        maps, image = eager_attentions(plain, item)
        n = maps.shape[-1]
        chosen = {
            "last": torch.arange(n) == n - 1, "text": ~image, "image": image, "all": torch.ones(n, dtype=torch.bool)
        }[queries]
        mean = maps[:, :, chosen].mean(2)
        expected = torch.stack([mean[..., image].sum(-1), mean[..., ~image].sum(-1), mean[..., -1], mean[..., 0]], -1)
        torch.testing.assert_close(torch.from_numpy(seen[row]), expected, rtol=1e-4, atol=1e-5)


def test_attention_map_is_per_head(subject, plain):
    item = make_items(1)[0]
    maps, image = eager_attentions(plain, item)
    seen = attention_map(subject, item)
    assert seen.shape == (3, 4, 17)
    np.testing.assert_allclose(seen, maps[:, :, -1][..., image].numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(attention_map(subject, item, HeadId(2, 1)), seen[2, 1])


@pytest.mark.parametrize("reduce", ["last", "mean", "norm"])
def test_head_outputs_are_what_enters_the_output_projection(subject, reduce):
    items = make_items(4)
    seen = observe(subject, items, HeadOutputs(reduce))
    for row, item in enumerate(items):
        kept = []
        handles = [
            subject.anatomy.output_projection(layer).register_forward_pre_hook(lambda m, args: kept.append(args[0][0]))
            for layer in range(3)
        ]
        with torch.inference_mode():
            subject.model(**subject.encode_items([item]).inputs)
        for handle in handles:
            handle.remove()
        heads = torch.stack(kept).unflatten(-1, (4, 8))
        expected = {"last": heads[:, -1], "mean": heads.mean(1), "norm": heads.norm(dim=-1).mean(1)}[reduce]
        torch.testing.assert_close(torch.from_numpy(seen[row]), expected, rtol=1e-4, atol=1e-5)


def test_unknown_reductions_are_refused(subject):
    with pytest.raises(ValueError, match="reduce must be"):
        observe(subject, make_items(1), HeadOutputs("max"))


def test_hidden_states_by_position(subject):
    items = make_items(4)
    last, image, tokens, every, some = observe(
        subject,
        items,
        [
            HiddenStates(),
            HiddenStates(positions="image"),
            HiddenStates(positions="image tokens"),
            HiddenStates(positions="all"),
            HiddenStates(layers=(1, 3)),
        ],
    )
    np.testing.assert_allclose(image, tokens.mean(2), rtol=1e-4, atol=1e-5)
    assert tokens.shape == (4, 4, 17, 32)
    for row, item in enumerate(items):
        n = subject.encode_items([item]).image.shape[1]
        assert np.isnan(every[row, :, n:]).all()
        np.testing.assert_array_equal(every[row, :, n - 1], last[row])
    np.testing.assert_array_equal(some, last[:, [1, 3]])


def test_observing_under_an_intervention(subject):
    items = make_items(2)
    outputs = observe(subject, items, HeadOutputs(), ZeroHeads([(1, 2)]))
    assert (outputs[:, 1, 2] == 0).all()
    assert (outputs[:, 1, 1] != 0).any()


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject"])
def test_image_kv_means_are_the_means_of_what_the_seam_sees(request, monkeypatch, fixture):
    import transformers.models.llama.modeling_llama as modelling

    subject, items = request.getfixturevalue(fixture), make_items(5)
    rotate, keys, values = modelling.apply_rotary_pos_emb, [], []

    def keep(query, key, *args, **kwargs):
        query, key = rotate(query, key, *args, **kwargs)
        keys.append(key)
        return query, key

    monkeypatch.setattr(modelling, "apply_rotary_pos_emb", keep)
    handles = [
        attention.v_proj.register_forward_hook(lambda m, a, output: values.append(output))
        for attention in subject.anatomy.attentions
    ]
    for item in items:
        batch = subject.encode_items([item])
        with torch.inference_mode():
            subject.model(**batch.inputs)
    for handle in handles:
        handle.remove()
    monkeypatch.undo()
    image = batch.image[0]
    groups = subject.anatomy.kv_groups
    means = image_kv_means(subject, items, batch_rows=2)
    assert means.count == 5 * 17
    for layer in range(3):
        key = torch.cat([k[0][:, batch_image(subject, item)] for k, item in zip(keys[layer::3], items, strict=True)], 1)
        torch.testing.assert_close(
            means.keys[layer], key.mean(1).repeat_interleave(groups, 0), rtol=1e-4, atol=1e-5
        )
        value = torch.cat([v[0][batch_image(subject, i)] for v, i in zip(values[layer::3], items, strict=True)])
        value = value.unflatten(-1, (-1, 8)).mean(0).repeat_interleave(groups, 0)
        torch.testing.assert_close(means.values[layer], value, rtol=1e-4, atol=1e-5)
    assert image.sum() == 17


def batch_image(subject, item):
    return subject.encode_items([item]).image[0]


def test_head_means(subject):
    items = make_items(4)
    expected = observe(subject, items, HeadOutputs("mean")).mean(0)
    means = head_means(subject, items)
    np.testing.assert_array_equal(means.values.numpy(), expected)
    assert means.count == 4


def test_image_attention_of_text_queries_is_a_mean(subject, plain):
    item = make_items(1)[0]
    maps, image = eager_attentions(plain, item)
    seen = observe(subject, [item], ImageAttention("text"))[0]
    np.testing.assert_allclose(seen, maps[:, :, ~image].mean(2)[..., image].numpy(), rtol=1e-4, atol=1e-6)
