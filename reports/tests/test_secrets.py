"""Tokens of the environment are in nothing that a run writes or says."""

from __future__ import annotations

from .suites import SUPPORTED

pytest_plugins = ["pytester"]

TOKEN = "hf_secretsecretsecret"

TALKATIVE = """
import logging, os, warnings
import pandas as pd
TOKEN = os.environ["HF_TOKEN"]

@pytest.mark.claim(ONE)
def test_says_it(evidence):
    print("printed", TOKEN)
    logging.getLogger("hub").warning("logged %s", TOKEN)
    warnings.warn(f"warned {TOKEN}")
    evidence.about(subject={"revision": f"asked with {TOKEN}"})
    evidence.jsonl("outputs.jsonl", pd.DataFrame([{"output": f"answered {TOKEN}"}]))
    evidence.decide(ONE, effects(0.0), clusters=clusters(), details={"said": f"Bearer {TOKEN}"}, controls=[Control(f"with {TOKEN}", "info", True, 1.0, "1")])

@pytest.mark.claim(TWO)
def test_crashes(evidence):
    print("printed", TOKEN)
    logging.getLogger("hub").warning("logged %s", TOKEN)
    raise RuntimeError(f"401 for {TOKEN}")

@pytest.mark.claim(THREE)
def test_skips(evidence):
    pytest.skip(f"not with {TOKEN}")

def test_plain():
    assert TOKEN == "another", f"compared {TOKEN}"
"""

STOPPED = """
from vlm_core import SubjectError

@pytest.fixture
def subject():
    raise SubjectError("401 for " + __import__("os").environ["HF_TOKEN"])

@pytest.mark.claim(TWO)
def test_never(subject, evidence):
    pass
"""


def written(folder):
    """Every byte below a folder."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_run_that_meets_a_token_everywhere_writes_it_nowhere(suite, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    suite.write(TALKATIVE)
    result = suite.run("-rA", "--claims-revision=" + TOKEN, "--junitxml=junit.xml")
    assert result.ret == 1
    said, kept = result.stdout.str() + result.stderr.str(), written(suite.runs) + (suite.pytester.path / "junit.xml").read_bytes()
    for words in ("printed", "logged", "warned", "401 for", "not with", "compared"):
        assert f"{words} <HF_TOKEN>" in said, words
    assert TOKEN not in said
    for words in ("asked with", "answered", "Bearer", "with", "401 for", "not with"):
        assert f"{words} <HF_TOKEN>".encode() in kept or f"{words} &lt;HF_TOKEN&gt;".encode() in kept or f"{words} \\u003cHF_TOKEN".encode() in kept, words
    assert TOKEN.encode() not in kept


def test_a_subject_that_cannot_be_loaded_does_not_tell_it(suite, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    suite.write(SUPPORTED, STOPPED)
    result = suite.run()
    assert result.ret == 3 and "401 for <HF_TOKEN>" in result.stdout.str()
    assert TOKEN not in result.stdout.str() + result.stderr.str()
