"""Tables and figures of where information flows: patching, windows of cut edges, arrivals, the background."""

from __future__ import annotations

import numpy as np
import pandas as pd

from reports.exhibits.shared import mean_with_interval
from vlm_core.stats import estimate_statistic, interval

_DRAWS = 2000  # of an interval that only a figure shows


def share_with_interval(statistic, clusters) -> dict:
    """``{value, lower, upper}``: a statistic of weights of clusters and its 95 % interval, without ends where it never varies."""
    estimate = estimate_statistic(statistic, clusters, n_resamples=_DRAWS)
    if estimate is None:
        return {"value": float(statistic(np.ones((1, len(set(clusters)))))[0]), "lower": None, "upper": None}
    lower, upper = estimate.bounds(0.025)
    return {"value": estimate.value, "lower": lower, "upper": upper}


def patching_curves(evidence, corruption: str, patching, meaning: dict[str, str]) -> None:
    """``patching-curves.csv`` and one figure a direction: share of the clean run's advantage by layer and place.

    Parameters
    ----------
    patching : vlm_core.tracing.patching.Patching
    meaning : dict
        Direction → what a share of 1 means.
    """
    for direction, said in meaning.items():
        shares, rows, series = patching.shares(direction), [], []
        for p, place in enumerate(patching.places):
            points = []
            for k, layer in enumerate(patching.layers):
                found = share_with_interval(lambda weights, k=k, p=p: shares(weights)[:, k, p], patching.clusters)
                rows.append({"corruption": corruption, "direction": direction, "layer": layer, "place": place, **found})
                points.append({"x": layer, "y": found["value"], "lower": found["lower"], "upper": found["upper"]})
            if place != "all":
                series.append({"name": place, "points": points})
        evidence.table("patching-curves.csv", pd.DataFrame(rows).rename(columns={"value": "share"}))
        evidence.figure(
            "keep_curves",
            {"series": series, "in_order": True, "x_label": "layer whose input is patched", "y_label": "share of the logit difference"},
            title=f"{corruption}: what is {direction} for the answer",
            caption=f"{len(patching.items)} confirmation items, 95 % cluster intervals. {said} Places of the prompt, one line each.",
            alt=f"Lines by layer of how much of the logit difference is moved by patching, {direction}: "
            + "; ".join(f"{one['name']} from {one['points'][0]['y']:.2f} to {one['points'][-1]['y']:.2f}" for one in series),
        )


_HEADS_AT = {
    "object": "the object's image tokens",
    "background": "the other image tokens",
    "image": "all image tokens",
    "context": "all text but the last token",
    "last": "the last token",
    "all": "all tokens",
}


def patching_heads(evidence, corruption: str, patching, meaning: dict[str, str]) -> None:
    """``patching-heads.csv`` and, for each direction, one map of layers by heads a place; each says of how many items it is."""
    n_items = len(patching.items)
    for direction, said in meaning.items():
        shares = patching.share(direction, "heads")
        for k, place in enumerate(patching.head_places):
            values = shares[..., k]
            cells = list(np.ndindex(values.shape))
            evidence.table(
                "patching-heads.csv",
                pd.DataFrame(
                    {
                        "corruption": corruption,
                        "direction": direction,
                        "place": place,
                        "items": n_items,
                        "layer": [layer for layer, _ in cells],
                        "head": [head for _, head in cells],
                        "share": [float(values[cell]) for cell in cells],
                    }
                ),
            )
            top = max(cells, key=lambda cell: values[cell])
            evidence.figure(
                "head_map",
                {"values": values.tolist(), "value_label": "share of the logit difference"},
                title=f"{corruption}: single heads that are {direction} at {_HEADS_AT[place]} (n = {n_items})",
                caption=f"{n_items} confirmation items, one head's outputs patched at {_HEADS_AT[place]}. {said}",
                alt=f"Map of {values.shape[0]} layers by {values.shape[1]} heads at {_HEADS_AT[place]}; most at {top[0]}.{top[1]}, {values[top]:.2f}.",
            )


def window_map(evidence, losses, chosen: tuple[str, str]) -> None:
    """``knockout-windows.csv`` and the map of accuracy lost by edge and window of layers, with intervals."""
    names = [f"{window} {_layers(layers)}" for window, layers in losses.windows.items()]
    rows, cells = [], {"value": [], "lower": [], "upper": []}
    for edge in losses.edges:
        found = [_lost(losses, edge, window, "correct") for window in losses.windows]
        for key, matrix in cells.items():
            matrix.append([one[key] for one in found])
        for window, one in zip(losses.windows, found, strict=True):
            margin = _lost(losses, edge, window, "margin")
            rows.append(
                {
                    "edge": edge, "window": window, "layers": _layers(losses.windows[window]), "items": len(losses.items),
                    "accuracy_lost": one["value"], "lower": one["lower"], "upper": one["upper"],
                    "margin_lost": margin["value"], "margin_lower": margin["lower"], "margin_upper": margin["upper"],
                }
            )  # fmt: skip
    evidence.table("knockout-windows.csv", pd.DataFrame(rows))
    evidence.figure(
        "layer_heatmap",
        {
            "rows": list(losses.edges), "columns": names, "values": cells["value"], "lower": cells["lower"], "upper": cells["upper"],
            "row_label": "edge", "column_label": "window of layers", "value_label": "accuracy lost",
        },
        title="Accuracy lost when edges are cut in a window of layers",
        caption=f"{len(losses.items)} confirmation items; point at a cell for its 95 % cluster interval. "
        f"Chosen on discovery: {', '.join(chosen)}.",
        alt="Map of accuracy lost by edge and window: "
        + "; ".join(f"{row['edge']} in {row['window']} {row['accuracy_lost']:.2f}" for row in rows if row["accuracy_lost"] >= 0.05),
    )  # fmt: skip


def _lost(losses, edge: str, window: str, metric: str) -> dict:
    found = interval(losses.at(edge, window, metric), losses.clusters)
    ends = [None if np.isnan(end) else end for end in (found.lower, found.upper)]
    return {"value": found.estimate, "lower": ends[0], "upper": ends[1]}


def _layers(layers) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def arrival_curves(evidence, arrivals) -> None:
    """``arrival-curves.csv`` and the share of each source that has not arrived before a layer."""
    rows, series = [], []
    for route in arrivals.lost:
        points = []
        for layer in range(arrivals.n_layers):
            found = share_with_interval(lambda weights, r=route, k=layer: arrivals.curve(r, weights)[:, k], arrivals.clusters)
            rows.append({"route": route, "layer": layer, "margin_lost": float(arrivals.lost[route][:, layer].mean()), **found})
            points.append({"x": layer, "y": found["value"], "lower": found["lower"], "upper": found["upper"]})
        series.append({"name": route, "points": points})
    evidence.table("arrival-curves.csv", pd.DataFrame(rows).rename(columns={"value": "share_not_arrived"}))
    evidence.figure(
        "keep_curves",
        {"series": series, "in_order": True, "x_label": "layer from which on edges are cut", "y_label": "share not arrived before"},
        title="When text and image arrive where the answer is read",
        caption=f"{len(arrivals.items)} confirmation items, 95 % cluster bands. What cutting edges from a layer on costs, of what "
        "cutting all of them does.",
        alt="Falling lines by layer: "
        + "; ".join(f"{one['name']} " + ", ".join(format(point["y"], ".2f") for point in one["points"]) for one in series),
    )


def background(evidence, found, conditions: dict[str, str]) -> None:
    """``background.csv`` by task and bars over all: accuracy under every condition."""
    rows = [
        {"task": task, "condition": name, "items": len(items), "accuracy": float(items[name].mean()), "what": what}
        for task, items in found.correct.groupby("task", sort=False)
        for name, what in conditions.items()
    ]
    evidence.table("background.csv", pd.DataFrame(rows))
    roles = {"full": "baseline", "nothing": "floor", "as many others": "random"}
    bars = [
        {
            "label": name,
            "role": "random" if name.startswith("other") else roles.get(name, "targeted"),
            **mean_with_interval(found.correct[name], found.clusters),
        }
        for name in conditions
    ]
    evidence.figure(
        "accuracy_bars",
        {"bars": bars},
        title="What is left when text cannot see the object",
        caption=f"{len(found.correct)} confirmation items, 95 % cluster intervals. "
        + "; ".join(f"{name}: {what}" for name, what in conditions.items())
        + ".",
        alt="Bars of accuracy: " + "; ".join(f"{bar['label']} {bar['value']:.2f}" for bar in bars),
    )
