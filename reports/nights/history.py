"""The replicate lane: every night a fresh shard of scenes, and the evidence of all nights together.

A history is a folder. ``shards.jsonl`` says which seed each night drew its scenes with, reserved before anything is measured, so that two
nights never share one; ``history.jsonl`` has one line a claim a night, ``scenes.jsonl`` the scenes of each night by content; ``arrays/``
the effects. All are only appended to. A night joins with everything it has or not at all, and never with a scene that an earlier night of
the same subject has used.

Evidence is an e-process a claim (`vlm_core.stats.eprocess`): it goes on while claim instance, declaration, subject and profile stay the
same, and starts anew where one of them changes. A night on which the claim is invalid (a control failed) is noted and adds nothing.

``reserve``  a shard, and the seed its scenes are drawn with
``Night``    tonight's lines: worked out first, written when the run is
``load``     what a history says, by claim instance
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from reports import effects, provenance, record
from reports.nights import ledger
from reports.wording import number, plural, title
from vlm_core import stats

FIRST_SEED = 1_000_000  # nightly seeds lie above those that people use by hand
_PICTURE = re.compile(r".*-([0-9a-f]{16,})")

EARLIER_NIGHTS = 8  # before drift is looked for
SURPRISE = 0.001  # of nights would lie further out by chance
CONTRADICTED = "the nights contradict each other"


def reserve(folder, seed=None):
    """Take a shard that no night has had.

    Parameters
    ----------
    folder : pathlib.Path
    seed : int, optional
        The shard's seed, where it is asked for; otherwise it follows from the shard's number.

    Returns
    -------
    shard, seed : int

    Raises
    ------
    ValueError
        For a seed that an earlier night has used, or a history that cannot be read.
    """
    path = folder / "shards.jsonl"
    with ledger.locked(path):
        taken = ledger.read(path)
        shard = 1 + max((one["shard"] for one in taken), default=0)
        drawn = FIRST_SEED + shard if seed is None else seed
        for one in taken:
            if one["seed"] == drawn:
                raise ValueError(f"seed {drawn} was that of night {one['shard']}: a night needs scenes that no other has used")
        started = datetime.now(UTC).isoformat(timespec="seconds")
        ledger.append(path, [{"shard": shard, "seed": drawn, "started": started}])
    return shard, drawn


def picture(cluster):
    """What a cluster's id says of its content: the hash it ends in, or all of it."""
    found = _PICTURE.fullmatch(cluster)
    return found[1] if found else cluster


def load(folder):
    """The lines of a history, by claim instance, in the order of the nights.

    Raises
    ------
    ValueError
        Naming a line that cannot be read, or the folder where there is no history in it.
    """
    path = folder / "history.jsonl"
    if not path.exists():
        raise ValueError(f"{folder} holds no history: no night has been written to it")
    found = {}
    for entry in ledger.read(path):
        found.setdefault(record.instance_key(entry["claim_id"], entry["params"]), []).append(entry)
    return found


@dataclass
class Night:
    """Tonight's part of a history.

    Attributes
    ----------
    folder : pathlib.Path
    shard : int
    outcomes : dict
        Claim instance → what stands in its record as ``replicated``.
    warnings : list of str
        Drift, and evidence that started anew.
    """

    folder: object
    shard: int
    outcomes: dict = field(default_factory=dict)
    warnings: list = field(default_factory=list)

    def write(self, identity, records, arrays):
        """Work out what the night adds and append it.

        Parameters
        ----------
        identity : dict
            Of the run.
        records : list of dict
        arrays : pathlib.Path
            Where the run's arrays are.

        Raises
        ------
        ValueError
            Where a scene of tonight was used on an earlier night; nothing is written then.
        """
        path = self.folder / "history.jsonl"
        with ledger.locked(path):
            subject = provenance.subject_key(identity)
            rows = {record.instance_key(entry["claim_id"], entry["params"]): _rows(entry, arrays) for entry in records}
            scenes = self._fresh_scenes(subject, [one for one in rows.values() if one is not None])
            known = load(self.folder) if path.exists() else {}
            lines = []
            for entry in records:
                key = record.instance_key(entry["claim_id"], entry["params"])
                lines.append(self._line(identity, subject, entry, rows[key], known.get(key, [])))
                if rows[key] is not None:
                    effects.copy(entry["effects"], arrays, self.folder)
            # Scenes first: a night cut off between the two files loses its shard, and no scene is used twice.
            ledger.append(self.folder / "scenes.jsonl", [{"night": self.shard, "subject": subject, "scenes": scenes}])
            ledger.append(path, lines)

    def _fresh_scenes(self, subject, rows):
        scenes = sorted({picture(cluster) for one in rows for cluster in one["clusters"].tolist()})
        for night in ledger.read(self.folder / "scenes.jsonl"):
            again = set(scenes).intersection(night["scenes"]) if night["subject"] == subject else ()
            if again:
                shown = f"{min(again)}{', ...' if len(again) > 1 else ''}"
                raise ValueError(
                    f"{plural(len(again), 'scene')} of tonight's {len(scenes)} ({shown}) served on night {night['night']} already: "
                    f"they are no fresh evidence, and the night was not added to {self.folder}"
                )
        return scenes

    def _line(self, identity, subject, entry, rows, earlier):
        same = {"declaration": entry["declaration"]["hash"], "subject": subject, "profile": identity["profile"]}
        before = [one for one in earlier if all(one[name] == value for name, value in same.items())]
        if earlier and not before:
            changed = [name for name, value in same.items() if earlier[-1][name] != value]
            self.warnings.append(f"{title(entry)}: its {' and '.join(changed)} changed, the evidence starts anew")
        self._look_for_drift(entry, [one["estimate"] for one in before if one["verdict"] != "invalid" and one["estimate"] is not None])
        state, outcome = _accumulate(entry, rows, next((one["state"] for one in reversed(before) if one["state"]), None))
        outcome = {"night": self.shard, **outcome}
        if outcome["sentence"].startswith(CONTRADICTED):
            self.warnings.append(f"{title(entry)}: {outcome['sentence']}")
        key = record.instance_key(entry["claim_id"], entry["params"])
        self.outcomes[key] = outcome
        measured = ("verdict", "estimate", "lower", "upper", "threshold", "alpha", "family_size", "n_clusters", "effects")
        names = ("tier", "sentence", "test", *measured)
        made = {name: identity[name] for name in ("started", "seed", "commit", "versions")}
        return {
            "night": self.shard,
            "claim_id": entry["claim_id"],
            "params": entry["params"],
            **same,
            **{name: entry[name] for name in names},
            "run": identity["name"],
            **made,
            "data": {name: value for name, value in identity["data"].items() if isinstance(value, str)},
            "platform": provenance.platform_key(identity),
            "replicated": outcome,
            "state": state,
        }

    def _look_for_drift(self, entry, before):
        """Warn where tonight's estimate is not one of those that the nights before would lead to expect: nothing is decided by it."""
        if len(before) < EARLIER_NIGHTS or entry["estimate"] is None or entry["verdict"] == "invalid":
            return
        from scipy.special import stdtrit  # SciPy is a second to import, and few nights need it here

        spread = float(np.std(before, ddof=1)) * math.sqrt(1 + 1 / len(before))
        away = abs(entry["estimate"] - float(np.mean(before)))
        if away > 1e-12 and away > -float(stdtrit(len(before) - 1, SURPRISE / 2)) * spread:
            usual = f"{number(float(np.mean(before)))} on the {len(before)} nights before"
            self.warnings.append(f"{title(entry)} drifted: {number(entry['estimate'])} tonight, {usual}; its verdict is {entry['verdict']}")


def _rows(entry, arrays):
    """The effects that bets can be made about, or None."""
    if entry["effects"] is None or stats.unsuited(entry["test"]["kind"], entry["threshold"], entry["effects"]["bounds"]):
        return None
    return effects.load(arrays, entry["effects"])


def _accumulate(entry, rows, state):
    """The e-process with tonight's values, and what is said of it."""
    blank = dict.fromkeys(("verdict", "nights", "clusters", "log10_e_support", "log10_e_refute", "log10_needed", "promised"))
    if rows is None and entry["estimate"] is not None:
        why = "its effect is no mean over items" if entry["effects"] is None else None
        why = why or stats.unsuited(entry["test"]["kind"], entry["threshold"], entry["effects"]["bounds"])
        return None, {**blank, "sentence": f"no evidence adds up over nights: {why}"}
    if state is None and rows is None:
        return None, {**blank, "sentence": "not measured tonight"}
    if state:
        found = stats.Replication.from_dict(state)
    else:
        found = stats.Replication(entry["test"]["kind"], entry["threshold"], tuple(rows["bounds"]))
    counts = entry["verdict"] != "invalid" and rows is not None
    values = stats.night_values(rows["effect"], rows["clusters"], rows["seeds"]) if counts else None
    if counts:
        found.update(values)
    said = _said(entry, found, values)
    if not counts:
        said["sentence"] = "invalid tonight, nothing added" + (f"; {said['sentence']}" if found.nights else "")
    if not found.nights:
        said["verdict"] = None
    return found.as_dict(), {**blank, **said}


def _said(entry, found, values):
    level = entry["alpha"] / entry["family_size"] if entry["alpha"] is not None else None
    support, refute = (found.log_e(side) / math.log(10) for side in ("support", "refute"))
    said = {"nights": found.nights, "clusters": found.clusters, "log10_e_support": support, "log10_e_refute": refute}
    if level is None:
        return {**said, "sentence": f"{_power(support)} for, {_power(refute)} against"}
    verdict, needed = found.verdict(level).value, -math.log10(level)
    contradicted = min(found.peaks.values()) >= -math.log(level)
    nights = CONTRADICTED if contradicted else f"{verdict} by {plural(found.nights, 'night')}"
    sentence = f"{nights}: E is {_power(support)} for and {_power(refute)} against, {_power(needed)} decides"
    return {**said, "verdict": verdict, "log10_needed": needed, "promised": _promised(entry, found, values, level), "sentence": sentence}


def _power(exponent):
    """``230``, ``0.04``, ``10^12``."""
    return number(10**exponent) if -2 <= exponent < 6 else f"10^{math.floor(exponent)}"


def _promised(entry, found, values, level):
    """Nights like tonight within which a change of the declared size is caught that comes next; None where a night has no spread."""
    if values is None or values.size < 2 or not entry["threshold"]:
        return None
    declared = {"superiority": stats.Superiority, "non-inferiority": stats.NonInferiority, "equivalence": stats.Equivalence}[found.kind]
    asked = {"after": found.nights, "deviation": float(np.std(values, ddof=1)), "alpha": level, "bounds": found.bounds}
    try:
        return stats.nights_promised(declared(found.limit), values.size, **asked)
    except ValueError:  # twice the margin lies outside what an effect can be
        return None
