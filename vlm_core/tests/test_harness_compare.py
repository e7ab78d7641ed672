"""Two runs side by side, and a run that is asked again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from vlm_core import load_vlm
from vlm_core.harness import EvaluationConfig, compare, repeat, repeating, run_evaluation, running
from vlm_core.harness.command import main
from vlm_core.harness.run_folder import RunFolder
from vlm_core.stats import interval
from vlm_core.tests import warm
from vlm_core.tests.distill_students import save_student

MAKE = "vlm_core.tests.tiny:make_items"
WINDOW = 24


@pytest.fixture(autouse=True, scope="module")
def windows():
    """Few items are answered together, so that few are several windows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "WINDOW", WINDOW)
        patched.setattr(repeating, "WINDOW", WINDOW)
        yield


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, windows):
    """Two subjects' answers, and where their checkpoints are."""
    folder = tmp_path_factory.mktemp("evaluated")
    models = [str(save_student(folder / name, seed=seed)) for name, seed in (("one", 0), ("other", 1))]
    sets = {"patches": {"factory": MAKE, "arguments": {"n": WINDOW + 6}}}
    content = {"out": str(folder / "out"), "subjects": [{"path": path} for path in models], "sets": sets, "mode": "both", "logits": True}
    return run_evaluation(EvaluationConfig.from_dict({**content, "max_new_tokens": 3}))


@pytest.fixture
def out(evaluated, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(evaluated, tmp_path / "out")


def changed(file, change):
    """The answers with some of them others; None drops a line."""
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


# -- compare ----------------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_item_and_clustered(evaluated):
    found = compare(evaluated / "one", evaluated / "other")
    a, b = (RunFolder(evaluated / name / "patches").finished_answers() for name in ("one", "other"))
    assert found.table["task"].tolist() == ["color", "shape", "all"] * 2 and found.notes == ()
    for row in found.table.itertuples():
        one, other = (part[(part["mode"] == row.mode) & ((part["task"] == row.task) | (row.task == "all"))].set_index("item") for part in (a, b))
        difference = (other["score"] - one["score"]).astype(float)
        expected = interval(difference.to_numpy(), one["cluster"].to_numpy(), bounds=(-1.0, 1.0))
        assert (row.difference, row.lower, row.upper) == pytest.approx((expected.estimate, expected.lower, expected.upper))
        assert row.difference == pytest.approx(row.b - row.a) and (row.a, row.b) == pytest.approx((one["score"].mean(), other["score"].mean()))
        assert (row.gained, row.lost) == ((difference > 0).sum(), (difference < 0).sum())
        assert (row.n, row.clusters, row.only_a, row.only_b) == (len(one), one["cluster"].nunique(), 0, 0)
    assert found.table["gained"].sum() + found.table["lost"].sum() > 0, "the two are not the same subject"
    moved = found.moved[found.moved["mode"] == "candidates"]
    whole = found.table[(found.table["mode"] == "candidates") & (found.table["task"] == "all")].iloc[0]
    assert len(moved) == whole["gained"] + whole["lost"] and (moved["score_a"] != moved["score_b"]).all()


def test_a_run_and_itself_do_not_differ(evaluated):
    table = compare(evaluated / "one", evaluated / "one").table
    assert (table["difference"] == 0).all() and not table[["gained", "lost"]].to_numpy().any()


def test_items_that_only_one_answered_are_counted(out):
    gone = {"a": {"item-0", "item-1", "item-2"}, "b": {"item-5"}}
    for name, subject in (("a", "one"), ("b", "other")):
        changed(out / subject / "patches" / "answers.jsonl", lambda row, name=name: None if row["item"] in gone[name] else row)
    table = compare(out / "one", out / "other").table.set_index(["mode", "task"])
    assert table.loc[("greedy", "all"), ["n", "only_a", "only_b"]].tolist() == [WINDOW + 2, 1, 3]
    assert table.loc[("greedy", "color"), ["only_a", "only_b"]].tolist() == [0, 2]


@pytest.mark.parametrize("field", ["prompt", "image", "answer", "references", "candidates", "scorer"])
def test_what_was_not_asked_or_scored_alike_is_refused(field, out, capsys):
    value = ["red"] if field in ("references", "candidates") else "something else"
    changed(out / "other" / "patches" / "answers.jsonl", lambda row: {**row, field: value} if row["item"] == "item-3" else row)
    assert main(["compare", str(out / "one"), str(out / "other")]) == 2
    said = capsys.readouterr().err
    assert f"1 of {WINDOW + 6} items have another {field} in" in said and "(the first is 'item-3')" in said and len(said.splitlines()) == 1


def test_other_settings_are_said(out):
    file = out / "other" / "patches" / "run.json"
    about = json.loads(file.read_text())
    about["asked"]["max_new_tokens"], about["versions"]["torch"] = 9, "0.1"
    file.write_text(json.dumps(about))
    shutil.copytree(out / "other" / "patches", out / "other" / "more")
    notes = compare(out / "one", out / "other").notes
    assert any("asked max_new_tokens 3 in a, 9 in b" in note for note in notes) and any("versions torch" in note for note in notes)
    assert any("the set more is only in" in note for note in notes)


def test_the_module_is_the_command(evaluated):
    found = warm.run(["-m", "vlm_core.evaluate", "compare", evaluated / "one", evaluated / "none"])
    assert found.returncode == 2 and found.stderr.startswith("python -m vlm_core.evaluate: ") and "check the path" in found.stderr
    assert warm.run(["-m", "vlm_core.evaluate", "compare", evaluated / "one", evaluated / "other"]).returncode == 0


def test_the_command_compares_and_writes(evaluated, tmp_path, capsys):
    assert main(["compare", str(evaluated / "one" / "patches"), str(evaluated / "other" / "patches"), "--out", str(tmp_path / "c")]) == 0
    said = capsys.readouterr().out
    assert "b - a [95 %]" in said and "gained" in said
    expected = compare(evaluated / "one", evaluated / "other")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "c" / "comparison.csv"), expected.table)
    assert len(pd.read_csv(tmp_path / "c" / "moved.csv")) == len(expected.moved)


def test_what_is_no_run_to_compare_is_one_sentence(out, tmp_path, capsys):
    for a, message in (
        (tmp_path / "none", "is neither a run nor a subject's folder of runs: check the path"),
        (out, "it holds the subjects one, other: name one"),
    ):
        assert main(["compare", str(a), str(out / "one")]) == 2
        assert message in capsys.readouterr().err
    (out / "one" / "patches" / "metrics.csv").unlink()
    with pytest.raises(ValueError, match="holds no finished run"):
        compare(out / "one", out / "other")
    shutil.copytree(out / "other" / "patches", out / "third" / "else")
    with pytest.raises(ValueError, match="no set in common"):
        compare(out / "other", out / "third")


def test_runs_without_a_common_mode_or_item_are_refused(out):
    copied = shutil.copytree(out / "other", out / "third")
    changed(copied / "patches" / "answers.jsonl", lambda row: row if row["mode"] == "greedy" else None)
    changed(out / "one" / "patches" / "answers.jsonl", lambda row: row if row["mode"] == "candidates" else None)
    with pytest.raises(ValueError, match="was answered by candidates and .* by greedy"):
        compare(out / "one", out / "third")
    changed(out / "one" / "patches" / "answers.jsonl", lambda row: {**row, "item": f"other-{row['item']}"})
    with pytest.raises(ValueError, match="no item in common"):
        compare(out / "one", out / "other")


# -- repeat -----------------------------------------------------------------------------------------------------------


def test_a_run_is_reproduced_to_the_last_bit(evaluated, capsys):
    assert main(["repeat", str(evaluated / "one")]) == 0
    said = capsys.readouterr().out
    n = 2 * (WINDOW + 6)
    assert f"{n} of {n} answers are the same, numbers differ by at most 0 (tolerance 0.001): the run is reproduced" in said


def noisy(monkeypatch, scale):
    def load(*args, **options):
        subject = load_vlm(*args, **options)
        with torch.no_grad():
            subject.anatomy.head.weight.mul_(scale)
        return subject

    monkeypatch.setattr(repeating, "load_vlm", load)


def test_a_part_is_repeated_in_other_batches(evaluated, monkeypatch):
    sizes, answer = [], repeating.answer
    monkeypatch.setattr(repeating, "answer", lambda subject, items, *args, **how: sizes.append((len(items), how["batch_rows"])) or answer(subject, items, *args, **how))
    found = repeat(evaluated / "one", items=5, batch_rows=3)
    assert sizes == [(WINDOW, 3)] and found.table["items"].tolist() == [WINDOW, WINDOW], "whole windows"
    assert found.agrees and found.table["largest"].max() <= repeating.TOLERANCES["float32"]
    file = evaluated / "one" / "patches" / "run.json"
    about = json.loads(file.read_text())
    about["asked"]["batch_rows"] = 7
    monkeypatch.setattr(repeating.RunFolder, "about", lambda folder: about)
    repeat(evaluated / "one", items=5)
    assert sizes[-1] == (WINDOW, 7), "as it was asked then"
    monkeypatch.undo()
    noisy(monkeypatch, 1 + 1e-6)
    strict = repeat(evaluated / "one", items=5, tolerance=1e-12)
    assert not strict.agrees and "(tolerance 1e-12): the run is not reproduced" in str(strict)


@pytest.mark.parametrize(("scale", "status"), [(1.2, 1), (1 + 1e-6, 0)])
def test_other_numbers_are_noticed_beyond_the_tolerance(scale, status, evaluated, monkeypatch, capsys):
    noisy(monkeypatch, scale)
    assert main(["repeat", str(evaluated / "one" / "patches")]) == status
    said = capsys.readouterr().out
    assert ("the run is not reproduced: patches, item 'item-" in said) == bool(status) and "tolerance 0.001" in said


@pytest.mark.parametrize("field", ["output", "tokens", "logits"])
def test_every_part_of_an_answer_is_held_against_it(field, out):
    def other(row):
        if field not in row or row["item"] != "item-3":
            return row
        value = {"output": "something else", "tokens": 7, "logits": {name: one + 0.01 for name, one in row.get("logits", {}).items()}}[field]
        return {**row, field: value}

    changed(out / "one" / "patches" / "answers.jsonl", other)
    found = repeat(out / "one")
    assert not found.agrees and "item 'item-3'" in found.first
    assert (found.table["largest"].max() == pytest.approx(0.01, abs=1e-6)) == (field == "logits")
    assert (found.table["same"].sum() < found.table["items"].sum()) == (field != "logits")


def test_numbers_that_are_missing_lie_apart():
    assert repeating._apart(None, None) == repeating._apart(float("nan"), None) == 0.0
    assert repeating._apart(None, 1.0) == repeating._apart(1.0, None) == float("inf")
    assert repeating._apart({"a": 1.0, "b": None}, {"a": 1.5, "b": None}) == 0.5
    assert np.isinf(repeating._apart({"a": 1.0}, {"a": 1.0, "b": 2.0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, folder: about["subject"].update(weights="x"), "its weights or settings are others"),
        (lambda about, folder: about["data"]["source"]["arguments"].update(seed=3), "what the set gives has changed"),
        (lambda about, folder: about["subject"].update(path=str(folder / "gone")), "was not found"),
    ],
)
def test_what_cannot_be_repeated_is_one_sentence(change, message, out, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = out / "one" / "patches" / "run.json"
    about = json.loads(file.read_text())
    change(about, tmp_path)
    file.write_text(json.dumps(about))
    assert main(["repeat", str(out / "one")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and len(said) == 1


def test_versions_that_are_not_those_of_the_run_are_said(out):
    file = out / "one" / "patches" / "run.json"
    about = json.loads(file.read_text())
    about["versions"]["torch"] = "0.1"
    file.write_text(json.dumps(about))
    found = repeat(out / "one", items=1)
    assert found.agrees and found.notes == (f"patches: versions torch 0.1 there, {torch.__version__} now",)


@pytest.mark.parametrize("options", [["--items", "0"], ["--tolerance", "x"], ["--batch-rows", "-1"]])
def test_numbers_that_cannot_be_meant(options, evaluated, capsys):
    with pytest.raises(SystemExit):
        main(["repeat", str(evaluated / "one"), *options])
    assert "above 0 value" in capsys.readouterr().err
