"""Every declared family measures the same way: conformance on tiny random-weight models built from configs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import (
    FAMILIES,
    AttentionMass,
    Batch,
    DropTokens,
    ImageAttention,
    ImageKVMeans,
    KnockOut,
    ReplaceImageKV,
    Subject,
    SubjectError,
    ZeroHeads,
    selfcheck,
)
from vlm_core.embed import capture
from vlm_core.rows import forward_rows, read_logits
from vlm_core.tests.family_models import BUILDERS, IMAGE_TOKEN, llava


@pytest.fixture(scope="module", params=BUILDERS)
def family(request):
    model, inputs = BUILDERS[request.param]()
    image = inputs["input_ids"] == IMAGE_TOKEN
    return Subject(model, name=request.param), Batch(inputs, image, torch.ones_like(image))


def test_every_declared_family_is_tested():
    assert set(FAMILIES) == {BUILDERS[name]()[0].config.model_type for name in BUILDERS}


def test_selfcheck(family):
    selfcheck(*family)


def interventions(subject):
    anatomy = subject.anatomy
    shape = (anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
    generator = torch.Generator().manual_seed(0)
    means = ImageKVMeans(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    return [
        None,
        ZeroHeads([(1, 0), (3, 2)]),
        ReplaceImageKV([(1, 1), (2, 3)], means),
        KnockOut("last", "image", (2, 3)),
        DropTokens(2, 0.5),
        DropTokens(2, 0.5, "attention"),
        DropTokens(3, 0.0),
    ]


def test_rows_equal_the_whole_model_under_the_same_intervention(family):
    subject, batch = family
    rows = interventions(subject)
    with torch.inference_mode():
        sequences = capture(subject, batch.inputs)
        n = len(sequences[0])
        hidden, _ = forward_rows(
            subject,
            sequences,
            np.zeros(len(rows), dtype=int),
            rows,
            [0],
            (np.arange(len(rows)), np.full(len(rows), n - 1)),
        )
        seen = read_logits(subject, hidden)
        plain = subject.model(**batch.inputs, use_cache=False).logits[0, -1]
        for row, intervention in enumerate(rows):
            with subject.intervene(intervention, batch):
                expected = subject.model(**batch.inputs, use_cache=False).logits[0, -1]
            torch.testing.assert_close(seen[row], expected, rtol=1e-3, atol=2e-3, msg=str(intervention))
            assert (intervention is None) == torch.equal(expected, plain)


def test_appended_tokens_equal_a_longer_prompt(family):
    subject, batch = family
    tokens, ids = (17, 18, 19), batch.inputs["input_ids"]
    longer = {**batch.inputs, "input_ids": torch.cat([ids, torch.tensor([tokens])], 1)}
    causal = {"attention_mask": 1, "mm_token_type_ids": 0, **dict(subject.anatomy.family.token_types)}
    for name, value in causal.items():
        if name in longer:
            longer[name] = torch.nn.functional.pad(longer[name], (0, 3), value=value)
    with torch.inference_mode():
        extended = capture(subject, batch.inputs)[0].extended(subject, tokens)
        n = len(extended)
        hidden, _ = forward_rows(
            subject, [extended], np.array([0]), [None], [0], (np.zeros(3, dtype=int), np.arange(n - 3, n))
        )
        expected = subject.model(**longer, use_cache=False).logits[0, -3:]
    torch.testing.assert_close(read_logits(subject, hidden), expected, rtol=1e-3, atol=2e-3)


def test_attention_is_read_with_the_models_own_softcap():
    model, inputs = BUILDERS["paligemma2"]()
    subject = Subject(model)
    image = inputs["input_ids"] == IMAGE_TOKEN
    batch = Batch(inputs, image, torch.ones_like(image))
    with torch.inference_mode(), subject.intervene(None, batch, observers=[ImageAttention()]) as run:
        attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
    for layer, expected in enumerate(attentions):
        torch.testing.assert_close(run.record(0, layer)[0], expected[0, :, -1][:, image[0]], rtol=1e-4, atol=1e-6)


def test_attention_mass_sums_to_one(family):
    subject, batch = family
    with subject.intervene(None, batch, observers=[AttentionMass(groups=("image", "text"))]) as run:
        with torch.inference_mode():
            subject.model(**batch.inputs, use_cache=False)
    for layer in range(subject.anatomy.n_layers):
        mass = run.record(0, layer)
        torch.testing.assert_close(mass.sum(-1), torch.ones(1, subject.anatomy.n_heads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
def test_image_tokens_see_each_other_both_ways_where_the_model_says_so(name):
    """Trap 7: only the model's own mask is right, in the row engine too."""
    model, inputs = BUILDERS[name]()
    subject = Subject(model, name=name)
    with torch.inference_mode():
        (sequence,) = capture(subject, inputs)
        first = int(sequence.image.int().argmax())
        changed = capture(subject, inputs)[0]
        changed.embeds[first + 1] += 1.0
        hidden, _ = forward_rows(
            subject, [sequence, changed], np.arange(2), [None, None], [0, 0], (np.arange(2), np.full(2, first))
        )
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "idefics3", "gemma3", "internvl"])
def test_generating_under_an_intervention(name):
    model, inputs = BUILDERS[name]()
    subject = Subject(model, name=name)
    image = inputs["input_ids"] == IMAGE_TOKEN
    batch = Batch(inputs, image, torch.ones_like(image))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        plain = model.generate(**inputs, **options)
        with subject.intervene(None, batch):
            assert torch.equal(model.generate(**inputs, **options), plain)
        with subject.intervene(ZeroHeads(subject.heads), batch):
            assert not torch.equal(model.generate(**inputs, **options), plain)


def test_a_sliding_cache_refuses_to_generate_after_a_drop():
    model, inputs = BUILDERS["gemma3"]()
    subject = Subject(model, name="gemma3")
    image = inputs["input_ids"] == IMAGE_TOKEN
    batch = Batch(inputs, image, torch.ones_like(image))
    with subject.intervene(DropTokens(0, 0.5), batch), pytest.raises(ValueError, match="slides"):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)


def test_deepstack_layers_refuse_drops():
    model, inputs = BUILDERS["qwen3_vl"]()
    subject = Subject(model)
    with torch.inference_mode(), pytest.raises(ValueError, match="drop tokens from layer 1 on"):
        forward_rows(subject, capture(subject, inputs), np.array([0]), [DropTokens(0, 0.5)], [0])


@pytest.mark.parametrize(
    ("name", "n_image", "expected"),
    [("llava", 16, (4, 4)), ("llava", 17, None), ("qwen2_vl", 12, (4, 3)), ("qwen2_vl", 11, None), ("idefics3", 4, None)],
)
def test_image_tokens_lie_on_a_grid(name, n_image, expected):
    model, inputs = BUILDERS[name]()
    assert Subject(model).anatomy.grid(n_image, inputs) == expected


def test_an_unknown_family_is_named():
    model, _ = llava()
    model.config.model_type = "newvlm"
    with pytest.raises(SubjectError, match=r"model_type 'newvlm', which is not declared in vlm_core/anatomy.py"):
        Subject(model, name="x")


def test_an_attention_that_cannot_be_delegated_to_is_refused():
    model, _ = llava()
    model.config.text_config._attn_implementation_internal = "flex_attention"
    with pytest.raises(SubjectError, match="uses attention 'flex_attention'"):
        Subject(model, name="x")


def test_a_language_model_without_attention_interface_is_refused(monkeypatch):
    model, _ = llava()
    monkeypatch.setattr(type(model.model.language_model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(SubjectError, match="no attention-interface support"):
        Subject(model, name="x")
