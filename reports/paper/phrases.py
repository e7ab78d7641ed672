"""Numbers and verdicts of a run as the paper's sentences and tables write them."""

from __future__ import annotations

from reports.paper.blocks import SYMBOLS


def percent_words(share):
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def measured_words(row):
    if row["estimate"] is None:
        return "nothing"
    estimate, lower, upper = row["numbers"]
    return f"{estimate} [{lower}, {upper}]"


def verdict_words(verdict):
    return f"{SYMBOLS[verdict]} {verdict}"
