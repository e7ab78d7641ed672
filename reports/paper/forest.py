"""The forest plot of a paper: every claim a row, each of its instances an interval on the claim's own scale.

As in ``reports.drawings``: data in, ``(figure, tips)`` out.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from reports.figures import COLOURS

WIDTH = 6.4  # inches
_NAME, _DRAWN = 0.27, 0.74  # where the drawn part begins and ends, as shares of the width
_LINE, _GAP = 0.052, 0.06  # inches of an instance, and between claims
_LEAST = 0.125  # inches of a claim's row: its name has to fit

# Verdict → colour and mark, so that neither alone carries it.
MARKS = {"supported": ("baseline", "o"), "refuted": ("alert", "x"), "inconclusive": ("floor", "o"), "invalid": ("muted", "_")}


def claims(data):
    """``{"groups": [{label, asked, told, rows: [{verdict, at, from, to}], zone, edges}]}``; places in percent of the claim's axis.

    ``at`` is None where nothing was measured.
    """
    groups = data["groups"]
    heights = [max(_LEAST, _LINE * len(group["rows"])) + _GAP for group in groups]
    total = sum(heights)
    figure = Figure(figsize=(WIDTH, total + 0.1))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(total + 0.05, -0.05)
    top = 0.0
    for group, height in zip(groups, heights, strict=True):
        _row(axes, group, top, height - _GAP)
        top += height
    return figure, {}


def _row(axes, group, top, height):
    def x(percent):
        return _NAME + (_DRAWN - _NAME) * percent / 100

    middle = top + height / 2
    small = {"va": "center", "fontsize": 7, "color": COLOURS["ink"]}
    axes.text(0.0, middle, group["label"], ha="left", **small)
    axes.text(_DRAWN + 0.02, middle, group["asked"], ha="left", **small)
    axes.text(_DRAWN + 0.13, middle, group["told"], ha="left", **small)
    if group["zone"]:
        axes.fill_between(
            [x(group["zone"][0]), x(sum(group["zone"]))], top - 0.02, top + height + 0.02, color=COLOURS["line"], alpha=0.7, linewidth=0
        )
    for edge in group["edges"]:
        axes.plot([x(edge)] * 2, [top - 0.02, top + height + 0.02], color=COLOURS["ink"], linewidth=0.9)
    step = height / max(len(group["rows"]), 1)
    for place, row in enumerate(group["rows"]):
        name, marker = MARKS[row["verdict"]]
        y, colour = top + (place + 0.5) * step, COLOURS[name]
        if row["at"] is None:
            axes.plot(_NAME - 0.01, y, marker="_", color=colour, markersize=4)
            continue
        axes.plot([x(row["from"]), x(row["to"])], [y, y], color=colour, linewidth=1.1)
        half = {"fillstyle": "left", "markerfacecoloralt": COLOURS["paper"]} if row["verdict"] == "inconclusive" else {}
        axes.plot(x(row["at"]), y, marker=marker, color=colour, markersize=3.4, markeredgewidth=0.9, **half)
