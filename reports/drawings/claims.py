"""Drawings of what tests leave about heads, tokens and layers, and the pieces that other drawings are made of."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from scipy.optimize import isotonic_regression

from reports.figures import COLOURS
from reports.wording import number

WIDTH = 5.0

# Over a photograph the page's light and dark do not apply.
_ON_IMAGE, _OUTLINE = "#d65f00", "#fefefe"

_ROLE_COLOURS = {
    "targeted": "targeted",
    "random": "random",
    "uniform": "random",
    "reference": "random",
    "baseline": "baseline",
    "floor": "floor",
    "chance": "muted",
}
_GROUPS = ("targeted", "alert", "baseline", "second", "floor", "third", "ink", "muted")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STRONG = 0.68  # share of a cell's colour from which text on it is dark on dark pages too
OTHERS = ("targeted", "second", "third", "alert", "baseline", "floor")


def accuracy_bars(data):
    """``{"bars": [{label, value, lower?, upper?, role?}], "x_label"?, "chance"?}``, horizontal, in the given order."""
    bars = data["bars"]
    figure, axes = _axes(height=0.62 + 0.36 * len(bars))
    for row, bar in enumerate(bars):
        colour = COLOURS[_ROLE_COLOURS.get(bar.get("role"), "targeted")]
        axes.barh(row, bar["value"], height=0.62, color=colour, alpha=0.85)
        upper = bar["value"]
        if bar.get("lower") is not None and bar.get("upper") is not None:
            upper = max(upper, bar["upper"])
            axes.plot([bar["lower"], bar["upper"]], [row, row], color=COLOURS["ink"], linewidth=1.4)
        axes.annotate(number(bar["value"]), (upper, row), xytext=(5, 0), textcoords="offset points", va="center")
    if data.get("chance") is not None:
        _reference(axes, x=data["chance"], text="chance")
    axes.set_yticks(range(len(bars)), [bar["label"] for bar in bars])
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_xlim(min(0.0, *(_known(bars, "lower", "value"))), _room(bars, "upper", "value"))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(data.get("x_label", "accuracy"))
    return figure, {}


def head_map(data):
    """``{"values": [layer][head], "marks"?: [{layer, head, label?}], "value_label"?}``; one hue for values; cells are groups ``cell-layer-head``."""
    values = _matrix(data["values"])
    layers, heads = values.shape
    figure, axes = _axes(height=max(2.0, 0.9 + 0.3 * layers))
    tips = _cells(axes, values, lambda row, column, value: f"layer {row}, head {column}: {value}")
    for mark in data.get("marks", ()):
        axes.add_patch(
            Rectangle(
                (mark["head"] - 0.44, mark["layer"] - 0.44), 0.88, 0.88, fill=False,
                edgecolor=COLOURS["alert"], linewidth=1.8,
            )
        )  # fmt: skip
        if mark.get("label"):
            axes.text(
                mark["head"], mark["layer"], mark["label"], ha="center", va="center", fontsize=8.5,
                color=COLOURS["ink"], fontweight="bold",
            )  # fmt: skip
    _integer_ticks(axes, heads, layers)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    _scale_bar(axes, values, data.get("value_label", "attribution"))
    return figure, tips


def layer_heatmap(data):
    """``{"rows": [layer], "columns": [keep fraction], "values": [row][column], "lower"?, "upper"?: [row][column], "horizon"?: layer,
    labels?}``."""
    values = _matrix(data["values"])
    rows, columns = values.shape
    figure, axes = _axes(height=max(2.0, 0.9 + 0.32 * rows))
    row_label, column_label = data.get("row_label", "layer"), data.get("column_label", "tokens kept")

    def span(row, column):
        ends = [data[end][row][column] for end in ("lower", "upper") if data.get(end)]
        return f" ({' to '.join(map(number, ends))})" if ends and None not in ends else ""

    tips = _cells(
        axes,
        values,
        lambda row, column, value: f"{row_label} {data['rows'][row]}, {column_label} {data['columns'][column]}: {value}{span(row, column)}",
        print_values=rows * columns <= 80,
    )
    axes.set_xticks(range(columns), [_tick(value) for value in data["columns"]])
    axes.set_yticks(range(rows), [_tick(value) for value in data["rows"]])
    if data.get("horizon") is not None and data["horizon"] in data["rows"]:
        edge = data["rows"].index(data["horizon"]) - 0.5
        axes.plot([-0.5, columns - 0.5], [edge, edge], color=COLOURS["alert"], linewidth=2)
        axes.set_title(f"orange line: horizon, {row_label} {data['horizon']}", loc="left", fontsize=9.5)
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    _scale_bar(axes, values, data.get("value_label", "loss of accuracy"))
    return figure, tips


def keep_curves(data):
    """``{"series": [{name, role?, points: [{x, y, lower?, upper?}]}], "x_label"?, "y_label"?, "reference"?: y, "in_order"?: bool}``."""
    figure, axes = _axes(height=3.4)
    axes.grid(True, axis="y")
    lines, others = [], iter(OTHERS * 4)
    for series in data["series"]:
        points = sorted(series["points"], key=lambda point: point["x"])
        role = series.get("role")
        name = _ROLE_COLOURS[role] if role in _ROLE_COLOURS and role != "targeted" else next(others)
        colour = COLOURS[name]
        x, y = ([point[key] for point in points] for key in ("x", "y"))
        quiet = name == "random"
        axes.plot(x, y, color=colour, marker="o", linestyle=_dash(series["name"]) if quiet else "-")
        if all(point.get("lower") is not None and point.get("upper") is not None for point in points):
            band = [[point[key] for point in points] for key in ("lower", "upper")]
            axes.fill_between(x, *band, color=colour, alpha=0.14, linewidth=0)
        lines.append((y, series["name"], colour))
    if data.get("reference") is not None:
        _reference(axes, y=data["reference"], text=data.get("reference_label", "all tokens"))
    axes.set_xlabel(data.get("x_label", "share of visual tokens kept"))
    axes.set_ylabel(data.get("y_label", "accuracy"))
    _label_lines(axes, lines, turn=not data.get("in_order", False))
    return figure, {}


def trend_line(data):
    """``{"points": [{x, y, lower?, upper?}], "x_label"?, "y_label"?, "reference"?: y, "reference_label"?}``."""
    figure, axes = _axes(height=2.8)
    axes.grid(True, axis="y")
    points = sorted(data["points"], key=lambda point: point["x"])
    for point in points:
        if point.get("lower") is not None and point.get("upper") is not None:
            axes.plot([point["x"]] * 2, [point["lower"], point["upper"]], color=COLOURS["targeted"], linewidth=1.2)
    axes.plot([point["x"] for point in points], [point["y"] for point in points], color=COLOURS["targeted"], marker="o")
    if data.get("reference") is not None:
        _reference(axes, y=data["reference"], text=data.get("reference_label", "reference"))
    axes.set_xlabel(data.get("x_label", "layer"))
    axes.set_ylabel(data.get("y_label", "accuracy"))
    return figure, {}


def pareto_front(data):
    """``{"points": [{x, y, lower?, upper?, name, front, chosen}], "x_label", "y_label"}``; points on the front are filled and joined."""
    figure, axes = _axes(height=3.6)
    axes.grid(True, axis="y")
    front = sorted((point for point in data["points"] if point["front"]), key=lambda point: point["x"])
    axes.plot([point["x"] for point in front], [point["y"] for point in front], color=COLOURS["targeted"], linewidth=1.2, alpha=0.6)
    tips = {}
    for index, point in enumerate(data["points"]):
        colour = COLOURS["alert" if point["chosen"] else "targeted" if point["front"] else "random"]
        if point["front"] and point.get("lower") is not None:
            axes.plot([point["x"]] * 2, [point["lower"], point["upper"]], color=colour, linewidth=0.9)
        (dot,) = axes.plot(
            point["x"], point["y"], marker="D" if point["chosen"] else "o", color=colour,
            markerfacecolor=colour if point["front"] or point["chosen"] else "none", linestyle="none",
        )  # fmt: skip
        dot.set_gid(f"point-{index}")
        tips[f"point-{index}"] = f"{point['name']}: {number(point['y'])} at {number(point['x'])}"
        if point["chosen"]:
            middle = np.mean([min(one["x"] for one in data["points"]), max(one["x"] for one in data["points"])])
            side, shift = ("right", -6) if point["x"] > middle else ("left", 6)
            axes.annotate(
                point["name"], (point["x"], point["y"]), xytext=(shift, 6), textcoords="offset points", ha=side, color=COLOURS["alert"]
            )
    axes.set_xlabel(data["x_label"])
    axes.set_ylabel(data["y_label"])
    return figure, tips


def null_histogram(data):
    """``{"draws": [value], "observed": value, "observed_label"?, "x_label"?, "p_value"?}``."""
    figure, axes = _axes(height=2.5)
    draws, observed = [value for value in data["draws"] if value is not None], data["observed"]
    axes.hist(draws, bins=min(40, max(8, len(draws) // 8)), color=COLOURS["random"], alpha=0.85)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top * 1.22)
    axes.plot([observed, observed], [0, top * 1.05], color=COLOURS["targeted"], linewidth=2.2)
    text = f"{data.get('observed_label', 'targeted')} {number(observed)}"
    if data.get("p_value") is not None:
        text += f", p {_p(data['p_value'])}"
    lower, upper = axes.get_xlim()
    right_half = observed > (lower + upper) / 2
    axes.annotate(
        text, (observed, top * 1.05), xytext=(0, 3), textcoords="offset points",
        ha="right" if right_half else "left", va="bottom", color=COLOURS["targeted"],
    )  # fmt: skip
    axes.set_xlabel(data.get("x_label", "effect of random draws"))
    axes.set_ylabel(f"draws (of {len(draws)})")
    return figure, {}


def scatter(data):
    """``{"points": [{x, y, group, tip?}], "x_label"?, "y_label"?}``: a colour and a shape for each group, its name where its points are."""
    figure, axes = _axes(height=4.2)
    groups = list(dict.fromkeys(point["group"] for point in data["points"]))
    tips = {}
    for place, group in enumerate(groups):
        colour, marker = COLOURS[_GROUPS[place % len(_GROUPS)]], _MARKERS[place % len(_MARKERS)]
        mine = [point for point in data["points"] if point["group"] == group]
        for number_, point in enumerate(mine):
            (drawn,) = axes.plot(point["x"], point["y"], marker=marker, color=colour, markersize=4, linestyle="none", alpha=0.75)
            drawn.set_gid(f"point-{place}-{number_}")
            tips[f"point-{place}-{number_}"] = point.get("tip", group)
        middle = [float(np.median([point[axis] for point in mine])) for axis in ("x", "y")]
        axes.annotate(
            group, middle, ha="center", va="center", fontweight="bold", color=colour,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": COLOURS["paper"], "edgecolor": colour, "alpha": 0.85, "linewidth": 0.8},
        )  # fmt: skip
    axes.set_xlabel(data.get("x_label", ""))
    axes.set_ylabel(data.get("y_label", ""))
    return figure, tips


def attention_overlay(data):
    """``{"image": PNG base64, "values": [row][column], "prompt", "answer", "mask"?: [row][column] of 0/1}``.

    Values and mask lie over the whole image, each at its own resolution.
    """
    import matplotlib.image

    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data["image"])), format="png")
    values = _matrix(data["values"])
    height, width = pixels.shape[:2]
    prompt = _wrapped(data["prompt"])
    # Two pictures side by side, the question's lines above them.
    figure = Figure(figsize=(WIDTH, 0.15 + 0.18 * (1 + prompt.count("\n")) + 0.5 * WIDTH * min(max(height / width, 0.3), 3.0)))
    plain, seen = figure.subplots(1, 2)
    for axes in (plain, seen):
        axes.imshow(pixels, cmap="gray", extent=(0, width, height, 0), interpolation="nearest")
        axes.set_axis_off()
    peak = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 0.0
    heat = np.empty((*values.shape, 4))
    heat[..., :3] = to_rgb(_ON_IMAGE)
    heat[..., 3] = 0.75 * np.nan_to_num(np.abs(values)) / (peak or 1.0)
    seen.imshow(heat, extent=(0, width, height, 0), interpolation="nearest")
    if data.get("mask") is not None:
        seen.add_patch(_outline(np.asarray(data["mask"]) > 0, width, height))
    plain.set_title(prompt, fontsize=9.5, loc="left")
    seen.set_title(f"answer: {data['answer']}", fontsize=9.5, loc="left")
    return figure, {}


def overlay_sheet(data):
    """``{"image": PNG base64}``: many small pictures, drawn already (``overlay_tile``), as one."""
    import matplotlib.image

    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data["image"])), format="png")
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(WIDTH, WIDTH * min(max(height / width, 0.1), 3.0)))
    axes = figure.subplots()
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    axes.set_axis_off()
    return figure, {}


def overlay_tile(pixels, heat, mask):
    """A picture with heat over it and a mask's outline, at the picture's size.

    Parameters
    ----------
    pixels : uint8 array ``[height, width, 3]``
    heat : float array ``[height, width]``
        From 0 (clear) to 1; NaN where nothing was seen.
    mask : bool array ``[height, width]``

    Returns
    -------
    uint8 array ``[height, width, 3]``
    """
    share = 0.75 * np.nan_to_num(np.clip(heat, 0.0, 1.0))[..., None]
    drawn = (1 - share) * pixels + share * 255 * np.array(to_rgb(_ON_IMAGE))
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    drawn[mask & ~inside] = 255 * np.array(to_rgb(_OUTLINE))
    return drawn.round().astype(np.uint8)


def outline_edges(mask, width, height):
    """The edges between a mask's inside and outside, the mask stretched over ``width`` and ``height``: ``[((x, y), (x, y))]``."""
    padded = np.pad(mask, 1)
    rows, columns = mask.shape
    across, down = np.arange(columns + 1) * width / columns, np.arange(rows + 1) * height / rows
    edges = []
    for row, column in np.argwhere(padded[:-1, 1:-1] != padded[1:, 1:-1]):
        edges.append([(across[column], down[row]), (across[column + 1], down[row])])
    for row, column in np.argwhere(padded[1:-1, :-1] != padded[1:-1, 1:]):
        edges.append([(across[column], down[row]), (across[column], down[row + 1])])
    return edges


def _outline(mask, width, height):
    edges = outline_edges(mask, width, height)
    path = Path(np.reshape(edges, (-1, 2)), [Path.MOVETO, Path.LINETO] * len(edges))
    return PathPatch(path, facecolor="none", edgecolor=_OUTLINE, linewidth=1.5, capstyle="projecting")


def _axes(*, height):
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots()


def _matrix(values):
    return np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)


MANY = 300  # cells from which on a map is one picture: each by itself would be most of the page


def _cells(axes, values, tip, *, print_values=False):
    peak = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 0.0
    tips = {}
    if values.size >= MANY:
        shares = np.nan_to_num(np.abs(values)) / (peak or 1.0)
        colours = np.where((values < 0)[..., None], to_rgb(COLOURS["alert"]), to_rgb(COLOURS["targeted"]))
        pixels = np.concatenate([colours, 0.05 + 0.85 * shares[..., None]], axis=-1)
        axes.imshow(pixels, interpolation="none", aspect="auto")
    else:
        tips = _alone(axes, values, peak, tip, print_values)
    axes.set_xlim(-0.55, values.shape[1] - 0.45)
    axes.set_ylim(values.shape[0] - 0.45, -0.55)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return tips


def _alone(axes, values, peak, tip, print_values):
    """Each cell a shape of its own, with its text."""
    tips = {}
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        share = 0.0 if np.isnan(value) or not peak else abs(value) / peak
        colour = COLOURS["targeted"] if not value < 0 else COLOURS["alert"]
        cell = Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=colour, alpha=0.05 + 0.85 * share, linewidth=0)
        cell.set_gid(f"cell-{row}-{column}")
        tips[f"cell-{row}-{column}"] = tip(row, column, "not measured" if np.isnan(value) else number(float(value)))
        axes.add_patch(cell)
        if print_values and not np.isnan(value):
            strong = share > STRONG
            axes.text(
                column, row, number(float(value)), ha="center", va="center", fontsize=8.5,
                color=COLOURS["on-strong" if strong else "on-weak"],
            )  # fmt: skip
    return tips


def _scale_bar(axes, values, label):
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    peak = float(np.max(np.abs(finite)))
    scale = axes.inset_axes((1.04, 0.0, 0.03, 1.0))
    steps = 8
    signed = finite.min() < 0
    for step in range(steps):
        share = (step + 0.5) / steps * (2 if signed else 1) - (1 if signed else 0)
        scale.add_patch(
            Rectangle(
                (0, step / steps), 1, 1 / steps, linewidth=0, alpha=0.05 + 0.85 * abs(share),
                facecolor=COLOURS["alert"] if share < 0 else COLOURS["targeted"],
            )
        )  # fmt: skip
    scale.set_xlim(0, 1)
    scale.set_ylim(0, 1)
    scale.set_xticks([])
    scale.yaxis.tick_right()
    scale.set_yticks([0, 1], [number(-peak if signed else 0.0), number(peak)])
    scale.tick_params(length=0)
    scale.yaxis.set_label_position("right")
    scale.set_ylabel(label)
    for spine in scale.spines.values():
        spine.set_visible(False)


def _integer_ticks(axes, columns, rows):
    for count, setter in ((columns, axes.set_xticks), (rows, axes.set_yticks)):
        step = max(1, -(-count // 16))
        setter(range(0, count, step))


def spread(wanted, heights):
    """Centres of labels of given heights, as near as may be (least squares) to where they are wanted, in that order, none overlapping another."""
    wanted, heights = np.asarray(wanted, dtype=float), np.asarray(heights, dtype=float)
    if not wanted.size:
        return []
    order = np.argsort(wanted, kind="stable")
    stacked = np.concatenate([[0.0], np.cumsum((heights[order][1:] + heights[order][:-1]) / 2)])
    places = np.empty(wanted.size)
    places[order] = isotonic_regression(wanted[order] - stacked).x + stacked
    return places.tolist()


def _label_lines(axes, lines, turn=True):
    """Names at the right ends of lines, none overlapping; the axis is turned, where it may be, so that they end where they differ."""
    turned = turn and np.ptp([y[0] for y, _, _ in lines]) > np.ptp([y[-1] for y, _, _ in lines])
    if turned:
        axes.invert_xaxis()
    low, high = axes.get_ylim()
    gap = (high - low) * 0.075
    ordered = sorted((y[0 if turned else -1], float(np.mean(y)), name, colour) for y, name, colour in lines)
    places = spread([end for end, *_ in ordered], [gap] * len(ordered))
    aside = axes.get_yaxis_transform()
    for place, (_, _, name, colour) in zip(places, ordered, strict=True):
        axes.plot(1.03, place, marker="o", color=colour, transform=aside, clip_on=False)
        axes.annotate(name, (1.055, place), xycoords=aside, va="center", annotation_clip=False)
    axes.set_ylim(low, high)


def _reference(axes, *, text, x=None, y=None):
    if x is not None:
        axes.axvline(x, color=COLOURS["muted"], linestyle=(0, (3, 3)), linewidth=1)
        axes.annotate(
            text, (x, 1), xycoords=axes.get_xaxis_transform(), xytext=(3, 0), textcoords="offset points",
            va="bottom", fontsize=8.5, color=COLOURS["ink"],
        )  # fmt: skip
    else:
        axes.axhline(y, color=COLOURS["muted"], linestyle=(0, (3, 3)), linewidth=1)
        axes.annotate(
            text, (0, y), xycoords=axes.get_yaxis_transform(), xytext=(3, 3), textcoords="offset points",
            va="bottom", fontsize=8.5, color=COLOURS["ink"],
        )  # fmt: skip


def _known(entries, *keys):
    return [entry[key] for entry in entries for key in keys if entry.get(key) is not None]


def _room(entries, *keys):
    return max(_known(entries, *keys)) * 1.15 or 1.0


def _dash(name):
    return (0, (2, 2)) if "uniform" in name.lower() or "stride" in name.lower() else "-"


def _tick(value):
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _p(value):
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _wrapped(text, width=30):
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
