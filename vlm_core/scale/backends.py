"""Where jobs run: workers of this machine, or of a Ray cluster.

``run_jobs(jobs, config, backend)``   take up all that is missing; how each ended

A worker that dies gives its job back: Ray hands it to another, and the lock of whoever died is open again. What another scheduler has
already taken up is left to it, and waited for at the end: it may die, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed

from vlm_core.command_line import one_line
from vlm_core.scale.config import ScaleConfig
from vlm_core.scale.jobs import Job
from vlm_core.scale.running import Outcome, take_up

__all__ = ["BACKENDS", "run_jobs"]


def _local(config: ScaleConfig) -> Executor:
    return ThreadPoolExecutor(config.workers)


def _ray(config: ScaleConfig) -> Executor:
    from vlm_core.sweeps.executors import RayExecutor

    options = config.ray.options
    return RayExecutor(config.workers, config.retries, config.resources.cpus, config.resources.gpus, options)


BACKENDS: dict[str, Callable[[ScaleConfig], Executor]] = {"local": _local, "ray": _ray}


def run_jobs(jobs: Sequence[Job], config: ScaleConfig, backend: str = "local", say: Callable[[str], None] = print) -> list[Outcome]:
    """Take up jobs until each is done or has failed.

    Parameters
    ----------
    backend : {"local", "ray"}
    say : callable
        Told how each job ended.

    Returns
    -------
    list of Outcome, one per job
    """
    ended: dict[int, Outcome] = {}
    executor = BACKENDS[backend](config)
    try:
        for wait in (False, True):
            left = [job for job in jobs if job.number not in ended or ended[job.number].state == "busy"]
            futures = {executor.submit(take_up, job, config.retries, wait): job for job in left}
            for future in as_completed(futures):
                job = futures[future]
                ended[job.number] = _outcome(future, job)
                say(_words(job, ended[job.number]))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    return [ended[job.number] for job in jobs]


def _outcome(future: Future, job: Job) -> Outcome:
    try:
        return future.result()
    except (RuntimeError, OSError) as error:  # a worker that is gone, a disk that is full: the other jobs go on
        return Outcome(job.number, "failed", True, reason=one_line(error))


def _words(job: Job, outcome: Outcome) -> str:
    if outcome.state == "busy":
        return f"{job.title}: another scheduler runs it"
    if outcome.state == "failed":
        return f"{job.title}: failed: {outcome.reason}"
    return f"{job.title}: done" + (f" in {outcome.seconds:.0f} s" if outcome.ran else " already")
