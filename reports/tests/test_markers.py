"""What tests say of themselves: capabilities they require, claims they are a control of; and a run's own alpha."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reports import page

from .suites import EXPLORATORY, INVALID, SUPPORTED

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]

SUBJECT = """
from types import SimpleNamespace
from vlm_core import NotMeasurable

LOADED = []

def require(capability):
    if capability == "drop":
        raise NotMeasurable("family 'x' lacks 'drop': its image is outside the sequence.")

@pytest.fixture(scope="session")
def subject():
    return SimpleNamespace(anatomy=SimpleNamespace(require=require))

@pytest.fixture(scope="session")
def measured():
    raise RuntimeError("hours were spent")

@pytest.mark.claim(ONE)
@pytest.mark.requires("heads", "drop")
def test_one(measured, evidence):
    evidence.decide(ONE, effects(0.5), clusters=clusters())

@pytest.mark.claim(TWO)
@pytest.mark.requires("heads")
@pytest.mark.parametrize("task", ["color", "shape"])
def test_two(evidence, task):
    evidence.decide(TWO, effects(0.5), clusters=clusters())

@pytest.mark.requires("drop")
def test_plain(): assert 0
"""


def test_what_a_subject_lacks_makes_the_claim_invalid_before_anything_is_measured(suite):
    suite.write(SUBJECT)
    result = suite.run("-rs")
    assert result.ret == 10
    _, records = suite.latest()
    assert [(entry["claim_id"], entry["verdict"], entry["outcome"]) for entry in records] == [
        ("H1.one", "invalid", "skipped"),
        ("H1.two", "supported", "decided"),
        ("H1.two", "supported", "decided"),
    ]
    assert records[0]["reason"] == "not measured: family 'x' lacks 'drop': its image is outside the sequence."


CONTROL = """
@pytest.mark.control(ONE, LOOK)
@pytest.mark.parametrize("weights", ["random", "shuffled"])
def test_blind(weights):
    assert weights == "shuffled", "a model with random weights passes too"
"""


@pytest.mark.parametrize("arguments", [[], ["-n", "1"]], ids=["serial", "worker"])
def test_a_control_test_that_fails_makes_its_claims_invalid(suite, arguments):
    suite.write(SUPPORTED, EXPLORATORY, INVALID, CONTROL)
    result = suite.run(*arguments, "-k", "supported or look or test_invalid")
    assert result.ret == 1
    run, records = suite.latest()
    one, look, two = records
    assert (one["verdict"], look["verdict"]) == ("invalid", "invalid") and run["counts"] == {"invalid": 3}
    assert one["reason"].startswith("the negative control test_blind[random] did not pass: a model with random weights passes too")
    assert [(c["name"], c["passed"]) for c in one["controls"]] == [("test_blind[random]", False), ("test_blind[shuffled]", True)]
    assert "test_blind" not in two["reason"] and len(two["controls"]) == 1
    assert [control["passed"] for control in run["controls"]] == [False, True]
    result.stdout.fnmatch_lines(["– INVALID *H1.one*"])


def test_a_control_test_that_cannot_be_run_vouches_for_nothing(suite):
    suite.write(SUPPORTED, CONTROL.replace("    assert", "    if weights == 'random': pytest.skip('no such weights here')\n    assert"))
    assert suite.run().ret == 10
    _, records = suite.latest()
    assert records[0]["verdict"] == "invalid" and "not measured: no such weights here" in records[0]["reason"]


def test_claims_whose_control_tests_pass_keep_their_verdict(suite):
    suite.write(SUPPORTED, CONTROL.replace('["random", "shuffled"]', '["shuffled"]'))
    assert suite.run().ret == 0
    _, records = suite.latest()
    assert [(control["name"], control["kind"], control["passed"]) for control in records[0]["controls"]] == [("test_blind[shuffled]", "negative", True)]


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        ("requires('dorp')", "takes capabilities of * not 'dorp'"),
        ("requires()", "takes capabilities of *drop*"),
        ("control()", "takes one or more declared Claims"),
        ("control('H1.one')", "takes one or more declared Claims"),
        ("control(ONE, kind='info')", "kind is one of negative, positive, floor, ceiling, placebo, not 'info'"),
        ("claim(ONE)\n@pytest.mark.control(TWO)", "decides none itself"),
    ],
)
def test_a_marker_that_says_nothing_is_one_sentence(suite, marker, sentence):
    suite.write(f"@pytest.mark.{marker}\ndef test_it(): pass\n")
    result = suite.run()
    assert result.ret == 4
    result.stderr.fnmatch_lines([f"*{sentence}*"])


def test_markers_are_registered(suite):
    suite.write(SUPPORTED, CONTROL, "@pytest.mark.requires('drop')\n@pytest.mark.skip\ndef test_skipped(): pass\n")
    suite.run("--strict-markers", "--collect-only").stdout.no_fnmatch_line("*not found in*")
    suite.run("--markers").stdout.fnmatch_lines(["@pytest.mark.claim(CLAIM*", "@pytest.mark.control(CLAIM*", "@pytest.mark.requires(capability*"])


def test_a_marker_that_nobody_registered_is_an_error_in_this_project(suite):
    """With the pytest.ini that the project has, a misspelt marker cannot leave a claim out in silence."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "pytest.ini", encoding="utf-8")
    assert "--strict-markers" in settings["pytest"]["addopts"].split()
    shutil.copy(ROOT / "pytest.ini", suite.pytester.path)
    suite.write(SUPPORTED.replace("mark.claim", "mark.clame"))
    result = suite.run("--collect-only")
    assert result.ret == 2
    result.stdout.fnmatch_lines(["*'clame' not found in `markers` configuration option*"])
    suite.write(SUPPORTED)
    assert suite.run("--collect-only").ret == 0


def test_another_alpha_decides_and_is_said(suite):
    suite.write(SUPPORTED, EXPLORATORY, "@pytest.mark.claim(TWO)\ndef test_alpha(evidence):\n    evidence.decide(TWO, effects(0.21), clusters=clusters())\n")
    declared = suite.run()
    run, before = suite.latest()
    assert declared.ret == 0 and run["alpha"] is None and "declared" not in before[1]["declaration"]
    assert "family-wise alpha" not in declared.stdout.str()
    stricter = suite.run("--claims-alpha=0.0001")
    run, after = suite.latest()
    assert stricter.ret == 10 and run["alpha"] == 0.0001
    assert [entry["alpha"] for entry in after] == [0.0001] * 3
    assert (before[2]["verdict"], after[2]["verdict"]) == ("supported", "inconclusive")
    assert after[2]["lower"] < before[2]["lower"] and after[2]["confidence"] == pytest.approx(1 - 2 * 0.0001 / 2)
    for old, new in zip(before, after, strict=True):
        assert new["declaration"]["declared"] == {"alpha": 0.05, "hash": old["declaration"]["hash"]}
        assert new["declaration"]["hash"] != old["declaration"]["hash"] and "--claims-alpha=0.0001" in new["reproduce"]
    suite.run("--claims-list", "--claims-alpha=0.0001").stdout.fnmatch_lines([f"H1.one *declaration {before[0]['declaration']['hash']}"])
    said = "Decided at a family-wise alpha of 0.0001 (--claims-alpha) in place of the declared one."
    stricter.stdout.fnmatch_lines([said])
    assert said in page.render(suite.runs / "latest").read_text(encoding="utf-8")


def test_a_test_that_makes_its_own_bounds_makes_them_at_the_runs_alpha(suite):
    suite.write(
        "@pytest.mark.claim(ONE)\ndef test_own(evidence):\n    assert evidence.alpha == 0.01 / 2\n    evidence.decide(ONE, effects(0.5), clusters=clusters())\n",
        INVALID,
    )
    suite.run("--claims-alpha=0.01")
    assert suite.latest()[1][0]["outcome"] == "decided"


def test_a_smoke_run_says_that_little_was_measured(suite):
    suite.write(SUPPORTED)
    for profile, says in (("smoke", True), ("default", False)):
        ended = suite.run(f"--claims-profile={profile}")
        shown = page.render(suite.runs / "latest").read_text(encoding="utf-8")
        assert ("A smoke run: it shows that everything works" in ended.stdout.str(), "A smoke run: it shows" in shown) == (says, says)


def test_a_session_begins_without_what_only_measuring_needs():
    """The process that hands out tests imports every plugin before its workers begin: seconds, if these were among them."""
    said = (
        "import importlib, sys, conftest\n"
        "for name in conftest.pytest_plugins: importlib.import_module(name)\n"
        "print(*sorted({'torch', 'transformers', 'scipy', 'pandas', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []
