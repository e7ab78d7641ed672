"""Compiled models run as they were written while something looks into them.

``eagerly``    context manager: nothing that ``torch.compile`` made is used in any thread until the last such context is left

A compiled model, or a compiled part of one, keeps the hooks that it was traced with: those that come later are left out without a word.
So every run in which something may be done or seen runs eagerly; ``intervene(None, batch)`` leaves the model as it is.
"""

from __future__ import annotations

from threading import Lock

import torch

from vlm_core.errors import SubjectError

__all__ = ["eagerly"]


class _Eagerly:
    def __init__(self) -> None:
        self._lock = Lock()
        self._depth = 0
        self._stance = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._depth:
                try:
                    self._stance = torch.compiler.set_stance("force_eager")
                except RuntimeError as error:
                    raise SubjectError(
                        "a run cannot begin inside a function that torch.compile made, which leaves its hooks out: compile the model, or "
                        "nothing, and call the function that begins the run as it is"
                    ) from error
            self._depth += 1

    def __exit__(self, *error) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                # Back to what it was on entry, which need not be the default.
                self._stance.__exit__(None, None, None)


eagerly = _Eagerly()
