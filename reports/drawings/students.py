"""Drawings of what training did to a student: paths of training, differences against zero, quality for operations, items gained and lost.

As in ``reports.drawings``: data in, ``(figure, tips)`` out; labels stand at what they name and never on each other.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from reports.drawings.claims import WIDTH, spread
from reports.figures import COLOURS
from reports.wording import number, with_unit

_COLOURS = ("targeted", "alert", "second", "baseline", "floor", "third")
_SIZE = 9.0  # points of a label
_LINE = 1.25 * _SIZE / 72  # inches of one of its lines


def slope(data):
    """``{"panels": [{title, arms: [{label, stage, start, values}]}], "stages": [name], "y_label"?}``.

    ``stage`` is a place in ``stages``; ``start`` the place, among the panel's arms, of the one that an arm goes on from, or None; ``values``
    one number a seed. Thin lines are seeds, bold ones their means.
    """
    panels, stages = data["panels"], data["stages"]
    named = [_arm_labels(panel["arms"], len(stages)) for panel in panels]
    height = max(2.7, 0.9 + 1.1 * _LINE * max(sum(labels.lines) for groups in named for labels in groups))
    figure = Figure(figsize=(WIDTH, height * len(panels)))
    columns = figure.subplots(len(panels), 1, sharey=True, squeeze=False)[:, 0]
    every = [value for panel in panels for arm in panel["arms"] for value in arm["values"]]
    low, high = _fitted(every, [labels for groups in named for labels in groups], height - 0.75)
    for axes, panel, groups in zip(columns, panels, named, strict=True):
        arms = panel["arms"]
        colours = [COLOURS["ink"]] * len(arms)
        for place, name in zip([place for place, arm in enumerate(arms) if arm["stage"]], _COLOURS * len(arms), strict=False):
            colours[place] = COLOURS[name]
        for arm, colour in zip(arms, colours, strict=True):
            mean = float(np.mean(arm["values"]))
            if arm["start"] is not None:
                origin = arms[arm["start"]]
                x = [origin["stage"], arm["stage"]]
                for seed, value in enumerate(arm["values"]):
                    before = origin["values"][min(seed, len(origin["values"]) - 1)]
                    axes.plot(x, [before, value], color=COLOURS["random"], linewidth=0.8, alpha=0.8)
                axes.plot(x, [float(np.mean(origin["values"])), mean], color=colour, linewidth=2.2)
            axes.plot(arm["stage"], mean, marker="o", color=colour, markersize=6, linestyle="none", zorder=3)
        axes.set_ylim(low, high)
        axes.set_xlim(-0.62, len(stages) - 1 + (0.12 if len(stages) > 1 else 0.5))
        axes.set_xticks(range(len(stages)), stages)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(data.get("y_label", "accuracy"))
        axes.set_title(panel["title"], loc="left", fontsize=9.5)
        for labels in groups:
            for place, text, y in zip(labels.places, labels.texts, labels.at((high - low) / (height - 0.75)), strict=True):
                axes.annotate(
                    text, (arms[place]["stage"], y), xycoords=_shifted(axes, -8 if labels.left else 8), ha="right" if labels.left else "left",
                    va="center", fontsize=_SIZE, color=colours[place], annotation_clip=False, zorder=4,
                    bbox={"boxstyle": "square,pad=0.05", "facecolor": COLOURS["paper"], "edgecolor": "none", "alpha": 0.7},
                )  # fmt: skip
    return figure, {}


class _Labels(NamedTuple):
    """Labels of one column: which entries, their texts, the heights they are wanted at, and by how many lines they are lifted from there."""

    places: list
    texts: list
    wanted: list
    left: bool = False
    lift: float = 0.0

    @property
    def lines(self):
        return [1.15 + text.count("\n") for text in self.texts]

    def at(self, scale):
        """Heights of their centres, none overlapping, where an inch of the axes is ``scale``."""
        return [y + self.lift * _LINE * scale for y in spread(self.wanted, [_LINE * lines * scale for lines in self.lines])]


def _arm_labels(arms, n_stages):
    """Left of the first stage, right of the others; those that are gone on from above their point, since lines leave it to the right."""
    goes_on = {arm["start"] for arm in arms}
    groups = []
    for stage in range(n_stages):
        last = stage == n_stages - 1
        mine = [place for place, arm in enumerate(arms) if arm["stage"] == stage]
        above = [place for place in mine if place in goes_on and 0 < stage]
        for some, lift in (([place for place in mine if place not in above], 0.0), (above, 1.6)):
            width = 12 if not stage else 22 if last else 15
            means = [float(np.mean(arms[place]["values"])) for place in some]
            texts = [_wrapped(f"{arms[place]['label']} {number(mean)}", width) for place, mean in zip(some, means, strict=True)]
            if some:
                groups.append(_Labels(some, texts, means, stage == 0 or lift > 0, lift))
    return groups


def _fitted(values, columns, inches):
    """Ends of an axis of so many inches that holds the values and every column's labels."""
    pad = 0.08 * (max(values) - min(values)) or 0.05
    low, high = first = min(values) - pad, max(values) + pad
    for _ in range(50):
        scale = (high - low) / inches
        ends = [
            y + side * _LINE * lines * scale / 2
            for labels in columns
            for y, lines in zip(labels.at(scale), labels.lines, strict=True)
            for side in (-1, 1)
        ]
        low, high = min([first[0], *ends]), max([first[1], *ends])
    return low, high


def _shifted(axes, points):
    """Data coordinates, so many points to the right."""
    from matplotlib.transforms import offset_copy

    return offset_copy(axes.transData, fig=axes.figure, x=points, y=0, units="points")


def forest(data):
    """``{"rows": [{label, value, lower, upper}], "x_label"?, "reference"?: x}``: each row's name above its interval; hollow where it holds the reference."""
    rows, reference = data["rows"], data.get("reference")
    texts = [_wrapped(row["label"], 56) for row in rows]
    tops = np.cumsum([0.0] + [0.3 + _LINE * (1 + text.count("\n")) for text in texts])  # inches
    figure = Figure(figsize=(WIDTH, 0.65 + tops[-1]))
    axes = figure.subplots()
    aside = axes.get_yaxis_transform()
    for row, text, top, bottom in zip(rows, texts, tops, tops[1:], strict=False):
        y = bottom - 0.15
        open_ = reference is not None and row["lower"] is not None and row["lower"] <= reference <= row["upper"]
        colour = COLOURS["muted" if open_ else "targeted"]
        if reference is not None:
            axes.plot([reference] * 2, [y - 0.1, y + 0.1], color=COLOURS["ink"], linewidth=1)
        if row["lower"] is not None:
            axes.plot([row["lower"], row["upper"]], [y, y], color=colour, linewidth=1.8)
        axes.plot(row["value"], y, marker="o", markersize=6, color=colour, markerfacecolor=COLOURS["paper"] if open_ else colour)
        value = f"{row['value']:+.3f}".replace("-", "−")
        for x, said, side in ((0, text, "left"), (1, value, "right")):
            axes.annotate(said, (x, top), xycoords=aside, va="top", ha=side, fontsize=_SIZE)
    axes.set_ylim(tops[-1] + 0.05, 0)
    axes.margins(x=0.06)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(data.get("x_label", "difference of accuracy"))
    return figure, {}


def quality_per_flop(data):
    """``{"points": [{label, reduced, training, inference, value, lower, upper, tip?}]}``: accuracy over operations of training and of one prompt.

    One colour a label; filled with all visual tokens, hollow with fewer, the two of one label joined. What was never trained is a line.
    """
    points = data["points"]
    labels = list(dict.fromkeys(point["label"] for point in points))
    trained = [label for label in labels if any(point["label"] == label and point["training"] for point in points)]
    colours = {label: COLOURS[name] for label, name in zip(trained, _COLOURS * len(trained), strict=False)}
    height = max(3.3, 1.0 + 2.2 * _LINE * len(labels))
    figure = Figure(figsize=(WIDTH, height))
    spent, used = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
    tips = {}
    for label in labels:
        mine = [point for point in points if point["label"] == label]
        colour = colours.get(label, COLOURS["ink"])
        for axes, key in ((spent, "training"), (used, "inference")):
            shown = [point for point in mine if point[key]]
            axes.plot([point[key] for point in shown], [point["value"] for point in shown], color=colour, linewidth=1, alpha=0.7)
            for point in shown:
                if point["lower"] is not None:
                    axes.plot([point[key]] * 2, [point["lower"], point["upper"]], color=colour, linewidth=0.9, alpha=0.6)
                (dot,) = axes.plot(
                    point[key], point["value"], marker="o", markersize=6.5, color=colour, linestyle="none", zorder=3,
                    markerfacecolor=COLOURS["paper"] if point["reduced"] else colour,
                )  # fmt: skip
                dot.set_gid(f"point-{key}-{points.index(point)}")
                tips[f"point-{key}-{points.index(point)}"] = point.get("tip", label)
            if key == "training":
                for point in mine:
                    if not point[key]:
                        axes.axhline(point["value"], color=colour, linewidth=1, linestyle=(0, (1, 2)) if point["reduced"] else (0, (4, 2)))
    _operations(spent, [point["training"] for point in points if point["training"]], "training", log=True)
    _operations(used, [point["inference"] for point in points if point["inference"]], "one prompt", log=False)
    spent.set_ylabel("accuracy")
    ends = [max((point for point in points if point["label"] == label), key=lambda point: point["inference"]) for label in labels]
    names = _Labels(list(range(len(labels))), [_wrapped(label, 19) for label in labels], [end["value"] for end in ends])
    drawn = [point[key] for point in points for key in ("lower", "value", "upper") if point[key] is not None]
    low, high = _fitted(drawn, [names], height - 0.7)
    for label, text, end, y in zip(labels, names.texts, ends, names.at((high - low) / (height - 0.7)), strict=True):
        used.annotate(
            text, (end["inference"], end["value"]), xytext=(1.07, y), textcoords=used.get_yaxis_transform(), va="center", fontsize=_SIZE,
            color=colours.get(label, COLOURS["ink"]), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLOURS["muted"], "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip
    used.set_ylim(low, high)
    return figure, tips


def _operations(axes, values, name, *, log):
    """A scale of operations with at most a few round ticks; from nothing where it is not logarithmic."""
    axes.set_xlabel(name)
    if not values:
        axes.set_xticks([])
        return
    low, high = min(values), max(values)
    if log:
        axes.set_xscale("log")
        low, high = low / 1.3, high * 1.3
        axes.set_xlim(low, high)
        for heads in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
            ticks = [head * 10.0**power for power in powers for head in heads if low <= head * 10.0**power <= high]
            if len(ticks) > 1:
                break
        ticks = ticks[:: -(-len(ticks) // 3)]
    else:
        axes.set_xlim(0, high * 1.18)
        step = 10.0 ** np.floor(np.log10(high))
        ticks = [0, step * max(head for head in (1, 2, 3, 4, 5, 6, 8) if head * step <= high * 1.001)]
    number_, unit = with_unit(max(ticks), "FLOP").split()
    axes.set_xticks(ticks, [f"{tick / max(ticks) * float(number_):.3g}" for tick in ticks])
    axes.set_xlabel(f"{name} ({unit})")
    axes.minorticks_off()


def gained_lost(data):
    """``{"rows": [{label, gained, lost, items}]}``: shares of a task's items, those lost to the left, those gained to the right, their numbers at the ends."""
    rows = data["rows"]
    figure = Figure(figsize=(WIDTH, 0.75 + 0.34 * len(rows)))
    axes = figure.subplots()
    widest = max([max(row["gained"], row["lost"]) / row["items"] for row in rows] + [0.05])
    for place, row in enumerate(rows):
        for name, side, colour in (("lost", -1, "alert"), ("gained", 1, "targeted")):
            share = side * row[name] / row["items"]
            axes.barh(place, share, height=0.62, color=COLOURS[colour], alpha=0.85)
            axes.annotate(
                str(row[name]), (share, place), xytext=(4 * side, 0), textcoords="offset points", va="center", ha="left" if side > 0 else "right"
            )
    axes.axvline(0, color=COLOURS["ink"], linewidth=0.8)
    above = axes.get_xaxis_transform()
    for name, side, colour in (("lost", -1, "alert"), ("gained", 1, "targeted")):
        axes.annotate(
            name, (0, 1), xycoords=above, xytext=(6 * side, 2), textcoords="offset points", ha="left" if side > 0 else "right", va="bottom",
            color=COLOURS[colour], fontweight="bold",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(-1.2 * widest, 1.2 * widest)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * abs(share):.3g}%")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("share of the task's items")
    return figure, {}


def _wrapped(text, width):
    return "\n".join(textwrap.wrap(text, width, break_long_words=False)) or text
