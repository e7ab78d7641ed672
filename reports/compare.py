"""Two runs beside each other: which verdicts changed, by how much effects differ where the items are the same, and what else differs.

``between``  the whole comparison, from the two runs' JSON and arrays
``lines``    it in words, for a terminal
``render``   it as a page of its own
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from reports import page, provenance, record, wording
from reports.nights import baselines
from reports.scale import Scale
from vlm_core import stats

LEVEL = 0.025  # each side of the intervals of differences, which are shown and decide nothing


def between(first, second):
    """Compare two run directories.

    Parameters
    ----------
    first, second : pathlib.Path

    Returns
    -------
    dict
        ``runs``: their identities; ``facts``: what differs, as ``(name, first, second)``; ``rows``: one a claim instance, changed verdicts
        first; ``counts``: rows by what became of their verdict.
    """
    runs, found = zip(*(record.load_run(folder) for folder in (first, second)), strict=True)
    records = [{record.instance_key(entry["claim_id"], entry["params"]): entry for entry in entries} for entries in found]
    rows = [_row([one.get(key) for one in records], (first, second)) for key in dict.fromkeys([*records[0], *records[1]])]
    rows.sort(key=lambda row: (row["state"] != "changed", row["state"] not in ("gone", "new")))
    values = [value for row in rows if row["difference"] for value in row["difference"].values() if value is not None]
    reach = max([abs(value) for value in values], default=0.0) * 1.08 or 1.0
    scale = Scale(-reach, reach, None)
    for row in rows:
        if row["difference"]:
            row |= {"drawn": scale.place(row["difference"]), "numbers": wording.interval_numbers(row["difference"])}
    return {"runs": runs, "facts": facts(*runs), "rows": rows, "counts": Counter(row["state"] for row in rows), "scale": scale}


def facts(first, second):
    """What differs between two runs besides their numbers: ``[(name, first, second)]``."""
    pairs = [
        ("subject", *(provenance.subject_key(run) for run in (first, second))),
        ("data", *(provenance.data_key(run) for run in (first, second))),
        ("platform", *(provenance.platform_key(run) for run in (first, second))),
        *((name, first.get(name), second.get(name)) for name in ("commit", "alpha", "complete", "exit_code")),
        *((name, first["versions"].get(name), second["versions"].get(name)) for name in sorted({*first["versions"], *second["versions"]})),
    ]
    differing = [(name.replace("_", " "), values) for name, *values in pairs if values[0] != values[1]]
    return [(name, *("none" if value is None else str(value) for value in values)) for name, values in differing]


def _row(pair, folders):
    one = pair[1] or pair[0]
    state = "gone" if pair[1] is None else "new" if pair[0] is None else "same" if pair[0]["verdict"] == pair[1]["verdict"] else "changed"
    row = {
        "title": wording.title(one),
        "claim_id": one["claim_id"],
        "params": one["params"],
        "tier": one["tier"],
        "state": state,
        "pair": [None if entry is None else {**entry, "numbers": wording.interval_numbers(entry)} for entry in pair],
        "verdict": one["verdict"],
        "difference": None,
        "drawn": None,
        "note": "",
    }
    if None in pair:
        return row
    if pair[0]["declaration"]["hash"] != pair[1]["declaration"]["hash"]:
        return {**row, "note": "declared differently: not the same claim"}
    return row | _difference(pair, folders)


def _difference(pair, folders):
    try:
        change = baselines.changes(*pair, *folders)
    except (OSError, ValueError) as error:
        return {"note": f"effects cannot be read: {error}"}
    if change["rows"] is None:
        return {"note": "no effect per item: estimates are the same" if change["identical"] else "no effect per item, no paired interval"}
    if change["identical"]:
        return {"note": f"{wording.plural(change['rows'], 'effect')} the same, bit by bit"}
    if not change["rows"]:
        return {"note": "other items: their intervals stand beside each other"}
    pairs = change["pairs"]
    difference = pairs["second"] - pairs["first"]
    note = f"{change['changed']} of {change['rows']} effects differ" + (f", {change['only']} have no partner" if change["only"] else "")
    lower = upper = None
    if np.unique(pairs["clusters"]).size >= 3:
        found = stats.estimate_mean(difference, pairs["clusters"], pairs["seeds"], bounds=pairs["bounds"], smallest_alpha=LEVEL)
        lower, upper = (None, None) if found is None else (float(bound) for bound in found.bounds(LEVEL))
    return {"note": note, "difference": {"estimate": float(difference.mean()), "lower": lower, "upper": upper}}


def lines(found):
    """The comparison in words, a line a thing."""
    said = [f"{name}: {first} → {second}" for name, first, second in found["facts"]]
    for row in found["rows"]:
        verdicts = " → ".join("not run" if entry is None else entry["verdict"] for entry in row["pair"])
        shown = f"{verdicts if row['state'] != 'same' else row['verdict']}"
        if row["difference"]:
            estimate, lower, upper = row["numbers"]
            shown += f", difference {estimate} [{lower}, {upper}]"
        said.append(f"{'! ' if row['state'] == 'changed' else '  '}{row['title']}: {shown}" + (f" ({row['note']})" if row["note"] else ""))
    said.append(f"{wording.plural(found['counts']['changed'], 'verdict')} changed of {len(found['rows'])}")
    return said


def render(found, target):
    """Write the comparison as a self-contained page."""
    text = page.environment().get_template("compare.html.j2").render(found)
    target.write_text(text, encoding="utf-8")
    return target
