"""What heads are for: categories by which of a head's paths the answer runs through, and whether features fall into clusters.

``CATEGORIES``        the categories, and the path whose cutting defines each
``path_effects``      what the answer loses when one path of one head is cut, head by head
``categorise``        heads into categories, with how sure that is: `Taxonomy`
``category_agreement``  whether two halves of the scenes give heads the same category: `SameCategory`
``same_categories``   whether two measurements (two wordings of the same questions) do
``cluster_heads``     k-means in feature space, k by silhouette, against features permuted among heads: `HeadClusters`

A category says what a head *does*: it is defined by interventions alone, never by attention, so that whether attention features tell
categories apart is a question and not a tautology.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vlm_core.heads.features import HeadFeatures, delimiters, scene_halves
from vlm_core.interventions import ImageKVMeans, KnockOut, ReplaceImageKV
from vlm_core.items import item_field
from vlm_core.stats import interval_each, monte_carlo_p, per_cluster
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide

__all__ = [
    "CATEGORIES", "NO_EFFECT", "HeadClusters", "PathEffects", "SameCategory", "Taxonomy", "categorise", "category_agreement", "cluster_heads",
    "path_effects", "same_categories",
]  # fmt: skip

CATEGORIES = {
    "cross-modal grounding": "the text no longer sees this image through the head (image keys and values replaced by their mean)",
    "vision summarisation": "image tokens no longer see one another through the head",
    "instruction following": "the text after the image no longer sees its own words through the head",
    "routing": "nothing sees special tokens, delimiters or the first token through the head",
}
NO_EFFECT = "no measurable effect"
LEAST = 0.01  # share of the untouched margin that cutting a path must cost before it counts


@dataclass(frozen=True, eq=False)
class PathEffects:
    """What the answer's margin loses when one path of one head is cut.

    Attributes
    ----------
    drops : dict of category to ndarray ``[item, layer, head]``
        As a share of the untouched subject's mean margin, taken without its sign; each category may have items of its own. NaN where a head
        has no such path: outside the layers that see the image, or see image tokens or text at all.
    clusters : dict of category to tuple of str
        Scene of each item.
    margin : float
        The untouched subject's mean margin that drops are shares of, in nats.
    """

    drops: dict[str, np.ndarray]
    clusters: dict[str, tuple[str, ...]]
    margin: float = float("nan")

    def of(self, rows: Mapping[str, Sequence[int]]) -> PathEffects:
        """Those of some items: category to the numbers of its rows."""
        clusters = {name: tuple(self.clusters[name][row] for row in rows[name]) for name in self.drops}
        return PathEffects({name: drops[list(rows[name])] for name, drops in self.drops.items()}, clusters, self.margin)

    def means(self) -> np.ndarray:
        """``[category, layer, head]``, in the order of ``drops``."""
        return np.stack([drops.mean(0) for drops in self.drops.values()])

    def table(self) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
        """For ``HeadFeatures.table``: per category, its drops and their clusters."""
        return {f"cut: {name}": (self.drops[name], self.clusters[name]) for name in self.drops}


@dataclass(frozen=True, eq=False)
class Taxonomy:
    """Heads in categories.

    Attributes
    ----------
    category : ndarray of str ``[layer, head]``
        One of ``CATEGORIES`` or ``NO_EFFECT``.
    confidence : ndarray ``[layer, head]``
        Share of resamples of the scenes in which the head keeps its category.
    effects : PathEffects
    least : float
    """

    category: np.ndarray
    confidence: np.ndarray
    effects: PathEffects
    least: float

    def counts(self) -> dict[str, int]:
        """Heads in each category."""
        return {name: int((self.category == name).sum()) for name in (*CATEGORIES, NO_EFFECT)}

    def as_dict(self, features: HeadFeatures | None = None) -> dict[str, dict]:
        """``"layer.head"`` → category, confidence, the drop of each path with its interval, and one sentence of evidence."""
        bounds = {name: interval_each(drops, self.effects.clusters[name]) for name, drops in self.effects.drops.items()}
        found, seen = {}, None if features is None else features.means
        for cell in np.ndindex(self.category.shape):
            paths = {
                name: {label: _finite(one[cell]) for label, one in zip(("drop", "lower", "upper"), measured, strict=True)}
                for name, measured in bounds.items()
            }
            category = str(self.category[cell])
            found[f"{cell[0]}.{cell[1]}"] = {
                "layer": cell[0],
                "head": cell[1],
                "category": category,
                "confidence": float(self.confidence[cell]),
                "drops": paths,
                "evidence": _sentence(
                    category, paths, self.least, {} if seen is None else dict(zip(features.names, seen[cell], strict=True))
                ),
            }
        return found


def path_effects(
    subject: Subject,
    items: Sequence,
    means: ImageKVMeans,
    *,
    known: Mapping[str, tuple[ArrayLike, Sequence[str]]] | None = None,
    margin: float | None = None,
    measure: Callable | None = None,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> PathEffects:
    """Cut each path of ``CATEGORIES`` in each head alone and see what the answer's margin loses.

    Parameters
    ----------
    items : sequence of items
        Discovery items.
    means : ImageKVMeans
    known : mapping of category to (``[item, layer, head]``, cluster of each item), optional
        Effects that are known already, in the margin's own unit (the per-item coefficients of `head_attribution` for grounding); their
        paths are not cut again.
    margin : float, optional
        What drops are to be shares of, in nats (that of other effects, to compare with). Default: the mean over these items, without its sign.
    measure : callable, optional
        Called like ``sweep(items, interventions, metrics=..., groups=...)`` in place of `vlm_core.sweep` on the subject.
    store, progress
        See `vlm_core.sweep`.

    Returns
    -------
    PathEffects

    Raises
    ------
    ValueError
        If a known effect is of no category or of other heads, or no answer of the untouched subject has a margin.
    """
    shape = (subject.anatomy.n_layers, subject.anatomy.n_heads)
    known = {name: (np.asarray(values, dtype=float), tuple(map(str, clusters))) for name, (values, clusters) in (known or {}).items()}
    for name, (values, clusters) in known.items():
        if name not in CATEGORIES:
            raise ValueError(f"there is no category '{name}': expected one of {', '.join(CATEGORIES)}")
        if values.shape != (len(clusters), *shape):
            raise ValueError(f"the effects for '{name}' have shape {values.shape}: expected {(len(clusters), *shape)}, one map an item")
    anatomy = subject.anatomy
    own = tuple(layer for layer in range(anatomy.n_layers) if layer not in anatomy.cross_layers)  # whose keys are the sequence's
    layers = {
        "cross-modal grounding": anatomy.image_layers,
        "vision summarisation": own if anatomy.family.image_in_sequence else (),
        "instruction following": own,
        "routing": own,
    }
    cuts = {
        "cross-modal grounding": lambda head: ReplaceImageKV([head], means, queries="text"),
        "vision summarisation": lambda head: KnockOut("image", "image", (head.layer,), (head.head,)),
        "instruction following": lambda head: KnockOut("question", "question", (head.layer,), (head.head,)),
        "routing": lambda head: KnockOut("all", "carriers", (head.layer,), (head.head,)),
    }
    cut_here = {name: [head for head in subject.heads if head.layer in layers[name]] for name in CATEGORIES if name not in known}
    wanted = {f"{name}/{head}": cuts[name](head) for name, heads in cut_here.items() for head in heads}
    measure = measure or partial(sweep, subject, store=store, progress=progress)
    table = wide(measure(items, {"full": None, **wanted}, metrics=("margin",), groups=_carriers(subject)), "margin")
    full = table["full"].to_numpy(float)
    scale = float(np.abs(full).mean()) if margin is None else margin
    if not scale > 0:
        raise ValueError("every margin of the untouched subject is 0 on these items: there is nothing that a path could carry")
    scenes = tuple(str(item_field(item, "scene_id")) for item in items)
    drops, clusters = {}, {}
    for name in CATEGORIES:
        if name in known:
            values, clusters[name] = known[name]
        else:
            values, clusters[name] = np.full((len(full), *shape), np.nan), scenes
            for head in cut_here[name]:
                values[:, head.layer, head.head] = full - table[f"{name}/{head}"].to_numpy(float)
        drops[name] = values / scale
    return PathEffects(drops, clusters, scale)


def _carriers(subject: Subject):
    """Token groups with ``carriers``: special tokens, delimiters and the first token."""
    special = delimiters(subject)

    def groups(item, prompt) -> dict[str, np.ndarray]:
        members = special(item, prompt)["special"].copy()
        members[0] |= not bool(prompt.image[0])
        return {"carriers": members}

    return groups


def categorise(effects: PathEffects, *, least: float = LEAST, draws: int = 1000, seed: int = 0) -> Taxonomy:
    """Give every head the category of the path whose cutting costs most.

    A head whose costliest path costs less than ``least`` of the margin has no measurable effect. Scenes are resampled to say how often
    a head keeps its category; categories measured on the same scenes share the resamples.

    Parameters
    ----------
    effects : PathEffects
    least : float
        Share of the untouched margin.
    draws : int
        Resamples behind the confidence.

    Notes
    -----
    [ours] METHODS names the categories; that a path defines each, and which, is this library's reading. 1 % of the margin is a fifth of
    the change of the answer below which Kim et al. 2025 call a single head's ablation negligible (5 %).
    """
    if not 0 < least < 1:
        raise ValueError(f"least is {least}: expected a share of the margin between 0 and 1")
    names = list(effects.drops)
    category = _assign(effects.means(), names, least)
    kept = np.zeros(category.shape)
    rng = np.random.default_rng(seed)
    sums, shared = {}, {}
    for name in names:
        scenes = effects.clusters[name]
        sums[name] = (per_cluster(effects.drops[name], scenes), per_cluster(np.ones(len(scenes)), scenes))
        shared.setdefault(scenes, len(sums[name][1]))
    for _ in range(draws):
        weights = {scenes: rng.multinomial(n, np.full(n, 1 / n)) for scenes, n in shared.items()}
        drawn = [weights[effects.clusters[name]] for name in names]
        means = [np.tensordot(w, sums[name][0], 1) / (w @ sums[name][1]) for w, name in zip(drawn, names, strict=True)]
        kept += _assign(np.stack(means), names, least) == category
    return Taxonomy(category, kept / draws, effects, least)


@dataclass(frozen=True)
class SameCategory:
    """Whether two measurements give heads the same category.

    Attributes
    ----------
    share : float
        Of heads.
    by_chance : float
        The same if each measurement gave as many heads each category, whichever.
    """

    share: float
    by_chance: float


def category_agreement(effects: PathEffects, *, least: float = LEAST, seed: int = 0) -> SameCategory:
    """How often `categorise` gives a head the same category on two halves of the scenes, mean over random ways to part them.

    Each half holds half of the scenes: categories from all of them agree more. NaN where no way leaves every path a scene in either half.
    """
    found = []
    for one in scene_halves((scene for scenes in effects.clusters.values() for scene in scenes), seed):
        sides = {name: np.array([scene in one for scene in effects.clusters[name]]) for name in effects.drops}
        if all(side.any() and not side.all() for side in sides.values()):
            halves = [effects.of({name: np.flatnonzero(side if first else ~side) for name, side in sides.items()}) for first in (True, False)]
            same = same_categories(*halves, least=least)
            found.append((same.share, same.by_chance))
    return SameCategory(*np.mean(found, axis=0).tolist()) if found else SameCategory(float("nan"), float("nan"))


def same_categories(one: PathEffects, other: PathEffects, *, least: float = LEAST) -> SameCategory:
    """How often `categorise` gives a head the same category by two measurements.

    Parameters
    ----------
    one, other : PathEffects
        Of the same heads, and of the same margin: of the same questions in two wordings, for example.
    least : float
        Share of the margin.

    Raises
    ------
    ValueError
        If they are of other heads or paths.
    """
    names = list(one.drops)
    first, second = one.means(), other.means()
    if names != list(other.drops) or first.shape != second.shape:
        raise ValueError(
            f"effects of paths {', '.join(names)} on {first.shape[1:]} heads cannot be compared with those of {', '.join(other.drops)} on "
            f"{second.shape[1:]}: measure the same paths of the same subject"
        )
    kinds = [_assign(means, names, least) for means in (first, second)]
    chance = sum(float((kinds[0] == name).mean() * (kinds[1] == name).mean()) for name in (*names, NO_EFFECT))
    return SameCategory(float((kinds[0] == kinds[1]).mean()), chance)


def _assign(means: np.ndarray, names: list[str], least: float) -> np.ndarray:
    known = np.where(np.isnan(means), -np.inf, means)
    return np.where(known.max(0) >= least, np.array(names)[known.argmax(0)], NO_EFFECT)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _sentence(category: str, paths: dict[str, dict], least: float, seen: dict[str, float]) -> str:
    """Why the head is in its category, from the measured numbers alone."""
    paths = {name: path for name, path in paths.items() if path["drop"] is not None}
    if not paths:
        return "None of its paths was cut."
    name = max(paths, key=lambda one: paths[one]["drop"])
    cost = paths[name]
    span = "" if cost["lower"] is None else f" ({_percent(cost['lower'])} to {_percent(cost['upper'])})"
    if category == NO_EFFECT:
        costliest = f"the costliest, {name}, {_percent(cost['drop'])}{span}"
        said = f"Cutting any one of its paths costs less than {_percent(least)} of the margin; {costliest}."
    else:
        others = ", ".join(f"{one} {_percent(paths[one]['drop'])}" for one in paths if one != name)
        said = f"When {CATEGORIES[name]}, the margin falls by {_percent(cost['drop'])}{span}; its other paths: {others}."
    looks = {"text_to_image": "the image", "text_to_special": "special tokens and delimiters"}
    shown = [f"{_percent(seen[one])} on {what}" for one, what in looks.items() if np.isfinite(seen.get(one, np.nan))]
    return f"{said} Attention of the text after the image through it: {', '.join(shown)}." if shown else said


@dataclass(frozen=True, eq=False)
class HeadClusters:
    """Heads clustered by features.

    Attributes
    ----------
    labels : int ndarray ``[head]``
    k : int
        Number of clusters, the one of the largest silhouette.
    silhouette : float
        Of that clustering, -1 to 1.
    by_k : dict of int to float
        Silhouette of each number of clusters tried.
    permuted : ndarray ``[draw]``
        The same best silhouette when every feature is permuted among heads by itself, so that only its own distribution is left.
    p_value : float
        Of the silhouette against the permuted ones.
    """

    labels: np.ndarray
    k: int
    silhouette: float
    by_k: dict[int, float]
    permuted: np.ndarray
    p_value: float


def cluster_heads(features: ArrayLike, *, ks: Sequence[int] = tuple(range(2, 9)), draws: int = 19, seed: int = 0) -> HeadClusters:
    """k-means in standardised feature space, the number of clusters chosen by silhouette.

    Parameters
    ----------
    features : ``[head, feature]``
        Standardised (`HeadFeatures.matrix`).
    ks : sequence of int
        Numbers of clusters to try; those that are not below the number of heads are left out.
    draws : int
        Permutations of the features for the control.

    Raises
    ------
    ValueError
        With fewer than four heads, without features, or with a feature that is not finite.
    """
    features = np.asarray(features, dtype=float)
    if features.ndim != 2 or len(features) < 4 or not features.shape[1] or not np.isfinite(features).all():
        raise ValueError(f"clustering needs finite features [head, feature] of four heads or more, not shape {features.shape}")
    ks = [k for k in ks if 2 <= k < len(features)]
    if not ks:
        raise ValueError(f"none of the numbers of clusters asked for lies between 2 and {len(features) - 1}")
    by_k = {k: _clustered(features, k, seed) for k in ks}
    k = max(by_k, key=lambda one: by_k[one][0])
    rng = np.random.default_rng(seed)
    permuted = [max(_clustered(rng.permuted(features, axis=0), one, seed)[0] for one in ks) for _ in range(draws)]
    value, labels = by_k[k]
    return HeadClusters(
        labels, k, value, {one: found[0] for one, found in by_k.items()}, np.array(permuted), monte_carlo_p(value, permuted)
    )


def _clustered(features: np.ndarray, k: int, seed: int) -> tuple[float, np.ndarray]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    labels = KMeans(k, n_init=4, random_state=seed).fit_predict(features)
    return (float(silhouette_score(features, labels)), labels) if np.unique(labels).size > 1 else (-1.0, labels)
