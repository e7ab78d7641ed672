"""Record what observers see of a set of items, to disk, item by item.

``record(subject, items, config, out)``   observe and write; goes on where a killed run stopped
``Recording.open(out)``                   read back, lazily

Scalars with names (per layer, head, token group) become tables in Parquet, everything else arrays in safetensors, both in
shards of a few items. A shard is a folder that appears whole or not at all, named after the items in it, so a run that was
killed loses nothing it finished and computes nothing twice. What memory holds is one shard, however many items there are.

    out/identity.json                     subject, configuration, intervention, versions
    out/index.parquet                     item -> shard and row, written when the last shard is there
    out/shards/00000-<items>/shard.json, arrays.safetensors, <table>.parquet

From the command line, with one JSON object (``id, image, prompt, ...``; ``image`` a path) a line::

    python -m vlm_core.recording --subject MODEL --config recording.toml --items items.jsonl --out recorded
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file

from vlm_core.errors import SubjectError
from vlm_core.files import as_folder, write_whole
from vlm_core.identity import code_digest, item_digest
from vlm_core.images import as_rgb
from vlm_core.interventions import Intervention, describe, parts, require_row
from vlm_core.items import item_field, require_distinct, require_item, require_items, take
from vlm_core.observation.at import At
from vlm_core.observation.means import KeyValues, Moments
from vlm_core.observation.observing import observed, prepare
from vlm_core.observation.recording_config import RecordingConfig
from vlm_core.seam.plan import require_possible
from vlm_core.seam.views import Tokens
from vlm_core.subjects.embed import Encoded
from vlm_core.subjects.groups import Groups
from vlm_core.subjects.load import load_vlm
from vlm_core.subjects.subject import Subject, require_subject

__all__ = ["Recording", "RecordingConfig", "record"]

_CONTENT = ("id", "prompt", "answer", "candidates")


def record(
    subject: Subject,
    items: Sequence,
    config: RecordingConfig,
    out: str | Path,
    *,
    intervention: Intervention | tuple[Intervention, ...] | None = None,
    groups: Groups | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """Observe items and write what was seen.

    Parameters
    ----------
    items : sequence of items
        With ``id`` (distinct), ``image`` and ``prompt``, and what the observers ask for.
    config : RecordingConfig
    out : directory
        New, or of the same recording: finished shards of the same items are kept.
    intervention : optional
        In force while observing.
    groups : callable, optional
        Named token groups of an item, as in ``observe``.
    progress : callable, optional
        Called with (items done, items in all).

    Raises
    ------
    ValueError, TypeError
        If ``out`` holds a recording of something else, two items have the same id, or an argument cannot be what it should be; the
        latter before anything is written.
    """
    require_subject(subject)
    if not isinstance(config, RecordingConfig):
        raise TypeError(
            f"config must be a RecordingConfig, got {config!r:.60} ({type(config).__name__}): read one with RecordingConfig.from_file(path)"
        )
    require_items(items)
    require_row(intervention, "intervention")
    require_possible(intervention, subject.anatomy, named=groups is not None)
    for name, function in (("groups", groups), ("progress", progress)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a callable or None, got {function!r:.60} ({type(function).__name__})")
    out = _folder(out)
    if not len(items):
        raise ValueError("there is nothing to record: pass at least one item")
    # Of a lazy sequence the ids are known when its images have been read.
    if isinstance(items, list | tuple) or hasattr(items, "column_names"):
        require_distinct(items)
    (out / "shards").mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):
        observers = _begin(subject, items, config, out, intervention, groups)
        index: list[pd.DataFrame] = []
        for number, start in enumerate(range(0, len(items), config.shard_items)):
            chunk = take(items, range(start, min(start + config.shard_items, len(items))))
            shard = out / "shards" / f"{number:05d}-{_digest(chunk)}"
            if not shard.is_dir():
                _write_shard(shard, subject, chunk, observers, config, intervention, groups)
            ids = [str(item_field(item, "id")) for item in chunk]
            index.append(pd.DataFrame({"item": ids, "shard": shard.name, "row": range(len(ids))}))
            if progress is not None:
                progress(min(start + config.shard_items, len(items)), len(items))
        whole = pd.concat(index, ignore_index=True)
        require_distinct([{"id": one} for one in whole["item"]])
        partial = out / "index.parquet.partial"
        whole.to_parquet(partial, index=False)
        os.replace(partial, out / "index.parquet")
    return Recording.open(out)


def _begin(subject, items, config, out, intervention, groups) -> dict[str, Any]:
    """Observers made ready, and the run's identity written or checked."""
    identity = {
        "subject": {"name": subject.name, **dict(zip(("weights", "dtype", "device", "settings"), subject.fingerprint, strict=True))},
        "config": {key: value for key, value in config.to_dict().items() if key != "batch_rows"},
        "intervention": {"what": describe(intervention), "parts": [part.digest for part in parts(intervention)]},
        "groups": code_digest(groups),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
    }
    path = out / "identity.json"
    if path.is_file():
        known = _read_json(path)
        differing = [key for key in identity if known.get(key) != identity[key]]
        # Where nothing was recorded yet (the first items failed), there is nothing to keep apart from.
        if differing and any((out / "shards").glob("[!.]*")):
            raise ValueError(
                f"{out} holds a recording with another {' and '.join(differing)}: record into a new directory"
            )
        if not differing:
            # What was found on the first items (sinks) stays what it was.
            return dict(RecordingConfig.from_dict(known["prepared"]).observers)
    ready = dict(zip(config.observers, prepare(subject, items, list(config.observers.values())), strict=True))
    identity["prepared"] = replace(config, observers=ready).to_dict()
    write_whole(path, json.dumps(identity, indent=1))
    return ready


def _folder(out: str | Path) -> Path:
    if not isinstance(out, str | Path) or not str(out):
        raise TypeError(f"a recording's directory must be a path, got {out!r:.60} ({type(out).__name__})")
    return as_folder(out, "a recording's directory")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): record into a new directory") from error


def _digest(items: Sequence) -> str:
    return hashlib.sha256("".join(item_digest(item, _CONTENT) for item in items).encode()).hexdigest()[:16]


def _write_shard(shard: Path, subject, items, observers, config, intervention, groups) -> None:
    arrays: dict[str, torch.Tensor] = {}
    tables: dict[str, list[pd.DataFrame]] = {}
    moments: dict[str, Moments] = {}
    layers: dict[str, tuple[int, ...]] = {}
    row = 0
    for some in observed(subject, items, list(observers.values()), intervention, config.batch_rows, groups):
        ids = [str(item_field(item, "id")) for item in some.items]
        for name, observer, values, along in zip(observers, observers.values(), some.values, some.layers, strict=True):
            if not values:
                raise ValueError(f"observer '{name}' saw nothing: none of the layers that it asks for is there")
            layers[name] = along
            if isinstance(observer.observer if isinstance(observer, At) else observer, KeyValues):
                part = Moments(**KeyValues.joined(values))
                moments[name] = moments[name].joined(part) if name in moments else part
            elif getattr(observer, "axes", None):
                axes = ((("layer", along), *observer.axes) if along else observer.axes)
                tables.setdefault(name, []).append(_table(ids, axes, values[""].float().numpy()))
            else:
                ragged = getattr(observer, "ragged", {})
                for key, tensor in values.items():
                    for position, encoded in enumerate(some.encoded):
                        kept = _cut(tensor[position], ragged, encoded)
                        arrays[f"{row + position}/{_named(name, key)}"] = _as_dtype(kept, config.dtype)
        row += len(ids)
    for name, found in moments.items():
        arrays |= {f"moments/{name}/{key}": tensor.contiguous() for key, tensor in vars(found).items()}
    partial = shard.with_name(f".{shard.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(arrays, partial / "arrays.safetensors")
    for name, pieces in tables.items():
        pd.concat(pieces, ignore_index=True).to_parquet(partial / f"{name}.parquet", index=False)
    keys = sorted({key.split("/", 1)[1] for key in arrays if not key.startswith("moments/")})
    about = {"n_items": len(items), "layers": layers, "tables": list(tables), "arrays": keys, "moments": list(moments)}
    write_whole(partial / "shard.json", json.dumps(about, indent=1))
    os.replace(partial, shard)


def _named(name: str, key: str) -> str:
    return f"{name}.{key}" if key else name


def _as_dtype(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    tensor = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _cut(values: torch.Tensor, ragged: dict[int, str], encoded: Encoded) -> torch.Tensor:
    """One item's values without the padding that its batch gave them."""
    for axis, group in ragged.items():
        # Where the image lies outside the sequence, token groups do not say how long it is.
        if values.ndim >= -axis and encoded.cross is None:
            own = Tokens(
                image=encoded.image[None],
                valid=torch.ones_like(encoded.image)[None],
                rows=torch.zeros(1, dtype=torch.long),
                named={name: members[None] for name, members in encoded.groups.items()},
            )
            values = values.narrow(axis, 0, min(int(own.group(group).sum()), values.shape[axis]))
    return values


def _table(ids: list[str], axes: tuple, values: np.ndarray) -> pd.DataFrame:
    names = ["item", *(name for name, _ in axes)]
    labels = [ids, *(range(size) if own is None else own for (_, own), size in zip(axes, values.shape[1:], strict=True))]
    columns = {}
    for axis, (name, own) in enumerate(zip(names, labels, strict=True)):
        own = np.array(list(own), dtype=object if isinstance(own[0], str) else np.int32)
        shape = [1] * values.ndim
        shape[axis] = len(own)
        columns[name] = np.broadcast_to(own.reshape(shape), values.shape).reshape(-1)
    return pd.DataFrame({**columns, "value": values.reshape(-1)})


@dataclass(frozen=True, eq=False)
class Recording:
    """A finished recording. Nothing is read before it is asked for.

    Attributes
    ----------
    path : Path
    identity : dict
        What was recorded of which subject under which versions.
    index : DataFrame
        ``item, shard, row``, in the order recorded.
    """

    path: Path
    identity: dict
    index: pd.DataFrame

    @classmethod
    def open(cls, out: str | Path) -> Recording:
        """The recording in ``out``; a ``ValueError`` where there is none or it is unfinished."""
        out = _folder(out)
        if not (out / "identity.json").is_file():
            raise ValueError(f"{out} holds no recording: it has no identity.json")
        if not (out / "index.parquet").is_file():
            raise ValueError(f"the recording in {out} is unfinished: call record(...) again with the same items")
        return cls(out, _read_json(out / "identity.json"), pd.read_parquet(out / "index.parquet"))

    @property
    def items(self) -> list[str]:
        """Ids of the recorded items."""
        return self.index["item"].tolist()

    @cached_property
    def _about(self) -> dict:
        return json.loads((self._shard(self.index["shard"].iloc[0]) / "shard.json").read_text())

    @cached_property
    def _place(self) -> dict[str, tuple[str, int]]:
        return {item: (shard, row) for item, shard, row in self.index.itertuples(index=False)}

    @property
    def tables(self) -> list[str]:
        """Names that ``table`` knows."""
        return self._about["tables"]

    @property
    def arrays(self) -> list[str]:
        """Names that ``array`` knows; ``name.key`` where an observer returns several arrays."""
        return self._about["arrays"]

    def layers(self, name: str) -> tuple[int, ...]:
        """Layers along the first axis of an observer's arrays; empty where they have no such axis."""
        return tuple(self._about["layers"][self._known(name.split(".")[0], list(self._about["layers"]))])

    def table(self, name: str) -> pd.DataFrame:
        """``item``, one column an axis (``layer``, ``head``, ...) and ``value``, in the order recorded."""
        self._known(name, self.tables)
        shards = self.index["shard"].drop_duplicates()
        return pd.concat([pd.read_parquet(self._shard(one) / f"{name}.parquet") for one in shards], ignore_index=True)

    def array(self, name: str, item: str) -> np.ndarray:
        """One item's array ``[layer, ...]`` without padding; only it is read. ``bfloat16`` comes as float32."""
        self._known(name, self.arrays)
        if item not in self._place:
            raise ValueError(f"item '{item}' is not in the recording of {len(self._place)} items in {self.path}")
        shard, row = self._place[item]
        with safe_open(self._shard(shard) / "arrays.safetensors", framework="pt") as stored:
            tensor = stored.get_tensor(f"{row}/{name}")
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def moments(self, name: str) -> Moments:
        """Moments of keys and values over the whole set (``KeyValues``)."""
        self._known(name, self._about["moments"])
        total: Moments | None = None
        for shard in self.index["shard"].drop_duplicates():
            with safe_open(self._shard(shard) / "arrays.safetensors", framework="pt") as stored:
                part = Moments(*(stored.get_tensor(f"moments/{name}/{key}") for key in ("count", "mean", "m2")))
            total = part if total is None else total.joined(part)
        return total

    def _shard(self, name: str) -> Path:
        return self.path / "shards" / name

    def _known(self, name: str, names: list[str]) -> str:
        if name not in names:
            raise ValueError(f"the recording in {self.path} has no '{name}' of this kind: it has {', '.join(names) or 'none'}")
        return name


class _JsonLines(Sequence):
    """Items of a JSON-lines file, images opened when asked for."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"there are no items at {path}: it is no file, check the path")
        self._folder = path.parent
        self._lines = [self._parsed(path, number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
        for item in self._lines:
            require_item(item, ("id", "prompt"))
            shown = self._folder / str(item_field(item, "image"))
            if not shown.is_file():
                raise ValueError(f"item {item['id']!r} of {path} names the image {item['image']!r}: there is no such file in {self._folder}")

    @staticmethod
    def _parsed(path: Path, number: int, line: str) -> dict:
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no JSON ({error}): write one object a line") from error
        if not isinstance(item, dict):
            raise ValueError(f"line {number} of {path} is no object but {item!r:.60}: write {{\"id\": ..., \"image\": ..., \"prompt\": ...}}")
        return item

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        item = self._lines[index]
        try:
            with Image.open(self._folder / item["image"]) as image:
                return {**item, "image": as_rgb(image)}
        except UnidentifiedImageError as error:
            raise ValueError(f"the image {item['image']!r} of item {item['id']!r} is no image that Pillow knows: save it as PNG") from error

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vlm_core.recording", description="Record what a model does on items.")
    for option, what in (
        ("--subject", "directory or Hub id of the checkpoint"),
        ("--config", "what to record: a .toml or .yaml file"),
        ("--items", "JSON lines with id, image (a path), prompt and what the observers ask for"),
        ("--out", "directory of the recording"),
    ):
        parser.add_argument(option, required=True, help=what)
    options = parser.parse_args(arguments)
    try:
        config, items = RecordingConfig.from_file(options.config), _JsonLines(Path(options.items))
        recording = record(load_vlm(options.subject), items, config, options.out)
    except (SubjectError, ValueError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
    print(f"{len(recording.items)} items in {recording.path}: {', '.join((*recording.tables, *recording.arrays))}")


if __name__ == "__main__":
    main()
