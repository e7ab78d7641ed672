"""Keep freed memory in the process: ``keep_freed_memory()``.

Every layer of a forward pass frees blocks of a few megabytes. By default glibc gives such blocks back to the system and faults them in again a
moment later, page by page, which costs a small model on a CPU 10 to 20 % of its time.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_BLOCK = 2**30


def keep_freed_memory() -> bool:
    """Let the allocator of this process keep what it frees.

    Returns
    -------
    bool
        Whether it took the advice; False where the C library is not glibc (macOS, Windows, musl), where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _BLOCK) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
