"""What a paper says: headings, sentences, tables and figures, derived from the JSON of a run.

``content``   the whole paper as a list of blocks, in reading order; nothing of how it looks
``Heading``, ``Words``, ``Items``, ``Rows``, ``Drawn``, ``Missing``   the blocks

Every number comes from the run; sentences that belong to no run are those of ``reports.summary`` and ``reports.literature``.
"""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

from reports import literature, summary, wording
from reports.recipes import section as recipe_section
from reports.record import VERDICTS
from reports.wording import interval_numbers, listing, number, p_value, plural, short_name

SYMBOLS = {"supported": "●", "refuted": "✕", "inconclusive": "◐", "invalid": "–"}
HYPOTHESES = tuple(summary.HYPOTHESES)
FOREST = "forest of claims"  # drawn by reports.paper_forest; no test leaves one


class Heading(NamedTuple):
    """A heading; ``level`` 1 is a section."""

    text: str
    level: int = 1


class Words(NamedTuple):
    """A paragraph; ``lead`` opens it in bold, ``style`` is ``body``, ``abstract``, ``note``, ``alert`` or ``code``."""

    text: str
    lead: str = ""
    style: str = "body"


class Items(NamedTuple):
    """A list."""

    texts: tuple


class Rows(NamedTuple):
    """A table: ``label`` as it is cited, cells as text, ``widths`` as shares, ``left`` columns of words, ``abreast`` parts of it beside
    each other, ``whole`` where it is not to be broken over pages.

    A cell that is a dict is a picture; a row of one cell is a heading within the table.
    """

    label: str
    title: str
    caption: str
    columns: tuple
    rows: tuple
    widths: tuple
    left: tuple = (0,)
    abreast: int = 1
    whole: bool = True


class Drawn(NamedTuple):
    """Figures of a record side by side, ``across`` of them in a row; ``height`` is the most that one may take, in points."""

    label: str
    title: str
    caption: str
    figures: tuple
    across: int = 2
    height: float = 125


class Missing(NamedTuple):
    """An exhibit that this run does not have."""

    label: str
    what: str


def content(identity, records, described=None, recipe=None):
    """The paper of a run.

    Parameters
    ----------
    identity : dict
        ``run.json``.
    records : list of dict
        ``evidence.json``.
    described, recipe : dict, optional
        The head report and the token recipe, where the run has them.

    Returns
    -------
    list
        Blocks; the title and its line are ``summary.page``'s.
    """
    model = summary.page(identity, records)
    sections = {section["name"]: section for section in model["hypotheses"]}
    blocks = [*_abstract(model), *_introduction(model, records), *_overview(model), *_method(model, identity, records), Heading("Results")]
    for name in dict.fromkeys([*HYPOTHESES, *sections]):
        blocks.append(Heading(f"{name}: {summary.HYPOTHESES.get(name, 'further claims')}", 2))
        if name not in sections:
            blocks.append(Words(f"This run has no claim of {name}: nothing was measured, and nothing is concluded."))
            continue
        section = sections[name]
        blocks += [*_claims(section), *_EXHIBITS.get(name, lambda *_: [])(section, described, recipe), *_exploratory(section)]
    blocks += [*_errors(model, records), *_limits(model), *_related(records), *_appendix(model)]
    return blocks


def lacking(records):
    """The hypotheses that a run has no evidence of; with none, a paper has its full length (`reports.paper.COMPLETE_PAGES`)."""
    return [name for name in HYPOTHESES if not any(entry["hypothesis"] == name for entry in records)]


# Abstract, introduction, method


def _abstract(model):
    counted = ", ".join(f"{entry['count']} {entry['verdict']}" for entry in model["counts"])
    total = sum(entry["count"] for entry in model["counts"])
    hypotheses = " ".join(model["sentences"])
    text = (
        f"Published claims about vision-language models are put to the test on one of them, {model['title']}"
        f"{f' ({subject})' if (subject := model['subject_line']) else ''}. "
        "Each claim has a threshold that was declared before anything was measured, and controls that can void it. "
        f"Of {plural(total, 'confirmatory verdict')}: {counted}. {hypotheses}"
    )
    return [Words(text, "Abstract. ", "abstract"), *(Words(line, style="alert") for line in model["band"])]


def _introduction(model, records):
    names = [f"{name}: {text}" for name, text in summary.HYPOTHESES.items()]
    return [
        Heading("What is asked, and what came back"),
        Words(
            "Three sentences are repeated about vision-language models. "
            + ". ".join(names)
            + ". Here each is broken into claims that a measurement can contradict, "
            "and each claim comes back with one of four verdicts, whatever was hoped for: Figure A shows them, Table A lists the numbers."
        ),
        *(
            [Words(f"This is part of a paper: the run has no evidence of {listing(absent)}.", style="alert")]
            if (absent := lacking(records))
            else []
        ),
        *(
            [
                Words(
                    "Only part of the declared suite was collected: its families are smaller and its intervals narrower than those of a "
                    "full run.",
                    style="alert",
                )
            ]
            if model["run"].get("partial_families")
            else []
        ),
        *([Words(wording.other_alpha(model["run"]["alpha"]), style="alert")] if model["run"].get("alpha") else []),
    ]


def _method(model, identity, records):
    run = identity
    data = run.get("data", {})
    splits = data.get("splits", data)
    hashes = [f"{name} {splits[name]}" for name in ("discovery", "confirmation") if splits.get(name)]
    ran = [f"profile {run['profile']}", f"seed {run['seed']}", f"commit {str(run['commit'])[:12]}" if run.get("commit") else ""]
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    meanings = [f"{name.capitalize()}: {meaning}" for name, meaning in model["verdict_meaning"].items()]
    cores = run.get("machine", {}).get("cores", "an unknown number of")
    blocks = [
        Heading("Method"),
        Words(
            (f"{model['subject_line']}. " if model["subject_line"] else "")
            + f"Read from {run['subject'].get('source', 'where it was given')}"
            + (f", weights {run['subject']['weights'][:24]}" if run["subject"].get("weights") else "") + ". "
            + (_can_do(model["baseline"]) or "This run has no baseline accuracy of the subject."),
            "Subject. ",
        ),
        Words(
            "Heads, layers, policies and recipes are chosen on discovery scenes, claims decided on confirmation scenes, which are others."
            + (f" The splits' content: {', '.join(hashes)}." if hashes else " This run does not name its splits."),
            "Splits. ",
        ),
        Words(model["reading"][0] + " " + _families(model), "Units and error rates. "),
        Words(" ".join([*meanings, model["reading"][1]]), "Verdicts. "),
        Words(_controls(records), "Controls. "),
        Words(f"{', '.join(filter(None, ran))}; {versions}. {run.get('duration_s', 0) / 60:.0f} minutes on {cores} cores. Again:", "Run. "),
        Words(run["command"], style="code"),
    ]  # fmt: skip
    return blocks


def _can_do(baseline):
    if not baseline:
        return ""
    low, high = min(baseline, key=lambda row: row["accuracy"]), max(baseline, key=lambda row: row["accuracy"])
    no_room = [row["task"] for row in baseline if row["above"] < 0.1]
    room = f" No room above the floors in {listing(no_room)}." if no_room else ""
    return (
        f"Untouched, it answers {_percent(low['accuracy'])} ({low['task']}) to {_percent(high['accuracy'])} ({high['task']}) "
        f"of {_span(row.get('n') for row in baseline)} items a task; "
        f"with another scene's image {_span((row.get('blind') for row in baseline), percent=True)}.{room}"
    )


def _span(values, percent=False):
    known = sorted(value for value in values if value is not None)
    if not known:
        return "an unknown share" if percent else "an unknown number of"
    show = (lambda value: f"{_percent(value)}") if percent else (lambda value: f"{value:,}")
    return show(known[0]) if known[0] == known[-1] else f"{show(known[0])} to {show(known[-1])}"


def _families(model):
    told = [f"{name} {size} declared, {here} here" for name, size, here in model["families"]]
    return f"Family sizes: {'; '.join(told)}." if told else "No confirmatory family is in this run."


def _controls(records):
    checks = [control for entry in records for control in entry["controls"] if control["kind"] not in ("info", "condition")]
    if not checks:
        return "No control was checked in this run."
    kinds = Counter(control["kind"] for control in checks)
    failed = [
        (control, entry)
        for entry in records
        for control in entry["controls"]
        if not control["passed"] and control["kind"] not in ("info", "condition")
    ]
    by_kind = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    told = f"{plural(len(checks), 'control check')} beside the effects ({by_kind}); "
    if not failed:
        return told + "none failed. A claim whose control fails is invalid, whatever its numbers say."
    named = Counter(control["name"] for control, _ in failed)
    which = "; ".join(
        f"{name}: {wording.some([wording.title(entry) for control, entry in failed if control['name'] == name], 5)}" for name in named
    )
    return told + f"{len(failed)} failed, and the claims behind are invalid whatever their numbers say. {which}."


# Results


def _overview(model):
    cards = [(section, card) for section in model["hypotheses"] for card in section["confirmatory"]]
    if not cards:
        return [Missing("Figure A", "a forest plot: the run has no confirmatory claim")]
    data = {"groups": [_group(section["name"], card) for section, card in cards]}
    figure = {"kind": FOREST, "data": data}
    caption = (
        "Shaded: the side that supports the claim; black: the declared threshold; each claim has its own scale, "
        "cases from top to bottom in the order of Table A. "
        f"{', '.join(f'{symbol} {verdict}' for verdict, symbol in SYMBOLS.items())}."
    )
    return [Drawn("Figure A", "Every confirmatory claim against its threshold.", caption, (("", figure),), 1, 445)]


def _group(hypothesis, card):
    scale = card["scale"]
    told = "  ".join(f"{entry['count']} {SYMBOLS[entry['verdict']]}" for entry in card["counts"])
    place = {"at": None, "from": None, "to": None}
    return {
        "label": f"{hypothesis} {card['short']}"[:42],
        "asked": card["threshold"],
        "told": told,
        "zone": scale.supported,
        "edges": scale.edges,
        "rows": [{"verdict": row["verdict"], **(row["drawn"] or place)} for row in card["rows"]],
    }


def _claims(section):
    if not section["confirmatory"]:
        return [Words(f"{section['sentence']}.")]
    blocks = [Words(f"{section['sentence']}.", style="lead")]
    return blocks + [Words(_told(card), f"{card['id']}. ") for card in section["confirmatory"]]


def _told(card):
    """The declared sentence, what was asked and what came back; where a claim has many cases, the odd ones with their reasons."""
    rows = card["rows"]
    if len(rows) == 1:
        (row,) = rows
        asked = card["threshold"] or "what is declared"
        return f"{card['sentence']} Asked {asked}; measured {_measured(row)}: {row['verdict']}, since {_reason(row)}."
    known = [row["estimate"] for row in rows if row["estimate"] is not None]
    span = f"estimates {_between(known)}" if known else "none measured"
    counted = ", ".join(f"{entry['count']} {entry['verdict']}" for entry in card["counts"])
    text = f"{card['sentence']} Asked {card['threshold'] or 'what is declared'} in {len(rows)} cases; {span}: {counted}."
    if card["verdict"]:
        return text
    for verdict in VERDICTS[1:]:
        odd = [row for row in rows if row["verdict"] == verdict]
        if odd and len(odd) < len(rows):
            told = [f"{row['where']} ({_measured(row)})" if row["estimate"] is not None else row["where"] for row in odd]
            why = f", since {_reason(odd[0])}" if verdict == "invalid" else ""
            text += f" {verdict.capitalize()}: {wording.some(told, 7)}{why}."
    return text


def _reason(row):
    """Why a verdict is what it is, without what is said beside it."""
    return row["reason"].partition("; ")[0].rstrip(".")


def _between(values):
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _percent(share):
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _measured(row):
    if row["estimate"] is None:
        return "nothing"
    estimate, lower, upper = row["numbers"]
    return f"{estimate} [{lower}, {upper}]"


def _exploratory(section):
    if not section["exploratory"]:
        return []
    told = []
    for card in section["exploratory"]:
        counted = (
            card["verdict"] if len(card["rows"]) == 1 else ", ".join(f"{entry['count']} {entry['verdict']}" for entry in card["counts"])
        )
        first = card["rows"][0]
        measured = f" {_measured(first)}" if len(card["rows"]) == 1 and first["estimate"] is not None else ""
        told.append(f"{card['short']}{measured} ({counted})")
    return [Words("; ".join(told) + ".", "Exploratory, reported and never counted: ")]


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
            (where, *(values.get(label, "–") for label in labels), _measured(rows_of[where]), lost, _verdict(rows_of[where]["verdict"]))
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


def _verdict(verdict):
    return f"{SYMBOLS[verdict]} {verdict}"


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
    steps = ", then ".join(f"{_percent(step['keep'])} of the image tokens from layer {step['layer']}" for step in found["steps"])
    loss = found["expected"]
    saved = "; ".join(
        f"{one['what']} {_percent(one['share'])} saved" if one["share"] >= 0 else f"{one['what']} {_percent(-one['share'])} more"
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


_EXHIBITS = {"H1": _exhibits_h1, "H2": _exhibits_h2, "H3": _exhibits_h3}


# Errors, limits, literature, appendix


def _errors(model, records):
    cards = [card for section in model["hypotheses"] for card in section["confirmatory"] + section["exploratory"]]
    changes = [(row["where"], figure) for card in cards for row in card["rows"]
               for figure in row["figures"] if figure["kind"] in ("gained_lost", "cases")]  # fmt: skip
    bars = next((figure for _, figure in changes if figure["kind"] == "gained_lost"), None)
    cases = next((figure for _, figure in changes if figure["kind"] == "cases"), None)
    moved = {row["label"]: row for row in bars["data"]["rows"]} if bars else {}
    blocks = [Heading("Error analysis")]
    failures = _by_task(model, records, moved)
    blocks.append(failures or Missing("Table C", "accuracy per task"))
    if moved:
        most = {side: max(moved.values(), key=lambda row, side=side: row[side]) for side in ("gained", "lost")}
        told = [f"most are {side} in {row['label']} ({row[side]} of {row['items']})" for side, row in most.items() if row[side]]
        blocks.append(Words(f"{bars['caption']} By task, {' and '.join(told)}." if told else bars["caption"], "Training. "))
    else:
        blocks.append(Words("No items gained or lost by training are in this run.", "Training. "))
    if cases and (shown := _some_cases(cases)):
        blocks.append(shown)
    short = [entry for entry in records if entry["verdict"] == "inconclusive" and entry["underpowered"] and entry["tier"] == "confirmatory"]
    if short:
        needed = [entry["n_needed"] for entry in short if entry["n_needed"] is not None]
        need = f" {_rounded(needed)} clusters would do; the records say which." if needed else ""
        blocks.append(
            Words(
                f"{plural(len(short), 'inconclusive verdict')} {'is' if len(short) == 1 else 'are'} underpowered: "
                f"what so many scenes can detect exceeds what is asked.{need}",
                "Power. ",
            )
        )
    return blocks


def _rounded(counts):
    low, high = math.ceil(min(counts)), math.ceil(max(counts))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _by_task(model, records, moved):
    if not model["baseline"]:
        return None
    rows = []
    for row in model["baseline"]:
        task = row["task"]
        against = [
            f"{SYMBOLS[entry['verdict']]} {short_name(entry['claim_id'])}"
            for entry in records
            if entry["tier"] == "confirmatory" and entry["verdict"] != "supported" and task in entry["params"].values()
        ]
        changed = f"+{moved[task]['gained']} −{moved[task]['lost']}" if task in moved else "–"
        failed = f"{round(row['n'] * (1 - row['accuracy']))} of {row['n']}" if row.get("n") else "–"
        floors = " / ".join("–" if row.get(name) is None else f"{_percent(row[name])}" for name in ("blind", "chance", "majority"))
        accuracy = f"{_percent(row['accuracy'])}" + (
            f" [{_percent(row['lower'])}, {_percent(row['upper'])}]" if row.get("lower") is not None else ""
        )
        rows.append((task, accuracy, failed, floors, changed, ", ".join(against) or "none"))
    columns = ("task", "accuracy", "items failed", "blind / chance / majority", "by training", "confirmatory claims not supported here")
    caption = model["baseline_note"] + " By training: items gained and lost by the student."
    return Rows("Table C", "Failures, task by task.", caption, columns, tuple(rows), (0.1, 0.16, 0.1, 0.17, 0.1, 0.37), (0, 5))


def _some_cases(figure, most=4):
    """Gained and lost items in turn, as pictures and words."""
    every = [(group["name"], case) for group in figure["data"]["groups"] for case in group["cases"]]
    by_change = {
        change: [one for one in every if one[1]["change"] == change] for change in dict.fromkeys(case["change"] for _, case in every)
    }
    turns = [one for turn in zip(*(found for found in by_change.values()), strict=False) for one in turn] or every
    rows = [
        ({"image": case["image"]}, case["change"], name, case["prompt"], case["answer"], case["before"], case["after"])
        for name, case in turns[:most]
    ]
    if not rows:
        return None
    return Rows(
        "Table D",
        "Items gained and lost.",
        figure["caption"],
        ("item", "change", "task", "question", "right", "before", "after"),
        tuple(rows),
        (0.09, 0.08, 0.1, 0.33, 0.1, 0.1, 0.2),
        (0, 1, 2, 3, 4, 5, 6),
    )


def _limits(model):
    return [
        Heading("Limitations"),
        Items(summary.LIMITATIONS),
        Heading("Responsible use"),
        Items(summary.RESPONSIBLE_USE),
    ]


_KNOWN_FROM = "Known from summaries, abstracts and code, as reports/literature.py says of each."


def _related(records):
    """Works: what was published, what was measured here."""
    sources = {}
    for entry in records:
        if entry["declaration"].get("source"):
            sources.setdefault(entry["claim_id"], SimpleNamespace(source=entry["declaration"]["source"], id=entry["claim_id"]))
    rows, cited = [], set()
    for work in literature.WORKS:
        found = literature.tested(work, sources.values())
        cited |= {claim.id for claim in found}
        here = _measured_of([[entry for entry in records if entry["claim_id"] == claim.id] for claim in found])
        rows.append((f"[{len(rows) + 1}] {work.name}. {work.authors}, {work.where}", work.claim, work.subject, here))
    others = sorted({claim.source for claim in sources.values() if claim.id not in cited})
    blocks = [
        Heading("What was published, and what was measured here"),
        Words(summary.PUBLISHED),
        Rows("Table E", "Works whose claims are tested.", _KNOWN_FROM,
             ("work", "published claim", "on", "measured here"), tuple(rows), (0.2, 0.31, 0.18, 0.31), (0, 1, 2, 3), whole=False),
    ]  # fmt: skip
    if others:
        blocks.append(Words("; ".join(others) + ".", "Other declared sources: "))
    return blocks


def _measured_of(groups):
    """What was measured of a work's claims: confirmatory ones by name, exploratory ones counted."""
    named = [_here(group) for group in groups if group[0]["tier"] == "confirmatory"]
    others = Counter(entry["verdict"] for group in groups if group[0]["tier"] != "confirmatory" for entry in group)
    if others:
        named.append("exploratory: " + ", ".join(f"{others[verdict]} {verdict}" for verdict in VERDICTS if others[verdict]))
    return "; ".join(named) or "nothing in this run"


def _here(group):
    known = [entry["estimate"] for entry in group if entry["estimate"] is not None]
    span = _between(known) if known else "not measured"
    counted = Counter(entry["verdict"] for entry in group)
    told = ", ".join(verdict if len(group) == 1 else f"{counted[verdict]} {verdict}" for verdict in VERDICTS if counted[verdict])
    return f"{group[0]['claim_id']} {span} ({told})"


def _appendix(model):
    rows = []
    for card in (card for section in model["hypotheses"] for card in section["confirmatory"]):
        rows.append((f"{card['id']}{f' {threshold}' if (threshold := card['threshold']) else ''}: {_size(card)}",))
        for row in card["rows"]:
            estimate, lower, upper = interval_numbers(row)
            measured = ("–", "not measured") if row["estimate"] is None else (estimate, f"[{lower}, {upper}]")
            rows.append((row["where"], *measured, p_value(row["p_holm"]), _verdict(row["verdict"]) + _outcome(row)))
    heading = Heading("Appendix: all confirmatory claims")
    if not rows:
        return [heading, Missing("Table A", "a confirmatory claim")]
    caption = (
        "Behind a claim's name stands what is asked. Bounds are one-sided at the declared error rate divided among the claim's family; "
        "p is Holm's; detects: the minimum detectable effect."
    )
    columns = ("case", "found", "interval", "p", "verdict")
    title = "Estimate, interval, threshold and verdict of every confirmatory claim."
    return [heading, Rows("Table A", title, caption, columns, tuple(rows), (0.2, 0.145, 0.25, 0.145, 0.26), (0, 4), abreast=2)]


def _size(card):
    """``160 scenes; detects 0.12 to 0.15``: of the card's line what the table's rows do not say."""
    counted, *others = card["size"].split("; ")
    told = [", ".join(part for part in counted.split(", ") if not part.endswith(" items"))]
    told += [part.partition(" at ")[0] for part in others if part.startswith("detects")]
    return "; ".join(filter(None, told)) or "nothing measured"


def _outcome(row):
    return {"crashed": " (crashed)", "skipped": " (not run)", "unexpected": " (against expectation)"}.get(row["outcome"], "")
