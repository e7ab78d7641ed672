"""Known outcomes of a subject.

A claim that a subject is known to refute is a result, not a broken build. The file names it::

    [[expected]]
    claim = "H1.necessity"
    params = { task = "count" }      # optional: without it every instance is meant
    verdict = "refuted"              # or "inconclusive", "invalid"
    reason = "counts by texture; see the card"
    profiles = ["default"]           # optional: without it every profile is meant

JSON takes the same entries as a list. Each becomes ``xfail(raises=..., strict=True)``: a crash is never
swallowed, an unexpected support fails. In a profile that an entry does not name nothing is expected: the verdict counts as it comes.
"""

from __future__ import annotations

import json
import tomllib
import warnings
from dataclasses import dataclass, field

import pytest

from reports.evidence import RAISED_BY
from reports.options import PROFILES


@dataclass(frozen=True)
class Expectation:
    """One entry of an expectations file."""

    claim: str
    verdict: str
    reason: str
    params: dict = field(default_factory=dict, hash=False)
    profiles: tuple = PROFILES

    def matches(self, instance):
        return instance.claim.id == self.claim and self.params.items() <= instance.params.items()


def load(path):
    """Read an expectations file.

    Raises
    ------
    pytest.UsageError
        One sentence naming the file and what is wrong in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix == ".json" else tomllib.loads(text).get("expected", [])
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise pytest.UsageError(f"expectations file {path} cannot be read: {error}") from None
    if not isinstance(entries, list):
        raise pytest.UsageError(f"expectations file {path} must hold a list of entries")
    return [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]


def _entry(path, number, entry):
    where = f"expectations file {path}, entry {number}"
    if not isinstance(entry, dict):
        raise pytest.UsageError(f"{where} is not a table of claim, params, verdict and reason")
    unknown = entry.keys() - {"claim", "params", "verdict", "reason", "profiles"}
    if unknown:
        raise pytest.UsageError(f"{where} has unknown key {sorted(unknown)[0]!r}")
    for name in ("claim", "reason"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise pytest.UsageError(f"{where} needs a {name}")
    verdict = entry.get("verdict", "refuted")
    if verdict not in RAISED_BY:
        raise pytest.UsageError(f"{where} has verdict {verdict!r}, expected one of {', '.join(RAISED_BY)}")
    params = entry.get("params", {})
    if not isinstance(params, dict):
        raise pytest.UsageError(f"{where} has params that are not a table")
    profiles = entry.get("profiles", list(PROFILES))
    if not isinstance(profiles, list) or not profiles:
        raise pytest.UsageError(f"{where} has profiles that are not a list of one or more: expected some of {', '.join(PROFILES)}")
    for name in profiles:
        if name not in PROFILES:
            raise pytest.UsageError(f"{where} has profile {name!r}, expected one of {', '.join(PROFILES)}")
    return Expectation(entry["claim"], verdict, entry["reason"], params, tuple(profiles))


def apply(expected, found, *, profile, whole_suite):
    """Turn the expectations of a profile into strict xfails on the matching items.

    Warns about an entry that matches nothing, or names an exploratory claim (those never gate).

    Parameters
    ----------
    expected : list of Expectation
    found : dict of item to ClaimInstance
    profile : str
        Of the run; entries that do not name it only have to match something.
    whole_suite : bool
        Whether an entry without a match is worth a warning.
    """
    for entry in expected:
        matching = {item: instance for item, instance in found.items() if entry.matches(instance)}
        if not matching and whole_suite:
            warnings.warn(pytest.PytestWarning(f"expectation for {entry.claim} {entry.params} matches no claim"), stacklevel=1)
        if profile not in entry.profiles:
            continue
        for item, instance in matching.items():
            if instance.claim.tier != "confirmatory":
                warnings.warn(pytest.PytestWarning(f"{instance.title} is exploratory: it needs no expectation"), stacklevel=1)
                continue
            item.add_marker(pytest.mark.xfail(raises=RAISED_BY[entry.verdict], strict=True, reason=entry.reason))
