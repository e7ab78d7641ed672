"""The paper of a run: what it says is the evidence's, what is missing is said, nothing breaks its layout."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
from pathlib import Path

import pypdf
import pytest

from reports import __main__, literature, paper, record, summary
from reports.paper import blocks, content, layout
from reports.tests import sample_run
from reports.tests.sample_run import TASKS, identity, make
from reports.wording import interval_numbers

SYMBOLS = blocks.SYMBOLS


def read(made):
    """Pages of a PDF as text, one line each, as a reader's eye goes."""
    return [" ".join(page.extract_text().split()) for page in pypdf.PdfReader(io.BytesIO(made)).pages]


def row_of(entry):
    """How a verdict stands in the table of all claims."""
    estimate, lower, upper = (text.replace("-", "−") for text in interval_numbers(entry))
    measured = f"{estimate} [{lower}, {upper}]" if entry["estimate"] is not None else "– not measured"
    return measured, f"{SYMBOLS[entry['verdict']]} {entry['verdict']}"


@functools.cache
def complete():
    """The sample with every claim in as many cases as the suite has tasks, exhibits for each."""
    entries = []
    for entry in sample_run.records():
        cases = [entry] if entry["params"] or len(entries) > 60 else [{**entry, "params": {"task": task}} for task in TASKS]
        for place, case in enumerate(cases):
            # drawn once for the first task and once for the last: the paper shows no other
            entries.append(record.validate({**case, "figures": case["figures"] if place in (0, len(cases) - 1) else []}))
    return entries


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = sample_run.write(tmp_path_factory.mktemp("complete"), complete())
    return paper.write(folder).read_bytes()


@pytest.fixture(scope="module")
def pages(whole):
    return read(whole)


@pytest.fixture(scope="module")
def text(pages):
    return " ".join(pages)


def test_a_complete_run_gives_six_to_eight_pages_with_every_section_and_exhibit(pages, text):
    assert not content.lacking(complete()) and "part of a paper" not in text
    low, high = paper.COMPLETE_PAGES
    assert low <= len(pages) <= high, len(pages)
    places = [
        text.index(name)
        for name in ("Abstract.", "Method", "Results", "Error analysis", "Limitations", "Responsible use", "What was published", "Appendix")
    ]
    assert places == sorted(places)
    for label in ("Table 1.", "Figure 1.", "Figure 2.", "Table 2.", "Figure A.", "Figure B.", "Table A.", "Table C."):
        assert label in text, label
    assert "This run does not have" not in text
    assert f"page 1 of {len(pages)}" in pages[0] and f"page {len(pages)} of {len(pages)}" in pages[-1]


def test_every_confirmatory_verdict_is_in_the_table_with_its_numbers(text):
    table = text[text.rindex("Appendix") :]
    for entry in complete():
        if entry["tier"] == "confirmatory":
            measured, verdict = row_of(entry)
            assert measured in table and verdict in table, (entry["claim_id"], measured)
    for verdict, symbol in SYMBOLS.items():
        wanted = sum(entry["verdict"] == verdict and entry["tier"] == "confirmatory" for entry in complete())
        assert table.count(f"{symbol} {verdict}") == wanted, verdict


def test_letters_are_embedded_and_signs_are_letters(whole, text):
    reader = pypdf.PdfReader(io.BytesIO(whole))
    fonts = {
        font["/BaseFont"]: font for page in reader.pages for font in (one.get_object() for one in page["/Resources"]["/Font"].values())
    }
    assert any("DejaVuSans" in name for name in fonts) and any("STIXGeneral" in name for name in fonts)
    assert "−" in text and "±" in text and "●" in text and "α" in text
    assert "vlm" in reader.metadata.title


def test_figures_are_drawings_with_their_own_words(whole, text):
    reader = pypdf.PdfReader(io.BytesIO(whole))
    for words in ("share of visual tokens kept", "layer from which all visual tokens are gone", "attribution (share of logit)"):
        assert words in text, words
    states = [page["/Resources"].get("/ExtGState", {}) for page in reader.pages]
    shades = {float(one.get_object().get("/ca", 1)) for state in states for one in state.values()}
    assert len(shades) > 10, "cells of a map are as strong as their values"
    pixels = [image.image.size for page in reader.pages for image in page.images]
    assert pixels and max(max(size) for size in pixels) <= 96, "only items' pictures are pixels"


def small(verdict="supported", sentence=None, **changes):
    entry = make("H1.specificity", verdict, 0.29, 0.07, **changes)
    return {**entry, "sentence": sentence} if sentence else entry


def text_of(entries, **changes):
    return " ".join(read(paper.pdf(identity(**changes), entries)))


def test_a_changed_verdict_changes_what_the_paper_says():
    supported, refuted = text_of([small()]), text_of([small("refuted")])
    opening = [text.partition("What is asked")[0] for text in (supported, refuted)]
    assert "1 supported, 0 refuted" in opening[0] and "H1 holds." in opening[0]
    assert "0 supported, 1 refuted" in opening[1] and "H1 is refuted." in opening[1]
    assert supported.count("H1 holds.") == 2 == refuted.count("H1 is refuted."), "in the abstract and in the results"
    assert "● supported" in supported[supported.rindex("Appendix") :]
    assert "✕ refuted" in refuted[refuted.rindex("Appendix") :]
    assert "● supported" not in refuted[refuted.rindex("Appendix") :]


def test_a_partial_run_says_what_it_does_not_have():
    text = text_of([small()], partial_families=True)
    assert "This run has no claim of H2" in text and "This run has no claim of H3" in text
    assert "Only part of the declared suite was collected" in text
    for label in ("Table 1", "Figure B"):
        assert f"{label}. This run does not have" in text
    assert "the run has no evidence of H2 and H3" in text


def test_a_run_where_nothing_could_be_measured_is_a_paper_too():
    failed = {"name": "other scene's image", "kind": "negative", "passed": False, "value": 0.34, "expected": "below 0.30", "detail": ""}
    entries = [make(name, "invalid", None, 0, controls=[failed]) for name in ("H1.necessity", "H2.noninferior", "H3.sft")]
    text = text_of(entries, data={}, subject={"name": "random"})
    assert "0 supported, 0 refuted, 0 inconclusive, 3 invalid" in text and text.count("could not be tested") >= 3
    assert "3 control checks" in text and "3 failed" in text
    assert "Table C. This run does not have accuracy per task" in text
    assert text[text.rindex("Appendix") :].count("not measured") == 3


def test_a_run_without_any_claim_is_a_paper_too():
    text = text_of([])
    assert "Table A. This run does not have a confirmatory claim" in text and "0 confirmatory verdicts" in text


def test_hostile_text_is_text():
    word = "x" * 400
    text = text_of(
        [small(sentence=f"<b>& </para> {word} & 模型 \x07 −ρκ±", params={"task": "<i>&amp;"})],
        name="<run>&",
        subject={"name": "<font>" + word},
    )
    assert "<b>& </para>" in text and "<i>&amp;" in text and "ρκ±" in text
    assert text.replace(" ", "").count("x" * 60) >= 1
    assert layout._markup("a\x07b<") == "a b&lt;", "what cannot be printed takes a space"


def test_the_works_are_those_that_are_declared(text):
    for place, work in enumerate(literature.WORKS, 1):
        assert f"[{place}] {work.name}" in text.replace("- ", "-"), work.name
    for sentence in (*summary.LIMITATIONS, *summary.RESPONSIBLE_USE):
        assert sentence in text


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    folder = sample_run.write(tmp_path / "run", [small()], heads=False)
    assert __main__.main(["paper", str(folder)]) == 0 and (folder / "paper.pdf").read_bytes().startswith(b"%PDF")
    assert __main__.main(["paper", str(folder), "--out", str(tmp_path / "other.pdf")]) == 0 and (tmp_path / "other.pdf").exists()
    assert (folder / "paper.pdf").read_bytes() == (tmp_path / "other.pdf").read_bytes()
    capsys.readouterr()
    assert __main__.main(["paper", str(tmp_path / "nothing")]) == 1
    assert "is not a run that a paper can be written of" in capsys.readouterr().err


def test_without_the_libraries_the_command_says_what_to_install(tmp_path):
    folder = sample_run.write(tmp_path / "run", [small()], heads=False)
    code = f"import sys; sys.modules['reportlab'] = None; from reports.__main__ import main; sys.exit(main(['paper', {str(folder)!r}]))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and ran.stderr.strip() == "a paper needs reportlab, which is not installed: pip install -e '.[paper]'"
    assert not (folder / "paper.pdf").exists()
