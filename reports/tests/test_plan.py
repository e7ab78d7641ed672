"""The plan in hypotheses/README.md is what is declared; the literature matrix is about works that claims rest on."""

from __future__ import annotations

import re
from pathlib import Path

from reports import literature
from vlm_core.stats import Claim, Superiority
from vlm_core.tests import warm

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "hypotheses" / "README.md"


def test_the_plan_is_what_is_declared_whatever_a_users_settings_leave_out(monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--claims-profile=smoke")
    written = README.read_text(encoding="utf-8")
    fresh = warm.run(["-c", "from hypotheses import plan; print(plan.text(), end='')"])
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout == written, "hypotheses/README.md is not what is declared: run python -m hypotheses.plan"


def test_every_work_of_the_matrix_is_tested_by_a_declared_claim():
    rows = [row for row in README.read_text(encoding="utf-8").partition("## Literature")[2].splitlines() if row.startswith("| [")]
    assert 10 <= len(rows) == len(literature.WORKS) <= 12
    for row, work in zip(rows, literature.WORKS, strict=True):
        assert work.name in row and work.authors in row
        tested = row.split(" | ")[4]
        assert re.match(r"H[123]\.\w+", tested), f"no claim's source cites {work.name} as {' or '.join(work.cited)}"


def test_a_claim_is_tested_of_the_work_that_its_source_cites():
    def claim(name, source):
        return Claim(id=f"H1.{name}", sentence="It does.", effect="a difference", test=Superiority(0.1), source=source)

    kim, neo = literature.WORKS[:2]
    one, two, other = claim("one", "Kim et al. 2025, arXiv:2509.17588; ours"), claim("two", "Neo et al., ICLR 2025"), claim("other", "ours")
    assert literature.tested(kim, [one, two, other]) == [one] and literature.tested(neo, [one, two, other]) == [two]
    assert kim.url == "https://arxiv.org/abs/2509.17588"
