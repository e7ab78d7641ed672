"""Which heads carry the image: attribution, rankings, and random heads to compare with.

``attribute_heads``    HeAr: a linear model of the answer logit on which heads still see the image
``layer_matched``      random heads from the same layers in the same numbers
``layer_free``         as many random heads from anywhere
``assign_draws``       which items each random set is run on; ``draw_means`` sums up what it cost
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV

from vlm_core.families.anatomy import HeadId
from vlm_core.interventions import ImageKVMeans, ReplaceImageKV
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep

__all__ = ["HeadAttribution", "assign_draws", "attribute_heads", "draw_means", "layer_free", "layer_matched"]

KEEP_PROBABILITY = 0.8  # COAR validates its keep-probability by held-out prediction; `HeadAttribution.r2` reports ours
HELD_OUT = 0.2  # share of each item's masks the linear model is scored on, never fitted to


@dataclass(frozen=True, eq=False)
class HeadAttribution:
    """Linear effect of each head's sight of the image on the answer logit.

    Attributes
    ----------
    coefficients : ndarray ``[layer, head]``
        Logits gained when the head sees the image rather than the mean image, other heads seeing it or not at random.
    r2 : float
        Share of the variance within items that the model explains on masks it was not fitted to.
    n_items, n_masks : int
        Items, and masks in all.
    """

    coefficients: np.ndarray
    r2: float
    n_items: int
    n_masks: int

    def ranking(self) -> list[HeadId]:
        """Heads from the highest coefficient down; ties in (layer, head) order."""
        order = np.argsort(-self.coefficients.ravel(), kind="stable")
        return [HeadId(*(int(i) for i in np.unravel_index(k, self.coefficients.shape))) for k in order]

    def top(self, fraction: float) -> tuple[HeadId, ...]:
        """The top ``fraction`` of all heads, at least one, rounded to the nearest number."""
        return tuple(self.ranking()[: max(1, round(fraction * self.coefficients.size))])


def attribute_heads(
    subject: Subject,
    items: Sequence,
    means: ImageKVMeans,
    *,
    masks_per_item: int = 32,
    keep_probability: float = KEEP_PROBABILITY,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> HeadAttribution:
    """Head attribution (HeAr).

    Every item is run under random masks; in each, a head keeps its view of the image with ``keep_probability`` and has its image
    keys and values replaced by their mean otherwise. One ridge model, with an intercept per item, predicts the right
    answer's logit from the mask; its coefficients are the attribution.

    Parameters
    ----------
    subject : Subject
    items : sequence of items
        The discovery split of one task (or several).
    means : ImageKVMeans
        What the image's keys and values are replaced by.
    masks_per_item : int
        Random masks per item; a fifth of them (at least one) is held out to score the model.
    keep_probability : float
        In (0, 1).
    seed : int
    progress : callable, optional
        Called with (rows done, rows in all).

    Returns
    -------
    HeadAttribution

    Raises
    ------
    ValueError
        If there are fewer than five masks per item, or the probability is not inside (0, 1).

    References
    ----------
    Kim et al. 2025, arXiv:2509.17588 (mean replacement, linear model); mask count, keep-probability and ridge are our
    reconstruction, judged by ``r2``.
    """
    if masks_per_item < 5:
        raise ValueError(f"masks_per_item is {masks_per_item}: attribution needs at least 5 (one in five is held out)")
    if not 0.0 < keep_probability < 1.0:
        raise ValueError(f"keep_probability is {keep_probability}: expected a number between 0 and 1, both excluded")
    heads, n_items = list(subject.heads), len(items)
    rng = np.random.default_rng(seed)
    kept = rng.random((n_items, masks_per_item, len(heads))) < keep_probability
    table, assignments = {}, []
    for i in range(n_items):
        for k in range(masks_per_item):
            removed = [head for head, keep in zip(heads, kept[i, k], strict=True) if not keep]
            label = f"{i}/{k}"
            table[label] = ReplaceImageKV(removed, means) if removed else None
            assignments.append((i, label))
    measured = sweep(subject, items, table, metrics=("logit",), assignments=assignments, progress=progress)
    logit = measured["value"].to_numpy().reshape(n_items, masks_per_item)
    n_held = max(1, round(HELD_OUT * masks_per_item))
    fit, held = slice(n_held, None), slice(0, n_held)
    # an intercept per item is the same as centring each item's rows on the rows that are fitted
    centre_x, centre_y = kept[:, fit].mean(1, keepdims=True), logit[:, fit].mean(1, keepdims=True)
    x, y = kept - centre_x, logit - centre_y
    model = RidgeCV(alphas=np.logspace(-2, 4, 13), fit_intercept=False)
    model.fit(x[:, fit].reshape(-1, len(heads)), y[:, fit].ravel())
    predicted = model.predict(x[:, held].reshape(-1, len(heads)))
    residual = y[:, held].ravel() - predicted
    spread = float(np.square(y[:, held]).sum())
    r2 = 1.0 - float(np.square(residual).sum()) / spread if spread > 0 else 0.0
    shape = (subject.anatomy.n_layers, subject.anatomy.n_heads)
    return HeadAttribution(model.coef_.reshape(shape), r2, n_items, n_items * masks_per_item)


def layer_matched(heads: Sequence[HeadId], subject: Subject, draws: int, seed: int = 0) -> list[tuple[HeadId, ...]]:
    """Random sets of heads from the same layers, in the same numbers, as ``heads``.

    A draw may share heads with ``heads`` (this is what makes the comparison a permutation test of the ranking within
    layers) but is never the same set.

    Raises
    ------
    ValueError
        If ``heads`` takes whole layers, so that no other set exists.
    """
    wanted = Counter(layer for layer, _ in heads)
    n_heads = subject.anatomy.n_heads
    if all(n == n_heads for n in wanted.values()):
        raise ValueError("the heads fill their layers: no other set matches them layer by layer")

    def draw(rng):
        return [(layer, head) for layer, n in sorted(wanted.items()) for head in rng.choice(n_heads, size=n, replace=False)]

    return _draws(draw, heads, draws, seed)


def layer_free(heads: Sequence[HeadId], subject: Subject, draws: int, seed: int = 0) -> list[tuple[HeadId, ...]]:
    """Random sets of as many heads as ``heads`` from the whole model; never the same set."""
    every = list(subject.heads)
    if len(heads) >= len(every):
        raise ValueError("the heads are all there are: no other set has their number")

    def draw(rng):
        return [every[i] for i in rng.choice(len(every), size=len(heads), replace=False)]

    return _draws(draw, heads, draws, seed)


def _draws(draw, heads, draws: int, seed: int) -> list[tuple[HeadId, ...]]:
    rng, targeted, sets = np.random.default_rng(seed), set(heads), []
    while len(sets) < draws:
        candidate = tuple(sorted(HeadId(int(layer), int(head)) for layer, head in draw(rng)))
        if set(candidate) != targeted:
            sets.append(candidate)
    return sets


def assign_draws(labels: Sequence[str], n_items: int, items_per_draw: int, seed: int = 0) -> list[tuple[int, str]]:
    """Which items each random draw is run on: every draw on as many, every item on as nearly as many draws.

    Returns
    -------
    list of (item index, label)
        For ``vlm_core.sweep(assignments=...)``.

    Raises
    ------
    ValueError
        If a draw would be given no item.
    """
    if items_per_draw < 1:
        raise ValueError(f"items_per_draw is {items_per_draw}: a random draw needs at least one item")
    if n_items < 1:
        raise ValueError("there are no items: a random draw needs at least one")
    rng, order, assignments = np.random.default_rng(seed), [], []
    for label in labels:
        mine: list[int] = []
        while len(mine) < min(items_per_draw, n_items):
            if not order:
                order = rng.permutation(n_items).tolist()
            item = next(i for i in order if i not in mine)
            order.remove(item)
            mine.append(item)
        assignments += [(item, label) for item in mine]
    return assignments


def draw_means(table: pd.DataFrame, group: str, full: pd.Series, targeted: pd.Series) -> tuple[pd.Series, pd.DataFrame]:
    """Summaries of a sweep over random draws labelled ``group/0, group/1, ...``.

    Parameters
    ----------
    table : DataFrame
        From ``vlm_core.sweep``, metric ``correct``.
    group : str
    full, targeted : Series
        Correctness of the untouched subject and under the targeted intervention, indexed by item.

    Returns
    -------
    Series
        Mean correctness per item over the draws it was run on, in the order of ``full``.
    DataFrame
        One row a draw, ``random`` and ``targeted``: the mean accuracy each cost on that draw's own items.
    """
    rows = table[table["intervention"].str.startswith(f"{group}/")]
    per_item = rows.groupby("item")["value"].mean().reindex(full.index)
    whole = rows["item"].map(full).to_numpy(float)
    lost = pd.DataFrame({"random": whole - rows["value"].to_numpy(float), "targeted": whole - rows["item"].map(targeted).to_numpy(float)})
    return per_item, lost.groupby(rows["intervention"].to_numpy(), sort=False).mean()
