"""``python -m vlm_core.evaluate``: what comes out, what is refused, and a run that is killed."""

from __future__ import annotations

import importlib
import json
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import vlm_core
from vlm_core import SubjectError, evaluate, load_vlm
from vlm_core.harness import EvaluationConfig, answering, run_evaluation, running
from vlm_core.harness.asked import AskedSet
from vlm_core.harness.command import main
from vlm_core.harness.config import ItemSet
from vlm_core.harness.run_folder import RunFolder
from vlm_core.harness.tables import metrics_table
from vlm_core.identity import picture_digest
from vlm_core.sampling import sample_answers
from vlm_core.scoring import SCORERS, Scorer
from vlm_core.stats import interval
from vlm_core.sweeps.features import vision_tower
from vlm_core.tests import warm
from vlm_core.tests.distill_students import save_student
from vlm_core.tests.tiny import make_items

MAKE = "vlm_core.tests.tiny:make_items"
OPEN = f"{__name__}:open_ended"
WINDOW = 8
SIZE = 2 * WINDOW + 5
SECRET = "hf_thisTokenMustNotBeSeen"


def open_ended(n, references=False):
    """Items without candidates, some with several accepted answers."""
    items = [{name: value for name, value in item.items() if name != "candidates"} for item in make_items(n)]
    return [{**item, "references": ["red", item["answer"]], "scorer": "exact"} for item in items] if references else items


@pytest.fixture(autouse=True, scope="module")
def windows():
    """Few items are answered together, so that few are several windows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "WINDOW", WINDOW)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two subjects on disk."""
    folder = tmp_path_factory.mktemp("models")
    return [str(save_student(folder / name, seed=seed)) for name, seed in (("one", 0), ("other", 1))]


@pytest.fixture
def declared(models, tmp_path):
    """``declared(**changes)``: a declaration of tiny sizes, its output in this test's folder."""

    def declare(**changes):
        return {
            "out": str(tmp_path / "out"),
            "subjects": [{"path": models[0]}],
            "sets": {"patches": {"factory": MAKE, "arguments": {"n": 8}}},
            "mode": "both",
            "max_new_tokens": 3,
            **changes,
        }

    return declare


def ran(content):
    return run_evaluation(EvaluationConfig.from_dict(content))


def written(content, tmp_path, name="evaluation.yaml"):
    (tmp_path / name).write_text(yaml.safe_dump(content))
    return str(tmp_path / name)


def lines(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


# -- the name ---------------------------------------------------------------------------------------------------------


def test_the_command_does_not_hide_the_function(monkeypatch):
    function = importlib.import_module("vlm_core.evaluation").evaluate
    monkeypatch.delitem(sys.modules, "vlm_core.evaluate", raising=False)
    monkeypatch.delitem(vlm_core.__dict__, "evaluate", raising=False)
    assert vlm_core.evaluate is function, "before"
    importlib.import_module("vlm_core.evaluate")
    assert vlm_core.evaluate is function, "after its module was imported by name"
    names: dict = {}
    exec("import vlm_core.evaluate\nfrom vlm_core import evaluate", names)  # noqa: S102
    assert names["evaluate"] is function and names["vlm_core"].evaluate is function


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_library(declared, models, tmp_path):
    out = ran(declared(subjects=[{"path": path} for path in models], logits=True))
    items = make_items(8)
    for path, name in zip(models, ("one", "other"), strict=True):
        subject = load_vlm(path)
        chosen, greedy = evaluate(subject, items, logits=True), evaluate(subject, items, mode="greedy", max_new_tokens=3)
        rows = lines(out / name / "patches")
        assert [(row["item"], row["mode"]) for row in rows] == [(item["id"], mode) for item in items for mode in ("candidates", "greedy")]
        for number, item in enumerate(items):
            first, second = rows[2 * number : 2 * number + 2]
            for row in (first, second):
                assert (row["cluster"], row["task"], row["prompt"], row["answer"]) == tuple(
                    item[field] for field in ("scene_id", "task", "prompt", "answer")
                )
                assert row["image"] == picture_digest(item["image"]) and row["scorer"] == "exact"
            assert first["output"] == chosen["output"][number] and first["score"] == float(chosen["correct"][number])
            assert first["margin"] == pytest.approx(chosen["score"][number]) and first["logits"] == pytest.approx(chosen["logits"][number])
            assert second["output"] == greedy["output"][number] and second["score"] == float(greedy["correct"][number])
            batch = subject.encode_items([item])
            tokens = subject.model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)[0, batch.image.shape[1] :].tolist()
            ended = tokens[-1] == subject.model.generation_config.eos_token_id
            assert second["tokens"] == len(tokens) and second["cut_off"] is not ended
        assert {row["cut_off"] for row in rows[1::2]} >= {True}
    about = json.loads((out / "one" / "patches" / "run.json").read_text())
    assert about["subject"]["path"] == models[0] and about["data"]["items"] == 8 and about["versions"]["torch"] == torch.__version__
    summary = pd.read_csv(out / "summary.csv")
    assert summary["data"].nunique() == 1 and summary.query("task == 'all' and mode == 'greedy'")["subject"].tolist() == ["one", "other"]


def test_tokens_are_counted_up_to_the_end(subject):
    ends = subject.model.generation_config.eos_token_id
    said = torch.tensor([[7, ends, 0, 0], [7, 8, 9, 7], [ends, 0, 0, 0]])
    from vlm_core.evaluation import _lengths

    assert _lengths(subject, said) == [(2, True), (4, False), (1, True)]


def test_what_a_checkpoint_asks_to_be_made_of_its_logits_is_left_away(subject, items, monkeypatch):
    plain = answering.generated(subject, items[:4], max_new_tokens=6), sample_answers(subject, items[:2], 2, max_new_tokens=6)
    for name, value in {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "min_new_tokens": 5, "suppress_tokens": [3, 4, 5, 6]}.items():
        monkeypatch.setattr(subject.model.generation_config, name, value)
    assert plain == (answering.generated(subject, items[:4], max_new_tokens=6), sample_answers(subject, items[:2], 2, max_new_tokens=6))


def test_answers_that_are_cut_off_are_counted(declared, monkeypatch):
    said = [vlm_core.evaluation.Generated("red", 2, 9), *[vlm_core.evaluation.Generated("it is a", 3, 9, True)] * 3]
    monkeypatch.setattr(answering, "generated", lambda subject, items, **options: said)
    told = []
    content = declared(sets={"patches": {"factory": MAKE, "arguments": {"n": 4}}})
    out = run_evaluation(EvaluationConfig.from_dict(content), say=told.append)
    assert [row.get("cut_off") for row in lines(out / "one" / "patches")] == [None, False, None, True, None, True, None, True]
    metrics = pd.read_csv(out / "one" / "patches" / "metrics.csv").query("task == 'all'").set_index("mode")
    assert metrics.loc["greedy", "cut_off"] == 0.75 and np.isnan(metrics.loc["candidates", "cut_off"])
    assert "one: 3 of 4 generated answers to patches had not ended after 3 tokens (max_new_tokens)" in told


def test_metrics_are_mean_scores_with_clustered_intervals(declared):
    out = ran(declared(sets={"patches": {"factory": MAKE, "arguments": {"n": 30}}}))
    metrics = pd.read_csv(out / "one" / "patches" / "metrics.csv")
    assert metrics.columns.tolist() == ["set", "task", "mode", "n", "clusters", "score", "lower", "upper", "cut_off"]
    answers = RunFolder(out / "one" / "patches").finished_answers()
    for row in metrics.itertuples():
        part = answers[(answers["mode"] == row.mode) & ((row.task == "all") | (answers["task"] == row.task))]
        found = interval(part["score"].to_numpy(float), part["cluster"].to_numpy(), bounds=(0.0, 1.0))
        assert (row.n, row.clusters) == (len(part), part["cluster"].nunique())
        assert (row.score, row.lower, row.upper) == pytest.approx((part["score"].mean(), found.lower, found.upper))
    assert metrics["n"].tolist() == [15, 15, 30] * 2


def test_what_scorers_sum_up_stands_beside_the_mean(monkeypatch):
    counting = Scorer("counting", "here", lambda output, item: 0.25, lambda table: {"yes_ratio": float((table["output"] == "yes").mean())})
    monkeypatch.setattr("vlm_core.harness.tables.SCORERS", {**SCORERS, "counting": counting})
    rows = [("a", "counting", "yes", 0.25), ("a", "counting", "no", 0.5), ("b", "exact", "yes", 1.0), ("b", "exact", "x", 0.0)]
    answers = pd.DataFrame(
        [
            {"item": str(n), "cluster": str(n), "task": task, "mode": "greedy", "scorer": scorer, "output": said, "score": score}
            for n, (task, scorer, said, score) in enumerate(rows)
        ]
    )
    table = metrics_table(answers, "set").set_index("task")
    assert table.loc["a", "yes_ratio"] == 0.5 and table.loc["a", "score"] == 0.375
    assert np.isnan(table.loc["b", "yes_ratio"]) and np.isnan(table.loc["all", "yes_ratio"]), "of one scorer only"


def test_generated_answers_are_scored_by_the_items_scorer(declared, monkeypatch):
    sets = {"open": {"factory": OPEN, "arguments": {"n": 4, "references": True}, "mode": "greedy"}}
    monkeypatch.setattr(answering, "score_answer", lambda output, item: 0.25 if item["references"] else 1.0)
    rows = lines(ran(declared(sets=sets)) / "one" / "open")
    assert [row["score"] for row in rows] == [0.25] * 4 and [row["mode"] for row in rows] == ["greedy"] * 4
    assert all(row["references"] == ["red", row["answer"]] for row in rows)


def test_a_set_may_name_the_scorer(declared, monkeypatch):
    colour = make_items(1)[0]["answer"]
    said = [vlm_core.evaluation.Generated(f"it is {colour} .", 4, 9)] * 4
    monkeypatch.setattr(answering, "generated", lambda subject, items, **options: said[: len(items)])
    sets = {"as it is": {}, "spoken": {"scorer": "spoken"}}
    sets = {name.replace(" ", "-"): {"factory": MAKE, "arguments": {"n": 4}, "mode": "greedy", **more} for name, more in sets.items()}
    out = ran(declared(sets=sets))
    right = [float(item["answer"] == colour) for item in make_items(4)]
    assert [row["score"] for row in lines(out / "one" / "spoken")] == right and 1.0 in right
    assert [row["score"] for row in lines(out / "one" / "as-it-is")] == [0.0] * 4
    assert {row["scorer"] for row in lines(out / "one" / "spoken")} == {"spoken"}


def test_accepted_answers_count(declared, monkeypatch):
    said = iter(["red", "Red.", "blue or so", "yellow"])
    monkeypatch.setattr(answering, "generated", lambda subject, items, **options: [vlm_core.evaluation.Generated(next(said), 1, 9) for _ in items])
    sets = {"open": {"factory": OPEN, "arguments": {"n": 4, "references": True}}}
    rows = lines(ran(declared(sets=sets, mode="greedy")) / "one" / "open")
    assert [row["score"] for row in rows[:3]] == [1.0, 1.0, 0.0]


def test_the_command_answers_from_options_alone(models, tmp_path, capsys):
    out = tmp_path / "out"
    made = f'patches = {{ factory = "{MAKE}", arguments = {{ n = 4 }} }}'
    assert main(["--subject", models[0], "--device", "cpu", "--set", made, "--out", str(out), "--mode", "greedy", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert "patches" in said.out and "summary.csv" in said.out and "4 of 4 items of patches" in said.err
    assert len(lines(out / "one" / "patches")) == 4


def test_options_go_before_the_file(declared, models, tmp_path):
    config = written(declared(), tmp_path)
    assert main(["--config", config, "--subject", models[1], "--mode", "greedy"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["other"]
    assert {row["mode"] for row in lines(tmp_path / "out" / "other" / "patches")} == {"greedy"}


# -- again ------------------------------------------------------------------------------------------------------------


def files(folder):
    """Everything that comes out but the logs."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.suffix in (".jsonl", ".json", ".csv")}


KILLED = f"""
import os, signal, sys
import torch
torch.set_num_threads(1)
from vlm_core.harness import running
from vlm_core.harness.command import main
running.WINDOW = {WINDOW}
answer, calls = running.answer, []
def dying(*args, **options):
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(*args, **options)
running.answer = dying
main(sys.argv[1:])
"""


@pytest.mark.parametrize("torn", [b"", b'{"item": "item-8", "mo', None], ids=["between windows", "within a line", "within a window"])
def test_a_killed_run_goes_on_to_the_files_of_an_undisturbed_one(torn, declared, tmp_path, monkeypatch):
    sets = {"patches": {"factory": MAKE, "arguments": {"n": SIZE}}}
    config = written(declared(sets=sets), tmp_path)
    whole = tmp_path / "whole"
    assert main(["--config", config, "--out", str(whole)]) == 0
    if torn == b"":
        killed = warm.run(["-c", KILLED, "--config", config])
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    else:
        # What a kill within the writing of the second window leaves: a part of a line, or some of its lines.
        folder = tmp_path / "out" / "one" / "patches"
        folder.mkdir(parents=True)
        (folder / "run.json").write_bytes((whole / "one" / "patches" / "run.json").read_bytes())
        answered = (whole / "one" / "patches" / "answers.jsonl").read_bytes().splitlines(keepends=True)
        kept = 2 * WINDOW if torn is not None else 2 * WINDOW + 7
        (folder / "answers.jsonl").write_bytes(b"".join(answered[:kept]) + (torn or answered[kept][:20]))
    asked, answer = [], running.answer
    monkeypatch.setattr(running, "answer", lambda subject, items, *args, **how: asked.append(len(items)) or answer(subject, items, *args, **how))
    assert main(["--config", config]) == 0
    assert asked == [WINDOW, SIZE - 2 * WINDOW], "what was answered before the kill is not asked again"
    assert files(tmp_path / "out") == files(whole)
    monkeypatch.setattr(running, "load_vlm", lambda *args, **options: pytest.fail("loaded without need"))
    assert main(["--config", config]) == 0 and files(tmp_path / "out") == files(whole), "a finished run is found"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 4}, "asked max_new_tokens 3 there, 4 now"),
        ({"mode": "greedy"}, "asked modes candidates, greedy there, greedy now"),
        ({"seed": 1}, "asked seed 0 there, 1 now"),
        ({"subjects": [{"path": "OTHER", "name": "one"}]}, "subject weights"),
        ({"subjects": [{"path": "ONE", "name": "one", "dtype": "bfloat16"}]}, "subject dtype auto there, bfloat16 now"),
        ({"sets": {"patches": {"factory": MAKE, "arguments": {"n": 8, "seed": 1}}}}, "holds answers to other items than sets.patches has now"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(changes, words, declared, models, tmp_path, capsys):
    out = ran(declared())
    before = files(out)
    capsys.readouterr()
    changed = json.loads(json.dumps(changes).replace("OTHER", models[1]).replace("ONE", models[0]))
    assert main(["--config", written(declared(**changed), tmp_path)]) == 3
    said = capsys.readouterr().err
    assert words in said and "evaluate into a new folder (out)" in said and len(said.splitlines()) == 1
    assert files(out) == before


def test_folders_are_looked_at_before_anybody_answers(declared, models):
    out = ran(declared())
    with pytest.raises(ValueError, match="holds answers of another run"):
        ran(declared(subjects=[{"path": path} for path in reversed(models)], max_new_tokens=4))
    assert not (out / "other").exists()


def test_other_code_is_another_run(declared, monkeypatch):
    ran(declared())
    monkeypatch.setattr(running, "versions", lambda: {"torch": "0.1"})
    with pytest.raises(ValueError, match="versions torch .* there, 0.1 now"):
        ran(declared())


def test_subjects_that_join_later_answer_the_same(declared, models):
    out = ran(declared())
    ran(declared(subjects=[{"path": models[1]}]))
    assert set(pd.read_csv(out / "summary.csv")["subject"]) == {"one", "other"}
    with pytest.raises(ValueError, match="all subjects in a folder answer the same"):
        ran(declared(subjects=[{"path": models[1], "name": "third"}], sets={"patches": {"factory": MAKE, "arguments": {"n": 7}}}))
    assert not (out / "third").exists()


def test_subjects_that_join_later_are_asked_alike(declared, models):
    out = ran(declared())
    for changes, words in (({"max_new_tokens": 9}, "holds answers by max_new_tokens = 3, not 9"), ({"seed": 2}, "by seed = 0, not 2")):
        with pytest.raises(ValueError, match=words):
            ran(declared(subjects=[{"path": models[1]}], **changes))
    assert not (out / "other").exists()
    ran(declared(subjects=[{"path": models[1]}], mode="candidates", max_new_tokens=9))


def test_a_run_without_answers_holds_up_nobody(declared, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "answer", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ran(declared())
    monkeypatch.undo()
    assert (tmp_path / "out" / "one" / "patches" / "run.json").is_file()
    out = ran(declared(sets={"patches": {"factory": MAKE, "arguments": {"n": 4}}}, max_new_tokens=2))
    assert len(lines(out / "one" / "patches")) == 8


def test_a_run_whose_answers_are_gone_is_not_finished(declared, monkeypatch):
    folder = ran(declared()) / "one" / "patches"
    (folder / "answers.jsonl").write_text("")
    monkeypatch.setattr(running, "answer", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ran(declared())
    with pytest.raises(ValueError, match="holds no finished run"):
        RunFolder(folder).finished_answers()


def test_a_damaged_file_of_answers_is_refused(declared):
    out = ran(declared())
    file = out / "one" / "patches" / "answers.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    for text, words in (
        ("".join([whole[0], "{\n", *whole[2:]]), "line 2 of .* is damaged"),
        ("".join([whole[1], whole[0], *whole[2:]]), "line 1 of .* is not the answer to 'item-0' by candidates"),
        ("".join([*whole, whole[0]]), "has 17 lines where 16 are due"),
        ("".join(["3\n", *whole[1:]]), "line 1 of .* is no answer"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            ran(declared())
        assert file.read_text() == text


def test_two_processes_do_not_write_into_one_folder(declared, tmp_path):
    from filelock import FileLock

    (tmp_path / "out" / "one").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "one" / ".lock"), pytest.raises(ValueError, match="another process writes into"):
        ran(declared())


# -- memory -----------------------------------------------------------------------------------------------------------


class OutOfMemory:
    """Raises what a full device raises while more than ``most`` rows enter the language model, or its vision tower."""

    def __init__(self, monkeypatch, most, tower=False):
        self.sizes = []
        load = running.load_vlm

        def loaded(*args, **options):
            subject = load(*args, **options)
            entered = vision_tower(subject) if tower else subject.anatomy.layers[0]
            entered.register_forward_pre_hook(self.count, with_kwargs=True)
            return subject

        self.most = most
        monkeypatch.setattr(running, "load_vlm", loaded)

    def count(self, module, args, kwargs):
        self.sizes.append((args[0] if args else kwargs["pixel_values"]).shape[0])
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("simulated")


SAME = 1e-4
"""Of log-probabilities in float32, whatever else is in the batch."""


@pytest.mark.parametrize("how", ["out of memory", "out of memory for pictures", "measured", "asked for"])
def test_answers_do_not_depend_on_the_batch(how, declared, tmp_path, monkeypatch):
    sets = {"patches": {"factory": MAKE, "arguments": {"n": 20}}}
    whole = lines(ran(declared(sets=sets, logits=True)) / "one" / "patches")
    memory = OutOfMemory(monkeypatch, 3 if "out of memory" in how else 1000, tower="pictures" in how)
    if how == "measured":
        monkeypatch.setattr("vlm_core.sweeps.budget.free_bytes", lambda device: 1)  # 192 tokens are the least that is tried
    rows = {"batch_rows": 2} if how == "asked for" else {}
    out = ran(declared(sets=sets, logits=True, out=str(tmp_path / "again"), **rows))
    assert json.loads((out / "one" / "patches" / "run.json").read_text())["asked"]["batch_rows"] == rows.get("batch_rows")
    again = lines(out / "one" / "patches")
    assert [(row["item"], row["mode"]) for row in again] == [(row["item"], row["mode"]) for row in whole], "none lost, none twice"
    for one, other in zip(whole, again, strict=True):
        assert (one["output"], one["score"], one.get("tokens")) == (other["output"], other["score"], other.get("tokens"))
        assert one.get("logits", {}) == pytest.approx(other.get("logits", {}), abs=SAME)
    if "out of memory" in how:
        assert max(memory.sizes) > 3 and {1, 2, 3} & set(memory.sizes)
    else:
        assert max(memory.sizes) <= {"asked for": 2, "measured": 9}[how]


def test_an_item_that_does_not_fit_alone_is_one_sentence(declared, tmp_path, monkeypatch, capsys):
    OutOfMemory(monkeypatch, 0)
    assert main(["--config", written(declared(mode="greedy"), tmp_path)]) == 2
    assert "a single row does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out" / "one" / "patches" / "metrics.csv").exists()


# -- determinism ------------------------------------------------------------------------------------------------------


DRAWN = {"torch": lambda: torch.rand(1).item(), "numpy": np.random.random, "python": random.random}


@pytest.mark.parametrize("generator", DRAWN)
def test_what_is_drawn_follows_from_the_seed(generator, subject, items):
    asked = AskedSet.read("patches", ItemSet(factory=MAKE, arguments={"n": 4}), ("candidates",))
    strict, draw = [], DRAWN[generator]

    def noise(module, args, output):
        strict.append(torch.are_deterministic_algorithms_enabled())
        return output * (1 + draw())

    def answered(seed):
        before = draw()
        rows = answering.answer(subject, items[:4], asked.facts, ("candidates",), seed=seed)
        return before, rows, draw()

    handle = subject.anatomy.embedding.register_forward_hook(noise)
    try:
        found = [answered(seed) for seed in (0, 0, 1)]
    finally:
        handle.remove()
    (_, first, _), (_, second, _), (_, other, _) = found
    assert first == second != other
    assert len({number for before, _, after in found for number in (before, after)}) == 6, "what others draw goes on"
    assert all(strict) and strict and not torch.are_deterministic_algorithms_enabled()


def test_numbers_that_are_not_finite_are_one_sentence(declared, monkeypatch, tmp_path, capsys):
    load = running.load_vlm

    def broken(*args, **options):
        subject = load(*args, **options)
        with torch.no_grad():
            subject.anatomy.head.weight.fill_(torch.nan)
        return subject

    monkeypatch.setattr(running, "load_vlm", broken)
    assert main(["--config", written(declared(mode="candidates"), tmp_path)]) == 2
    assert "gives numbers that are not finite for item 'item-0'" in capsys.readouterr().err


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subjects": []}, "subjects is empty"),
        ({"sets": {}}, "sets is empty"),
        ({"mode": "loud"}, "mode must be one of candidates, greedy, both, got 'loud'"),
        ({"modus": "greedy"}, "there is no setting 'modus'"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"seed": -1}, "seed"),
        ({"mode": "greedy", "logits": True}, "logits are those of candidates"),
        ({"subjects": [{"path": "a/x"}, {"path": "b/x"}]}, "subjects[1]: the name 'x' is taken"),
        ({"subjects": [{"path": "a", "name": "../b"}]}, "'../b' cannot name a subject"),
        ({"sets": {"a/b": {"path": "c"}}}, "'a/b' cannot name a set"),
        ({"sets": {"a": {"path": "c", "factory": "d:e"}}}, "sets.a: items come from factory"),
        ({"subjects": [{"path": "no/such"}]}, "subject 'no/such' was not found"),
        ({"sets": {"a": {"factory": "no_such_module:load"}}}, "sets.a: factory is 'no_such_module:load', which cannot be imported"),
        ({"sets": {"a": {"factory": MAKE, "arguments": {"m": 3}}}}, "does not take its arguments {'m': 3}"),
        ({"sets": {"a": {"factory": MAKE, "arguments": {"n": 0}}}}, "sets.a: it holds no items"),
        ({"sets": {"a": {"factory": OPEN, "arguments": {"n": 2}}}}, "item 'item-0' has no candidates to choose from"),
        ({"sets": {"a": {"factory": f"{__name__}:twice"}}}, "sets.a: two items have the id 'item-0'"),
        ({"sets": {"a": {"factory": f"{__name__}:unheard_of"}}}, "there is no scorer 'unheard of'"),
        ({"sets": {"a": {"factory": MAKE, "scorer": "mine"}}}, "sets.a: there is no scorer 'mine'"),
        ({"sets": {"a": {"factory": f"{__name__}:unscorable"}}}, "item 'item-0' has no references, which the scorer 'vqa' needs"),
        ({"subjects": [{"path": "ONE", "device": "cuda:99"}]}, "device 'cuda:99' is not there"),
        ({"subjects": [{"path": "ONE", "dtype": "int8"}]}, "dtype 'int8' is none that a model computes in"),
        ({"out": __file__}, "is a file"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(changes, message, declared, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(running, "load_vlm", lambda *args, **options: pytest.fail("loaded before everything was looked at"))
    changes = json.loads(json.dumps(changes).replace("ONE", models[0]))
    assert main(["--config", written(declared(**changes), tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def twice():
    return make_items(2) + make_items(1)


def unheard_of():
    return [{**item, "scorer": "unheard of"} for item in make_items(2)]


def unscorable():
    return [{**item, "scorer": "vqa", "references": None} for item in make_items(2)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "name a file (--config), or say all of --subject, --set and --out"),
        (["--subject", "a", "--out", "b"], "name a file"),
        (["--config", "a.toml", "--dtype", "bfloat16"], "--dtype is of what --subject names"),
    ],
)
def test_options_that_say_too_little(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_set_that_is_no_toml(models, tmp_path, capsys):
    assert main(["--subject", models[0], "--set", "pope = probes:load", "--out", str(tmp_path / "out")]) == 2
    assert "--set takes what stands in the file" in capsys.readouterr().err


def test_no_secret_of_the_environment_is_written(declared, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SOME_API_KEY", SECRET + "2")
    sets = {"patches": {"factory": f"{__name__}:private", "arguments": {"token": SECRET}}}
    assert main(["--config", written(declared(sets=sets), tmp_path)]) == 0
    said = capsys.readouterr()
    sets["patches"]["arguments"]["fails"] = True
    assert main(["--config", written(declared(sets=sets, out=str(tmp_path / "next")), tmp_path)]) == 2
    wrong = capsys.readouterr().err
    assert "refused for <HF_TOKEN>" in wrong
    found = [file.name for file in (tmp_path / "out").rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert not found and SECRET not in said.out + said.err + wrong
    assert "<HF_TOKEN>" in (tmp_path / "out" / "one" / "patches" / "run.json").read_text()


def test_no_secret_is_logged(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (tmp_path / "one").mkdir()
    config = EvaluationConfig.from_dict({"out": str(tmp_path), "subjects": [{"path": models[0]}], "sets": {"a": {"path": "b"}}})
    told = []
    running._SubjectRun(config, config.subjects[0], told.append).say(f"asked with {SECRET}")
    assert told == ["one: asked with <HF_TOKEN>"] and SECRET not in (tmp_path / "one" / "log.txt").read_text()


def test_an_interrupted_run_says_that_it_can_go_on(declared, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "answer", interrupted)
    assert main(["--config", written(declared(), tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def private(token, fails=False):
    if fails:
        raise ValueError(f"refused for {token}")
    return make_items(2)


def test_pictures_are_read_window_by_window(declared, monkeypatch):
    alive, most = [0], [0]

    class Counted(dict):
        def __init__(self, item):
            super().__init__(item)
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    class OnAsking:
        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            if index >= SIZE:
                raise IndexError
            return Counted(ITEMS[index])

    monkeypatch.setattr("vlm_core.sources.Items.called", lambda source: lambda **arguments: OnAsking())
    ran(declared(mode="candidates"))
    assert WINDOW <= most[0] <= WINDOW + 2 < SIZE


ITEMS = make_items(SIZE)


def test_a_subject_error_says_whose(declared, tmp_path):
    (tmp_path / "broken").mkdir()
    with pytest.raises(SubjectError, match="is a directory without config.json"):
        ran(declared(subjects=[{"path": str(tmp_path / "broken")}]))
    assert not Path(declared()["out"]).exists()
