"""Runs of one subject that are parts of one whole, put together.

``merge``    several run directories as one: identity, records, what is missing or contradicts
``write``    the whole as a run directory of its own, which can be rendered
``digest``   of what was found, without clocks and places: equal where the evidence is

A verdict does not depend on what else was run with it: families are counted over all that is declared. Putting parts together therefore
decides nothing anew; Holm's p alone is computed again, over the union.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

from reports import collect, page, provenance, record, wording

PASSING = ("duration_s", "reproduce", "p_holm")
"""Fields of a record that differ between runs that found the same, or that the union has computed anew."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """One subject's evidence from all of its runs.

    Attributes
    ----------
    name : str
    identity : dict
        As ``run.json`` holds it.
    records : list of dict
    folders : list of pathlib.Path
        The runs, in the order given.
    """

    name: str
    identity: dict
    records: list
    folders: list


def merge(folders, name=None):
    """Put runs of one subject together.

    Parameters
    ----------
    folders : sequence of pathlib.Path
    name : str, optional
        What the subject is called; default: as its runs call it.

    Returns
    -------
    Whole

    Raises
    ------
    ValueError
        One sentence: runs of different subjects, profiles, seeds, data or error rates.
    """
    loaded = [record.load_run(folder) for folder in folders]
    identities = [identity for identity, _ in loaded]
    _require_one_subject(folders, identities)
    found, problems = {}, [f"{one['name']}: {problem}" for one in identities for problem in one["problems"]]
    for (_, records), folder in zip(loaded, folders, strict=True):
        for entry in records:
            first = found.setdefault(record.instance_key(entry["claim_id"], entry["params"]), entry)
            if _lasting(first) != _lasting(entry):
                problems.append(f"{folder.name} disagrees about {wording.title(entry)}: the evidence of the run named first is kept")
    records = collect.adjust(list(found.values()))
    problems += _lacking(records, identities)
    return Whole(name or identities[0]["subject"]["name"], _identity(identities, records, problems, name), records, list(folders))


def _require_one_subject(folders, identities):
    first = identities[0]
    for folder, other in zip(folders[1:], identities[1:], strict=True):
        pairs = [(what, first.get(what), other.get(what)) for what in ("profile", "seed", "alpha", "revision")]
        pairs.append(("subject", *(one["subject"]["source"] for one in (first, other))))
        weights = [one["subject"].get("weights") for one in (first, other)]
        if None not in weights:
            pairs.append(("subject's weights", *weights))
        data = [{key: value for key, value in one["data"].items() if isinstance(value, str)} for one in (first, other)]
        shared = sorted(data[0].keys() & data[1].keys())
        pairs += [(f"{split} items", data[0][split], data[1][split]) for split in shared]
        for what, mine, its in pairs:
            if mine != its:
                raise ValueError(f"{folders[0].name} and {folder.name} are no parts of one run: their {what} differ ({mine}; {its})")


def _lasting(entry):
    return {name: value for name, value in entry.items() if name not in PASSING}


def _lacking(records, identities):
    """Sentences about families of which not every declared instance is there that the profile asks."""
    left_out = {(one["hypothesis"], one["tier"]): one["instances"] for identity in identities for one in identity.get("left_out", ())}
    families = defaultdict(list)
    for entry in records:
        families[entry["hypothesis"], entry["tier"]].append(entry)
    sentences = []
    for (hypothesis, tier), entries in families.items():
        declared = max((entry["family_size"] or 0 for entry in entries), default=0)
        declared -= left_out.get((hypothesis, tier), 0)
        if declared > len(entries):
            sentences.append(f"{len(entries)} of the {declared} {tier} instances of {hypothesis} were run")
    return sentences


def _identity(identities, records, problems, name):
    first = identities[0]
    subject, data = dict(first["subject"]), dict(first["data"])
    for one in identities[1:]:
        subject = {**one["subject"], **subject}
        data = {**one["data"], **data}
    if name is not None:
        subject["name"] = name
    controls = {control["name"]: control for one in identities for control in one.get("controls", ())}
    return record.validate(
        {
            **first,
            "name": f"{first['name']}-merged" if len(identities) > 1 else first["name"],
            "subject": subject,
            "data": data,
            "command": "; ".join(dict.fromkeys(one["command"] for one in identities)),
            "commit": _common(one["commit"] for one in identities),
            "started": min(one["started"] for one in identities),
            "duration_s": round(sum(one["duration_s"] for one in identities), 2),
            "peak_memory_mb": max(one["peak_memory_mb"] for one in identities),
            "partial_families": bool(problems),
            "declarations": {key: value for one in identities for key, value in one["declarations"].items()},
            "controls": list(controls.values()),
            "counts": dict(Counter(entry["verdict"] for entry in records)),
            "complete": not problems,
            "problems": problems,
            "exit_code": max(one["exit_code"] if one["exit_code"] is not None else 2 for one in identities),
            "files": sorted({file for one in identities for file in one.get("files", ())}),
        },
        "run",
    )


def _common(values):
    """The one value, or all of them where they differ: what differs is said, not hidden."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else ", ".join(map(str, found))


def digest(whole):
    """SHA-256 of what was found: subject, data, records and what is missing; when, where and in how many parts is no part of it."""
    kept = sorted((record.dumps(_lasting(entry), sort_keys=True) for entry in whole.records))
    lacking = _lacking(whole.records, [whole.identity])
    content = [provenance.subject_key(whole.identity), provenance.data_key(whole.identity), kept, lacking]
    return hashlib.sha256(record.dumps(content).encode()).hexdigest()


def write(whole, folder):
    """Write the whole as a run directory with its report, and return the report's path.

    Rows of tables of one name are joined, duplicates dropped; mappings in JSON are merged, the first run's values kept.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name in whole.identity["files"]:
        sources = [one / name for one in whole.folders if (one / name).is_file()]
        if name.endswith(".csv"):
            _join_csv(sources, folder / name)
        elif name.endswith(".jsonl"):
            lines = dict.fromkeys(line for one in sources for line in one.read_text(encoding="utf-8").splitlines())
            (folder / name).write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")
        elif name.endswith(".json"):
            _join_json(sources, folder / name)
        else:
            shutil.copyfile(sources[0], folder / name)
    for one in whole.folders:
        if (one / record.ARRAYS).is_dir():
            shutil.copytree(one / record.ARRAYS, folder / record.ARRAYS, dirs_exist_ok=True)
    for name, content in (("evidence.json", whole.records), ("run.json", whole.identity)):
        (folder / name).write_text(record.dumps(content, indent=2) + "\n", encoding="utf-8")
    return page.render(folder)


def _join_csv(sources, target):
    if len(sources) == 1:
        shutil.copyfile(sources[0], target)
        return
    columns, rows = {}, {}
    for source in sources:
        with source.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            columns.update(dict.fromkeys(reader.fieldnames or ()))
            rows.update((tuple(row.items()), row) for row in reader)
    with target.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def _join_json(sources, target):
    contents = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    joined = contents[0]
    for content in contents[1:]:
        if isinstance(joined, dict) and isinstance(content, dict):
            joined = {**content, **joined}
    Path(target).write_text(record.dumps(joined, indent=2) + "\n", encoding="utf-8")
