"""Gradients are what small changes do: finite differences of hooks and embeddings that know nothing of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm_core import HeadGradients, ImageGradients, IntegratedGradients, Subject, SubjectError, ZeroHeads, observe
from vlm_core.observation.observing import observe_encoded
from vlm_core.subjects.embed import capture, encode_items
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.tests.family_models import TINY
from vlm_core.tests.tiny import make_items, tiny_llava, tiny_subject

STEP = 1e-2


@pytest.fixture(scope="module")
def precise():
    """In float64, so that differences of small steps mean something."""
    model, processor = tiny_llava(kv_heads=2)
    return Subject(model.double(), processor, name="precise")


def target_of(subject, logits, item, target):
    answer = subject.continuation(item["answer"])[0]
    rivals = [subject.continuation(one)[0] for one in item["candidates"] if one != item["answer"]]
    return float(logits[answer] - (logits[rivals].max() if target == "margin" else 0))


def with_gate(subject, item, layer, head, gate, target, intervention=None):
    """The target where an output-projection hook scales one head at all positions."""
    size = subject.anatomy.head_dim

    def scale(module, args):
        hidden = args[0].clone()
        hidden[..., head * size : (head + 1) * size] *= gate
        return (hidden,)

    batch = subject.encode_items([item])
    handle = subject.anatomy.output_projection(layer).register_forward_pre_hook(scale)
    with torch.inference_mode(), subject.intervene(intervention, batch):
        logits = subject.model(**batch.inputs).logits[0, -1]
    handle.remove()
    return target_of(subject, logits, item, target)


@pytest.mark.parametrize("target", ["logit", "margin"])
@pytest.mark.parametrize("intervention", [None, ZeroHeads([(0, 1)])])
def test_head_gradients_are_slopes_of_gates(precise, target, intervention):
    items = make_items(3)
    seen = observe(precise, items, HeadGradients(target), intervention)
    assert seen.shape == (3, 3, 4)
    assert (seen[:, 0, 1] == 0).all() == (intervention is not None)
    for row, item in enumerate(items):
        for layer, head in ((0, 0), (0, 1), (1, 3), (2, 2)):
            up, down = (with_gate(precise, item, layer, head, 1 + s, target, intervention) for s in (STEP, -STEP))
            assert seen[row, layer, head] == pytest.approx((up - down) / (2 * STEP), rel=2e-3, abs=2e-4)


def test_head_gradients_do_not_depend_on_the_batch_or_on_the_caller(subject):
    items = make_items(5)
    together = observe(subject, items, HeadGradients())
    with torch.inference_mode():
        alone = [observe(subject, [item], HeadGradients())[0] for item in items]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def moved(subject, item, shift):
    """The target's value with ``shift`` added to the embeddings of the image tokens."""
    (encoded,) = encode_items(subject, [item])
    embeds = encoded.embeds.clone()
    embeds[encoded.image] += shift
    wanted = (np.array([0]), np.array([len(encoded) - 1]))
    hidden, _ = forward_rows(subject, [replace(encoded, embeds=embeds)], np.array([0]), [None], [0], wanted)
    return target_of(subject, read_logits(subject, hidden)[0], item, "logit")


def test_image_gradients_are_slopes_along_any_direction(precise):
    items = make_items(2)
    seen = observe(precise, items, ImageGradients())
    assert seen.shape == (2, 17, 32)
    generator = torch.Generator().manual_seed(0)
    for row, item in enumerate(items):
        for _ in range(3):
            direction = torch.randn(17, 32, generator=generator, dtype=torch.float64)
            slope = (moved(precise, item, STEP * direction) - moved(precise, item, -STEP * direction)) / (2 * STEP)
            assert float((torch.from_numpy(seen[row]) * direction).sum()) == pytest.approx(slope, rel=5e-3, abs=1e-3)


def test_integrated_gradients_are_complete(precise):
    items = make_items(3)
    few, many = (observe(precise, items, IntegratedGradients(steps=n)) for n in (1, 100))
    for row, item in enumerate(items):
        (encoded,) = encode_items(precise, [item])
        image = encoded.embeds[encoded.image].clone()
        change = moved(precise, item, 0.0) - moved(precise, item, image.mean(0) - image)
        assert many["change"][row] == pytest.approx(change, abs=1e-5)
        assert many["attribution"][row].sum() == pytest.approx(change, abs=5e-4)
    assert np.abs(many["change"]).max() > 0.05
    gap = np.abs(few["attribution"].sum(1) - few["change"])
    assert (gap > 10 * np.abs(many["attribution"].sum(1) - many["change"])).all()


def test_one_step_is_the_gradient_halfway(precise):
    (item,) = make_items(1)
    (encoded,) = encode_items(precise, [item])
    image = encoded.embeds[encoded.image].clone()
    halfway = encoded.embeds.clone()
    halfway[encoded.image] = image / 2
    gradient = observe_encoded(precise, [item], [replace(encoded, embeds=halfway)], [ImageGradients()]).values[0][""][0]
    seen = observe(precise, [item], IntegratedGradients(steps=1, baseline="zero"))["attribution"][0]
    np.testing.assert_allclose(seen, (gradient * image).sum(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "paligemma2", "mllama"])
def test_head_gradients_on_families(name):
    subject, inputs = Subject(TINY[name].model(), name=name), TINY[name].prompts()
    subject.continuation = {"seven": (7,)}.__getitem__
    item = {"id": "0", "answer": "seven"}
    with torch.inference_mode():
        encoded = capture(subject, inputs)
    gradient = observe_encoded(subject, [item], encoded, [HeadGradients()]).values[0][""][0]
    layer, head = 2, 1
    size, values = subject.anatomy.head_dim, []
    for gate in (1.1, 0.9):

        def scale(module, args, gate=gate):
            hidden = args[0].clone()
            hidden[..., head * size : (head + 1) * size] *= gate
            return (hidden,)

        handle = subject.anatomy.output_projection(layer).register_forward_pre_hook(scale)
        with torch.inference_mode():
            values.append(float(subject.model(**inputs, use_cache=False).logits[0, -1, 7]))
        handle.remove()
    assert float(gradient[layer, head]) == pytest.approx((values[0] - values[1]) / 0.2, rel=0.05, abs=2e-3)


def test_what_has_no_gradient_is_said(subject):
    with pytest.raises(ValueError, match="target must be one of logit, margin"):
        HeadGradients("loss")
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        IntegratedGradients(steps=0)
    with pytest.raises(ValueError, match="baseline must be mean or zero"):
        IntegratedGradients(baseline="grey")
    (item,) = make_items(1)
    with pytest.raises(ValueError, match="has no wrong candidate"):
        observe(subject, [{**item, "candidates": [item["answer"]]}], HeadGradients("margin"))
    with pytest.raises(ValueError, match="start with the same token"):
        observe(subject, [{**item, "answer": "dark red", "candidates": ["dark red", "dark blue"]}], ImageGradients("margin"))
    crossed = Subject(TINY["mllama"].model(), name="crossed")
    with torch.inference_mode():
        encoded = capture(crossed, TINY["mllama"].prompts())
    crossed.continuation = {"seven": (7,)}.__getitem__
    with pytest.raises(SubjectError, match="no image tokens in the sequence"):
        observe_encoded(crossed, [{"id": "0", "answer": "seven"}], encoded, [IntegratedGradients(steps=2)])


def test_many_steps_run_a_few_at_a_time(monkeypatch):
    from vlm_core.observation import gradients

    subject, items = tiny_subject(), make_items(1)
    whole = observe(subject, items, IntegratedGradients(steps=7))["attribution"]
    passes, score = [], gradients._score
    monkeypatch.setattr(gradients, "_score", lambda s, sequences, *a, **k: passes.append(len(sequences)) or score(s, sequences, *a, **k))
    monkeypatch.setattr(gradients, "_TOKENS_AT_ONCE", 70)
    np.testing.assert_allclose(observe(subject, items, IntegratedGradients(steps=7))["attribution"], whole, rtol=1e-3, atol=1e-5)
    assert passes == [2, 2, 2, 1, 1, 1]
