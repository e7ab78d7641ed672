"""Many runs from one file: what it expands to, that a job is done once and whole whatever is killed, and the scripts of a SLURM array."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_core.harness import config as harness
from vlm_core.scale import merging
from vlm_core.scale.__main__ import main
from vlm_core.scale.backends import run_jobs
from vlm_core.scale.config import ScaleConfig, SubjectAt
from vlm_core.scale.jobs import jobs_of
from vlm_core.scale.merging import merge
from vlm_core.scale.running import Outcome, _write_down, output_digests, result, state, take_up
from vlm_core.scale.slurm import write_scripts
from vlm_core.secrets import hidden
from vlm_core.tests.scale_jobs import StandIn, gone, subjects, write_config

EXAMPLE = Path(__file__).parents[1] / "scale" / "example.toml"
CLAIMS = {"all": {"profile": "smoke"}}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    return StandIn(tmp_path / "told", monkeypatch)


@pytest.fixture
def config(tmp_path):
    """``config(...)``: a configuration of two subjects and one selection of claims, or what is given in their places."""

    def made(**changes):
        name = f"config-{len(list(tmp_path.glob('config-*')))}.yaml"
        given = changes.pop("subjects", None) or subjects(tmp_path / name.removesuffix(".yaml"), "a", "b")
        content = {"out": str(tmp_path / "out"), "subjects": given, "claims": CLAIMS, **changes}
        return write_config(tmp_path / name, **content)

    return made


def silent(words):
    pass


def run(file):
    config = ScaleConfig.from_file(file)
    return run_jobs(jobs_of(config), config, say=silent)


def test_a_file_expands_to_subjects_times_selections(config):
    sets = {"needle": {"factory": "probes:build", "arguments": {"split": "confirmation"}}}
    file = config(
        claims={
            "h1": {"tests": ["hypotheses/h1"], "keyword": "color", "alpha": 0.1, "processes": 2},
            "h2": {"tests": ["hypotheses/h2"], "seed": 3},
        },
        benchmarks={"vqa": {"sets": sets, "settings": {"mode": "greedy"}}},
    )
    jobs = jobs_of(ScaleConfig.from_file(file))
    assert [(job.number, job.kind, job.title) for job in jobs] == [
        (0, "claims", "a h1"), (1, "claims", "a h2"), (2, "benchmarks", "a vqa"),
        (3, "claims", "b h1"), (4, "claims", "b h2"), (5, "benchmarks", "b vqa"),
    ]  # fmt: skip
    assert len({job.id for job in jobs}) == len({job.folder for job in jobs}) == 6
    line = jobs[0].command_line(Path("/somewhere"))
    assert line[:3] == [sys.executable, "-m", "pytest"] and line[-4:] == ["-k", "color", "-n", "2"]
    assert {"hypotheses/h1", "--claims-out=/somewhere", "--claims-profile=default", "--claims-seed=0", "--claims-alpha=0.1"} <= set(line)
    assert "--claims-seed=3" in jobs[1].command
    assert jobs[2].command_line(Path("/x"))[1:] == ["-m", "vlm_core.evaluate", "--config", "/x/settings.yaml"]
    own = {"name": "a", "path": yaml.safe_load(file.read_text())["subjects"][0]["path"]}
    assert yaml.safe_load(jobs[2].settings) == {"mode": "greedy", "out": "{out}", "sets": sets, "subjects": [own]}


def test_an_id_follows_what_is_done_and_to_whom_and_nothing_else(config, tmp_path):
    own = subjects(tmp_path / "own", "a")
    first = jobs_of(ScaleConfig.from_file(config(subjects=own)))[0]
    elsewhere = jobs_of(ScaleConfig.from_file(config(subjects=own, out="elsewhere", workers=5, retries=0, resources={"cpus": 9})))[0]
    nightly = jobs_of(ScaleConfig.from_file(config(subjects=own, claims={"all": {"profile": "nightly"}})))[0]
    revision = jobs_of(
        ScaleConfig.from_file(config(subjects=[{"path": "org/name", "revision": "v1"}, {"path": "org/name", "name": "main"}]))
    )
    assert first.id == elsewhere.id != nightly.id
    assert len({job.id for job in revision}) == 2


def test_how_a_subject_is_loaded_reaches_both_commands(config, tmp_path):
    assert [one.name for one in dataclasses.fields(SubjectAt)] == [one.name for one in dataclasses.fields(harness.SubjectAt)]
    (own,) = subjects(tmp_path / "own", "a")
    loaded = {"revision": "v1", "device": "cpu", "dtype": "float64"}
    file = config(subjects=[{**own, **loaded}], benchmarks={"vqa": {"sets": {"x": {"path": "x"}}}})
    claims, evaluation = jobs_of(ScaleConfig.from_file(file))
    assert {f"--claims-{name}={value}" for name, value in loaded.items()} <= set(claims.command)
    assert yaml.safe_load(evaluation.settings)["subjects"] == [{**own, "name": "a", **loaded}]


def test_the_example_is_one():
    config = ScaleConfig.from_file(EXAMPLE)
    asked = harness.EvaluationConfig.from_dict(yaml.safe_load(jobs_of(config)[3].settings))
    assert (asked.mode, list(asked.sets)) == ("candidates", ["needle"])
    assert [job.title for job in jobs_of(config)][:4] == ["vlm h1", "vlm h2", "vlm h3", "vlm needle"]


def test_weights_that_change_make_other_jobs(tmp_path):
    (own,) = subjects(tmp_path, "a")
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(bytes(8 * 2**20))
    config = ScaleConfig.from_file(write_config(tmp_path / "c.yaml", out="out", subjects=[own], claims=CLAIMS))
    # A process reads a subject once: another one comes later.
    ids = []
    for place in (None, 0, 5 * 2**20, 8 * 2**20 - 1):
        if place is not None:
            with weights.open("r+b") as file:
                file.seek(place)
                file.write(bytes([1]) * (2**18 if place == 5 * 2**20 else 1))
        jobs_of.__globals__["fingerprint"].cache_clear()
        ids.append(jobs_of(config)[0].id)
    assert len(set(ids)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": []}, "subjects is empty"),
        ({"claims": {}}, "there is nothing to run: write [claims.NAME] or [benchmarks.NAME]"),
        ({"subjects": [{"path": "x/a"}, {"path": "y/a"}]}, "two subjects are called 'a': give each its own name"),
        ({"claims": {"a b": {}}}, "'a b' cannot name a selection"),
        ({"claims": {"all": {"profile": "huge"}}}, "profile must be one of smoke, default, nightly, got 'huge'"),
        ({"claims": {"all": {"arguments": ["--claims-out=x"]}}}, "arguments hold --claims-out, which each job sets itself"),
        ({"workers": 0}, "workers must be 1 or more, got 0"),
        ({"resources": {"time": "4 hours"}}, "time is '4 hours': SLURM takes no spaces there"),
        ({"benchmarks": {"all": {"sets": {"x": {}}}}}, "claims and benchmarks are both called 'all'"),
        (
            {"benchmarks": {"a": {"sets": {"x": {"path": "y"}}}, "b": {"sets": {"x": {"path": "y"}}, "settings": {"max_new_tokens": 9}}}},
            "benchmarks.a and benchmarks.b both have a set called 'x'",
        ),
        ({"cluster": {}}, "there is no setting 'cluster'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path, capsys, change, message):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"out": "out", "subjects": [{"path": "a"}], "claims": CLAIMS, **change}))
    assert main(["plan", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_what_is_done_is_not_run_again_and_what_is_changed_is(stand_in, config, capsys):
    file = config()
    assert [outcome.state for outcome in run(file)] == ["done", "done"]
    assert main(["status", str(file)]) == 0 and "2 done" in capsys.readouterr().out
    assert not any(outcome.ran for outcome in run(file))
    assert [name for name, _ in sorted(stand_in.started)] == ["a", "b"]
    job = jobs_of(ScaleConfig.from_file(file))[1]
    (result(job) / "run-b" / "run.json").write_text("{}")
    assert state(job) == "missing" and main(["status", str(file)]) == 1
    assert [outcome.ran for outcome in run(file)] == [False, True]
    assert json.loads((job.folder / "done.json").read_text())["files"] == output_digests(result(job))


def test_outputs_without_a_marker_count_for_nothing(stand_in, config):
    file = config()
    run(file)
    job = jobs_of(ScaleConfig.from_file(file))[0]
    (job.folder / "done.json").unlink()
    (job.folder / "attempt-left").mkdir()
    assert state(job) == "missing"
    assert [outcome.ran for outcome in run(file)] == [True, False]
    assert state(job) == "done" and not list(job.folder.glob("attempt-*"))


def test_a_killed_command_is_run_again(stand_in, config):
    file = config(retries=1)
    stand_in.tell("hold", "a")
    ended = []
    thread = threading.Thread(target=lambda: ended.extend(run(file)))
    thread.start()
    os.kill(stand_in.held("a"), signal.SIGKILL)
    thread.join(60)
    assert [outcome.state for outcome in ended] == ["done", "done"]
    assert [name for name, _ in stand_in.started].count("a") == 2


def test_a_command_killed_too_often_is_named(stand_in, config):
    file = config(retries=0)
    stand_in.tell("hold", "a")
    ended = []
    thread = threading.Thread(target=lambda: ended.extend(run(file)))
    thread.start()
    os.kill(stand_in.held("a"), signal.SIGKILL)
    thread.join(60)
    assert [outcome.state for outcome in ended] == ["failed", "done"]
    assert "its command was killed by signal 9" in ended[0].reason
    assert state(jobs_of(ScaleConfig.from_file(file))[0]) == "failed"


@pytest.mark.parametrize("status", [2, 3, 4, 5])
def test_a_command_that_ends_badly_is_not_run_again_at_once(stand_in, config, status):
    file = config(subjects=subjects(stand_in.folder / "own", "a"), retries=3)
    stand_in.tell("exit", "a", str(status))
    (outcome,) = run(file)
    assert outcome.state == "failed" and len(stand_in.started) == 1
    assert f"ended with exit status {status} (the stand-in's last words); see " in outcome.reason
    (stand_in.folder / "exit-a").unlink()
    assert [outcome.state for outcome in run(file)] == ["done"]


def test_the_death_of_a_worker_ends_its_command_and_opens_its_lock(stand_in, config):
    file = config()
    stand_in.tell("hold", "a")
    worker = subprocess.Popen([sys.executable, "-m", "vlm_core.scale", "run", str(file), "--job", "0"])
    command = stand_in.held("a")
    job = jobs_of(ScaleConfig.from_file(file))[0]
    assert state(job) == "running"
    worker.kill()
    worker.wait()
    assert gone(command), "the command of a killed worker goes on without it"
    assert state(job) == "missing"
    assert take_up(job).state == "done"
    assert take_up(job).ran is False


@pytest.mark.skipif(sys.platform != "linux", reason="what ends with its parent is the kernel's to say")
def test_a_command_does_not_outlive_its_leash(stand_in, config):
    file = config()
    stand_in.tell("hold", "a")
    ended = []
    thread = threading.Thread(target=lambda: ended.extend(run(file)), daemon=True)
    thread.start()
    command = stand_in.held("a")
    leash = int(Path(f"/proc/{command}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(leash, signal.SIGKILL)
    assert gone(command)
    thread.join(60)
    assert [outcome.state for outcome in ended] == ["done", "done"]


def test_two_schedulers_do_not_run_one_job_twice(stand_in, config):
    file = config()
    stand_in.tell("wait", "a")
    ended = {}
    threads = [threading.Thread(target=lambda key=key: ended.update({key: run(file)}), daemon=True) for key in (0, 1)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    while len(stand_in.started) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    job = jobs_of(ScaleConfig.from_file(file))[0]
    try:
        assert state(job) == "running"
        busy = take_up(job)
    finally:
        (stand_in.folder / "wait-a").unlink()
    for thread in threads:
        thread.join(60)
    assert busy.state == "busy"
    assert [outcome.state for found in ended.values() for outcome in found] == ["done"] * 4
    assert sorted(name for name, _ in stand_in.started) == ["a", "b"]


def test_the_scripts_of_a_slurm_array_run_its_jobs(stand_in, config, tmp_path):
    file = config(resources={"cpus": 3, "gpus": 1, "memory": "16G", "partition": "long", "at_once": 4, "options": ["--qos=high"]})
    submit = write_scripts(ScaleConfig.from_file(file), file, Path(__file__).parents[2])
    scripts = submit.parent
    for script in ("jobs.sbatch", "merge.sbatch", "submit.sh"):
        subprocess.run(["bash", "-n", scripts / script], check=True)
    text = (scripts / "jobs.sbatch").read_text()
    asked = (
        "--array=0-1%4",
        "--cpus-per-task=3",
        "--gres=gpu:1",
        "--mem=16G",
        "--partition=long",
        "--qos=high",
        "--requeue",
        "--time=04:00:00",
    )
    assert all(f"#SBATCH {option}\n" in text for option in asked)
    assert (
        "--gres" not in (scripts / "merge.sbatch").read_text() and "#SBATCH --cpus-per-task=1\n" in (scripts / "merge.sbatch").read_text()
    )
    file.write_text("edited meanwhile")
    done = subprocess.run(["bash", scripts / "jobs.sbatch"], env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"}, check=False)
    assert done.returncode == 0
    (copy,) = scripts.glob("config-*.yaml")
    first, second = jobs_of(ScaleConfig.from_file(copy))
    assert (state(first), state(second)) == ("missing", "done")
    later = config(claims={"other": {"profile": "nightly"}})
    write_scripts(ScaleConfig.from_file(later), later)
    assert jobs_of(ScaleConfig.from_file(copy)) == [first, second], "what waits does what it was handed in for"
    # What sbatch would be told.
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\necho "4711;cluster"\n')
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    subprocess.run(["bash", submit], env={**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"}, check=True, capture_output=True)
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"--parsable {scripts}/jobs.sbatch", f"--dependency=afterany:4711 {scripts}/merge.sbatch",
    ]  # fmt: skip


def script(config, code, out=None):
    """A job of a benchmark that runs some code instead, with the path of its settings."""
    file = config(claims={}, benchmarks={"vqa": {"sets": {"x": {"path": "x"}}}}, **({} if out is None else {"out": str(out)}))
    return dataclasses.replace(jobs_of(ScaleConfig.from_file(file))[0], command=("-c", code, "{out}/settings.yaml"))


def test_settings_say_where_outputs_go_whatever_the_folder_is_called(config, tmp_path):
    code = "import sys, pathlib, yaml; out = yaml.safe_load(open(sys.argv[1]))['out']; pathlib.Path(out, 'came').touch()"
    job = script(config, code, tmp_path / "o'brien: {a}" / ("long " * 30).strip())
    assert take_up(job) == Outcome(job.number, "done", True, pytest.approx(0, abs=60))
    assert (result(job) / "came").is_file()


ONE_MORE = """
import os, signal, sys, pathlib, yaml
out = pathlib.Path(yaml.safe_load(open(sys.argv[1]))["out"])
n = len(list(out.glob("answer-*")))
with (out.parent / "starts").open("a") as starts:
    starts.write(f"{n} ")
(out / f"answer-{n}").write_text(str(os.getpid()))
if n < LAST:
    ENDS
"""


def test_answers_of_a_killed_benchmark_are_gone_on_from(config):
    """Whether its own scheduler runs it again, or another takes it up."""
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    job = script(config, ONE_MORE.replace("LAST", "3").replace("ENDS", killed))
    assert take_up(job, retries=1).state == "failed" and state(job) == "failed"
    outcome = take_up(job, retries=5)
    assert outcome.state == "done"
    assert sorted(one.name for one in result(job).glob("answer-*")) == [f"answer-{n}" for n in range(4)]
    assert (job.folder / "starts").read_text().split() == ["0", "1", "2", "3"], "none twice, none lost"
    assert not list(job.folder.glob("attempt-*"))


def test_finished_answers_without_a_marker_are_gone_on_from(config):
    """Killed between the last two steps: they are whole, and nobody has said so."""
    job = script(config, ONE_MORE.replace("LAST", "0").replace("ENDS", "pass"))
    assert take_up(job).state == "done"
    (job.folder / "done.json").unlink()
    outcome = take_up(job)
    assert (outcome.state, outcome.ran) == ("done", True)
    assert (job.folder / "starts").read_text().split() == ["0", "1"]
    assert sorted(one.name for one in result(job).glob("answer-*")) == ["answer-0", "answer-1"]


@pytest.mark.parametrize("status", [1, 2])
def test_a_benchmark_that_ends_badly_keeps_its_answers(config, status):
    """A disk that was full, a lock that another held: it is not run again by itself, and goes on where somebody runs it."""
    job = script(config, ONE_MORE.replace("LAST", "2").replace("ENDS", f"raise SystemExit({status})"))
    for n in range(2):
        assert take_up(job, retries=3).state == "failed"
        (attempt,) = job.folder.glob("attempt-*")
        assert len(list(attempt.glob("answer-*"))) == n + 1
    assert take_up(job).state == "done"
    assert (job.folder / "starts").read_text().split() == ["0", "1", "2"]


def test_a_benchmark_is_not_begun_afresh_for_good(config):
    """One that refuses an empty folder too has failed."""
    job = script(config, "raise SystemExit(3)")
    assert take_up(job, retries=3).state == "failed"
    assert take_up(job, retries=3).state == "failed"


def test_the_reason_of_a_failure_is_its_own(config):
    code = """
import pathlib, sys
once = pathlib.Path(sys.argv[1]).parents[1] / "once"
if not once.exists():
    once.touch()
    print("no such set")
raise SystemExit(2)
"""
    job = script(config, code)
    assert "no such set" in take_up(job).reason
    assert "no such set" not in take_up(job).reason


def test_answers_that_do_not_fit_any_more_are_begun_again(config):
    """Of other items, code or weights than were there when it was cut off: the command refuses the folder."""
    refuses = """
import os, signal, sys, pathlib, yaml
out = pathlib.Path(yaml.safe_load(open(sys.argv[1]))["out"])
if (out / "answer").exists():
    raise SystemExit(3)
(out / "answer").touch()
if not (out.parent / "killed").exists():
    (out.parent / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    job = script(config, refuses)
    assert take_up(job).state == "failed"
    assert take_up(job).state == "done"
    assert not list(job.folder.glob("attempt-*"))


def test_no_secret_is_in_the_log(config, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "a-token-to-be-hidden")
    monkeypatch.setenv("SOME_CREDENTIALS", "{\n  key: abcdefgh\n}")
    monkeypatch.setenv("SOME_PASSWORD", os.fsdecode(b"p\xe4ssword"))
    monkeypatch.setenv("NO_PASSWORD", "********")
    code = """
import os, sys, time, pathlib
log = pathlib.Path(sys.argv[1]).parents[1] / "log.txt"
def say(text, heard=None):
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    until = time.monotonic() + 60
    while heard is not None and heard not in log.read_text():
        if time.monotonic() > until:
            raise SystemExit("not in the log")
        time.sleep(0.02)
say(b"with a-token-to-be-hidden\\r", "with")
for part in (b"first a-to", b"ken-to-be-hid"):
    say(part, "first ")
for part in (b"den\\n", os.environ["SOME_CREDENTIALS"].encode(), b"\\n\\xff ******** p\\xe4ss", b"word\\n", b"a-token", b" the end a-tok"):
    say(part)
"""
    job = script(config, code)
    assert take_up(job).state == "done"
    told = (job.folder / "log.txt").read_text()
    expected = ["with <SOME_TOKEN>", "first <SOME_TOKEN>", "<SOME_CREDENTIALS>", "? ******** <SOME_PASSWORD>", "a-token the end a-tok"]
    assert told.splitlines() == expected


class InPieces:
    """What a command says, in these pieces."""

    def __init__(self, pieces):
        self.pieces = [piece for piece in pieces if piece]

    def read1(self, size):
        return self.pieces.pop(0) if self.pieces else b""


@settings(deadline=None)
@given(st.lists(st.sampled_from(["abcdabcd", "abcdabcdx", "abcd", "dabcdabc", "x", "\n", "\N{EURO SIGN}"]), max_size=8), st.lists(st.integers(0, 60), max_size=8))
def test_pieces_of_what_is_said_hide_what_the_whole_would(said, cuts):
    """Secrets that begin, end or hold each other too, wherever the pieces are cut."""
    whole = "".join(said).encode()
    ends = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    log, trouble = io.StringIO(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONE_TOKEN", "abcdabcd")
        patch.setenv("OTHER_TOKEN", "abcdabcdx")
        _write_down(InPieces(whole[one:two] for one, two in pairwise(ends)), log, trouble)
        assert log.getvalue() == hidden(whole.decode()) and not trouble


def test_what_is_said_is_in_the_log_at_once(config):
    code = """
import sys, time, pathlib
sys.stdout.write("....")
sys.stdout.flush()
log = pathlib.Path(sys.argv[1]).parents[1] / "log.txt"
until = time.monotonic() + 60
while log.read_text() != "....":
    if time.monotonic() > until:
        raise SystemExit("not there")
    time.sleep(0.02)
"""
    assert take_up(script(config, code)).state == "done"


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyError("a variable that another thread has removed")])
def test_a_log_that_cannot_be_written_is_told(config, monkeypatch, error):
    """The command itself goes on to its end: it is not the one to blame."""

    def full(text):
        raise error

    job = script(config, "import pathlib, sys; print('.' * 10**6); (pathlib.Path(sys.argv[1]).parents[1] / 'ended').touch()")
    monkeypatch.setattr("vlm_core.scale.running.hidden", full)
    told = []

    def run():
        with pytest.raises(type(error)) as found:
            take_up(job)
        told.append(found.value)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert told == [error]
    assert (job.folder / "ended").is_file()


def test_no_secret_is_recorded_of_a_job_that_fails(config, monkeypatch, capsys):
    monkeypatch.setenv("SOME_TOKEN", "a-token-to-be-hidden")
    job = script(config, "print('refused for a-token-to-be-hidden'); raise SystemExit(2)")
    assert "(refused for <SOME_TOKEN>)" in take_up(job).reason
    assert "a-token-to-be-hidden" not in (job.folder / "failed.json").read_text()
    assert main(["plan", "a-token-to-be-hidden.toml"]) == 2 and "<SOME_TOKEN>.toml" in capsys.readouterr().err


def test_what_one_worker_meets_does_not_end_the_others(stand_in, config, monkeypatch):
    def full(job, *args):
        if job.number == 0:
            raise OSError("No space left on device")
        return take_up(job, *args)

    monkeypatch.setattr("vlm_core.scale.backends.take_up", full)
    first, second = run(config())
    assert (first.state, first.reason, second.state) == ("failed", "No space left on device", "done")


def test_a_full_disk_fails_an_element_of_an_array_in_a_sentence(config, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("vlm_core.scale.__main__.take_up", full)
    assert main(["run", str(config()), "--job", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("failed: No space left on device")


def test_a_report_is_made_of_what_is_done_and_says_what_is_not(stand_in, config, monkeypatch, capsys):
    file = config()
    with pytest.raises(ValueError, match="is done: run them first"):
        merge(ScaleConfig.from_file(file))
    stand_in.tell("exit", "b", "3")
    run(file)
    asked = []
    monkeypatch.setattr(merging.subprocess, "run", lambda command, check: asked.append(command) or subprocess.CompletedProcess(command, 0))
    assert main(["merge", str(file)]) == 1
    assert "not in the report: b all: failed" in capsys.readouterr().err
    first = jobs_of(ScaleConfig.from_file(file))[0]
    out = Path(ScaleConfig.from_file(file).out) / "report"
    assert asked == [
        [sys.executable, "-m", "reports", "models", f"a={result(first) / 'run-a'}", "--out", str(out), "--missing=b all: failed"]
    ]


def test_answers_of_other_code_are_named(config, monkeypatch, capsys):
    file = config(claims={}, benchmarks={"vqa": {"sets": {"x": {"path": "x"}}}})
    for job, torch in zip(jobs_of(ScaleConfig.from_file(file)), ("2.8", "2.9"), strict=True):
        code = "import json, sys, pathlib; to = pathlib.Path(sys.argv[1]).parent / 'a' / 'x'; to.mkdir(parents=True); "
        code += f"(to / 'run.json').write_text(json.dumps({{'versions': {{'torch': '{torch}', 'python': '3'}}}}))"
        assert take_up(dataclasses.replace(job, command=("-c", code, "{out}/settings.yaml"))).state == "done"
    monkeypatch.setattr(merging.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 0))
    assert main(["merge", str(file)]) == 0
    assert capsys.readouterr().err.splitlines() == ["torch differs: a vqa 2.8, b vqa 2.9"]


def test_a_job_that_is_not_there_is_refused(config, capsys):
    assert main(["run", str(config()), "--job", "2"]) == 2
    assert "there is no job 2" in capsys.readouterr().err
