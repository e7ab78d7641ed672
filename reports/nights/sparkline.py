"""A claim's history beside its verdict: estimate and interval night by night.

``leave``     the nights of a history (`reports.nights.history.load`), in a run's folder
``load``      the nights of a run's claims, where ``history.json`` lies beside its evidence
``section``   one claim's nights as the page draws them

``history.json`` maps a claim instance (``reports.record.instance_key``) to its nights, oldest first, each with ``date`` (ISO), ``estimate``, ``lower``,
``upper`` (None where not measured) and ``verdict``.
"""

from __future__ import annotations

import json

from reports.record import VERDICTS, dumps
from reports.scale import Scale
from reports.wording import number, plural

ARTIFACT = "history.json"
WIDTH, HEIGHT, MARGIN = 150.0, 30.0, 4.0  # of the drawing
SHOWN = 60  # nights at most


def leave(folder, nights):
    """Write ``history.json``.

    Parameters
    ----------
    folder : pathlib.Path
    nights : dict
        Claim instance → its lines in the history (`reports.nights.history.load`). Those of another declaration, subject or profile than the last are left out.
    """
    kept = {}
    for key, lines in nights.items():
        same = [one for one in lines if all(one[name] == lines[-1][name] for name in ("declaration", "subject", "profile"))]
        kept[key] = [{"date": one["started"], **{name: one[name] for name in ("estimate", "lower", "upper", "verdict")}} for one in same[-SHOWN:]]
    (folder / ARTIFACT).write_text(dumps(kept), encoding="utf-8")


def load(folder):
    """Claim instance → nights; empty where a run has no history."""
    path = folder / ARTIFACT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def signed(value):
    """A number with a minus sign."""
    return number(value).replace("-", "−")


def section(nights, record):
    """What the template draws of one claim's nights; None with fewer than two measured ones.

    Parameters
    ----------
    nights : list of dict
    record : dict
        The claim's evidence record, for its threshold.
    """
    nights = [night for night in nights[-SHOWN:] if night["estimate"] is not None]
    if len(nights) < 2:
        return None
    declared = Scale.of([record])
    thresholds = [edge for edge in declared.zone or () if declared.low < edge < declared.high]
    values = [night[name] for night in nights for name in ("estimate", "lower", "upper") if night[name] is not None] + thresholds
    pad = (max(values) - min(values) or 1.0) * 0.1
    scale = Scale(min(values) - pad, max(values) + pad, None)
    step = (WIDTH - 2 * MARGIN) / (len(nights) - 1)

    def down(value):
        return round(HEIGHT * (1 - scale.at(value) / 100), 2)

    counts = {verdict: sum(night["verdict"] == verdict for night in nights) for verdict in VERDICTS}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    first, last = nights[0], nights[-1]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "edges": [down(threshold) for threshold in thresholds],
        "nights": [
            {
                "x": round(MARGIN + place * step, 2),
                "y": down(night["estimate"]),
                "top": down(night["upper"]) if night["upper"] is not None else None,
                "bottom": down(night["lower"]) if night["lower"] is not None else None,
                "verdict": night["verdict"],
                "tip": f"{night['date'][:10]}: {signed(night['estimate'])}, {night['verdict']}",
            }
            for place, night in enumerate(nights)
        ],
        "text": f"{plural(len(nights), 'night')} to {last['date'][:10]}: {said}",
        "label": f"{plural(len(nights), 'night')} from {first['date'][:10]} to {last['date'][:10]}: estimate from {signed(first['estimate'])} to "
        f"{signed(last['estimate'])}; {said}",
    }
