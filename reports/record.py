"""The evidence record: one flat JSON object per claim instance, builtins only.

``to_builtins``  NumPy, pandas, enums and dataclasses to what strict JSON can hold
``dumps``        strict JSON (no NaN), stable key order left to the caller
``build``        a record from a declaration and its decision
``unmeasured``   a record for a claim that never reached a decision (skipped, crashed)
``load_run``     a run's identity and records, read back
``validate``     check a record against ``schema/record.schema.json``
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

SCHEMA_VERSION = 1
SCHEMA_PATH = Path(__file__).parent / "schema" / "record.schema.json"

VERDICTS = ("supported", "refuted", "inconclusive", "invalid")

_JSON_TYPES = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


class RecordError(ValueError):
    """An evidence record that does not satisfy its published schema."""


def to_builtins(value, where="value"):
    """Convert to JSON builtins; NaN and infinities become ``None``.

    Parameters
    ----------
    value : object
        Builtins, NumPy scalars and arrays, enums, paths, dataclasses, mappings, sequences.
    where : str
        Path to the value, used in the error message.

    Raises
    ------
    TypeError
        For a type JSON cannot hold, naming where it sits.
    """
    if isinstance(value, enum.Enum):
        return to_builtins(value.value, where)
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return to_builtins(value.tolist(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {_key(key, where): to_builtins(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_builtins(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((to_builtins(item, where) for item in value), key=dumps)
    if hasattr(value, "as_dict"):
        return to_builtins(value.as_dict(), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_builtins({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold: pass builtins or NumPy values")


def _key(key, where):
    key = to_builtins(key, where)
    return key if isinstance(key, str) else dumps(key)


def dumps(value, **options):
    """Strict JSON: NaN and infinity are an error, text stays readable."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, **options)


def instance_key(claim_id, params):
    """The identity of a claim instance: its id and its parameters, never a node id."""
    return f"{claim_id} {dumps(params, sort_keys=True)}"


def describe_params(params):
    """``{"task": "color", "layer": 3}`` as ``task=color, layer=3``."""
    return ", ".join(f"{name}={value}" for name, value in params.items())


def _declared(instance, *, reproduce):
    claim = instance.claim
    declaration = {**to_builtins(claim.as_dict(), claim.id), "hash": claim.hash}
    return {
        "schema_version": SCHEMA_VERSION,
        "claim_id": claim.id,
        "params": instance.params,
        "hypothesis": claim.hypothesis,
        "tier": claim.tier,
        "sentence": claim.sentence,
        "declaration": declaration,
        "test": {"kind": claim.test.kind, "description": claim.test.describe()},
        "nodeid": instance.nodeid,
        "reproduce": reproduce,
    }


_MEASURED = (
    "estimate", "lower", "upper", "threshold", "alpha", "family_size", "confidence", "method", "p_value", "given_p_value",
    "n_items", "n_clusters", "n_seeds", "mde", "n_needed", "underpowered", "baseline",
)  # fmt: skip


def build(instance, decision, *, details, figures, reproduce, duration_s):
    """The record of a decided claim instance.

    Parameters
    ----------
    instance : reports.claims.ClaimInstance
    decision : vlm_core.stats.Decision
    details, figures : JSON builtins
    reproduce : str
        Command that runs this claim alone.
    duration_s : float
    """
    decided = to_builtins(decision.as_dict(), instance.claim.id)
    return {
        **_declared(instance, reproduce=reproduce),
        "verdict": decided["verdict"],
        "reason": decided["reason"],
        **{name: decided.get(name) for name in _MEASURED},
        "p_holm": None,
        "controls": decided.get("controls") or [],
        "details": details,
        "figures": figures,
        "duration_s": round(duration_s, 3),
        "outcome": "decided",
    }


def unmeasured(instance, *, outcome, reason, reproduce, duration_s, figures=()):
    """The record of a claim that was skipped or crashed before a verdict: never evidence."""
    return {
        **_declared(instance, reproduce=reproduce),
        "verdict": "invalid",
        "reason": reason,
        **dict.fromkeys(_MEASURED),
        "p_holm": None,
        "controls": [],
        "details": {},
        "figures": list(figures),
        "duration_s": round(duration_s, 3),
        "outcome": outcome,
    }


@functools.cache
def schema():
    """The published JSON Schema of a record."""
    return json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))


def validate(record):
    """Check a record against the published schema.

    Covers the keywords that schema uses: type, enum, required, properties,
    additionalProperties, items.

    Raises
    ------
    RecordError
        Naming the offending field.
    """
    _check(record, schema(), record.get("claim_id", "record") if isinstance(record, dict) else "record")
    return record


def _check(value, rule, where):
    if "type" in rule:
        allowed = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
        if not any(_is(value, name) for name in allowed):
            raise RecordError(f"{where} is {type(value).__name__}, expected {' or '.join(allowed)}")
    if "enum" in rule and value not in rule["enum"]:
        raise RecordError(f"{where} is {value!r}, expected one of {rule['enum']}")
    if isinstance(value, dict):
        known = rule.get("properties", {})
        missing = [name for name in rule.get("required", ()) if name not in value]
        if missing:
            raise RecordError(f"{where} lacks {', '.join(missing)}")
        for name, item in value.items():
            if name in known:
                _check(item, known[name], f"{where}.{name}")
            elif rule.get("additionalProperties") is False:
                raise RecordError(f"{where}.{name} is not a field of the record schema")
    if isinstance(value, list) and "items" in rule:
        for index, item in enumerate(value):
            _check(item, rule["items"], f"{where}[{index}]")


def _is(value, name):
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, _JSON_TYPES[name])


def load_run(folder):
    """Read a run back: ``(identity, records)``; a run that was killed has its records in ``records.jsonl`` only."""
    identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    finished = folder / "evidence.json"
    if finished.exists():
        return identity, json.loads(finished.read_text(encoding="utf-8"))
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return identity, [json.loads(line) for line in lines]
