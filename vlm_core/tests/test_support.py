"""The support matrix says what the conformance suite finds, about what is declared, under the installed transformers."""

from __future__ import annotations

from importlib import import_module
from itertools import product

import pytest

from vlm_core import support
from vlm_core.support import (
    CLAIMS,
    MATRIX,
    SUITE,
    WRITING,
    contradiction,
    read_digests,
    read_matrix,
    render,
    suite_digest,
    this_version,
)
from vlm_core.tests.conformance.claims import CHECKED
from vlm_core.tests.family_models import TINY

STALE = f"{MATRIX.name} is out of date: run python -m vlm_core.support"


def test_every_claim_has_a_test():
    for module in sorted(SUITE.glob("test_*.py")):
        import_module(f"vlm_core.tests.conformance.{module.stem}")
    assert sorted(CHECKED) == sorted(CLAIMS)


@pytest.mark.parametrize("version", read_matrix())
def test_every_section_is_of_this_suite(version):
    """Sections of other versions cannot be run here: they name the suite that wrote them."""
    under = f"{STALE} under transformers {version}"
    assert list(read_matrix()[version]) == list(product(TINY, CLAIMS)), under
    assert read_digests()[version] == suite_digest(), under


def test_this_version_has_a_section():
    if this_version() not in read_matrix():
        pytest.skip(f"{MATRIX.name} has no section for transformers {this_version()} yet: python -m vlm_core.support writes it")


def test_the_matrix_reads_as_it_is_written():
    assert render(read_matrix(), read_digests()) == MATRIX.read_text(), STALE


def test_another_line_anywhere_in_the_suite_is_another_suite(monkeypatch, tmp_path):
    copied = tmp_path / "conformance"
    copied.mkdir()
    for source in (*SUITE.glob("*.py"), *(SUITE.with_name(name) for name in support.STANDS_ON)):
        (copied if source.parent == SUITE else tmp_path).joinpath(source.name).write_text(source.read_text())
    before = suite_digest()
    monkeypatch.setattr(support, "SUITE", copied)
    assert suite_digest() == before
    for source in (copied / "test_heads.py", copied / "claims.py", tmp_path / "family_models.py"):
        text = source.read_text()
        source.write_text(text + "# another line\n")
        assert suite_digest() != before, source
        source.write_text(text)
    (copied / "test_more.py").write_text("")
    assert suite_digest() != before


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """A matrix of two versions beside the real one."""
    cells = {("one", name): "yes" for name in CLAIMS}
    cells["one", "drop"] = "no: its image is elsewhere: use KnockOut"
    cells["one", "padding"] = "not applicable: it has none"
    cells["one", "no-op"] = "eager only: it has no other"
    path = tmp_path / "SUPPORT.md"
    path.write_text(render({"5.23": cells, "5.9": cells | {("one", "drop"): "yes"}}, {"5.23": "abc", "5.9": "123"}))
    monkeypatch.setattr(support, "MATRIX", path)
    monkeypatch.setattr(support, "this_version", lambda: "5.23")
    monkeypatch.delenv(WRITING, raising=False)
    return cells


def test_verdicts_come_back_with_their_reasons(matrix):
    assert read_matrix() == {"5.23": matrix, "5.9": matrix | {("one", "drop"): "yes"}}
    text = support.MATRIX.read_text()
    assert text.index("## transformers 5.23") < text.index("## transformers 5.9")
    assert "| one | eager only [1] | yes |" in text and "[1] eager only: it has no other" in text
    assert read_digests() == {"5.23": "abc", "5.9": "123"}
    assert read_digests(text.replace("Suite `123`", "")) == {"5.23": "abc", "5.9": ""}


def test_what_another_version_was_not_asked_stays_open(matrix, monkeypatch):
    older = dict(read_matrix()["5.9"])
    monkeypatch.setitem(support.CLAIMS, "another", "a claim that came later")
    text = render({"5.23": matrix | {("one", "another"): "yes"}, "5.9": older}, read_digests())
    assert "| another |" in text and text.count("| - |") == 1
    assert read_matrix(text) == {"5.23": matrix | {("one", "another"): "yes"}, "5.9": older}


def test_another_verdict_or_family_is_a_contradiction_also_under_a_version_without_a_section(matrix, monkeypatch):
    assert contradiction("one", "drop", "no: its image is elsewhere: use KnockOut") is None
    assert "SUPPORT.md says 'no: its image is elsewhere: use KnockOut' for one and drop" in contradiction("one", "drop", "yes")
    assert "says 'None' for two and drop" in contradiction("two", "drop", "yes")
    monkeypatch.setattr(support, "this_version", lambda: "5.24")
    assert contradiction("one", "drop", "no: its image is elsewhere: use KnockOut") is None
    assert "under transformers 5.24" in contradiction("one", "drop", "yes")
    monkeypatch.setenv(WRITING, "1")
    assert contradiction("one", "drop", "yes") is None


def test_a_failing_suite_leaves_the_matrix_as_it_was(matrix, monkeypatch, tmp_path):
    failing = tmp_path / "package" / "tests" / "test_suite.py"
    failing.parent.mkdir(parents=True)
    failing.write_text("def test(): assert False\n")
    monkeypatch.setattr(support, "SUITE", failing)
    before = support.MATRIX.read_text()
    assert support.write_matrix() != 0
    assert support.MATRIX.read_text() == before


def test_a_passing_suite_replaces_its_versions_section(matrix, monkeypatch, tmp_path):
    passing = tmp_path / "package" / "tests" / "test_suite.py"
    passing.parent.mkdir(parents=True)
    passing.write_text(
        "def test(record_property):\n"
        f"    for name in {list(CLAIMS)}:\n"
        "        record_property('support', f'new|{name}|yes')\n"
    )
    monkeypatch.setattr(support, "SUITE", passing)
    monkeypatch.setattr(support, "suite_digest", lambda: "asitis")
    assert support.write_matrix() == 0
    assert read_matrix()["5.23"] == {("new", name): "yes" for name in CLAIMS}
    assert read_matrix()["5.9"] == matrix | {("one", "drop"): "yes"}
    assert read_digests() == {"5.23": "asitis", "5.9": "123"}
