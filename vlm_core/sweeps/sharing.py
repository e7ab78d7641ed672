"""Which rows can share their prompt's prefix, and what is done to each of them layer by layer.

``why_not_shared(...)``     why an intervention cannot share the prefix, or None
``SuffixRow``               one row of a shared pass
``entry_layer(...)``        the first layer that a row has to run
``compile_rows(...)``       rows as a ``LayerPlan`` per layer
``require_runnable(...)``   the refusals of a whole run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vlm_core.interventions import ImageKVMeans, KnockOut, MeanHeads, ReplaceImageKV, Row, ZeroHeads, parts, touches
from vlm_core.seam.plan import Program, require_fit
from vlm_core.sweeps.trunk import Stem

__all__ = ["LayerPlan", "SuffixRow", "compile_rows", "entry_layer", "require_runnable", "why_not_shared"]

_SHAREABLE = (ZeroHeads, MeanHeads, ReplaceImageKV, KnockOut)


def why_not_shared(intervention: Row, n_layers: int, contiguous: bool = True) -> str | None:
    """Why the rows of an intervention cannot share their prompt's prefix; None where they can.

    Parameters
    ----------
    contiguous : bool
        Whether the prompt's image tokens lie side by side.
    """
    for part in parts(intervention):
        touch = part.touches(n_layers, contiguous)
        # What the last layer does to image tokens is read by no one.
        if touch.scope != "question" and touch.layer < n_layers - 1:
            return f"{type(part).__name__} changes tokens up to the last image token"
        if touch.layer < n_layers and not isinstance(part, _SHAREABLE):
            return f"{type(part).__name__} has no form that shares the prefix"
        if isinstance(part, ReplaceImageKV) and not isinstance(part.means, ImageKVMeans):
            return "image keys and values that differ from token to token have no closed form"
        if isinstance(part, KnockOut) and part.heads:
            return "a knock-out in single heads has no form that shares the prefix"
    return None


@dataclass(frozen=True, eq=False)
class SuffixRow:
    """One row of a shared pass.

    Parameters
    ----------
    stem : Stem
    intervention : Intervention, tuple of them or None
    reads : tuple of int
        Positions (in the whole sequence, after the last image token) whose final hidden state is wanted.
    """

    stem: Stem
    intervention: Row
    reads: tuple[int, ...]


def entry_layer(intervention, anatomy) -> int:
    """First layer that a row of a shared pass has to run."""
    return min(touches(intervention, anatomy.n_layers).layer, anatomy.n_layers - 1)


def require_runnable(rows: Sequence[SuffixRow], anatomy) -> None:
    """Refuse what a whole run would refuse."""
    program = Program.compile([row.intervention for row in rows], anatomy.n_layers, anatomy.n_heads)
    for capability, layer in program.needs:
        anatomy.require(capability, () if layer is None else (layer,))
    for row, positions in zip(rows, program.positions, strict=True):
        for group in positions:
            row.stem.members(group)


@dataclass(eq=False)
class LayerPlan:
    """What is done in one layer to the rows of a batch (``[row, head]`` masks and the like)."""

    zero: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    mean: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    image_kv: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    knocks: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)


def compile_rows(rows: Sequence[SuffixRow], anatomy) -> dict[int, LayerPlan]:
    """What is done to rows, layer by layer; layers in which nothing is are not there."""
    plan: dict[int, LayerPlan] = {}
    n_rows, n_heads = len(rows), anatomy.n_heads
    masks: dict[tuple, torch.Tensor] = {}

    def mask(kind: str, layer: int, *key, width: int | None = n_heads) -> torch.Tensor:
        name = (kind, layer, *key)
        if name not in masks:
            shape = (n_rows,) if width is None else (n_rows, width)
            masks[name] = torch.zeros(shape, dtype=torch.bool)
        return masks[name]

    sources: dict[int, object] = {}
    for number, row in enumerate(rows):
        for part in parts(row.intervention):
            if isinstance(part, KnockOut):
                for layer in part.layers:
                    mask("knock", layer, part.queries, part.keys, width=None)[number] = True
                continue
            means = getattr(part, "means", None)
            if means is not None:
                require_fit(means.values.shape, anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
            sources[id(means)] = means
            for layer, head in part.heads:
                mask(type(part).__name__, layer, part.queries, id(means))[number, head] = True
    for (kind, layer, *key), chosen in masks.items():
        entry = plan.setdefault(layer, LayerPlan())
        if kind == "knock":
            entry.knocks.append((key[0], key[1], chosen))
            continue
        queries, source = key[0], sources[key[1]]
        if kind == "ZeroHeads":
            entry.zero.append((queries, chosen))
        elif kind == "MeanHeads":
            entry.mean.append((queries, chosen, source.values[layer]))
        else:
            entry.image_kv.append((queries, chosen, source.keys[layer], source.values[layer]))
    return plan
