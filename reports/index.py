"""All runs in a directory, as one page with links to their reports and to the indexes of folders in it.

``runs``     what the directory holds, newest first
``folders``  those in it that have an index of their own
``render``   the page
"""

from __future__ import annotations

from collections import Counter

from reports import page, record


def runs(folder):
    """Runs of a directory, newest first: identity, counts of confirmatory verdicts, whether there is a report; unreadable ones with the reason."""
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
    return sorted(found, key=lambda one: (one["run"] or {}).get("started", ""), reverse=True)


def folders(folder):
    """Names of the folders in a directory that have an ``index.html`` of their own."""
    return sorted(one.name for one in folder.iterdir() if not one.is_symlink() and (one / "index.html").is_file())


def render(folder):
    """Write ``index.html`` into the directory and return its path.

    Raises
    ------
    ValueError
        Where there is nothing to list: no run, no folder with an index, no page of a history.
    """
    listed = {"runs": runs(folder), "folders": folders(folder), "trend": (folder / "trend.html").is_file()}
    if not any(listed.values()):
        raise ValueError("no run is in it")
    text = page.environment().get_template("index.html.j2").render(**listed)
    target = folder / "index.html"
    target.write_text(text, encoding="utf-8")
    return target
