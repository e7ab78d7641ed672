"""What to record, as a declaration that fits in a file.

``RecordingConfig``   observers by name, each switched on or off with its parameters; from TOML, YAML or Python
``KINDS``             every observer's name in a file

A file names what to record, one table an observer. Its name is its kind unless it says otherwise::

    dtype = "float16"              # of arrays; tables are float32
    shard_items = 32               # items in a shard: what a killed run computes again at most
    layers = [0, 1, 2]             # default of every observer that has layers; so with heads

    [observers.attention_mass]
    queries = "text"
    groups = ["image", "bos"]

    [observers.sharpness]
    kind = "attention_entropy"
    heads = [0, 3]

    [observers.full_attention]
    enabled = false
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vlm_core.interventions.numeric import boolean
from vlm_core.observation.at import At
from vlm_core.observation.attention import AttentionEntropy, AttentionMass, FullAttention, TopTokens
from vlm_core.observation.gradients import HeadGradients, ImageGradients, IntegratedGradients
from vlm_core.observation.image_attention import ImageAttention, MaskIoU, TopShare
from vlm_core.observation.lens import DirectLogits, LogitLens
from vlm_core.observation.likeness import TokenLikeness
from vlm_core.observation.means import KeyValues
from vlm_core.observation.outputs import HeadOutputs, HiddenStates
from vlm_core.observation.position import RelativeDistance, RotaryBias
from vlm_core.observation.sinks import SinkMass
from vlm_core.settings import read_settings

__all__ = ["KINDS", "RecordingConfig"]

KINDS: dict[str, type] = {
    "attention_mass": AttentionMass,
    "attention_entropy": AttentionEntropy,
    "sink_mass": SinkMass,
    "mask_iou": MaskIoU,
    "image_attention": ImageAttention,
    "top_share": TopShare,
    "top_tokens": TopTokens,
    "relative_distance": RelativeDistance,
    "rotary_bias": RotaryBias,
    "full_attention": FullAttention,
    "head_outputs": HeadOutputs,
    "direct_logits": DirectLogits,
    "hidden_states": HiddenStates,
    "token_likeness": TokenLikeness,
    "logit_lens": LogitLens,
    "key_values": KeyValues,
    "head_gradients": HeadGradients,
    "image_gradients": ImageGradients,
    "integrated_gradients": IntegratedGradients,
}
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RecordingConfig:
    """What to record.

    Parameters
    ----------
    observers : dict of str to observer
        Under the names that their tables and arrays get.
    dtype : {"float32", "float16", "bfloat16"}
        Of recorded arrays. Tables are float32, indices integers, moments float64.
    shard_items : int
        Items in a shard.
    batch_rows : int, optional
        Items per forward pass at most. Default: ``Subject.batch_rows``.
    """

    observers: Mapping[str, Any] = field(default_factory=lambda: {"attention_mass": AttentionMass()})
    dtype: str = "float32"
    shard_items: int = 32
    batch_rows: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.observers, Mapping):
            raise ValueError(f"observers must be a mapping of names to observers, got {self.observers!r:.60}: write {{'mass': AttentionMass()}}")
        object.__setattr__(self, "observers", dict(self.observers))
        if not self.observers:
            raise ValueError("a recording needs at least one observer that is switched on")
        for name, observer in self.observers.items():
            if not isinstance(name, str) or not name or not all(letter.isalnum() or letter in "_-" for letter in name):
                raise ValueError(f"'{name}' cannot name an observer: use letters, digits, '_' and '-'")
            if type(observer.observer if isinstance(observer, At) else observer) not in KINDS.values():
                raise ValueError(f"observer '{name}' is {observer!r}: a recording takes {', '.join(KINDS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got '{self.dtype}'")
        for name in ("shard_items", "batch_rows"):
            value = getattr(self, name)
            optional = name == "batch_rows" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a number of items, 1 or more, got {value!r}")

    @classmethod
    def from_file(cls, path: str | Path) -> RecordingConfig:
        """From a ``.toml``, ``.yaml`` or ``.yml`` file.

        Raises
        ------
        ValueError
            One sentence: no such file, not TOML or YAML, a setting or observer that is not known.
        """
        return cls.from_dict(read_settings(path, "a recording's configuration", "[observers.NAME]"))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RecordingConfig:
        """From what a file says (see the head of this module)."""
        if not isinstance(content, Mapping):
            raise ValueError(f"a recording's configuration is a table of settings, got {content!r:.60} ({type(content).__name__})")
        known = ("dtype", "shard_items", "batch_rows", "layers", "heads", "observers")
        unknown = [name for name in content if name not in known]
        if unknown:
            raise ValueError(f"a recording has no setting '{unknown[0]}': it takes {', '.join(known)}")
        observers = {}
        named = content.get("observers") or {}
        if not isinstance(named, Mapping):
            raise ValueError(f"observers are tables by name ([observers.attention_mass]), got {named!r:.60}")
        for name, entry in named.items():
            if not isinstance(entry, Mapping) and entry is not None:
                raise ValueError(f"observer '{name}' is a table of its parameters, got {entry!r:.60}: write enabled = true or false in it")
            entry = dict(entry or {})
            enabled = entry.pop("enabled", True)
            if boolean(enabled, f"enabled of observer '{name}'"):
                defaults = {key: content[key] for key in ("layers", "heads") if content.get(key) is not None}
                observers[name] = _observer(name, entry, defaults)
        settings = {key: content[key] for key in ("dtype", "shard_items", "batch_rows") if content.get(key) is not None}
        return cls(observers, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Builtins only; ``from_dict`` reads it back."""
        return {
            "dtype": self.dtype,
            "shard_items": self.shard_items,
            "batch_rows": self.batch_rows,
            "observers": {name: _entry(observer) for name, observer in self.observers.items()},
        }


def _observer(name: str, entry: dict[str, Any], defaults: dict[str, Any]) -> Any:
    kind = entry.pop("kind", name)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"observer '{name}' is of unknown kind '{kind}': choose from {', '.join(KINDS)}")
    own = [one.name for one in fields(KINDS[kind])]
    places = [] if not hasattr(KINDS[kind], "attention") else ["layers", "heads"]
    unknown = [key for key in entry if key not in (*own, *places)]
    if unknown:
        taken = ", ".join(("enabled", "kind", *own, *places))
        raise ValueError(f"observer '{name}' ({kind}) has no parameter '{unknown[0]}': it takes {taken}")
    if "layers" in own and "layers" in defaults:
        entry.setdefault("layers", defaults["layers"])
    try:
        observer = KINDS[kind](**{key: value for key, value in entry.items() if key in own})
    except TypeError as error:
        raise ValueError(f"observer '{name}' ({kind}) cannot be made of its parameters ({error}): mend their types") from error
    at = {key: entry.get(key, defaults.get(key)) for key in places}
    return At(observer, **at) if any(value is not None for value in at.values()) else observer


def _entry(observer: Any) -> dict[str, Any]:
    at = {}
    if isinstance(observer, At):
        at, observer = {"layers": observer.layers, "heads": observer.heads}, observer.observer
    kind = next(name for name, kind in KINDS.items() if kind is type(observer))
    entry = {"kind": kind, **asdict(observer), **at}
    return json.loads(json.dumps({key: value for key, value in entry.items() if value is not None}))
