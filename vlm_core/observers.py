"""What can be read from a forward pass, reduced inside the layer.

``AttentionMass``      share of attention per head on token groups
``ImageAttention``     attention on every image token
``HeadOutputs``        per-head outputs before the output projection
``HiddenStates``       the residual stream
``observe(...)``       run observers over items, one array each
``attention_map``, ``image_kv_means``, ``head_means``   the common questions, asked
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm_core.embed import encode_items
from vlm_core.interventions import HeadMeans, ImageKVMeans, Intervention
from vlm_core.items import item_number, take
from vlm_core.rows import forward_rows
from vlm_core.subject import Subject
from vlm_core.views import AttentionView, LayerView, Tokens

__all__ = [
    "AttentionMass",
    "HeadOutputs",
    "HiddenStates",
    "ImageAttention",
    "attention_map",
    "head_means",
    "image_kv_means",
    "observe",
]


def _queries(tokens: Tokens, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions ``[element, n]`` of a group's members, and which of them are real."""
    if group == "last":
        return tokens.last[:, None], torch.ones_like(tokens.last[:, None], dtype=torch.bool)
    members = tokens.group(group)
    n = int(members.sum(1).max())
    order = (~members).int().argsort(dim=1, stable=True)[:, :n]
    return order, members.gather(1, order)


@dataclass(frozen=True)
class AttentionMass:
    """Share of attention that each head gives to token groups, averaged over a group of queries.

    Observed as ``[item, layer, head, group]``. Groups may overlap (``last`` is a text token); ``image`` and ``text``
    partition the sequence and sum to 1.

    Parameters
    ----------
    queries : {"last", "text", "image", "all"}
    groups : tuple of {"image", "text", "last", "bos"}
    """

    queries: str = "last"
    groups: tuple[str, ...] = ("image", "text", "last", "bos")

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, group]`` of one layer."""
        positions, real = _queries(view.tokens, self.queries)
        groups = torch.stack([view.tokens.group(group) for group in self.groups], dim=2).float()
        mass = view.probabilities(positions) @ groups[:, None]
        weight = real[:, None, :, None].float()
        return (mass * weight).sum(2) / weight.sum(2).clamp(min=1.0)


@dataclass(frozen=True)
class ImageAttention:
    """Attention on every image token, averaged over a group of queries: ``[item, layer, head, image token]``.

    Rows with fewer image tokens than the widest of their batch are padded with NaN.
    """

    queries: str = "last"

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, image token]`` of one layer."""
        positions, real = _queries(view.tokens, self.queries)
        weight = real[:, None, :, None].float()
        mean = (view.probabilities(positions) * weight).sum(2) / weight.sum(2).clamp(min=1.0)
        where, present = _queries(view.tokens, "image")
        picked = torch.take_along_dim(mean, where[:, None], dim=2)
        return picked.masked_fill(~present[:, None], torch.nan)


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of every head before the output projection.

    ``reduce="last"``: the vector at the last token, ``[item, layer, head, head_dim]``; ``"mean"``: its mean over all
    tokens; ``"norm"``: the mean over all tokens of its length, ``[item, layer, head]``.
    """

    reduce: str = "last"

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, ...]`` of one layer."""
        output = view.output.float()
        if self.reduce == "last":
            return torch.take_along_dim(output, view.tokens.last[:, None, None, None], dim=1)[:, 0]
        weight = view.tokens.valid[:, :, None].float()
        if self.reduce == "norm":
            return (output.norm(dim=-1) * weight).sum(1) / weight.sum(1)
        if self.reduce == "mean":
            return (output * weight[..., None]).sum(1) / weight[..., None].sum(1)
        raise ValueError(f"reduce must be last, mean or norm, got '{self.reduce}'")


@dataclass(frozen=True)
class HiddenStates:
    """The residual stream that enters each layer; index ``n_layers`` is what enters the final norm.

    Observed as ``[item, layer, hidden]`` for ``positions="last"``, ``"image"`` or ``"text"`` (mean over the group's
    tokens) and ``[item, layer, token, hidden]`` for ``"all"`` or ``"image tokens"`` (padded with NaN).

    Notes
    -----
    Index ``n_layers`` is *before* the final norm, unlike transformers' ``hidden_states[-1]``: a logit lens norms every
    layer alike, exactly once.
    """

    layers: tuple[int, ...] | None = None
    positions: str = "last"

    def layer(self, view: LayerView) -> torch.Tensor | None:
        """Hidden states of one layer, None where not asked for."""
        if self.layers is not None and view.layer not in self.layers:
            return None
        if self.positions == "last":
            return torch.take_along_dim(view.hidden, view.tokens.last[:, None, None], dim=1)[:, 0].float()
        group = "image" if self.positions == "image tokens" else self.positions
        where, real = _queries(view.tokens, group)
        picked = torch.take_along_dim(view.hidden, where[:, :, None], dim=1).float()
        if self.positions in ("all", "image tokens"):
            return picked.masked_fill(~real[:, :, None], torch.nan)
        weight = real[:, :, None].float()
        return (picked * weight).sum(1) / weight.sum(1).clamp(min=1.0)


@dataclass(frozen=True)
class _ImageKVSums:
    """Sum of keys, sum of values and count over image tokens: ``[item, layer, kv head, 2 * head_dim + 1]``."""

    def attention(self, view: AttentionView) -> torch.Tensor:
        image = view.tokens.group("image")[:, None, :, None]
        sums = [(tensor.float() * image).sum(2) for tensor in (view.key, view.value)]
        count = image.sum(2).float().expand(-1, sums[0].shape[1], -1)
        return torch.cat([*sums, count], dim=-1)


def observe(
    subject: Subject,
    items: Sequence,
    observers,
    intervention: Intervention | tuple[Intervention, ...] | None = None,
    batch_rows: int = 32,
):
    """Run observers over items' prompts.

    Parameters
    ----------
    observers : one observer, or a sequence of them
    intervention : optional
        In force while observing.

    Returns
    -------
    ndarray, or a list of them where ``observers`` is a sequence
        ``[item, layer, ...]`` float32; see each observer. Ragged token axes are padded with NaN.
    """
    single = hasattr(observers, "attention") or hasattr(observers, "layer")
    observed: list[list[list[torch.Tensor]]] = [[] for _ in ([observers] if single else observers)]
    for records in _stream(subject, items, [observers] if single else list(observers), intervention, batch_rows):
        for kept, layers in zip(observed, records, strict=True):
            kept.append(layers)
    arrays = [_stack(chunks) for chunks in observed]
    return arrays[0] if single else arrays


def _stream(subject, items, observers, intervention, batch_rows) -> Iterable[list[list[torch.Tensor]]]:
    for start in range(0, len(items), batch_rows):
        chunk = take(items, range(start, min(start + batch_rows, len(items))))
        encoded = encode_items(subject, chunk, batch=batch_rows)
        _, run = forward_rows(
            subject,
            encoded,
            np.arange(len(chunk)),
            [intervention] * len(chunk),
            [item_number(item) for item in chunk],
            observers=observers,
        )
        yield [[run.record(number, layer) for layer in sorted(run.records[number])] for number in range(len(observers))]


def _stack(chunks: list[list[torch.Tensor]]) -> np.ndarray:
    tensors = [tensor for layers in chunks for tensor in layers]
    shape = tuple(map(max, zip(*(tensor.shape[1:] for tensor in tensors), strict=True)))
    n_layers = len(chunks[0])
    stacked = np.full((sum(layers[0].shape[0] for layers in chunks), n_layers, *shape), np.nan, dtype=np.float32)
    start = 0
    for layers in chunks:
        n = layers[0].shape[0]
        for number, tensor in enumerate(layers):
            region = tuple(slice(0, size) for size in tensor.shape[1:])
            stacked[(slice(start, start + n), number, *region)] = tensor.cpu().numpy()
        start += n
    return stacked


def attention_map(subject: Subject, item, head=None, query: str = "last", intervention=None) -> np.ndarray:
    """Attention of one item's last (or mean text) query on its image tokens.

    Returns
    -------
    ndarray ``[layer, head, image token]``, or ``[image token]`` for one ``head`` (a ``HeadId``)
    """
    maps = observe(subject, [item], ImageAttention(query), intervention)[0]
    return maps if head is None else maps[head[0], head[1]]


def image_kv_means(subject: Subject, items: Sequence, batch_rows: int = 32) -> ImageKVMeans:
    """Mean image key and value of every query head over image positions and items (streaming).

    See ``ImageKVMeans`` for what a mean of rotated keys is.
    """
    total: torch.Tensor | None = None
    for ((*layers,),) in _stream(subject, items, [_ImageKVSums()], None, batch_rows):
        sums = torch.stack(layers, dim=1).double().sum(0)
        total = sums if total is None else total + sums
    if total is None:
        raise ValueError("image_kv_means needs at least one item")
    size = (total.shape[-1] - 1) // 2
    means = (total[..., :-1] / total[..., -1:]).float().cpu()
    means = means.repeat_interleave(subject.anatomy.n_heads // means.shape[1], dim=1)
    return ImageKVMeans(means[..., :size].contiguous(), means[..., size:].contiguous(), int(total[0, 0, -1]))


def head_means(subject: Subject, items: Sequence, batch_rows: int = 32) -> HeadMeans:
    """Mean output of every head over all prompt tokens of each item, then over items."""
    outputs = observe(subject, items, HeadOutputs("mean"), batch_rows=batch_rows)
    return HeadMeans(torch.from_numpy(outputs.mean(0)), len(outputs))


