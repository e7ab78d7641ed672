"""What a history of nights says, as one page: effect with interval night by night, verdicts, versions, and all nights' evidence.

``model``   what the page shows, from the history's lines
``render``  the page
"""

from __future__ import annotations

from collections import defaultdict

from reports import page, wording
from reports.nights import history

SHOWN_NIGHTS = 120  # the last ones, in a figure


def model(folder):
    """The page's model: claims by hypothesis, each instance with its figure and what the nights amount to."""
    hypotheses = defaultdict(list)
    found = history.load(folder)
    for entries in found.values():
        last = entries[-1]
        hypotheses[last["claim_id"].split(".")[0]].append(_instance(entries, last))
    newest = max((entries[-1] for entries in found.values()), key=lambda entry: entry["night"])
    nights = {entry["night"] for entries in found.values() for entry in entries}
    return {
        "nights": len(nights),
        "first": min(entry["started"] for entries in found.values() for entry in entries)[:10],
        "last": newest["started"][:10],
        "subject": newest["subject"],
        "versions": changes_of_versions([one for entries in found.values() for one in entries]),
        "hypotheses": [(name, sorted(rows, key=lambda row: row["tier"] != "confirmatory")) for name, rows in sorted(hypotheses.items())],
    }


def _instance(entries, last):
    said = last["replicated"]
    current = [one for one in entries if all(one[name] == last[name] for name in ("declaration", "subject", "profile"))]
    measured = [one for one in current if one["estimate"] is not None]
    title = wording.title(last)
    return {
        "title": title,
        "anchor": "-".join([last["claim_id"], *map(str, last["params"].values())]).replace(" ", "-"),
        "sentence": last["sentence"],
        "tier": last["tier"],
        "verdict": said["verdict"],
        "said": said,
        "threshold": wording.threshold_text(last),
        "started_anew": len(entries) - len(current),
        "tonight": {**last, "numbers": wording.interval_numbers(last), "outcome": "decided"},
        "figure": figure(title, current[-SHOWN_NIGHTS:]) if measured else None,
    }


def figure(title, entries):
    """The figure of one claim instance's nights."""
    last = entries[-1]
    limits = [last["threshold"]] if last["threshold"] is not None else []
    if wording.test_kind(last) == "equivalence":
        limits.append(-last["threshold"])
    points = [
        {
            "night": one["night"],
            "date": one["started"][:10],
            **{name: one[name] for name in ("verdict", "estimate", "lower", "upper")},
            "support": one["replicated"]["log10_e_support"],
            "refute": one["replicated"]["log10_e_refute"],
        }
        for one in entries
    ]
    changes = [{"night": night, "text": wording.some(texts, 1)} for night, texts in changes_of_versions(entries)]
    data = {"nights": points, "limits": limits, "needed": last["replicated"]["log10_needed"], "versions": changes}
    caption = "Each night's estimate with its interval, on scenes of its own; below, the evidence of all nights. Dotted: versions changed."
    alt = f"{title}, {wording.plural(len(points), 'night')}: {wording.number(last['estimate'])} last; {last['replicated']['sentence']}"
    return {"kind": "nights", "title": f"{title}, night by night", "caption": caption, "alt": alt, "data": data}


def changes_of_versions(entries):
    """Nights on which versions, or the platform, were not those of the night before: ``[(night, ["torch 2.12 → 2.13", ...])]``."""
    nights = {one["night"]: {**one["versions"], "platform": one["platform"]} for one in sorted(entries, key=lambda one: one["night"])}
    found = []
    for (_, before), (night, now) in zip(list(nights.items())[:-1], list(nights.items())[1:], strict=True):
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if names:
            found.append((night, [f"{name} {before.get(name, 'none')} → {now.get(name, 'none')}" for name in names]))
    return found


def render(folder):
    """Write ``trend.html`` into the history and return its path."""
    text = page.environment().get_template("trend.html.j2").render(model(folder), svg=page.FigureWriter({}, {}))
    target = folder / "trend.html"
    target.write_text(text, encoding="utf-8")
    return target
