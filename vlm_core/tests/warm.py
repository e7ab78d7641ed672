"""Processes that begin with everything imported: imports take most of the time of a short process, and many tests need one of its own.

``Warm(arguments, ...)``    started as ``python ARGUMENTS`` is, ``-c CODE`` or ``-m MODULE``; killed and waited for like any process
``run(arguments, ...)``     one from beginning to end, as ``subprocess.run``

They are forks of a server that has done nothing but import (multiprocessing's), one for each process that asks. What a fork cannot tell is how an
interpreter begins: what is imported when, hash seeds, threads that libraries start as they are imported. Such tests start an interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Warm", "run"]

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "pytest", "torch", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "matplotlib.pyplot", "sklearn.linear_model", "vlm_core.tests.tiny",
    "vlm_core.distill.running", "vlm_core.heads.report",
)  # fmt: skip


def _server() -> multiprocessing.context.BaseContext:
    """The context whose server is there, with one thread to a process."""
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with contextlib.chdir(ROOT):
            context.set_forkserver_preload(list(IMPORTED))
            multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def _begin(arguments: Sequence[str], environment: Mapping[str, str], folder: str, out: str, err: str) -> None:
    """In the new process: what ``python ARGUMENTS`` would find, then do."""
    for number, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    kind, what, *rest = arguments
    sys.path[:] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *(path for path in sys.path if path not in ("", folder))]
    sys.argv = [kind, *rest]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


class Warm:
    """A process of its own.

    Parameters
    ----------
    arguments : sequence of str
        ``("-c", code, ...)`` or ``("-m", module, ...)``.
    environment : mapping, optional
        All of it. Default: this process's.
    folder : Path, optional
        Where it runs. Default: the root of the checkout.
    """

    def __init__(self, arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None, folder: Path = ROOT) -> None:
        arguments = [str(one) for one in arguments]
        if arguments[0] not in ("-c", "-m"):
            raise ValueError(f"a warm process is started by -c CODE or -m MODULE, got {arguments[0]}")
        self.arguments, self._written = arguments, tempfile.TemporaryDirectory()
        self._paths = [str(Path(self._written.name) / name) for name in ("stdout", "stderr")]
        sent = (arguments, dict(os.environ if environment is None else environment), str(folder), *self._paths)
        self._process = _server().Process(target=_begin, args=sent)
        self._process.start()
        atexit.register(self.kill)  # multiprocessing would wait for what a test that failed left running

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> tuple[str, str]:
        """What it has written so far, to standard output and to standard error."""
        return tuple(Path(path).read_text() if Path(path).exists() else "" for path in self._paths)

    def wait(self, timeout: float) -> int:
        """Its exit code.

        Raises
        ------
        subprocess.TimeoutExpired
            It ran on, and was killed.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout, *self.said())
        return self._process.exitcode


def run(
    arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None, folder: Path = ROOT, timeout: float = 600
) -> subprocess.CompletedProcess:
    """A process from beginning to end: `Warm`, with its exit code and what it said."""
    process = Warm(arguments, environment, folder)
    return subprocess.CompletedProcess(process.arguments, process.wait(timeout), *process.said())
