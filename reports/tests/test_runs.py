"""What befalls a run: workers of any number and kind, their death, Ctrl-C, a full or read-only disk, another run beside it."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from reports import collect, page, record

from .suites import EXPLORATORY, INCONCLUSIVE, INVALID, REFUTED, SUPPORTED

pytest_plugins = ["pytester"]

ODD = """
@pytest.mark.claim(ONE)
@pytest.mark.parametrize("task", [
    pytest.param("a@b", marks=pytest.mark.xdist_group("left")), pytest.param("x[y]::z w", marks=pytest.mark.xdist_group("right")), "ü/é", "",
])
def test_odd(evidence, task, record_property):
    record_property("share", np.float64(0.5))
    record_property("thing", object)
    evidence.table("rows.csv", __import__("pandas").DataFrame({"task": [task], "value": [1 / 3]}))
    evidence.decide(ONE, effects(0.5), clusters=clusters(), details={"count": np.int64(3), "worst": np.float32("inf"), "curve": np.arange(4096.0)})
"""
NUMPY_REFUTED = """
@pytest.mark.claim(TWO, part="numpy")
@pytest.mark.xdist_group("left")
def test_numpy_refuted(evidence, record_property):
    record_property("share", np.float32(0.5))
    evidence.decide(TWO, effects(0.0), clusters=clusters())
"""
NAN = """
@pytest.mark.claim(TWO, part="nan")
def test_nan(evidence):
    evidence.decide(TWO, np.where(np.arange(100) < 3, np.nan, 1.0), clusters=clusters(), details={"mean": np.nan})
"""
DYING = """
import os, signal
@pytest.mark.claim(TWO, part="dies")
def test_dies(evidence):
    os._exit(7)

@pytest.mark.claim(TWO, part="is killed")
def test_is_killed(evidence):
    os.kill(os.getpid(), signal.SIGKILL)
"""
INTERRUPTING = """
import os, signal, sys, time
@pytest.mark.claim(TWO, part="ctrl-c")
def test_ctrl_c(evidence, request):
    os.kill(os.getppid() if hasattr(request.config, "workerinput") else os.getpid(), signal.SIGINT)
    time.sleep(20)
"""


def _evidence(folder):
    """What a run left: its records but for durations, its tables, its arrays."""
    text = re.sub(r'"duration_s": [0-9.e-]+', '"duration_s": 0', (folder / "evidence.json").read_text(encoding="utf-8"))
    arrays = sorted(path.name for path in (folder / record.ARRAYS).iterdir())
    return text, (folder / "rows.csv").read_bytes(), arrays


def test_every_distribution_leaves_the_evidence_of_one_process(suite):
    suite.write(SUPPORTED, NUMPY_REFUTED, NAN, ODD)
    suite.write(INCONCLUSIVE, EXPLORATORY, name="test_more.py")
    assert suite.run().ret == 1
    run, records = suite.latest()
    alone = _evidence(suite.runs / "latest")
    assert len(records) == 9 and [entry["params"]["task"] for entry in records if "task" in entry["params"]] == ["a@b", "x[y]::z w", "ü/é", ""]
    assert [entry["reason"] for entry in records if entry["params"] == {"part": "nan"}] == ["3 of 100 effects are NaN or infinite"]
    for workers, distribution in (("3", "load"), ("2", "loadscope"), ("2", "loadfile"), ("2", "loadgroup"), ("2", "worksteal"), ("2", "each")):
        assert suite.run("-n", workers, "--dist", distribution).ret == 1, distribution
        shared, _ = suite.latest()
        assert shared["complete"] and shared["processes"] == int(workers), distribution
        assert _evidence(suite.runs / "latest") == alone, distribution
        assert shared["declarations"] == run["declarations"] and shared["counts"] == run["counts"]


def test_workers_that_die_lose_their_claims_and_no_others(suite):
    suite.write(SUPPORTED, DYING, INCONCLUSIVE)
    result = suite.run("-n", "1")
    assert result.ret == 3
    result.stdout.fnmatch_lines(["evidence is incomplete: no report came back from *test_dies*test_is_killed*"])
    (folder,) = suite.folders
    run, records = suite.read(folder)
    assert folder.name.endswith("-incomplete") and not run["complete"] and run["exit_code"] == 3
    assert [entry["claim_id"] for entry in records] == ["H1.one", "H2.three"]
    assert not (suite.runs / "latest").exists()
    assert 'class="band"' in (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def interruptible():
    """Ctrl-C reaches this process also where a shell has started it in the background, which then ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("arguments", [[], ["-n", "1"]], ids=["serial", "worker"])
def test_ctrl_c_keeps_what_had_finished(suite, interruptible, arguments):
    suite.write(SUPPORTED, INTERRUPTING, REFUTED)
    result = suite.run(*arguments, no_reraise_ctrlc=True)
    assert result.ret == 2
    (folder,) = suite.folders
    run, records = suite.read(folder)
    assert folder.name.endswith("-incomplete") and run["exit_code"] == 2
    assert [entry["claim_id"] for entry in records] == ["H1.one"]
    assert run["problems"][0].startswith("the run was stopped before 2 tests: ")


@pytest.mark.parametrize("arguments", [[], ["-n", "1"]], ids=["serial", "worker"])
def test_a_disk_that_fills_up_stops_the_run_in_one_sentence(suite, monkeypatch, arguments):
    opened = collect.Run._open

    def on_a_full_disk(run):
        opened(run)
        (run.folder / "records.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(collect.Run, "_open", on_a_full_disk)
    suite.write(SUPPORTED, "def test_later():\n    import time; time.sleep(1)\n", "def test_last(): raise SystemExit(9)\n")
    result = suite.run(*arguments)
    assert result.ret == 3
    said = [line for line in result.outlines if "No space left on device" in line]
    assert len(said) == 1 and said[0].startswith(f"the run cannot be written to {suite.runs}: No space left on device; what was written before is in ")
    assert "SystemExit" not in result.stdout.str() and "Traceback" not in result.stdout.str()
    assert not (suite.runs / "latest").exists()


def test_a_disk_that_is_full_before_the_first_record_is_not_said_to_hold_one(suite, monkeypatch):
    def refuse(folder, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda folder, *given, **options: (refuse if folder.name.endswith(".partial") else mkdir)(folder, *given, **options))
    suite.write(SUPPORTED)
    result = suite.run()
    assert result.ret == 3
    result.stdout.fnmatch_lines([f"the run cannot be written to {suite.runs}: No space left on device"])


def test_a_disk_that_is_full_at_the_end_leaves_records_that_can_be_rendered(suite, monkeypatch):
    write_text = Path.write_text

    def half(path, text, **options):
        if "evidence.json" in path.name:
            write_text(path, text[: len(text) // 2], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", half)
    suite.write(SUPPORTED, REFUTED)
    assert suite.run().ret == 3
    (folder,) = suite.folders
    identity, records = record.load_run(folder)
    assert [entry["claim_id"] for entry in records] == ["H1.one", "H1.two"]
    assert identity["problems"] == ["the run ended before it was finished", "it has the 2 claims that had finished by then"]


@pytest.mark.parametrize("arguments", [[], ["-n", "1"]], ids=["serial", "worker"])
def test_a_page_that_cannot_be_drawn_loses_no_evidence(suite, monkeypatch, arguments):
    def broken(folder, *given):
        raise KeyError("no such template")

    monkeypatch.setattr(page, "render", broken)
    suite.write(SUPPORTED, REFUTED)
    result = suite.run(*arguments)
    assert result.ret == 3
    (folder,) = suite.folders
    result.stdout.fnmatch_lines(["*INTERNALERROR> *no such template*", f"the report could not be drawn; the evidence is in {folder}"])
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and not (suite.runs / "latest").exists()
    monkeypatch.undo()
    assert [entry["claim_id"] for entry in record.load_run(folder)[1]] == ["H1.one", "H1.two"]
    assert page.render(folder).is_file()


@pytest.mark.parametrize("arguments", [[], ["-n", "1"]], ids=["serial", "worker"])
def test_an_error_of_a_hook_ends_with_3_and_keeps_what_had_finished(suite, arguments):
    hook = """
    import pytest
    pytest_plugins = ["reports.plugin"]

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(report):
        if report.nodeid.endswith("test_refuted") and report.when == "call":
            raise RuntimeError("a hook of another plugin")
    """
    suite.pytester.makeconftest(hook)
    suite.write(SUPPORTED, REFUTED, INCONCLUSIVE)
    result = suite.run(*arguments)
    said = result.stdout.str() + result.stderr.str()
    assert result.ret == 3 and "INTERNALERROR" in said and "a hook of another plugin" in said
    (folder,) = suite.folders
    run, records = suite.read(folder)
    assert folder.name.endswith("-incomplete") and not run["complete"] and run["exit_code"] == 3
    assert [entry["claim_id"] for entry in records] == ["H1.one"]
    assert run["problems"] == ["the run was stopped before 2 tests: hypotheses/test_claims.py::test_refuted, hypotheses/test_claims.py::test_inconclusive"]


@pytest.mark.parametrize("arguments", [[], ["-n", "1"]], ids=["serial", "worker"])
@pytest.mark.parametrize(("claim", "code"), [(REFUTED, 1), (INCONCLUSIVE, 10)], ids=["refuted", "inconclusive"])
def test_a_run_that_stops_at_the_first_failure_ends_with_what_that_was(suite, claim, code, arguments):
    """With workers pytest itself ends as interrupted, with 2."""
    suite.write(SUPPORTED, claim, EXPLORATORY)
    assert suite.run("-x", *arguments).ret == code
    (folder,) = suite.folders
    run, records = suite.read(folder)
    assert folder.name.endswith("-incomplete") and run["exit_code"] == code and len(records) == 2
    assert run["problems"] == ["the run was stopped before 1 tests: hypotheses/test_claims.py::test_look"]


def test_an_output_folder_that_cannot_be_written_is_one_sentence_before_anything_is_loaded(suite, monkeypatch):
    import vlm_core

    def refuse(**options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setitem(vars(vlm_core), "precheck_subject", lambda subject, revision: pytest.fail("the subject was looked at"))
    suite.write(SUPPORTED, "raise SystemExit('the tests were loaded')\n")
    for denied, reason in ((False, "Not a directory"), (True, "Permission denied")):
        if denied:
            monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        result = suite.run(f"--claims-out={'runs' if denied else 'tox.ini/runs'}")
        assert result.ret == 4
        (line,) = [line for line in result.stderr.lines if line.strip()]
        assert line.startswith("ERROR: --claims-out ") and line.endswith(f"cannot be written: {reason}")


def test_two_runs_at_once_in_one_folder(suite):
    waiting = """
import os, pathlib, time
@pytest.mark.claim(ONE)
def test_waits_for_the_other(evidence):
    pathlib.Path("here." + str(os.getpid())).touch()
    while len(list(pathlib.Path().glob("here.*"))) < 2: time.sleep(0.05)
    evidence.decide(ONE, effects(0.5), clusters=clusters())
"""
    suite.write(waiting)
    suite.pytester.makeconftest(
        'pytest_plugins = ["reports.plugin"]\nimport vlm_core\nvlm_core.precheck_subject = lambda subject, revision: None\n'
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio"]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    processes = [suite.pytester.popen(command, **quiet) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    folders = suite.folders
    assert len(folders) == 2 and all(suite.read(folder)[0]["complete"] for folder in folders)
    assert suite.runs.joinpath("latest").resolve() in folders
    assert sorted(path.name for path in suite.runs.iterdir()) == sorted([*(folder.name for folder in folders), "latest"])


LOADED = """
import pytest, sys
pytest_plugins = ["reports.plugin"]
import vlm_core
vlm_core.precheck_subject = lambda subject, revision: None

@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    with open("controller" if config.getoption("tx", None) and not hasattr(config, "workerinput") else "tests", "w") as out:
        print("hypothesis" in sys.modules, file=out)
"""
PROPERTY = """
import hypothesis

@hypothesis.settings(deadline=None)
@hypothesis.given(hypothesis.strategies.integers())
def test_property(n): pass
"""


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_hypothesis_is_loaded_where_a_test_uses_it(suite, workers, used):
    """Its plugin would import all of it in every process as a session ends, for a second or more; what it has to tell is told."""
    suite.write(PROPERTY if used else "", SUPPORTED)
    suite.pytester.makeconftest(LOADED)
    found = suite.pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", str(workers), *(["--hypothesis-show-statistics"] if used else []))
    assert found.ret == 0
    loaded = {name: Path(suite.pytester.path, name).read_text().strip() for name in ("controller", "tests")[1 - workers :]}
    assert loaded == {**({"controller": "True"} if workers else {}), "tests": str(used)}
    assert used == ("100 passing" in found.stdout.str())


def test_the_latest_run_is_never_missing_while_another_takes_its_place(tmp_path, monkeypatch):
    replace, seen = os.replace, []
    for name in "ab":
        (tmp_path / name).mkdir()
    collect._point_latest(tmp_path, "a")
    monkeypatch.setattr(os, "replace", lambda old, new: seen.append((tmp_path / "latest").resolve().name) or replace(old, new))
    collect._point_latest(tmp_path, "b")
    assert seen == ["a"] and (tmp_path / "latest").resolve().name == "b" and len(list(tmp_path.iterdir())) == 3


def test_junit_xml_is_valid_and_says_what_each_claim_came_to(suite):
    odd = NUMPY_REFUTED.replace('"numpy"', '"<&\\x07\\x1b[0m>"')
    suite.write(SUPPORTED, odd, INVALID, "@pytest.mark.claim(THREE)\ndef test_skip(): pytest.skip('no ]]> teacher')\n")
    (suite.pytester.path / "known.toml").write_text('[[expected]]\nclaim = "H1.two"\nparams = { part = "control" }\nverdict = "invalid"\nreason = "<x>"\n')
    assert suite.run("--junitxml=junit.xml", "--claims-expectations=known.toml", "-n", "1").ret == 1
    cases = ElementTree.parse(suite.pytester.path / "junit.xml").getroot().iter("testcase")
    found = {case.get("name"): ({one.get("name"): one.get("value") for one in case.iter("property")}, {child.tag for child in case}) for case in cases}
    assert len(found) == 4
    supported, tags = found["test_supported"]
    assert tags == {"properties"} and {"claim_id": "H1.one", "verdict": "supported", "outcome": "decided", "threshold": "0.1"}.items() <= supported.items()
    assert float(supported["estimate"]) == 0.5 and len(supported["declaration"]) == 16
    assert found["test_numpy_refuted"][0]["verdict"] == "refuted" and "failure" in found["test_numpy_refuted"][1]
    assert found["test_numpy_refuted"][0]["share"] == "0.5" and found["test_invalid"][0]["outcome"] == "expected"
    assert "skipped" in found["test_invalid"][1] and "skipped" in found["test_skip"][1]


def test_the_command_of_an_odd_parameter_runs_it_alone(suite):
    suite.write(ODD, SUPPORTED.replace("ONE", "THREE"))
    suite.run()
    for entry in suite.latest()[1]:
        assert suite.run(*shlex.split(entry["reproduce"])[3:]).ret == 0
        (alone,) = suite.latest()[1]
        assert alone["params"] == entry["params"]


def test_a_suite_says_its_verdicts_in_letters_where_symbols_are_not_to_be_had(suite, monkeypatch):
    from reports import terminal

    monkeypatch.setattr(terminal, "can_show_symbols", lambda reporter: False)
    suite.write(SUPPORTED, REFUTED, INCONCLUSIVE, INVALID)
    result = suite.run()
    result.stdout.fnmatch_lines(["*test_claims.py SRIN *", "S SUPPORTED *", "R REFUTED *", "I INCONCLUSIVE *", "N INVALID *", "*1 supported*1 refuted*"])
