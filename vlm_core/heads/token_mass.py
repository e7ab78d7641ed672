"""How few image tokens a head looks at: the share of its attention on the image that its most attended tokens hold.

``token_mass(subject, items)``   measured for every head and item
``TokenMass``                    it, and chosen heads against others item by item
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vlm_core.families.anatomy import HeadId
from vlm_core.interventions.declaration import as_heads
from vlm_core.items import item_field, take
from vlm_core.observation.image_attention import TopShare
from vlm_core.observation.observing import observe
from vlm_core.subjects.subject import Subject

__all__ = ["TokenMass", "token_mass"]


@dataclass(frozen=True, eq=False)
class TokenMass:
    """Share of each head's image attention on the image tokens that it attends to most.

    Attributes
    ----------
    per_item : ndarray ``[item, layer, head]``
        NaN where a head gives the image no attention, and in layers that do not see it.
    share : float
        Of an item's image tokens that count as most attended.
    items, clusters, tasks : tuple of str
        Id, scene and task of each item.
    """

    per_item: np.ndarray
    share: float
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    tasks: tuple[str, ...]

    def of(self, heads: Iterable) -> np.ndarray:
        """Mean over some heads, ``[item]``; those that give an item's image no attention are left out of its mean, NaN where none is left.

        Raises
        ------
        ValueError
            Without heads, or for one that there is not.
        """
        chosen = as_heads(heads)
        if not chosen:
            raise ValueError("there are no heads to take the mean of: pass at least one")
        n_layers, n_heads = self.per_item.shape[1:]
        outside = [head for head in chosen if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads)]
        if outside:
            raise ValueError(f"there is no head {outside[0]}: there are {n_layers} layers of {n_heads} heads, each counted from 0")
        values = self.per_item[:, [head.layer for head in chosen], [head.head for head in chosen]]
        known = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            return np.where(known, values, 0.0).sum(1) / known.sum(1)

    def compare(self, heads: Iterable, others: Iterable | None = None) -> pd.DataFrame:
        """Chosen heads against others, paired per item.

        Parameters
        ----------
        heads : heads
        others : heads, optional
            Default: all but ``heads``. Heads of the same layers say whether it is more than a matter of depth.

        Returns
        -------
        DataFrame
            ``item, cluster, task, heads, others, difference``, one row an item: means over either, and the first minus the second.

        Raises
        ------
        ValueError
            For heads on both sides, or none on one.
        """
        chosen = as_heads(heads)
        every = (HeadId(layer, head) for layer, head in np.ndindex(*self.per_item.shape[1:]))
        rest = as_heads(head for head in every if head not in set(chosen)) if others is None else as_heads(others)
        shared = set(chosen) & set(rest)
        if shared:
            raise ValueError(f"head {min(shared)} is among the heads and the others: a head is compared with different ones")
        one, other = self.of(chosen), self.of(rest)
        about = {"item": self.items, "cluster": self.clusters, "task": self.tasks}
        return pd.DataFrame({**about, "heads": one, "others": other, "difference": one - other})


def token_mass(
    subject: Subject, items: Sequence, *, queries: str = "last", share: float = 0.25, batch_rows: int | None = None
) -> TokenMass:
    """Measure which share of its image attention every head gives to the image tokens that it attends to most.

    Parameters
    ----------
    items : sequence of items
    queries : str
        A token group: whose attention, averaged.
    share : float
        Of an item's image tokens, above 0 and at most 1: the top quarter unless told.
    batch_rows : int, optional
        Items per forward pass at most.

    Notes
    -----
    [ours] A head that attends evenly gives the top quarter a quarter. Which tokens are the top ones is told by the same attention: noise
    alone raises the share, in all heads alike, so that it is compared between heads. How much attention a head gives the image at all does
    not enter.
    """
    items = take(items, range(len(items)))
    observer = TopShare(queries, share)
    found = observe(subject, items, observer, batch_rows=batch_rows).astype(float)
    # Beside a cross-attention, the sequence holds a placeholder that shows nothing.
    found[:, [layer for layer in range(found.shape[1]) if layer not in subject.anatomy.image_layers]] = np.nan
    about = (tuple(str(item_field(item, name)) for item in items) for name in ("id", "scene_id", "task"))
    return TokenMass(found, observer.share, *about)
