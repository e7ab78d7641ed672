"""Finished pieces of a sweep on disk, shared by processes and runs.

``ShardStore(folder)``   tables by name, each computed once

A shard is one Parquet file. It appears under its name only when it is whole (written beside, synced, renamed), so a process that is killed
at any moment leaves either a shard or none. Who computes a shard holds its lock, which the operating system gives back when the process
ends, however it ends: what a dead process had claimed is free for the next one, and what a living one is computing is waited for.

A lock's file goes when its shard is in place, and only then. Whoever had opened the file before may still lock what is no longer there,
beside somebody who locks a new file of the same name; but both look for the shard next, and find it. The file of a task that failed stays:
with no shard to find, two such holders would both compute. So there are as many files as shards under way, failed or killed.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout
from pyarrow.lib import ArrowException

__all__ = ["ShardStore"]

_POLL_SECONDS = 0.05


class ShardStore:
    """A folder of shards.

    Parameters
    ----------
    folder : str or Path
        Made if it is not there. On a network file system its locks must work across machines (NFS 4 does).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._locks = self.folder / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        # Killed between its shard and its lock.
        for left_behind in self._locks.glob("*.lock"):
            self._tidy(left_behind.stem)

    def path(self, name: str) -> Path:
        """Where the shard ``name`` is, or will be."""
        return self.folder / f"{name}.parquet"

    def read(self, name: str) -> pd.DataFrame | None:
        """The shard ``name``; None where it is not there (yet), or damaged: then it is set aside, with a warning, to be computed anew."""
        path = self.path(name)
        try:
            return pd.read_parquet(path)
        except FileNotFoundError:
            return None
        except PermissionError:
            raise
        except (ArrowException, OSError) as error:
            aside = path.with_suffix(".damaged")
            with suppress(FileNotFoundError):
                os.replace(path, aside)
            first = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"the shard {path} is damaged ({first}): it is computed anew, what was there is kept as {aside}", stacklevel=2)
            return None

    def write(self, name: str, table: pd.DataFrame) -> None:
        """Put a shard in place, whole or not at all."""
        partial = self.folder / f"{name}.{os.getpid()}.partial"
        with partial.open("wb") as file:
            table.to_parquet(file, index=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path(name))

    def _lock(self, name: str) -> Path:
        return self._locks / f"{name}.lock"

    def _tidy(self, name: str) -> None:
        """Remove the lock of a shard that is in place."""
        if self.path(name).is_file():
            self._lock(name).unlink(missing_ok=True)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process may compute the shard ``name`` now: nobody else is at it."""
        lock = FileLock(self._lock(name))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            for left_behind in self.folder.glob(f"{name}.*.partial"):
                left_behind.unlink(missing_ok=True)
            yield True
        finally:
            self._tidy(name)
            lock.release()

    def compute(self, tasks: Iterable[tuple[str, Callable[[], pd.DataFrame]]]) -> Iterator[tuple[str, pd.DataFrame]]:
        """Every shard, computed here or by whoever else shares the folder, each once.

        Parameters
        ----------
        tasks : iterable of (name, callable)
            Called only where the shard is not there and nobody else is computing it.

        Yields
        ------
        name, table
            As they become available. Shards that another process is computing come last; if it dies, they are computed here.
        """
        waiting = []
        for name, task in tasks:
            table = self.once(name, task)
            if table is None:
                waiting.append((name, task))
            else:
                yield name, table
        while waiting:
            name, task = waiting.pop(0)
            table = self.once(name, task)
            if table is None:
                waiting.append((name, task))
                time.sleep(_POLL_SECONDS)
            else:
                yield name, table

    def once(self, name: str, task: Callable[[], pd.DataFrame]) -> pd.DataFrame | None:
        """The shard ``name``, computed by ``task`` where it is not there; None while somebody else is computing it."""
        table = self.read(name)
        if table is not None:
            return table
        with self.claim(name) as mine:
            if not mine:
                return None
            # It may have been finished between the look and the claim.
            table = self.read(name)
            if table is None:
                table = task()
                self.write(name, table)
        return table
