"""Observers reduce inside the layer, to the numbers that the plain model's own tensors give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vlm_core import (
    At,
    AttentionEntropy,
    AttentionMass,
    DropTokens,
    FullAttention,
    HeadId,
    HeadOutputs,
    HiddenStates,
    ImageAttention,
    MaskIoU,
    SinkMass,
    Sinks,
    Subject,
    TopTokens,
    ZeroHeads,
    attention_map,
    head_means,
    image_kv_means,
    observe,
)
from vlm_core.observation import observing
from vlm_core.observation.observing import observe_encoded
from vlm_core.subjects.embed import capture
from vlm_core.tests.family_models import TINY
from vlm_core.tests.tiny import make_items, tiny_llava, tiny_subject


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
    np.testing.assert_allclose(means.values.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert means.count == 4


def test_image_attention_of_text_queries_is_a_mean(subject, plain):
    item = make_items(1)[0]
    maps, image = eager_attentions(plain, item)
    seen = observe(subject, [item], ImageAttention("text"))[0]
    np.testing.assert_allclose(seen, maps[:, :, ~image].mean(2)[..., image].numpy(), rtol=1e-4, atol=1e-6)


def everything(n, image):
    """Which tokens belong to which group, by the prompt's own layout."""
    steps, first, last = torch.arange(n), int(image.nonzero().min()), int(image.nonzero().max())
    return {
        "image": image, "text": ~image, "question": steps > last, "preamble": steps < first, "last": steps == n - 1,
        "bos": steps == 0, "all": steps >= 0,
    }


def test_mass_between_any_two_groups(subject, plain):
    names = tuple(everything(20, torch.arange(20) == 3))
    items = make_items(4)
    for queries in ("question", "preamble"):
        seen = observe(subject, items, AttentionMass(queries, names))
        for row, item in enumerate(items):
            maps, image = eager_attentions(plain, item)
            groups = everything(maps.shape[-1], image)
            mean = maps[:, :, groups[queries]].mean(2)
            expected = torch.stack([mean[..., groups[name]].sum(-1) for name in names], -1)
            torch.testing.assert_close(torch.from_numpy(seen[row]), expected, rtol=1e-4, atol=1e-5)
    parts = AttentionMass("question", ("preamble", "image", "question"))
    np.testing.assert_allclose(observe(subject, items, parts).sum(-1), 1.0, rtol=1e-5)


def entropy(probabilities):
    return -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1)


@pytest.mark.parametrize("queries", ["last", "all", "text"])
def test_entropy_over_all_keys_and_over_renormalised_image_keys(subject, plain, queries):
    items = make_items(3)
    seen = observe(subject, items, AttentionEntropy(queries))
    for row, item in enumerate(items):
        maps, image = eager_attentions(plain, item)
        chosen = everything(maps.shape[-1], image)[queries]
        whole = entropy(maps)[:, :, chosen].mean(-1)
        sees_image = chosen & (maps[0, 0][:, image].sum(-1) > 0)
        assert queries == "last" or sees_image.sum() < chosen.sum()
        within = maps[:, :, sees_image][..., image]
        expected = torch.stack([whole, entropy(within / within.sum(-1, keepdim=True)).mean(-1)], -1)
        torch.testing.assert_close(torch.from_numpy(seen[row]), expected, rtol=1e-4, atol=1e-5)


def test_entropy_of_queries_that_see_no_image_is_not_a_number(subject):
    seen = observe(subject, make_items(2), AttentionEntropy("preamble"))
    assert np.isnan(seen[..., 1]).all() and np.isfinite(seen[..., 0]).all()


def object_mask(item, encoded):
    """Every third image token belongs to the object, but the second item has none."""
    where = np.zeros(len(encoded), dtype=bool)
    where[np.flatnonzero(encoded.image.numpy())[::3]] = item["id"] != "item-1"
    return {"object": where}


def test_overlap_with_a_mask_at_several_thresholds(subject, plain):
    items = make_items(3)
    observer = MaskIoU(queries="text", thresholds=("mean", "half", 0.5, 0.9))
    seen = observe(subject, items, observer, groups=object_mask)
    assert seen.shape == (3, 3, 4, 4)
    assert np.isnan(seen[1]).all()
    for row in (0, 2):
        maps, image = eager_attentions(plain, items[row])
        attention = maps[:, :, ~image].mean(2)[..., image].numpy()
        mask = np.arange(17) % 3 == 0
        levels = [attention.mean(-1), attention.max(-1) / 2, *(np.quantile(attention, q, axis=-1) for q in (0.5, 0.9))]
        for column, level in enumerate(levels):
            high = attention > level[..., None]
            expected = (high & mask).sum(-1) / (high | mask).sum(-1)
            np.testing.assert_allclose(seen[row, :, :, column], expected, atol=1e-6)
    assert len(np.unique(seen[[0, 2]])) > 5


def test_masks_must_fit_and_be_named(subject):
    with pytest.raises(ValueError, match="no token group 'object'"):
        observe(subject, make_items(1), MaskIoU())
    with pytest.raises(ValueError, match="token group 'object' of item 'item-0' is torch.bool of shape .3,., .* give one boolean per token"):
        observe(subject, make_items(1), MaskIoU(), groups=lambda item, prompt: {"object": np.ones(3, dtype=bool)})
    with pytest.raises(ValueError, match="a threshold is"):
        MaskIoU(thresholds=("median",))


def test_top_tokens_are_the_largest_weights_in_order(subject, plain):
    items = make_items(3)
    seen = observe(subject, items, TopTokens(4, "text"))
    assert seen["index"].dtype == np.int32
    among = observe(subject, items, TopTokens(20, among="image"))
    for row, item in enumerate(items):
        maps, image = eager_attentions(plain, item)
        mean = maps[:, :, ~image].mean(2).numpy()
        np.testing.assert_array_equal(seen["index"][row], np.argsort(-mean, axis=-1)[..., :4])
        np.testing.assert_allclose(seen["weight"][row], -np.sort(-mean, axis=-1)[..., :4], rtol=1e-4)
        # An image has 17 tokens: the last three of twenty places stay empty.
        assert image[among["index"][row, ..., :17]].all()
        assert (among["index"][row, ..., 17:] == -1).all() and np.isnan(among["weight"][row, ..., 17:]).all()


def test_top_tokens_keep_their_numbers_when_others_are_dropped(subject):
    (item,) = make_items(1)
    image = np.flatnonzero(subject.encode_items([item]).image[0].numpy())
    seen = observe(subject, [item], TopTokens(17, among="image"), DropTokens(1, 0.25, "stride"))["index"][0]
    kept = [set(layer[layer >= 0].tolist()) for layer in seen]
    assert kept[0] == set(image.tolist())
    assert kept[1] == kept[2] and len(kept[1]) == 4 and kept[1] < kept[0] and max(kept[1]) > image[4]


def test_the_full_map_is_the_models_own(subject, plain):
    items = make_items(3)
    seen = observe(subject, items, FullAttention())
    for row, item in enumerate(items):
        maps, _ = eager_attentions(plain, item)
        n = maps.shape[-1]
        np.testing.assert_allclose(seen[row, :, :, :n, :n], maps.numpy(), rtol=1e-4, atol=1e-6)
        assert np.isnan(seen[row, :, :, n:]).all() and np.isnan(seen[row, :, :, :, n:]).all()


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject"])
def test_some_layers_and_heads(request, fixture):
    subject, items = request.getfixturevalue(fixture), make_items(3)
    for observer in (AttentionMass("text"), HeadOutputs("norm"), ImageAttention(), AttentionEntropy()):
        whole, some = observe(subject, items, [observer, At(observer, layers=(0, 2), heads=(3, 1))])
        np.testing.assert_allclose(some, whole[:, [0, 2]][:, :, [3, 1]], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="there is no head 4: this model has 4 heads"):
        observe(subject, items, At(AttentionMass(), heads=(4,)))
    with pytest.raises(ValueError, match="HiddenStates is none"):
        At(HiddenStates())


def test_hidden_states_at_numbered_positions(subject):
    items = make_items(3)
    every, some, question = observe(
        subject, items, [HiddenStates(positions="all"), HiddenStates(positions=(0, 4, -2)), HiddenStates(positions="question")]
    )
    for row, item in enumerate(items):
        batch = subject.encode_items([item])
        n, last = batch.image.shape[1], int(batch.image[0].nonzero().max())
        np.testing.assert_array_equal(some[row], every[row, :, [0, 4, n - 2]].swapaxes(0, 1))
        np.testing.assert_allclose(question[row], every[row, :, last + 1 : n].mean(1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="names position 99, prompt 0 of the batch has 30 tokens"):
        observe(subject, items, HiddenStates(positions=(99,)))


def test_long_prompts_run_fewer_at_a_time(subject, monkeypatch):
    items, observers = make_items(7), [AttentionMass("text"), HiddenStates(positions="all")]
    together = observe(subject, items, observers)
    passes, forward = [], observing.forward_rows
    monkeypatch.setattr(
        observing, "forward_rows", lambda s, sequences, *a, **k: passes.append(sequences) or forward(s, sequences, *a, **k)
    )
    monkeypatch.setattr(observing, "TOKENS_PER_PASS", 70)
    for seen, expected in zip(observe(subject, items, observers), together, strict=True):
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)
    assert sum(map(len, passes)) == 7
    assert all(len(some) * max(map(len, some)) <= 70 for some in passes)


def test_nothing_to_observe_is_said(subject):
    with pytest.raises(ValueError, match="pass at least one item"):
        observe(subject, [], AttentionMass())
    with pytest.raises(ValueError, match="names layer 9: this model has 3 layers"):
        observe(subject, make_items(1), HiddenStates(layers=(9,)))


def test_image_keys_outside_the_sequence():
    """Mllama: cross-attention layers see the image only, the others do not see it."""
    subject, inputs = Subject(TINY["mllama"].model(), name="mllama"), TINY["mllama"].prompts()
    with torch.inference_mode():
        encoded = [replace(one, groups={"object": one.image}) for one in capture(subject, inputs)]
    asked = [ImageAttention(), AttentionEntropy(), TopTokens(3), MaskIoU(), SinkMass(sinks=Sinks((0,), 0.0)), FullAttention()]
    crossed = list(subject.anatomy.cross_layers)
    n_keys = encoded[0].cross.states.shape[0]
    image, entropies, top, overlap, sinks, maps = (
        next(iter(values.values())).numpy() for values in observe_encoded(subject, [{"id": "0"}], encoded, asked).values
    )
    np.testing.assert_allclose(np.nansum(image, axis=-1)[0, crossed], 1.0, rtol=1e-5)
    np.testing.assert_allclose(image[0, crossed], maps[0, crossed, :, -1, :n_keys], rtol=1e-5)
    np.testing.assert_allclose(entropies[0, crossed, :, 0], entropies[0, crossed, :, 1], rtol=1e-5)
    np.testing.assert_array_equal(top[0, crossed, :, 0], maps[0, crossed, :, -1, :n_keys].argmax(-1))
    assert np.isnan(overlap[0, crossed]).all()
    assert (sinks[0, crossed] == 0).all() and (sinks[0, 0, :, 0] > 0.99).all()


def peak_bytes(call) -> int:
    """Most memory that torch held at once during ``call``, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [one for one in trace.profiler.kineto_results.events() if one.name() == "[memory]"]
    return int(np.cumsum([one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]).max())


@pytest.mark.parametrize("observer", [AttentionMass("text"), AttentionMass("all"), AttentionEntropy("all")])
def test_observing_takes_a_twentieth_of_the_memory_of_the_maps(observer):
    size = {"layers": 12, "heads": 8, "kv_heads": 8, "hidden": 64, "image_size": 80}
    subject, eager = tiny_subject(**size), Subject(*tiny_llava(attention="eager", **size))
    batch = subject.encode_items(make_items(1, size=80))

    def run(model, observers=(), **asked):
        with torch.inference_mode(), subject.intervene(None, batch, observers=observers):
            model(**batch.inputs, use_cache=False, **asked)

    run(subject.model), run(eager.model)
    plain, maps = peak_bytes(lambda: run(subject.model)), peak_bytes(lambda: run(eager.model, output_attentions=True))
    assert maps - plain > 12 * 8 * batch.image.shape[1] ** 2 * 4 * 0.9
    assert peak_bytes(lambda: run(subject.model, [observer])) - plain < 0.05 * (maps - plain)


def test_a_stream_that_nobody_asked_for_is_refused_in_one_sentence(subject):
    class Careless:
        reads_hidden = False

        def attention(self, view):
            return view.hidden[:, -1]

    class Careful(Careless):
        reads_hidden = True

    batch = subject.encode_items(make_items(1))

    def run(*observers):
        with torch.inference_mode(), subject.intervene(None, batch, observers=observers) as active:
            subject.model(**batch.inputs)
        return active

    for observers in ([Careless()], [Careless(), AttentionMass()], [At(Careless(), layers=(1,))], [At(Careless(), heads=(1,))]):
        with pytest.raises(ValueError, match="view.hidden was not kept: an observer that reads it must not say reads_hidden = False"):
            run(*observers)
    assert torch.equal(run(Careful()).record(0, 1), run(Careless(), HiddenStates()).record(0, 1))
    assert run(At(Careful(), heads=(1,))).record(0, 1).shape == (1, 32)
