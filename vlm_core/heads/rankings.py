"""What heads may be ranked by, to compare attribution with: each rival as scores of single items, ``[item, layer, head]``.

``attention_mass``      how much a head's text queries look at the image
``gradient_gates``      gradient of the answer with respect to a gate on the head
``without_each_head``   the answer when one head alone loses the image; ``SingleHeads`` holds what that costs
``random_scores``       none of it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_core.families.anatomy import HeadId
from vlm_core.heads.ranking import image_map
from vlm_core.interventions import Intervention, Row, parts
from vlm_core.items import item_field
from vlm_core.observation.attention import AttentionMass
from vlm_core.observation.gradients import HeadGradients
from vlm_core.observation.observing import observe
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep

__all__ = ["SingleHeads", "attention_mass", "gradient_gates", "random_scores", "without_each_head"]

Removal = Callable[[Sequence[HeadId]], Intervention]
"""The intervention that takes something (the image) from some heads."""


def attention_mass(subject: Subject, items: Sequence, queries: str = "text") -> np.ndarray:
    """Share of attention that each head gives to the image, ``[item, layer, head]``, averaged over a group of queries.

    Parameters
    ----------
    queries : str
        A token group (``vlm_core.seam.views.GROUPS``): whose attention.
    """
    return observe(subject, items, AttentionMass(queries, ("image",)))[..., 0]


def gradient_gates(subject: Subject, items: Sequence, target: str = "margin") -> np.ndarray:
    """First-order guess of what each head adds to the answer, ``[item, layer, head]``.

    The gate on a head's output stands at 1: gradient times gate is the gradient (``vlm_core.observation.gradients.HeadGradients``).

    Parameters
    ----------
    target : {"margin", "logit"}
        What is differentiated: the margin of the whole answer, which attribution and single-head ablation score too, or its first token's logit.
    """
    return observe(subject, items, HeadGradients(target))


def random_scores(subject: Subject, draws: int, seed: int = 0) -> np.ndarray:
    """Scores that know nothing, ``[draw, layer, head]``: each draw orders the heads at random."""
    return np.random.default_rng(seed).random((draws, subject.anatomy.n_layers, subject.anatomy.n_heads))


@dataclass(frozen=True, eq=False)
class SingleHeads:
    """The answer when one head alone loses something.

    Attributes
    ----------
    untouched, without_any : ndarray ``[item]``
        The metric with every head as it is, and with all heads having lost it together.
    without : ndarray ``[item, layer, head]``
        The metric without each head; NaN in layers that see no image.
    items, clusters : tuple of str
        Id and scene of each item.
    metric : str
    """

    untouched: np.ndarray
    without_any: np.ndarray
    without: np.ndarray
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    metric: str

    @property
    def cost(self) -> np.ndarray:
        """What losing each head alone costs, ``[item, layer, head]``."""
        return self.untouched[:, None, None] - self.without

    def unchanged(self, tolerance: float) -> np.ndarray:
        """Share of heads, ``[item]``, without which the metric changes by less than ``tolerance`` times its untouched size."""
        return self.within(tolerance * np.abs(self.untouched))

    def within(self, limits: np.ndarray) -> np.ndarray:
        """Share of the heads that see the image, ``[item]``, without which the metric changes by less than the item's limit."""
        return (np.abs(self.cost) < limits[:, None, None]).sum((1, 2)) / np.isfinite(self.cost).sum((1, 2))

    def all_change(self, tolerance: float) -> np.ndarray:
        """Whether losing all heads together changes the metric by ``tolerance`` times its untouched size or more, ``[item]``."""
        return np.abs(self.untouched - self.without_any) >= tolerance * np.abs(self.untouched)


def without_each_head(
    subject: Subject,
    items: Sequence,
    remove: Removal,
    *,
    metric: str = "margin",
    under: Row = None,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> SingleHeads:
    """Score every item with each head that sees the image alone, and with all of them, having lost something.

    Parameters
    ----------
    remove : callable
        ``remove(heads)`` is the intervention, such as ``lambda heads: ReplaceImageKV(heads, means, queries="text")``.
    metric : str
        As in ``vlm_core.sweep``.
    under : Row
        In force all the time, "untouched" included: fewer tokens, for instance.

    Raises
    ------
    ValueError
        If there are no items.
    """
    if not len(items):
        raise ValueError("ablating single heads needs at least one item")
    heads = list(subject.image_heads)
    conditions = {"untouched": None, "all": remove(heads)} | {f"{layer}.{head}": remove([HeadId(layer, head)]) for layer, head in heads}
    if under is not None:
        conditions = {label: (*parts(row), *parts(under)) for label, row in conditions.items()}
    table = sweep(subject, items, conditions, metrics=(metric,), store=store, progress=progress)
    values = table["value"].to_numpy(float).reshape(len(items), len(conditions))
    return SingleHeads(
        values[:, 0],
        values[:, 1],
        image_map(subject.anatomy, values[:, 2:]),
        tuple(str(item_field(item, "id")) for item in items),
        tuple(str(item_field(item, "scene_id")) for item in items),
        metric,
    )
