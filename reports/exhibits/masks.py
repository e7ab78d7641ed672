"""Tables and figures of what follows from objects' masks: Head Impact, localisation heads, object tokens, words in the lens."""

from __future__ import annotations

import numpy as np
import pandas as pd
from PIL import Image

from reports.drawings.claims import overlay_tile
from reports.exhibits.shared import mean_with_interval
from reports.pictures import png
from vlm_core.stats import interval

_ROLES = {"object": "targeted", "random": "random", "high-norm": "random", "gradients": "floor"}
_SAID = {
    "object": "the object's tokens",
    "random": "as many random tokens",
    "high-norm": "as many of the highest norm",
    "gradients": "as many of the highest gradients",
}


def head_impact(evidence, impact, ranking, agreement: dict[str, float]) -> None:
    """``head-impact.csv`` and the map of Head Impact.

    Parameters
    ----------
    impact : vlm_core.heads.impact.HeadImpact
    ranking : vlm_core.heads.impact.LayerRanking
    agreement : dict
        Other threshold → Kendall's τ of its ranking with that at the mean.
    """
    scores = impact.scores
    cells = list(np.ndindex(scores.shape))
    frame = pd.DataFrame({"layer": [layer for layer, _ in cells], "head": [head for _, head in cells]})
    for name in impact.thresholds:
        means = impact.at(name).mean(0)
        frame[f"iou, {name}"] = [float(means[cell]) for cell in cells]
    evidence.table("head-impact.csv", frame)
    best = max(cells, key=lambda cell: scores[cell])
    said = ", ".join(f"{name} {tau:.2f}" for name, tau in agreement.items())
    evidence.figure(
        "head_map",
        {"values": scores.tolist(), "marks": [{"layer": best[0], "head": best[1], "label": ""}], "value_label": "Head Impact (IoU)"},
        title="Head Impact: how far what a head looks at is the asked object",
        caption=f"{len(impact.items)} confirmation items of all tasks; attention above the head's mean. Layers from the highest: "
        f"{', '.join(map(str, ranking.order))}. Kendall's τ with other thresholds: {said}.",
        alt=f"Map of {scores.shape[0]} layers by {scores.shape[1]} heads; the highest overlap, {scores[best]:.2f}, at layer {best[0]}, "
        f"head {best[1]}.",
    )


TILE, COLUMNS = 72, 10  # pixels of a small picture's side, and pictures a row


def overlays(evidence, title: str, shown: list[dict]) -> None:
    """``head-impact-overlays.csv`` and one sheet of small pictures: what a head looks at, and the asked object's outline.

    Parameters
    ----------
    title : str
    shown : list of dict
        ``item``, ``heat`` and ``mask`` (``[height, width]``, each at its own resolution) and ``iou``, one a picture.
    """
    if not shown:
        return
    rows = -(-len(shown) // COLUMNS)
    sheet = np.full((rows * TILE, min(COLUMNS, len(shown)) * TILE, 3), 255, dtype=np.uint8)
    for number, one in enumerate(shown):
        row, column = divmod(number, COLUMNS)
        pixels = np.asarray(one["item"]["image"].convert("RGB").resize((TILE - 4, TILE - 4), 0))
        heat = _stretched(np.asarray(one["heat"], dtype=float))
        peak = np.nanmax(heat) if np.isfinite(heat).any() else 0.0
        drawn = overlay_tile(pixels, heat / peak if peak > 0 else np.zeros_like(heat), _stretched(np.asarray(one["mask"], dtype=bool)))
        sheet[row * TILE + 2 : (row + 1) * TILE - 2, column * TILE + 2 : (column + 1) * TILE - 2] = drawn
    about = [{"picture": number, "item": one["item"]["id"], "task": one["item"]["task"], "iou": one["iou"]} for number, one in enumerate(shown)]
    evidence.table("head-impact-overlays.csv", pd.DataFrame(about))
    mean = float(np.mean([one["iou"] for one in shown]))
    evidence.figure(
        "overlay_sheet",
        {"image": png(Image.fromarray(sheet))},
        title=title,
        caption=f"{len(shown)} confirmation items, row by row as in head-impact-overlays.csv: attention of the last prompt token on the image, the outline "
        f"marks the asked object. Their mean IoU is {mean:.2f}.",
        alt=f"A sheet of {len(shown)} small pictures with one head's attention drawn over each.",
    )


def _stretched(values: np.ndarray) -> np.ndarray:
    """A map at the size of a small picture, nearest values."""
    rows, columns = (np.arange(TILE - 4) * side // (TILE - 4) for side in values.shape)
    return values[rows][:, columns]


def localisation(evidence, heads, targeted: float, draws, p_value: float, n_items: int) -> None:
    """Overlap of the localisation heads against random sets of heads of their layers."""
    named = ", ".join(map(str, heads))
    evidence.figure(
        "null_histogram",
        {
            "draws": [float(one) for one in draws],
            "observed": targeted,
            "p_value": p_value,
            "x_label": "overlap with the asked object (IoU)",
        },
        title=f"Localisation heads against {len(draws)} layer-matched random sets",
        caption=f"{n_items} confirmation items of all tasks. Each count is one random set of heads of the same layers; the line is "
        f"{named}, chosen on discovery items.",
        alt=f"Histogram of the overlap of random heads with the asked object; {named} overlap by {targeted:.2f}, "
        f"Monte-Carlo p {p_value:.3g}.",
    )


def object_tokens(evidence, measured: dict, ring: int, chance: float) -> None:
    """``object-tokens.csv`` and bars of accuracy per ring and control.

    Parameters
    ----------
    measured : dict of str to vlm_core.tracing.object_tokens.ObjectTokens
        By split.
    ring : int
        The one chosen.
    """
    for split, found in measured.items():
        bars, rows = [], []
        for condition in found.correct.columns[2:]:
            known = found.correct[condition].dropna()
            if known.empty:  # objects that leave too few tokens outside have no counterpart
                continue
            value = mean_with_interval(known, found.correct.loc[known.index, "cluster"])
            kind, _, where = condition.partition(", ")
            about = {"split": split, "condition": condition, "tokens": found.replaced.get(condition, 0.0), "items": len(known)}
            rows.append({**about, **value})
            label = "nothing replaced" if kind == "full" else f"{_SAID[kind]}, {where}"
            bars.append({"label": label, "role": _ROLES.get(kind, "baseline"), **value})
        evidence.table("object-tokens.csv", pd.DataFrame(rows).rename(columns={"value": "accuracy"}))
        few = next((row["items"] for row in rows if row["condition"].startswith("gradients")), None)
        evidence.figure(
            "accuracy_bars",
            {"bars": bars, "chance": chance},
            title=f"Identification when tokens become the mean visual token, {split} items",
            caption=f"{len(found.correct)} {split} items, 95 % cluster intervals; rings of neighbours around the object's tokens, ring {ring} "
            "chosen on discovery items. Random tokens and those of the highest norm lie outside the object."
            + (f" Gradient tokens: {few} items." if few else ""),
            alt="Bars of accuracy: " + "; ".join(f"{bar['label']} {bar['value']:.2f}" for bar in bars),
        )


def words_in_the_lens(evidence, tracks) -> None:
    """``lens-tracks.csv``, curves of the word's log rank by layer, own tokens against others', and the lens' entropy."""
    curves = {"own tokens": tracks.log_rank["own"], "other objects' tokens": tracks.log_rank["others"]}
    series = [{"name": name, "points": _points(values, tracks.clusters)} for name, values in curves.items()]
    entropy = _points(tracks.entropy, tracks.clusters)
    rows = [{"track": one["name"], **point} for one in [*series, {"name": "entropy", "points": entropy}] for point in one["points"]]
    evidence.table("lens-tracks.csv", pd.DataFrame(rows).rename(columns={"x": "layer", "y": "value"}))
    where = "layer whose input is read (last: the output)"
    about = f"{len(tracks.items)} confirmation items, 95 % cluster intervals."
    evidence.figure(
        "keep_curves",
        {"series": series, "in_order": True, "x_label": where, "y_label": "log rank of the object's word"},
        title="The object's word in the logit lens of image tokens",
        caption=f"{about} Lower is likelier; the vocabulary has {tracks.vocabulary} words.",
        alt="Lines of log rank by layer: "
        + "; ".join(f"{one['name']} from {one['points'][0]['y']:.2f} to {one['points'][-1]['y']:.2f}" for one in series),
    )
    evidence.figure(
        "trend_line",
        {"points": entropy, "x_label": where, "y_label": "entropy of the lens (nats)"},
        title="Entropy of the logit lens at the object's tokens",
        caption=f"{about} Uniform over the vocabulary would be {np.log(tracks.vocabulary):.2f}.",
        alt="Entropy by layer: " + ", ".join(f"{point['x']}: {point['y']:.2f}" for point in entropy),
    )


def _points(values, clusters) -> list[dict]:
    points = []
    for layer, column in enumerate(np.asarray(values).T):
        found = interval(column, clusters, bounds=None)
        points.append({"x": layer, "y": found.estimate, "lower": found.lower, "upper": found.upper})
    return points
