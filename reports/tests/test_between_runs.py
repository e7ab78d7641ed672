"""Pages and texts about several runs: what changed between two, night by night, a directory's list, a job's summary."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from reports import compare, index, markdown, page, record
from reports.__main__ import main
from reports.nights import trend

from . import sample_nights, sample_run
from .sample_nights import DROP, IDENTITY, LOSS, RATIO
from .test_page import Reader

ENTRIES = (("H1.necessity", "supported", 0.43), ("H3.sft", "supported", 0.2), ("H2.noninferior", "refuted", 0.2), ("H3.uses_image", "invalid", None))
HOSTILE = '<script>alert("x")</script>'


def made():
    return [sample_run.make(claim, verdict, estimate, 0.06) for claim, verdict, estimate in ENTRIES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same items: the loss grew by 20 items, the drop lost nine, the ratio is the same."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    before, loss = (rng.random(200) < 0.35).astype(float), (rng.random(200) < 0.01).astype(float)
    after, more = before.copy(), loss.copy()
    after[:30], more[:20] = 0, 1
    first = sample_nights.write(folder / "first", {DROP: before, LOSS: loss, RATIO: before})
    later = {"started": "2026-01-02T02:00:00+00:00", "commit": "def", "versions": {"torch": "2.13", "peft": "1"}}
    second = sample_nights.write(folder / "second", {DROP: after, LOSS: more, RATIO: before}, **later)
    return first, second, (after - before).mean()


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return sample_nights.nights(tmp_path_factory.mktemp("nights") / "history", 14)


def sound(text):
    """The page is well formed, needs nothing but itself, and every drawing has a text alternative."""
    read = Reader(text)
    assert read.badly_nested == [] and read.open == [] and len(read.ids) == len(set(read.ids)) and set(read.links) <= set(read.ids)
    assert all(read.labels) and not re.search(r'(?:src|href)="(?:https?:)?//|@import', text)
    return text


def test_changed_verdicts_come_first_with_paired_intervals(runs):
    first, second, difference = runs
    found = compare.between(first, second)
    assert [(row["claim_id"], row["state"]) for row in found["rows"]] == [("H2.two", "changed"), ("H1.one", "same"), ("H1.ratio", "same")]
    drop = found["rows"][1]["difference"]
    assert drop["estimate"] == pytest.approx(difference) and drop["lower"] < difference < drop["upper"] < 0.01
    assert drop["upper"] - drop["lower"] < 0.1, "paired: independent runs of 200 answers would say 0.18"
    assert found["rows"][2]["difference"] is None and found["rows"][2]["note"] == "200 effects the same, bit by bit"
    assert found["facts"] == [("commit", "abc", "def"), ("peft", "none", "1"), ("torch", "2.12", "2.13")]


def test_comparing_says_it_and_leaves_a_page(runs, capsys):
    first, second, _ = runs
    assert main(["compare", str(first), str(second)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "! H2.two: supported → refuted, difference 0.10 [0.07, 0.15] (20 of 200 effects differ)" in said
    assert said[-2:] == ["1 verdict changed of 3", str(second / "compare.html")]
    text = sound((second / "compare.html").read_text(encoding="utf-8"))
    assert "1 of 3 verdicts changed" in text and "20 of 200 effects differ" in text and "<code>2.13</code>" in text
    assert main(["compare", str(first), str(first.parent / "gone")]) == 1
    assert "cannot be compared" in capsys.readouterr().err


def test_other_items_have_no_paired_interval(tmp_path, runs):
    fresh = sample_nights.write(tmp_path / "fresh", {DROP: np.ones(50)}, scenes="other")
    found = compare.between(runs[0], fresh)
    drop, *gone = sorted(found["rows"], key=lambda row: row["claim_id"] != "H1.one")
    assert drop["difference"] is None and drop["note"] == "other items: their intervals stand beside each other"
    assert [row["state"] for row in gone] == ["gone", "gone"]


def test_a_claim_that_is_declared_otherwise_is_not_compared(tmp_path, runs):
    entries = record.load_run(runs[0])[1]
    entries[0]["declaration"]["hash"] = "0" * 16
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text((runs[0] / "run.json").read_text())
    (other / "evidence.json").write_text(record.dumps(entries))
    row = next(row for row in compare.between(runs[0], other)["rows"] if row["claim_id"] == "H1.one")
    assert row["difference"] is None and "not the same claim" in row["note"]


def test_the_trend_shows_every_night_its_verdict_versions_and_evidence(history, capsys):
    assert main(["trend", str(history)]) == 0
    assert capsys.readouterr().out.strip() == str(history / "trend.html")
    text = sound((history / "trend.html").read_text(encoding="utf-8"))
    titles = re.findall(r"<title>(night \d+, 2026[^<]*)</title>", text)
    assert len(titles) == 3 * 14 and "night 1, 2026-01-01: 0.28 [0.16, 0.39], supported" in titles
    assert text.count(">torch 2.12 → 2.13<") == 1 + 3, "said once, and drawn in each figure"
    assert "<dt>night 8</dt><dd>torch 2.12 → 2.13</dd>" in text
    assert text.count(">evidence E, log10<") == 2 and text.count(">decides<") == 2, "the ratio is no mean over items"
    assert "A ratio of &lt;sums&gt; is above a tenth." in text and "No evidence adds up over nights: its effect is no mean over items" in text
    assert "The nights contradict each other: E is" in text, "a loss that was small on nine nights and is large on five"
    assert "a change of the declared size is caught within" in text and "14 nights" in text


def test_the_figure_of_a_claim_holds_what_the_history_says(history):
    entries = [json.loads(line) for line in (history / "history.jsonl").read_text().splitlines()]
    drops = [entry for entry in entries if entry["claim_id"] == "H1.one"]
    data = trend.figure("H1.one", drops)["data"]
    assert [point["estimate"] for point in data["nights"]] == [entry["estimate"] for entry in drops]
    assert [point["support"] for point in data["nights"]] == [entry["replicated"]["log10_e_support"] for entry in drops]
    assert data["limits"] == [0.1] and data["needed"] == pytest.approx(np.log10(20)) and data["versions"] == [{"night": 8, "text": "torch 2.12 → 2.13"}]


def test_a_folder_without_a_history_is_named(tmp_path, capsys):
    assert main(["trend", str(tmp_path)]) == 1
    assert "is not a history" in capsys.readouterr().err


def test_the_index_lists_runs_newest_first_with_counts_and_links(tmp_path, capsys):
    sample_run.write(tmp_path / "old run", made(), heads=False, name="old", subject={"name": HOSTILE, "source": "x"})
    (tmp_path / "old run" / "report.html").write_text("")
    sample_run.write(tmp_path / "new", made(), heads=False, name="new", started="2026-02-01T00:00:00+00:00", problems=["a worker died"])
    (tmp_path / "latest").symlink_to("new")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert [one["folder"] for one in index.runs(tmp_path)] == ["new", "old run", "broken"]
    assert main(["index", str(tmp_path)]) == 0
    text = sound((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert 'href="old%20run/report.html"' in text and "new/report.html" not in text and "incomplete" in text and "cannot be read" in text
    assert HOSTILE not in text and re.search(r"2 supported</span>.*refuted", text)
    capsys.readouterr()
    (tmp_path / "none").mkdir()
    assert main(["index", str(tmp_path / "none")]) == 1 and "no run is in it" in capsys.readouterr().err


def test_the_index_leads_to_the_nights_and_to_the_indexes_below(tmp_path):
    sample_run.write(tmp_path / "lane one" / "run", made(), heads=False)
    (tmp_path / "lane one" / "trend.html").write_text("")
    (tmp_path / "no index").mkdir()
    assert main(["index", str(tmp_path / "lane one")]) == 0 and main(["index", str(tmp_path)]) == 0
    lane, above = (sound((folder / "index.html").read_text(encoding="utf-8")) for folder in (tmp_path / "lane one", tmp_path))
    assert '<a href="trend.html">Night by night</a>' in lane and "<h1>1 run</h1>" in lane
    assert '<a href="lane%20one/index.html">lane one</a>' in above and "no index" not in above and "trend.html" not in above and "<table" not in above


def test_the_job_summary_has_the_verdict_table_and_says_what_is_wrong(tmp_path, capsys):
    entries = made()
    entries[0]["reproduced"] = {"state": "regression", "sentence": "supported then | refuted now"}
    entries[0]["replicated"] = {"night": 3, "sentence": "x", "verdict": "supported", "nights": 3}
    entries[1]["reason"] = HOSTILE
    entries[1]["verdict"] = "refuted"
    folder = sample_run.write(tmp_path / "run", entries, heads=False, problems=["a worker died"])
    assert main(["summary", str(folder)]) == 0
    text = capsys.readouterr().out
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(entries) and len({line.replace(r"\|", "").count("|") for line in table}) == 1
    assert table[2] == r"| H1.necessity | ● supported | 0.43 \[0.37, 0.49\] | &gt; 0.10 | regression | ● supported, 3 nights |"
    assert "Evidence is incomplete: a worker died" in text and "- **regression**: H1.necessity" in text
    assert "<script" not in text and "exit code 1" in text
    plain = markdown.summary(sample_run.write(tmp_path / "plain", made(), heads=False))
    assert "Baseline" not in plain and "All nights" not in plain


def test_the_job_summary_counts_the_claims_that_had_nothing_to_compare_with(tmp_path):
    entries = made()
    for entry in entries[:3]:
        entry["reproduced"] = {"state": "no baseline", "sentence": "the baseline is of another platform"}
    entries[3]["reproduced"] = {"state": "identical", "sentence": "the same"}
    text = markdown.summary(sample_run.write(tmp_path / "run", entries, heads=False))
    assert "- **no baseline**: 3 claims had nothing to compare with: the baseline is of another platform\n" in text
    assert "nothing to compare" not in markdown.summary(sample_run.write(tmp_path / "compared", entries[3:], heads=False))


def test_the_report_says_what_is_worse_than_the_baseline_and_what_the_nights_amount_to(tmp_path):
    entries = made()[:2]
    entries[0]["reproduced"] = {"state": "regression", "sentence": "supported then, refuted now"}
    entries[1]["replicated"] = {"night": 3, "sentence": "supported by 3 nights"}
    text = page.render(sample_run.write(tmp_path, entries, heads=False)).read_text(encoding="utf-8")
    assert "1 claim worse than the baseline: H1.necessity." in text and "against the baseline: regression, supported then, refuted now." in text
    assert "Night 3: supported by 3 nights." in text
    for entry in entries:
        del entry["reproduced"], entry["replicated"]
    assert "against the baseline:" not in page.render(sample_run.write(tmp_path, entries, heads=False)).read_text(encoding="utf-8"), "an older run"


def test_the_same_identity_gives_the_same_keys_whatever_else_changed():
    from reports import provenance

    assert provenance.platform_key(IDENTITY) == "Linux x86_64 avx2" and provenance.subject_key(IDENTITY) == "w" * 32 + " float32"
    assert provenance.data_key(IDENTITY) == "confirmation c0ffee, profile default, seed 0"
    assert provenance.subject_key({"subject": {"source": "org/name", "revision": "abc"}}) == "org/name abc"
