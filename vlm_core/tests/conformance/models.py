"""The tiny models of every family, with and without the seam, and how their numbers are compared."""

from __future__ import annotations

from functools import cache

import torch

from vlm_core import Batch, Subject
from vlm_core.interventions import ImageKVMeans
from vlm_core.tests.family_models import IMAGE_TOKEN, TINY


@cache
def subject_of(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Subject:
    return Subject(TINY[name].model(attention, dtype), name=name)


@cache
def plain_model(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The same weights without any seam."""
    return TINY[name].model(attention, dtype)


def batch_of(name: str, dtype: torch.dtype = torch.float32, **layout) -> Batch:
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in TINY[name].prompts(**layout).items()
    }
    return Batch(inputs, inputs["input_ids"] == IMAGE_TOKEN, inputs["attention_mask"].bool())


def lengthened(name: str, batch: Batch, tokens: torch.Tensor) -> Batch:
    """A batch with causal text tokens appended to each prompt."""
    n, inputs = tokens.shape[1], dict(batch.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    for key, value in {"attention_mask": 1, "mm_token_type_ids": 0, **dict(subject_of(name).anatomy.family.token_types)}.items():
        if key in inputs:
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, n), value=value)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, n, -1, -1)], dim=1)
    return Batch(
        inputs, torch.nn.functional.pad(batch.image, (0, n)), torch.nn.functional.pad(batch.valid, (0, n), value=True)
    )


def logits_of(model, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch.inputs, use_cache=False).logits


def logits_under(subject: Subject, intervention, batch: Batch, observers=()) -> torch.Tensor:
    with subject.intervene(intervention, batch, observers=observers):
        return logits_of(subject.model, batch)


def inner(output):
    """What the language model returned, where a family wraps it."""
    return getattr(output, "language_model_outputs", None) or output


TOLERANCE = 2e-5
"""Largest difference between two ways to compute the same numbers in float32, as a share of the largest of them.

About three times what is seen: at most 3.4e-6 between a fast path and the whole model, 6.9e-6 between a knock-out under sdpa
and a mask under eager attention, on the 23 models and all the versions of ``SUPPORT.md``. float32 resolves 1.2e-7 of each
number that enters a sum.
"""


def close(seen: torch.Tensor, expected: torch.Tensor, message: str = "") -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(seen, expected, rtol=0.0, atol=TOLERANCE * largest, msg=lambda text: f"{message}: {text}")


def some_means(anatomy, seed: int = 0) -> ImageKVMeans:
    shape = (anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
    generator = torch.Generator().manual_seed(seed)
    return ImageKVMeans(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def image_heads(anatomy) -> list[tuple[int, int]]:
    """A head of each of the last two layers that hold image keys."""
    return [(layer, head) for head, layer in enumerate(anatomy.image_layers[-2:], start=1)]


class Grab:
    """Keeps what the seam sees, and leaves no record."""

    def __init__(self) -> None:
        self.views = {}

    def attention(self, view):
        self.views[view.layer] = view
