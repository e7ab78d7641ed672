"""From a claim test to pytest's outcome, the terminal, the record and the exit code."""

from __future__ import annotations

import pytest

from reports import figures

from .suites import CRASHING, EXPLORATORY, INCONCLUSIVE, INVALID, REFUTED, SUPPORTED

pytest_plugins = ["pytester"]


def test_each_verdict_is_shown_and_recorded(suite):
    suite.write(SUPPORTED, REFUTED, INCONCLUSIVE, INVALID)
    result = suite.run("-v")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "*test_supported SUPPORTED*",
            "*test_refuted REFUTED*",
            "*test_inconclusive INCONCLUSIVE*",
            "*test_invalid INVALID*",
            "● SUPPORTED *H1.one *0.50 [[]0.3*, 0.6*] *> 0.10",
            "✕ REFUTED *H1.two *0.00 *",
            "*the interval *lies below*",
            "◐ INCONCLUSIVE *H2.three *",
            "– INVALID *H1.two *part=control*",
            "*other scene*",
            "*.html",
        ]
    )
    assert "Traceback" not in result.stdout.str() and "def test_refuted" not in result.stdout.str()
    run, records = suite.latest()
    assert [entry["verdict"] for entry in records] == ["supported", "refuted", "inconclusive", "invalid"]
    assert run["complete"] and run["exit_code"] == 1
    assert run["counts"] == {"supported": 1, "refuted": 1, "inconclusive": 1, "invalid": 1}
    assert run["peak_memory_mb"] > 1 and run["duration_s"] > 0
    assert str(suite.folders[0] / "report.html") in result.outlines


@pytest.mark.parametrize(
    ("tests", "arguments", "code"),
    [
        ([SUPPORTED], [], 0),
        ([SUPPORTED, REFUTED, INCONCLUSIVE], [], 1),
        ([SUPPORTED, INCONCLUSIVE], [], 10),
        ([SUPPORTED, INVALID], [], 10),
        ([SUPPORTED, INVALID, INCONCLUSIVE], ["--claims-inconclusive=warn"], 0),
        ([REFUTED], ["--claims-inconclusive=warn"], 1),
        ([SUPPORTED, CRASHING, INCONCLUSIVE], [], 1),
        ([EXPLORATORY, SUPPORTED], [], 0),
        ([SUPPORTED, "def test_plain(): assert 0"], [], 1),
        ([SUPPORTED], ["-k", "nothing_of_that_name"], 5),
    ],
)
def test_exit_codes(suite, tests, arguments, code):
    suite.write(*tests)
    assert suite.run(*arguments).ret == code


def test_a_crash_keeps_its_traceback_and_is_marked_in_the_record(suite):
    suite.write(SUPPORTED, CRASHING)
    result = suite.run()
    result.stdout.fnmatch_lines(["*raise RuntimeError*", "E *no such layer"])
    _, records = suite.latest()
    assert records[1]["outcome"] == "crashed" and "no such layer" in records[1]["reason"]


def test_a_claim_test_that_never_decides_fails(suite):
    suite.write("@pytest.mark.claim(ONE)\ndef test_silent(evidence): pass\n")
    result = suite.run()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*H1.one ended without a verdict*"])


def test_a_skipped_claim_is_not_measured_and_not_green(suite):
    suite.write(SUPPORTED, "@pytest.mark.claim(TWO)\ndef test_skip(): pytest.skip('no teacher here')\n")
    assert suite.run().ret == 10
    _, records = suite.latest()
    assert records[1]["verdict"] == "invalid" and records[1]["reason"] == "not measured: no teacher here"


def test_a_swallowed_refutation_still_fails_the_run(suite):
    swallowed = REFUTED.replace("    evidence.decide", "    with pytest.raises(AssertionError):\n        evidence.decide")
    suite.write(SUPPORTED, swallowed)
    assert suite.run().ret == 1


def test_families_are_counted_before_deselection(suite):
    suite.write(SUPPORTED, REFUTED, INVALID, INCONCLUSIVE, EXPLORATORY)
    suite.run("-k", "supported")
    run, records = suite.latest()
    assert [(entry["claim_id"], entry["family_size"]) for entry in records] == [("H1.one", 3)]
    assert not run["partial_families"]
    assert records[0]["p_holm"] == pytest.approx(min(1.0, 3 * records[0]["p_value"]))


def test_exploratory_claims_share_their_own_error_rate(suite):
    suite.write(SUPPORTED, REFUTED, INVALID, EXPLORATORY)
    suite.run()
    _, records = suite.latest()
    assert {(entry["claim_id"], entry["family_size"]) for entry in records} == {("H1.one", 3), ("H1.two", 3), ("H1.look", 1)}


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["serial", "workers"])
def test_a_node_id_does_not_make_its_family_smaller(suite, workers):
    suite.write(SUPPORTED, REFUTED, INVALID, INCONCLUSIVE, EXPLORATORY)
    suite.run("hypotheses/test_claims.py::test_supported", *workers)
    run, records = suite.latest()
    assert not run["partial_families"] and run["complete"]
    assert [(entry["claim_id"], entry["family_size"]) for entry in records] == [("H1.one", 3)]


def test_last_failed_does_not_make_its_family_smaller(suite):
    suite.write(SUPPORTED, REFUTED, INVALID)
    suite.run("-p", "cacheprovider")
    suite.run("-p", "cacheprovider", "--lf")
    _, records = suite.latest()
    assert {entry["verdict"] for entry in records} == {"refuted", "invalid"}
    assert {entry["family_size"] for entry in records} == {3}


def test_node_ids_select_as_pytest_does(suite):
    suite.write(
        """
@pytest.mark.claim(ONE)
@pytest.mark.parametrize("task", ["color", "shape::x"])
def test_supported(evidence, task):
    evidence.decide(ONE, effects(0.5), clusters=clusters())
""",
        SUPPORTED.replace("test_supported", "test_supported_too").replace("ONE", "THREE"),
    )
    path = "hypotheses/test_claims.py"

    def selected(*arguments):
        assert suite.run(*arguments).ret == 0
        _, records = suite.latest()
        return [(entry["claim_id"], entry["params"].get("task")) for entry in records]

    assert selected(f"{path}::test_supported") == [("H1.one", "color"), ("H1.one", "shape::x")]
    assert selected(f"{path}::test_supported[shape::x]") == [("H1.one", "shape::x")]
    assert selected(path, f"{path}::test_supported_too")[-1] == ("H2.three", None)
    missing = suite.run(f"{path}::test_nothing")
    assert missing.ret == 4
    missing.stderr.fnmatch_lines(["*not found: *test_nothing*"])


def test_a_file_outside_the_declared_suite_is_a_partial_run(suite):
    suite.write(SUPPORTED, REFUTED)
    elsewhere = suite.pytester.mkdir("elsewhere")
    (elsewhere / "test_more.py").write_text((suite.pytester.path / "hypotheses" / "test_claims.py").read_text(encoding="utf-8"), encoding="utf-8")
    suite.run("elsewhere/test_more.py::test_supported")
    run, records = suite.latest()
    assert run["partial_families"] and records[0]["family_size"] == 1
    assert "Partial run" in (suite.runs / "latest" / "report.html").read_text(encoding="utf-8")


def test_numpy_values_in_details_and_parameters(suite):
    suite.write(
        """
@pytest.mark.claim(ONE)
@pytest.mark.parametrize("task, scale, thing", [("color", 2, object())])
def test_numpy(evidence, record_property, task, scale, thing):
    record_property("share", np.float64(0.5))
    evidence.decide(ONE, effects(0.5), clusters=clusters(), details={"a": np.int64(3), "b": np.array([1.0, np.nan])})
"""
    )
    assert suite.run().ret == 0
    _, records = suite.latest()
    assert records[0]["details"] == {"a": 3, "b": [1.0, "NaN"]}
    assert records[0]["params"] == {"scale": 2, "task": "color"}


def test_the_command_in_a_record_reproduces_the_claim(suite):
    suite.write(SUPPORTED, REFUTED)
    suite.run("--claims-seed=7")
    _, whole = suite.latest()
    command = whole[0]["reproduce"].split()
    assert command == ["python", "-m", "pytest", "-k", "test_supported", "--claims-seed=7"]
    suite.run(*command[3:])
    _, alone = suite.latest()
    assert {**alone[0], "duration_s": 0} == {**whole[0], "duration_s": 0}


def test_an_instance_decided_twice_and_a_wrong_claim_are_refused(suite):
    suite.write(
        "@pytest.mark.claim(ONE)\ndef test_wrong(evidence): evidence.decide(TWO, effects(0.5), clusters=clusters())\n",
        "def test_unmarked(evidence): evidence.decide(TWO, effects(0.5), clusters=clusters())\n",
        """
@pytest.mark.claim(THREE)
def test_twice(evidence):
    evidence.decide(THREE, effects(0.5), clusters=clusters())
    evidence.decide(THREE, effects(0.5), clusters=clusters())
""",
    )
    result = suite.run()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*marked with H1.one but decides H1.two*", "*one verdict per claim instance*"])
    result.stdout.fnmatch_lines(["*needs @pytest.mark.claim*"])


def test_two_tests_for_one_instance_are_a_usage_error(suite):
    suite.write(SUPPORTED, SUPPORTED.replace("test_supported", "test_again"))
    result = suite.run()
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*H1.one is claimed by*test_supported and by*test_again*"])


def test_tables_of_all_tests_are_joined_sorted_and_free_of_duplicates(suite):
    suite.write(
        """
import pandas as pd
@pytest.mark.claim(ONE)
@pytest.mark.parametrize("layer", [2, 1])
def test_rows(evidence, layer):
    shared = pd.DataFrame({"layer": [0], "value": [np.nan]})
    rows = pd.DataFrame({"layer": [layer], "value": [np.float32(0.5)]})
    evidence.table("head-ablation.csv", pd.concat([rows, shared]))
    evidence.jsonl("outputs.jsonl", rows)
    evidence.artifact_json("taxonomy.json", {f"layer {layer}": ["object"]})
    evidence.document("card.md", "# What is taught")
    evidence.about(subject={"family": "LLaVA"}, data={"baseline": [{"task": "color", "accuracy": 0.9, "blind": 0.3}]})
    evidence.decide(ONE, effects(0.5), clusters=clusters())
"""
    )
    suite.run()
    folder = suite.runs / "latest"
    assert (folder / "head-ablation.csv").read_text() == "layer,value\n0,\n1,0.5\n2,0.5\n"
    assert (folder / "outputs.jsonl").read_text().splitlines() == ['{"layer": 1, "value": 0.5}', '{"layer": 2, "value": 0.5}']
    run, _ = suite.latest()
    assert run["files"] == ["card.md", "head-ablation.csv", "outputs.jsonl", "taxonomy.json"]
    assert (folder / "card.md").read_text() == "# What is taught"
    assert run["subject"]["family"] == "LLaVA"
    assert (folder / "taxonomy.json").read_text().count("object") == 2


def test_tests_that_disagree_about_the_subject_make_the_run_incomplete(suite):
    suite.write(
        """
@pytest.mark.claim(ONE)
@pytest.mark.parametrize("seed", [1, 2])
def test_about(evidence, seed):
    evidence.about(subject={"weights": f"sha256:{seed}"})
    evidence.decide(ONE, effects(0.5), clusters=clusters())
"""
    )
    suite.run()
    assert suite.folders[0].name.endswith("-incomplete")
    run, _ = suite.read(suite.folders[0])
    assert run["problems"] == ["tests disagree about the subject's weights"]


def test_tests_without_claims_leave_nothing(suite):
    suite.write("def test_plain(evidence): assert effects(0.5).sum() == 50\n")
    result = suite.run()
    assert result.ret == 0 and not suite.runs.exists()
    assert "= claims =" not in result.stdout.str() and "report" not in result.stdout.str()


def test_a_figure_is_drawn_once_in_the_test_that_made_it(suite, monkeypatch):
    drawn, draw = [], figures.draw
    monkeypatch.setattr(figures, "draw", lambda kind, data: drawn.append(kind) or draw(kind, data))
    suite.write("""
@pytest.mark.claim(ONE)
def test_figure(evidence):
    evidence.figure("null_histogram", {"draws": [0.1, 1 / 3], "observed": 0.2}, title="Draws", caption="All of them.", alt="two draws")
    evidence.decide(ONE, effects(0.5), clusters=clusters())
""")
    suite.run("-q")
    assert drawn == ["null_histogram"]
    assert 'aria-label="two draws"' in (suite.runs / "latest" / "report.html").read_text(encoding="utf-8")


def test_a_figure_that_cannot_be_drawn_fails_the_test_that_made_it(suite):
    suite.write(
        """
@pytest.mark.claim(ONE)
@pytest.mark.parametrize("bars", ["fine", "broken"])
def test_figure(evidence, bars):
    rows = [{"label": "intact", "value": np.float32(0.9)}] if bars == "fine" else [{"label": "intact"}]
    evidence.figure("accuracy_bars", rows, title="Bars", caption="All of them.", alt="one bar")
    evidence.decide(ONE, effects(0.5), clusters=clusters())
"""
    )
    result = suite.run()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*figure 'accuracy_bars' needs 'value' in each of its bars*"])
    _, records = suite.latest()
    assert [entry["outcome"] for entry in records] == ["decided", "crashed"]
    assert records[0]["figures"][0]["data"]["bars"][0]["label"] == "intact"
    assert 'aria-label="one bar"' in (suite.runs / "latest" / "report.html").read_text(encoding="utf-8")
