"""Many subjects, one page: which claims hold for which, and whether heads, layers and horizon lie where they lie in others.

``gather``   runs by subject, the parts of one put together (`reports.shards`)
``model``    what the page shows
``render``   the page, each subject's own report beside it, and ``models.json``

Nothing is pooled: subjects are counted, not averaged. A claim *holds in all* where every subject supports it, *fails in all* where every
one refutes it, *differs* where one supports and one refutes it, and is *open* otherwise: what is inconclusive or invalid somewhere is not
generalised from the rest.
"""

from __future__ import annotations

import csv
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from reports import page, provenance, record, shards, wording

GENERAL = {"all": "holds in all", "none": "fails in all", "differs": "differs", "open": "open"}


def gather(arguments):
    """Runs by subject.

    Parameters
    ----------
    arguments : sequence of str
        ``RUN`` or ``NAME=RUN``, a run directory and what its subject is called; runs of one name are parts of one.

    Returns
    -------
    list of reports.shards.Whole, in the order of their first runs

    Raises
    ------
    ValueError
        One sentence: runs of one name that do not belong together, or two subjects of one name.
    """
    found = defaultdict(list)
    for argument in arguments:
        name, given, path = argument.partition("=")
        if not given or "/" in name or Path(argument).exists():
            name, path = None, argument
        folder = Path(path)
        identity = record.load_run(folder)[0]
        found[name or identity["subject"]["name"], None if name else identity["subject"]["source"]].append(folder)
    names = Counter(name for name, _ in found)
    clash = next((name for name, count in names.items() if count > 1), None)
    if clash is not None:
        raise ValueError(f"two subjects are called '{clash}': write NAME=RUN for each of their runs")
    return [shards.merge(folders, name) for (name, _), folders in found.items()]


def model(wholes, scores=(), missing=()):
    """The page's model.

    Parameters
    ----------
    wholes : list of reports.shards.Whole
    scores : list of (str, pathlib.Path)
        Subjects and the folders that ``python -m vlm_core.evaluate`` left of them.
    missing : list of str
        What should have been run and was not, in words.
    """
    if not wholes and not scores:
        raise ValueError("there is neither a run nor a score: name at least one")
    subjects = [_subject(whole) for whole in wholes]
    hypotheses = _hypotheses(wholes)
    confirmatory = [row for _, rows in hypotheses for row in rows if row["tier"] == "confirmatory"]
    counts = Counter(row["general"] for row in confirmatory)
    families = defaultdict(list)
    for number, subject in enumerate(subjects):
        families[subject["family"]].append(number)
    band = [f"{whole.name}: {problem}" for whole in wholes for problem in whole.identity["problems"]]
    return {
        "subjects": subjects,
        "n_subjects": len({*(whole.name for whole in wholes), *(name for name, _ in scores)}),
        "hypotheses": hypotheses,
        "families": [_family(name, numbers, subjects, confirmatory) for name, numbers in families.items()],
        "counts": {word: counts[name] for name, word in GENERAL.items()},
        "n_claims": len(confirmatory),
        "benchmarks": _benchmarks(scores),
        "band": [*(f"not run: {sentence}" for sentence in missing), *band, *_differing(wholes)],
        "found": {whole.name: shards.digest(whole) for whole in wholes},
    }


def _differing(wholes):
    """Sentences about what else differs between subjects' runs: versions and commits are shown, not hidden."""
    said = []
    for what in ("profile", "seed", "alpha", "commit"):
        values = {whole.name: whole.identity[what] for whole in wholes}
        if len(set(values.values())) > 1:
            said.append(f"{what} differs: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    keys = [{record.instance_key(entry["claim_id"], entry["params"]) for entry in whole.records} for whole in wholes]
    for whole, own in zip(wholes, keys, strict=True):
        lacking = len(set().union(*keys) - own)
        if lacking:
            said.append(f"{whole.name}: {wording.plural(lacking, 'claim')} not run that other subjects were put to")
    known = defaultdict(list)
    for whole in wholes:
        known[provenance.subject_key(whole.identity)].append(whole.name)
    for names in known.values():
        if len(names) > 1:
            times = "twice" if len(names) == 2 else f"{len(names)} times"
            said.append(f"{wording.listing(names)} have the same weights: they are one subject, counted {times}")
    return said


def _subject(whole):
    known = whole.identity["subject"]
    return {
        "name": whole.name,
        "family": known.get("family", "unknown"),
        "parameters": known.get("n_parameters"),
        "layers": known.get("n_layers"),
        "heads": known.get("n_heads"),
        "counts": _tally(entry["verdict"] for entry in whole.records if entry["tier"] == "confirmatory"),
        "depth": _depth(whole),
        "where": _top_heads(whole.records),
        "horizon": _horizon(whole.records),
    }


def _tally(verdicts):
    counts = Counter(verdicts)
    return [{"verdict": name, "count": counts[name]} for name in record.VERDICTS if counts[name]]


def _rows(whole, name):
    """Rows of a table that a run has left; none where no run has."""
    for folder in whole.folders:
        if (folder / name).is_file():
            with (folder / name).open(encoding="utf-8", newline="") as lines:
                return list(csv.DictReader(lines))
    return []


def _invalid(records, claim):
    """Tasks whose claim is invalid: what was chosen on them is no finding."""
    return {entry["params"].get("task") for entry in records if entry["claim_id"] == claim and entry["verdict"] == "invalid"}


def _depth(whole):
    """Share of all attribution in each layer, averaged over tasks, ``[layer]``; None where it was not measured."""
    shares, left_out = defaultdict(list), _invalid(whole.records, "H1.necessity")
    for row in _rows(whole, "attribution-by-layer.csv"):
        if row["share"] and row["task"] not in left_out:
            shares[int(row["layer"])].append(float(row["share"]))
    if not shares:
        return None
    means = [statistics.fmean(shares[layer]) for layer in sorted(shares)]
    width = 100 / len(means)
    cells = [{"from": round(width * layer, 2), "width": round(width, 2), "share": mean} for layer, mean in enumerate(means)]
    half = next(layer for layer in range(len(means)) if sum(means[: layer + 1]) >= sum(means) / 2)
    return {"cells": cells, "half": (half + 0.5) / len(means), "most": max(means)}


def _top_heads(records):
    """Heads that necessity was asked of, by how many tasks choose them, and their relative depth."""
    chosen, layers = Counter(), 0
    for entry in records:
        if entry["claim_id"] == "H1.necessity" and entry["verdict"] != "invalid":
            chosen.update(f"{layer}.{head}" for layer, head in entry["details"].get("heads", ()))
            layers += 1
    if not chosen:
        return None
    return {"heads": [{"name": name, "tasks": count} for name, count in chosen.most_common(5)], "tasks": layers}


def _horizon(records):
    """Per task, the first layer from which on discovery items need no visual token, as a share of the depth."""
    found = []
    for entry in records:
        details = entry["details"]
        if entry["claim_id"] == "H2.horizon" and entry["verdict"] != "invalid" and details.get("depth"):
            layer = details.get("first layer on discovery items")
            at = None if layer is None else layer / details["depth"]
            found.append({"task": entry["params"].get("task", "all"), "at": at, "verdict": entry["verdict"]})
    if not found:
        return None
    places = [one["at"] for one in found if one["at"] is not None]
    return {"tasks": found, "counts": _tally(one["verdict"] for one in found), "range": (min(places), max(places)) if places else None}


def _hypotheses(wholes):
    known = [{record.instance_key(entry["claim_id"], entry["params"]): entry for entry in whole.records} for whole in wholes]
    keys = dict.fromkeys(key for one in known for key in one)
    hypotheses = defaultdict(list)
    for key in keys:
        entries = [one.get(key) for one in known]
        first = next(entry for entry in entries if entry is not None)
        hypotheses[first["hypothesis"]].append(_claim(entries, first))
    order = {tier: number for number, tier in enumerate(("confirmatory", "exploratory"))}
    return [(name, sorted(rows, key=lambda row: order.get(row["tier"], 2))) for name, rows in sorted(hypotheses.items())]


def _claim(entries, first):
    cells = []
    for entry in entries:
        if entry is None:
            cells.append(None)
        elif entry["declaration"]["hash"] != first["declaration"]["hash"]:
            cells.append({"other": True})
        else:
            cells.append({**entry, "numbers": wording.interval_numbers(entry)})
    verdicts = [None if cell is None or "other" in cell else cell["verdict"] for cell in cells]
    return {
        "claim_id": first["claim_id"],
        "title": wording.title(first),
        "sentence": first["sentence"],
        "threshold": wording.threshold_text(first),
        "tier": first["tier"],
        "cells": cells,
        "verdicts": verdicts,
        "general": general(verdicts),
        "word": GENERAL[general(verdicts)],
        "supported": verdicts.count("supported"),
    }


def general(verdicts):
    """Whether a claim generalises over subjects: ``all``, ``none``, ``differs`` or ``open`` (see the module).

    Parameters
    ----------
    verdicts : sequence of str or None
        One a subject; None where it was not run.
    """
    found = set(verdicts)
    if found == {"supported"}:
        return "all"
    if found == {"refuted"}:
        return "none"
    return "differs" if {"supported", "refuted"} <= found else "open"


def _family(name, numbers, subjects, rows):
    """What is found within one family of models, counted over its subjects."""
    claims = defaultdict(list)
    for row in rows:
        claims[row["claim_id"]] += [row["verdicts"][number] for number in numbers if row["verdicts"][number] is not None]
    members = [subjects[number] for number in numbers]
    halves = [one["depth"]["half"] for one in members if one["depth"]]
    ranges = [one["horizon"]["range"] for one in members if one["horizon"] and one["horizon"]["range"]]
    return {
        "name": name,
        "subjects": members,
        "claims": [(claim, _tally(verdicts)) for claim, verdicts in claims.items()],
        "general": Counter(GENERAL[general([row["verdicts"][number] for number in numbers])] for row in rows),
        "half": (min(halves), max(halves)) if halves else None,
        "horizon": (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None,
    }


def _benchmarks(scores):
    """Sets × subjects, from each ``summary.csv`` that an evaluation has left; who answered the same items stands in one row."""
    table, names = defaultdict(dict), [subject for subject, _ in scores]
    for subject, folder in scores:
        for file in sorted(folder.rglob("summary.csv")):
            with file.open(encoding="utf-8", newline="") as lines:
                for row in csv.DictReader(lines):
                    numbers = {key: _number(row[key]) for key in ("score", "lower", "upper", "n")}
                    table[row["set"], row["task"], row["mode"], row["data"]][subject] = numbers
    names = list(dict.fromkeys(names))
    about = ("set", "task", "mode", "data")
    rows = [{**dict(zip(about, key, strict=True)), "cells": [found.get(name) for name in names]} for key, found in table.items()]
    return {"subjects": names, "rows": rows} if rows else None


def _number(text):
    return float(text) if text else None


def render(wholes, out, scores=(), missing=()):
    """Write ``OUT/index.html``, ``OUT/models.json`` and each subject's merged run with its report; return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    found = model(wholes, scores, missing)
    for whole in wholes:
        shards.write(whole, out / whole.name)
    (out / "models.json").write_text(record.dumps(found, indent=2) + "\n", encoding="utf-8")
    target = out / "index.html"
    target.write_text(page.environment().get_template("models.html.j2").render(found), encoding="utf-8")
    return target
