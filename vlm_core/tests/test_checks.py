"""The self-check at load says loudly what is wrong."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionMaskInterface

import vlm_core.seam.attending
import vlm_core.subjects.checks
from vlm_core import AttentionMass, SubjectError, selfcheck
from vlm_core.seam.views import AttentionView
from vlm_core.tests.conformance.models import batch_of, logits_under, subject_of
from vlm_core.tests.tiny import tiny_subject


def halve_attention(monkeypatch, subject):
    original = AttentionView.probabilities
    monkeypatch.setattr(AttentionView, "probabilities", lambda view, queries: original(view, queries) / 2)


def replace_nothing(monkeypatch, subject):
    monkeypatch.setattr(
        vlm_core.seam.attending.AttentionEdits, "_replace", lambda edits, replaced, layer, axes, module, key, value: (module, key, value)
    )


def replace_more(monkeypatch, subject):
    original = vlm_core.seam.attending.AttentionEdits._replace

    def replace(edits, replaced, layer, axes, module, key, value):
        module, key, value = original(edits, replaced, layer, axes, module, key, value)
        value = value.clone()
        value[:, 0, -1] += 1.0
        return module, key, value

    monkeypatch.setattr(vlm_core.seam.attending.AttentionEdits, "_replace", replace)


def replace_another_head(monkeypatch, subject):
    original = vlm_core.seam.attending.AttentionEdits._replace

    def replace(edits, replaced, layer, axes, module, key, value):
        module, key, value = original(edits, replaced, layer, axes, module, key, value)
        key = key.clone()
        key[:, 1] = 0.0
        return module, key, value

    monkeypatch.setattr(vlm_core.seam.attending.AttentionEdits, "_replace", replace)


def leave_something_behind(monkeypatch, subject):
    def spoil(subject, batch, plain):
        with torch.no_grad():
            subject.anatomy.head.weight += 0.01

    monkeypatch.setattr(vlm_core.subjects.checks, "_check_readout", spoil)


def take_the_seam_off(monkeypatch, subject):
    subject.model.set_attn_implementation({"text_config": "sdpa"})


@pytest.mark.parametrize(
    ("name", "break_it", "detail"),
    [
        ("no-op", take_the_seam_off, "the seam is not on the language model any more"),
        ("attention", halve_attention, "sums to 1 only within 0.5"),
        ("image keys", replace_nothing, "not all image keys of head L2.H0 are replaced"),
        ("image keys", replace_more, "changes values elsewhere"),
        ("image keys", replace_another_head, "changes keys elsewhere"),
        ("restored", leave_something_behind, "computes other logits than before"),
    ],
)
def test_what_is_broken_is_named(monkeypatch, name, break_it, detail):
    subject = tiny_subject()
    selfcheck(subject)
    break_it(monkeypatch, subject)
    with pytest.raises(SubjectError, match=f"failed the self-check '{name}': .*{detail}"):
        selfcheck(subject)


def break_causality(monkeypatch, subject):
    for name in ("eager", "vlm_core_eager"):
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, lambda *args, **kwargs: None)
    # Knock-outs build their own causal mask, and so notice a missing one first.
    monkeypatch.setattr(vlm_core.subjects.checks, "_check_knock_out", lambda *args: None)


def break_one_mask(monkeypatch, subject):
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "vlm_core_eager", lambda *args, **kwargs: None)


def break_zero_head(monkeypatch, subject):
    object.__setattr__(subject.anatomy, "head_dim", 4)


def break_knock_out(monkeypatch, subject):
    cut = vlm_core.seam.attending.block
    monkeypatch.setattr(vlm_core.seam.attending, "block", lambda mask, edges: cut(mask, edges | (torch.rand(edges.shape) < 0.1)))


def break_readout(monkeypatch, subject):
    object.__setattr__(subject.anatomy, "head", torch.nn.Linear(32, subject.anatomy.vocab_size, dtype=subject.model.dtype))


@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        ("no-op", break_one_mask),
        ("zero head", break_zero_head),
        ("knock-out of nothing", break_knock_out),
        ("causality", break_causality),
        ("readout", break_readout),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_broken_is_named_in_every_type(monkeypatch, name, break_it, dtype):
    subject = tiny_subject(attention="eager")
    subject.model.to(dtype)
    selfcheck(subject)
    break_it(monkeypatch, subject)
    with pytest.raises(SubjectError, match=f"failed the self-check '{name}'"):
        selfcheck(subject)


def test_image_keys_outside_the_sequence_are_not_mistaken_for_it():
    """A prompt that has as many tokens as the image has keys."""
    subject = subject_of("mllama")
    views = vlm_core.subjects.checks._Views(1)
    batch = batch_of("mllama")
    logits_under(subject, None, batch, [views])
    missing = views.seen[1].key.shape[2] - batch.image.shape[1]
    batch = batch_of("mllama", after=((12,) * (5 + missing),))
    with subject.intervene(None, batch, observers=[AttentionMass(groups=("image", "text")), views]) as run:
        with torch.inference_mode():
            subject.model(**batch.inputs, use_cache=False)
    assert views.seen[1].key.shape[2] == batch.image.shape[1]
    torch.testing.assert_close(run.record(0, 1)[0], torch.tensor([[1.0, 0.0]] * 4))
    selfcheck(subject, batch)
