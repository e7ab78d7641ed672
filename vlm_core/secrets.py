"""Access tokens are read from the environment, by the libraries that use them, and written nowhere.

``secrets()``       the values that must not be written, with the name that stands in for each
``hidden(text)``    a text in which none of them is left; ``hidden_in(value)`` the same of every text in nested lists and mappings
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

__all__ = ["hidden", "hidden_in", "secrets"]

_NAMES = re.compile(r"(^|_)(TOKENS?|API_?KEY|ACCESS_?KEY|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(_|$)|_(KEY|PAT)$", re.IGNORECASE)
_SHORTEST = 8  # characters: shorter values are words that stand everywhere; a single one repeated is what stands in for a secret


def secrets() -> dict[str, str]:
    """Value -> name of every environment variable whose name says that it is a token, a key or a password; the longest first."""
    while True:
        try:
            return _among(tuple(os.environ.items()))
        except (KeyError, RuntimeError):  # another thread has changed a variable meanwhile
            continue


@lru_cache(maxsize=4)
def _among(variables: tuple[tuple[str, str], ...]) -> dict[str, str]:
    found = {value.strip(): name for name, value in variables if _NAMES.search(name) and len(value.strip()) >= _SHORTEST and len(set(value.strip())) > 1}
    return dict(sorted(found.items(), key=lambda one: -len(one[0])))


def hidden(text: str) -> str:
    """``text`` with the name of the environment variable in the place of each secret: ``<HF_TOKEN>``."""
    for value, name in secrets().items():
        if value in text:
            text = text.replace(value, f"<{name}>")
    return text


def hidden_in(value: Any) -> Any:
    """Nested mappings and lists with every text in them ``hidden``; the keys of mappings are left as they are."""
    if not secrets():
        return value
    if isinstance(value, dict):
        return {key: hidden_in(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [hidden_in(one) for one in value]
    return hidden(value) if isinstance(value, str) else value
