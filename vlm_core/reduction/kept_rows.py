"""Where on the image the tokens lie that a policy keeps: from top to bottom, does it favour some rows?

``kept_rows(subject, items, drop)``   which rows the kept tokens lie in, against keeping uniformly
``KeptRows``                          counts item by item, the histogram, the bias of their height with its interval, χ² with effect size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vlm_core.errors import NotMeasurable
from vlm_core.interventions import DropTokens
from vlm_core.interventions.numeric import integer
from vlm_core.items import item_field, take
from vlm_core.reduction.kept_tokens import kept_tokens
from vlm_core.stats import GoodnessOfFit, Interval, goodness_of_fit, interval
from vlm_core.subjects.subject import Subject

__all__ = ["KeptRows", "kept_rows"]


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows of the image that kept tokens lie in, item by item.

    Attributes
    ----------
    drop : DropTokens
    counts, candidates : int array ``[item, row]``
        Kept tokens, and all that there are, in each row; the first row is the image's top.
    position, uniform : float array ``[item]``
        Mean height of the kept tokens' centres, and of all: 0 the top, 1 the bottom.
    items, clusters, tasks : tuple of str
        Id, scene and task of each item.
    """

    drop: DropTokens
    counts: np.ndarray
    candidates: np.ndarray
    position: np.ndarray
    uniform: np.ndarray
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    tasks: tuple[str, ...]

    @property
    def expected(self) -> np.ndarray:
        """Tokens that each row would keep on average, were as many kept uniformly, ``[item, row]``."""
        return self.counts.sum(1, keepdims=True) * self.candidates / self.candidates.sum(1, keepdims=True)

    def bias(self) -> np.ndarray:
        """How much lower than uniformly the kept tokens lie, in shares of the image's height, ``[item]``; above 0 towards the bottom."""
        return self.position - self.uniform

    def interval(self, confidence: float = 0.95) -> Interval:
        """The mean of ``bias`` over items with its cluster interval: scenes are resampled, never tokens."""
        most = (-float(self.uniform.max()), 1.0 - float(self.uniform.min()))
        return interval(self.bias(), np.asarray(self.clusters), confidence, bounds=most)

    def fit(self, n_resamples: int = 9999, rng: int = 0) -> GoodnessOfFit:
        """χ² against uniform keeping with Cohen's w; its p-value flips whole scenes (`vlm_core.stats.goodness_of_fit`)."""
        return goodness_of_fit(self.counts, self.expected, np.asarray(self.clusters), n_resamples=n_resamples, rng=rng)

    def histogram(self) -> pd.DataFrame:
        """One row a row of the image: ``row``, ``kept`` and ``uniform``, shares of all kept tokens."""
        total = self.counts.sum()
        return pd.DataFrame(
            {"row": np.arange(self.counts.shape[1]), "kept": self.counts.sum(0) / total, "uniform": self.expected.sum(0) / total}
        )


def kept_rows(
    subject: Subject, items: Sequence, drop: DropTokens, *, n_rows: int | None = None, batch_rows: int | None = None
) -> KeptRows:
    """Which rows of the image a policy keeps tokens of.

    Parameters
    ----------
    items : sequence of items
    drop : DropTokens
        Policy, layer and fraction, of all image tokens.
    n_rows : int, optional
        Rows that the image's height is cut into. Default: as many as the largest grid of any item has, so that the rows of an image that is
        one grid are the grid's own.
    batch_rows : int, optional
        Items per forward pass at most.

    Returns
    -------
    KeptRows

    Raises
    ------
    TypeError
        For what is no ``DropTokens``.
    ValueError
        Without items, or for a drop of some image tokens only, or that keeps none of them.
    NotMeasurable
        Where image tokens lie outside the token sequence or have no place on the image, or an item keeps none that has one.

    Notes
    -----
    A token lies in the row that holds the centre of its box on the original image, whatever tile or thumbnail it belongs to; tokens without
    a place (a class token, ends of rows) are counted nowhere. That attention of early layers keeps what lies at the bottom was found by Endo,
    Wang & Yeung-Levy, ICCV 2025, arXiv:2412.13180.
    """
    if not isinstance(drop, DropTokens):
        raise TypeError(f"drop must be a DropTokens, got {drop!r:.60} ({type(drop).__name__}): say layer, fraction and policy")
    if drop.tokens != "image" or drop.keep == 0.0:
        raise ValueError(f"{drop.describe()} is no choice among all image tokens: drop some of the group 'image', and keep some")
    if not len(items):
        raise ValueError("there are no items whose kept tokens could be placed: pass at least one")
    items = take(items, range(len(items)))
    n_rows = None if n_rows is None else integer(n_rows, "n_rows", least=1)
    left = kept_tokens(subject, items, drop, batch_rows=batch_rows)
    if n_rows is None:
        n_rows = max(int(layout.row.max()) + 1 for layout, _ in left)
    counts, candidates, heights = [], [], []
    for item, (layout, kept) in zip(items, left, strict=True):
        height = layout.boxes[:, [1, 3]].mean(1)
        placed = np.isfinite(height)
        if not (kept & placed).any():
            raise NotMeasurable(f"item {item_field(item, 'id')!r} keeps no token that has a place on the image")
        row = np.floor(height * n_rows + 1e-9).clip(0, n_rows - 1)
        for found, chosen in ((counts, kept & placed), (candidates, placed)):
            found.append(np.bincount(row[chosen].astype(int), minlength=n_rows))
        heights.append((height[kept & placed].mean(), height[placed].mean()))
    position, uniform = np.array(heights).T
    about = (tuple(str(item_field(item, name)) for item in items) for name in ("id", "scene_id", "task"))
    return KeptRows(drop, np.array(counts), np.array(candidates), position, uniform, *about)
