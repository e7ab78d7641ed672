"""How redundant visual tokens are, layer by layer: how alike their residual streams are, how widely attention spreads over them.

``redundancy(subject, items, objects)``   measured for all image tokens and for groups of them
``Redundancy``                            item by item: a tidy table, curves with intervals, one measure's values
``MEASURES``                              what is measured, in a sentence each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vlm_core.items import item_field, take
from vlm_core.observation import likeness
from vlm_core.observation.attention import AttentionEntropy
from vlm_core.observation.likeness import TokenLikeness
from vlm_core.observation.observing import observed, prepare
from vlm_core.reduction.image_groups import ImageGroups, image_groups
from vlm_core.stats import interval_each
from vlm_core.subjects.subject import Subject
from vlm_core.tracing.places import Masks

__all__ = ["MEASURES", "Redundancy", "redundancy"]

MEASURES = {
    **likeness.MEASURES,
    "attention entropy": "entropy of the last prompt token's attention within the group's keys, nats, mean over the heads of the layer",
}


@dataclass(frozen=True, eq=False)
class Redundancy:
    """How alike image tokens are, item by item.

    Attributes
    ----------
    per_item : ndarray ``[item, layer + 1, group, measure]``
        Layer 0 is what enters the first layer, the last what enters the final norm. NaN for groups of fewer than two tokens, and for
        attention entropy where nothing attends any more.
    sizes : int array ``[item, group]``
        Tokens in each group.
    groups : tuple of str
        Of ``vlm_core.reduction.image_groups.GROUPS``.
    measures : tuple of str
        Keys of ``MEASURES``.
    items, clusters, tasks : tuple of str
        Id, scene and task of each item.
    """

    per_item: np.ndarray
    sizes: np.ndarray
    groups: tuple[str, ...]
    measures: tuple[str, ...]
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    tasks: tuple[str, ...]

    def of(self, measure: str, group: str = "all") -> np.ndarray:
        """One measure of one group, ``[item, layer + 1]``: what a trend over layers is tested on (`vlm_core.stats.linear_contrast`).

        Attention entropy has no last column.

        Raises
        ------
        ValueError
            For a measure or group that there is not.
        """
        for name, known, what in ((measure, self.measures, "measure"), (group, self.groups, "group")):
            if name not in known:
                raise ValueError(f"there is no {what} '{name}': choose one of {', '.join(known)}")
        values = self.per_item[:, :, self.groups.index(group), self.measures.index(measure)]
        return values[:, :-1] if measure == "attention entropy" else values

    def table(self) -> pd.DataFrame:
        """One row a number: ``item, cluster, task, layer, group, measure, value``, in this order, NaN included."""
        shape = self.per_item.shape
        item, layer, group, measure = (axis.ravel() for axis in np.indices(shape))
        about = {name: np.asarray(values, dtype=object)[item] for name, values in self._about().items()}
        return pd.DataFrame(
            {
                **about,
                "layer": layer,
                "group": np.asarray(self.groups, dtype=object)[group],
                "measure": np.asarray(self.measures, dtype=object)[measure],
                "value": self.per_item.ravel(),
            }
        )

    def curves(self, task: str | None = None, confidence: float = 0.95) -> pd.DataFrame:
        """Means over items with two-sided intervals by the cluster bootstrap (`vlm_core.stats.interval_each`).

        Parameters
        ----------
        task : str, optional
            Of its items alone. Default: all.
        confidence : float

        Returns
        -------
        DataFrame
            ``layer, group, measure, mean, lower, upper, n_items``: one row a point; ``n_items`` have the measure.

        Raises
        ------
        ValueError
            For a task of which there are no items.
        """
        chosen = np.array([task is None or one == task for one in self.tasks])
        if not chosen.any():
            raise ValueError(f"there are no items of task '{task}': these are of {', '.join(dict.fromkeys(self.tasks))}")
        values, clusters = self.per_item[chosen], np.asarray(self.clusters)[chosen]
        mean, lower, upper = interval_each(values, clusters, confidence)
        layer, group, measure = (axis.ravel() for axis in np.indices(mean.shape))
        return pd.DataFrame(
            {
                "layer": layer,
                "group": np.asarray(self.groups, dtype=object)[group],
                "measure": np.asarray(self.measures, dtype=object)[measure],
                "mean": mean.ravel(),
                "lower": lower.ravel(),
                "upper": upper.ravel(),
                "n_items": np.isfinite(values).sum(0).ravel(),
            }
        )

    def _about(self) -> dict[str, tuple[str, ...]]:
        return {"item": self.items, "cluster": self.clusters, "task": self.tasks}


def redundancy(
    subject: Subject,
    items: Sequence,
    objects: Masks | None = None,
    *,
    groups: ImageGroups | None = None,
    batch_rows: int | None = None,
) -> Redundancy:
    """Measure how alike image tokens are in every layer.

    Parameters
    ----------
    items : sequence of items
    objects : callable or mapping of item ids, optional
        The object in each item's image, bool ``[height, width]``, for the groups ``object``, ``boundary`` and ``background``.
    groups : ImageGroups, optional
        Of these items, where they are known already. Default: ``image_groups(subject, items, objects)``.
    batch_rows : int, optional
        Items per forward pass at most.

    Returns
    -------
    Redundancy

    Raises
    ------
    ValueError
        Without items, or with both objects and groups.
    NotMeasurable
        See ``image_groups``.

    Notes
    -----
    The residual stream is reduced in the layer: what is kept is a few numbers an item, layer and group. A group's size bounds its ranks, so
    that groups of different sizes compare by how they change with depth, not by their values.
    """
    if objects is not None and groups is not None:
        raise ValueError("pass objects or the groups made of them, not both")
    items = take(items, range(len(items)))
    groups = image_groups(subject, items, objects) if groups is None else groups
    named = tuple("image" if name == "all" else name for name in groups.names)
    ready = prepare(subject, items, [TokenLikeness(named), AttentionEntropy("last", named)])
    chunks = []
    for some in observed(subject, items, ready, batch_rows=batch_rows, groups=groups):
        alike, entropy = (values[""].numpy().astype(float) for values in some.values)
        spread = np.full(alike.shape[:3], np.nan)
        spread[:, list(some.layers[1])] = _mean_over_heads(entropy)
        chunks.append(np.concatenate([alike, spread[..., None]], axis=-1))
    per_item = np.concatenate(chunks)
    sizes = np.array([[int(groups.of(item)[name].sum()) for name in groups.names] for item in items])
    per_item[np.broadcast_to(sizes[:, None, :] < 2, per_item.shape[:3])] = np.nan
    about = (tuple(str(item_field(item, name)) for item in items) for name in ("id", "scene_id", "task"))
    return Redundancy(per_item, sizes, groups.names, tuple(MEASURES), *about)


def _mean_over_heads(entropy: np.ndarray) -> np.ndarray:
    """``[item, layer, head, group] -> [item, layer, group]``, heads that give a group no attention left out."""
    known = np.isfinite(entropy)
    with np.errstate(invalid="ignore"):
        return np.where(known, entropy, 0.0).sum(2) / known.sum(2)
