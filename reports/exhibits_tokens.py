"""Tables and figures of fewer visual tokens: curves, sensitivity by layer, the front of accuracy against time, the recipe.

Nothing is measured here and no verdict depends on it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from reports.exhibits import mean_with_interval

REFERENCE_POLICIES = ("random", "stride", "pooling")  # drawn in grey: what an informed policy has to beat


def drop_curves(evidence, table: pd.DataFrame, task: str, layer: int, shown: int = 4) -> None:
    """``token-drop-curves.csv`` and Figure 1: keep fraction against accuracy, one line a policy.

    Every policy is in the table; drawn are the references and the ``shown`` others that are best over all fractions.
    """
    rows = table[(table["layer"] == layer) & (table["keep"] > 0) & (table["task"] == task)]
    series, out = [], []
    for policy in rows.loc[rows["keep"] < 1, "policy"].drop_duplicates():
        points = []
        # Everything kept is the same for all of them, and measured once.
        for keep, cell in rows[(rows["policy"] == policy) | (rows["keep"] == 1)].drop_duplicates(["item", "keep"]).groupby("keep"):
            found = mean_with_interval(cell["correct"], cell["cluster"])
            points.append({"x": float(keep), "y": found["value"], "lower": found["lower"], "upper": found["upper"]})
            out.append({"task": task, "layer": layer, "policy": policy, "keep": float(keep), "items": len(cell), **found})
        series.append({"name": policy, "role": "random" if policy in REFERENCE_POLICIES else "targeted", "points": points})
    evidence.table("token-drop-curves.csv", pd.DataFrame(out).rename(columns={"value": "accuracy"}))
    others = sorted((one for one in series if one["role"] == "targeted"), key=lambda one: -sum(point["y"] for point in one["points"]))
    drawn = [one for one in series if one["role"] == "random"] + others[:shown]
    left_out = f" Of {len(others)} policies that look at the tokens, the best {shown} are drawn; all are in the table." if len(others) > shown else ""
    evidence.figure(
        "keep_curves",
        {"series": drawn, "x_label": "share of visual tokens kept", "y_label": "accuracy"},
        title=f"{task}: accuracy against visual tokens kept from layer {layer} on",
        caption=f"Discovery items, 95 % cluster bands. Grey: policies that know nothing of the tokens, which others have to beat.{left_out}",
        alt=f"Lines of accuracy on {task} against the share of tokens kept, one line a policy: " + ", ".join(one["name"] for one in drawn),
    )


def layer_sensitivity(evidence, table: pd.DataFrame, task: str, policy: str, margin: float) -> None:
    """``layer-sensitivity.csv`` and Figure 2: accuracy lost by layer and keep fraction, with the horizon drawn in.

    The horizon is the first layer from which dropping every token costs less than ``margin`` at every later layer too.
    """
    full = table[table["keep"] == 1].drop_duplicates("item")["correct"].mean()
    rows = table[((table["policy"] == policy) | (table["keep"].isin((0, 1)))) & (table["keep"] < 1)]
    loss = full - rows.groupby(["layer", "keep"])["correct"].mean().unstack("keep").sort_index()
    none_kept = loss[0.0] if 0.0 in loss else pd.Series(dtype=float)
    fine = [layer for layer in none_kept.index if (none_kept.loc[layer:] < margin).all()]
    evidence.table(
        "layer-sensitivity.csv",
        loss.stack()
        .rename("accuracy_lost")
        .reset_index()
        .assign(task=task, policy=policy)[["task", "policy", "layer", "keep", "accuracy_lost"]],
    )
    evidence.figure(
        "layer_heatmap",
        {
            "rows": [int(layer) for layer in loss.index],
            "columns": [float(keep) for keep in loss.columns],
            "values": [[None if np.isnan(x) else float(x) for x in row] for row in loss.to_numpy()],
            "horizon": int(fine[0]) if fine else None,
            "value_label": "accuracy lost",
        },
        title=f"{task}: accuracy lost by layer and share of tokens kept",
        caption=f"Discovery items, policy {policy}. Horizon: the first layer from which all tokens can go for less than {margin:g}.",
        alt=f"Heat map of accuracy lost on {task} by layer and share kept"
        + (f"; horizon at layer {fine[0]}." if fine else "; no horizon."),
    )


def layer_trend(evidence, task: str, accuracies: pd.DataFrame, clusters, full: float) -> None:
    """Accuracy when every visual token goes from a layer on, against that layer.

    ``accuracies``: one row an item, one column a layer.
    """
    points = []
    for layer in accuracies.columns:
        found = mean_with_interval(accuracies[layer], clusters)
        points.append({"x": int(layer), "y": found["value"], "lower": found["lower"], "upper": found["upper"]})
    evidence.figure(
        "trend_line",
        {"points": points, "reference": full, "reference_label": "all tokens", "x_label": "layer from which all visual tokens are gone"},
        title=f"{task}: the later the tokens go, the less they are missed",
        caption="Confirmation items, 95 % cluster intervals.",
        alt=f"Accuracy on {task} when all visual tokens go from layer: " + ", ".join(f"{p['x']}: {p['y']:.2f}" for p in points),
    )


def saved_against_lost(evidence, points: list[dict], chosen: str | None) -> None:
    """``token-costs.csv`` and the front of accuracy against time: what each reduction saves and loses, all tasks together.

    Parameters
    ----------
    points : list of dict
        ``policy, layer, keep, accuracy, lower, upper, flops_saved, latency_saved``; the untouched subject among them, saving 0.
    chosen : str or None
        Label ``policy, keep, layer`` of the recipe.
    """
    frame = pd.DataFrame(points)
    evidence.table("token-costs.csv", frame)
    ordered = frame.sort_values("latency_saved", ascending=False)
    front = ordered["accuracy"] > ordered["accuracy"].shift(fill_value=-1.0).cummax()
    named = [f"{row.policy}, {row.keep:g} from layer {row.layer}" for row in frame.itertuples()]
    on_front = set(ordered.index[front])
    evidence.figure(
        "pareto_front",
        {
            "points": [
                {"x": float(row.latency_saved), "y": float(row.accuracy), "lower": float(row.lower), "upper": float(row.upper), "name": name,
                 "front": index in on_front, "chosen": name == chosen}
                for (index, row), name in zip(frame.iterrows(), named, strict=True)
            ],
            "x_label": "share of prefill time saved (median of paired runs)",
            "y_label": "accuracy",
        },
        title="What is saved against what is lost",
        caption="Discovery items of all tasks, 95 % cluster intervals; time of the language model on batches of prompts, paired and interleaved with the "
        "untouched model. Filled: nothing else saves as much at that accuracy.",
        alt="Points of accuracy against time saved: " + "; ".join(f"{name}: {row.accuracy:.2f} at {row.latency_saved:.2f}" for name, row in zip(named, frame.itertuples(), strict=True)),
    )  # fmt: skip


def horizon(evidence, task: str, table: pd.DataFrame, margin: float, chosen: int, latest: int) -> None:
    """Accuracy lost when every visual token goes from a layer on, discovery items, with the layer that is chosen by it."""
    full = table[table["keep"] == 1].drop_duplicates("item").set_index("item")["correct"]
    points = []
    for layer, cell in table[table["keep"] == 0].groupby("layer"):
        found = mean_with_interval(cell["correct"], cell["cluster"])
        points.append({"x": int(layer), "y": found["value"], "lower": found["lower"], "upper": found["upper"]})
    evidence.figure(
        "trend_line",
        {
            "points": points,
            "reference": float(full.mean()) - margin,
            "reference_label": f"all tokens, less {margin:g}",
            "x_label": "layer from which all visual tokens are gone",
        },
        title=f"{task}: from where on nothing more is read from visual tokens",
        caption=f"Discovery items, 95 % cluster intervals. Layer {chosen} is taken to confirmation items; layers up to {latest} (3/4 of the depth) count.",
        alt=f"Accuracy on {task} when all visual tokens go from layer: " + ", ".join(f"{p['x']}: {p['y']:.2f}" for p in points),
    )
