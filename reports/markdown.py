"""A run in Markdown: what a continuous-integration job says of it (``>> "$GITHUB_STEP_SUMMARY"``).

``summary``  verdicts, what is worse than the baseline, and what the nights amount to
"""

from __future__ import annotations

import html
import re
from collections import Counter

from reports import record, wording
from reports.nights import baselines
from reports.summary import page

_MARKS = {"supported": "●", "refuted": "✕", "inconclusive": "◐", "invalid": "–"}


def summary(folder):
    """The Markdown of a run directory."""
    identity, records = record.load_run(folder)
    model = page(identity, records)
    counts = Counter(entry["verdict"] for entry in records if entry["tier"] == "confirmatory")
    lines = [f"## {_text(model['title'])}", "", " · ".join(f"{_MARKS[name]} **{counts[name]}** {name}" for name in record.VERDICTS), ""]
    lines += [f"> **{_text(sentence)}**" for sentence in model["band"]] + [""] * bool(model["band"])
    lines += [f"{_text(sentence)}  " for sentence in model["sentences"]] + [""]
    nightly = any(entry["reproduced"] for entry in records), any(entry["replicated"] for entry in records)
    names = ["Claim", "Verdict", "Estimate [interval]", "Asked", *["Baseline"] * nightly[0], *["All nights"] * nightly[1]]
    ordered = sorted(records, key=lambda entry: entry["tier"] != "confirmatory")
    rows = [names, ["---"] * len(names), *(_row(entry, nightly) for entry in ordered)]
    lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    said = [f"- {_text(wording.title(entry))}: {_text(entry['reason'])}" for entry in records if entry["verdict"] in ("refuted", "invalid")]
    moved = [entry for entry in records if entry["reproduced"] and entry["reproduced"]["state"] in ("regression", "voided")]
    said = [f"- **no baseline**: {_text(sentence)}" for sentence in baselines.unmatched(records)] + said
    for entry in reversed(moved):
        found = entry["reproduced"]
        said.insert(0, f"- **{found['state']}**: {_text(wording.title(entry))}: {_text(found['sentence'])}")
    made = f"{identity['name']}, profile {identity['profile']}, seed {identity['seed']}, exit code {identity['exit_code']}"
    return "\n".join([*lines, *said, *[""] * bool(said), f"<sub>{_text(made)}</sub>", ""])


def _row(entry, nightly):
    estimate, lower, upper = wording.interval_numbers(entry)
    measured = "not measured" if entry["estimate"] is None else f"{estimate} [{lower}, {upper}]"
    expected = {"expected": " (expected)", "unexpected": " (not expected)"}.get(entry["outcome"], "")
    tier = "" if entry["tier"] == "confirmatory" else " (exploratory)"
    title, verdict = wording.title(entry) + tier, f"{_MARKS[entry['verdict']]} {entry['verdict']}{expected}"
    cells = [title, verdict, measured, wording.threshold_text(entry)]
    if nightly[0]:
        cells.append((entry["reproduced"] or {"state": "–"})["state"])
    if nightly[1]:
        found = entry["replicated"] or {}
        verdict = found.get("verdict")
        cells.append(f"{_MARKS[verdict]} {verdict}, {wording.plural(found['nights'], 'night')}" if verdict else "–")
    return [_text(cell) for cell in cells]


def _text(text):
    """As it reads, whatever Markdown or HTML would make of it."""
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
