"""What commands of this library share: quiet libraries, lines that say what happens when, one sentence for what is wrong.

``quiet()``             no progress bars and warnings of libraries, freed memory kept
``timed_lines()``       ``say(words)`` for the standard error, each line with the seconds since now
``one_line(error)``     an error as one sentence
``without_secrets(x)``  texts (also within lists and tables) in which no token of the environment stands
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

__all__ = ["one_line", "quiet", "timed_lines", "without_secrets"]

_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8
"""Characters of a secret: "1" and "false" are none, and would be found everywhere."""


def quiet() -> None:
    """No progress bars and warnings of libraries; freed memory stays in the process (`vlm_core.memory.keep_freed_memory`)."""
    import datasets
    from transformers.utils import logging

    from vlm_core.memory import keep_freed_memory

    keep_freed_memory()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()


def timed_lines() -> Callable[[str], None]:
    """A function that writes words to the standard error, preceded by the seconds since it was made."""
    start = perf_counter()

    def say(words: str) -> None:
        print(f"{perf_counter() - start:7.1f} s  {without_secrets(words)}", file=sys.stderr, flush=True)

    return say


def one_line(error: BaseException) -> str:
    """An error's message as one line, without secrets."""
    return without_secrets(" ".join(str(error).split()))


def without_secrets(content: Any) -> Any:
    """Texts in which values of environment variables that hold secrets (a token, key, password by their name) are the variables' names."""
    if isinstance(content, str):
        for name, value in os.environ.items():
            if len(value) >= _SHORTEST and _SECRET.search(name):
                content = content.replace(value, f"${name}")
        return content
    if isinstance(content, Mapping):
        return {without_secrets(key): without_secrets(value) for key, value in content.items()}
    return [without_secrets(one) for one in content] if isinstance(content, list | tuple) else content
