"""What finished jobs left, as one report: the command line that writes it.

``merge(config)``   ``OUT/report``: a page across all subjects, and each subject's own evidence and report

What draws pages is no part of this library: it is called as a command (``python -m reports models``), from the root of a checkout.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vlm_core.scale.config import ScaleConfig
from vlm_core.scale.jobs import jobs_of
from vlm_core.scale.running import claim_runs, result, state

__all__ = ["merge"]


def merge(config: ScaleConfig) -> tuple[int, list[str]]:
    """Write the report of all jobs that are done.

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
    runs, scores, missing = [], [], []
    for job in jobs_of(config):
        found = state(job)
        if found != "done":
            missing.append(f"{job.title}: {found}")
        elif job.kind == "claims":
            runs += [f"{job.subject}={run}" for run in claim_runs(job)]
        else:
            scores.append(f"{job.subject}={result(job)}")
    if not runs and not scores:
        raise ValueError(f"no job of {config.out} is done: run them first (python -m vlm_core.scale run CONFIG)")
    command = [sys.executable, "-m", "reports", "models", *runs, "--out", str(Path(config.out).absolute() / "report")]
    command += [f"--scores={folder}" for folder in scores] + [f"--missing={sentence}" for sentence in missing]
    return subprocess.run(command, check=False).returncode, missing
