"""Tables and figures of fewer visual tokens: curves, sensitivity by layer, the front of accuracy against time, the recipe.

Nothing is measured here and no verdict depends on it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from PIL import Image

from reports.drawings.claims import overlay_tile
from reports.exhibits.shared import mean_with_interval
from reports.pictures import png, thumbnail
from vlm_core.stats import interval

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
    elsewhere = table[(table["layer"] != layer) & (table["keep"] > 0) & (table["keep"] < 1) & (table["task"] == task)]
    for (at, policy, keep), cell in elsewhere.groupby(["layer", "policy", "keep"], sort=False):
        found = mean_with_interval(cell["correct"], cell["cluster"])
        out.append({"task": task, "layer": int(at), "policy": policy, "keep": float(keep), "items": len(cell), **found})
    evidence.table("token-drop-curves.csv", pd.DataFrame(out).rename(columns={"value": "accuracy"}))
    others = sorted((one for one in series if one["role"] == "targeted"), key=lambda one: -sum(point["y"] for point in one["points"]))
    drawn = [one for one in series if one["role"] == "random"] + others[:shown]
    left_out = f" Of {len(others)} policies that look at the tokens, the best {shown} are drawn; all are in the table." if len(others) > shown else ""
    evidence.figure(
        "keep_curves",
        {"series": drawn, "x_label": "share of visual tokens kept", "y_label": "accuracy"},
        title=f"Figure 1, {task}: accuracy against visual tokens kept from layer {layer} on",
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
        title=f"Figure 2, {task}: accuracy lost by layer and share of tokens kept",
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


def horizon(evidence, task: str, table: pd.DataFrame, margin: float, tested: int) -> None:
    """Accuracy when every visual token goes from a layer on, discovery items; ``tested``: the layer that is put to the test on others."""
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
        caption=f"Discovery items, 95 % cluster intervals. On confirmation items, layer {tested} (3/4 of the depth) is put to the test.",
        alt=f"Accuracy on {task} when all visual tokens go from layer: " + ", ".join(f"{p['x']}: {p['y']:.2f}" for p in points),
    )


def redundancy(evidence, found, measure: str) -> None:
    """``token-redundancy.csv`` (every measure, layer, group and task) and one measure by layer, a line a group of image tokens.

    Parameters
    ----------
    found : vlm_core.reduction.redundancy.Redundancy
    measure : str
    """
    tables = [found.curves().assign(task="all")] + [found.curves(task).assign(task=task) for task in dict.fromkeys(found.tasks)]
    evidence.table("token-redundancy.csv", pd.concat(tables, ignore_index=True))
    curves = tables[0][(tables[0]["measure"] == measure) & tables[0]["mean"].notna()]
    series = [
        {
            "name": group,
            "role": "baseline" if group == "all" else None,
            "points": [{"x": int(row.layer), "y": float(row.mean), "lower": float(row.lower), "upper": float(row.upper)} for row in rows.itertuples()],
        }
        for group, rows in curves.groupby("group", sort=False)
    ]
    sizes = ", ".join(f"{group} {size:.0f}" for group, size in zip(found.groups, found.sizes.mean(0), strict=True))
    evidence.figure(
        "keep_curves",
        {"series": series, "x_label": "layer that the tokens enter", "y_label": measure},
        title=f"Visual tokens by layer: {measure}",
        caption=f"{len(found.items)} confirmation items of all tasks, 95 % cluster bands. Mean tokens a group: {sizes}; groups of different sizes compare by how they change.",
        alt=f"Lines of {measure} by layer, one a group of image tokens: {', '.join(one['name'] for one in series)}.",
    )


def utility(evidence, found, by_layer, inert: float = 0.05) -> None:
    """What the answer's margin loses without each group of image tokens, beside as many random ones; and by layer, who can go alone.

    Leaves ``token-utility.csv`` (groups, by layer and item) and ``token-inert.csv`` (share of tokens without each of which the margin changes by
    less than ``inert``, by layer and task, with intervals).

    Parameters
    ----------
    found : vlm_core.reduction.utility.MarginalUtility
        At the layer that bars are drawn of.
    by_layer : mapping of layer to MarginalUtility
    """
    evidence.table("token-utility.csv", pd.concat([one.groups.assign(layer=layer) for layer, one in by_layer.items()], ignore_index=True))
    shares = [_inert_shares(one.inert(inert)).assign(layer=layer) for layer, one in by_layer.items()]
    evidence.table("token-inert.csv", pd.concat(shares, ignore_index=True)[["layer", "task", "items", "share", "lower", "upper"]])
    tasks = shares[0]["task"].tolist()
    ends = {
        name: [[_number_or_none(one.set_index("task")[name].get(task)) for one in shares] for task in tasks] for name in ("share", "lower", "upper")
    }
    evidence.figure(
        "layer_heatmap",
        {
            "rows": tasks, "columns": [int(layer) for layer in by_layer], "values": ends["share"], "lower": ends["lower"], "upper": ends["upper"],
            "row_label": "task", "column_label": "layer", "value_label": "share of tokens",
        },
        title="How many image tokens can go one at a time, by layer",
        caption=f"Share of image tokens without which, alone, the margin changes by less than {inert:.0%}; a token is gone from the layer on. "
        f"{found.groups['item'].nunique()} confirmation items, a few random tokens of each, sixteen at layer {found.layer}; 95 % cluster intervals at the cells.",
        alt="Heat map of the share of image tokens that can go alone, by layer and task: over all tasks "
        + "; ".join(f"layer {layer} {'not known' if one is None else f'{one:.2f}'}" for layer, one in zip(by_layer, ends["share"][0], strict=True))
        + ".",
    )  # fmt: skip
    bars = []
    for group, rows in found.groups.groupby("group", sort=False):
        for name, column, role in ((group, "loss", "targeted"), (f"{group}: as many random ones", "random", "random")):
            if group == "all" and column == "random":
                continue
            known = rows[rows[column].notna()]
            mean = interval(known[column].to_numpy(float), known["cluster"])
            bars.append({"label": name, "value": mean.estimate, "lower": mean.lower, "upper": mean.upper, "role": role})
    evidence.figure(
        "accuracy_bars",
        {"bars": bars, "x_label": "margin of the answer lost (nats)"},
        title=f"What the answer loses without groups of image tokens, from layer {found.layer} on",
        caption=f"{found.groups['item'].nunique()} confirmation items of all tasks, 95 % cluster intervals.",
        alt="Bars of the margin lost without: " + "; ".join(f"{bar['label']} {bar['value']:.2f}" for bar in bars),
    )


def _number_or_none(value) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _inert_shares(found: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for task, own in [("all", found), *found.groupby("task", sort=False)]:
        own = own[own["share"].notna()]
        if len(own):
            mean = mean_with_interval(own["share"], own["cluster"])
            rows.append({"task": task, "items": len(own), "share": mean["value"], "lower": mean["lower"], "upper": mean["upper"]})
    return pd.DataFrame(rows, columns=["task", "items", "share", "lower", "upper"])


def head_shares(evidence, masses, heads) -> None:
    """The share of its image attention that each head gives to its most attended quarter of tokens, as a map with some heads marked."""
    with np.errstate(invalid="ignore"):
        known = np.isfinite(masses.per_item)
        values = np.where(known, masses.per_item, 0.0).sum(0) / known.sum(0)
    evidence.figure(
        "head_map",
        {
            "values": [[None if np.isnan(one) else float(one) for one in row] for row in values],
            "marks": [{"layer": head.layer, "head": head.head} for head in heads],
            "value_label": f"on the most attended {masses.share:.0%} of tokens",
        },
        title="How few image tokens each head looks at",
        caption=f"{len(masses.items)} confirmation items of all tasks: share of a head's attention on the image that its most attended {masses.share:.0%} of tokens "
        "hold. Outlined: the heads of highest attribution.",
        alt=f"Map of {values.shape[0]} layers by {values.shape[1]} heads, from {np.nanmin(values):.2f} to {np.nanmax(values):.2f}.",
    )


def kept_rows(evidence, found, policy: str) -> None:
    """``token-kept-rows.csv`` and where on the image the tokens lie that a policy keeps, from top to bottom, against keeping evenly."""
    histogram = found.histogram()
    evidence.table("token-kept-rows.csv", histogram.assign(policy=policy, layer=found.drop.layer, keep=found.drop.keep))
    lean = found.interval()
    evidence.figure(
        "accuracy_bars",
        {
            "bars": [{"label": f"row {row.row}", "value": float(row.kept), "role": "targeted"} for row in histogram.itertuples()],
            "chance": float(histogram["uniform"].mean()),
            "x_label": "share of the kept tokens",
        },
        title=f"Rows of the image that {policy} keeps, from the top",
        caption=f"{len(found.items)} confirmation items of all tasks, {found.drop.keep:g} of the tokens kept from layer {found.drop.layer} on. The line (chance) is what even keeping "
        f"gives on average over rows; each row's own share is in the table. Kept tokens lie {lean.estimate:+.3f} [{lean.lower:+.3f}, {lean.upper:+.3f}] of the image's height below the mean.",
        alt="Bars, one a row of the image from the top: " + ", ".join(f"{row.kept:.2f}" for row in histogram.itertuples()),
    )


SHOWN_SIDE, GAP = 96, 4  # pixels of a small picture's side, and between two
_DOMINANT = {"propositional": (27, 110, 194), "perspectival": (46, 139, 87), "participatory": (214, 95, 0)}


def relevance(evidence, items, maps) -> None:
    """Two questions to one image: what each patch scores, which score dominates each region, what is kept.

    Parameters
    ----------
    items : sequence of dict
        Of one image.
    maps : sequence of vlm_core.reduction.relevance_maps.RelevanceMap
        Of the same items.
    """
    if not all((found.grid >= 0).any() for found in maps):
        return  # no token has a place to be drawn at
    scores = tuple(_DOMINANT)
    columns = ("image", *scores, "dominates", "kept")
    sheet = np.full((len(items) * (SHOWN_SIDE + GAP), len(columns) * (SHOWN_SIDE + GAP), 3), 255, dtype=np.uint8)
    for row, (item, found) in enumerate(zip(items, maps, strict=True)):
        pixels = np.asarray(item["image"].convert("RGB").resize((SHOWN_SIDE, SHOWN_SIDE), 0))
        drawn = [pixels]
        for score in found.scores:
            heat = _on_grid(found, score)
            top = np.nanmax(heat)
            drawn.append(overlay_tile(pixels, heat / top if top > 0 else heat * 0, np.zeros(pixels.shape[:2], dtype=bool)))
        colours = np.array([_DOMINANT[name] for name in found.dominant])[found.region]
        painted = np.stack([_on_grid(found, colours[:, channel].astype(float)) for channel in range(3)], axis=-1)
        drawn.append(np.where(np.isnan(painted), pixels, 0.5 * pixels + 0.5 * np.nan_to_num(painted)).astype(np.uint8))
        kept = _on_grid(found, found.kept.astype(float))
        drawn.append(np.where(np.nan_to_num(kept)[..., None] > 0, pixels, 255 - (255 - pixels) // 5).astype(np.uint8))
        for column, tile in enumerate(drawn):
            top, left = row * (SHOWN_SIDE + GAP), column * (SHOWN_SIDE + GAP)
            sheet[top : top + SHOWN_SIDE, left : left + SHOWN_SIDE] = tile
    asked = "; ".join(f"“{item['prompt']}” keeps {int(found.kept.sum())} of {found.kept.size} tokens" for item, found in zip(items, maps, strict=True))
    dominated = ", ".join(
        f"{name} {sum(one == name for found in maps for one in found.dominant)}" for name in scores
    )  # regions, both questions together
    evidence.figure(
        "overlay_sheet",
        {"image": png(Image.fromarray(sheet))},
        title="Two questions, one image: where the budget goes",
        caption=f"Row by row: {asked}. From left to right: the image; what a patch says that others do not (propositional); how it stands out from its surround "
        f"(perspectival); what the question attends to (participatory); which score dominates a region (blue, green, orange in that order; regions: {dominated}); what is kept.",
        alt=f"Two rows of six small pictures, one row a question to the same image: {asked}.",
    )


KEPT_SIDE = 96  # pixels of an example's longer side


def kept_tokens(evidence, items, steps: list[dict], policy: str, layer: int) -> None:
    """Example images and the tokens that are left of them, one picture a share kept, with what is then answered.

    Parameters
    ----------
    items : sequence of dict
    steps : list of dict
        ``keep`` and, one an item, ``left`` (`vlm_core.reduction.kept_tokens.kept_tokens`), ``outputs``, ``correct``; none where image tokens have no place.
    policy : str
    layer : int
        Before which tokens go.
    """
    if not steps:
        return
    examples = []
    for number, item in enumerate(items):
        layout, _ = steps[0]["left"][number]
        shown = _largest_grid(layout)
        small = thumbnail(item["image"], KEPT_SIDE)
        examples.append(
            {
                "item": item["id"], "task": item["task"], "prompt": item["prompt"], "answer": item["answer"], "image": png(small), "width": small.width,
                "height": small.height, "box": [float(one) for one in (*np.nanmin(layout.boxes[shown], axis=0)[:2], *np.nanmax(layout.boxes[shown], axis=0)[2:])],
                "steps": [
                    {
                        "kept": int(step["left"][number][1].sum()), "of": len(layout), "rows": _rows(layout, shown, step["left"][number][1]),
                        "output": step["outputs"][number], "correct": bool(step["correct"][number]),
                    }
                    for step in steps
                ],
            }
        )  # fmt: skip
    right = ", ".join(f"{step['keep']:g}: {sum(step['correct'])} of {len(items)}" for step in steps)
    evidence.figure(
        "kept_tokens",
        {"shares": [float(step["keep"]) for step in steps], "examples": examples},
        title=f"Which tokens {policy} keeps from layer {layer} on, and what is answered",
        caption="The first confirmation item of each task that the untouched subject answers right, each of another scene. Dropped tokens are covered. "
        f"Right answers by share kept: {right}.",
        alt=f"{len(items)} pictures with the image tokens that {policy} drops covered, for {len(steps)} shares kept. Right answers by share: {right}.",
    )


def _largest_grid(layout) -> np.ndarray:
    """Which tokens are drawn: those of the grid that has most of them, bool ``[image token]``."""
    placed = (layout.grid >= 0) & ~np.isnan(layout.boxes[:, 0])
    return placed & (layout.grid == np.bincount(layout.grid[placed]).argmax())


def _rows(layout, shown, kept) -> list[str]:
    """The grid from the top, a letter a token: ``1`` kept, ``0`` dropped, ``.`` no token there."""
    first = layout.row[shown].min(), layout.column[shown].min()
    drawn = np.full((layout.row[shown].max() + 1 - first[0], layout.column[shown].max() + 1 - first[1]), ".")
    drawn[layout.row[shown] - first[0], layout.column[shown] - first[1]] = np.where(kept[shown], "1", "0")
    return ["".join(row) for row in drawn]


def _on_grid(found, values: np.ndarray) -> np.ndarray:
    """One number per image token as a picture; NaN where no token lies. Of several grids, the one with most tokens."""
    placed = found.grid >= 0
    largest = np.bincount(found.grid[placed]).argmax()
    chosen = found.grid == largest
    drawn = np.full((found.row[chosen].max() + 1, found.column[chosen].max() + 1), np.nan)
    drawn[found.row[chosen], found.column[chosen]] = np.asarray(values, dtype=float)[chosen]
    down, across = (np.arange(SHOWN_SIDE) * side // SHOWN_SIDE for side in drawn.shape)
    return drawn[down][:, across]
