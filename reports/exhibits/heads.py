"""Exhibits of heads: where they look, how much each carries, what they are for, and when they are used."""

from __future__ import annotations

import numpy as np
import pandas as pd

from reports.exhibits.shared import heads_seeing
from reports.pictures import png

AGREEMENTS = {
    "scenes": "two halves of the scenes, mean over random ways to part them",
    "wordings": "two wordings of the same few questions about the same images (image tokens see neither, in a causal order)",
}
LETTERS = {"cross-modal grounding": "G", "vision summarisation": "V", "instruction following": "I", "routing": "R"}
SHOWN_PIXELS = 256  # of a shown image's longer side


def head_map(evidence, task: str, coefficients, heads, r2: float) -> None:
    """The layers × heads map of attribution, targeted heads marked."""
    coefficients = np.asarray(coefficients)
    layers, width = coefficients.shape
    chosen = {tuple(head) for head in heads}
    evidence.figure(
        "head_map",
        {
            "values": coefficients.tolist(),
            "marks": [{"layer": layer, "head": head, "label": ""} for layer, head in sorted(chosen)],
            "value_label": "attribution (logits)",
        },
        title=f"{task}: which heads carry the image",
        caption=f"Attribution on discovery items: logits of the right answer gained when a head sees the image. R² on unseen masks {r2:.2f}."
        + heads_seeing(coefficients),
        alt=f"Map of {layers} layers by {width} heads; highest attribution at {', '.join(f'{a}.{b}' for a, b in sorted(chosen))}.",
    )


def null_draws(evidence, task: str, draws, observed: float, p_value: float) -> None:
    """Histogram of the random head sets' mean drops with the targeted one's."""
    evidence.figure(
        "null_histogram",
        {"draws": [float(x) for x in draws], "observed": float(observed), "p_value": p_value, "x_label": "accuracy lost"},
        title=f"{task}: targeted heads against {len(draws)} layer-matched random sets",
        caption="Each count is one random set of heads from the same layers in the same numbers; the line is the targeted set.",
        alt=f"Histogram of accuracy lost by random heads; the targeted heads lose {observed:.2f}, Monte-Carlo p {p_value:.3g}.",
    )


def attention_overlay(evidence, item: dict, heat, mask, title: str) -> None:
    """One image with attention over it and the asked object's outline.

    Parameters
    ----------
    item : dict
        With ``image``, ``prompt`` and ``answer``.
    heat : float array ``[height, width]``
        Attention over the image's pixels, at any resolution up to 256 a side; NaN where the subject saw nothing
        (``vlm_core.heatmap`` draws it, whatever the subject cuts images into).
    mask : bool array ``[height, width]``
        The asked object's pixels, at any resolution.
    title : str
    """
    heat, mask = np.asarray(heat, dtype=float), np.asarray(mask, dtype=bool)
    if heat.ndim != 2 or max(heat.shape) > SHOWN_PIXELS:
        raise ValueError(f"a heatmap is [height, width] of at most {SHOWN_PIXELS} pixels a side, got {heat.shape}: draw it smaller")
    image = item["image"]
    scale = SHOWN_PIXELS / max(image.size)
    shown = image.resize(tuple(max(1, round(side * scale)) for side in image.size), 0)
    values = [[float(f"{value:.4g}") for value in row] for row in heat.tolist()]
    evidence.figure(
        "attention_overlay",
        {
            "image": png(shown),
            "values": values,
            "mask": mask.astype(int).tolist(),
            "prompt": item["prompt"],
            "answer": item["answer"],
        },
        title=title,
        caption="Attention from the last prompt token to the image, summed over the targeted heads. The outline marks the asked object.",
        alt=f"An image with attention from the targeted heads, for the question: {item['prompt']} (answered {item['answer']}).",
    )


def head_features(evidence, tables: dict[str, pd.DataFrame], notes: dict[str, str]) -> None:
    """``head-features.csv``: one row a head and task, every feature with its interval; ``head-features.json``: what each is.

    ``tables``: task (``all`` for all of them) → one row a head.
    """
    frames = [table.assign(task=task)[["task", *table.columns]] for task, table in tables.items()]
    evidence.table("head-features.csv", pd.concat(frames, ignore_index=True))
    evidence.artifact_json("head-features.json", notes)


def taxonomy(evidence, heads: dict[str, dict], clusters, least: float, stability: dict[str, tuple]) -> None:
    """``head-taxonomy.json`` and the map of heads by category.

    Parameters
    ----------
    heads : dict
        ``"layer.head"`` → ``layer, head, category, confidence, drops, evidence`` (`vlm_core.heads.taxonomy.Taxonomy.as_dict`).
    clusters : vlm_core.heads.taxonomy.HeadClusters
    least : float
        Share of the margin from which a path counts.
    stability : dict
        What two measurements differ in (``AGREEMENTS``) → `vlm_core.heads.taxonomy.SameCategory`, feature → rank correlation over heads between
        the two, and what else there is to say of them (how many questions, for example).
    """
    evidence.artifact_json(
        "head-taxonomy.json",
        {
            "heads": {name: {**one, "cluster": int(label)} for (name, one), label in zip(heads.items(), clusters.labels, strict=True)},
            "rule": f"the path whose cutting costs most of the answer's margin, from {least:g} of it on",
            "stability": {
                name: {
                    "between": AGREEMENTS[name],
                    **about,
                    "heads_with_the_same_category": same.share if np.isfinite(same.share) else None,
                    "by_chance": same.by_chance if np.isfinite(same.by_chance) else None,
                    "rank_correlation_of_features_over_heads": {one: value if np.isfinite(value) else None for one, value in features.items()},
                }
                for name, (same, features, about) in stability.items()
            },
            "clustering": {
                "k": clusters.k,
                "silhouette": clusters.silhouette,
                "silhouette_by_k": {str(k): value for k, value in clusters.by_k.items()},
                "silhouette_permuted_features": clusters.permuted.tolist(),
                "p_value": clusters.p_value,
            },
        },
    )
    shape = tuple(1 + max(one[axis] for one in heads.values()) for axis in ("layer", "head"))
    costliest, grounding, marks = np.zeros(shape), np.full(shape, np.nan), []
    for one in heads.values():
        grounding[one["layer"], one["head"]] = one["drops"]["cross-modal grounding"]["drop"]
        costliest[one["layer"], one["head"]] = max(path["drop"] for path in one["drops"].values() if path["drop"] is not None)
        if one["category"] in LETTERS:
            marks.append({"layer": one["layer"], "head": one["head"], "label": LETTERS[one["category"]]})
    counts = {name: sum(one["category"] == name for one in heads.values()) for name in LETTERS}
    said = ", ".join(f"{LETTERS[name]} {name} ({n})" for name, n in counts.items())
    evidence.figure(
        "head_map",
        {"values": costliest.tolist(), "marks": marks, "value_label": "margin lost (share)"},
        title="What heads are for: the path of each whose cutting costs most",
        caption=f"Discovery items of all tasks. {said}; the others cost less than {least:g} of the margin whatever path is cut. "
        + " ".join(
            f"Between {AGREEMENTS[name]}, {_percent(same.share)} of heads have the same category ({_percent(same.by_chance)} by chance), and features "
            f"of heads correlate by {_range(features.values())} (Spearman, over heads)."
            for name, (same, features, _) in stability.items()
        )
        + heads_seeing(grounding),
        alt=f"Map of {shape[0]} layers by {shape[1]} heads by category: {said}.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if np.isfinite(share) else "an unknown share"


def _range(values) -> str:
    known = [value for value in values if np.isfinite(value)]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "an unknown amount"


def probe(evidence, what: str, told, rows: str) -> None:
    """Held-out accuracy of a linear probe against probes fitted to shuffled labels.

    ``told``: `vlm_core.heads.probing.Probe`; ``rows``: what was asked, for the caption. Nothing is drawn where nothing was asked.
    """
    if not told.correct.size:
        return
    evidence.figure(
        "null_histogram",
        {
            "draws": told.control_accuracy.tolist(),
            "observed": told.accuracy,
            "observed_label": "probe",
            "p_value": told.p_value,
            "x_label": "balanced accuracy on held-out rows",
        },
        title=f"A linear probe for {what}, against {told.control_accuracy.size} probes fitted to shuffled labels",
        caption=f"{rows}. Balanced over {len(told.classes)} classes; each count is one probe fitted to shuffled labels.",
        alt=f"Histogram of the accuracy of probes fitted to shuffled labels; the probe reaches {told.accuracy:.2f}.",
    )


def shuffled_answers(evidence, found, tasks: dict[str, int]) -> None:
    """How well answers agree with the use of heads, against answers shuffled within tasks.

    Parameters
    ----------
    found : vlm_core.heads.semantics.LabelAgreement
        Of answers, within tasks.
    tasks : dict
        Task → items.
    """
    said = ", ".join(f"{name} {value:.2f}" for name, value in found.agreement.items() if name != "semantic")
    evidence.figure(
        "null_histogram",
        {
            "draws": found.shuffled.tolist(),
            "observed": found.agreement["semantic"],
            "observed_label": "answers",
            "p_value": found.p_shuffled,
            "x_label": "mean silhouette among items of one task",
        },
        title="Items with one answer use the same heads, against answers shuffled within tasks",
        caption=f"{sum(tasks.values())} discovery items of {len(tasks)} tasks, each compared with those of its own task, in cosine distance of their head "
        f"attributions; each count is one shuffle. Groups of like looks in the same tasks: {said}.",
        alt=f"Histogram of the agreement of {found.shuffled.size} shuffles of answers with the use of heads; the answers reach "
        f"{found.agreement['semantic']:.2f}.",
    )


def usage_map(evidence, places, groups, items, agreement: dict[str, float], p_value: float) -> None:
    """Which heads items use, in two dimensions, coloured by task.

    Parameters
    ----------
    places : [item, 2]
    groups, items : sequence of str, one an item
    agreement : dict
        Labels → mean silhouette.
    p_value : float
    """
    said = ", ".join(f"{name} {value:.2f}" for name, value in agreement.items())
    evidence.figure(
        "scatter",
        {
            "points": [
                {"x": float(x), "y": float(y), "group": group, "tip": item}
                for (x, y), group, item in zip(np.asarray(places, dtype=float), groups, items, strict=True)
            ],
            "x_label": "t-SNE, first axis (no unit)",
            "y_label": "second axis",
        },
        title="Items that use the same heads lie together",
        caption=f"{len(items)} discovery items, t-SNE of their head attributions in cosine distance, one point an item. Agreement of "
        f"labels with the use of heads (mean silhouette): {said}; permutation p {p_value:.3g}.",
        alt=f"Scatter of {len(items)} items by which heads they use, coloured by {len(set(groups))} groups. Agreement by labels: {said}.",
    )
