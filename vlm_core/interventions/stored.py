"""Interventions as JSON, and back.

``save_interventions(path, rows)``      JSON at ``path``, tensors beside it in a safetensors file, each by its digest
``load_interventions(path)``            the same rows again, equal and with equal hashes
``to_dict(...)``, ``from_dict(...)``    one row as builtins; the tensors it needs come and go apart (``tensors_of``)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import vlm_core.interventions as interventions
from vlm_core.interventions import Row, parts, require_row
from vlm_core.interventions.policy import Policy, policy_kinds
from vlm_core.interventions.sources import (
    Activations,
    Couplings,
    GateWeights,
    GaussianNoise,
    HeadDirections,
    HeadMeans,
    ImageKV,
    ImageKVMeans,
    Source,
    Vector,
)

__all__ = ["from_dict", "load_interventions", "save_interventions", "tensors_of", "to_dict"]

VERSION = 1
"""Of the files that ``save_interventions`` writes."""

_KINDS = (
    "DropTokens",
    "KnockOut",
    "MeanHeads",
    "MergeTokens",
    "Patch",
    "RedirectHeads",
    "ReplaceImageKV",
    "ReplaceTokens",
    "ResampleHeads",
    "Steer",
    "ZeroHeads",
)
_FIELDS = {
    Couplings: ("items", "counts", "values"),
    GateWeights: ("token", "question", "bias", "out", "direct", "subject"),
    HeadDirections: ("values",),
    HeadMeans: ("values",),
    ImageKVMeans: ("keys", "values"),
    ImageKV: ("keys", "values"),
    Vector: ("values",),
}
_SOURCES = {kind.__name__: kind for kind in _FIELDS}


def to_dict(row: Row) -> Any:
    """One row as builtins: None, a dictionary, or a list of them for a tuple."""
    require_row(row)
    if isinstance(row, tuple):
        return [part.to_dict() for part in row]
    return None if row is None else row.to_dict()


def tensors_of(row: Row) -> dict[str, torch.Tensor]:
    """The tensors behind one row, named by kind, digest and field."""
    tensors = {}
    for part in parts(row):
        policies = [value for value in vars(part).values() if isinstance(value, Policy)]
        for source in (value for declared in (part, *policies) for value in vars(declared).values()):
            if isinstance(source, Source) and not isinstance(source, GaussianNoise):
                tensors.update(_tensors(source))
    return tensors


def from_dict(content: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> Row:
    """One row from what ``to_dict`` gave.

    Parameters
    ----------
    tensors : mapping of str to Tensor, optional
        As ``tensors_of`` names them.

    Raises
    ------
    ValueError
        For an unknown kind, fields that it does not have, or a tensor that is missing or not what it was.
    """
    if content is None:
        return None
    if isinstance(content, list):
        row = tuple(from_dict(part, tensors) for part in content)
        if any(part is None or isinstance(part, tuple) for part in row):
            raise ValueError("a stored row is a list that holds a list or nothing: interventions applied together are one flat list")
        return row
    if not isinstance(content, Mapping):
        raise ValueError(f"a stored row is null, a table with a 'kind' or a list of them, got {content!r:.60}")
    fields = dict(content)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"'{kind}' is not an intervention: the known ones are {', '.join(_KINDS)}")
    return _made(getattr(interventions, kind), fields, tensors or {})


def _made(kind: type, fields: dict, tensors: Mapping[str, torch.Tensor]):
    for name, value in fields.items():
        if isinstance(value, dict):
            fields[name] = _policy(value, tensors) if name == "policy" else _source(value, tensors)
        elif isinstance(value, list):
            fields[name] = tuple(tuple(one) if isinstance(one, list) else one for one in value)
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"the stored {kind.__name__} has fields {', '.join(sorted(fields))}, which it does not take: {error}") from error


def _policy(content: Mapping, tensors: Mapping[str, torch.Tensor]) -> Policy:
    fields, known = dict(content), policy_kinds()
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"'{kind}' is no policy: the known ones are {', '.join(sorted(known))}")
    return _made(known[kind], fields, tensors)


def save_interventions(path: str | Path, rows: Mapping[str, Row] | Row) -> None:
    """Write one row, or labelled rows, to ``path`` (JSON) and the tensors beside it.

    Tensors go to ``path`` with the ending ``.safetensors``, each once however many rows use it; without tensors there is no such file.

    Raises
    ------
    TypeError
        For what is no row, or a label that is no text.
    ValueError
        For a path that cannot be written.
    """
    path = Path(path)
    if path.suffix in ("", ".safetensors") or path.is_dir():
        raise ValueError(f"{path} cannot hold interventions: name a .json file, the tensors go beside it as .safetensors")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no directory {path.parent}, make it first")
    labelled = rows if isinstance(rows, Mapping) else {"": rows}
    for label, row in labelled.items():
        if not isinstance(label, str):
            raise TypeError(f"labels must be texts, got {label!r} ({type(label).__name__}): JSON would not give it back")
        require_row(row, f"the intervention '{label}'" if label else "rows")
    content = {label: to_dict(row) for label, row in labelled.items()}
    tensors: dict[str, torch.Tensor] = {}
    for row in labelled.values():
        tensors.update(tensors_of(row))
    beside = path.with_suffix(".safetensors")
    if tensors:
        partial = beside.with_suffix(f".{os.getpid()}.partial")
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial)
        os.replace(partial, beside)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    envelope = {"version": VERSION, **({"rows": content} if isinstance(rows, Mapping) else {"row": content[""]})}
    partial.write_text(json.dumps(envelope, indent=1), encoding="utf-8")
    os.replace(partial, path)


def load_interventions(path: str | Path) -> Any:
    """What ``save_interventions`` wrote: one row, or a dictionary of labelled rows.

    Raises
    ------
    ValueError
        One sentence: no such file, no JSON, nothing that ``save_interventions`` wrote, another version, tensors that are missing, damaged
        or not what they were.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there are no interventions at {path}: it is no file, check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): write it again with save_interventions") from error
    if not isinstance(content, dict) or ("row" in content) == ("rows" in content) or not isinstance(content.get("rows", {}), dict):
        raise ValueError(f"{path} holds no interventions: it needs 'row', or 'rows' by label, as save_interventions writes them")
    version = content.get("version", VERSION)
    if version != VERSION:
        raise ValueError(f"{path} is of version {version!r}, this vlm_core reads version {VERSION}: load it with the one that wrote it")
    beside = path.with_suffix(".safetensors")
    try:
        tensors = load_file(beside) if beside.is_file() else {}
    except SafetensorError as error:
        raise ValueError(f"the tensors in {beside} are damaged ({error}): copy or write them again") from error
    if "row" in content:
        return from_dict(content["row"], tensors)
    return {label: from_dict(row, tensors) for label, row in content["rows"].items()}


def _tensors(source: Source) -> dict[str, torch.Tensor]:
    prefix = f"{type(source).__name__}/{source.digest}"
    if isinstance(source, Activations):
        named = {f"value/{site}/{layer}": tensor for (site, layer), tensor in source.values.items()}
        named.update({f"group/{name}": members for name, members in source.groups.items()})
        named["image"] = source.image
    else:
        named = {name: getattr(source, name) for name in _FIELDS[type(source)]}
        if hasattr(source, "count"):
            named["count"] = torch.tensor(source.count)
    return {f"{prefix}/{name}": tensor for name, tensor in named.items()}


def _source(content: Mapping, tensors: Mapping[str, torch.Tensor]) -> Source:
    kind = content.get("kind")
    if kind == "GaussianNoise":
        return GaussianNoise(content.get("scale"), content.get("seed"))
    if not isinstance(kind, str) or kind not in (*_SOURCES, "Activations"):
        raise ValueError(f"'{kind}' is no source of an intervention: the known ones are {', '.join((*_SOURCES, 'Activations, GaussianNoise'))}")
    if not isinstance(content.get("digest"), str):
        raise ValueError(f"a stored {kind} has no digest, so its tensors cannot be found: write it again with save_interventions")
    prefix = f"{kind}/{content['digest']}/"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not own:
        raise ValueError(f"the tensors of {kind} {content['digest']} are missing: keep the .safetensors file beside the JSON")
    if kind == "Activations":
        values, groups = {}, {}
        for name, tensor in own.items():
            what, _, rest = name.partition("/")
            if what == "value":
                site, _, layer = rest.partition("/")
                values[site, int(layer)] = tensor
            elif what == "group":
                groups[rest] = tensor
        source: Source = Activations(values, own["image"], groups)
    else:
        count = {"count": int(own.pop("count"))} if "count" in own else {}
        source = _SOURCES[kind](**own, **count)
    if source.digest != content["digest"]:
        raise ValueError(f"the tensors of {kind} {content['digest']} are not what they were: their digest is {source.digest}")
    return source
