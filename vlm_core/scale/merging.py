"""What finished jobs left, as one report: the command line that writes it.

``merge(config)``   ``OUT/report``: a page across all subjects, and each subject's own evidence and report

What draws pages is no part of this library: it is called as a command (``python -m reports models``), from the root of a checkout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vlm_core.scale.config import ScaleConfig
from vlm_core.scale.jobs import Job, jobs_of
from vlm_core.scale.running import claim_runs, result, state

__all__ = ["merge"]


def merge(config: ScaleConfig, say: Callable[[str], None] = print) -> tuple[int, list[str]]:
    """Write the report of all jobs that are done.

    Parameters
    ----------
    say : callable
        Told which versions and code differ between the benchmarks' answers; of claims the page says so.

    Returns
    -------
    status : int
        Exit status of what wrote it.
    missing : list of str
        Jobs that are not done; the page says so.

    Raises
    ------
    ValueError
        Where no job is done.
    """
    runs, scores, missing, versions = [], [], [], {}
    for job in jobs_of(config):
        found = state(job)
        if found != "done":
            missing.append(f"{job.title}: {found}")
        elif job.kind == "claims":
            runs += [f"{job.subject}={run}" for run in claim_runs(job)]
        else:
            scores.append(f"{job.subject}={result(job)}")
            versions[job.title] = _versions(job)
    if not runs and not scores:
        raise ValueError(f"no job of {config.out} is done: run them first (python -m vlm_core.scale run CONFIG)")
    for name in sorted(set().union(*versions.values())):
        values = {title: own.get(name) for title, own in versions.items()}
        if len(set(values.values())) > 1:
            say(f"{name} differs: {', '.join(f'{title} {value}' for title, value in values.items())}")
    command = [sys.executable, "-m", "reports", "models", *runs, "--out", str(Path(config.out).absolute() / "report")]
    command += [f"--scores={folder}" for folder in scores] + [f"--missing={sentence}" for sentence in missing]
    return subprocess.run(command, check=False).returncode, missing


def _versions(job: Job) -> dict[str, str]:
    """What the answers of a job of benchmarks follow from beside weights and items (`vlm_core.harness.running.versions`)."""
    found = sorted(result(job).glob("*/*/run.json"))
    return json.loads(found[0].read_text(encoding="utf-8"))["versions"] if found else {}
