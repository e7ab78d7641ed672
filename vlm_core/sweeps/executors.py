"""Where the shards of a sweep run: anything shaped like ``concurrent.futures.Executor``.

``SerialExecutor``    in this process, one after the other
``ProcessExecutor``   a pool of processes that outlives the death of its members
``RayExecutor``       a Ray cluster (extra ``[cluster]``): one actor per worker, over many machines
``open_subject``      the subject of a worker, loaded once per process; ``require_source`` refuses what cannot be one

A task is a picklable callable with picklable arguments. A worker that dies takes its task's work with it, not the task: it runs again on
another worker, at most ``retries`` times.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_core.spawned import end_with_parent

if TYPE_CHECKING:
    from vlm_core.subjects.subject import Subject

__all__ = ["ProcessExecutor", "RayExecutor", "SerialExecutor", "SubjectSource", "open_subject", "require_source"]

SubjectSource = Any
"""A ``Subject``, a path or model id, or a picklable callable without arguments that gives a ``Subject``."""

_OPENED: dict[bytes, Any] = {}


def require_source(source: SubjectSource) -> None:
    """Refuse what is neither a subject nor a path, id or callable that gives one.

    Raises
    ------
    TypeError
    """
    from torch.nn import Module

    from vlm_core.subjects.subject import Subject

    if isinstance(source, Module):
        raise TypeError(f"the subject is a bare {type(source).__name__}: give Subject(model, processor), or the checkpoint's path or id")
    if not isinstance(source, Subject | str | Path) and not callable(source):
        raise TypeError(
            f"the subject must be a Subject, a checkpoint's path or id, or a callable that gives a Subject, got {source!r:.60} "
            f"({type(source).__name__})"
        )


def open_subject(source: SubjectSource) -> Subject:
    """The subject that a source stands for; one that is loaded stays for the next shard of this process.

    Raises
    ------
    TypeError
        For what is no source, or a callable that gives something else than a ``Subject``.
    ValueError
        For a callable that cannot be pickled, so that it cannot be told from others.
    """
    from vlm_core.subjects.load import load_vlm
    from vlm_core.subjects.subject import Subject

    require_source(source)
    if isinstance(source, Subject):
        return source
    # By content: a source that came from another process is another object every time.
    key = _key(source)
    if key not in _OPENED:
        # One subject at a time: another source means another sweep.
        _OPENED.clear()
        opened = load_vlm(source) if isinstance(source, str | Path) else source()
        if not isinstance(opened, Subject):
            raise TypeError(f"the subject's callable must give a Subject, got {type(opened).__name__}: return load_vlm(...)")
        _OPENED[key] = opened
    return _OPENED[key]


def _key(source: SubjectSource) -> bytes:
    try:
        return pickle.dumps(source)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        name = getattr(source, "__qualname__", type(source).__qualname__)
        raise ValueError(
            f"the subject's callable ({name}) cannot be pickled, so it cannot be told from others: name a function at the top level of a "
            f"module, or give the Subject itself"
        ) from error


def _whole(value: int, name: str, least: int) -> int:
    # Imported here: it imports torch, which a worker does without until it makes a subject.
    from vlm_core.interventions.numeric import integer

    return integer(value, name, least)


class SerialExecutor(Executor):
    """Runs a task when it is submitted, in this process."""

    in_process = True
    max_workers = 1

    def submit(self, fn: Callable, /, *args, **kwargs) -> Future:
        """Run ``fn`` now; its result or exception is in the future."""
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Dispatcher(Executor, ABC):
    """Threads that hand tasks to one worker each, and to a new worker where theirs has died."""

    def __init__(self, max_workers: int, retries: int) -> None:
        self.max_workers = _whole(max_workers, "max_workers", 1)
        self.retries = _whole(retries, "retries", 0)
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(max_workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable, /, *args, **kwargs) -> Future:
        """Queue ``fn(*args, **kwargs)`` for the next free worker."""
        if self._closed:
            raise RuntimeError("this executor was shut down: make a new one")
        future: Future = Future()
        self._tasks.put((future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the workers go once their tasks are done."""
        if not self._closed:
            self._closed = True
            if cancel_futures:
                self._cancel_queued()
            for _ in self._threads:
                self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _cancel_queued(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                return
            task[0].cancel()

    def _serve(self) -> None:
        worker = None
        while (task := self._tasks.get()) is not None:
            future, fn, args, kwargs = task
            if not future.set_running_or_notify_cancel():
                continue
            for attempt in range(self.retries + 1):
                try:
                    worker = self._hire() if worker is None else worker
                    future.set_result(self._call(worker, fn, args, kwargs))
                    break
                except self._deaths() as death:
                    self._dismiss(worker)
                    worker = None
                    if attempt == self.retries:
                        future.set_exception(RuntimeError(f"{attempt + 1} workers died over one task, the last: {death}"))
                except BaseException as error:
                    future.set_exception(error)
                    break
        if worker is not None:
            self._dismiss(worker)

    @abstractmethod
    def _hire(self) -> Any:
        """A new worker."""

    @abstractmethod
    def _call(self, worker: Any, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of a task on a worker."""

    @abstractmethod
    def _dismiss(self, worker: Any) -> None:
        """Let a worker go, dead or alive; there may be none."""

    @abstractmethod
    def _deaths(self) -> tuple[type[BaseException], ...]:
        """Exceptions that mean that a worker is gone."""


class ProcessExecutor(_Dispatcher):
    """Processes on this machine.

    Parameters
    ----------
    max_workers : int
    retries : int
        How often a task runs again after the death of its worker.
    threads : int, optional
        Torch threads per worker. Default: the machine's cores shared out.
    """

    in_process = False

    def __init__(self, max_workers: int = 2, retries: int = 3, threads: int | None = None) -> None:
        max_workers = _whole(max_workers, "max_workers", 1)
        shared = max(1, (os.cpu_count() or 1) // max_workers)
        self._threads_each = shared if threads is None else _whole(threads, "threads", 1)
        super().__init__(max_workers, retries)

    def _hire(self) -> ProcessPoolExecutor:
        # A pool of one: its death breaks no other. Spawned: torch does not survive a fork with threads.
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=(self._threads_each,))

    def _call(self, worker: ProcessPoolExecutor, fn, args, kwargs):
        return worker.submit(fn, *args, **kwargs).result()

    def _dismiss(self, worker: ProcessPoolExecutor | None) -> None:
        if worker is not None:
            worker.shutdown(wait=False, cancel_futures=True)

    def _deaths(self) -> tuple[type[BaseException], ...]:
        return (BrokenProcessPool,)


def _begin(threads: int) -> None:
    end_with_parent()
    # For a torch that is yet to be imported, and for one that the main module has imported already.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


class RayExecutor(_Dispatcher):
    """Actors on a Ray cluster, each a process that keeps its subject loaded.

    Parameters
    ----------
    max_workers : int
    retries : int
        How often a task runs again after the death of its actor.
    cpus, gpus : float
        What each actor asks of the cluster.
    init : dict, optional
        For ``ray.init`` where Ray is not initialised yet (``{"address": "auto"}`` joins a running cluster).

    Raises
    ------
    ValueError, TypeError
        For numbers and settings that cannot be, before Ray is started.
    ImportError
        Where Ray is not installed.
    """

    in_process = False

    def __init__(self, max_workers: int = 2, retries: int = 3, cpus: float = 1, gpus: float = 0, init: dict | None = None) -> None:
        max_workers, retries = _whole(max_workers, "max_workers", 1), _whole(retries, "retries", 0)
        for name, share in (("cpus", cpus), ("gpus", gpus)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not share >= 0:
                raise ValueError(f"{name} must be a number, 0 or more, got {share!r}")
        if init is not None and not isinstance(init, Mapping):
            raise TypeError(f"init must be a dict of ray.init's arguments such as {{'address': 'auto'}}, got {init!r}")
        try:
            import ray
        except ImportError as error:
            raise ImportError("RayExecutor needs Ray: pip install 'vlm-claims[cluster]'") from error
        self._ray = ray
        if not ray.is_initialized():
            ray.init(**(init or {}))
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Worker)
        self.actors: list = []
        super().__init__(max_workers, retries)

    def _hire(self):
        if not self._ray.is_initialized():  # it would start another one by itself
            raise RuntimeError("Ray was shut down while tasks were left: start it again, with another executor")
        actor = self._actor.remote()
        self.actors.append(actor)
        return actor

    def _call(self, worker, fn, args, kwargs):
        try:
            return self._ray.get(worker.call.remote(fn, args, kwargs))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, BaseException) else error from error

    def _dismiss(self, worker) -> None:
        if worker is not None:
            self.actors.remove(worker)
            self._ray.kill(worker)

    def _deaths(self) -> tuple[type[BaseException], ...]:
        return (self._ray.exceptions.RayActorError, self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.NodeDiedError)


class _Worker:
    """The process of one Ray worker."""

    def call(self, fn: Callable, args: tuple, kwargs: dict):
        """Run one task."""
        return fn(*args, **kwargs)
