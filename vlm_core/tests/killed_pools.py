"""Pools whose process is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from vlm_core.tests.scale_jobs import gone

ROOT = Path(__file__).parents[2]
STARTS = """
import sys, time
from vlm_core.tests.worker_tasks import stay
if __name__ == "__main__":
    kept = pool()
    kept.submit(stay, sys.argv[1], float(sys.argv[2]))
    time.sleep(600)
"""


def ends_with_its_pool(pool: str, folder: Path, seconds: float) -> bool:
    """Whether a worker that has been given work for some time ends when the process of its pool is killed.

    ``pool``: code that defines ``pool()``.
    """
    (folder / "starts.py").write_text(pool + STARTS)
    told = folder / "told"
    told.mkdir()
    starter = subprocess.Popen([sys.executable, str(folder / "starts.py"), str(told), str(seconds)], env={"PYTHONPATH": str(ROOT)})
    try:
        until = time.monotonic() + 120
        while not (found := list(told.iterdir())) and starter.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        (worker,) = (int(one.name) for one in found)
        if not seconds:
            time.sleep(0.5)  # it waits for another task, on a pipe of which it holds both ends
    finally:
        starter.kill()
        starter.wait()
    return gone(worker)
