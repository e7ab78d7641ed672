"""What commands of this library share: quiet libraries, lines that say what happens when, one sentence for what is wrong.

``quiet()``             no progress bars and warnings of libraries, freed memory kept
``timed_lines()``       ``say(words)`` for the standard error, each line with the seconds since now
``one_line(error)``     an error as one sentence
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter

from vlm_core.secrets import hidden

__all__ = ["one_line", "quiet", "timed_lines"]


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
        print(f"{perf_counter() - start:7.1f} s  {hidden(words)}", file=sys.stderr, flush=True)

    return say


def one_line(error: BaseException) -> str:
    """An error's message as one line without secrets."""
    return hidden(" ".join(str(error).split()))
