"""Head attribution (HeAr): a linear model of the answer on which heads still see the image.

``head_attribution``   random heads lose the image, item by item; what each head's sight is worth follows from a linear model
``HeadAttribution``    the coefficients, per item and for the task, and how well they predict masks they were not fitted to

An item's masks, and the model fitted to them, depend on that item and the seed alone. So scenes can be resampled, or split in halves, after
the fit: the attribution of some items is the same whether others were measured or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlm_core.families.anatomy import HeadId
from vlm_core.heads.ranking import image_map, order_heads, top_heads
from vlm_core.interventions import ImageKVMeans, ReplaceImageKV
from vlm_core.items import item_field
from vlm_core.stats import jackknife_statistic, per_cluster
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep

__all__ = ["HeadAttribution", "head_attribution"]

KEEP_PROBABILITY = 0.95  # COAR's; ``HeadAttribution.r2`` says how well it serves a subject
FOLDS = 5  # parts of each item's masks, each predicted by models of the others
TARGETS = ("margin", "logit")
_PENALTIES = np.logspace(-2, 4, 13)


@dataclass(frozen=True, eq=False)
class HeadAttribution:
    """Linear effect of each head's sight of the image on the answer.

    Attributes
    ----------
    per_item : ndarray ``[item, layer, head]``
        What the target gains when the head sees the image rather than the mean image, other heads seeing it or not at random: a model of
        this item's masks alone. NaN in layers that see no image.
    items, clusters : tuple of str
        Id and scene of each item.
    target : str
        What was modelled: ``margin`` (log-probability of the answer above the best other candidate) or ``logit`` (the answer's logit).
    n_masks : int
        Masks per item.
    squares : ndarray ``[item, 3]``
        Sums of squares of the target over an item's unseen masks, each predicted without having been fitted to (five-fold): around the mean
        of the masks fitted to, around the item's model, and around one model of all items' masks together, which no coefficient comes from.
        A mask that occurs among those fitted to is not unseen and counts in none; NaN where an item has no other.
    """

    per_item: np.ndarray
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    target: str
    n_masks: int
    squares: np.ndarray

    @property
    def coefficients(self) -> np.ndarray:
        """Mean over items: the attribution of each head in the task, ``[layer, head]``."""
        return self.per_item.mean(0)

    @property
    def n_items(self) -> int:
        return len(self.items)

    @property
    def r2(self) -> float:
        """Share of the variance within items that the items' models explain on unseen masks; NaN where no mask is unseen.

        How well linear models describe what removing heads does. It says nothing of the image: models of a subject that cannot see can be
        exact. A ranking is to be used where this is high and, besides, the answers depend on which image is shown (accuracy with the scene's
        own image above that with another's).
        """
        return self._explained(1)

    @property
    def r2_task(self) -> float:
        """The same for one model of all items that were measured together: how alike the items are, and with them the mean that ranks heads."""
        return self._explained(2)

    def r2_lower(self, alpha: float = 0.05) -> float:
        """Lower bound of ``r2``, one-sided, for scenes drawn anew; NaN where fewer than three scenes have unseen masks.

        Jackknife over scenes of the logarithm of the share left unexplained, which is skewed. In simulations with spreads of items that are
        log-normal (σ 0.5 to 1.5), a bound at 5 % is missed in 4 to 7 % of samples of 36 scenes, and in 6 to 9 % of
        samples of 12.
        """
        seen = np.isfinite(self.squares[:, 0])
        clusters = [scene for scene, one in zip(self.clusters, seen, strict=True) if one]
        if len(set(clusters)) < 3:
            return float("nan")
        whole, left = per_cluster(self.squares[seen, :2], clusters).T
        # without the scene that spreads most nothing may be left to explain, or nothing unexplained: then there is no bound above nothing
        if min(whole.sum() - whole.max(), left.sum() - left.max()) <= 0:
            return self.r2 if whole.sum() > 0 and not left.sum() > 0 else min(self.r2, 0.0)
        found = jackknife_statistic(lambda weights: np.log((weights @ left) / (weights @ whole)), clusters)
        return self.r2 if found is None else 1.0 - float(np.exp(found.bounds(alpha)[1]))

    def _explained(self, model: int) -> float:
        known = self.squares[np.isfinite(self.squares[:, 0])]
        whole = known[:, 0].sum()
        if not len(known):
            return float("nan")
        return 1.0 - float(known[:, model].sum() / whole) if whole > 0 else 0.0

    def first(self, n: int) -> HeadAttribution:
        """The same of the first ``n`` items only."""
        return replace(self, per_item=self.per_item[:n], items=self.items[:n], clusters=self.clusters[:n], squares=self.squares[:n])

    @classmethod
    def pooled(cls, parts: Sequence[HeadAttribution]) -> HeadAttribution:
        """Attributions of different items (of several tasks, say) as one of all these items, in their order.

        Raises
        ------
        ValueError
            Without any, or where they differ in target, number of masks or heads, or share an item.
        """
        if not parts:
            raise ValueError("there are no attributions to pool")
        kinds = {(one.target, one.n_masks, one.per_item.shape[1:]) for one in parts}
        if len(kinds) > 1:
            raise ValueError(f"attributions of different targets, numbers of masks or heads cannot be pooled: {sorted(kinds)}")
        items, clusters = (tuple(name for one in parts for name in getattr(one, field)) for field in ("items", "clusters"))
        if len(set(items)) < len(items):
            raise ValueError(f"the item '{next(name for name in items if items.count(name) > 1)}' is in several of the attributions")
        per_item, squares = (np.concatenate([getattr(one, field) for one in parts]) for field in ("per_item", "squares"))
        return cls(per_item, items, clusters, parts[0].target, parts[0].n_masks, squares)

    def ranking(self) -> list[HeadId]:
        """Heads from the highest coefficient down."""
        return order_heads(self.coefficients)

    def top(self, most: float) -> tuple[HeadId, ...]:
        """The first heads of the ranking: a share of all heads that see the image (float) or a number of heads (int)."""
        return top_heads(self.coefficients, most)


def head_attribution(
    subject: Subject,
    items: Sequence,
    means: ImageKVMeans,
    *,
    masks_per_item: int = 128,
    keep_probability: float = KEEP_PROBABILITY,
    target: str = "margin",
    queries: str = "text",
    seed: int = 0,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> HeadAttribution:
    """Head attribution (HeAr).

    Every item is run under random masks; in each, a head keeps its view of the image with ``keep_probability`` and has its image
    keys and values replaced by their mean otherwise. For each item a ridge model of its own predicts the target from the mask; its
    coefficients are the item's attribution, and their mean over items is the task's.

    Parameters
    ----------
    subject : Subject
    items : sequence of items
        The discovery split of one task (or several).
    means : ImageKVMeans
        What the image's keys and values are replaced by.
    masks_per_item : int
        Random masks per item, drawn for its id: an item has the same ones in any list. Each fifth of them is predicted by models of the
        others, to score these.
    keep_probability : float
        In (0, 1).
    target : {"margin", "logit"}
        What is modelled: the answer's log-probability above that of the best other candidate, or the answer's logit, as in the paper. The
        margin is the default because it decides the answer; a logit may rise and fall with all others.
    queries : {"text", "all"}
        Which tokens lose the head's view: those of the text (what grounds the answer; the image's own tokens are computed once), or the
        image's own tokens too, as in the paper.
    seed : int
    store : directory, optional
        Shared with other processes, and found again after a kill; see ``vlm_core.sweep``.
    progress : callable or bool, optional
        Called with (rows done, rows in all).

    Returns
    -------
    HeadAttribution

    Raises
    ------
    ValueError
        If there are no items, fewer than five masks per item, a probability that is not inside (0, 1), or an unknown target.

    References
    ----------
    Kim et al. 2025, arXiv:2509.17588 (mean replacement, linear model of the answer logit); Shah et al. 2024, arXiv:2404.11534 (COAR:
    keep-probability 0.95, validated on held-out masks). Mask count, ridge and margin are our reconstruction, judged by ``r2``.
    """
    if masks_per_item < 5:
        raise ValueError(f"masks_per_item is {masks_per_item}: attribution needs at least 5 (each fifth is predicted from the others)")
    if not 0.0 < keep_probability < 1.0:
        raise ValueError(f"keep_probability is {keep_probability}: expected a number between 0 and 1, both excluded")
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}: expected one of {', '.join(TARGETS)}")
    if not len(items):
        raise ValueError("head attribution needs at least one item")
    heads, n_items = list(subject.image_heads), len(items)
    ids = [str(item_field(item, "id")) for item in items]
    kept = np.stack([_draws(seed, one, (masks_per_item, len(heads))) for one in ids]) < keep_probability
    table, assignments = {}, []
    for i in range(n_items):
        for k in range(masks_per_item):
            removed = tuple(head for head, keep in zip(heads, kept[i, k], strict=True) if not keep)
            label = ",".join(f"{layer}.{head}" for layer, head in removed) or "full"
            table[label] = ReplaceImageKV(removed, means, queries=queries) if removed else None
            assignments.append((i, label))
    measured = sweep(subject, items, table, metrics=(target,), assignments=assignments, store=store, progress=progress)
    per_item, squares = _fit(kept, measured["value"].to_numpy(float).reshape(n_items, masks_per_item))
    return HeadAttribution(
        image_map(subject.anatomy, per_item),
        tuple(ids),
        tuple(str(item_field(item, "scene_id")) for item in items),
        target, masks_per_item, squares,
    )  # fmt: skip


def _draws(seed: int, item: str, shape: tuple[int, int]) -> np.ndarray:
    """Uniform numbers that depend on the seed and the item's id, not on its place in a list."""
    digest = hashlib.sha256(item.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=">u4").tolist()]).random(shape)


def _fit(kept: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients ``[item, head]`` of every item, and ``squares`` of `HeadAttribution`.

    Every mask is predicted by models of the other four fifths of the masks, and counts where it is none of those: with few heads, most
    masks are drawn several times. The coefficients are those of models of all masks.
    """
    fold = np.arange(kept.shape[1]) % FOLDS
    squares, counted = np.zeros((len(kept), 3)), np.zeros(len(kept), dtype=bool)
    for k in range(FOLDS):
        seen, unseen = fold != k, fold == k
        x, y = _centred(kept[:, seen], values[:, seen])
        new = kept[:, unseen] - kept[:, seen].mean(1, keepdims=True)
        spread = values[:, unseen] - values[:, seen].mean(1, keepdims=True)
        own = spread - np.einsum("imh,ih->im", new, _ridge(x, y))
        shared = spread - new @ _ridge(x.reshape(1, -1, x.shape[2]), y.reshape(1, -1))[0]
        novel = _novel(kept[:, unseen], kept[:, seen])
        squares += (np.square([spread, own, shared]) * novel).sum(2).T
        counted |= novel.any(1)
    squares[~counted] = np.nan
    return _ridge(*_centred(kept, values)), squares


def _novel(masks: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether a mask is none of its item's known ones: ``[item, mask]`` from bool ``[item, mask, head]``."""
    packed, others = (np.packbits(one, axis=2) for one in (masks, known))
    return np.array([[row.tobytes() not in found for row in mine]
                     for mine, found in zip(packed, ({row.tobytes() for row in one} for one in others), strict=True)])  # fmt: skip


def _centred(kept: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each item's rows around their mean, which is the same as an intercept per item."""
    return kept - kept.mean(1, keepdims=True), values - values.mean(1, keepdims=True)


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ridge coefficients ``[item, head]`` of ``y`` ``[item, mask]`` on ``x`` ``[item, mask, head]``, both centred, item by item.

    Each item has the penalty whose leave-one-out error, which is exact, is least.
    """
    left, size, right = np.linalg.svd(x, full_matrices=False)
    along = np.einsum("imr,im->ir", left, y)
    errors = []
    for penalty in _PENALTIES:
        shrunk = size**2 / (size**2 + penalty)
        leverage = np.einsum("imr,ir->im", left**2, shrunk) + 1 / y.shape[1]
        errors.append(np.square((y - np.einsum("imr,ir->im", left, shrunk * along)) / np.clip(1 - leverage, 1e-9, None)).sum(1))
    penalty = _PENALTIES[np.argmin(errors, axis=0)][:, None]
    return np.einsum("irh,ir->ih", right, size / (size**2 + penalty) * along)
