"""The report page: one self-contained HTML file, rendered from a run's JSON alone.

``render(folder)`` writes ``folder/report.html`` and returns its path.
"""

from __future__ import annotations

import functools
import re

import markupsafe

from reports import figures, heads, recipes, record, summary, wording
from reports.nights import sparkline


def render(folder, drawings=None):
    """Render the report of a run directory.

    Parameters
    ----------
    folder : pathlib.Path
        Holds ``run.json`` and ``evidence.json`` (or, of a killed run, ``records.jsonl``), and what else the page shows where it is there
        (``head-report.json``, ``token-recipe.json``, ``history.json``).
    drawings : dict, optional
        Figures that are drawn already, by ``reports.figures.key``; others are drawn from their data.

    Returns
    -------
    pathlib.Path
    """
    identity, records = record.load_run(folder)
    target = folder / "report.html"
    target.write_text(text(identity, records, heads.load(folder), recipes.load(folder), drawings, sparkline.load(folder)), encoding="utf-8")
    return target


def text(identity, records, described=None, recipe=None, drawings=None, history=None):
    """The page as text; ``described``: the head report, ``recipe``: the token recipe, ``history``: the claims' nights (``reports.nights.sparkline``), where there
    are any; ``drawings``: see ``render``."""
    history = history or {}
    nights = {record.instance_key(entry["claim_id"], entry["params"]): entry for entry in records}
    shown = {key: drawn for key, entry in nights.items() if key in history and (drawn := sparkline.section(history[key], entry))}
    model = summary.page(identity, records, shown)
    return environment().get_template("report.html.j2").render(
        model, heads=heads.section(described), recipe=recipes.section(recipe), svg=FigureWriter(heads.links(described), drawings or {})
    )


@functools.cache
def environment():
    """Of a page: the templates, with what shows numbers, parameters and times."""
    environment = figures.environment()
    environment.filters.update(
        number=lambda value: wording.number(value).replace("-", "−"),
        signed_text=lambda text: str(text).replace("-", "−"),
        minus=lambda sentence: re.sub(r"(?<![\w-])-(?=\d)", "−", sentence),
        p=wording.p_value,
        percent=lambda value: "–" if value is None else f"{value:.0%}",
        params=record.describe_params,
        json=record.dumps,
        shown=shown,
        duration=duration,
        other_alpha=wording.other_alpha,
        little_was_measured=wording.little_was_measured,
    )
    environment.globals["inline"] = _inline
    return environment


def duration(seconds):
    """``42 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def shown(value):
    """A detail as text: sensible digits for numbers, words as they are, what is inside a mapping or a list one after the other."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return wording.number(value).replace("-", "−")
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value[:MOST])) + (f" and {len(value) - MOST} more" if len(value) > MOST else "") if value else "none"
    return str(value)


MOST = 12  # entries of a list that are shown


class FigureWriter:
    """Puts figures on one page, each with ids of its own; cells of head maps lead to the cards of their heads."""

    def __init__(self, links, drawings):
        self._count = 0
        self._links = {f"cell-{name.replace('.', '-')}": address for name, address in links.items()}
        self._drawings = drawings

    def __call__(self, figure):
        self._count += 1
        kind, data = figure["kind"], figure["data"]
        links = self._links if kind == "head_map" else None
        drawing = self._drawings.get(figures.key(kind, data))
        return markupsafe.Markup(figures.render(kind, data, prefix=f"f{self._count}", label=figure["alt"], links=links, drawing=drawing))


def _inline(name):
    return markupsafe.Markup((figures.TEMPLATES / name).read_text(encoding="utf-8"))
