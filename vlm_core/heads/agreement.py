"""What maps of attribution say when they are taken together: do they agree, how deep do they lie, does attention give them away?

``scene_agreement``      Kendall's W between rankings made on disjoint scenes
``wording_agreement``    Kendall's W between rankings made on the same scenes, asked in other words
``attribution_depth``    mean depth of the heads, weighted by attribution
``attention_agreement``  Spearman's ρ between attribution and attention mass over heads

Each takes one attribution a task, is computed task by task and averaged over tasks, so that a task with large margins counts no more than
another; bounds come from resampling scenes, of all tasks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from vlm_core.heads.attribution import HeadAttribution
from vlm_core.stats import Estimate, estimate_statistic, kendall_w

__all__ = ["OverTasks", "attention_agreement", "attribution_depth", "scene_agreement", "wording_agreement"]


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


class _Mean:
    """Mean map of some items for any weighting of the scenes, ``[draw, head]``."""

    def __init__(self, per_item: np.ndarray, clusters: Sequence[str], every: np.ndarray) -> None:
        maps = np.asarray(per_item, dtype=float).reshape(len(per_item), -1)
        place = np.searchsorted(every, np.asarray(clusters, dtype=str))
        self.sums, self.counts = np.zeros((every.size, maps.shape[1])), np.zeros(every.size)
        np.add.at(self.sums, place, maps)
        np.add.at(self.counts, place, 1.0)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        n = weights @ self.counts
        # a draw that holds none of these scenes says nothing of them: they count as they are
        weights = np.where((n > 0)[:, None], weights, 1.0)
        return weights @ self.sums / (weights @ self.counts)[:, None]


def scene_agreement(attributions: Mapping[str, HeadAttribution], parts: int = 2, seed: int = 0, **options) -> OverTasks:
    """Kendall's W between head rankings, each made on its own part of a task's scenes.

    Parameters
    ----------
    attributions : mapping of task to HeadAttribution
    parts : int
        Disjoint parts of equally many scenes, drawn at random.
    **options
        Of ``vlm_core.stats.estimate_statistic``.

    Raises
    ------
    ValueError
        If a task has fewer than two scenes a part.

    Notes
    -----
    Rankings that have nothing to do with each other have W = 1 / parts on average; two have W = (1 + ρ) / 2, with Spearman's ρ. Resampled halves
    agree less than the halves themselves, so that bounds are centred on the sample's W (``vlm_core.stats.estimate_statistic``).
    """
    rng, judges = np.random.default_rng(seed), {}
    for task, found in attributions.items():
        scenes = np.unique(found.clusters)
        if scenes.size < 2 * parts:
            raise ValueError(f"{task} has {scenes.size} scenes: {parts} parts need at least {2 * parts}")
        part = dict(zip(rng.permutation(scenes), np.arange(scenes.size) % parts, strict=True))
        mine = np.array([part[scene] for scene in found.clusters])
        judges[task] = [(found.per_item[mine == k], np.asarray(found.clusters)[mine == k]) for k in range(parts)]
    return _over_tasks(judges, _concordance, centred=True, **options)


def wording_agreement(attributions: Mapping[str, Sequence[HeadAttribution]], **options) -> OverTasks:
    """Kendall's W between head rankings, each made on the same scenes with questions in other words.

    Parameters
    ----------
    attributions : mapping of task to sequence of HeadAttribution
        One for each wording, two or more.

    Raises
    ------
    ValueError
        If the wordings of a task are of different scenes.
    """
    for task, found in attributions.items():
        if len({one.clusters for one in found}) > 1:
            raise ValueError(f"{task}: the attributions are of different scenes, wordings are compared on the same ones")
    judges = {task: [(one.per_item, one.clusters) for one in found] for task, found in attributions.items()}
    return _over_tasks(judges, _concordance, **options)


def attribution_depth(attributions: Mapping[str, HeadAttribution], **options) -> OverTasks:
    """Mean depth of the heads weighted by attribution: above 0, and 1 for the last layer (layer l of n lies at (l + 1) / n).

    Only positive attributions weigh: a head whose sight of the image hurts the answer does not carry it.
    """
    def depth(maps: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        weights = np.clip(maps[0], 0.0, None).reshape(-1, *shape).sum(2)
        total = weights.sum(1, keepdims=True)
        weights = np.where(total > 0, weights / np.where(total > 0, total, 1.0), 1 / shape[0])
        return weights @ (np.arange(1, shape[0] + 1) / shape[0])

    return _over_tasks({task: [(found.per_item, found.clusters)] for task, found in attributions.items()}, depth, limits=(0.0, 1.0), **options)


def attention_agreement(attributions: Mapping[str, HeadAttribution], masses: Mapping[str, ArrayLike], **options) -> OverTasks:
    """Spearman's rank correlation over heads between attribution and attention mass on the image.

    Parameters
    ----------
    masses : mapping of task to ``[item, layer, head]``
        Attention mass of the items that the attribution is of, in their order.
    """
    judges = {
        task: [(found.per_item, found.clusters), (np.asarray(masses[task]), found.clusters)] for task, found in attributions.items()
    }

    def correlation(maps: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        one, other = (ranks - ranks.mean(1, keepdims=True) for ranks in (stats.rankdata(part, axis=1) for part in maps))
        size = np.sqrt(np.square(one).sum(1) * np.square(other).sum(1))
        return np.divide((one * other).sum(1), size, out=np.zeros_like(size), where=size > 0)

    return _over_tasks(judges, correlation, limits=(-1.0, 1.0), **options)


def _concordance(maps: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    return kendall_w(np.stack(maps, axis=1))


def _over_tasks(
    judges: Mapping[str, Sequence[tuple[np.ndarray, Sequence[str]]]],
    statistic: Callable[[list[np.ndarray], tuple[int, int]], np.ndarray],
    **options,
) -> OverTasks:
    """``statistic(mean maps, (layers, heads)) -> [draw]`` of every task, and its mean over tasks with bounds."""
    if not judges:
        return OverTasks({}, None)
    clusters = np.concatenate([np.asarray(own, dtype=str) for maps in judges.values() for _, own in maps])
    every = np.unique(clusters)
    shapes = {task: maps[0][0].shape[1:] for task, maps in judges.items()}
    means = {task: [_Mean(per_item, own, every) for per_item, own in maps] for task, maps in judges.items()}

    def values(weights: np.ndarray) -> np.ndarray:
        return np.stack([statistic([mean(weights) for mean in found], shapes[task]) for task, found in means.items()])

    sample = values(np.ones((1, every.size)))[:, 0]
    options.setdefault("limits", (0.0, 1.0))
    estimate = estimate_statistic(lambda weights: values(weights).mean(0), clusters, **options)
    return OverTasks(dict(zip(judges, map(float, sample), strict=True)), estimate)
