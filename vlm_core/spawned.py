"""Processes that another one of this library has started.

``end_with_parent()``   let a process end when the one that started it has, also where that was killed
"""

from __future__ import annotations

import multiprocessing
import os
import threading

__all__ = ["end_with_parent"]


def end_with_parent() -> None:
    """From now on this process ends as soon as the one that started it by ``multiprocessing`` has; nothing changes where none has.

    A worker of a pool waits for tasks on a pipe that it holds itself: without this it waits for good, with all its memory, where a signal
    killed the process that would send them.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True, name="end-with-parent").start()


def _follow(parent) -> None:
    parent.join()
    # Nobody is left to hear of it: what others may find is written whole or not at all.
    os._exit(1)
