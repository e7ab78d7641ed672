"""Whether heads are used by what is asked for and shown, or by what images look like.

``usage``         per-item attributions as directions: which heads an item uses, however strongly
``appearance``    low-level looks of images, in groups: brightness, texture, colours; ``appearance_within`` strata by strata
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
from vlm_core.stats import Estimate, jackknife_statistic, monte_carlo_p, sign_flip_p

__all__ = ["LabelAgreement", "appearance", "appearance_within", "compare_labels", "flat_map", "usage"]


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


def appearance_within(images: Sequence, labels: Sequence, within: Sequence, seed: int = 0) -> dict[str, np.ndarray]:
    """`appearance` of every stratum by itself, in as many groups as it has labels; groups of two strata have no name in common.

    Parameters
    ----------
    images : sequence of PIL images
    labels, within : ``[image]``
        The labels that looks are to be compared with, and the stratum of each image (the task).
    """
    labels, within = np.asarray(labels), np.asarray(within)
    found: dict[str, np.ndarray] = {}
    for number, stratum in enumerate(np.unique(within)):
        rows = np.flatnonzero(within == stratum)
        for name, groups in appearance([images[row] for row in rows], np.unique(labels[rows]).size, seed).items():
            found.setdefault(name, np.empty(len(images), dtype=int))[rows] = number * len(images) + groups
    return found


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
        The largest of ``by_look`` and, where there are strata, ``p_shuffled``.
    by_look : dict of str to float
        Against each look, the p-value of "semantic labels agree no better than these": which of the two labels is called semantic is
        exchanged at random scene by scene, so that what the scene contributes to the gain changes its sign.
    shuffled : ndarray ``[permutation]``
        Agreement of semantic labels shuffled among the items of each stratum; empty without strata.
    p_shuffled : float or None
        The p-value of "within strata, semantic labels have nothing to do with usage", from these.
    """

    agreement: dict[str, float]
    strongest: str
    gain: Estimate | None
    p_value: float
    by_look: dict[str, float]
    shuffled: np.ndarray
    p_shuffled: float | None


def compare_labels(
    vectors: ArrayLike,
    semantic: Sequence,
    looks: Mapping[str, Sequence],
    clusters: Sequence,
    *,
    within: Sequence | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> LabelAgreement:
    """Semantic labels against low-level ones: which agree more with the use of heads.

    Parameters
    ----------
    vectors : ``[item, ...]``
        Unit vectors (`usage`).
    semantic : ``[item]``
        What is asked for, or what is shown.
    looks : mapping of name to ``[item]``
        `appearance`, or others.
    clusters : ``[item]``
        Scene of each item.
    within : ``[item]``, optional
        Strata (the tasks): items are compared with those of their own stratum alone, so that what strata have in common counts for no label;
        and labels shuffled among the items of each stratum must rarely agree as well. An item is then taken to be independent of the others
        of its stratum: no scene is in one stratum twice.
    permutations : int
        Exchanges of labels, and shuffles.

    Raises
    ------
    ValueError
        If a set of labels has one group only (in some stratum), or a number of labels that is not that of the items, or two items of a
        stratum are of one scene.

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
    scene = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    strata = _strata(within, scene)
    members = {name: _codes(name, labels, len(distances), strata, within) for name, labels in {"semantic": semantic, **looks}.items()}

    def silhouettes(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        found = np.empty((max(len(weights), *codes.shape[:-1], 1), len(distances)))
        for rows in strata:
            found[:, rows] = _silhouettes(distances[np.ix_(rows, rows)], codes[..., rows], weights[:, rows])
        return found

    whole = np.ones((1, len(distances)))
    agreement = {name: float(silhouettes(codes, whole).mean()) for name, codes in members.items()}
    gains, by_look = [], {}
    for name in looks:

        def gain(weights: np.ndarray, name=name) -> np.ndarray:
            per_item = weights[:, scene]
            values = silhouettes(members["semantic"], per_item) - silhouettes(members[name], per_item)
            return (per_item * values).sum(1) / per_item.sum(1)

        gains.append(jackknife_statistic(gain, clusters, limits=(-2.0, 2.0), draws_at_once=200))
        n = scene.max() + 1
        contributed = n * gain(np.ones((1, n))) - (n - 1) * gain(1.0 - np.eye(n))
        by_look[name] = sign_flip_p(contributed, n_resamples=permutations, rng=seed)
    strongest = max(looks, key=lambda name: agreement[name])
    shuffled, p_values = np.zeros(0), list(by_look.values())
    if within is not None:
        rng, drawn = np.random.default_rng(seed), []
        for start in range(0, permutations, 500):
            codes = np.tile(members["semantic"], (min(500, permutations - start), 1))
            for rows in strata:
                codes[:, rows] = rng.permuted(codes[:, rows], axis=1)
            drawn.append(silhouettes(codes, whole).mean(1))
        shuffled = np.concatenate(drawn)
        # sums in another order differ in the last digits: labels that agree as well are labels that do
        p_values.append(monte_carlo_p(agreement["semantic"] - 1e-9, shuffled))
    p_shuffled = None if within is None else p_values[-1]
    return LabelAgreement(agreement, strongest, _over_the_strongest(gains), max(p_values), by_look, shuffled, p_shuffled)


def _strata(within: Sequence | None, scene: np.ndarray) -> list[np.ndarray]:
    """Rows of each stratum; all of them without strata."""
    if within is None:
        return [np.arange(len(scene))]
    within = np.asarray(within)
    if within.shape != scene.shape:
        raise ValueError(f"{scene.size} items and {within.size} strata: each item needs exactly one")
    strata = [np.flatnonzero(within == one) for one in np.unique(within)]
    for rows in strata:
        if np.unique(scene[rows]).size < rows.size:
            raise ValueError(f"two items of '{within[rows[0]]}' are of one scene: their labels cannot be shuffled one by one")
    return strata


def _codes(name: str, labels: Sequence, n_items: int, strata: list[np.ndarray], within: Sequence | None) -> np.ndarray:
    """Labels as numbers from 0, in each stratum by itself."""
    labels = np.asarray(labels)
    if len(labels) != n_items:
        raise ValueError(f"{n_items} items and {len(labels)} labels '{name}': each item needs exactly one")
    codes = np.empty(n_items, dtype=int)
    for rows in strata:
        codes[rows] = np.unique(labels[rows], return_inverse=True)[1].ravel()
        if codes[rows].max() < 1:
            where = "all items" if within is None else f"all items of '{np.asarray(within)[rows[0]]}'"
            raise ValueError(f"{where} have the same label '{name}': there are no groups to agree with")
    return codes


def _over_the_strongest(gains: Sequence[Estimate | None]) -> Estimate | None:
    """The least of several gains: above what every lower bound is above, below what any upper bound at a shared level is below."""
    if any(one is None for one in gains):
        return None

    def bounds(alpha: float) -> tuple[float, float]:
        return min(one.bounds(alpha)[0] for one in gains), min(one.bounds(alpha / len(gains))[1] for one in gains)

    least = min(gains, key=lambda one: one.value)
    return replace(least, method=f"{least.method}, the least over {len(gains)} looks", _bounds=bounds)


def _silhouettes(distances: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Silhouette ``[draw, item]`` of every item.

    ``codes`` ``[item]`` or ``[draw, item]`` are the groups, and other items count ``weights`` ``[draw, item]``; one draw of either goes with
    all of the other.
    """
    members = codes[..., None, :] == np.arange(codes.max() + 1)[:, None]  # [(draw,) group, item]
    counted = members * weights[:, None]
    total = counted @ distances  # a copy of an item lies at distance 0 from it and adds nothing
    others = counted.sum(2, keepdims=True) - counted
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(others > 0, total / others, np.inf)
    nearest = np.where(members, np.inf, mean).min(1)
    own = np.where(members, mean, 0.0).sum(1)
    alone = ~np.isfinite(own)
    within = np.where(alone, 0.0, own)
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
