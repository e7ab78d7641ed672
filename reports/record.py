"""The evidence record: one flat JSON object per claim instance, builtins only.

``to_builtins``    NumPy, pandas, enums and dataclasses to what strict JSON can hold
``from_builtins``  NaN and infinities back from their names
``read_array``     a large array back from the file that is named by its content
``dumps``          strict JSON (no NaN), stable key order left to the caller
``build``          a record from a declaration and its decision
``unmeasured``     a record for a claim that never reached a decision (skipped, crashed)
``load_run``       a run's identity and records, read back
``validate``       check a record (or a run's identity) against its published JSON Schema in ``schema/``
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import numpy as np

SCHEMA_VERSION = 1
SCHEMAS = Path(__file__).parent / "schema"

VERDICTS = ("supported", "refuted", "inconclusive", "invalid")

INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}
NON_FINITE = {"NaN": math.nan, **INFINITE}
"""What JSON has no number for, by the names that protobuf's JSON mapping gives them."""

ARRAYS = "arrays"
"""Folder of a run for large arrays."""
LARGE_ARRAY = 16384
"""Bytes from which on an array is kept in a file of its own where there is a place for it."""


class RecordError(ValueError):
    """A record, a run's identity or a stored array that is not what its published schema, or its name, says."""


def to_builtins(value, where="value", *, keep=(), arrays=None):
    """Convert to JSON builtins; finite floats come back from JSON bit by bit.

    Parameters
    ----------
    value : object
        Builtins, NumPy scalars and arrays, enums, paths, dataclasses, mappings, sequences.
    where : str
        Path to the value, used in the error message.
    keep : collection of str
        Which of ``NON_FINITE`` are written by name, so that `from_builtins` gives them back; the others become ``None``.
    arrays : dict, optional
        Takes arrays of at least ``LARGE_ARRAY`` bytes, as SHA-256 → content of an ``.npy`` file; in their place stands
        ``{"array": SHA-256, "shape": ..., "dtype": ...}``, which `read_array` reads. Without it every array becomes a list.

    Raises
    ------
    TypeError
        For a type JSON cannot hold, or a text that is the name of a kept number, naming where it sits.
    """
    again = functools.partial(to_builtins, keep=keep, arrays=arrays)
    if isinstance(value, enum.Enum):
        return again(value.value, where)
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    if isinstance(value, str):
        if value in keep:
            raise TypeError(f"{where} is the text {value!r}, which stands for the number in a record: say it in other words")
        return str(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else _named(value, keep)
    if isinstance(value, np.ndarray):
        large = arrays is not None and value.nbytes >= LARGE_ARRAY and not value.dtype.hasobject
        return store_array(value, arrays) if large else again(value.tolist(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {_key(key, where): again(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [again(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((again(item, where) for item in value), key=dumps)
    if hasattr(value, "as_dict"):
        return again(value.as_dict(), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return again({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold: pass builtins or NumPy values")


def _named(value, keep):
    name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return name if name in keep else None


def store_array(array, arrays):
    """What stands in a record for an array, whose content ``arrays`` takes, as SHA-256 → content of an ``.npy`` file; see `read_array`."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    arrays[digest] = file.getvalue()
    return {"array": digest, "shape": list(array.shape), "dtype": str(array.dtype)}


def from_builtins(value):
    """What `to_builtins` was given, as far as numbers go: names of ``NON_FINITE`` become those numbers."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [from_builtins(item) for item in value]
    if isinstance(value, dict):
        return {name: from_builtins(item) for name, item in value.items()}
    return value


def property_value(value):
    """A test's property as a builtin that crosses process borders and reads well in JUnit XML: what JSON cannot hold as its text."""
    try:
        return to_builtins(value, keep=NON_FINITE)
    except TypeError:
        return str(value)


def properties(record):
    """What JUnit XML says of a claim, as ``(name, value)`` pairs."""
    names = ("claim_id", "params", "verdict", "outcome", "estimate", "lower", "upper", "threshold", "p_value")
    said = [(name, describe_params(record["params"]) if name == "params" else record[name]) for name in names]
    return [(name, value) for name, value in said if value not in (None, "")] + [("declaration", record["declaration"]["hash"])]


def read_array(folder, reference):
    """A large array of a run.

    Parameters
    ----------
    folder : pathlib.Path
        The run.
    reference : dict
        What stands in the record: ``{"array": SHA-256, ...}``.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    RecordError
        Where the file's content is not the one it is named by.
    """
    path = folder / ARRAYS / f"{reference['array']}.npy"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != reference["array"]:
        raise RecordError(f"{path} is not what it was: its content has another SHA-256 than its name")
    return np.load(io.BytesIO(content), allow_pickle=False)


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
    if claim != instance.declared:
        declaration["declared"] = {"alpha": instance.declared.alpha, "hash": instance.declared.hash}
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

_NIGHTLY = ("effects", "reproduced", "replicated")


def build(instance, decision, *, details, figures, reproduce, duration_s, effects=None):
    """The record of a decided claim instance.

    Parameters
    ----------
    instance : reports.claims.ClaimInstance
    decision : vlm_core.stats.Decision
    details, figures : JSON builtins
    reproduce : str
        Command that runs this claim alone.
    duration_s : float
    effects : dict, optional
        The rows that were decided on (`reports.effects.store`); None where the effect is no mean over items.
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
        **dict.fromkeys(_NIGHTLY),
        "effects": effects,
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
        **dict.fromkeys(_NIGHTLY),
        "duration_s": round(duration_s, 3),
        "outcome": outcome,
    }


@functools.cache
def schema(name="record"):
    """A published JSON Schema: of a ``record``, or of a ``run``'s identity."""
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


def _is_number(checker, value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("number", _is_number)
)


@functools.cache
def _validator(name):
    return _Validator(schema(name))


def validate(content, name="record"):
    """Check a record, or a run's identity, against its published schema; NaN and infinities are no JSON numbers.

    Raises
    ------
    RecordError
        Naming the offending field.
    """
    error = next(iter(_validator(name).iter_errors(content)), None)
    if error is not None:
        whose = content.get("claim_id" if name == "record" else "name", name) if isinstance(content, dict) else name
        raise RecordError(_sentence(error, f"{whose}{_path(error.absolute_path)}"))
    return content


def _path(parts):
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


def _sentence(error, where):
    value, rule = error.instance, error.validator_value
    if error.validator == "type":
        return f"{where} is {type(value).__name__}, expected {rule if isinstance(rule, str) else ' or '.join(rule)}"
    if error.validator == "enum":
        return f"{where} is {value!r}, expected one of {rule}"
    if error.validator == "required":
        return f"{where} lacks {', '.join(name for name in rule if name not in value)}"
    if error.validator == "additionalProperties":
        return f"{where}.{next(name for name in value if name not in error.schema['properties'])} is not a field of its schema"
    return f"{where}: {error.message}"


def load_run(folder):
    """Read a run back: ``(identity, records)``.

    A run that was killed has its records in ``records.jsonl`` only; a last line that was being written when it ended is left out.
    """
    identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    finished = folder / "evidence.json"
    if finished.exists():
        return identity, json.loads(finished.read_text(encoding="utf-8"))
    appended = folder / "records.jsonl"
    *lines, rest = appended.read_text(encoding="utf-8", errors="replace").split("\n") if appended.exists() else [""]
    records = [json.loads(line) for line in lines]
    unfinished = " and one was being written" if rest else ""
    ended = f"it has the {len(records)} claim{'s' * (len(records) != 1)} that had finished by then{unfinished}"
    counts = dict(Counter(entry["verdict"] for entry in records))
    return {**identity, "counts": counts, "problems": [*identity["problems"], ended]}, records
