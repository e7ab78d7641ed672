"""Half precision, against float32 with the same weights.

The measure is the model's own rounding: how far the plain model in half precision is from the plain model in float32, as a share of
the length of all logits. An intervention may be ``ROUNDINGS`` times as far from its float32 oracle, no more. What it does must be larger
than that and the rounding together: then leaving it out would be seen (the triangle inequality).
"""

from __future__ import annotations

from functools import cache

import torch

from vlm_core import AttentionMass, Batch, Subject
from vlm_core.interventions import DropTokens, GaussianNoise, KnockOut, Patch, ReplaceImageKV, Steer, ZeroHeads
from vlm_core.subjects.activations import capture_activations
from vlm_core.subjects.embed import capture
from vlm_core.tests.conformance.by_hand import masked_by_hooks, zeroed_by_hooks
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import batch_of, inner, logits_of, logits_under, plain_model, some_means, subject_of
from vlm_core.tests.family_models import AFTER, TINY

ROUNDINGS = 3.0
"""Times the plain model's own rounding: an intervention adds operations of its own, but no layers."""


@conforms("bfloat16")
def test_bfloat16(name):
    hold(name, torch.bfloat16)


@conforms("float16")
def test_float16(name):
    hold(name, torch.float16)


def hold(name: str, dtype: torch.dtype) -> None:
    exact(name, dtype)
    rounded(name, dtype)
    captured_mass(name, dtype)


def exact(name: str, dtype: torch.dtype) -> None:
    """What is exact in float32 is exact here."""
    batch, subject = batch_of(name, dtype), subject_of(name, dtype=dtype)
    plain = logits_of(plain_model(name, dtype=dtype), batch)
    assert torch.equal(logits_under(subject, None, batch), plain)
    heads = [(1, 0), (3, 2)]
    zeroed = logits_under(subject, ZeroHeads(heads), batch)
    assert torch.equal(zeroed, zeroed_by_hooks(subject, heads, batch))
    assert not torch.equal(zeroed, plain)


@cache
def in_float32(name: str, dtype: torch.dtype, attention: str | None = None) -> Subject:
    """The weights of the model in ``dtype``, computed with in float32."""
    return Subject(TINY[name].model(attention, dtype).float(), name=name)


def distance(seen: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference as a share of the expected."""
    return float((seen.float() - expected.float()).norm() / expected.float().norm())


def rounded(name: str, dtype: torch.dtype) -> None:
    """Interventions on half precision against the same in float32, by explicit masks where it is a knock-out."""
    half, whole = subject_of(name, dtype=dtype), in_float32(name, dtype)
    batch, batch32, anatomy = batch_of(name, dtype), rounded_inputs(name, dtype), half.anatomy
    plain = logits_of(whole.model, batch32)
    own = distance(logits_of(half.model, batch), plain)
    allowed = ROUNDINGS * own
    every_image_layer = [(layer, head) for layer in anatomy.image_layers for head in range(anatomy.n_heads)]
    knock = KnockOut("text", "image", anatomy.image_layers)
    direction = 4.0 * torch.randn(anatomy.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = {
        knock: masked_by_hooks(in_float32(name, dtype, "eager").model, anatomy, anatomy.image_layers, ~batch.image[0], batch32),
        **{
            plan: logits_under(whole, plan, batch32)
            for plan in (
                ReplaceImageKV(every_image_layer, some_means(anatomy)),
                Steer(1, direction),
                *([DropTokens(1, 0.0)] if "drop" in anatomy.capabilities else ()),
            )
        },
    }
    for plan, oracle in expected.items():
        seen, end = logits_under(half, plan, batch), slice(-len(AFTER), None)
        assert distance(plain[:, end], oracle[:, end]) > allowed + own, f"{plan} does too little to be seen beside rounding"
        assert distance(seen, oracle) < allowed, f"{plan} in {dtype}"
    # A clean run's activations undo a corruption: the plain model is their float32 oracle.
    with torch.inference_mode():
        (sequence,) = capture(half, batch.inputs)
    clean = capture_activations(half, sequence, ("residual", "attention"))
    for corruption, patch in (
        (ZeroHeads([(0, head) for head in range(anatomy.n_heads)]), Patch("residual", (2,), clean)),
        (Patch("attention", (1,), GaussianNoise(3.0, seed=1)), Patch("attention", (1,), clean)),
    ):
        assert distance(logits_under(whole, corruption, batch32), plain) > allowed + own, f"{corruption} does too little"
        assert distance(logits_under(half, (corruption, patch), batch), plain) < allowed, f"{patch.site} patched in {dtype}"


def rounded_inputs(name: str, dtype: torch.dtype) -> Batch:
    """Pixels as the half-precision model gets them, in float32."""
    batch = batch_of(name, dtype)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in batch.inputs.items()}
    return Batch(inputs, batch.image, batch.valid)


def captured_mass(name: str, dtype: torch.dtype) -> None:
    """Mass on image and text in every layer, against ``output_attentions`` of the plain model in float32."""
    half, whole = subject_of(name, "eager", dtype), in_float32(name, dtype, "eager")
    batch, batch32 = batch_of(name, dtype), rounded_inputs(name, dtype)
    observer = AttentionMass("last", groups=("image", "text"))
    with torch.inference_mode():
        plain, expected = (
            mass_of(half, inner(subject.model(**inputs.inputs, use_cache=False, output_attentions=True)).attentions, batch)
            for subject, inputs in ((half, batch), (whole, batch32))
        )
        with half.intervene(None, batch, observers=[observer]) as run:
            half.model(**batch.inputs, use_cache=False)
    seen = torch.stack([run.record(0, layer)[0] for layer in range(half.anatomy.n_layers)])
    own = distance(plain, expected)
    allowed = ROUNDINGS * own
    assert distance(seen, expected) < allowed
    assert distance(expected.flip(-1), expected) > allowed + own, "the groups are too much alike to be told apart"


def mass_of(subject: Subject, attentions, batch: Batch) -> torch.Tensor:
    """``[layer, head, group]``: the last query's attention on image and text."""
    image, masses = batch.image[0], []
    for layer, probabilities in enumerate(attentions):
        last = probabilities[0, :, -1].float()
        on_image = last.sum(-1) if layer in subject.anatomy.cross_layers else last[:, image].sum(-1)
        on_text = torch.zeros_like(on_image) if layer in subject.anatomy.cross_layers else last[:, ~image].sum(-1)
        masses.append(torch.stack([on_image, on_text], dim=-1))
    return torch.stack(masses)
