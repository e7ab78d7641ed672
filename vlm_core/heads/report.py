"""A head report: for the heads that attribution ranks first, what each does alone, what it looks at, and one sentence made of both.

``head_report(...)``   causal evidence (the image removed from one head), diagnostic evidence (where its attention falls), examples
``HeadReport``         one entry a head, and the examples that its heatmaps are drawn for; JSON as it stands
``choose_examples``    which items are shown, by a rule

Heads are chosen on discovery items by the attribution handed in; everything said of them is measured on other items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from vlm_core.families.anatomy import HeadId
from vlm_core.families.layout import Layout, coverage, heatmap, object_tokens
from vlm_core.heads.attribution import HeadAttribution
from vlm_core.heads.description import describe_head, shown_side
from vlm_core.heads.features import HeadFeatures, delimiters
from vlm_core.heads.ranking import image_map, top_heads
from vlm_core.heads.taxonomy import Taxonomy
from vlm_core.interventions import ImageKVMeans, ReplaceImageKV
from vlm_core.items import item_field, take
from vlm_core.observation.attention import AttentionMass
from vlm_core.observation.image_attention import ImageAttention, MaskIoU
from vlm_core.observation.observing import observed
from vlm_core.stats import interval, interval_each
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide
from vlm_core.tracing.places import Masks, mask_of

__all__ = ["LOOKS", "HeadReport", "choose_examples", "head_report"]

QUERIES = "last"
"""Whose attention is described: the prompt's last token, from which the answer is read."""

LOOKS = {
    "answer_to_image": "attention mass of the prompt's last token, from which the answer is read, on image keys",
    "answer_to_special": "the same on special tokens and delimiters (tokens without a letter or digit)",
    "answer_to_words": "the same on the other text",
    "object_share": "share of its attention on the image that falls on the asked object, by how much of each token shows it",
    "even_share": "the same if the attention were spread evenly over the image's tokens",
    "object_gain": "the difference of both",
    "iou": "overlap (intersection over union) of the image tokens above the head's mean attention with the object's tokens",
}
ENOUGH = 5
"""Heads with both kinds of evidence that a report should have; one with fewer says so."""
HEAT_PIXELS = 32
"""Longer side of a heatmap at most."""
MASK_PIXELS = 64
"""Longer side of the asked object's mask at most."""


@dataclass(frozen=True, eq=False)
class HeadReport:
    """What is known of a few heads.

    Attributes
    ----------
    heads : list of dict
        One entry a head, the highest attribution first: ``name, layer, head, depth, category, confidence, attribution, effect, by_task,
        features, attends, kinds, heat, evidence, sentence``. A measured number is ``{value, lower, upper}``, bounds None where there is no
        interval; ``heat`` holds per example the attention on the image and on the object, and the heatmap as rows of ``values``.
        ``evidence`` says which kinds there are: ``causal`` where the interval of what the answer's margin loses excludes 0, ``diagnostic``
        where the head's attention on the image was measured with an interval.
    examples : list of dict
        ``id, task, prompt, answer, mask``: the items of the heatmaps, ``mask`` the asked object as rows of 0 and 1 (None without one).
    about : dict
        What was asked of which items, by which rules heads and examples were chosen, and how many heads have ``both`` kinds of evidence:
        ``shortfall`` says so where they are fewer than five (else empty).
    map : list of dict
        Every head of the subject, layer by layer: ``name, layer, head, attribution`` (None where the head cannot see the image), and what the
        taxonomy says of it (``category, confidence, drops, evidence``; `vlm_core.heads.taxonomy.Taxonomy.as_dict`).
    """

    heads: list[dict]
    examples: list[dict]
    about: dict
    map: list[dict] = field(default_factory=list)

    def as_dict(self) -> dict:
        """Builtins only, for JSON."""
        return {"heads": self.heads, "examples": self.examples, "about": self.about, "map": self.map}


def head_report(
    subject: Subject,
    items: Sequence,
    means: ImageKVMeans,
    ranked: HeadAttribution,
    features: HeadFeatures,
    taxonomy: Taxonomy,
    *,
    masks: Masks | None = None,
    most: int = 8,
    examples: int = 4,
    confidence: float = 0.95,
    measure: Callable | None = None,
    batch_rows: int | None = None,
) -> HeadReport:
    """Describe the heads that attribution ranks first, each alone.

    Parameters
    ----------
    items : sequence of items
        Items on which nothing was chosen (the confirmation split), of every task.
    means : ImageKVMeans
        What the image's keys and values are replaced by.
    ranked : HeadAttribution
        From discovery items of all tasks together: its first ``most`` heads are described (of layers that hold image keys).
    features : HeadFeatures
        From ``head_features`` on ``items``.
    taxonomy : Taxonomy
    masks : callable or mapping of item ids, optional
        The asked object's pixels, bool ``[height, width]``.
    most, examples : int
        Heads described, and items shown, at most.
    confidence : float
        Of two-sided cluster intervals, each head by itself.
    measure : callable, optional
        Called like ``sweep(items, interventions, metrics=...)`` in place of `vlm_core.sweep` on the subject.
    batch_rows : int, optional
        Items per forward pass.

    Returns
    -------
    HeadReport

    Raises
    ------
    ValueError
        Without items, or where attribution, features and taxonomy are not maps of this subject's heads.

    Notes
    -----
    [ours] Effects are what the untouched subject has and the subject without the head's view of the image has not (positive: lost): of
    accuracy, and of the margin in nats (log-probability of the answer above that of the best other candidate). Where image tokens have no
    place on the image, nothing is said of objects and no heatmap is drawn.
    """
    if not len(items):
        raise ValueError("a head report needs items to measure heads on")
    shape = (subject.anatomy.n_layers, subject.anatomy.n_heads)
    maps = {"attribution": ranked.coefficients.shape, "features": features.per_item.shape[1:3], "taxonomy": taxonomy.category.shape}
    for name, found in maps.items():
        if tuple(found) != shape:
            raise ValueError(f"the {name} describes {found[0]} layers x {found[1]} heads: this subject has {shape[0]} x {shape[1]}")
    items = take(items, range(len(items)))
    attribution = image_map(subject.anatomy, ranked.coefficients)
    heads = top_heads(attribution, min(most, len(subject.image_heads)))
    measure = measure or partial(sweep, subject)
    cuts = {str(head): ReplaceImageKV([head], means, queries="text") for head in heads}
    table = measure(items, {"full": None, **cuts}, metrics=("correct", "margin"))
    correct, margin = wide(table, "correct"), wide(table, "margin")
    clusters = [str(item_field(item, "scene_id")) for item in items]
    tasks = [str(item_field(item, "task")) for item in items]
    shown = choose_examples(tasks, clusters, correct["full"].to_numpy(float), examples)
    looks = _looks(subject, items, heads, masks, shown, batch_rows)
    lost = {
        metric: np.stack([frame["full"].to_numpy(float) - frame[str(head)].to_numpy(float) for head in heads], axis=1)
        for metric, frame in (("accuracy", correct), ("margin", margin))
    }
    effects = {metric: _measured(values, clusters, confidence, metric == "accuracy") for metric, values in lost.items()}
    by_task = {}
    for task in dict.fromkeys(tasks):
        rows = [row for row, one in enumerate(tasks) if one == task]
        some = [clusters[row] for row in rows]
        by_task[task] = {metric: _measured(values[rows], some, confidence, metric == "accuracy") for metric, values in lost.items()}
    picked = tuple(np.transpose(heads))
    seen = dict(zip(features.names, np.moveaxis(features.per_item[:, *picked], -1, 0), strict=True))
    attributed = _measured(ranked.per_item[:, *picked], ranked.clusters, confidence)
    known = {name: _measured(values, features.clusters, confidence) for name, values in seen.items()}
    known |= {name: _measured(values, clusters, confidence) for name, values in looks.features.items()}
    entries = []
    for k, head in enumerate(heads):
        entry = {
            "name": f"{head.layer}.{head.head}",
            "layer": int(head.layer),
            "head": int(head.head),
            "depth": (head.layer + 0.5) / shape[0],
            "category": str(taxonomy.category[head.layer, head.head]),
            "confidence": float(taxonomy.confidence[head.layer, head.head]),
            "attribution": attributed[k],
            "effect": {metric: found[k] for metric, found in effects.items()},
            "by_task": {task: {metric: found[k] for metric, found in one.items()} for task, one in by_task.items()},
            "features": {name: found[k] for name, found in known.items()},
            "kinds": looks.kinds[k],
            "heat": looks.heat[k],
        }
        entry["attends"] = _attends(entry["features"])
        entry["evidence"] = _evidence(entry)
        entry["sentence"] = describe_head(entry)
        entries.append(entry)
    both = sum(all(entry["evidence"].values()) for entry in entries)
    return HeadReport(
        entries,
        [_example(items[index], looks.layouts[index], masks) for index in shown],
        {
            "layers": shape[0],
            "heads_per_layer": shape[1],
            "items": len(items),
            "clusters": len(set(clusters)),
            "tasks": list(dict.fromkeys(tasks)),
            "interval": confidence,
            "attribution_r2": float(ranked.r2),
            "attribution_items": ranked.n_items,
            "choice": f"the {len(heads)} heads of the highest attribution over discovery items of all tasks together",
            "example_choice": "the first item of each task that the untouched subject answers right, each of another scene",
            "places": looks.reason,
            "both": both,
            "shortfall": "" if both >= ENOUGH else _shortfall(entries, both, len(items)),
        },
        [
            {"name": name, "attribution": float(value) if np.isfinite(value := attribution[one["layer"], one["head"]]) else None, **one}
            for name, one in taxonomy.as_dict(features).items()
        ],
    )


def choose_examples(tasks: Sequence[str], scenes: Sequence[str], correct: Sequence, most: int) -> list[int]:
    """The first items answered right: of every task the first, then of every task the second, until there are enough.

    A scene is shown again only when no other is left.

    Parameters
    ----------
    tasks, scenes : sequence of str, one an item
    correct : sequence, one an item
        1 where the untouched subject is right.
    most : int

    Returns
    -------
    list of int
        Positions among the items; fewer than ``most`` where fewer are right.
    """
    left = [index for index, right in enumerate(correct) if right == 1]
    shown: dict[str, int] = {}
    taken: dict[str, int] = {}
    chosen = []
    while left and len(chosen) < most:
        best = min(left, key=lambda index: (shown.get(scenes[index], 0), taken.get(tasks[index], 0), index))
        left.remove(best)
        chosen.append(best)
        shown[scenes[best]] = shown.get(scenes[best], 0) + 1
        taken[tasks[best]] = taken.get(tasks[best], 0) + 1
    return chosen


def _measured(values: np.ndarray, clusters: Sequence[str], confidence: float, bounded: bool = False) -> list[dict]:
    """Per column ``{value, lower, upper}`` of ``[item, column]``; differences of accuracy always have an interval."""
    if bounded and np.isfinite(values).all():
        found = [interval(column, clusters, confidence, bounds=(-1.0, 1.0)) for column in values.T]
        return [_numbers(one.estimate, one.lower, one.upper) for one in found]
    with np.errstate(invalid="ignore"):
        return [_numbers(*one) for one in zip(*interval_each(values, clusters, confidence), strict=True)]


def _numbers(value: float, lower: float, upper: float) -> dict[str, float | None]:
    return {name: float(one) if np.isfinite(one) else None for name, one in (("value", value), ("lower", lower), ("upper", upper))}


@dataclass
class _Looks:
    """Where a few heads look: features ``[item, head]`` by name, shares of kinds of image tokens and heatmaps per head."""

    features: dict[str, np.ndarray]
    kinds: list[dict[str, float]]
    heat: list[dict[str, dict]]
    layouts: dict[int, Layout]
    reason: str


def _looks(subject: Subject, items: list, heads: Sequence[HeadId], masks, shown: list[int], batch_rows: int | None) -> _Looks:
    layouts = [subject.layout(item_field(item, "image"), item_field(item, "prompt")) for item in items]
    reason = next((layout.reason for layout in layouts if layout.reason), "")
    placed = not reason
    in_sequence = placed and all(layout.where == "sequence" for layout in layouts)
    objects = [None if masks is None or reason else np.asarray(mask_of(masks, item)) for item in items]
    where = dict(zip((str(item_field(item, "id")) for item in items), zip(layouts, objects, strict=True), strict=True))
    overlap = in_sequence and masks is not None
    special = delimiters(subject)

    def groups(item, prompt) -> dict[str, np.ndarray]:
        layout, mask = where[str(item_field(item, "id"))]
        shown = {"object": layout.in_sequence(object_tokens(layout, mask), len(prompt))} if overlap else {}
        return special(item, prompt) | shown

    observers = [ImageAttention(QUERIES), AttentionMass(QUERIES, ("image", "text", "special"))]
    observers += [MaskIoU("object", QUERIES, ("mean",))] * overlap
    picked = tuple(np.transpose(heads))
    left_out = (() if placed and masks is not None else ("object_share", "even_share", "object_gain")) + ("iou",) * (not overlap)
    features = {name: np.full((len(items), len(heads)), np.nan) for name in LOOKS if name not in left_out}
    kinds: list[dict[str, list[float]]] = [{} for _ in heads]
    heat: list[dict[str, dict]] = [{} for _ in heads]
    row = 0
    for some in observed(subject, items, observers, None, batch_rows, groups):
        maps, mass = (found[""].numpy()[:, *picked].astype(float) for found in some.values[:2])
        here = slice(row, row + len(maps))
        features["answer_to_image"][here], features["answer_to_special"][here] = mass[..., 0], mass[..., 2]
        features["answer_to_words"][here] = (mass[..., 1] - mass[..., 2]).clip(min=0.0)
        if overlap:
            features["iou"][here] = some.values[2][""].numpy()[:, *picked, 0]
        for of_item in maps:
            layout, mask = layouts[row], objects[row]
            of_item = of_item[:, : len(layout)]
            total = of_item.sum(1, keepdims=True)
            with np.errstate(invalid="ignore", divide="ignore"):
                share = of_item / total
            for k in range(len(heads)):
                if np.isfinite(share[k]).all():
                    for kind in np.unique(layout.kind):
                        kinds[k].setdefault(str(kind), []).append(float(share[k, layout.kind == kind].sum()))
            if mask is not None:
                cover = coverage(layout, mask)
                features["object_share"][row] = share @ cover
                features["even_share"][row] = np.where(np.isfinite(share).all(1), cover.mean(), np.nan)
                features["object_gain"][row] = features["object_share"][row] - features["even_share"][row]
            if row in shown and placed:
                size = _heat_size(layout)
                for k in range(len(heads)):
                    if np.isfinite(share[k]).all():
                        drawn = heatmap(layout, of_item[k], size)
                        heat[k][str(item_field(items[row], "id"))] = {
                            "image": float(total[k, 0]),
                            "object": None if mask is None else float(features["object_share"][row, k]),
                            "values": [[float(f"{value:.3g}") if np.isfinite(value) else None for value in line] for line in drawn],
                        }
            row += 1
    spread = [{kind: float(np.mean(values)) for kind, values in found.items()} for found in kinds]
    return _Looks(features, spread, heat, {index: layouts[index] for index in shown}, reason)


def _heat_size(layout: Layout) -> tuple[int, int]:
    """(height, width) of a heatmap: one pixel a token where tokens are one small grid over the whole image."""
    whole = layout.shape and np.array_equal([*layout.corners.min(0)[:2], *layout.corners.max(0)[2:]], [0, 0, 1, 1])
    return layout.shape if whole and max(layout.shape) <= HEAT_PIXELS else _small(layout.sizes[0], HEAT_PIXELS)


def _small(size: tuple[int, int], most: int) -> tuple[int, int]:
    """(height, width) scaled down to ``most`` on the longer side, never up."""
    scale = min(1.0, most / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def _example(item, layout: Layout, masks) -> dict:
    mask = None
    if masks is not None and not layout.reason:
        whole = np.asarray(mask_of(masks, item)) != 0
        rows, columns = (np.arange(n) * side // n for n, side in zip(_small(whole.shape, MASK_PIXELS), whole.shape, strict=True))
        mask = whole[np.ix_(rows, columns)].astype(int).tolist()
    return {**{name: str(item_field(item, name)) for name in ("id", "task", "prompt", "answer")}, "mask": mask}


def _evidence(entry: Mapping) -> dict[str, bool]:
    """Causal evidence is an effect that its interval shows; one whose interval includes 0 is a measurement, and evidence of nothing."""
    looked = entry["features"]["answer_to_image"]
    return {
        "causal": shown_side(entry["effect"]["margin"]) != 0,
        "diagnostic": looked["value"] is not None and looked["lower"] is not None,
    }


def _shortfall(entries: Sequence[Mapping], both: int, n_items: int) -> str:
    causal, diagnostic = (sum(entry["evidence"][kind] for entry in entries) for kind in ("causal", "diagnostic"))
    return (
        f"{both} of {len(entries)} heads have both kinds of evidence, fewer than {ENOUGH}: {causal} an effect on the margin whose interval excludes "
        f"0, {diagnostic} attention on the image that was measured, on {n_items} items"
    )


def _attends(features: Mapping[str, Mapping]) -> list[dict]:
    """Where the attention of the last token goes, in parts that sum to 1, the largest first."""
    image, special, words = (features[name]["value"] for name in ("answer_to_image", "answer_to_special", "answer_to_words"))
    share = features.get("object_share", {}).get("value")
    parts = {"special tokens and delimiters": special, "words": words}
    if image is not None and share is not None:
        parts |= {"the asked object": image * share, "the rest of the image": image * (1 - share)}
    else:
        parts["the image"] = image
    return [{"on": name, "share": value} for name, value in sorted(parts.items(), key=lambda one: -(one[1] or 0.0)) if value is not None]
