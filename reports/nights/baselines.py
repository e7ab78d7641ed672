"""The reproduce lane: the same claims, subject, data and seed again, item by item against a stored baseline.

A rerun adds no evidence; it says whether what was found is still found. The baseline is a file of JSON lines that is only appended to. An
entry holds for one claim instance, declaration, subject, data (with profile and seed) and platform; the newest one counts. A changed
declaration voids it, and that is said.

What counts as what, for one claim instance:

identical     every effect is the same, bit by bit
within noise  no effect, no share of changed effects and no mean changed more than between runs of the same code on the same platform (A/A)
regression    a confirmatory claim that was supported is not any more; or its items moved beyond the noise: their mean paired change against
              the claim is surely (one-sided, at the claim's level) larger than any between A/A runs, and than 1 % of the declared threshold
drift         anything else that changed: it is said, and decides nothing

Where no A/A run has measured the noise, only the first kind of regression is known; changes are drift, and it is said what is missing.

``load``      the file
``compare``   a run against it
``unmatched`` how many of its claims had nothing to compare with, and why
``update``    add a run to it, with a reason; the reason "A/A" measures the noise
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from reports import effects, provenance, record
from reports.nights import ledger
from reports.wording import number, plural, title
from vlm_core import stats

SAME_CODE = "A/A"
NONE_YET = "none yet"  # the reason of a run that is added only where it had nothing to compare with
NO_BASELINE = "no baseline"
NEGLIGIBLE = 0.01  # of the declared threshold or margin
_KEY = ("subject", "data", "platform")


@dataclass
class Floor:
    """How much runs of the same code differ: largest change of an effect, share of changed effects, mean change, change of the estimate."""

    runs: int = 0
    effect: float = 0.0
    changed: float = 0.0
    mean: float = 0.0
    estimate: float = 0.0

    def widen(self, entry):
        self.runs += 1
        for name in ("effect", "changed", "mean", "estimate"):
            setattr(self, name, max(getattr(self, name), entry[name]))


@dataclass
class Baselines:
    """The entries of a baseline file, by claim instance, oldest first."""

    path: object
    entries: dict = field(default_factory=dict)

    @property
    def folder(self):
        return self.path.parent

    def unseen(self, records):
        """Titles of the claim instances that are in the file and not among the records."""
        seen = {_instance(entry) for entry in records}
        return [title(entries[-1]) for key, entries in self.entries.items() if key not in seen]

    def find(self, identity, entry):
        """The baseline of a record and its noise floor, or why there is none.

        Returns
        -------
        (dict, Floor, None) or (None, None, (state, sentence))
        """
        known = [one for one in self.entries.get(_instance(entry), ()) if one["kind"] == "baseline"]
        where = keys(identity)
        same = [one for one in known if all(one[name] == where[name] for name in _KEY)]
        if not known:
            return None, None, (NO_BASELINE, "no baseline holds this claim")
        if not same:
            differs = [name for name in _KEY if known[-1][name] != where[name]]
            return None, None, (NO_BASELINE, f"the baseline is of another {' and '.join(differs)}")
        found = same[-1]
        if found["declaration"] != entry["declaration"]["hash"]:
            changed = f"declared {found['declaration']} then, {entry['declaration']['hash']} now"
            return None, None, ("voided", f"the declaration has changed since the baseline ({changed}): it counts no longer")
        floor = Floor()
        for one in self.entries[_instance(entry)]:
            if one["kind"] == "rerun" and one["of"] == found["id"]:
                floor.widen(one)
        return found, floor, None


def keys(identity):
    """What a baseline entry holds for, besides the claim."""
    return {
        "subject": provenance.subject_key(identity),
        "data": provenance.data_key(identity),
        "platform": provenance.platform_key(identity),
    }


def _instance(entry):
    return record.instance_key(entry["claim_id"], entry["params"])


def load(path):
    """Read a baseline file; an empty one where it does not exist.

    Raises
    ------
    ValueError
        Naming the line that cannot be read.
    """
    found = Baselines(path)
    for number_, entry in enumerate(ledger.read(path), 1):
        if entry.get("kind") not in ("baseline", "rerun") or not {"claim_id", "params"} <= entry.keys():
            raise ValueError(f"{path}, line {number_}, is no entry of a baseline")
        found.entries.setdefault(_instance(entry), []).append(entry)
    return found


def compare(baselines, identity, entry, folder):
    """One record against the baseline.

    Parameters
    ----------
    baselines : Baselines
    identity : dict
        Of the run.
    entry : dict
        Its record.
    folder : pathlib.Path
        Where the run's arrays are.

    Returns
    -------
    dict
        What stands in the record as ``reproduced``.
    """
    then, floor, missing = baselines.find(identity, entry)
    if missing:
        return _outcome(*missing)
    change = changes(then, entry, baselines.folder, folder)
    numbers = {name: change[name] for name in ("rows", "changed", "worse")}
    if floor.runs:
        numbers["floor"] = floor.mean
    if then["verdict"] == "supported" and entry["verdict"] != "supported" and entry["tier"] == "confirmatory":
        return _outcome("regression", f"supported in the baseline of {then['started'][:10]}, {entry['verdict']} now", **numbers)
    stays = "the verdict stays" if entry["verdict"] == then["verdict"] else f"{then['verdict']} then, {entry['verdict']} now"
    if change["identical"]:
        return _outcome("identical", f"{_rows(change)} the same, bit by bit", **numbers)
    if floor.runs and _within(change, floor):
        return _outcome("within noise", f"{_said(change)}, no more than runs of the same code do; {stays}", **numbers)
    unmeasured = "" if floor.runs else f"; no run of the same code has measured the noise (--claims-update-baseline={SAME_CODE})"
    if floor.runs and change["worse"] is not None and entry["tier"] == "confirmatory":
        numbers["lower"] = lower = _surely_worse(change, entry)
        least = max(floor.mean, NEGLIGIBLE * (entry["threshold"] or 0.0))
        if lower is not None and lower > least:
            beyond = f"at least {number(lower)}, beyond the noise of {number(floor.mean)} between runs of the same code"
            return _outcome("regression", f"items moved against the claim by {number(change['worse'])} on average, {beyond}", **numbers)
    return _outcome("drift", f"{_said(change)}; {stays}{unmeasured}", **numbers)


def unmatched(records):
    """Sentences, one a cause: how many of the compared records had nothing to compare with. None where all had."""
    causes = Counter(entry["reproduced"]["sentence"] for entry in records if entry["reproduced"] and entry["reproduced"]["state"] == NO_BASELINE)
    return [f"{plural(count, 'claim')} had nothing to compare with: {cause}" for cause, count in causes.items()]


def _outcome(state, sentence, **numbers):
    return {"state": state, "sentence": sentence, **dict.fromkeys(("rows", "changed", "worse", "lower", "floor")), **numbers}


def _rows(change):
    return "the estimate is" if change["rows"] is None else f"{change['rows']} effects are"


def _said(change):
    if change["rows"] is None:
        return f"the estimate changed by {number(change['estimate'])}"
    only = f", {change['only']} have no partner" if change["only"] else ""
    side = "against" if (change["worse"] or 0.0) > 0 else "for"
    direction = f", {number(abs(change['worse']))} {side} the claim on average" if change["worse"] else ""
    return f"{change['changed']} of {change['rows']} effects changed{only}{direction}"


def changes(then, now, folder_then, folder_now):
    """How the effects of one claim differ between two runs.

    Returns
    -------
    dict
        ``identical``, ``rows`` shared, ``changed`` ones, ``only`` (without partner), largest change of one ``effect``, mean change
        ``worse`` (positive where it is against the claim), change of the ``estimate``, and the ``pairs``. Rows are None where the effect is
        no mean over items.
    """
    names = ("estimate", "lower", "upper")
    moved = abs((now["estimate"] or 0.0) - (then["estimate"] or 0.0))
    found = {"rows": None, "changed": None, "only": 0, "effect": 0.0, "worse": None, "estimate": moved, "pairs": None}
    if then["effects"] is None or now["effects"] is None:
        same = then["effects"] == now["effects"] and all(then[name] == now[name] for name in names)
        return {**found, "identical": same}
    if then["effects"] == now["effects"]:
        return {**found, "identical": True, "rows": now["effects"]["rows"]["shape"][0], "changed": 0, "worse": 0.0}
    rows = [effects.load(folder, one["effects"]) for folder, one in ((folder_then, then), (folder_now, now))]
    pairs = effects.matched(*rows)
    difference = pairs["second"] - pairs["first"]
    found |= {"identical": False, "rows": difference.size, "changed": int(np.count_nonzero(difference)), "only": pairs["only"]}
    if difference.size:
        against = worsening(now["test"]["kind"], pairs["second"].mean()) * difference
        limits = [one["bounds"] for one in rows]
        width = None if None in limits else max(high - low for low, high in limits)
        found |= {"effect": float(np.max(np.abs(difference))), "worse": float(against.mean())}
        found["pairs"] = {**pairs, "against": against, "bounds": None if width is None else (-width, width)}
    return found


def worsening(kind, mean):
    """+1 where a larger effect is against a claim of this kind, -1 where a smaller one is; ``mean`` is the effect it has."""
    return -1.0 if kind in ("superiority", "trend") else 1.0 if kind == "non-inferiority" or mean >= 0 else -1.0


def _within(change, floor):
    if change["rows"] is None:
        return change["estimate"] <= floor.estimate
    if not change["rows"] or change["only"]:
        return False
    return change["effect"] <= floor.effect and change["changed"] / change["rows"] <= floor.changed and abs(change["worse"]) <= floor.mean


def _surely_worse(change, entry):
    """One-sided lower bound of the mean change against the claim, at the claim's level."""
    pairs = change["pairs"]
    if np.unique(pairs["clusters"]).size < 3 or entry["alpha"] is None:
        return None
    level = entry["alpha"] / entry["family_size"]
    found = stats.estimate_mean(pairs["against"], pairs["clusters"], pairs["seeds"], bounds=pairs["bounds"], smallest_alpha=level)
    return change["worse"] if found is None else float(found.bounds(level)[0])


def update(path, identity, records, folder, reason):
    """Append a run to the baseline file.

    Parameters
    ----------
    path, identity, records, folder
        The file; the run, its records, and where its arrays are.
    reason : str
        Why; ``"A/A"`` where the same code was run again to measure the noise.

    Returns
    -------
    int
        Claim instances that were added.

    Raises
    ------
    ValueError
        For an A/A run of other code, or of a claim that has no baseline.
    """
    with ledger.locked(path):
        known = load(path)
        added = [_entry(known, identity, entry, folder, reason) for entry in records if entry["outcome"] not in ("crashed", "skipped")]
        for entry in added:
            if entry["kind"] == "baseline" and entry["effects"] is not None:
                effects.copy(entry["effects"], folder, path.parent)
        ledger.append(path, added)
    return len(added)


def _entry(known, identity, entry, folder, reason):
    made = {name: identity[name] for name in ("started", "commit", "versions")} | {"run": identity["name"], "reason": reason}
    base = {"claim_id": entry["claim_id"], "params": entry["params"], **made}
    if reason != SAME_CODE:
        names = ("tier", "verdict", "estimate", "lower", "upper", "test", "effects")
        kept = {"declaration": entry["declaration"]["hash"], **{name: entry[name] for name in names}}
        return {"kind": "baseline", "id": f"{identity['name']} {_instance(entry)}", **base, **keys(identity), **kept}
    then, _, missing = known.find(identity, entry)
    if missing:
        raise ValueError(f"{title(entry)}: {missing[1]}; {SAME_CODE} runs the code of a baseline again")
    other = [name for name in ("commit", "versions") if then[name] != identity[name]]
    if other:
        changed = f"this is not the code of its baseline, the {' and the '.join(other)} changed"
        raise ValueError(f"{title(entry)}: {changed}; {SAME_CODE} runs the same code again")
    change = changes(then, entry, known.folder, folder)
    share = change["changed"] / change["rows"] if change["rows"] else 0.0
    measured = {"effect": change["effect"], "changed": share, "mean": abs(change["worse"] or 0.0), "estimate": change["estimate"]}
    return {"kind": "rerun", "of": then["id"], **base, **measured}
