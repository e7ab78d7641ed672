"""What maps of attribution say when they are taken together: do they agree, how deep do they lie, does attention give them away?

``scene_agreement``      Kendall's W between rankings made on disjoint scenes
``wording_agreement``    Kendall's W between rankings made on the same scenes, asked in other words
``attribution_depth``    mean depth of the heads, weighted by attribution
``attention_agreement``  Spearman's ρ between attribution and attention mass over heads, of one task
``moved_heads``          how far something moves which heads matter, beyond what other scenes would

The first three take one attribution a task, are computed task by task and averaged over tasks, so that a task with large margins counts
no more than another; bounds come from leaving out or resampling scenes, of all tasks together. A correlation has a sign, so that opposite
ones would cancel in a mean: the last is of one task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from vlm_core.errors import NotMeasurable
from vlm_core.heads.attribution import HeadAttribution
from vlm_core.stats import Estimate, estimate_statistic, jackknife_statistic, kendall_w, per_cluster

__all__ = [
    "Correlation", "Moved", "OverTasks", "attention_agreement", "attribution_depth", "moved_heads", "scene_agreement", "wording_agreement",
]  # fmt: skip

SPLITS = 20
"""Random ways to part a task's scenes, averaged over: so that the one way that was drawn decides nothing."""

LEAST_SCENES = 4
"""Halves of fewer are single scenes."""

LEAST_HEADS = 12
"""Fewer cannot be said to be ranked alike: with 12, bounds near a W of 0.7 hold in simulations (`scene_agreement`)."""

LEAST_RELIABILITY = 0.01
"""What a reliability that comes out lower, or negative, is taken to be."""


@dataclass(frozen=True, eq=False)
class OverTasks:
    """A statistic of each task and their mean.

    Attributes
    ----------
    by_task : dict
        The statistic of each task's sample.
    estimate : Estimate, or None where there is no task, or every draw gives the same
        Their mean, with bounds.
    """

    by_task: dict[str, float]
    estimate: Estimate | None


@dataclass(frozen=True, eq=False)
class Correlation:
    """Rank correlation over heads of attribution with something else.

    Attributes
    ----------
    estimate : Estimate, or None where it is the same whichever scene is left out
        Corrected for attenuation.
    measured : float
        As it is between the maps measured.
    reliability : float
        Rank correlation expected between this attribution and one of as many other scenes; what the correction divides by is its root.
    """

    estimate: Estimate | None
    measured: float
    reliability: float


@dataclass(frozen=True, eq=False)
class Moved:
    """How far the order of heads moves between two conditions.

    Attributes
    ----------
    estimate : Estimate, or None where it is the same whichever scene is left out
        The geometric mean of both reliabilities, less the agreement across; 0 where nothing moves.
    across : float
        Rank correlation between one half of the scenes in one condition and the other half in the other.
    reliabilities : (float, float)
        Between halves of the scenes, within each condition.
    """

    estimate: Estimate | None
    across: float
    reliabilities: tuple[float, float]


class _Maps:
    """Mean map of a task's items for any weighting of the scenes, ``[draw, scene] -> [draw, head]``; heads of layers that see an image."""

    def __init__(self, per_item: ArrayLike, clusters: Sequence[str], every: np.ndarray, layers: np.ndarray) -> None:
        maps = np.asarray(per_item, dtype=float)[:, layers]
        self.scenes = np.searchsorted(every, np.unique(clusters))
        self.sums = per_cluster(maps.reshape(len(maps), -1), clusters)
        self.counts = per_cluster(np.ones(len(maps)), clusters)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return self._mean(weights[:, self.scenes])

    def parted(self, weights: np.ndarray, splits: np.ndarray, parts: int) -> np.ndarray:
        """Of each part of each split, ``[draw, split, part, head]``; ``splits`` ``[split, scene of this task]`` holds numbers of parts."""
        mine = weights[:, self.scenes]
        return np.stack([self._mean(mine[:, None] * (splits == part)) for part in range(parts)], axis=2)

    def split(self, parts: int, seed: int) -> np.ndarray:
        rng, n = np.random.default_rng(seed), len(self.scenes)
        return np.stack([rng.permutation(np.arange(n) % parts) for _ in range(SPLITS)])

    def _mean(self, weights: np.ndarray) -> np.ndarray:
        n = weights @ self.counts
        # a draw that holds none of these scenes says nothing of them: they count as they are
        weights = np.where((n > 0)[..., None], weights, 1.0)
        return weights @ self.sums / (weights @ self.counts)[..., None]


def scene_agreement(attributions: Mapping[str, HeadAttribution], parts: int = 2, seed: int = 0) -> OverTasks:
    """Kendall's W between head rankings, each made on its own part of a task's scenes; mean over ``SPLITS`` random ways to part them.

    What is estimated: the W to be expected of rankings made on that many scenes each (of n scenes, n / parts), drawn from the population
    that these were, under masks drawn anew. Rankings of more scenes agree more.

    Parameters
    ----------
    attributions : mapping of task to HeadAttribution
    parts : int
        Disjoint parts of equally many scenes, drawn at random.

    Raises
    ------
    ValueError
        If a task has fewer than two scenes a part.
    NotMeasurable
        With fewer than ``LEAST_HEADS`` heads.

    Notes
    -----
    Rankings that have nothing to do with each other have W = 1 / parts on average; two have W = (1 + ρ) / 2, with Spearman's ρ. Bounds
    are those of the jackknife over scenes (`vlm_core.stats.jackknife_statistic`). In simulations of two tasks with 48 heads and a W of 0.5
    to 0.98 their standard errors are 1.3 to 1.8 times the true ones, and a lower bound at 5 % lies above the expected W in 1 to 5 % of
    samples. Few heads have few rankings, and W takes few values: of one task and 36 scenes, the bound is missed at a W of 0.7 in 17 % of
    samples with 4 heads, 11 % with 6, 9 % with 8, and in 4 to 5 % with 12 and 16; at a W of 0.9 and more in 38 % with 4 heads and in 7 to 12 %
    with 6 to 16. Hence ``LEAST_HEADS``.
    """
    _require_heads(attributions)
    every = _scenes(attributions)
    values = {}
    for task, found in attributions.items():
        maps = _Maps(found.per_item, found.clusters, every, _seeing(found))
        if len(maps.scenes) < 2 * parts:
            raise ValueError(f"{task} has {len(maps.scenes)} scenes: {parts} parts need at least {2 * parts}")
        splits = maps.split(parts, seed)
        values[task] = lambda weights, maps=maps, splits=splits: kendall_w(maps.parted(weights, splits, parts)).mean(1)
    return _over_tasks(values, attributions, jackknife_statistic, limits=(0.0, 1.0), draws_at_once=100)


def wording_agreement(attributions: Mapping[str, Sequence[HeadAttribution]]) -> OverTasks:
    """Kendall's W between head rankings, each made on the same scenes with questions in other words.

    What is estimated: the W to be expected of such rankings when as many scenes are drawn anew, the same ones for all wordings, and masks
    with them. What the scenes drawn have in common is part of it: it lies above the W of rankings of different scenes.

    Parameters
    ----------
    attributions : mapping of task to sequence of HeadAttribution
        One for each wording, two or more.

    Raises
    ------
    ValueError
        If the wordings of a task are of different scenes.
    NotMeasurable
        With fewer than ``LEAST_HEADS`` heads.

    Notes
    -----
    Bounds as those of `scene_agreement`, and more conservative, because scenes shared by the wordings cancel in most of W but not in its
    roughness: standard errors are 1.7 to 2.7 times the true ones, a lower bound at 5 % is missed in at most 2 % of samples.
    """
    for task, found in attributions.items():
        if len({one.clusters for one in found}) > 1:
            raise ValueError(f"{task}: the attributions are of different scenes, wordings are compared on the same ones")
    measured = {task: found[0] for task, found in attributions.items()}
    _require_heads(measured)
    every = _scenes(measured)
    values = {}
    for task, found in attributions.items():
        maps = [_Maps(one.per_item, one.clusters, every, _seeing(one)) for one in found]
        values[task] = lambda weights, maps=maps: kendall_w(np.stack([one(weights) for one in maps], axis=1))
    return _over_tasks(values, measured, jackknife_statistic, limits=(0.0, 1.0))


def attribution_depth(attributions: Mapping[str, HeadAttribution], **options) -> OverTasks:
    """Mean depth of the heads weighted by attribution: layer l of n lies at (l + 0.5) / n, so that layers that weigh the same lie at 0.5.

    Where some layers see no image, l and n count those that do: that cross-attention begins late says nothing of where attribution lies.
    Only positive attributions weigh: a head whose sight of the image hurts the answer does not carry it.

    Parameters
    ----------
    attributions : mapping of task to HeadAttribution
    **options
        Of ``vlm_core.stats.estimate_statistic``.
    """
    every = _scenes(attributions)
    values = {}
    for task, found in attributions.items():
        layers = _seeing(found)
        shape, maps = (layers.size, found.per_item.shape[2]), _Maps(found.per_item, found.clusters, every, layers)

        def depth(weights: np.ndarray, maps=maps, shape=shape) -> np.ndarray:
            layers = np.clip(maps(weights), 0.0, None).reshape(-1, *shape).sum(2)
            total = layers.sum(1, keepdims=True)
            layers = np.where(total > 0, layers / np.where(total > 0, total, 1.0), 1 / shape[0])
            return layers @ ((np.arange(shape[0]) + 0.5) / shape[0])

        values[task] = depth
    return _over_tasks(values, attributions, estimate_statistic, limits=(0.0, 1.0), **options)


def attention_agreement(attribution: HeadAttribution, masses: ArrayLike, seed: int = 0) -> Correlation:
    """Spearman's rank correlation over heads between attribution and attention mass on the image.

    What is estimated: the correlation with the ranking that ever more scenes would give. An attribution measured on few scenes correlates
    less with anything, so that noise alone would make a correlation small; it is divided by the root of the attribution's reliability
    (Spearman 1904, Am. J. Psychol. 15:72-101), which is its rank correlation between halves of the scenes, stepped up to all of them by
    the Spearman-Brown formula. Attention mass varies little between scenes and is taken as it is.

    Parameters
    ----------
    attribution : HeadAttribution
        Of one task.
    masses : ``[item, layer, head]``
        Attention mass of the items that the attribution is of, in their order.
    seed : int
        Of the halves.

    Raises
    ------
    ValueError
        If there are not as many masses as items, or fewer than ``LEAST_SCENES`` scenes.

    Notes
    -----
    Bounds by the jackknife over scenes. A corrected correlation may lie beyond ±1; where halves of the scenes do not agree at all, the
    reliability is taken to be ``LEAST_RELIABILITY`` and the bounds are wide: that the correlation is small cannot be told.
    """
    masses = np.asarray(masses, dtype=float)
    if masses.shape != attribution.per_item.shape:
        raise ValueError(f"attention masses have shape {masses.shape}: expected that of the attribution, {attribution.per_item.shape}")
    every = np.unique(attribution.clusters)
    if every.size < LEAST_SCENES:
        raise ValueError(f"{every.size} scenes: halves of them need at least {LEAST_SCENES}")
    maps, looks = (_Maps(one, attribution.clusters, every, _seeing(attribution)) for one in (attribution.per_item, masses))
    splits = maps.split(2, seed)

    def parts(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        between = _spearman(*np.moveaxis(maps.parted(weights, splits, 2), 2, 0)).mean(1)
        between = np.maximum(between, 0.0)
        return _spearman(maps(weights), looks(weights)), np.maximum(2 * between / (1 + between), LEAST_RELIABILITY)

    def corrected(weights: np.ndarray) -> np.ndarray:
        measured, reliability = parts(weights)
        return measured / np.sqrt(reliability)

    measured, reliability = (float(one[0]) for one in parts(np.ones((1, every.size))))
    estimate = jackknife_statistic(corrected, attribution.clusters, draws_at_once=100)
    return Correlation(estimate, measured, reliability)


def moved_heads(before: ArrayLike, after: ArrayLike, clusters: Sequence[str], tasks: Sequence[str], seed: int = 0) -> Moved:
    """How much less heads are ranked alike across two conditions than within them.

    Every correlation is between disjoint halves of the scenes (mean over ``SPLITS`` halvings), so that no noise is shared. Noise alone makes
    rankings differ, in one condition perhaps more than in the other; if the true orders were the same, the agreement across would be
    the geometric mean of the two within (Spearman 1904), and that is what it is held against.

    Parameters
    ----------
    before, after : ``[item, layer, head]``
        What each head is worth, item by item; NaN in layers that see no image.
    clusters, tasks : sequence of str, one per item
        In each condition a task's items are divided by how much heads differ in it (standard deviation over heads of their means), so that
        what shrinks the numbers of one task, and moves no head in any, is no move.
    seed : int
        Of the halves.

    Raises
    ------
    ValueError
        For shapes that differ, or fewer than ``LEAST_SCENES`` scenes.

    Notes
    -----
    Bounds by the jackknife over scenes. A reliability below 0 counts as 0: rankings that do not agree with themselves cannot be said to have moved.
    """
    before, after = (np.asarray(one, dtype=float) for one in (before, after))
    if before.shape != after.shape or not len(before) == len(clusters) == len(tasks):
        raise ValueError(f"heads' worth before {before.shape} and after {after.shape} must be of the same items and heads, {len(clusters)} of them")
    every = np.unique(clusters)
    if every.size < LEAST_SCENES:
        raise ValueError(f"{every.size} scenes: halves of them need at least {LEAST_SCENES}")
    layers = np.flatnonzero(np.isfinite(before).all((0, 2)) & np.isfinite(after).all((0, 2)))
    maps = [_Maps(_of_one_size(one, np.asarray(tasks)), clusters, every, layers) for one in (before, after)]
    splits = maps[0].split(2, seed)

    def parts(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        (a, b), (c, d) = (np.moveaxis(one.parted(weights, splits, 2), 2, 0) for one in maps)
        within = (np.maximum(_spearman(one, other).mean(1), 0.0) for one, other in ((a, b), (c, d)))
        return *within, (_spearman(a, d).mean(1) + _spearman(b, c).mean(1)) / 2

    def moved(weights: np.ndarray) -> np.ndarray:
        first, second, across = parts(weights)
        return np.sqrt(first * second) - across

    first, second, across = (float(one[0]) for one in parts(np.ones((1, every.size))))
    return Moved(jackknife_statistic(moved, clusters, limits=(-2.0, 2.0), draws_at_once=100), across, (first, second))


def _of_one_size(values: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """The same with each task's items divided by how much heads differ in it; as it is where they do not."""
    values = values.copy()
    for task in np.unique(tasks):
        spread = np.nanstd(values[tasks == task].mean(0))
        if spread > 0:
            values[tasks == task] /= spread
    return values


def _spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis; 0 where one of them tells no two heads apart."""
    one, other = (ranks - ranks.mean(-1, keepdims=True) for ranks in (stats.rankdata(part, axis=-1) for part in (one, other)))
    size = np.sqrt(np.square(one).sum(-1) * np.square(other).sum(-1))
    return np.divide((one * other).sum(-1), size, out=np.zeros_like(size), where=size > 0)


def _require_heads(attributions: Mapping[str, HeadAttribution]) -> None:
    for found in attributions.values():
        n = _seeing(found).size * found.per_item.shape[2]
        if n < LEAST_HEADS:
            raise NotMeasurable(f"there are {n} heads to rank: bounds of how far rankings agree need {LEAST_HEADS} or more")


def _seeing(attribution: HeadAttribution) -> np.ndarray:
    """Layers whose heads have an attribution: those that see the image."""
    return np.flatnonzero(np.isfinite(attribution.per_item).all((0, 2)))


def _scenes(attributions: Mapping[str, HeadAttribution]) -> np.ndarray:
    return np.unique([scene for found in attributions.values() for scene in found.clusters])


def _over_tasks(
    values: Mapping[str, Callable[[np.ndarray], np.ndarray]], attributions: Mapping[str, HeadAttribution], bounded: Callable, **options
) -> OverTasks:
    """``values`` of every task, each ``weights of all scenes [draw, scene] -> [draw]``, and their mean with bounds."""
    if not values:
        return OverTasks({}, None)
    clusters = [scene for found in attributions.values() for scene in found.clusters]
    sample = {task: float(value(np.ones((1, len(set(clusters)))))[0]) for task, value in values.items()}
    return OverTasks(sample, bounded(lambda weights: np.mean([value(weights) for value in values.values()], axis=0), clusters, **options))
