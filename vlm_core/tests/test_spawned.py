"""Processes that outlive nobody."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlm_core.spawned import end_with_parent
from vlm_core.tests.killed_pools import ROOT, ends_with_its_pool


@pytest.mark.parametrize("seconds", [0, 600], ids=["idle", "busy"])
def test_workers_of_sweeps_end_with_a_process_that_was_killed(tmp_path, seconds):
    assert ends_with_its_pool("from vlm_core.sweeps.executors import ProcessExecutor\npool = lambda: ProcessExecutor(1)", tmp_path, seconds)


def test_a_process_that_nobody_spawned_goes_on():
    code = "from vlm_core.spawned import end_with_parent; import threading; end_with_parent(); print(threading.active_count())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "1\n"
    end_with_parent()
