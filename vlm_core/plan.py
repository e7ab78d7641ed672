"""Compile what is to be done to each row of a batch into tensors.

``Program.compile`` turns one intervention per row into, per layer, boolean masks ``[row, head]`` and lists of drops and
knock-outs. ``Program.first`` is the first layer that each row touches: up to there a row is its item's unmodified
trunk, which is what lets the row engine compute it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from vlm_core.interventions import (
    DropTokens,
    HeadMeans,
    ImageKVMeans,
    Intervention,
    KnockOut,
    MeanHeads,
    ReplaceImageKV,
    ZeroHeads,
)

__all__ = ["Program", "first_layer", "parts"]


def parts(intervention: Intervention | tuple[Intervention, ...] | None) -> tuple[Intervention, ...]:
    """The interventions of one row as a tuple."""
    if intervention is None:
        return ()
    return intervention if isinstance(intervention, tuple) else (intervention,)


@dataclass(frozen=True)
class _Effect:
    """One row's interventions, resolved on a model with ``n_layers`` and ``n_heads``."""

    zero: np.ndarray | None
    mean: tuple[np.ndarray, HeadMeans] | None
    image_kv: tuple[np.ndarray, ImageKVMeans] | None
    drops: tuple[DropTokens, ...]
    knocks: tuple[KnockOut, ...]
    first: int


def _head_mask(heads: tuple, n_layers: int, n_heads: int) -> np.ndarray:
    mask = np.zeros((n_layers, n_heads), dtype=bool)
    if heads:
        index = np.asarray(heads)
        if index.min() < 0 or index[:, 0].max() >= n_layers or index[:, 1].max() >= n_heads:
            raise ValueError(f"a head lies outside this model's {n_layers} layers x {n_heads} heads: {heads}")
        mask[index[:, 0], index[:, 1]] = True
    return mask


@lru_cache(maxsize=65536)
def _effect(intervention: Intervention | tuple[Intervention, ...] | None, n_layers: int, n_heads: int) -> _Effect:
    zero = mean = image_kv = None
    drops: list[DropTokens] = []
    knocks: list[KnockOut] = []
    touched = [n_layers]
    for part in parts(intervention):
        if isinstance(part, DropTokens):
            if part.layer >= n_layers:
                raise ValueError(f"{part.describe()} names a layer outside this model's {n_layers} layers")
            if part.keep < 1.0:
                drops.append(part)
                touched.append(part.layer)
            continue
        if isinstance(part, KnockOut):
            if any(not 0 <= layer < n_layers for layer in part.layers):
                raise ValueError(f"{part.describe()} names a layer outside this model's {n_layers} layers")
            if part.layers:
                knocks.append(part)
                touched.append(part.layers[0])
            continue
        if not part.heads:
            continue
        mask = _head_mask(part.heads, n_layers, n_heads)
        touched.append(part.heads[0].layer)
        if isinstance(part, ZeroHeads):
            zero = mask if zero is None else zero | mask
        elif isinstance(part, MeanHeads):
            if mean is not None:
                raise ValueError("a row takes at most one MeanHeads: join their heads")
            mean = (mask, part.means)
        elif isinstance(part, ReplaceImageKV):
            if image_kv is not None:
                raise ValueError("a row takes at most one ReplaceImageKV: join their heads")
            image_kv = (mask, part.means)
        else:
            raise TypeError(f"not an intervention: {part!r}")
    layers = [drop.layer for drop in drops]
    if len(set(layers)) != len(layers):
        raise ValueError("a row drops tokens at most once per layer")
    return _Effect(zero, mean, image_kv, tuple(drops), tuple(knocks), min(touched))


def first_layer(intervention: Intervention | tuple[Intervention, ...] | None, n_layers: int, n_heads: int) -> int:
    """First layer that an intervention touches; ``n_layers`` where it touches none (the identity)."""
    return _effect(intervention, n_layers, n_heads).first


@dataclass(frozen=True, eq=False)
class _Replacement:
    """Rows and heads to overwrite, and by what.

    ``mask`` ``{layer: [row, head]}``; ``tensors`` each ``[source, layer, head, head_dim]``; ``source`` ``[row]``.
    """

    mask: dict[int, torch.Tensor]
    tensors: tuple[torch.Tensor, ...] = ()
    source: torch.Tensor | None = None

    def at(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The replacing vectors ``[row or 1, head, head_dim]`` of ``layer`` for ``rows``."""
        if self.tensors[0].shape[0] == 1:
            return tuple(tensor[:, layer] for tensor in self.tensors)
        source = self.source[rows]
        return tuple(tensor[source, layer] for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class Program:
    """The interventions of ``n_rows`` rows, per layer, on one device."""

    n_rows: int
    n_layers: int
    first: np.ndarray
    zero: dict[int, torch.Tensor] = field(default_factory=dict)
    mean: _Replacement = field(default_factory=lambda: _Replacement({}))
    image_kv: _Replacement = field(default_factory=lambda: _Replacement({}))
    drops: dict[int, list[DropTokens | None]] = field(default_factory=dict)
    knocks: dict[int, list[tuple[str, str, torch.Tensor]]] = field(default_factory=dict)

    @classmethod
    def compile(
        cls,
        interventions: Sequence[Intervention | tuple[Intervention, ...] | None],
        n_layers: int,
        n_heads: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Program:
        """One intervention per row, resolved on a model's sizes.

        Raises
        ------
        ValueError
            Where an intervention names a head or layer that the model does not have, or two that cannot be combined.
        """
        effects = [_effect(intervention, n_layers, n_heads) for intervention in interventions]
        drops: dict[int, list[DropTokens | None]] = {}
        knocks: dict[int, dict[tuple[str, str], np.ndarray]] = {}
        for row, effect in enumerate(effects):
            for drop in effect.drops:
                drops.setdefault(drop.layer, [None] * len(effects))[row] = drop
            for knock in effect.knocks:
                for layer in knock.layers:
                    edge = knocks.setdefault(layer, {})
                    edge.setdefault((knock.queries, knock.keys), np.zeros(len(effects), dtype=bool))[row] = True
        return cls(
            n_rows=len(effects),
            n_layers=n_layers,
            first=np.array([effect.first for effect in effects], dtype=np.int64),
            zero=_by_layer([effect.zero for effect in effects], device),
            mean=_replacement([effect.mean for effect in effects], lambda means: (means.values,), device, dtype),
            image_kv=_replacement(
                [effect.image_kv for effect in effects], lambda means: (means.keys, means.values), device, dtype
            ),
            drops=drops,
            knocks={
                layer: [(queries, keys, torch.from_numpy(rows).to(device)) for (queries, keys), rows in edges.items()]
                for layer, edges in knocks.items()
            },
        )


def _by_layer(masks: list[np.ndarray | None], device: torch.device | str) -> dict[int, torch.Tensor]:
    shape = next((mask.shape for mask in masks if mask is not None), None)
    if shape is None:
        return {}
    empty = np.zeros(shape, dtype=bool)
    stacked = np.stack([empty if mask is None else mask for mask in masks])
    layers = np.flatnonzero(stacked.any(axis=(0, 2)))
    tensor = torch.from_numpy(stacked).to(device)
    return {int(layer): tensor[:, layer] for layer in layers}


def _replacement(pairs: list, tensors_of, device: torch.device | str, dtype: torch.dtype) -> _Replacement:
    sources: dict[int, int] = {}
    distinct = []
    for pair in pairs:
        if pair is not None and id(pair[1]) not in sources:
            sources[id(pair[1])] = len(distinct)
            distinct.append(pair[1])
    if not distinct:
        return _Replacement({})
    stacked = tuple(
        torch.stack([tensor.to(device, dtype) for tensor in group])
        for group in zip(*(tensors_of(means) for means in distinct), strict=True)
    )
    source = torch.tensor([0 if pair is None else sources[id(pair[1])] for pair in pairs], device=device)
    masks = _by_layer([None if pair is None else pair[0] for pair in pairs], device)
    if stacked[0].shape[1:3] != next(pair[0].shape for pair in pairs if pair is not None):
        raise ValueError(
            f"means of shape {tuple(stacked[0].shape[1:])} do not fit this model's layers x heads: "
            f"compute them on the same subject"
        )
    return _Replacement(masks, stacked, source)
