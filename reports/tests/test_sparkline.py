"""The history beside a verdict: drawn from a small file, against the threshold, and not at all where there is none."""

from __future__ import annotations

import re

from reports import page, record
from reports.nights import history, sparkline

from . import sample_nights, sample_run


def nights(*values, verdict="supported"):
    return [
        {"date": f"2026-01-{day:02d}T02:00:00+00:00", "estimate": value, "lower": value and value - 0.02, "upper": value and value + 0.02, "verdict": verdict}
        for day, value in enumerate(values, 1)
    ]  # fmt: skip


def test_nights_lie_where_their_numbers_say():
    entry = sample_run.make("H1.necessity", "supported", 0.3, 0.1)
    found = sparkline.section(nights(0.3, None, 0.2, 0.4), entry)
    first, second, third = found["nights"]
    assert (first["x"], third["x"]) == (sparkline.MARGIN, sparkline.WIDTH - sparkline.MARGIN)
    assert third["y"] < first["y"] < second["y"] < found["edges"][0]  # the highest at the top, the threshold 0.10 below all
    assert third["top"] < third["y"] < third["bottom"] and len(found["edges"]) == 1
    assert found["label"] == "3 nights from 2026-01-01 to 2026-01-04: estimate from 0.30 to 0.40; 3 supported"
    assert sparkline.section(nights(0.3), entry) is None and sparkline.section(nights(None, None), entry) is None
    assert len(sparkline.section(nights(*[0.3] * 90), entry)["nights"]) == sparkline.SHOWN


def test_the_page_shows_the_history_of_the_claims_that_have_one(tmp_path):
    entries = [sample_run.make("H1.necessity", "supported", 0.3, 0.1, params={"task": task}) for task in ("color", "count")]
    folder = sample_run.write(tmp_path, entries, heads=False)
    assert 'class="nights"' not in page.render(folder).read_text(encoding="utf-8")
    found = {record.instance_key("H1.necessity", {"task": "count"}): nights(0.3, 0.31, verdict="inconclusive")}
    (folder / sparkline.ARTIFACT).write_text(record.dumps(found), encoding="utf-8")
    text = page.render(folder).read_text(encoding="utf-8")
    (label,) = re.findall(r'class="nights"><svg[^>]*aria-label="([^"]*)"', text)
    assert label.startswith("2 nights from 2026-01-01") and "2 inconclusive" in label


def test_a_run_with_a_history_has_the_nights_of_its_claims(tmp_path):
    known = history.load(sample_nights.nights(tmp_path / "history", 3))
    entries = sample_run.records()[:1]
    folder = sample_run.write(tmp_path / "run", entries, heads=False)
    sparkline.leave(folder, known)
    left = sparkline.load(folder)
    key = record.instance_key("H1.one", {})
    assert [night["date"][:10] for night in left[key]] == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert [night["estimate"] for night in left[key]] == [line["estimate"] for line in known[key]]
    known[key][0]["declaration"] = "of before"
    sparkline.leave(folder, known)
    assert len(sparkline.load(folder)[key]) == 2
