"""Head features against the full attention map, positions against hand-made attention and an attention without rotary positions."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm_core import At, FullAttention, RelativeDistance, RotaryBias, Subject, head_features, observe
from vlm_core.heads.features import FEATURES, delimiters
from vlm_core.observation.observing import observe_encoded
from vlm_core.seam import run
from vlm_core.stats import interval, interval_each
from vlm_core.subjects.embed import capture, encode_items
from vlm_core.tests.family_models import TINY
from vlm_core.tests.tiny import make_items, tiny_subject


@pytest.fixture(scope="module")
def measured(subject):
    items = make_items(6)
    return items, head_features(subject, items)


def maps_of(subject, items):
    """Per item: the whole map ``[layer, head, query, key]``, its ids and which tokens are the image's."""
    whole, encoded = observe(subject, items, FullAttention()), encode_items(subject, items)
    return [(one[:, :, : len(e), : len(e)], e.ids.tolist(), e.image.numpy()) for one, e in zip(whole, encoded, strict=True)]


def test_every_feature_is_what_it_says(subject, measured):
    items, found = measured
    assert found.names == tuple(FEATURES) and found.per_item.shape == (6, 3, 4, len(FEATURES))
    special = {subject.tokenizer.convert_tokens_to_ids(word) for word in ("<s>", "?", ":")}
    for row, (whole, ids, image) in enumerate(maps_of(subject, items)):
        n = len(ids)
        question = np.arange(n) > np.flatnonzero(image).max()
        # the first token can look nowhere but at itself; queries of the question all come later
        mean, of_image = whole[:, :, question].mean(2), whole[:, :, image].mean(2)
        marks = np.array([token in special for token in ids]) & ~image
        apart = np.abs(np.arange(n)[:, None] - np.arange(n)[None])
        within = whole[:, :, question][..., image]
        within = within / within.sum(-1, keepdims=True)
        entropy = -(whole[:, :, question] * np.log(whole[:, :, question].clip(1e-30))).sum(-1).mean(2)
        expected = {
            "answer_to_image": whole[:, :, -1][..., image].sum(-1),
            "text_to_image": mean[..., image].sum(-1),
            "text_to_text": mean[..., ~image].sum(-1),
            "image_to_image": of_image[..., image].sum(-1),
            "image_to_text": of_image[..., ~image].sum(-1),
            "image_to_question": np.zeros((3, 4)),
            "text_to_bos": mean[..., 0],
            "text_to_special": mean[..., marks].sum(-1),
            "entropy": entropy,
            "image_entropy": -(within * np.log(within.clip(1e-30))).sum(-1).mean(2),
            "distance": np.stack([whole[:, :, q] @ apart[q] / q for q in np.flatnonzero(question)]).mean(0),
            "previous_token": np.stack([whole[:, :, q, q - 1] for q in np.flatnonzero(question)]).mean(0),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found.per_item[row][..., found.names.index(name)], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_special_tokens_and_delimiters_carry_no_content(subject):
    item = make_items(1)[0]
    (encoded,) = encode_items(subject, [item])
    members = delimiters(subject)(item, encoded)["special"]
    words = subject.tokenizer.convert_ids_to_tokens(encoded.ids.tolist())
    assert {word for word, one in zip(words, members, strict=True) if one} <= {"<s>", "<unk>", "?", ":"}
    assert {"?", ":"} <= {word for word, one in zip(words, members, strict=True) if one}
    assert not members[encoded.image.numpy()].any()


def unrotated(subject, item):
    """Attention probabilities ``[layer, head, query, key]`` from each layer's own input, without rotary positions."""
    (encoded,) = encode_items(subject, [item])
    hidden = {}
    anatomy = subject.anatomy
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, n=n: hidden.update({n: (args or (kwargs["hidden_states"],))[0]}), with_kwargs=True
        )
        for n, layer in enumerate(anatomy.layers)
    ]
    with torch.inference_mode():
        subject.model(**subject.encode_items([item]).inputs)
    for handle in handles:
        handle.remove()
    maps = []
    for n, layer in enumerate(anatomy.layers):
        with torch.inference_mode():
            x = layer.input_layernorm(hidden[n])[0]
            shape = (len(x), -1, anatomy.head_dim)
            q, k = (proj(x).view(shape).transpose(0, 1) for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj))
            k = k.repeat_interleave(anatomy.n_heads // anatomy.n_kv_heads, 0)
            scores = q @ k.transpose(1, 2) * anatomy.head_dim**-0.5
            maps.append(scores.masked_fill(~torch.ones(scores.shape[1:]).tril().bool(), -torch.inf).softmax(-1))
    return torch.stack(maps).numpy(), encoded.image.numpy()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rotary_bias_compares_with_attention_without_rotary_positions(kv_heads, attention):
    subject, items = tiny_subject(kv_heads=kv_heads, attention=attention), make_items(3)
    found = observe(subject, items, RotaryBias())
    for row, ((whole, _, image), item) in enumerate(zip(maps_of(subject, items), items, strict=True)):
        flat, _ = unrotated(subject, item)
        question = np.arange(len(image)) > np.flatnonzero(image).max()
        moved = np.abs(whole - flat)[:, :, question].sum(-1).mean(2) / 2
        np.testing.assert_allclose(found[row, ..., 0], moved, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found[row, ..., 1], flat[:, :, question][..., image].sum(-1).mean(2), rtol=1e-4, atol=1e-5)
    assert found[..., 0].max() > 0.01


def test_asking_for_unrotated_attention_leaves_the_model_as_it_was(subject):
    item = make_items(1)
    batch = subject.encode_items(item)
    with torch.inference_mode():
        before = subject.model(**batch.inputs).logits
    observe(subject, item, RotaryBias())
    with torch.inference_mode():
        assert torch.equal(subject.model(**batch.inputs).logits, before)
    with pytest.raises(ValueError, match="no token group 'nonsense'"):
        observe(subject, item, RotaryBias("nonsense"))
    # The next run that has no use for the hooks takes them off.
    observe(subject, item, RelativeDistance())
    assert not any(module._forward_pre_hooks for module in subject.anatomy.attentions)


def test_only_runs_that_read_it_ask(subject, monkeypatch):
    """Each layer once in a prompt, none while tokens are generated; beside such a run, one in another context asks nothing."""
    asked = []
    monkeypatch.setattr(run, "unrotated", lambda *call: asked.append(call))
    item = make_items(1)
    batch = subject.encode_items(item)
    with subject.intervene(None, batch, observers=[RotaryBias()]), torch.inference_mode():
        subject.model.generate(**batch.inputs, max_new_tokens=3, eos_token_id=None)
        assert [call[0] for call in asked] == list(subject.anatomy.attentions)
        with subject.intervene(None, batch, observers=[RelativeDistance()]):
            subject.model(**batch.inputs)
    assert len(asked) == subject.anatomy.n_layers


def test_rotary_bias_in_some_layers_and_heads(subject, gqa_subject):
    items = make_items(2)
    for one in (subject, gqa_subject):
        whole, some = observe(one, items, RotaryBias()), observe(one, items, At(RotaryBias(), layers=(2, 0), heads=(3, 1)))
        np.testing.assert_allclose(some, whole[:, [0, 2]][:, :, [3, 1]], rtol=1e-5, atol=1e-7)


def test_rotary_bias_finds_its_own_run_beside_another_models(subject):
    other, item, contexts = tiny_subject(seed=3), make_items(1), ExitStack()
    expected = observe(subject, item, RotaryBias())

    def begin(module, args):
        contexts.enter_context(other.intervene(None, other.encode_items(item), observers=[RelativeDistance()]))

    def end(module, args, output):
        contexts.close()

    first, *_, last = subject.anatomy.layers
    handles = [first.register_forward_pre_hook(begin), last.register_forward_hook(end)]
    try:
        found = observe(subject, item, RotaryBias())
    finally:
        for handle in handles:
            handle.remove()
    assert not np.isnan(expected).any()
    np.testing.assert_array_equal(found, expected)


def test_features_do_not_depend_on_what_stands_beside(subject, measured):
    items, found = measured
    alone = head_features(subject, items[4:5], batch_rows=1)
    np.testing.assert_allclose(alone.per_item[0], found.per_item[4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v", "paligemma", "gemma3", "mllama", "blip2_opt"])
def test_positions_in_families(name):
    subject = Subject(TINY[name].model(), name=name)
    with torch.inference_mode():
        encoded = capture(subject, TINY[name].prompts())[:1]
    bias, distance = (
        one[""].numpy()[0] for one in observe_encoded(subject, [{"id": "0"}], encoded, [RotaryBias(), RelativeDistance()]).values
    )
    outside = [layer in subject.anatomy.cross_layers for layer in range(subject.anatomy.n_layers)]
    assert (np.isnan(distance).all((1, 2)) == outside).all()
    learned = name == "blip2_opt"  # its positions are added to the embeddings: nothing is rotated
    assert (np.isnan(bias).all((1, 2)) == (np.array(outside) | learned)).all()
    rotated = bias[~np.isnan(bias).any((1, 2))]
    assert ((rotated >= -1e-6) & (rotated <= 1 + 1e-6)).all()
    assert learned or rotated[..., 0].max() > 1e-5


def test_three_axes_of_positions_are_one_place():
    """Qwen2-VL: the first layer of the model when every token has the same position on every axis."""
    subject = Subject(TINY["qwen2_vl"].model(), name="qwen2_vl")
    with torch.inference_mode():
        (encoded,) = capture(subject, TINY["qwen2_vl"].prompts())[:1]
    item, flat = [{"id": "0"}], replace(encoded, positions=torch.zeros_like(encoded.positions))
    (bias,) = observe_encoded(subject, item, [encoded], [RotaryBias()]).values
    maps = [observe_encoded(subject, item, [one], [FullAttention()]).values[0][""][0, 0] for one in (encoded, flat)]
    image = encoded.image.numpy()
    question = torch.from_numpy(np.arange(len(image)) > np.flatnonzero(image).max())
    torch.testing.assert_close(bias[""][0, 0, :, 0], (maps[0] - maps[1]).abs()[:, question].sum(-1).mean(1) / 2, rtol=1e-3, atol=1e-6)


def test_relative_distance_of_the_first_token_is_undefined(subject):
    item = make_items(1)
    found = observe_encoded(subject, item, encode_items(subject, item), [RelativeDistance("bos")]).values[0][""]
    assert torch.isnan(found).all()


# -- the table --------------------------------------------------------------------------------------------------------


def test_one_row_a_head_with_intervals_and_what_is_handed_in(measured):
    _, found = measured
    scores = np.arange(12.0).reshape(3, 4)
    per_item = np.random.default_rng(0).normal(size=(8, 3, 4))
    table = found.table({"impact": scores, "attribution": (per_item, [0, 0, 1, 1, 2, 2, 3, 3])})
    assert list(zip(table["layer"], table["head"], strict=True)) == list(np.ndindex(3, 4))
    assert table["impact"].tolist() == scores.ravel().tolist()
    mean, lower, upper = interval_each(per_item, [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_allclose(table["attribution"], mean.ravel())
    np.testing.assert_allclose(table[["attribution_lower", "attribution_upper"]], np.stack([lower.ravel(), upper.ravel()], 1))
    one = found.per_item[:, 1, 2, 0]
    expected = interval(one.astype(float), np.array(found.clusters), bounds=None)
    row = table[(table["layer"] == 1) & (table["head"] == 2)].iloc[0]
    np.testing.assert_allclose(
        [row["answer_to_image"], row["answer_to_image_lower"], row["answer_to_image_upper"]],
        [expected.estimate, expected.lower, expected.upper],
        rtol=1e-6,
    )
    assert table["image_to_question"].eq(0).all() and table["image_to_question_lower"].isna().all()
    with pytest.raises(ValueError, match="'impact' has shape"):
        found.table({"impact": scores[:2]})
    with pytest.raises(ValueError, match="no items of task 'count'"):
        found.of("count")
    assert found.of("color").items == ("item-0", "item-2", "item-4")


def test_the_matrix_is_standardised_and_leaves_out_what_says_nothing(measured):
    _, found = measured
    matrix = found.matrix()
    assert matrix.shape[0] == 12 and matrix.shape[1] < len(FEATURES)  # image_to_question is 0 everywhere
    np.testing.assert_allclose(matrix.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(matrix.std(0), 1, atol=1e-9)


@pytest.mark.parametrize("clusters", [12, 60])
def test_intervals_of_many_columns_are_those_of_one(clusters):
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(clusters), 2)
    values = rng.normal(size=(codes.size, 5)) + rng.normal(size=(clusters, 5))[codes]
    values[:, 3] = 0.25
    mean, lower, upper = interval_each(values, codes)
    for column in range(5):
        one = interval(values[:, column], codes, bounds=None)
        assert mean[column] == pytest.approx(one.estimate)
        width = one.upper - one.lower
        np.testing.assert_allclose(
            [lower[column], upper[column]], [one.lower, one.upper], atol=0.06 * width if width == width else 0, equal_nan=True
        )
    assert np.isnan([lower[3], upper[3]]).all()


def test_a_missing_item_is_missing_in_its_column_alone():
    rng = np.random.default_rng(2)
    values, codes = rng.normal(size=(40, 2)), np.arange(40)
    holes = values.copy()
    holes[:7, 0] = np.nan
    mean, lower, upper = interval_each(holes, codes)
    whole = interval_each(values, codes)
    assert mean[1] == whole[0][1] and lower[1] == whole[1][1] and upper[1] == whole[2][1]
    assert mean[0] == pytest.approx(values[7:, 0].mean())
    left = interval_each(values[7:, :1], codes[7:])
    np.testing.assert_allclose([lower[0], upper[0]], [left[1][0], left[2][0]], atol=0.08 * (left[2][0] - left[1][0]))
    with pytest.raises(ValueError, match="exactly one"):
        interval_each(values, codes[1:])


def test_features_of_48_heads_take_no_time():
    rng = np.random.default_rng(0)
    started = time.process_time()
    interval_each(rng.normal(size=(60, 48, 16)), np.arange(60))
    assert time.process_time() - started < 2.0
