"""The seam on the whole model: nothing by itself, nothing left behind, nothing that looks ahead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from vlm_core import selfcheck
from vlm_core.interventions import ZeroHeads
from vlm_core.subjects.embed import capture
from vlm_core.subjects.rows import forward_rows
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import batch_of, close, inner, logits_of, logits_under, plain_model, subject_of
from vlm_core.tests.family_models import TINY


@conforms("no-op")
def test_noop(name):
    for attention in TINY[name].attentions:
        batch = batch_of(name)
        plain = logits_of(plain_model(name, attention), batch)
        subject = subject_of(name, attention)
        assert torch.equal(logits_under(subject, None, batch), plain)
        assert torch.equal(logits_of(subject.model, batch), plain)
    reasons = [without(name, attention) for attention in ("sdpa", "eager") if attention not in TINY[name].attentions]
    return f"{' and '.join(TINY[name].attentions)} only: {', '.join(reasons)}" if reasons else None


def without(name: str, attention: str) -> str:
    """Why an attention is left out: transformers refuses it, or computes something else with it than with the model's own."""
    try:
        other = TINY[name].model(attention)
    except ValueError as refused:
        assert "does not support an attention implementation" in str(refused)
        return f"transformers refuses {attention} for this language model"
    batch = batch_of(name)
    assert (logits_of(other, batch) - logits_of(plain_model(name), batch)).abs().max() > 1e-2
    return f"under {attention} transformers computes another model, whose attention scores are not capped"


@conforms("hidden states")
def test_hidden_states(name):
    subject, batch = subject_of(name), batch_of(name)
    layer = 2
    zero = ZeroHeads([(layer, head) for head in range(subject.anatomy.n_heads)])
    with torch.inference_mode():
        plain = inner(subject.model(**batch.inputs, use_cache=False, output_hidden_states=True))
        with subject.intervene(zero, batch):
            seen = inner(subject.model(**batch.inputs, use_cache=False, output_hidden_states=True))
    assert len(seen.hidden_states) == subject.anatomy.n_layers + 1
    for index in range(layer + 1):
        assert torch.equal(seen.hidden_states[index], plain.hidden_states[index])
    for index in range(layer + 1, subject.anatomy.n_layers + 1):
        assert not torch.equal(seen.hidden_states[index], plain.hidden_states[index])
    assert torch.equal(seen.logits, logits_under(subject, zero, batch))


@conforms("restored")
def test_restoration(name):
    subject, batch = subject_of(name), batch_of(name)
    plain = logits_of(subject.model, batch)
    zero = ZeroHeads(subject.heads)

    class Fail:
        def attention(self, view):
            if view.layer == 2:
                raise RuntimeError("observer failed")

    with pytest.raises(RuntimeError, match="observer failed"):
        logits_under(subject, zero, batch, [Fail()])
    assert torch.equal(logits_of(subject.model, batch), plain)
    with subject.intervene(zero, batch), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits_of, subject.model, batch).result(), plain)
        assert not torch.equal(logits_of(subject.model, batch), plain)
    assert torch.equal(logits_of(subject.model, batch), plain)


@conforms("causality")
def test_causality(name):
    """What comes later changes nothing before it, except inside a prompt that sees itself both ways."""
    subject = subject_of(name)
    family = subject.anatomy.family
    first, second = (batch_of(name, after=((12, 13, 14, last),)) for last in (15, 16))
    n = first.valid.shape[1] - 1
    if not family.causal_prompt:
        # The prompt's tokens see each other both ways; an answer is causal.
        before = logits_under(subject, None, first)[:, : -1], logits_under(subject, None, second)[:, : -1]
        assert (before[0] - before[1]).abs().max() > 1e-3
        n -= 1
        for batch in (first, second):
            for types, causal in family.token_types:
                batch.inputs[types][:, n:] = causal
    close(logits_under(subject, None, first)[:, :n], logits_under(subject, None, second)[:, :n], "later tokens leak")
    assert not torch.allclose(logits_of(subject.model, first)[:, -1], logits_of(subject.model, second)[:, -1])


@conforms(
    "two-way image",
    unavailable=lambda name: None if subject_of(name).anatomy.family.enter == "base" else "its image tokens are causal",
)
def test_image_tokens_see_each_other_both_ways(name):
    subject = subject_of(name)
    with torch.inference_mode():
        sequence, changed = (capture(subject, batch_of(name).inputs)[0] for _ in range(2))
        first = int(sequence.image.int().argmax())
        changed.embeds[first + 1] += 1.0
        hidden, _ = forward_rows(
            subject, [sequence, changed], np.arange(2), [None, None], [0, 0], (np.arange(2), np.full(2, first))
        )
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3


@conforms("self-check")
def test_selfcheck(name):
    selfcheck(subject_of(name), batch_of(name))
