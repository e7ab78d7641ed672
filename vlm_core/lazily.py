"""Names of a package that are loaded from their modules on first use, so that importing the package stays cheap.

``exported(package, homes)``   what such a package's ``__init__`` needs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ["exported"]


def exported(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package (:pep:`562`).

    Parameters
    ----------
    package : str
        Its ``__name__``.
    homes : mapping of str to sequence of str
        Module below the package → names that are its.

    Examples
    --------
    >>> get, names, every = exported("json", {"decoder": ["JSONDecodeError"]})
    >>> get("JSONDecodeError").__name__, names() == every
    ('JSONDecodeError', True)
    """
    home_of = {name: module for module, names in homes.items() for name in names}
    every = sorted(home_of)

    def load(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return load, lambda: every, every
