"""Run observers over items.

``observe(...)``         one array for each observer, all items
``observed(...)``        the same a few items at a time, for what streams
``observe_encoded(...)`` one pass over prompts that are encoded already
``attention_map(...)``   the common question, asked; ``attention_heatmap(...)`` draws the answer on the image

What an observer is, ``vlm_core.observation`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm_core.families.anatomy import HeadId
from vlm_core.families.layout import heatmap
from vlm_core.interventions import Intervention, require_row
from vlm_core.interventions.declaration import as_heads
from vlm_core.interventions.numeric import integer
from vlm_core.items import item_field, item_number, require_item, require_items, take
from vlm_core.observation.image_attention import ImageAttention
from vlm_core.seam.plan import require_possible
from vlm_core.seam.run import Run
from vlm_core.seam.seam import require_asleep
from vlm_core.subjects.embed import Encoded, encode_items
from vlm_core.subjects.groups import Groups, grouped
from vlm_core.subjects.rows import forward_rows
from vlm_core.subjects.subject import Subject, require_subject
from vlm_core.subjects.visual import asked_outside

__all__ = ["Observed", "attention_heatmap", "attention_map", "observe", "observe_encoded", "observed", "prepare"]

TOKENS_PER_PASS = 16_384
"""Tokens that run through the language model together, padding included."""


@dataclass(frozen=True, eq=False)
class Observed:
    """What observers saw of a few items.

    Parameters
    ----------
    items : list
    encoded : list of Encoded
        What the language model received for each of them.
    values : list, one per observer, of dict of str to Tensor ``[item, ...]``
        Under ``""`` where the observer returns one tensor. Padded where items differ.
    layers : list, one per observer, of tuple of int
        Layers along the second axis; empty where there is no such axis.
    """

    items: list
    encoded: list[Encoded]
    values: list[dict[str, torch.Tensor]]
    layers: list[tuple[int, ...]]


def observe(
    subject: Subject,
    items: Sequence,
    observers,
    intervention: Intervention | tuple[Intervention, ...] | None = None,
    batch_rows: int | None = None,
    groups: Groups | None = None,
):
    """Run observers over items' prompts.

    Parameters
    ----------
    observers : one observer, or a sequence of them
    intervention : optional
        In force while observing.
    batch_rows : int, optional
        Items per forward pass at most. Default: ``subject.batch_rows``; fewer where prompts are long.
    groups : callable, optional
        ``groups(item, prompt)`` gives named token groups of the item's prompt (an ``Encoded``) as boolean arrays ``[token]``.

    Returns
    -------
    ndarray, or a dict of them where the observer returns several; a list of these where ``observers`` is a sequence
        ``[item, layer, ...]``, float32 or integers; see each observer. Ragged token axes are padded with NaN (-1).

    Raises
    ------
    ValueError
        Without items, or where an observer asks for a layer, head or token group that there is not.
    TypeError
        For what is no subject, observer or intervention.
    """
    require_items(items)
    if not len(items):
        raise ValueError("there is nothing to observe: pass at least one item")
    single = not isinstance(observers, list | tuple)
    if not single and not observers:
        raise ValueError("there is nothing to observe by: pass at least one observer")
    ready = prepare(subject, items, [observers] if single else observers)
    kept: list[dict[str, list[torch.Tensor]]] = [{} for _ in ready]
    for some in observed(subject, items, ready, intervention, batch_rows, groups):
        for chunks, values in zip(kept, some.values, strict=True):
            for key, tensor in values.items():
                chunks.setdefault(key, []).append(tensor)
    arrays = []
    for observer, chunks in zip(ready, kept, strict=True):
        if not chunks:
            raise ValueError(f"{observer!r} saw nothing: none of the layers that it asks for is there")
        joined = {key: torch.cat(padded(tensors)).numpy() for key, tensors in chunks.items()}
        arrays.append(joined[""] if set(joined) == {""} else joined)
    return arrays[0] if single else arrays


def prepare(subject: Subject, items: Sequence, observers: Sequence) -> list:
    """The observers, those with a ``prepare`` made ready for this subject (its sinks found, its layers checked).

    Raises
    ------
    TypeError
        For what is no subject, or no observer.
    ValueError
        For a layer or head that the model does not have.
    """
    require_subject(subject)
    for one in observers:
        if isinstance(one, type | str) or not any(hasattr(one, name) for name in ("attention", "layer", "site", "parts", "measure")):
            what = f"the class {one.__name__}: make one" if isinstance(one, type) else f"{one!r:.60} ({type(one).__name__})"
            raise TypeError(f"an observer is a declaration such as AttentionMass() or HiddenStates(), got {what}")
        if hasattr(one, "require_there"):
            one.require_there(subject.anatomy)
    return [one.prepare(subject, items) if hasattr(one, "prepare") else one for one in observers]


def observed(
    subject: Subject,
    items: Sequence,
    observers: Sequence,
    intervention: Intervention | tuple[Intervention, ...] | None = None,
    batch_rows: int | None = None,
    groups: Groups | None = None,
) -> Iterator[Observed]:
    """Run prepared observers over items, one forward pass at a time; see ``observe``. Memory does not grow with items."""
    require_subject(subject)
    require_asleep(subject.anatomy, "observing items")
    require_items(items)
    require_row(intervention, "intervention")
    require_possible(intervention, subject.anatomy, named=groups is not None)
    if groups is not None and not callable(groups):
        raise TypeError(f"groups must be a callable of (item, prompt) or None, got {groups!r:.60} ({type(groups).__name__})")
    batch_rows = integer(subject.batch_rows if batch_rows is None else batch_rows, "batch_rows", least=1)
    reads = asked_outside([intervention])
    for start in range(0, len(items), batch_rows):
        chunk = take(items, range(start, min(start + batch_rows, len(items))))
        for item in chunk:
            require_item(item)
        encoded = grouped(encode_items(subject, chunk, batch=batch_rows, reads=reads), chunk, groups)
        for lower, upper in _fitting(encoded):
            yield observe_encoded(subject, chunk[lower:upper], encoded[lower:upper], observers, intervention)


def _fitting(encoded: Sequence[Encoded]) -> Iterator[tuple[int, int]]:
    start, longest = 0, 0
    for position, sequence in enumerate(encoded):
        longest = max(longest, len(sequence))
        if position > start and longest * (position - start + 1) > TOKENS_PER_PASS:
            yield start, position
            start, longest = position, len(sequence)
    yield start, len(encoded)


def observe_encoded(
    subject: Subject,
    items: Sequence,
    encoded: Sequence[Encoded],
    observers: Sequence,
    intervention: Intervention | tuple[Intervention, ...] | None = None,
) -> Observed:
    """Run prepared observers over prompts that are encoded already, in one forward pass."""
    values: list[dict[str, torch.Tensor]] = [{} for _ in observers]
    layers: list[tuple[int, ...]] = [() for _ in observers]
    plain, places = [], []
    for number, observer in enumerate(observers):
        if hasattr(observer, "measure"):
            values[number] = observer.measure(subject, items, encoded, intervention)
        else:
            found = observer.parts(subject, items, encoded) if hasattr(observer, "parts") else (observer,)
            places.append((number, range(len(plain), len(plain) + len(found))))
            plain.extend(found)
    if plain:
        numbers = [item_number(item) for item in items]
        rows = [intervention] * len(items)
        _, run = forward_rows(subject, encoded, np.arange(len(items)), rows, numbers, observers=plain)
        for number, (*parts,) in places:
            records = [_records(run, part) for part in parts]
            if hasattr(observers[number], "combine"):
                values[number] = observers[number].combine(*records)
            else:
                values[number], layers[number] = _stacked(records[0]), tuple(records[0])
    return Observed(
        list(items), list(encoded), [{key: tensor.cpu() for key, tensor in found.items()} for found in values], layers
    )


def _records(run: Run, number: int) -> dict[int, Any]:
    """What an observer kept, ``{layer: record}`` with one entry per row."""
    records = {}
    for layer, record in sorted(run.records[number].items()):
        elements = torch.as_tensor(run.elements_at[layer])
        if isinstance(record, dict):
            records[layer] = {key: tensor[elements.to(tensor.device)] for key, tensor in record.items()}
        else:
            records[layer] = record[elements.to(record.device)]
    return records


def _stacked(records: dict[int, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}
    for record in records.values():
        for key, tensor in (record if isinstance(record, dict) else {"": record}).items():
            found.setdefault(key, []).append(tensor.cpu())
    return {key: torch.stack(padded(tensors), dim=1) for key, tensors in found.items()}


def padded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors ``[entry, ...]`` filled up to a common shape (but for the entries) with NaN, or -1 where they are integers."""
    shape = tuple(map(max, zip(*(tensor.shape[1:] for tensor in tensors), strict=True)))
    filled = []
    for tensor in tensors:
        if tuple(tensor.shape[1:]) != shape:
            fill = torch.nan if tensor.is_floating_point() else -1
            whole = tensor.new_full((tensor.shape[0], *shape), fill)
            whole[(slice(None), *(slice(0, size) for size in tensor.shape[1:]))] = tensor
            tensor = whole
        filled.append(tensor)
    return filled


def attention_map(subject: Subject, item, head=None, query: str = "last", intervention=None) -> np.ndarray:
    """Attention of one item's last query (or the mean over a token group) on its image tokens.

    Returns
    -------
    ndarray ``[layer, head, image token]``, or ``[image token]`` for one ``head`` (a ``HeadId``)

    Raises
    ------
    ValueError
        Where the model has no such ``head``.
    """
    require_subject(subject)
    if head is not None:
        (head,) = _known_heads(subject, [head])
    maps = observe(subject, [item], ImageAttention(query), intervention)[0]
    return maps if head is None else maps[head.layer, head.head]


def attention_heatmap(
    subject: Subject, item, heads: Sequence, size: tuple[int, int], query: str = "last", intervention=None, image: int = 0
) -> np.ndarray:
    """Attention of one item's last query (or the mean over a token group), summed over ``heads``, drawn on its image.

    Parameters
    ----------
    heads : sequence of (layer, head)
        A head of a layer without image keys (Mllama's self-attention) adds nothing.
    size : (height, width)
        Of the drawing.
    image : int
        Which image of the prompt.

    Returns
    -------
    float array ``[height, width]``
        See ``vlm_core.families.layout.heatmap``: tiles, thumbnails and pooled tokens lie where they were cut from; NaN where the
        model saw nothing.

    Raises
    ------
    ValueError
        Where the model has no such head, or its image tokens have no place on the image (``subject.layout(...).reason``).
    """
    require_subject(subject)
    require_item(item)
    heads = _known_heads(subject, heads)
    layout = subject.layout(item_field(item, "image"), item_field(item, "prompt"))
    maps = attention_map(subject, item, query=query, intervention=intervention)
    return heatmap(layout, np.nansum([maps[head.layer, head.head] for head in heads], axis=0), size, image)


def _known_heads(subject: Subject, heads: Sequence) -> tuple[HeadId, ...]:
    heads = as_heads(heads)
    n_layers, n_heads = subject.anatomy.n_layers, subject.anatomy.n_heads
    for head in heads:
        if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
            raise ValueError(f"there is no head {head}: this model has {n_layers} layers of {n_heads} heads, each counted from 0")
    return heads
