"""Figure kinds: each takes JSON data and gives SVG that follows the page's colours.

A kind is a function in one of the modules of ``reports.drawings``, or a macro of ``templates/exhibits.html.j2`` for what is words rather than a drawing, plus
the keys its data must have; ``KINDS`` is the whole list.

``check``   refuse unknown kinds and incomplete data, where the figure is made
``draw``    data to a drawing, the costly part; ``key`` names it, so that a figure drawn once is known again
``render``  data, or their drawing, to SVG text for a page: real text, CSS variables for colours, stable ids
"""

from __future__ import annotations

import functools
import hashlib
import html
import importlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import jinja2

from reports import record

STYLE = Path(__file__).parent / "figures.mplstyle"
TEMPLATES = Path(__file__).parent / "templates"

# Colours a drawing may use, and the CSS variable each becomes on the page.
COLOURS = {
    "ink": "#1b1f24",
    "muted": "#8b929c",
    "line": "#e3e6ea",
    "targeted": "#0072b2",
    "random": "#9aa1ab",
    "baseline": "#009e73",
    "floor": "#b8860b",
    "alert": "#d55e00",
    "second": "#aa4499",
    "third": "#44aa99",
    "paper": "#ffffff",
    "on-weak": "#1b1f26",  # text in cells of maps, whatever the page: on a cell of little colour, and on one of much
    "on-strong": "#000001",
}


class Kind(NamedTuple):
    """What a figure kind needs: keys of its data, keys of each entry of its list; and the module of ``reports.drawings`` that draws it, None for a macro."""

    draw: str
    keys: tuple
    entries: str | None = None
    entry_keys: tuple = ()
    module: str | None = "claims"


KINDS = {
    "accuracy_bars": Kind("accuracy_bars", ("bars",), "bars", ("label", "value")),
    "head_map": Kind("head_map", ("values",)),
    "keep_curves": Kind("keep_curves", ("series",), "series", ("name", "points")),
    "layer_heatmap": Kind("layer_heatmap", ("rows", "columns", "values")),
    "attention_overlay": Kind("attention_overlay", ("image", "values", "prompt", "answer")),
    "overlay_sheet": Kind("overlay_sheet", ("image",)),
    "null_histogram": Kind("null_histogram", ("draws", "observed")),
    "slope": Kind("slope", ("panels", "stages"), "panels", ("title", "arms"), "students"),
    "forest": Kind("forest", ("rows",), "rows", ("label", "value", "lower", "upper"), "students"),
    "quality_per_flop": Kind(
        "quality_per_flop", ("points",), "points", ("label", "reduced", "training", "inference", "value", "lower", "upper"), "students"
    ),
    "gained_lost": Kind("gained_lost", ("rows",), "rows", ("label", "gained", "lost", "items"), "students"),
    "table": Kind("table", ("columns", "rows"), "rows", ("label", "cells"), None),
    "cases": Kind("cases", ("groups",), "groups", ("name", "cases"), None),
    "kept_tokens": Kind("kept_tokens", ("shares", "examples"), "examples", ("prompt", "answer", "image", "width", "height", "box", "steps"), None),
    "scatter": Kind("scatter", ("points",), "points", ("x", "y", "group")),
    "trend_line": Kind("trend_line", ("points",), "points", ("x", "y")),
    "nights": Kind("nights", ("nights",), "nights", ("night", "date", "verdict"), "nights"),
    "pareto_front": Kind("pareto_front", ("points", "x_label", "y_label"), "points", ("x", "y", "name", "front", "chosen")),
}


def check(kind, data):
    """Refuse data that could not be drawn later.

    Raises
    ------
    ValueError
        Naming the kind, and the key that is missing or empty.
    """
    if kind not in KINDS:
        raise ValueError(f"no figure kind {kind!r}: expected one of {', '.join(KINDS)}")
    rule = KINDS[kind]
    if not isinstance(data, dict):
        raise ValueError(f"figure {kind!r} takes a mapping with {', '.join(map(repr, rule.keys))}, not a {type(data).__name__}")
    for key in rule.keys:
        if data.get(key) in (None, [], ""):
            raise ValueError(f"figure {kind!r} needs {key!r} in its data")
    for entry in data[rule.entries] if rule.entries else ():
        missing = [key for key in rule.entry_keys if key not in entry]
        if missing:
            raise ValueError(f"figure {kind!r} needs {missing[0]!r} in each of its {rule.entries}")


def key(kind, data):
    """What a drawing is known by: the same for the same figure, before and after its data were stored."""
    return hashlib.sha256(record.dumps([kind, data], sort_keys=True).encode()).hexdigest()


def draw(kind, data):
    """Draw a figure, for no page yet.

    Parameters
    ----------
    kind : str
    data : dict
        As stored in a record.

    Returns
    -------
    dict
        ``svg`` and ``tips``, builtins: what ``render`` makes a page's element of; empty for what needs no drawing.
    """
    check(kind, data)
    rule = KINDS[kind]
    return {} if rule.module is None else drawn(getattr(importlib.import_module(f"reports.drawings.{rule.module}"), rule.draw), data)


def drawn(function, data):
    """What a drawing function makes of data, in the style sheet's look: ``svg`` and ``tips``."""
    import matplotlib as mpl
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with mpl.rc_context(), matplotlib.style.context(STYLE):
        figure, tips = function(data)
        FigureCanvasSVG(figure)
        if figure.get_layout_engine() is not None:
            # Laid out once: to save a figure that lays itself out is to draw it twice.
            figure.get_layout_engine().execute(figure)
            mpl.rcParams["figure.constrained_layout.use"] = False
            figure.set_layout_engine(None)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return {"svg": out.getvalue(), "tips": tips}


def render(kind, data, *, prefix, label, links=None, drawing=None):
    """A figure as one element of a page: SVG, or HTML where it is words.

    Parameters
    ----------
    kind : str
    data : dict
        As stored in a record.
    prefix : str
        Makes ids unique on a page with many figures.
    label : str
        The text alternative.
    links : dict, optional
        Addresses that drawn groups lead to, by the groups' ids.
    drawing : dict, optional
        What ``draw`` made of the figure; drawn anew where it is not given.

    Returns
    -------
    str
    """
    if KINDS[kind].module is None:
        check(kind, data)
        return str(getattr(_macros(), KINDS[kind].draw)(data, label, prefix))
    drawing = drawing or draw(kind, data)
    return _for_page(drawing["svg"], prefix=prefix, label=label, tips=drawing["tips"], links=links or {})


def covered(rows, box, width, height):
    """An SVG path over the dropped tokens of a grid (``0`` in ``rows``) that lies in ``box`` (shares of the picture), runs of them as one shape."""
    left, top, right, bottom = (share * length for share, length in zip(box, (width, height, width, height), strict=True))
    wide, high = (right - left) / len(rows[0]), (bottom - top) / len(rows)
    runs = [(place, run) for place, row in enumerate(rows) for run in re.finditer("0+", row)]
    return "".join(f"M{left + run.start() * wide:.4g} {top + place * high:.4g}h{len(run[0]) * wide:.4g}v{high:.4g}h{-len(run[0]) * wide:.4g}z" for place, run in runs)


def environment():
    """Of every template: text is escaped, a name that is not there is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


@functools.cache
def _macros():
    words = environment()
    words.globals["covered"] = covered
    return words.get_template("exhibits.html.j2").module


def _for_page(svg, *, prefix, label, tips, links):
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    # A picture has no parts for a screen reader; a drawing with links is a group of them.
    role = "group" if links else "img"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" role="{role}" aria-label="{html.escape(label, quote=True)}">'
    )
    svg = opening + svg[svg.index(">") + 1 :]
    if links:
        svg = re.sub(r'<g id="([^"]+)">\s*(<path [^>]*/>)\s*</g>', lambda found: _linked(found, links, tips), svg)
    for gid, text in tips.items():
        svg = svg.replace(f'<g id="{gid}">', f"<g><title>{html.escape(text)}</title>", 1)
    svg = re.sub(r'<g id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|[A-Za-z]*Collection)_\d+">', "<g>", svg)
    seen = set()
    svg = re.sub(r' id="([^"]+)"', lambda found: _unique(found[1], prefix, seen), svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    # What is linked to outside the drawing keeps its id; keyboards reach the same places from the page's own map.
    svg = re.sub(
        r'xlink:href="#([^"]+)"',
        lambda found: f'xlink:href="#{prefix}-{found[1]}"' if found[1] in seen else f'href="#{found[1]}" tabindex="-1"',
        svg,
    )
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = _compact(svg)
    for name, colour in COLOURS.items():
        svg = re.sub(rf"{colour}\b", f"var(--fig-{name})", svg, flags=re.IGNORECASE)
    # Words in a line's colour: its hue, as strong as words need it.
    return re.sub(r'(<text style="[^"]*fill: var\(--fig-(?!ink|on-)[a-z]+)\)', r"\1-text)", svg)


def _compact(svg):
    """The same drawing in fewer characters: hundredths of a point are enough, and nothing needs room between elements."""
    svg = re.sub(r'<g id="[^"]*line2d_\d+"/>| transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r' (d|x|y|transform)="([^"]+)"', lambda found: f' {found[1]}="{_rounded(found[2])}"', svg)
    return re.sub(r">\s+<", "><", svg)


def _rounded(path):
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", " ".join(path.split()))


def _linked(found, links, tips):
    """A drawn group, its shape leading to the group's address where it has one."""
    gid, shape = found.groups()
    if gid not in links:
        return found[0]
    label = html.escape(tips.get(gid, gid), quote=True)
    return f'<g id="{gid}"><a xlink:href="{html.escape(links[gid], quote=True)}" aria-label="{label}">{shape}</a></g>'


def _unique(name, prefix, seen):
    """An id attribute; Matplotlib repeats the id of a shape it defines twice, always with the same content."""
    if name in seen:
        return ""
    seen.add(name)
    return f' id="{prefix}-{name}"'
