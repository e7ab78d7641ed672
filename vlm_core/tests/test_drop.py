"""Dropping tokens is physical, exact, and goes on under generation."""

from __future__ import annotations

import pytest
import torch

from vlm_core import DropTokens, ImageAttention, ReplaceImageKV, ZeroHeads, observe
from vlm_core.seam.dropping import kept_pattern
from vlm_core.tests.test_seam import causal, logits, masked_layers_oracle
from vlm_core.tests.tiny import make_items

N_IMAGE = 17


def kept_tokens(batch, drop, numbers):
    """Kept image tokens ``[prompt, token]`` of a random or stride drop."""
    kept = ~batch.image
    for row in range(len(batch)):
        pattern = kept_pattern(drop.policy, drop.seed, numbers[row], N_IMAGE, drop.count(N_IMAGE))
        kept[row, batch.image[row]] = torch.from_numpy(pattern) if drop.keep > 0 else False
    return kept


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject", "eager_subject"])
@pytest.mark.parametrize(
    "drop",
    [DropTokens(0, 0.5), DropTokens(1, 0.3, "stride"), DropTokens(2, 0.0), DropTokens(1, 0.7, seed=3)],
    ids=lambda drop: drop.describe(),
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_dropping_equals_masking_the_dropped_keys(request, fixture, drop, side):
    subject = request.getfixturevalue(fixture)
    items = make_items(6)
    batch = subject.encode([i["image"] for i in items], [i["prompt"] for i in items], padding_side=side)
    numbers = list(range(6))
    kept = kept_tokens(batch, drop, numbers)
    oracle = request.getfixturevalue("gqa_subject" if fixture == "gqa_subject" else "subject")
    expected = masked_layers_oracle(
        oracle, batch, lambda layer: causal(batch) & kept[:, None, None, :] if layer >= drop.layer else causal(batch)
    )
    with subject.intervene(drop, batch, items=numbers) as run:
        shorter = logits(subject, batch)
    text = run.tokens.valid & ~run.tokens.image
    assert shorter.shape[1] == int((kept & batch.valid).sum(1).max())
    torch.testing.assert_close(shorter[text], expected, rtol=1e-4, atol=1e-4)


def test_attention_policy_keeps_the_most_attended_tokens(subject):
    items = make_items(4)
    batch = subject.encode_items(items)
    mass = torch.from_numpy(observe(subject, items, ImageAttention("last"))[:, 0]).mean(1)
    best = mass.argsort(dim=1, descending=True)[:, :5].sort(dim=1).values
    drop = DropTokens(1, 5 / N_IMAGE, "attention")
    with subject.intervene(drop, batch) as run:
        logits(subject, batch)
    for row in range(len(items)):
        first = int(batch.image[row].int().argmax())
        kept = run.tokens.index[row][run.tokens.image[row] & run.tokens.valid[row]] - first
        assert kept.tolist() == best[row].tolist()


def test_random_subsets_are_nested_reproducible_and_differ_between_items():
    small, large = (kept_pattern("random", 0, 5, 64, k) for k in (8, 32))
    assert small.sum() == 8
    assert (large | small == large).all()
    assert (small == kept_pattern("random", 0, 5, 64, 8)).all()
    assert (small != kept_pattern("random", 0, 6, 64, 8)).any()
    assert (small != kept_pattern("random", 1, 5, 64, 8)).any()


def test_stride_spreads_evenly():
    assert kept_pattern("stride", 0, 0, 8, 4).nonzero()[0].tolist() == [1, 3, 5, 7]
    assert kept_pattern("stride", 0, 0, 9, 3).nonzero()[0].tolist() == [1, 4, 7]


def test_successive_drops_count_from_the_original_tokens(subject):
    batch = subject.encode_items(make_items(2))
    with subject.intervene((DropTokens(1, 0.5), DropTokens(2, 0.25)), batch) as run:
        logits(subject, batch)
    assert run.tokens.image.sum(1).tolist() == [round(0.25 * N_IMAGE)] * 2


def test_later_caches_are_shorter(subject):
    batch = subject.encode_items(make_items(2)[:1])
    n = batch.image.shape[1]
    with subject.intervene(DropTokens(1, 0.0), batch), torch.inference_mode():
        cache = subject.model(**batch.inputs, use_cache=True).past_key_values
    assert [cache.get_seq_length(layer) for layer in range(3)] == [n, n - N_IMAGE, n - N_IMAGE]


def step_by_step(subject, items, plan, steps):
    """Greedy decoding with no cache: the whole sequence again for every token."""
    outputs = []
    for number, item in enumerate(items):
        batch = subject.encode_items([item])
        ids, image = batch.inputs["input_ids"], batch.image
        for _ in range(steps):
            inputs = {**batch.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            whole = type(batch)(inputs, image, torch.ones_like(ids, dtype=torch.bool), sizes=batch.sizes)
            answer = torch.arange(ids.shape[1])[None] >= batch.image.shape[1]
            with subject.intervene(plan, whole, items=[number], groups={"answer": answer}), torch.inference_mode():
                scores = subject.model(**inputs, use_cache=False).logits[:, -1:].clone()
                scores[..., subject.anatomy.image_token_id] = -torch.inf
            token = scores.argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            image = torch.nn.functional.pad(image, (0, 1))
        outputs.append(ids[0, -steps:].tolist())
    return outputs


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject", "eager_subject"])
@pytest.mark.parametrize("kind", ["drop", "drop at 0", "drop all", "stride", "zero", "image kv", "all together"])
def test_generating_equals_running_the_whole_sequence_again(request, fixture, kind, means):
    subject = request.getfixturevalue(fixture)
    plan = {
        "drop": DropTokens(1, 0.3),
        "drop at 0": DropTokens(0, 0.5),
        "drop all": DropTokens(2, 0.0),
        "stride": DropTokens(1, 0.5, "stride"),
        "zero": ZeroHeads([(0, 1), (2, 0)]),
        "image kv": ReplaceImageKV([(0, 1), (1, 2)], means),
        "all together": (DropTokens(1, 0.5), ReplaceImageKV([(0, 0), (2, 1)], means), ZeroHeads([(1, 1)])),
    }[kind]
    items = make_items(4)
    steps = 5
    batch = subject.encode_items(items)
    assert not bool(batch.valid.all()), "left padding is part of the test"
    with subject.intervene(plan, batch, items=range(4)), torch.inference_mode():
        tokens = subject.model.generate(
            **batch.inputs,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=[subject.anatomy.image_token_id],
        )
    assert tokens[:, -steps:].tolist() == step_by_step(subject, items, plan, steps)


def test_rows_that_lose_different_numbers_of_tokens_generate_as_if_alone(subject):
    item = make_items(2)[1]
    plans = [DropTokens(1, 0.2), None, DropTokens(2, 0.6), DropTokens(1, 0.0)]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    batch, one = subject.encode_items([item] * 4), subject.encode_items([item])
    assert bool(batch.valid.all())
    with torch.inference_mode():
        with subject.intervene(plans, batch, items=[7] * 4):
            together = subject.model.generate(**batch.inputs, **options)
        for row, plan in enumerate(plans):
            with subject.intervene(plan, one, items=[7]):
                assert subject.model.generate(**one.inputs, **options)[0].tolist() == together[row].tolist()


def test_kept_tokens_keep_their_positions(subject):
    batch = subject.encode_items(make_items(2)[1:])
    received = []
    handle = subject.anatomy.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: received.append((kwargs["position_ids"], kwargs["position_embeddings"][0])),
        with_kwargs=True,
    )
    try:
        with subject.intervene(DropTokens(1, 0.5), batch) as run:
            logits(subject, batch)
        logits(subject, batch)
    finally:
        handle.remove()
    (positions, cosines), (_, every) = received
    assert torch.equal(positions, run.tokens.index)
    assert torch.equal(cosines[0], every[0][run.tokens.index[0]])


@pytest.mark.parametrize("plan", [None, DropTokens(1, 0.4), DropTokens(2, 0.4, "attention"), ZeroHeads([(1, 1)])])
def test_left_and_right_padding_give_the_same_numbers(subject, plan):
    items = make_items(6)
    last = {}
    for side in ("left", "right"):
        batch = subject.encode([i["image"] for i in items], [i["prompt"] for i in items], padding_side=side)
        with subject.intervene(plan, batch, items=range(6)) as run:
            seen = logits(subject, batch)
        last[side] = seen[torch.arange(6), run.tokens.last]
    torch.testing.assert_close(last["left"], last["right"], rtol=1e-4, atol=1e-4)


def test_impossible_drops_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        DropTokens(1, 1.5)
    with pytest.raises(ValueError, match="policy must be one of"):
        DropTokens(1, 0.5, "loudest")
    with pytest.raises(ValueError, match="needs a layer before"):
        DropTokens(0, 0.5, "attention")
