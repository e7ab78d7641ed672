"""Whether heads are used by what is asked for, or by what images look like.

``usage``         per-item attributions as directions: which heads an item uses, however strongly
``appearance``    low-level looks of images, in groups: brightness, texture, colours
``compare_labels``  how well groups of labels agree with usage, semantic against each low-level look: `LabelAgreement`
``flat_map``      usage in two dimensions (t-SNE), to look at

HeAr's finding, as a test: the choice of heads clusters by semantic category, not by low-level appearance (Kim et al. 2025,
arXiv:2509.17588).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from vlm_core.errors import NotMeasurable
from vlm_core.stats import Estimate, jackknife_statistic, sign_flip_p

__all__ = ["LabelAgreement", "appearance", "compare_labels", "flat_map", "usage"]


def usage(per_item: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Directions of attributions ``[item, layer, head]``: the strength of an answer is left out.

    Heads that have no attribution (NaN for every item: they see no image) are no part of a direction.

    Returns
    -------
    vectors : ndarray ``[item with a direction, heads]``
        Of length 1.
    rows : int ndarray
        The items that have a direction: those in which some head has an attribution other than zero.

    Raises
    ------
    NotMeasurable
        If no item has.
    """
    per_item = np.asarray(per_item, dtype=float)
    vectors = per_item.reshape(len(per_item), -1)
    vectors = vectors[:, ~np.isnan(vectors).all(0)]
    length = np.linalg.norm(vectors, axis=1)
    rows = np.flatnonzero(length > 0)
    if not rows.size:
        raise NotMeasurable(f"none of {len(length)} items has an attribution other than zeros: which heads they use is not defined")
    return vectors[rows] / length[rows, None], rows


def appearance(images: Sequence, n_groups: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Group images by looks that take no object to see, computed from their pixels.

    ``brightness`` (mean luminance) and ``texture`` (mean absolute difference of neighbouring pixels) in groups of equal size, ``colours``
    by k-means of 4 × 4 × 4 colour histograms.

    Parameters
    ----------
    images : sequence of PIL images
    n_groups : int
        Of each look: as many as there are semantic groups to compare with, so that none has it easier.

    Returns
    -------
    dict of str to int ndarray ``[image]``
    """
    from sklearn.cluster import KMeans

    if not 2 <= n_groups <= len(images):
        raise ValueError(
            f"{len(images)} images cannot be put into {n_groups} groups: expected at least two groups, and no more than images"
        )
    brightness, texture, histograms = [], [], []
    for image in images:
        pixels = np.asarray(image.convert("RGB"), dtype=float) / 255
        luminance = pixels @ (0.299, 0.587, 0.114)
        brightness.append(luminance.mean())
        texture.append((np.abs(np.diff(luminance, axis=0)).mean() + np.abs(np.diff(luminance, axis=1)).mean()) / 2)
        cells = np.minimum((pixels * 4).astype(int), 3) @ (16, 4, 1)
        histograms.append(np.bincount(cells.ravel(), minlength=64) / cells.size)
    return {
        "brightness": _equal_groups(brightness, n_groups),
        "texture": _equal_groups(texture, n_groups),
        "colours": KMeans(n_groups, n_init=4, random_state=seed).fit_predict(np.sqrt(histograms)),
    }


def _equal_groups(values: Sequence[float], n_groups: int) -> np.ndarray:
    groups = np.empty(len(values), dtype=int)
    groups[np.argsort(values, kind="stable")] = np.arange(len(values)) * n_groups // len(values)
    return groups


@dataclass(frozen=True, eq=False)
class LabelAgreement:
    """How well labels agree with the use of heads.

    Attributes
    ----------
    agreement : dict of str to float
        Mean silhouette, in cosine distance, of every set of labels.
    strongest : str
        The low-level labels that agree best.
    gain : Estimate or None
        Agreement of the semantic labels minus that of the strongest low-level ones; None where it does not vary. Its lower bound is the
        lowest of those against each look, its upper bound the lowest of those at a level shared by the looks.
    p_value : float
        The largest of ``by_look``.
    by_look : dict of str to float
        Against each look, the p-value of "semantic labels agree no better than these": which of the two labels is called semantic is
        exchanged at random scene by scene, so that what the scene contributes to the gain changes its sign.
    """

    agreement: dict[str, float]
    strongest: str
    gain: Estimate | None
    p_value: float
    by_look: dict[str, float]


def compare_labels(
    vectors: ArrayLike,
    semantic: Sequence,
    looks: Mapping[str, Sequence],
    clusters: Sequence,
    *,
    permutations: int = 9999,
    seed: int = 0,
) -> LabelAgreement:
    """Semantic labels against low-level ones: which agree more with the use of heads.

    Parameters
    ----------
    vectors : ``[item, ...]``
        Unit vectors (`usage`).
    semantic : ``[item]``
        What is asked for.
    looks : mapping of name to ``[item]``
        `appearance`, or others.
    clusters : ``[item]``
        Scene of each item.
    permutations : int
        Exchanges of labels.

    Raises
    ------
    ValueError
        If a set of labels has one group only, or a number of labels that is not that of the items.

    Notes
    -----
    Silhouette: Rousseeuw 1987. Better than the strongest look means better than each: an intersection-union test, so that each look is
    tested at the full level and none is chosen (Berger 1982, Technometrics 24:295-300). Bounds by the jackknife over scenes; what a scene
    contributes is its pseudo-value, which holds what its items change in the silhouettes of all others (Tukey 1958). Exchanging an item's
    own silhouettes alone would reject twice too often (simulated), because items share the groups that they are compared with.
    """
    vectors = np.asarray(vectors, dtype=float).reshape(len(vectors), -1)
    distances = np.clip(1 - vectors @ vectors.T, 0, None)
    np.fill_diagonal(distances, 0.0)
    sets = {"semantic": semantic, **looks}
    members = {}
    for name, labels in sets.items():
        codes = np.unique(np.asarray(labels), return_inverse=True)[1].ravel()
        if len(codes) != len(distances):
            raise ValueError(f"{len(distances)} items and {len(codes)} labels '{name}': each item needs exactly one")
        if codes.max() < 1:
            raise ValueError(f"all items have the same label '{name}': there are no groups to agree with")
        members[name] = codes
    scene = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    agreement = {name: float(_silhouettes(distances, codes, np.ones((1, len(distances)))).mean()) for name, codes in members.items()}
    gains, by_look = [], {}
    for name in looks:

        def gain(weights: np.ndarray, name=name) -> np.ndarray:
            per_item = weights[:, scene]
            values = _silhouettes(distances, members["semantic"], per_item) - _silhouettes(distances, members[name], per_item)
            return (per_item * values).sum(1) / per_item.sum(1)

        gains.append(jackknife_statistic(gain, clusters, limits=(-2.0, 2.0), draws_at_once=200))
        n = scene.max() + 1
        contributed = n * gain(np.ones((1, n))) - (n - 1) * gain(1.0 - np.eye(n))
        by_look[name] = sign_flip_p(contributed, n_resamples=permutations, rng=seed)
    strongest = max(looks, key=lambda name: agreement[name])
    return LabelAgreement(agreement, strongest, _over_the_strongest(gains), max(by_look.values()), by_look)


def _over_the_strongest(gains: Sequence[Estimate | None]) -> Estimate | None:
    """The least of several gains: above what every lower bound is above, below what any upper bound at a shared level is below."""
    if any(one is None for one in gains):
        return None

    def bounds(alpha: float) -> tuple[float, float]:
        return min(one.bounds(alpha)[0] for one in gains), min(one.bounds(alpha / len(gains))[1] for one in gains)

    least = min(gains, key=lambda one: one.value)
    return replace(least, method=f"{least.method}, the least over {len(gains)} looks", _bounds=bounds)


def _silhouettes(distances: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Silhouette ``[draw, item]`` of every item under one labelling, other items counting ``weights`` ``[draw, item]``."""
    n_groups = codes.max() + 1
    n_draws, n = weights.shape
    means = np.full((n_groups, n_draws, n), np.inf)
    within = np.zeros((n_draws, n))
    alone = np.zeros((n_draws, n), dtype=bool)
    for group in range(n_groups):
        mine = codes == group
        total = weights[:, mine] @ distances[mine]  # a copy of an item lies at distance 0 from it and adds nothing
        size = np.repeat(weights[:, mine].sum(1, keepdims=True), n, axis=1)
        others = np.where(mine, size - weights, size)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(others > 0, total / others, np.inf)
        means[group] = np.where(mine, np.inf, mean)
        within[:, mine], alone[:, mine] = np.where(others > 0, mean, 0.0)[:, mine], (others <= 0)[:, mine]
    nearest = means.min(0)
    widest = np.maximum(within, nearest)
    with np.errstate(invalid="ignore"):
        return np.where(alone | ~np.isfinite(nearest) | (widest <= 0), 0.0, (nearest - within) / np.where(widest > 0, widest, 1.0))


def flat_map(vectors: ArrayLike, seed: int = 0) -> np.ndarray:
    """Vectors ``[item, ...]`` in two dimensions, ``[item, 2]``: t-SNE in cosine distance. To look at: no claim rests on it."""
    from sklearn.manifold import TSNE

    vectors = np.asarray(vectors, dtype=float).reshape(len(vectors), -1)
    if len(vectors) < 5:
        raise ValueError(f"{len(vectors)} items: a map of neighbours needs at least five")
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=seed, max_iter=500).fit_transform(vectors)
