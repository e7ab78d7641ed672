"""The exhibits of each hypothesis in the paper: what a run has of them, and what it lacks."""

from __future__ import annotations

from reports.paper.blocks import Drawn, Missing, Rows, Words
from reports.paper.phrases import measured_words, percent_words, verdict_words
from reports.recipes import section as recipe_section
from reports.wording import listing, number, plural


def _figures(section, claims, kind):
    """``[(where, figure)]`` of some claims and one kind, each case's first, in the run's order."""
    cards = [card for card in section["confirmatory"] + section["exploratory"] if card["id"] in claims]
    found = {}
    for card, row in ((card, row) for card in cards for row in card["rows"]):
        for figure in row["figures"]:
            if figure["kind"] == kind:
                found.setdefault((card["id"], row["where"]), figure)
    return [(where, figure) for (_, where), figure in found.items()]


def _ends(found):
    """The first and the last task's: a rule, so that none is picked."""
    return tuple(found if len(found) < 2 else (found[0], found[-1]))


_ENDS = "Where each task has one, the first and the last task's are shown; all are on report.html."


def _exhibits_h1(section, described, recipe):
    blocks = [_table_1(section)]
    maps = [("all tasks", every)] if (every := _every_head(described)) else []
    maps += _ends(_figures(section, ("H1.necessity",), "head_map"))[: 2 - len(maps)]
    if maps:
        caption = "Left: all tasks together, discovery items. Right: one task. " if every and len(maps) > 1 else ""
        blocks.append(
            Drawn(
                "Figure B",
                "Which heads carry the image.",
                caption + "Framed: the heads of highest attribution, which claims are about.",
                tuple(maps),
            )
        )
    else:
        blocks.append(Missing("Figure B", "a map of heads"))
    if described and described.get("heads"):
        told = [entry["sentence"] for entry in described["heads"][:2] if entry.get("sentence")]
        blocks.append(
            Words(" ".join(told), f"The first {len(told)} of {plural(len(described['heads']), 'described head')}. ")
            if told
            else Words("The head report names no head.")
        )
    against = [
        *_ends(_figures(section, ("H1.specificity",), "null_histogram")),
        *_ends(_figures(section, ("H1.sufficiency",), "keep_curves")),
    ]
    if against:
        blocks.append(Drawn("Figure C", "Chosen heads against others.", _captions(against[:1], len(against) > 2), _titled(against), 2, 98))
    return blocks


def _table_1(section):
    """Accuracy per task with heads taken away, beside what random heads of the same layers cost."""
    bars = _figures(section, ("H1.necessity",), "accuracy_bars")
    if not bars:
        return Missing("Table 1", "accuracy with heads taken away")
    draws = {where: figure["data"] for where, figure in _figures(section, ("H1.specificity",), "null_histogram")}
    rows_of = {row["where"]: row for card in section["confirmatory"] if card["id"] == "H1.necessity" for row in card["rows"]}
    labels = list(dict.fromkeys(bar["label"] for _, figure in bars for bar in figure["data"]["bars"]))[:4]
    rows = []
    for where, figure in bars:
        values = {bar["label"]: _with_interval(bar) for bar in figure["data"]["bars"]}
        random = draws.get(where)
        lost = number(sum(random["draws"]) / len(random["draws"])) if random else "–"
        rows.append(
            (where, *(values.get(label, "–") for label in labels), measured_words(rows_of[where]), lost, verdict_words(rows_of[where]["verdict"]))
        )
    columns = ("task", *labels, "lost", "lost by random heads", "verdict")
    caption = (
        "Accuracy on confirmation items with intervals over scenes. Lost: the claim's estimate with its own interval, beside the mean over "
        "layer-matched random sets."
    )
    return Rows(
        "Table 1",
        "Heads taken away.",
        caption,
        columns,
        tuple(rows),
        (0.09, *(0.56 / len(labels),) * len(labels), 0.14, 0.09, 0.12),
        (0, len(columns) - 1),
    )


def _with_interval(entry):
    lower, upper = entry.get("lower"), entry.get("upper")
    return number(entry["value"]) + (f" [{number(lower)}, {number(upper)}]" if lower is not None and upper is not None else "")


def _every_head(described):
    """The map of all heads as a figure; None for a run without."""
    entries = (described or {}).get("map") or ()
    if not entries:
        return None
    layers, width = (max(entry[name] for entry in entries) + 1 for name in ("layer", "head"))
    values = [[None] * width for _ in range(layers)]
    for entry in entries:
        values[entry["layer"]][entry["head"]] = entry["attribution"]
    if not any(value is not None for row in values for value in row):
        return None
    marks = [{"layer": entry["layer"], "head": entry["head"], "label": ""} for entry in described["heads"]]
    return {
        "kind": "head_map",
        "title": "all tasks",
        "alt": "every head",
        "data": {"values": values, "marks": marks, "value_label": "attribution (logits)"},
    }


def _exhibits_h2(section, described, recipe):
    curves = _ends(_figures(section, ("H2.noninferior",), "keep_curves"))
    maps = _ends(_figures(section, ("H2.noninferior",), "layer_heatmap"))
    blocks = [
        _drawn_or_missing(
            "Figure 1", "Accuracy against the share of visual tokens kept.", curves, "accuracy against the share of visual tokens kept"
        )
    ]
    blocks.append(
        _drawn_or_missing(
            "Figure 2", "Accuracy lost, by layer and share of tokens kept.", maps, "accuracy lost by layer and share of tokens kept"
        )
    )
    more = [
        *_figures(section, ("H2.compute_latency", "H2.compute_flops", "H2.trend"), "pareto_front")[:1],
        *_ends(_figures(section, ("H2.trend",), "trend_line")),
    ][:2]
    if more:
        blocks.append(Drawn("Figure D", "What is saved, and when tokens may go.", _captions(more, False), _titled(more), 2, 112))
    blocks.append(Words(_recipe(recipe), "Token recipe. "))
    return blocks


def _drawn_or_missing(label, title, found, what):
    if not found:
        return Missing(label, what)
    return Drawn(label, title, _captions(found[:1], len(found) > 1), _titled(found))


def _captions(found, ends=True):
    """What the figures say of themselves, each sentence once."""
    return " ".join([*dict.fromkeys(figure["caption"] for _, figure in found), *([_ENDS] if ends else [])])


def _titled(found):
    return tuple((figure["title"], figure) for _, figure in found)


def _recipe(recipe):
    found = recipe_section(recipe)
    if not found:
        return "This run recommends none: no token recipe was left."
    if found["lacks"]:
        return f"The recipe of this run cannot be read: it lacks {found['lacks']!r}."
    steps = ", then ".join(f"{percent_words(step['keep'])} of the image tokens from layer {step['layer']}" for step in found["steps"])
    loss = found["expected"]
    saved = "; ".join(
        f"{one['what']} {percent_words(one['share'])} saved" if one["share"] >= 0 else f"{one['what']} {percent_words(-one['share'])} more"
        for one in found["saving"]
    )
    fits = (
        f"not for {listing(found['not_for'])}, where the loss is not surely below {number(found['margin'])}"
        if found["not_for"]
        else "in no task is the loss beyond the margin"
    )
    return (
        f"{found['policy']} keeps {steps} of {found['n_layers']}. Expected loss of accuracy on confirmation items {number(loss['loss'])} "
        f"[{number(loss['lower'])}, {number(loss['upper'])}]; {saved}; {fits}."
    )


def _exhibits_h3(section, described, recipe):
    tables = [
        figure
        for card in section["confirmatory"] + section["exploratory"]
        for row in card["rows"]
        for figure in row["figures"]
        if figure["kind"] == "table"
    ]
    second = next((figure for figure in tables if figure["title"].startswith("Table 2")), None)
    blocks = [_table("Table 2", second) if second else Missing("Table 2", "the student by way of training")]
    claims = tuple(card["id"] for card in section["confirmatory"] + section["exploratory"])
    slopes, contrasts = _figures(section, claims, "slope")[:1], _figures(section, claims, "forest")[:1]
    if slopes or contrasts:
        shown = _titled([*slopes, *contrasts])
        blocks.append(Drawn("Figure E", "The student before and after training.", _captions(shown, False), shown, 2, 195))
    blocks += [_table("Table B", figure) for figure in tables if figure is not second][:1]
    return blocks


def _table(label, figure):
    """A record's own table."""
    data = figure["data"]
    rows = tuple((row["label"], *(f"{cell['text']} {cell.get('interval', '')}".strip() for cell in row["cells"])) for row in data["rows"])
    others = len(data["columns"]) - 1
    return Rows(
        label,
        figure["title"].removeprefix(f"{label}: ").capitalize() + ".",
        figure["caption"],
        tuple(data["columns"]),
        rows,
        (0.28, *(0.72 / max(others, 1),) * others),
    )


EXHIBITS = {"H1": _exhibits_h1, "H2": _exhibits_h2, "H3": _exhibits_h3}
