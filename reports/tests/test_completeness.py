"""Evidence that is lost is never silent."""

from __future__ import annotations

import pytest

from .suites import REFUTED, SUPPORTED

pytest_plugins = ["pytester"]

BROKEN_FIXTURE = """
class SubjectError(Exception): pass

@pytest.fixture(scope="session")
def subject():
    raise SubjectError("subject 'nowhere' was not found: give a folder or a model id")

@pytest.mark.claim(TWO, part="subject")
def test_subject(subject, evidence):
    evidence.decide(TWO, effects(0.5), clusters=clusters())
"""


def test_a_claim_without_a_teardown_report_is_lost(suite):
    suite.write(SUPPORTED, REFUTED)
    suite.pytester.makeconftest(
        """
pytest_plugins = ["reports.plugin"]
import pytest
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    return True if "refuted" in item.name else None
"""
    )
    assert suite.run().ret == 3


def test_stopping_at_the_first_refutation_is_incomplete_but_refuted(suite):
    suite.write(REFUTED, SUPPORTED)
    assert suite.run("-x").ret == 1
    assert suite.folders[0].name.endswith("-incomplete")


@pytest.mark.parametrize("arguments", [[], ["-n", "1"]], ids=["serial", "worker"])
def test_a_missing_subject_stops_the_session_in_one_sentence(suite, arguments):
    suite.write(BROKEN_FIXTURE, SUPPORTED)
    result = suite.run(*arguments)
    assert result.ret == 3
    assert result.stdout.str().count("subject 'nowhere' was not found") == 1
    assert "Traceback" not in result.stdout.str() and "def subject" not in result.stdout.str()
    assert suite.folders == []


def test_the_subject_is_checked_before_anything_runs(suite, monkeypatch):
    import vlm_core

    class SubjectError(Exception):
        pass

    def refuse(subject, revision):
        raise SubjectError(f"subject {subject!r} is a text-only checkpoint")

    monkeypatch.setitem(vars(vlm_core), "precheck_subject", refuse)
    suite.write(SUPPORTED)
    result = suite.run("--claims-subject=gpt2")
    assert result.ret == 4
    assert [line for line in result.stderr.lines if line] == ["ERROR: subject 'gpt2' is a text-only checkpoint"]
    suite.write("def test_plain(): pass\n")
    assert suite.run("--claims-subject=gpt2").ret == 0


def test_a_killed_run_can_still_be_rendered(suite):
    from reports import page

    suite.write(SUPPORTED, "def test_end():\n    import os; os._exit(9)\n")
    suite.pytester.makeconftest(
        'pytest_plugins = ["reports.plugin"]\nimport vlm_core\nvlm_core.precheck_subject = lambda subject, revision: None\n'
    )
    suite.pytester.runpytest_subprocess()
    (folder,) = suite.folders
    assert folder.name.startswith(".") and folder.name.endswith(".partial")
    assert "ended before it was finished" in page.render(folder).read_text(encoding="utf-8")
