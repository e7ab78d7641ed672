"""Memory of the host, as this process may use it.

``Bounded``               what was computed, within so many bytes
``free_memory()``         bytes that are left to it: the machine's, or its container's where that has a limit
``give_back_memory()``    let the device have what nothing in this process uses any more
``keep_freed_memory()``   keep freed memory in the process
``lasting()``             what begins to be in here stays: no search for garbage looks through it

Every layer of a forward pass frees blocks of a few megabytes. By default glibc gives such blocks back to the system and faults them in again a
moment later, page by page, which costs a small model on a CPU 10 to 20 % of its time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Bounded", "free_memory", "give_back_memory", "keep_freed_memory", "lasting"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_BLOCK = 2**30


class Bounded:
    """Values by key, as many as a number of bytes allows. Those used longest ago go first where there is no room.

    Parameters
    ----------
    limit : int
        Bytes that may be kept.

    Attributes
    ----------
    bytes : int
        Bytes that are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.clear()

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Keep nothing."""
        self.bytes = 0
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """The value of ``key``, used just now; None where it is not kept."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def keep(self, key: Hashable, value: Any, size: int) -> None:
        """Keep a value of ``size`` bytes; one larger than all there is room for is not kept."""
        if key in self._held or size > self.limit:
            return
        self._held[key] = value, size
        self.bytes += size
        while self.bytes > self.limit:
            _, (_, gone) = self._held.popitem(last=False)
            self.bytes -= gone


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of the host's memory that this process can still take.

    What the machine has available, or less where a control group (a container's, a job's) or one above it has a limit: the limit minus
    what the group uses, file pages that the kernel would give back not counted.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_to_groups(root)]))


def _left_to_groups(root: Path) -> Iterator[int]:
    """What the limit of each control group above this process leaves, version 2 and 1 of them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # no control groups on this system
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Within a container the path is often the host's, which is not there: its own group is then at the top.
        own = top.joinpath(*Path(path).parts[1:])
        for group in (own, *own.parents):
            left = _left(group, *names)
            if left is not None:
                yield left
            if group == top:
                break


def _left(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """What one control group leaves; None where it has no limit."""
    try:
        most, taken = (group / limit).read_text().strip(), int((group / used).read_text())
        if most == "max":
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # the top group of a machine has no such files, and a path of the host is not there
    return int(most) - taken + int(stat.get(reclaimable, 0))


def give_back_memory() -> None:
    """Let the device have what nothing in this process uses any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """What begins to be in here stays to the end of the process: no search for garbage looks through it, now or later.

    A search through all that PyTorch and transformers are takes a quarter of a second, and there are several while they are imported. Garbage
    that is made in here stays too.

    Examples
    --------
    >>> with lasting():
    ...     gc.isenabled()
    False
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
