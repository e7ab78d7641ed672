"""Settings in a file, and what they declare: every wrong word is one sentence that says where it stands and what is possible.

``read_settings(path, what, least)``   the table of settings in a TOML or YAML file
``declared(kind, content)``            a table as a dataclass: unknown and missing settings refused
``checked(instance)``                  the fields of a dataclass by their annotations, for its ``__post_init__``

Annotations that ``checked`` knows: ``str, int, float, bool``, ``Literal``, dataclasses (from tables), ``tuple[X, ...]`` (from lists),
``Mapping[str, X]``, ``Any``, and each of them or ``None``. A subclass is chosen by the class attribute ``KINDS`` of its base: a table's
``kind`` names it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vlm_core.interventions.numeric import boolean, integer, real

__all__ = ["checked", "declared", "read_settings"]

T = TypeVar("T")


def read_settings(path: str | Path, what: str, least: str) -> dict[str, Any]:
    """The table of settings in a ``.toml``, ``.yaml`` or ``.yml`` file.

    Parameters
    ----------
    what : str
        What the file is, for messages: "a recording's configuration".
    least : str
        What it needs at least, for messages.

    Raises
    ------
    ValueError
        One sentence: no path, no such file, neither TOML nor YAML, no table.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"{what} is read from a file's path, got {path!r:.60} ({type(path).__name__})")
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ValueError(f"{path.name} is neither .toml nor .yaml: {what} is one of them")
    if not path.is_file():
        raise ValueError(f"there is no configuration at {path}: it is no file, check the path")
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        language = "TOML" if path.suffix == ".toml" else "YAML"
        raise ValueError(f"{path.name} is no {language} ({' '.join(str(error).split())}): mend it there") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name} holds no table of settings: it needs at least {least}")
    return dict(content)


def declared(kind: type[T], content: Any) -> T:
    """A table of settings as the dataclass ``kind``.

    Raises
    ------
    ValueError
        One sentence: a setting that is not known, one that is missing, one of another type. What stands within another table or list is
        preceded by its place there.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it must be a table with {', '.join(_names(kind))}, got {content!r:.60} ({type(content).__name__})")
    content = dict(content)
    kinds = getattr(kind, "KINDS", None)
    if kinds is not None:
        named = content.pop("kind", None)
        if not isinstance(named, str) or named not in kinds:
            wrong = "it lacks the setting 'kind'" if named is None else f"there is no kind {named!r}"
            raise ValueError(f"{wrong}: choose from {', '.join(kinds)}")
        kind = kinds[named]
    unknown = [name for name in content if name not in _names(kind)]
    if unknown:
        raise ValueError(f"there is no setting '{unknown[0]}': it takes {', '.join((*(['kind'] if kinds else []), *_names(kind)))}")
    for field in fields(kind):
        if field.name not in content and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"it lacks the setting '{field.name}': it takes {', '.join(_names(kind))}")
    made = kind(**content)
    checked(made)  # also of a dataclass that does not see to it itself
    return made


def checked(instance: Any) -> None:
    """Check every field of a frozen dataclass by its annotation, and make of it what that says.

    Raises
    ------
    ValueError
        One sentence that names the field.
    """
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        object.__setattr__(instance, field.name, _value(hints[field.name], getattr(instance, field.name), field.name))


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _value(hint: Any, value: Any, name: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        (hint,) = (one for one in inner if one is not NoneType)
        return _value(hint, value, name)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{name} must be one of {', '.join(map(str, inner))}, got {value!r:.60}")
        return value
    if is_dataclass(hint):
        return value if isinstance(value, hint) else _within(name, lambda: declared(hint, value))
    if origin is tuple:
        if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
            raise ValueError(f"{name} must be a list, got {value!r:.60} ({type(value).__name__})")
        return tuple(_value(inner[0], one, f"{name}[{number}]") for number, one in enumerate(value))
    if hint is Mapping or origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name} must be a table with names, got {value!r:.60} ({type(value).__name__})")
        return {key: _value(inner[1], one, f"{name}.{key}") for key, one in value.items()}
    return _scalar(hint, value, name)


def _within(name: str, make: Any) -> Any:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _scalar(hint: type, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, str) and _is_number(value):
        raise ValueError(f"{name} must be a number, got the text {value!r}: write {float(value)!r} (YAML takes 1e-3 for text, not 1.0e-3)")
    if hint in (bool, int, float):
        return {bool: boolean, int: integer, float: real}[hint](value, name)
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, hint):
        raise ValueError(f"{name} must be a text, got {value!r:.60} ({type(value).__name__})")
    if not value.strip():
        raise ValueError(f"{name} is empty: write it out or leave it away")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
