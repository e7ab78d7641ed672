"""Parts of one subject's runs put together, and many subjects on one page."""

from __future__ import annotations

import json
import re

import pytest

from reports import __main__ as command
from reports import models, record, shards

from . import sample_models
from .suites import EXPLORATORY, INCONCLUSIVE, REFUTED, SUPPORTED

pytest_plugins = ["pytester"]

TABLE = """
@pytest.mark.claim(THREE, part="table")
def test_table(evidence):
    evidence.table("rows.csv", __import__("pandas").DataFrame({"task": ["a", "b"], "value": [0.5, 1.5]}))
    evidence.artifact_json("facts.json", {"three": 3})
    evidence.decide(THREE, effects(0.5), clusters=clusters(), details={"curve": np.arange(4096.0)})
"""
OTHER_TABLE = """
@pytest.mark.claim(ONE, part="table")
def test_other_table(evidence):
    evidence.table("rows.csv", __import__("pandas").DataFrame({"task": ["b", "c"], "value": [1.5, 2.5]}))
    evidence.artifact_json("facts.json", {"one": 1})
    evidence.decide(ONE, effects(0.18), clusters=clusters())
"""


@pytest.fixture
def runs(suite):
    """A suite run whole, and in parts: one file each, and the first file again by ``-k``."""
    suite.write(SUPPORTED, REFUTED, EXPLORATORY, OTHER_TABLE, name="test_a.py")
    suite.write(INCONCLUSIVE, TABLE, name="test_b.py")

    def run(name, *arguments):
        suite.run(*arguments, f"--claims-out={suite.pytester.path / name}")
        (found,) = (path for path in (suite.pytester.path / name).iterdir() if path.is_dir() and not path.is_symlink())
        return found

    return {
        "whole": run("whole"),
        "a": run("a", "hypotheses/test_a.py", "-k", "not refuted and not other"),
        "a-rest": run("a-rest", "hypotheses/test_a.py", "-k", "refuted or other"),
        "b": run("b", "hypotheses/test_b.py"),
    }


def test_parts_put_together_are_the_whole(runs, tmp_path):
    whole, parts = shards.merge([runs["whole"]]), shards.merge([runs["a"], runs["a-rest"], runs["b"]])
    assert parts.identity["complete"] and not parts.identity["partial_families"]
    assert shards.digest(parts) == shards.digest(whole)
    # Holm's p of a part alone is stricter than the whole family's: it has to be computed anew.
    alone, joined, unsplit = (
        {record.instance_key(entry["claim_id"], entry["params"]): entry["p_holm"] for entry in records}
        for records in (record.load_run(runs["a-rest"])[1], parts.records, whole.records)
    )
    assert joined == unsplit
    assert alone['H1.one {"part": "table"}'] > joined['H1.one {"part": "table"}']
    page = shards.write(parts, tmp_path / "merged")
    assert "H1.two" in page.read_text() and record.load_run(tmp_path / "merged")[0]["problems"] == []
    assert sorted((tmp_path / "merged" / "rows.csv").read_text().splitlines()[1:]) == ["a,0.5", "b,1.5", "c,2.5"]
    assert json.loads((tmp_path / "merged" / "facts.json").read_text()) == {"one": 1, "three": 3}
    curve = next(entry["details"]["curve"] for entry in parts.records if "curve" in entry["details"])
    assert record.read_array(tmp_path / "merged", curve).shape == (4096,)


def test_what_no_part_has_run_is_named(runs):
    merged = shards.merge([runs["a"], runs["b"]])
    assert merged.identity["problems"] == ["1 of the 3 confirmatory instances of H1 were run"]
    assert not merged.identity["complete"]
    assert shards.digest(merged) != shards.digest(shards.merge([runs["whole"]]))


def test_parts_that_disagree_are_named_and_the_first_is_kept(runs):
    other = json.loads((runs["b"] / "evidence.json").read_text())
    changed = next(entry for entry in other if entry["params"] == {"part": "table"})
    changed["estimate"] = 0.25
    (runs["b"] / "evidence.json").write_text(record.dumps(other))
    merged = shards.merge([runs["whole"], runs["b"]])
    assert any("disagrees about H2.three [part=table]" in problem for problem in merged.identity["problems"])
    kept = next(entry for entry in merged.records if entry["claim_id"] == "H2.three" and entry["params"])
    assert kept["estimate"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "nightly"}, "their profile differ (default; nightly)"),
        ({"seed": 3}, "their seed differ"),
        ({"subject": {"name": "first", "source": "checkpoints/first", "weights": "others"}}, "their subject's weights differ"),
        ({"data": {"confirmation": "other"}}, "their confirmation items differ"),
    ],
)
def test_runs_that_are_no_parts_of_one_are_refused(tmp_path, change, message):
    first, second = (sample_models.write(tmp_path / name)["first"] for name in ("a", "b"))
    identity = json.loads((second / "run.json").read_text())
    (second / "run.json").write_text(record.dumps({**identity, **change}))
    with pytest.raises(ValueError, match=re.escape(message)):
        shards.merge([first, second])


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["supported"] * 3, "all"),
        (["refuted"] * 2, "none"),
        (["supported", "refuted", "invalid"], "differs"),
        (["supported", "supported", "inconclusive"], "open"),
        (["supported", None], "open"),
        (["refuted", "invalid"], "open"),
        ([None, None], "open"),
    ],
)
def test_a_claim_generalises_only_where_every_subject_says_so(verdicts, expected):
    assert models.general(verdicts) == expected


@pytest.fixture
def three(tmp_path):
    return models.gather([f"{name}={folder}" for name, folder in sample_models.write(tmp_path).items()])


def test_the_model_counts_subjects_by_claim_and_family(three):
    found = models.model(three)
    words = {row["title"]: row["word"] for _, rows in found["hypotheses"] for row in rows if row["tier"] == "confirmatory"}
    assert words == {
        "H1.necessity [task=color]": "differs",
        "H1.necessity [task=count]": "holds in all",
        "H1.redundancy": "open",
        "H2.noninferior": "fails in all",
    }
    supported = {row["title"]: row["supported"] for _, rows in found["hypotheses"] for row in rows}
    assert supported["H1.necessity [task=color]"] == supported["H1.redundancy"] == 2
    assert found["counts"] == {"holds in all": 1, "fails in all": 1, "differs": 1, "open": 1}
    llava, qwen = found["families"]
    assert (llava["name"], [one["name"] for one in llava["subjects"]], qwen["name"]) == ("llava", ["first", "second"], "qwen2_vl")
    assert llava["general"] == {"holds in all": 2, "open": 1, "fails in all": 1}
    assert dict(qwen["claims"])["H1.necessity"] == [{"verdict": "supported", "count": 1}, {"verdict": "refuted", "count": 1}]


def test_heads_layers_and_horizon_are_compared_by_relative_depth(three):
    first, second, third = models.model(three)["subjects"]
    assert first["depth"]["half"] == pytest.approx(1.5 / 6)  # 0.68 of all in layers 0 and 1
    assert third["depth"]["half"] == pytest.approx(4.5 / 8)  # 0.32 before layer 4, which holds 0.44
    assert [cell["from"] for cell in second["depth"]["cells"]] == [0, 25, 50, 75]
    assert first["where"] == {"heads": [{"name": n, "tasks": 2} for n in ("1.2", "1.0", "5.3")], "tasks": 2}
    assert first["horizon"]["range"] == (0.5, 0.5) and third["horizon"]["range"] == (0.5, 0.5)


def test_the_page_says_what_is_missing_and_that_one_subject_is_not_two(tmp_path, capsys):
    runs = sample_models.write(tmp_path / "runs")
    given = [*(f"{name}={folder}" for name, folder in runs.items()), f"again={runs['first']}"]
    assert command.main(["models", *given, "--out", str(tmp_path / "page"), "--missing", "fourth h1: failed"]) == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert "not run: fourth h1: failed" in text
    assert "first and again have the same weights: they are one subject, counted twice" in text
    assert 'href="first/report.html"' in text and (tmp_path / "page" / "first" / "report.html").is_file()
    assert "incomplete: fourth h1: failed" in capsys.readouterr().err
    found = json.loads((tmp_path / "page" / "models.json").read_text())
    assert found["found"]["first"] != found["found"]["second"]


def test_scores_of_the_same_items_stand_in_one_row(three, tmp_path):
    lines = ["set,mode,task,subject,data,n,clusters,score,lower,upper,f1", "pope,candidates,all,x,{data},8,4,0.{score},0.1,0.9,"]
    scores = []
    for name, data, score in (("first", "abc", 25), ("second", "abc", 75), ("third", "def", 5)):
        (tmp_path / "scores" / name).mkdir(parents=True)
        (tmp_path / "scores" / name / "summary.csv").write_text("\n".join(lines).format(data=data, score=score) + "\n")
        scores.append((name, tmp_path / "scores" / name))
    found = models.model(three, scores)["benchmarks"]
    assert found["subjects"] == ["first", "second", "third"]
    assert [[one and one["score"] for one in row["cells"]] for row in found["rows"]] == [[0.25, 0.75, None], [None, None, 0.5]]
    text = models.render(three, tmp_path / "page", scores).read_text()
    assert "0.75" in text and "by the likeliest candidate" in text
    alone = models.render([], tmp_path / "alone", scores).read_text()
    assert "<h1>3 subjects</h1>" in alone and 'id="benchmarks"' in alone and 'id="families"' not in alone
    with pytest.raises(ValueError, match="neither a run nor a score"):
        models.render([], tmp_path / "none")


def test_tasks_whose_claim_is_invalid_are_no_finding(tmp_path):
    runs = sample_models.write(tmp_path)
    records = json.loads((runs["first"] / "evidence.json").read_text())
    for entry in records:
        if entry["claim_id"] == "H1.necessity" and entry["params"] == {"task": "color"} or entry["claim_id"] == "H2.horizon":
            entry["verdict"] = "invalid"
    (runs["first"] / "evidence.json").write_text(record.dumps(records))
    table = runs["first"] / "attribution-by-layer.csv"
    table.write_text("task,layer,share\ncolor,0,1.0\ncolor,1,0.0\ncount,0,0.2\ncount,1,0.8\n")
    first = models.model(models.gather([f"first={runs['first']}"]))["subjects"][0]
    assert first["horizon"] is None and first["where"]["tasks"] == 1
    assert [cell["share"] for cell in first["depth"]["cells"]] == [0.2, 0.8]


def test_another_declaration_is_no_cell_of_the_row(tmp_path):
    runs = sample_models.write(tmp_path)
    records = json.loads((runs["second"] / "evidence.json").read_text())
    for entry in records:
        entry["declaration"]["hash"] = "another"
    (runs["second"] / "evidence.json").write_text(record.dumps(records))
    found = models.model(models.gather([f"{name}={folder}" for name, folder in runs.items()]))
    rows = [row for _, rows in found["hypotheses"] for row in rows]
    assert all(row["cells"][1] == {"other": True} and row["verdicts"][1] is None for row in rows)


def test_two_subjects_of_one_name_are_refused(tmp_path):
    runs = sample_models.write(tmp_path)
    identity = json.loads((runs["second"] / "run.json").read_text())
    identity["subject"]["name"] = "first"
    (runs["second"] / "run.json").write_text(record.dumps(identity))
    with pytest.raises(ValueError, match="two subjects are called 'first': write NAME=RUN"):
        models.gather([str(runs["first"]), str(runs["second"])])
