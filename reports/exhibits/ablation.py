"""Exhibits of H1 about taking heads away and ranking them: one function an exhibit, each left with a test's ``evidence``."""

from __future__ import annotations

import numpy as np
import pandas as pd

from reports.exhibits.shared import heads_seeing, mean_with_interval
from vlm_core.heads.curves import curves
from vlm_core.heads.grid import grid_table

ORDER = ("attribution", "single-head ablation", "gradient × gate", "attention mass", "random")
_BAR_ROLES = {"none": "baseline", "top": "targeted", "layer-matched": "random", "random": "random"}


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


def faithfulness_curves(evidence, task: str, recovered: pd.DataFrame, n_heads: int) -> None:
    """Rows of ``faithfulness-curves.csv`` and the two figures over numbers of heads, one line a ranking.

    Parameters
    ----------
    recovered : DataFrame
        From `vlm_core.heads.curves.recovery`, of the task.
    n_heads : int
        Heads of the subject that see the image.
    """
    found = curves(recovered).assign(task=task)
    evidence.table("faithfulness-curves.csv", found.assign(share_of_heads=found["heads"] / n_heads))
    words = {
        "faithfulness": ("with only the first heads seeing the image", "The sooner a line reaches 1, the better its ranking finds heads that are enough."),
        "completeness": ("with all but the first heads seeing the image", "The sooner a line reaches 0, the less is left without the heads it names first."),
    }
    for share, (what, reading) in words.items():
        series = []
        for ranking in ORDER:
            rows = found[(found["ranking"] == ranking) & (found["share"] == share)]
            points = [
                {"x": row.heads / n_heads, "y": row.value, "lower": _known(row.lower), "upper": _known(row.upper)} for row in rows.itertuples()
            ]
            series.append({"name": ranking, "role": "random" if ranking == "random" else "targeted", "points": points})
        evidence.figure(
            "keep_curves",
            {"series": series, "x_label": "share of heads", "y_label": share},
            title=f"{task}: share of the image's effect left {what}",
            caption=f"{recovered['item'].nunique()} confirmation items; margins, "
            f"95 % cluster bands; rankings from discovery items. {reading}",
            alt=f"Lines of {share} against the share of heads: "
            + "; ".join(f"{one['name']} {one['points'][0]['y']:.2f} to {one['points'][-1]['y']:.2f}" for one in series),
        )


def ablation_grid(evidence, rows: pd.DataFrame, task: str, chance: float) -> None:
    """Rows of ``head-ablation.csv`` for every way to take heads away, rows of Table 1 and two figures.

    Bars against random heads, for the number of heads at which most is measured, and their rows of Table 1; lines of the top heads over numbers of heads.
    """
    table = grid_table(rows)
    evidence.table(
        "head-ablation.csv",
        table.assign(condition=table["mode"] + ", " + table["target"] + " " + table["heads"].astype(str)).rename(columns={"heads": "heads_removed"}),
    )
    removed = table[table["mode"] != "none"]
    measured = removed.groupby("heads").size()
    shared = int(measured[measured == measured.max()].index.max())
    chosen = pd.concat([table[table["mode"] == "none"], removed[removed["heads"] == shared]])
    bars = [
        {
            "label": "untouched" if row.mode == "none" else f"{row.mode}, {row.target}",
            "role": _BAR_ROLES["none" if row.mode == "none" else row.target],
            "value": row.accuracy, "lower": row.lower, "upper": row.upper,
        }
        for row in chosen.itertuples()
    ]  # fmt: skip
    evidence.figure(
        "accuracy_bars",
        {"bars": bars, "chance": chance},
        title=f"{task}: {shared} heads taken away in several ways",
        caption=f"{int(chosen['items'].iloc[0])} confirmation items, 95 % cluster intervals. Blue: top heads by attribution; grey: random ones, of the same layers "
        "and of any. Placebo: outputs keep their length and point in a random direction, so what they said is gone as well; no verdict rests on it.",
        alt=f"Bars of accuracy on {task}: " + "; ".join(f"{bar['label']} {bar['value']:.2f}" for bar in bars),
    )
    _table_1(evidence, chosen, task, shared)
    _grid_lines(evidence, table, task)


_TARGETS = {"top": "top heads", "layer-matched": "random, same layers", "random": "random, any layer"}
_IN_TABLE_1 = ("image-KV", "zero")


def _table_1(evidence, chosen: pd.DataFrame, task: str, heads: int) -> None:
    """Rows of Table 1: the untouched subject beside targeted and random heads taken away; the page joins those of all tasks."""
    found = chosen.set_index(["mode", "target"])
    untouched = _cell(found[found.index.get_level_values("mode") == "none"].iloc[0])

    def row(mode):
        cells = [_cell(found.loc[(mode, target)]) if (mode, target) in found.index else {"text": "–", "interval": ""} for target in _TARGETS]
        return {"label": f"{task}, {mode}", "cells": [{"text": str(heads), "interval": ""}, untouched, *cells]}

    rows = [row(mode) for mode in _IN_TABLE_1 if mode in found.index.get_level_values("mode")]
    if rows:
        evidence.figure(
            "table",
            {"columns": ["task and what is taken away", "heads", "untouched", *_TARGETS.values()], "rows": rows},
            title="Table 1: accuracy with targeted and with random heads taken away",
            caption="Confirmation items, 95 % cluster intervals. image-KV: the head no longer sees the image; zero: its whole output is gone. "
            "More ways, and other numbers of heads, are in head-ablation.csv.",
            alt="; ".join(f"{one['label']}: " + ", ".join(f"{cell['text']}" for cell in one["cells"][1:]) for one in rows),
        )


def _cell(row) -> dict:
    return {"text": f"{row.accuracy:.2f}", "interval": f"[{row.lower:.2f}, {row.upper:.2f}]"}


def _grid_lines(evidence, table: pd.DataFrame, task: str) -> None:
    """Accuracy over numbers of heads: the top heads taken away in every way, and random heads of the same layers that lose the image."""
    top = table[(table["mode"] != "none") & (table["target"] == "top")]
    if top["heads"].nunique() < 2:
        return
    untouched = table[table["mode"] == "none"]
    lines = {mode: rows for mode, rows in top.groupby("mode", sort=False)}
    lines["image-KV, random"] = table[(table["mode"] == "image-KV") & (table["target"] == "layer-matched")]
    series = []
    for name, rows in lines.items():
        if rows.empty:
            continue
        points = [{"x": int(row.heads), "y": row.accuracy, "lower": row.lower, "upper": row.upper} for row in pd.concat([untouched, rows]).itertuples()]
        series.append({"name": name, "role": "random" if "random" in name else "targeted", "points": points})
    evidence.figure(
        "keep_curves",
        {"series": series, "x_label": "heads taken away", "y_label": "accuracy"},
        title=f"{task}: more and more heads taken away",
        caption=f"{int(untouched['items'].iloc[0])} confirmation items, 95 % cluster bands. Top heads by attribution, taken away in five ways: the image's keys "
        "and values become their mean (image-KV), the output becomes zero, its mean, another image's (resample), or turns into a random direction "
        "(placebo). Grey: random heads of the same layers lose the image.",
        alt=f"Lines of accuracy on {task} against the number of heads taken away: "
        + "; ".join(f"{one['name']} {one['points'][0]['y']:.2f} to {one['points'][-1]['y']:.2f}" for one in series),
    )


def single_head_costs(evidence, task: str, measured, tolerance: float) -> None:
    """Rows of ``single-heads.csv``, one a head, and the map of the share of items that a head changes by ``tolerance`` or more."""
    known = np.isfinite(measured.cost).all(0)
    changed = np.where(known, (np.abs(measured.cost) >= tolerance * np.abs(measured.untouched)[:, None, None]).mean(0), np.nan)
    rows = [
        {"task": task, "layer": layer, "head": head, "logit_lost": float(lost), "share_changed": float(changed[layer, head])}
        for (layer, head), lost in np.ndenumerate(measured.cost.mean(0))
    ]
    evidence.table("single-heads.csv", pd.DataFrame(rows))
    layer, head = np.unravel_index(int(np.nanargmax(changed)), changed.shape)
    evidence.figure(
        "head_map",
        {"values": changed.tolist(), "value_label": "share of items changed"},
        title=f"{task}: what one head alone changes",
        caption=f"Share of {len(measured.items)} confirmation items whose answer logit changes by {100 * tolerance:g} % of its size or more when "
        "one head loses the image." + heads_seeing(changed),
        alt=f"Map of layers by heads; the largest share is {np.nanmax(changed):.2f}, of head {layer}.{head}.",
    )


def depth_profile(evidence, attributions: dict) -> None:
    """Share of positive attribution in every layer, task by task, and its mean over tasks."""
    if not attributions:
        return
    per_task = {task: _by_layer(one.coefficients) for task, one in attributions.items()}
    mean = np.mean(list(per_task.values()), axis=0)
    points = [{"x": layer, "y": float(value)} for layer, value in enumerate(mean) if np.isfinite(value)]
    evidence.table(
        "attribution-by-layer.csv",
        pd.DataFrame([{"task": task, "layer": layer, "share": float(value)} for task, row in per_task.items() for layer, value in enumerate(row)]),
    )
    evidence.figure(
        "trend_line",
        {"points": points, "x_label": "layer", "y_label": "share of attribution", "reference": 1 / len(points), "reference_label": "even"},
        title="Where attribution lies",
        caption=f"Share of positive attribution in each layer on discovery items, mean over {', '.join(per_task)}.",
        alt="Share of attribution by layer: " + ", ".join(f"{point['x']}: {point['y']:.2f}" for point in points),
    )


def attention_against_attribution(evidence, attributions: dict, masses: dict) -> None:
    """``attention-and-attribution.csv``: both scores of every head, task by task."""
    rows = [
        {"task": task, "layer": layer, "head": head, "attribution": float(one.coefficients[layer, head]), "attention_mass": float(mass[layer, head])}
        for task, one in attributions.items()
        for mass in (masses[task].mean(0),)
        for layer, head in np.ndindex(*mass.shape)
    ]
    if rows:
        evidence.table("attention-and-attribution.csv", pd.DataFrame(rows))


def _by_layer(coefficients: np.ndarray) -> np.ndarray:
    positive = np.clip(coefficients, 0.0, None).sum(1)  # NaN where a layer sees no image
    whole = np.nansum(positive)
    return positive / whole if whole > 0 else positive + 1 / np.isfinite(positive).sum()


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
