"""A warm process is what an interpreter of its own would be: arguments, environment, folder, output, exit code, and it can be killed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from vlm_core.tests.warm import ROOT, Warm, run


def test_it_begins_with_what_takes_long_imported_and_is_told_all_that_it_is_given(tmp_path):
    (tmp_path / "beside.py").write_text("where = 'beside'")
    code = "import os, sys; print('torch' in sys.modules, sys.argv, os.environ, os.getcwd(), __import__('beside').where); print('bad', file=sys.stderr); sys.exit(3)"
    ended = run(["-c", code, "a b", 7], {"ONLY": "this"}, tmp_path)
    said = f"True ['-c', 'a b', '7'] environ({{'ONLY': 'this'}}) {tmp_path} beside\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, said, "bad\n")
    assert run(["-c", "import vlm_core; print(vlm_core.__path__[0])"]).stdout.strip() == str(ROOT / "vlm_core"), "the code that is tested"


def test_a_module_runs_as_a_command(tmp_path):
    (tmp_path / "command.py").write_text("import sys; print(__name__, sys.argv[1:]); 1 / 0")
    ended = run(["-m", "command", "x"], folder=tmp_path)
    assert ended.returncode == 1 and ended.stdout == "__main__ ['x']\n" and "ZeroDivisionError" in ended.stderr
    with pytest.raises(ValueError, match="-c CODE or -m MODULE, got command.py"):
        run(["command.py"])


def test_it_is_killed_and_not_waited_for_without_end():
    sleeping = Warm(["-c", "import time; print('here', flush=True); time.sleep(600)"])
    assert sleeping.poll() is None
    sleeping.kill()
    assert sleeping.wait(timeout=60) == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        run(["-c", "import time; time.sleep(600)"], timeout=0.1)


def test_who_asked_for_it_does_not_wait_for_it_in_the_end():
    code = (
        "from vlm_core.tests import warm; warm.IMPORTED = (); asked = warm.Warm(['-c', 'import time; print(1, flush=True); time.sleep(600)'])\n"
        "while not asked.said()[0]: pass"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
