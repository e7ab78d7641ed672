"""Three subjects on two workers of a Ray cluster, one of them killed midway: the report is that of runs that nothing disturbed."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from reports import __main__ as command
from reports.tests import sample_models
from reports.tests.suites import HEADER, REFUTED
from vlm_core.scale import __main__ as scale
from vlm_core.scale.backends import run_jobs
from vlm_core.scale.config import ScaleConfig
from vlm_core.scale.jobs import jobs_of
from vlm_core.scale.running import claim_runs, state
from vlm_core.tests.scale_jobs import StandIn, gone, subjects, write_config

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("first", "second", "third")


def told(folder, monkeypatch):
    """A stand-in that leaves prepared runs, and the configuration of three subjects."""
    stand_in = StandIn(folder / "told", monkeypatch)
    sample_models.write(stand_in.folder / "runs")
    file = write_config(
        folder / "config.yaml", out=str(folder / "out"), subjects=subjects(folder / "checkpoints", *NAMES), claims={"all": {}},
        resources={"cpus": 1}, retries=2,
    )
    return stand_in, ScaleConfig.from_file(file)


def report(config, folder):
    runs = [f"{job.subject}={run}" for job in jobs_of(config) for run in claim_runs(job)]
    assert command.main(["models", *runs, "--out", str(folder)]) == 0
    return json.loads((folder / "models.json").read_text())


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def disturbed(tmp_path, monkeypatch):
    """What is told to a cluster of two workers, which learn of it as they start."""
    ray = pytest.importorskip("ray")
    found = told(tmp_path / "disturbed", monkeypatch)
    # By default Ray's workers give way to all else: beside other tests theirs would hardly begin.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield found
    ray.shutdown()


def test_a_killed_worker_changes_nothing_in_the_report(disturbed, tmp_path, monkeypatch):
    stand_in, config = disturbed
    stand_in.tell("hold", "second")
    ended = []
    thread = threading.Thread(target=lambda: ended.extend(run_jobs(jobs_of(config), config, "ray", say=lambda words: None)), daemon=True)
    thread.start()
    held = stand_in.held("second")
    worker = parent(parent(held))  # the command's parent is its leash
    os.kill(worker, signal.SIGKILL)
    assert gone(held)
    thread.join(300)
    assert not thread.is_alive(), "three prepared runs take longer than five minutes"
    assert [outcome.state for outcome in ended] == ["done"] * 3
    assert sorted(name for name, _ in stand_in.started) == ["first", "second", "second", "third"]
    assert {state(job) for job in jobs_of(config)} == {"done"}
    with monkeypatch.context() as alone:
        _, undisturbed = told(tmp_path / "undisturbed", alone)
        assert [outcome.state for outcome in run_jobs(jobs_of(undisturbed), undisturbed, "local", say=lambda words: None)] == ["done"] * 3
    found = report(config, tmp_path / "page")
    assert found == report(undisturbed, tmp_path / "other")
    assert [one["name"] for one in found["subjects"]] == list(NAMES) and not found["band"]


SUITE = HEADER + """
@pytest.mark.claim(ONE)
@pytest.mark.parametrize("task", ["color", "count"])
def test_one(evidence, task):
    evidence.decide(ONE, effects(0.5), clusters=clusters())
""" + REFUTED


def test_parts_of_a_real_suite_become_one_report(tmp_path, monkeypatch):
    (tmp_path / "hypotheses").mkdir()
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["reports.plugin"]\n')
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = hypotheses\n")
    (tmp_path / "hypotheses" / "test_parts.py").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shipped = {"path": str(ROOT / "fixtures/embedded/vlm"), "name": "shipped"}
    parts = {"color": {"keyword": "color"}, "rest": {"tests": ["hypotheses/test_parts.py"], "keyword": "not color"}}
    file = write_config(tmp_path / "config.yaml", out="out", subjects=[shipped], claims=parts)
    assert scale.main(["run", str(file)]) == 0
    assert scale.main(["merge", str(file)]) == 0
    found = json.loads((tmp_path / "out" / "report" / "models.json").read_text())
    assert found["band"] == [] and found["n_claims"] == 3
    assert found["subjects"][0]["counts"] == [{"verdict": "supported", "count": 2}, {"verdict": "refuted", "count": 1}]
    assert "H1.two" in (tmp_path / "out" / "report" / "shipped" / "report.html").read_text()
