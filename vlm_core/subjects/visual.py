"""What is known of a prompt's image tokens outside the decoder, for policies that ask (``vlm_core.interventions.policy.Visual``).

``visuals(...)``         of processor outputs, per prompt
``asked_outside(...)``   what the policies of some rows ask for
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from vlm_core.families.layout import image_layouts
from vlm_core.interventions import Row, parts
from vlm_core.interventions.policy import Visual
from vlm_core.seam.tower import tower_layers

if TYPE_CHECKING:
    from vlm_core.subjects.subject import Subject

__all__ = ["OUTSIDE", "asked_outside", "visuals"]

OUTSIDE = frozenset({"grid", "tower"})
"""What policies read that the decoder does not hold."""


def asked_outside(rows: Collection[Row]) -> frozenset[str]:
    """What the policies of some rows read outside the decoder."""
    return frozenset().union(*(getattr(part, "reads", frozenset()) for row in rows for part in parts(row))) & OUTSIDE


def visuals(
    subject: Subject, inputs: Mapping[str, torch.Tensor], sizes: Sequence[Sequence[tuple[int, int]]], reads: Collection[str]
) -> list[Visual]:
    """What ``reads`` asks for, per prompt.

    Parameters
    ----------
    inputs : mapping
        Processor outputs.
    sizes : per prompt, (height, width) of each of its images

    Raises
    ------
    SubjectError
        Where the family's layout is unknown.
    NotMeasurable
        Where the tower is asked for and its patches cannot be told apart by image token.
    """
    family, device = subject.anatomy.family, subject.device
    layouts = image_layouts(family, subject.model.config, subject.processor, inputs, sizes)
    towers = tower_layers(subject.model, subject.anatomy, inputs, layouts) if "tower" in reads else [()] * len(layouts)
    found = []
    for layout, tower in zip(layouts, towers, strict=True):
        grid, row, column = (torch.as_tensor(one, dtype=torch.long, device=device) for one in (layout.grid, layout.row, layout.column))
        found.append(Visual(grid, row, column, tower))
    return found

