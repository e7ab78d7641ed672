"""Drawings of many nights: estimate with interval night by night, and the evidence of all nights so far."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.drawings.claims import WIDTH
from reports.figures import COLOURS
from reports.wording import number

_MARKS = {
    "supported": ("baseline", {"marker": "o", "fillstyle": "full"}),
    "refuted": ("alert", {"marker": "X", "fillstyle": "full"}),
    "inconclusive": ("floor", {"marker": "o", "fillstyle": "left", "markerfacecoloralt": "none"}),
    "invalid": ("muted", {"marker": "_", "fillstyle": "full"}),
}


def nights(data):
    """``{"nights": [{night, date, verdict, estimate?, lower?, upper?, support?, refute?}], "limits": [y], "needed"?, "y_label"?,
    "versions"?: [{night, text}]}``; ``support`` and ``refute`` are logarithms of E to base 10."""
    entries = data["nights"]
    evidence = [entry for entry in entries if entry.get("support") is not None]
    figure = Figure(figsize=(WIDTH * 1.3, 3.9 if evidence else 2.4))
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 2)) if evidence else (figure.subplots(), None)
    tips = {}
    top.grid(True, axis="y")
    for limit in data["limits"]:
        top.axhline(limit, color=COLOURS["ink"], linewidth=1.2)
    for place, entry in enumerate(entries):
        if entry.get("estimate") is None:
            continue
        colour, mark = _MARKS[entry["verdict"]]
        if entry.get("lower") is not None and entry.get("upper") is not None:
            top.plot([entry["night"]] * 2, [entry["lower"], entry["upper"]], color=COLOURS[colour], linewidth=1.2, alpha=0.7)
        (dot,) = top.plot(entry["night"], entry["estimate"], color=COLOURS[colour], linestyle="none", **mark)
        dot.set_gid(f"night-{place}")
        interval = f" [{number(entry['lower'])}, {number(entry['upper'])}]" if entry.get("lower") is not None else ""
        tips[f"night-{place}"] = f"night {entry['night']}, {entry['date']}: {number(entry['estimate'])}{interval}, {entry['verdict']}"
    for change in data.get("versions", ()):
        for axes in filter(None, (top, bottom)):
            axes.axvline(change["night"] - 0.5, color=COLOURS["muted"], linestyle=(0, (2, 3)), linewidth=1)
        top.annotate(
            change["text"], (change["night"] - 0.5, 1), xycoords=top.get_xaxis_transform(), xytext=(3, 0), textcoords="offset points",
            va="bottom", fontsize=8, color=COLOURS["ink"],
        )  # fmt: skip
    top.set_ylabel(data.get("y_label", "effect"))
    if bottom is not None:
        _evidence(bottom, evidence, data.get("needed"))
    last = bottom if bottom is not None else top
    last.set_xlabel("night")
    last.set_xlim(entries[0]["night"] - 0.6, max(entries[-1]["night"], entries[0]["night"] + 1) + 0.6)
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, tips


def _evidence(axes, entries, needed):
    axes.grid(True, axis="y")
    for name, colour, label in (("support", "baseline", "for"), ("refute", "alert", "against")):
        axes.plot([entry["night"] for entry in entries], [entry[name] for entry in entries], color=COLOURS[colour], label=label)
        axes.annotate(
            label, (entries[-1]["night"], entries[-1][name]), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5,
            color=COLOURS[colour], annotation_clip=False,
        )  # fmt: skip
    if needed is not None:
        axes.axhline(needed, color=COLOURS["ink"], linewidth=1.2)
        axes.annotate(
            "decides", (0, needed), xycoords=axes.get_yaxis_transform(), xytext=(3, 2), textcoords="offset points", fontsize=8.5,
            color=COLOURS["ink"],
        )  # fmt: skip
    axes.set_ylabel("evidence E, log10")
