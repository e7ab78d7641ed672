"""The workflows: versions are pinned, what they call exists, and the history's branch is made, kept and found again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reports import __main__, options
from reports.nights import baselines

from . import sample_nights, sample_run

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
STEPS = [step for workflow in WORKFLOWS.values() for job in workflow["jobs"].values() for step in job["steps"]]
SCRIPTS = {step["name"]: step["run"] for step in WORKFLOWS["nightly"]["jobs"]["claims"]["steps"] if "run" in step}


def declared_options():
    found = []

    class Parser:
        def getgroup(self, *_):
            return self

        def addoption(self, name, **_):
            found.append(name)

    options.declare(Parser())
    return set(found)


def test_actions_are_those_of_github_at_a_named_version():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert len(used) > 5
    for name in used:
        assert re.fullmatch(r"actions/[a-z-]+@(v\d+(\.\d+){0,2}|[0-9a-f]{40})", name), f"{name}: neither a version nor a commit"


def test_no_input_is_pasted_into_a_script():
    """An expression inside a script is text from outside that the shell would run; it goes through the environment."""
    assert [step["name"] for step in STEPS if "${{" in step.get("run", "")] == []


@pytest.mark.parametrize("script", [pytest.param(step["run"], id=step.get("name", step["run"][:20])) for step in STEPS if "run" in step])
def test_scripts_are_sound_and_call_what_there_is(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    assert set(re.findall(r"--claims-[a-z-]+", script)) <= declared_options()
    assert set(re.findall(r"-m reports (\w+)", script)) <= {*__main__.COMMANDS}


def test_nightly_follows_both_lanes_and_fails_with_either():
    text = "\n".join(SCRIPTS.values())
    assert "--claims-baseline=" in text and "--claims-history=" in text and "--claims-profile=nightly" in text and "GITHUB_STEP_SUMMARY" in text
    steps = {step.get("name"): step for step in WORKFLOWS["nightly"]["jobs"]["claims"]["steps"]}
    assert steps["keep the history"]["if"].startswith("always()")
    assert set(re.findall(r"steps\.(\w+)\.outcome == 'failure'", steps["fail where a lane has"]["if"])) == {"reproduce", "replicate"}


def _run(name, folder, **environment):
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", SCRIPTS[name]]
    return subprocess.run(shell, cwd=folder / "checkout", text=True, capture_output=True, env={**os.environ, "RUNNER_TEMP": str(folder / "temp"), **environment})


def _git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, text=True, capture_output=True).stdout


@pytest.fixture
def origin(tmp_path):
    _git(tmp_path, "init", "--quiet", "--bare", "origin.git")
    _git(tmp_path, "init", "--quiet", "seed")
    (tmp_path / "seed" / "a.txt").write_text("a")
    _git(tmp_path / "seed", "add", ".")
    _git(tmp_path / "seed", "commit", "--quiet", "-m", "a")
    _git(tmp_path / "seed", "push", "--quiet", "../origin.git", "HEAD:main")
    return tmp_path / "origin.git"


def test_the_history_is_kept_on_a_branch_from_night_to_night(tmp_path, origin):
    for night in (1, 2):
        folder = tmp_path / str(night)
        (folder / "temp").mkdir(parents=True)
        _git(folder, "clone", "--quiet", "--branch", "main", str(origin), "checkout")
        fetched = _run("fetch the history", folder)
        assert fetched.returncode == 0, fetched.stderr
        history = folder / "temp" / "nights" / "history.jsonl"
        assert history.exists() == (night == 2) and not (history.parent / "a.txt").exists()
        with history.open("a") as out:
            out.write(f'{{"night": {night}}}\n')
        (history.parent / ".history.jsonl.lock").write_text("")
        kept = _run("keep the history", folder)
        assert kept.returncode == 0, kept.stderr
        again = _run("keep the history", folder)
        assert again.returncode == 0, "a night that left nothing is no failure"
    assert _git(origin, "show", "nightly-history:history.jsonl").split("\n") == ['{"night": 1}', '{"night": 2}', ""]
    assert _git(origin, "ls-tree", "--name-only", "nightly-history").split() == ["history.jsonl"]


def test_the_first_night_makes_the_baseline_and_measures_its_noise(tmp_path):
    """With a stand-in for pytest that notes what it was asked and adds to the baseline where it has nothing of its platform.

    Then a regression, whose exit code comes through; then a night on another platform; then one whose baseline somebody asked for.
    """
    (tmp_path / "checkout").mkdir()
    (tmp_path / "temp" / "nights").mkdir(parents=True)
    stand_in = tmp_path / "bin" / "pytest"
    stand_in.parent.mkdir()
    baseline = tmp_path / "temp" / "nights" / "baseline.jsonl"
    added = f'grep -qsx "$MACHINE" {baseline} || echo "$MACHINE" >> {baseline}'
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/asked\n{added}\nexit ${{CODE:-0}}\n')
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    assert _run("reproduce", tmp_path, PATH=path, REASON="", SUBJECT="", MACHINE="avx2").returncode == 0
    assert _run("reproduce", tmp_path, PATH=path, REASON="", SUBJECT="my model", MACHINE="avx2", CODE="11").returncode == 11
    assert _run("reproduce", tmp_path, PATH=path, REASON="", SUBJECT="", MACHINE="avx512f").returncode == 0
    assert _run("reproduce", tmp_path, PATH=path, REASON="new weights", SUBJECT="", MACHINE="avx").returncode == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    reasons = [line.partition("--claims-update-baseline=")[2] for line in asked]
    assert reasons == [baselines.NONE_YET, baselines.SAME_CODE, baselines.NONE_YET, baselines.NONE_YET, baselines.SAME_CODE, "new weights"]
    assert "--claims-subject=my model" in asked[2] and all(f"--claims-baseline={baseline}" in line for line in asked)


def test_the_summary_is_written_even_where_a_lane_left_nothing(tmp_path):
    sample_run.write(tmp_path / "temp" / "runs" / "reproduce" / "20260101T000000Z-vlm", [sample_run.make("H2.trend", "supported", 0.3, 0.1)], heads=False)
    (tmp_path / "checkout").mkdir()
    found = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = _run("say what was found", tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "said.md"), **found)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said.md").read_text(encoding="utf-8")
    assert "# reproduce\n## vlm" in said and "| H2.trend | ● supported |" in said and "# replicate: no run was written" in said
    assert (tmp_path / "temp" / "runs" / "reproduce" / "index.html").exists()


@pytest.mark.parametrize("replicated", [True, False], ids=["both lanes ran", "one lane left nothing tonight"])
def test_what_is_published_is_reached_from_its_first_page(tmp_path, replicated):
    runs = tmp_path / "temp" / "runs"
    sample_nights.nights(tmp_path / "temp" / "nights", 2)
    for lane in ("reproduce", *["replicate"] * replicated):
        sample_run.write(runs / lane / "20260101T000000Z-vlm", [sample_run.make("H2.trend", "supported", 0.3, 0.1)], heads=False)
    (tmp_path / "checkout").mkdir()
    found = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = _run("say what was found", tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "said.md"), **found)
    assert done.returncode == 0, done.stderr
    led = {page.parent.name: re.findall(r'<a href="([^"]+)"', page.read_text(encoding="utf-8")) for page in runs.rglob("index.html")}
    assert {"reproduce/index.html", "replicate/index.html"} <= {*led["runs"]}, "the first page leads to both lanes"
    assert "trend.html" in led["replicate"] and (runs / "replicate" / "trend.html").exists()
    assert "trend.html" not in led["reproduce"]


def test_nights_that_left_nothing_have_no_page(tmp_path):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "temp" / "runs" / "reproduce").mkdir(parents=True)
    done = _run("say what was found", tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "said.md"))
    assert done.returncode == 0, done.stderr
    assert "# reproduce: no run was written" in (tmp_path / "said.md").read_text() and not [*tmp_path.rglob("index.html")]
