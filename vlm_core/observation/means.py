"""Means over a whole set of items, streaming: what ablations put in place of what they take away.

``image_kv_means(...)``      mean image key and value of every head; ``image_kv_means_of(...)`` from parts
``head_means(...)``          mean output of every head
``key_value_moments(...)``   mean and spread of the keys and values of any token group
``KeyValues``                the observer behind them
``Moments``                  count, mean and sum of squared deviations, joined exactly part by part

Sums are never subtracted: parts are joined by Chan, Golub and LeVeque's update (1983) in float64, so that a mean over
millions of tokens far from zero, and its spread, keep their digits and do not depend on how the set was cut.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions import HeadMeans, ImageKVMeans
from vlm_core.observation.declaring import require_groups, require_images, require_names
from vlm_core.observation.observing import observed
from vlm_core.observation.outputs import HeadOutputs
from vlm_core.seam.views import AttentionView, Tokens
from vlm_core.subjects.subject import Subject

__all__ = ["KeyValues", "Moments", "head_means", "image_kv_means", "image_kv_means_of", "key_value_moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count ``[...]``, mean and sum of squared deviations ``[..., size]`` of vectors, float64."""

    count: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor, means: torch.Tensor, m2s: torch.Tensor) -> Moments:
        """Join parts along the first axis: ``[part, ...]`` and ``[part, ..., size]``."""
        weight = counts.double()[..., None]
        count = weight.sum(0)
        mean = (weight * means.double()).sum(0) / count.clamp(min=1.0)
        m2 = (m2s.double() + weight * (means.double() - mean) ** 2).sum(0)
        return cls(count[..., 0], mean, m2)

    def joined(self, other: Moments) -> Moments:
        """Of both sets together."""
        pairs = zip((self.count, self.mean, self.m2), (other.count, other.mean, other.m2), strict=True)
        return Moments.of(*(torch.stack(pair) for pair in pairs))

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation ``[..., size]`` (of the population, as ``numpy.std``)."""
        return (self.m2 / self.count.clamp(min=1.0)[..., None]).sqrt()


@dataclass(frozen=True)
class KeyValues:
    """Mean and squared deviations of keys and values over a token group, as the seam sees them (after rotary embedding).

    Observed as a dict: ``count`` ``[item, layer, 2, kv head]`` and ``mean``, ``m2`` ``[item, layer, 2, kv head, head_dim]``,
    keys first, then values, float64. A recording keeps the joined moments of whole shards, not of every item.
    """

    reads_hidden = False

    tokens: str = "image"

    def __post_init__(self) -> None:
        require_names(self, "tokens")

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a token group that the batch does not have, or a prompt without the image tokens that are asked for."""
        if tokens is not None:
            require_groups(self, tokens, self.tokens)
            if self.tokens == "image":
                require_images(self, tokens)

    def attention(self, view: AttentionView) -> dict[str, torch.Tensor]:
        """``count``, ``mean`` and ``m2`` of one layer."""
        members = view.keys_of(self.tokens)[:, None, :, None]
        count = members.sum(2).double()
        means, m2s = [], []
        for tensor in (view.key.detach(), view.value.detach()):
            values = tensor.double()
            mean = (values * members).sum(2) / count.clamp(min=1.0)
            means.append(mean)
            m2s.append(((values - mean[:, :, None]) ** 2 * members).sum(2))
        return {
            "count": count[:, None].expand(-1, 2, view.key.shape[1], -1)[..., 0],
            "mean": torch.stack(means, dim=1),
            "m2": torch.stack(m2s, dim=1),
        }

    @staticmethod
    def joined(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same of all items together: without the item axis."""
        return vars(Moments.of(values["count"], values["mean"], values["m2"]))


def key_value_moments(
    subject: Subject, items: Sequence, tokens: str = "image", batch_rows: int | None = None, groups=None
) -> Moments:
    """Moments of the keys and values of a token group over a whole set.

    Returns
    -------
    Moments
        ``mean``, ``std`` ``[layer, 2, kv head, head_dim]``: keys, then values.
    """
    total: Moments | None = None
    for some in observed(subject, items, [KeyValues(tokens)], None, batch_rows, groups):
        part = Moments(**KeyValues.joined(some.values[0]))
        total = part if total is None else total.joined(part)
    if total is None:
        raise ValueError("means need at least one item")
    return total


def image_kv_means(subject: Subject, items: Sequence, batch_rows: int | None = None) -> ImageKVMeans:
    """Mean image key and value of every query head over image positions and items (streaming, float64).

    See ``ImageKVMeans`` for what a mean of rotated keys is.
    """
    return image_kv_means_of(subject, [key_value_moments(subject, items, "image", batch_rows)])


def image_kv_means_of(subject: Subject, parts: Sequence[Moments]) -> ImageKVMeans:
    """The same of items whose moments (`key_value_moments` of image tokens) were measured part by part.

    Raises
    ------
    ValueError
        Without parts.
    """
    if not parts:
        raise ValueError("means need the moments of at least one part of the items")
    moments = functools.reduce(Moments.joined, parts)
    means = moments.mean.float().repeat_interleave(subject.anatomy.n_heads // moments.mean.shape[2], dim=2)
    return ImageKVMeans(means[:, 0].contiguous(), means[:, 1].contiguous(), int(moments.count.max()))


def head_means(subject: Subject, items: Sequence, batch_rows: int | None = None) -> HeadMeans:
    """Mean output of every head over all prompt tokens of each item, then over items (streaming, float64)."""
    total, count = torch.zeros(()), 0
    for some in observed(subject, items, [HeadOutputs("mean")], None, batch_rows):
        total = total + some.values[0][""].double().sum(0)
        count += len(some.items)
    if not count:
        raise ValueError("means need at least one item")
    return HeadMeans((total / count).float(), count)
