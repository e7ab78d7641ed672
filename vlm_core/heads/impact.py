"""Head Impact: how far what a head looks at while answering is the object in question (Sergeev & Kotelnikov 2025).

``head_impact(subject, items, masks)``     IoU of every head's binarised image attention with the object, item by item
``HeadImpact``                             the IoU at every threshold, with the object's mask and with another item's
``layer_test(...)``                        Kruskal-Wallis between layers, Friedman among the heads of each
``between_minus_within(...)``              ε² between layers less ε² among the heads of a layer, for any resample of clusters
``threshold_agreement(...)``               Kendall's τ of the rankings that two thresholds give, for any resample of clusters
``layer_ranking(hi)``                      the layers that rank highest, lowest, and random ones beside
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vlm_core.errors import NotMeasurable
from vlm_core.items import item_field, take
from vlm_core.observation.image_attention import MaskIoU
from vlm_core.observation.observing import observe_encoded
from vlm_core.stats import friedman, kruskal, per_cluster
from vlm_core.subjects.embed import Encoded, encode_items
from vlm_core.subjects.groups import grouped, with_groups
from vlm_core.subjects.subject import Subject
from vlm_core.tracing.object_tokens import item_layouts, object_groups
from vlm_core.tracing.places import Masks, mask_of

__all__ = [
    "THRESHOLDS",
    "HeadImpact",
    "LayerRanking",
    "LayerTest",
    "between_minus_within",
    "head_impact",
    "kendall_tau",
    "least_layer_p",
    "layer_ranking",
    "layer_test",
    "threshold_agreement",
]

THRESHOLDS = ("mean", "mean + sd", 0.75, 0.9)
"""What counts as looking: above the head's mean (as published), a standard deviation above it, the top quarter, the top tenth of tokens."""

LAYERS = 4
"""Layers that the paper tunes as top, bottom and random ones, of models of 24 to 28."""


@dataclass(frozen=True, eq=False)
class HeadImpact:
    """Overlap of heads' image attention with objects.

    Attributes
    ----------
    per_item : ndarray ``[item, layer, head, threshold]``
        IoU with the object's mask.
    elsewhere : ndarray ``[item, layer, head, threshold]``
        IoU with the mask of another item, of another scene (of the same task where there is one): what overlap owes to where objects are.
    thresholds : tuple of str
    items, clusters : tuple of str
        Id and scene of each item.
    """

    per_item: np.ndarray
    elsewhere: np.ndarray
    thresholds: tuple[str, ...]
    items: tuple[str, ...]
    clusters: tuple[str, ...]

    def at(self, threshold: str = "mean") -> np.ndarray:
        """IoU of every item at one threshold, ``[item, layer, head]``."""
        if threshold not in self.thresholds:
            raise ValueError(f"no threshold {threshold!r} was measured, only {', '.join(self.thresholds)}")
        return self.per_item[..., self.thresholds.index(threshold)]

    @property
    def scores(self) -> np.ndarray:
        """Head Impact ``[layer, head]``: the mean over the set at the threshold ``mean``."""
        return self.at().mean(0)

    def own_minus_elsewhere(self) -> np.ndarray:
        """Overlap with the own object beyond that with another item's, over all heads at the threshold ``mean``, ``[item]``."""
        at = self.thresholds.index("mean")
        return (self.per_item[..., at] - self.elsewhere[..., at]).mean((1, 2))


def head_impact(
    subject: Subject,
    items: Sequence,
    masks: Masks,
    *,
    thresholds: Sequence[str | float] = THRESHOLDS,
    batch_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadImpact:
    """Head Impact of every head, on every item.

    Parameters
    ----------
    masks : callable or mapping of item ids
        The object's pixels, bool ``[height, width]``.
    thresholds : sequence
        See ``MaskIoU``; ``"mean"`` among them.
    batch_rows : int, optional
        Items per forward pass.

    Returns
    -------
    HeadImpact
        Of the items whose image tokens show their object and another's.

    Raises
    ------
    NotMeasurable
        Where image tokens have no place on the image or lie outside the token sequence, or no item shows an object.
    ValueError
        Where thresholds lack ``"mean"``, or all items are of one scene.

    Notes
    -----
    Sergeev & Kotelnikov 2025, arXiv:2511.23375: attention of the response's tokens on image tokens, binarised at the head's mean, intersection
    over union with the object on the token grid, averaged over the set. The response is the item's answer, teacher-forced; a response
    token's attention is taken where the token is predicted, as in generation: the last token of the prompt for answers of one token
    (which tokens the paper takes is not public: our reading). Attention is averaged over these positions before it is binarised.
    """
    if "mean" not in thresholds:
        raise ValueError(f"thresholds {tuple(thresholds)} lack 'mean', at which Head Impact is defined")
    items = take(items, range(len(items)))
    layouts = item_layouts(subject, items)
    others = _others(items, masks)
    groups = object_groups(layouts, items, {"object": masks, "elsewhere": others})
    observers = [MaskIoU(name, "response", tuple(thresholds)) for name in ("object", "elsewhere")]
    step = batch_rows or subject.batch_rows
    own, other = [], []
    for start in range(0, len(items), step):
        chunk = items[start : start + step]
        encoded = grouped(encode_items(subject, chunk), chunk, groups)
        answered = [_answered(subject, one, item) for one, item in zip(encoded, chunk, strict=True)]
        found = observe_encoded(subject, chunk, answered, observers)
        own.append(found.values[0][""].numpy())
        other.append(found.values[1][""].numpy())
        if progress is not None:
            progress(min(start + step, len(items)), len(items))
    own, other = np.concatenate(own).astype(float), np.concatenate(other).astype(float)
    seen = np.isfinite(own).all((1, 2, 3)) & np.isfinite(other).all((1, 2, 3))
    if not seen.any():
        raise NotMeasurable("no item shows its object in its image tokens: there is nothing to overlap with")
    kept = [item for item, shown in zip(items, seen, strict=True) if shown]
    return HeadImpact(
        own[seen],
        other[seen],
        tuple(map(str, thresholds)),
        tuple(str(item_field(item, "id")) for item in kept),
        tuple(str(item_field(item, "scene_id")) for item in kept),
    )


def _answered(subject: Subject, encoded: Encoded, item) -> Encoded:
    """A prompt with its answer but for the last token, and the tokens that the answer's are read from as the group ``response``."""
    whole = encoded.extended(subject, subject.continuation(str(item_field(item, "answer")))[:-1])
    return with_groups(whole, {"response": np.arange(len(whole)) >= len(encoded) - 1})


def _others(items: list, masks: Masks) -> dict[str, np.ndarray]:
    """For every item the mask of the next one of its task in another scene; of any task where its own has none."""
    found = {}
    for index, item in enumerate(items):
        rotated = [one for one in [*items[index + 1 :], *items[:index]] if item_field(one, "scene_id") != item_field(item, "scene_id")]
        if not rotated:
            raise ValueError("all items are of one scene: there is no other object to compare with")
        partner = next((one for one in rotated if item_field(one, "task") == item_field(item, "task")), rotated[0])
        found[str(item_field(item, "id"))] = mask_of(masks, partner)
    return found


@dataclass(frozen=True)
class LayerTest:
    """Rank tests of Head Impact.

    Attributes
    ----------
    p_heads, epsilon_heads : float
        Kruskal-Wallis between layers, an observation being a head's mean over the set.
    p_items, epsilon_items : float
        The same, an observation being a head's IoU on an item (these are not independent: the p-value is the published test's, no more).
    p_within, w_within : tuple of float, one a layer
        Friedman among the heads of a layer, a block being a cluster's mean IoU: every head looked at the same images, which differ among
        themselves more than heads do. With Kendall's W.
    epsilon_within : tuple of float, one a layer
        ε² of the heads of a layer, an observation being a head's IoU on an item: on the scale of ``epsilon_items``.
    """

    p_heads: float
    epsilon_heads: float
    p_items: float
    epsilon_items: float
    p_within: tuple[float, ...]
    w_within: tuple[float, ...]
    epsilon_within: tuple[float, ...]


def layer_test(per_item: ArrayLike, clusters: ArrayLike) -> LayerTest:
    """Whether Head Impact differs between layers, and among the heads of each layer.

    Parameters
    ----------
    per_item : ``[item, layer, head]``
        At one threshold.
    clusters : ``[item]``

    Notes
    -----
    Published: p < 0.001 between layers, p > 0.05 within. ε² is the share of the variance of ranks that the grouping explains.
    """
    per_item = _cube(per_item)
    by_layer = np.moveaxis(per_item, 1, 0)
    heads = kruskal(list(per_item.mean(0)))
    pooled = kruskal([layer.ravel() for layer in by_layer])
    sizes = per_cluster(np.ones(len(per_item)), clusters)
    # rounded, so that heads that look alike stay tied
    blocks = np.round(per_cluster(per_item, clusters) / sizes[:, None, None], 9)
    paired = [friedman(blocks[:, layer]) for layer in range(per_item.shape[1])]
    within = tuple(kruskal(list(layer.T))[1] for layer in by_layer)
    return LayerTest(*heads, *pooled, tuple(p for p, _ in paired), tuple(w for _, w in paired), within)


def least_layer_p(n_layers: int, n_heads: int) -> float:
    """The smallest p-value that Kruskal-Wallis between layers can have, a head being one observation: every layer above the next; 1 for one layer."""
    if n_layers < 2:
        return 1.0
    return kruskal(list(np.arange(n_layers * n_heads).reshape(n_layers, n_heads)))[0]


def between_minus_within(per_item: ArrayLike, clusters: ArrayLike) -> Callable[[np.ndarray], np.ndarray]:
    """ε² between layers minus the mean over layers of ε² among their heads, for ``vlm_core.stats.jackknife_statistic``.

    Above zero, layers tell heads apart better than heads of a layer differ among themselves: "between layers and not within" as one number
    with a sign, where p-values alone would turn on the number of items.

    Parameters
    ----------
    per_item : ``[item, layer, head]``
    clusters : ``[item]``

    Returns
    -------
    callable
        ``weights [draw, cluster] -> [draw]``, clusters in the sorted order of their ids.

    Notes
    -----
    Ranks are those of the sample in every draw: the statistic is a ratio of sums of them. Ours, after the paper's pair of tests. It is squared
    differences of means, which resampling makes larger: a bootstrap's lower bound lay above the truth in three samples of ten (nominal: one
    in twenty), the jackknife's in one of twenty to forty.
    """
    from scipy.stats import rankdata

    per_item = _cube(per_item)
    n_items, n_layers, n_heads = per_item.shape
    overall = _sums(rankdata(per_item, axis=None).reshape(per_item.shape), clusters)
    by_layer = np.moveaxis(per_item, 1, 0).reshape(n_layers, -1)
    within = np.moveaxis(rankdata(by_layer, axis=1).reshape(n_layers, n_items, n_heads), 0, 1)
    inside = _sums(within, clusters)
    counts = per_cluster(np.ones(n_items), clusters)

    def difference(weights: np.ndarray) -> np.ndarray:
        n = (weights @ counts)[:, None, None]
        means, squares = (np.tensordot(weights, part, 1) / n for part in overall)
        grand = means.mean((1, 2))
        spread = squares.mean((1, 2)) - grand**2
        between = _share(np.square(means.mean(2) - grand[:, None]).mean(1), spread)
        means, squares = (np.tensordot(weights, part, 1) / n for part in inside)
        centre = means.mean(2)
        inner = _share(np.square(means - centre[..., None]).mean(2), squares.mean(2) - centre**2)
        return between - inner.mean(1)

    return difference


def _sums(ranks: np.ndarray, clusters: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    return per_cluster(ranks, clusters), per_cluster(np.square(ranks), clusters)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 1e-9)


def _cube(per_item: ArrayLike) -> np.ndarray:
    per_item = np.asarray(per_item, dtype=float)
    if per_item.ndim != 3 or min(per_item.shape[1:]) < 2 or not np.isfinite(per_item).all():
        raise ValueError(
            f"Head Impact is compared as finite numbers [item, layer, head] of two layers and heads or more, not {per_item.shape}"
        )
    return per_item


def kendall_tau(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Kendall's τ-b of two rankings of the same things, along the last axis.

    Parameters
    ----------
    first, second : ``[..., thing]``

    Returns
    -------
    numpy.ndarray ``[...]``
        0 where one of them ties everything. Memory grows with the square of the number of things, for one leading index at a time.
    """
    first, second = np.broadcast_arrays(np.asarray(first, dtype=float), np.asarray(second, dtype=float))
    shape = first.shape[:-1]
    upper = np.triu_indices(first.shape[-1], 1)
    taus = []
    for one, other in zip(first.reshape(-1, first.shape[-1]), second.reshape(-1, first.shape[-1]), strict=True):
        a, b = (np.sign(values[upper[0]] - values[upper[1]]) for values in (one, other))
        untied = np.sqrt((a @ a) * (b @ b))
        taus.append((a @ b) / untied if untied else 0.0)
    return np.array(taus).reshape(shape)


def threshold_agreement(impact: HeadImpact, threshold: str) -> Callable[[np.ndarray], np.ndarray]:
    """Kendall's τ of the heads' ranking at ``"mean"`` with that at another threshold, for any resample of clusters.

    Its bounds come from ``vlm_core.stats.jackknife_statistic``: resampled scenes rank heads less well than the scenes themselves.

    Returns
    -------
    callable
        ``weights [draw, cluster] -> [draw]``, clusters in the sorted order of their ids.
    """
    first, second = (per_cluster(impact.at(name).reshape(len(impact.items), -1), impact.clusters) for name in ("mean", threshold))
    return lambda weights: kendall_tau(np.round(weights @ first, 9), np.round(weights @ second, 9))


@dataclass(frozen=True)
class LayerRanking:
    """Layers by what their heads score.

    Attributes
    ----------
    order : tuple of int
        Every layer, from the highest mean score down.
    top, bottom, random : tuple of int
        As many layers each, in order; random ones are neither top nor bottom where enough others are left, else not top.
    """

    order: tuple[int, ...]
    top: tuple[int, ...]
    bottom: tuple[int, ...]
    random: tuple[int, ...]


def layer_ranking(hi: ArrayLike, n: int | None = None, seed: int = 0) -> LayerRanking:
    """The layers that rank highest and lowest, and random ones to compare with.

    Parameters
    ----------
    hi : ``[layer, head]``
        Head Impact, or any score of heads; a layer's is the mean of its heads'.
    n : int, optional
        How many of each. Default: four as published (models of 24 to 28 layers), scaled to the depth of shallower ones (one in seven).
    seed : int

    Raises
    ------
    ValueError
        If a score is NaN, or there are fewer than two layers for each of ``n``.
    """
    hi = np.asarray(hi, dtype=float)
    if hi.ndim != 2 or not np.isfinite(hi).all():
        raise ValueError(f"layers are ranked by finite scores [layer, head], not by shape {hi.shape} with {int(np.isnan(hi).sum())} NaN")
    n_layers = len(hi)
    n = min(LAYERS, -(-n_layers // 7)) if n is None else n
    if not 1 <= n <= n_layers // 2:
        raise ValueError(f"{n_layers} layers have no top {n} and bottom {n} apart from each other: ask for 1 to {n_layers // 2}")
    order = tuple(int(layer) for layer in np.argsort(-hi.mean(1), kind="stable"))
    top, bottom = order[:n], order[-n:]
    others = [layer for layer in order if layer not in top and layer not in bottom]
    pool = sorted(others if len(others) >= n else order[n:])
    random = np.random.default_rng(seed).choice(pool, size=n, replace=False)
    return LayerRanking(order, tuple(sorted(top)), tuple(sorted(bottom)), tuple(sorted(int(layer) for layer in random)))
