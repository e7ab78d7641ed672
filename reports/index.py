"""All runs in a directory, as one page with links to their reports.

``runs``    what the directory holds, newest first
``render``  the page
"""

from __future__ import annotations

from collections import Counter

from reports import page, record


def runs(folder):
    """Runs of a directory, newest first: identity, counts of confirmatory verdicts, whether there is a report; unreadable ones with the reason.

    Raises
    ------
    ValueError
        Where it holds no run.
    """
    found = []
    for one in folder.iterdir():
        if one.is_symlink() or not (one / "run.json").is_file():
            continue
        try:
            identity, records = record.load_run(one)
            counts = Counter(entry["verdict"] for entry in records if entry["tier"] == "confirmatory")
            ended = {"counts": [{"verdict": name, "count": counts[name]} for name in record.VERDICTS if counts[name]], "trouble": None}
            found.append({"folder": one.name, "report": (one / "report.html").is_file(), **{"run": identity}, **ended})
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.append({"folder": one.name, "report": False, "run": None, "counts": [], "trouble": f"cannot be read: {error}"})
    if not found:
        raise ValueError("no run is in it")
    return sorted(found, key=lambda one: (one["run"] or {}).get("started", ""), reverse=True)


def render(folder):
    """Write ``index.html`` into the directory and return its path."""
    text = page.environment().get_template("index.html.j2").render(runs=runs(folder), trend=(folder / "trend.html").is_file())
    target = folder / "index.html"
    target.write_text(text, encoding="utf-8")
    return target
