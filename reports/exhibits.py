"""From measured tables to the tables and figures a reader sees: one function an exhibit, each left with a test's ``evidence``.

Nothing is measured here and no verdict depends on it; intervals drawn in figures come from ``vlm_core.stats.interval``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from reports.pictures import png
from vlm_core.stats import interval

SHOWN_PIXELS = 256  # of a shown image's longer side


def mean_with_interval(values, clusters, seeds=None) -> dict:
    """``{value, lower, upper}``: accuracy over items (and seeds) and its 95 % interval over clusters (crossed with seeds)."""
    found = interval(np.asarray(values, dtype=float), np.asarray(clusters), seeds=seeds, bounds=(0.0, 1.0))
    return {"value": found.estimate, "lower": found.lower, "upper": found.upper}


def head_ablation(evidence, task: str, conditions: dict[str, tuple[str, pd.Series]], clusters, heads, chance: float) -> None:
    """Table 1's rows and bars for one task.

    Parameters
    ----------
    conditions : dict
        Label → (role, correctness per item); roles as in the bar figure (``baseline``, ``targeted``, ``random``, ``floor``).
    clusters : array, one per item
    heads : sequence of heads
        The targeted ones.
    chance : float
    """
    bars = [{"label": label, "role": role, **mean_with_interval(values, clusters)} for label, (role, values) in conditions.items()]
    full = bars[0]["value"]
    evidence.table(
        "head-ablation.csv",
        pd.DataFrame(
            {
                "task": task,
                "condition": [bar["label"] for bar in bars],
                "heads_removed": [{"targeted": len(heads), "random": len(heads)}.get(bar["role"]) for bar in bars],
                "accuracy": [bar["value"] for bar in bars],
                "lower": [bar["lower"] for bar in bars],
                "upper": [bar["upper"] for bar in bars],
                "drop": [full - bar["value"] for bar in bars],
            }
        ),
    )
    evidence.figure(
        "accuracy_bars",
        {"bars": bars, "chance": chance},
        title=f"{task}: accuracy when heads lose the image",
        caption=f"Confirmation items, 95 % cluster intervals. The targeted heads are {', '.join(map(str, heads))} (layer.head).",
        alt=f"Bars of accuracy on {task}: " + "; ".join(f"{bar['label']} {bar['value']:.2f}" for bar in bars),
    )


def heads_seeing(values) -> str:
    """For the caption of a head map: how many heads see the image, where not all do. ``values``: NaN or None for those that do not."""
    values = np.asarray(values, dtype=float)
    seeing = int(np.isfinite(values).sum())
    return f" {seeing} of {values.size} heads see the image." if seeing < values.size else ""


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
