"""Which image tokens are left under an intervention, item by item.

``kept_tokens(subject, items, row)``   bool per image token: is it there when the last layer is done?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm_core.families.layout import Layout
from vlm_core.interventions import Row
from vlm_core.observation.observing import observed, prepare
from vlm_core.seam.views import LayerView
from vlm_core.subjects.subject import Subject
from vlm_core.tracing.object_tokens import item_layouts

__all__ = ["kept_tokens"]


@dataclass(frozen=True)
class _Left:
    """Positions in the prompt of the image tokens that are left when the final norm is reached, ``[item, token]``, -1 where fewer are."""

    n_layers: int

    def layer(self, view: LayerView) -> torch.Tensor | None:
        """Of the last layer alone."""
        if view.layer != self.n_layers:
            return None
        tokens, (where, real) = view.tokens, view.tokens.members("image")
        origin = where if tokens.index is None else tokens.index.gather(1, where)
        return origin.masked_fill(~real, -1)  # prompts are filled up on the right: a column is a position


def kept_tokens(subject: Subject, items: Sequence, row: Row, *, batch_rows: int | None = None) -> list[tuple[Layout, np.ndarray]]:
    """Which image tokens are left.

    Parameters
    ----------
    items : sequence of items
    row : interventions
        None for none.
    batch_rows : int, optional
        Items per forward pass at most.

    Returns
    -------
    list of (Layout, bool array ``[image token]``)
        One an item, in their order: where its image tokens are, and whether each is left.

    Raises
    ------
    NotMeasurable
        Where image tokens lie outside the token sequence or have no place on the image.
    """
    layouts = item_layouts(subject, items)
    ready = prepare(subject, items, [_Left(subject.anatomy.n_layers)])
    kept = []
    for some in observed(subject, items, ready, row, batch_rows):
        for left in some.values[0][""][:, 0].numpy():
            layout = layouts[len(kept)]
            kept.append((layout, np.isin(layout.positions, left[left >= 0])))
    return kept
