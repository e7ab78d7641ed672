"""What a paper says: headings, sentences, tables and figures, derived from the JSON of a run.

``content``   the whole paper as a list of blocks (``reports.paper.blocks``), in reading order
``lacking``   the hypotheses that a run has no evidence of

Every number comes from the run; sentences that belong to no run are those of ``reports.summary`` and ``reports.literature``.
"""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

from reports import literature, summary, wording
from reports.paper.blocks import FOREST, HYPOTHESES, SYMBOLS, Drawn, Heading, Items, Missing, Rows, Words
from reports.paper.exhibits import EXHIBITS
from reports.paper.phrases import measured_words, percent_words, verdict_words
from reports.record import VERDICTS
from reports.wording import interval_numbers, listing, number, p_value, plural, short_name


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
        blocks += [*_claims(section), *EXHIBITS.get(name, lambda *_: [])(section, described, recipe), *_exploratory(section)]
    blocks += [*_errors(model, records), *_limits(model), *_related(records), *_appendix(model)]
    return blocks


def lacking(records):
    """The hypotheses that a run has no evidence of; with none, a paper has its full length (`reports.paper.COMPLETE_PAGES`)."""
    return [name for name in HYPOTHESES if not any(entry["hypothesis"] == name for entry in records)]


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
        f"Untouched, it answers {percent_words(low['accuracy'])} ({low['task']}) to {percent_words(high['accuracy'])} ({high['task']}) "
        f"of {_span(row.get('n') for row in baseline)} items a task; "
        f"with another scene's image {_span((row.get('blind') for row in baseline), percent=True)}.{room}"
    )


def _span(values, percent=False):
    known = sorted(value for value in values if value is not None)
    if not known:
        return "an unknown share" if percent else "an unknown number of"
    show = (lambda value: f"{percent_words(value)}") if percent else (lambda value: f"{value:,}")
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
        return f"{card['sentence']} Asked {asked}; measured {measured_words(row)}: {row['verdict']}, since {_reason(row)}."
    known = [row["estimate"] for row in rows if row["estimate"] is not None]
    span = f"estimates {_between(known)}" if known else "none measured"
    counted = ", ".join(f"{entry['count']} {entry['verdict']}" for entry in card["counts"])
    text = f"{card['sentence']} Asked {card['threshold'] or 'what is declared'} in {len(rows)} cases; {span}: {counted}."
    if card["verdict"]:
        return text
    for verdict in VERDICTS[1:]:
        odd = [row for row in rows if row["verdict"] == verdict]
        if odd and len(odd) < len(rows):
            told = [f"{row['where']} ({measured_words(row)})" if row["estimate"] is not None else row["where"] for row in odd]
            why = f", since {_reason(odd[0])}" if verdict == "invalid" else ""
            text += f" {verdict.capitalize()}: {wording.some(told, 7)}{why}."
    return text


def _reason(row):
    """Why a verdict is what it is, without what is said beside it."""
    return row["reason"].partition("; ")[0].rstrip(".")


def _between(values):
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _exploratory(section):
    if not section["exploratory"]:
        return []
    told = []
    for card in section["exploratory"]:
        counted = (
            card["verdict"] if len(card["rows"]) == 1 else ", ".join(f"{entry['count']} {entry['verdict']}" for entry in card["counts"])
        )
        first = card["rows"][0]
        said = f" {measured_words(first)}" if len(card["rows"]) == 1 and first["estimate"] is not None else ""
        told.append(f"{card['short']}{said} ({counted})")
    return [Words("; ".join(told) + ".", "Exploratory, reported and never counted: ")]


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
        floors = " / ".join("–" if row.get(name) is None else f"{percent_words(row[name])}" for name in ("blind", "chance", "majority"))
        accuracy = f"{percent_words(row['accuracy'])}" + (
            f" [{percent_words(row['lower'])}, {percent_words(row['upper'])}]" if row.get("lower") is not None else ""
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
            rows.append((row["where"], *measured, p_value(row["p_holm"]), verdict_words(row["verdict"]) + _outcome(row)))
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
