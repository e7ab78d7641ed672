"""A sample suite of claims with known outcomes, run by pytester."""

from __future__ import annotations

import json
from pathlib import Path

import pandas  # noqa: F401  (loaded here, or pytester would unload it, and NumPy, after each sample run)
import pytest
import scipy.stats  # noqa: F401

import reports.plugin  # noqa: F401
import vlm_core

from .suites import HEADER

ROOT = Path(__file__).resolve().parents[2]


class Suite:
    """A sample suite in a folder of its own."""

    def __init__(self, pytester):
        self.pytester = pytester
        pytester.makeconftest('pytest_plugins = ["reports.plugin"]')
        pytester.makeini("[pytest]\ntestpaths = hypotheses\n")
        pytester.mkdir("hypotheses")

    def write(self, *tests, name="test_claims.py"):
        (self.pytester.path / "hypotheses" / name).write_text(HEADER + "\n".join(tests), encoding="utf-8")

    def run(self, *arguments, **options):
        quiet = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio"]
        return self.pytester.runpytest_inprocess(*quiet, "-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments, **options)

    @property
    def runs(self):
        return self.pytester.path / "reports" / "runs"

    @property
    def folders(self):
        return sorted(path for path in self.runs.iterdir() if path.is_dir() and not path.is_symlink())

    def latest(self):
        folder = self.runs / "latest"
        return self.read(folder)

    def read(self, folder):
        def strict(path):
            return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))

        return strict(folder / "run.json"), strict(folder / "evidence.json")


@pytest.fixture
def suite(pytester, monkeypatch):
    monkeypatch.setitem(vars(vlm_core), "precheck_subject", lambda subject, revision: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Suite(pytester)
