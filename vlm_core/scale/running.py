"""One job: taken up by one worker at a time, its outputs put in place whole, its marker written last.

``take_up(job)``   run it, unless it is done or another has it
``state(job)``     what is known of it: ``done``, ``running``, ``failed`` or ``missing``
``result(job)``    the folder of its outputs

A job's folder holds ``lock`` (held by the process that runs it: the system lets go of it when that process ends, however), ``log.txt``,
``attempt-*`` (outputs being made), ``result`` (finished ones) and ``done.json``, written last, with a digest of every output. Where it was
killed between two steps, the next one to take it up starts afresh; answers to benchmarks go on from those of the last attempt, where they
are of the same items, weights and code. The log is written through `vlm_core.secrets.hidden`. The file system must know locks (``flock``), as local ones and NFS 4 do.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, TextIO

import yaml
from filelock import FileLock, Timeout

from vlm_core.harness.command import OTHER_ANSWERS
from vlm_core.scale.jobs import Job
from vlm_core.secrets import hidden, secrets

__all__ = ["Outcome", "claim_runs", "output_digests", "result", "state", "take_up"]

LEASH = Path(__file__).with_name("leash.py")
# pytest's exit codes of a run whose evidence is whole: all as expected, refuted, undecided, worse than a baseline.
_MEASURED = (0, 1, 10, 11)
_GOES_ON = ("benchmarks",)
"""Kinds of jobs whose command, run again with the same outputs, does what is not there yet."""
_LAST_WORDS = 10.0
"""Seconds that the log is waited for when the command is gone: what it left behind outside its group may hold the other end for good."""
_CHUNK = 2**16
_TOLD_TO_END = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class Outcome:
    """How taking up a job ended.

    Parameters
    ----------
    state : {"done", "failed", "busy"}
    ran : bool
        Whether it ran here; a job that is done already does not.
    seconds : float
    reason : str or None
        Why it failed, in one sentence.
    """

    number: int
    state: str
    ran: bool = False
    seconds: float = 0.0
    reason: str | None = None


def result(job: Job) -> Path:
    """The folder of a job's outputs."""
    return job.folder / "result"


def state(job: Job) -> str:
    """``done``: marker and outputs agree; ``running``: somebody holds it; ``failed``: its last attempt ended badly; else ``missing``."""
    if _is_done(job):
        return "done"
    if not job.folder.is_dir():
        return "missing"
    try:
        with _lock(job, wait=False):
            return "failed" if (job.folder / "failed.json").is_file() else "missing"
    except Timeout:
        return "running"


def take_up(job: Job, retries: int = 0, wait: bool = False) -> Outcome:
    """Run a job, unless it is done.

    Parameters
    ----------
    retries : int
        How often it runs again where its command was killed; one that ended by itself would end so again.
    wait : bool
        Whether to wait for another process that has it, in place of leaving it to that (``busy``).
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(job, wait):
            if _is_done(job):
                return Outcome(job.number, "done")
            return _run(job, retries)
    except Timeout:
        return Outcome(job.number, "busy")


def claim_runs(job: Job) -> list[Path]:
    """Directories of complete runs among the outputs of a job of claims."""
    return [found for found in _runs(result(job)) if json.loads((found / "run.json").read_text(encoding="utf-8"))["complete"]]


def output_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path there."""
    files = sorted(one for one in folder.rglob("*") if one.is_file() and not one.is_symlink() and not _through_link(one, folder))
    return {str(one.relative_to(folder)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def _through_link(file: Path, folder: Path) -> bool:
    return any(parent.is_symlink() for parent in file.parents if folder in parent.parents)


def _runs(folder: Path) -> list[Path]:
    found = (one for one in folder.iterdir() if one.is_dir() and not one.is_symlink() and not one.name.startswith("."))
    return sorted(one for one in found if (one / "run.json").is_file())


def _lock(job: Job, wait: bool) -> FileLock:
    return FileLock(job.folder / "lock", timeout=-1 if wait else 0).acquire()


def _is_done(job: Job) -> bool:
    try:
        marker = json.loads((job.folder / "done.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return marker["id"] == job.id and marker["files"] == output_digests(result(job))


def _run(job: Job, retries: int) -> Outcome:
    start = perf_counter()
    begun, log = _begun(job), job.folder / "log.txt"
    for leftover in (*job.folder.glob("attempt-*"), result(job)):
        if leftover != begun:
            shutil.rmtree(leftover, ignore_errors=True)
    for marker in ("done.json", "failed.json"):
        (job.folder / marker).unlink(missing_ok=True)
    while True:
        attempt = begun or _fresh(job)
        before = log.stat().st_size if log.exists() else 0
        status = _attempt(job, attempt)
        if begun is not None and status == OTHER_ANSWERS:
            begun = None
        elif status <= 128 or status in _TOLD_TO_END or not retries:
            break
        else:
            retries -= 1
            begun = attempt if job.kind in _GOES_ON else None
        if begun is None:
            shutil.rmtree(attempt, ignore_errors=True)
    trouble = _trouble(job, attempt, status, before)
    seconds = perf_counter() - start
    if trouble is not None:
        _write(job.folder / "failed.json", {"id": job.id, "exit": status, "reason": trouble})
        return Outcome(job.number, "failed", True, seconds, trouble)
    attempt.rename(result(job))
    ended = {"id": job.id, "subject": job.subject, "selection": job.selection, "exit": status, "seconds": round(seconds, 3)}
    _write(job.folder / "done.json", {**ended, "files": output_digests(result(job))})
    return Outcome(job.number, "done", True, seconds)


def _begun(job: Job) -> Path | None:
    """Outputs that the command can go on from: those of the last attempt, whatever that ended by.

    Finished ones without a marker are of an attempt that was cut off before it could say that it was done.
    """
    if job.kind not in _GOES_ON:
        return None
    if result(job).is_dir() and not (job.folder / "done.json").exists():
        return result(job).rename(_fresh(job))
    return max(job.folder.glob("attempt-*"), key=lambda one: one.stat().st_mtime, default=None)


def _fresh(job: Job) -> Path:
    return job.folder / f"attempt-{uuid.uuid4().hex[:8]}"


def _attempt(job: Job, attempt: Path) -> int:
    """Exit status of the command."""
    attempt.mkdir(exist_ok=True)
    if job.settings is not None:
        settings = {**yaml.safe_load(job.settings), "out": str(attempt)}
        (attempt / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=True), encoding="utf-8")
    # -S and -I: the leash needs nothing but the standard library, and starts in no time.
    command = [sys.executable, "-I", "-S", str(LEASH), *job.command_line(attempt)]
    trouble: list[BaseException] = []
    with (job.folder / "log.txt").open("a", encoding="utf-8", errors="replace", newline="") as log:
        leash = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        writing = threading.Thread(target=_write_down, args=(leash.stdout, log, trouble), daemon=True)
        writing.start()
        try:
            leash.wait()
        finally:
            leash.stdin.close()
            status = leash.wait()
            writing.join(_LAST_WORDS)
    if trouble:
        raise trouble[0]
    return status if status >= 0 else 128 - status


def _write_down(said: BinaryIO, log: TextIO, trouble: list[BaseException]) -> None:
    """What is said, as it comes, without the secrets that stand in it unbroken; an end with which one may begin waits for what follows."""
    decoder, pending = codecs.getincrementaldecoder("utf-8")("surrogateescape"), ""  # as the environment is
    try:
        while chunk := said.read1(_CHUNK):
            pending += decoder.decode(chunk)
            sure = _sure(pending)
            log.write(hidden(pending[:sure]))
            log.flush()
            pending = pending[sure:]
        log.write(hidden(pending + decoder.decode(b"", final=True)))
        log.flush()
    except BaseException as error:
        # Whoever runs the command is told; the command itself must not wait for a pipe that nobody reads.
        trouble.append(error)
        while said.read1(_CHUNK):
            pass


def _sure(text: str) -> int:
    """How many characters of a text, whatever follows, hold every secret that begins in them whole."""
    end = len(text) - max((_begins(text, secret) for secret in secrets()), default=0)
    while across := [at for secret in secrets() if (at := text.find(secret, max(0, end - len(secret) + 1), end + len(secret) - 1)) >= 0]:
        end = min(across)
    return end


def _begins(text: str, secret: str) -> int:
    """How many characters at the end of a text are the beginning of a secret."""
    return next((n for n in range(min(len(secret) - 1, len(text)), 0, -1) if text.endswith(secret[:n])), 0)


def _trouble(job: Job, attempt: Path, status: int, before: int) -> str | None:
    """Why an attempt failed, if it did; ``before``: bytes of the log that are not of it."""
    log = job.folder / "log.txt"
    if status > 128:
        return f"its command was killed by signal {status - 128}; see {log}"
    if status not in (_MEASURED if job.kind == "claims" else (0,)):
        return f"its command ended with exit status {status}{_last_words(log, before)}; see {log}"
    if job.kind == "claims":
        runs = _runs(attempt)
        if len(runs) != 1 or not json.loads((runs[0] / "run.json").read_text(encoding="utf-8"))["complete"]:
            return f"its command left {len(runs)} runs, none of them or not all complete; see {log}"
    return None


def _last_words(log: Path, before: int) -> str:
    with log.open("rb") as found:
        found.seek(before)
        lines = [line.strip() for line in found.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return f" ({hidden(lines[-1])[:200]})" if lines else ""


def _write(path: Path, content: dict) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as out:
        json.dump(content, out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    os.replace(fresh, path)
