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
from vlm_core.seam.plan import demands, require_fit
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
    asked = {id(row.intervention): row.intervention for row in rows}
    demanded = {known: demands(intervention, anatomy.n_layers, anatomy.n_heads) for known, intervention in asked.items()}
    for capability, layer in frozenset().union(*(needs for needs, _ in demanded.values())):
        anatomy.require(capability, () if layer is None else (layer,))
    for row in rows:
        for group in demanded[id(row.intervention)][1]:
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
    places: dict[tuple, tuple[list[int], list[int]]] = {}
    knocked: dict[tuple, list[int]] = {}
    sources: dict[int, object] = {}
    for number, row in enumerate(rows):
        for part in parts(row.intervention):
            if isinstance(part, KnockOut):
                for layer in part.layers:
                    knocked.setdefault((layer, part.queries, part.keys), []).append(number)
                continue
            if not isinstance(part, _SHAREABLE):
                continue  # it does nothing: `why_not_shared`
            means = getattr(part, "means", None)
            if means is not None and id(means) not in sources:
                require_fit(means.values.shape, anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
            sources[id(means)] = means
            for layer, head in part.heads:
                at = places.setdefault((type(part).__name__, layer, part.queries, id(means)), ([], []))
                at[0].append(number)
                at[1].append(head)
    for (layer, queries, keys), numbers in knocked.items():
        chosen = torch.zeros(n_rows, dtype=torch.bool)
        chosen[numbers] = True
        plan.setdefault(layer, LayerPlan()).knocks.append((queries, keys, chosen))
    for (kind, layer, queries, source), at in places.items():
        chosen, means = torch.zeros(n_rows, n_heads, dtype=torch.bool), sources[source]
        chosen[at] = True
        entry = plan.setdefault(layer, LayerPlan())
        if kind == "ZeroHeads":
            entry.zero.append((queries, chosen))
        elif kind == "MeanHeads":
            entry.mean.append((queries, chosen, means.values[layer]))
        else:
            entry.image_kv.append((queries, chosen, means.keys[layer], means.values[layer]))
    return plan
