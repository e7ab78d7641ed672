"""``python -m vlm_core.distill``: what comes out, what is found again after a kill, and several processes as one."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

import vlm_core.distill.building as building
import vlm_core.distill.running as running
from vlm_core import DropTokens, Recipe, evaluate, load_vlm
from vlm_core.distill import RecordedTeacher, SubjectTeacher, instruction_set, sft, teacher_ranked
from vlm_core.distill.__main__ import main
from vlm_core.distill.asked_once import PIECE, AskedOnce
from vlm_core.distill.config import DistillConfig
from vlm_core.distill.processes import Processes
from vlm_core.distill.running import distill
from vlm_core.sources import Items, items_of
from vlm_core.tests.distill_students import save_student, weights
from vlm_core.tests.tiny import make_items
from vlm_core.tests.warm import Warm

ROOT = Path(__file__).resolve().parents[2]
MAKE = "vlm_core.tests.tiny:make_items"
STEPS = 6
ONE_STEP = [{"kind": "sft", "steps": 1, "batch_size": 2}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher and a student of one vocabulary, on disk."""
    folder = tmp_path_factory.mktemp("models")
    return {"teacher": save_student(folder / "teacher", seed=1, layers=3), "student": save_student(folder / "student")}


def declaration(models, out):
    """A declaration of tiny sizes."""
    return {
        "out": str(out),
        "teacher": {"path": str(models["teacher"])},
        "student": {"path": str(models["student"])},
        "data": {"factory": MAKE, "arguments": {"n": 24, "seed": 1}},
        "answers": {"max_new_tokens": 3},
        "evaluation": {"test": {"factory": MAKE, "arguments": {"n": 8, "seed": 2}}},
        "stages": [{"kind": "sft", "steps": STEPS, "batch_size": 2}],
        "costs": {"rounds": 1, "batch": 2, "tokens": 1},
    }


@pytest.fixture
def declared(models, tmp_path):
    """``declared(**changes)``: a declaration, its output in this test's folder."""
    return lambda **changes: {**declaration(models, tmp_path / "out"), **changes}


@pytest.fixture(scope="module")
def asked(models, tmp_path_factory):
    """What came out of the declaration as it is, for tests that change nothing there."""
    return distill(DistillConfig.from_dict(declaration(models, tmp_path_factory.mktemp("asked") / "out")))


def written(content, tmp_path, name="plan.yaml"):
    (tmp_path / name).write_text(yaml.safe_dump(content))
    return str(tmp_path / name)


def same(first, other):
    first, other = weights(first), weights(other)
    return first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


# -- what comes out ---------------------------------------------------------------------------------------------------


STAGES = [
    {"kind": "sft", "steps": 3, "batch_size": 4},
    {"kind": "preference", "name": "dpo", "steps": 2, "batch_size": 4, "pairs": {"samples": 3}, "lora": {"layers": [1], "rank": 2}},
    {"kind": "on_policy", "steps": 2, "batch_size": 4, "max_new_tokens": 2},
]


def test_three_stages_from_a_file(declared, models, tmp_path, capsys):
    assert main(["--config", written(declared(stages=STAGES), tmp_path)]) == 0
    out = tmp_path / "out"
    assert "the student is" in capsys.readouterr().out
    folders = sorted((out / "stages").iterdir())
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == ["1-sft", "2-dpo", "3-on_policy"]
    assert (out / "student").resolve() == folders[-1].resolve()
    assert isinstance(AutoModelForImageTextToText.from_pretrained(out / "student"), torch.nn.Module) and load_vlm(out / "student").heads
    trail = [models["student"], *folders]
    assert not any(same(one, other) for one, other in zip(trail, trail[1:], strict=False)), "every stage changes the student"
    untouched, adapted = weights(folders[0]), weights(folders[1])
    changed = {name for name in untouched if not torch.equal(untouched[name], adapted[name])}
    assert changed and all("layers.1.self_attn" in name for name in changed), "adapters on one layer"
    metrics = pd.read_csv(out / "student-metrics.csv")
    assert metrics["stage"].unique().tolist() == ["before", "sft", "dpo", "on_policy", "teacher"]
    assert metrics.columns.tolist() == ["stage", "recipe", "set", "task", "items", "clusters", "accuracy", "lower", "upper", "gain"]
    assert set(metrics["task"]) == {"color", "shape", "all"} and (metrics.loc[metrics["stage"] == "before", "gain"] == 0).all()
    answers = [json.loads(line) for line in next((out / "evaluation").glob("on_policy-test-*.jsonl")).read_text().splitlines()]
    overall = metrics[(metrics["stage"] == "on_policy") & (metrics["task"] == "all")]["accuracy"].item()
    assert overall == np.mean([line["correct"] for line in answers]) and len(answers) == 8
    spent = pd.read_csv(out / "training-costs.csv")
    assert spent["stage"].tolist() == ["sft", "dpo", "on_policy"] and (spent["flops"] > 0).all()
    assert spent["flops_so_far"].tolist() == spent["flops"].cumsum().tolist()
    costs = pd.read_csv(out / "costs.csv")
    assert set(costs["model"]) == {"student", "teacher"} and {"first token", "weights"} <= set(costs["quantity"])
    made = pd.read_csv(out / "data-costs.csv")
    assert list(made[["stage", "model", "asked"]].itertuples(index=False, name=None)) == [
        ("all", "teacher", "answers"), ("dpo", "student", "samples"), ("dpo", "teacher", "scores"),
    ]  # fmt: skip
    items = make_items(24, seed=1)
    teacher, student = (
        AskedOnce(lambda path=path: SubjectTeacher(load_vlm(path), max_new_tokens=3), str(path), tmp_path / "again", print)
        for path in (models["teacher"], folders[0])
    )
    teacher.answers(items)
    teacher_ranked(items, student.samples(items, 3), teacher)
    assert made["flops"].tolist() == [teacher.operations["answers"], student.operations["samples"], teacher.operations["scores"]]
    card = (out / "data-card.md").read_text()
    assert "24" in card and "teacher_ranked" in card and "No picture is shared with test" in card
    assert DistillConfig.from_dict(json.loads((out / "config.json").read_text())) == DistillConfig.from_dict(declared(stages=STAGES))


def test_a_stage_is_the_library_s_own_training_on_the_teacher_s_answers(declared, models, asked, tmp_path):
    items = make_items(24, seed=1)
    answers = SubjectTeacher(load_vlm(models["teacher"]), max_new_tokens=3).answers(items)
    config = DistillConfig.from_dict(declared())
    by_hand = sft(models["student"], instruction_set(items, answers), config.stages[0].budget, tmp_path / "hand", seed=0)
    assert same(asked / "student", by_hand)


def test_each_stage_starts_from_the_one_before(declared, monkeypatch):
    started = []

    def noting(student, data, budget, out, **options):
        started.append((str(student), budget.steps))
        return sft(student, data, budget, out, **options)

    monkeypatch.setattr(running, "sft", noting)
    stages = [{"kind": "sft", "name": name, "steps": steps, "batch_size": 2} for name, steps in (("a", 1), ("b", 2))]
    config = DistillConfig.from_dict(declared(stages=stages))
    out = distill(config)
    first = next((out / "stages").glob("1-a-*"))
    assert started == [(config.student.path, 1), (str(first), 2)]


def test_a_recipe_is_in_force_while_training_and_the_student_measured_with_it_and_without(declared, models, tmp_path):
    path = tmp_path / "recipe.json"
    Recipe(DropTokens(1, 0.25, "stride"), n_layers=2, policy="stride", keep=0.25).save(path)
    config = DistillConfig.from_dict(declared(stages=[{"kind": "sft", "steps": 2, "batch_size": 2, "recipe": str(path)}]))
    out = distill(config)
    taught = datasets.load_from_disk(str(next((out / "kept" / "data").iterdir())))
    with_it = sft(models["student"], taught, config.stages[0].budget, tmp_path / "with", recipe=Recipe.load(path))
    without = sft(models["student"], taught, config.stages[0].budget, tmp_path / "without")
    assert same(out / "student", with_it) and not same(out / "student", without)
    metrics = pd.read_csv(out / "student-metrics.csv", keep_default_na=False)
    rows = metrics[(metrics["stage"] == "sft") & (metrics["task"] == "all")].set_index("recipe")["accuracy"]
    subject, items = load_vlm(out / "student"), make_items(8, seed=2)
    for recipe, plan in (("", None), (str(path), DropTokens(1, 0.25, "stride"))):
        assert rows[recipe] == evaluate(subject, items, plan=plan)["correct"].mean()
    assert set(pd.read_csv(out / "costs.csv")["model"]) == {"student", "student under its recipe", "teacher"}


def test_a_recorded_teacher_teaches_the_same(declared, asked, tmp_path):
    recorded = declared(teacher={"recorded": str(asked / "teacher-answers.jsonl")}, out=str(tmp_path / "recorded"))
    out = distill(DistillConfig.from_dict(recorded))
    assert same(asked / "student", out / "student")
    assert set(pd.read_csv(out / "costs.csv")["model"]) == {"student"}
    (made,) = pd.read_csv(out / "data-costs.csv").itertuples(index=False)
    assert (made.model, made.asked) == ("teacher", "answers") and np.isnan(made.flops), "nobody knows what it took"
    assert "teacher" not in set(pd.read_csv(out / "student-metrics.csv")["stage"])


def test_answers_that_the_student_has_no_words_for_are_not_taught(declared, asked, tmp_path):
    lines = [json.loads(line) for line in (asked / "teacher-answers.jsonl").read_text().splitlines()]
    lines[0]["answers"] = ["rhombicuboctahedron"]
    said = tmp_path / "said.jsonl"
    said.write_text("\n".join(map(json.dumps, lines)))
    out = distill(DistillConfig.from_dict(declared(teacher={"recorded": str(said)}, out=str(tmp_path / "unknown"))))
    assert "1 of" in (told := (out / "log.txt").read_text()) and "dropped: words that the student does not know" in told
    assert "rhombicuboctahedron" not in (out / "data-card.md").read_text()


@pytest.mark.parametrize("source", ["ranked", "against-student", "rubric"])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_pairs_come_from_any_source_and_are_filtered_as_answers_are(declared, models, source, of, monkeypatch):
    """Before they are paired: an item of which one is left over may still have a pair of the others."""
    vocabulary = sorted(word for word in load_vlm(models["student"], check=False).tokenizer.get_vocab() if word.isalpha())[:5]

    def samples(self, items, n, **options):
        return [(item["answer"], "rhombicuboctahedron", " ".join(vocabulary), vocabulary[number % 5]) for number, item in enumerate(items)]

    monkeypatch.setattr(SubjectTeacher, "samples", samples)
    stages = [{"kind": "preference", "steps": 1, "batch_size": 2, "pairs": {"source": source, "of": of}}]
    lessons = []
    whole = building.preference_set
    monkeypatch.setattr(building, "preference_set", lambda items, pairs: lessons.append(pairs) or whole(items, pairs))
    out = distill(DistillConfig.from_dict(declared(stages=stages, filters={"longest": 3})))
    (pairs,) = lessons
    assert pairs and {pair.source for pair in pairs} == {{"ranked": "teacher_ranked", "against-student": "teacher_against_student", "rubric": "rubric"}[source]}
    assert all(len(said.split()) <= 3 and "rhombicuboctahedron" not in said for pair in pairs for said in (pair.chosen, pair.rejected))
    card = (out / "data-card.md").read_text()
    assert "| within_length, answers to be paired |" in card and "| writable, answers to be paired |" in card
    dropped = " answers to be paired dropped: "
    assert (source == "against-student") == (f"{dropped}words that the student does not know" not in (log := (out / "log.txt").read_text()))
    assert (source == "against-student") == (f"24 of 96{dropped}longer than 3" not in log)


def test_answers_that_most_samples_give(declared):
    answers = {"kind": "self-consistent", "samples": 4, "max_new_tokens": 2}
    out = distill(DistillConfig.from_dict(declared(answers=answers, filters={"agreement": 0.5}, stages=ONE_STEP)))
    card = (out / "data-card.md").read_text()
    assert "self-consistent" in card and "agreement below 0.5" in card


def test_answers_that_name_where(declared):
    changes = {
        "answers": {"kind": "grounded", "where": {"function": "vlm_core.tests.test_distill_command:place"}, "max_new_tokens": 2},
        "stages": ONE_STEP,
    }
    out = distill(DistillConfig.from_dict(declared(**changes)))
    taught = datasets.load_from_disk(str(next((out / "kept" / "data").iterdir())))
    said = [message["content"] for row in taught for message in row["messages"] if message["role"] == "assistant"]
    assert said and all(answer.endswith(" at big circle") for answer in said)
    open_ended = {"test": {"factory": "vlm_core.tests.test_distill_command:unnamed_choices", "arguments": {"n": 4}}}
    with pytest.raises(ValueError, match="evaluation.test: its items have no candidates"):
        distill(DistillConfig.from_dict(declared(**changes, evaluation=open_ended)))


def place(item):
    """Where everything is."""
    return "big circle"


def unnamed_choices(n):
    """Items that are answered in free words."""
    return [{name: value for name, value in item.items() if name != "candidates"} for item in make_items(n, seed=2)]


def test_items_without_choices_are_answered_in_words(declared):
    evaluation = {"free": {"factory": "vlm_core.tests.test_distill_command:unnamed_choices", "arguments": {"n": 4}}}
    out = distill(DistillConfig.from_dict(declared(evaluation=evaluation, stages=ONE_STEP)))
    lines = [json.loads(line) for line in next((out / "evaluation").glob("sft-free-*.jsonl")).read_text().splitlines()]
    assert len(lines) == 4 and all(np.isnan(line["score"]) for line in lines), "generated, not chosen"


def test_items_of_a_set_that_datasets_reads(tmp_path):
    rows = make_items(3)
    whole = datasets.Dataset.from_list([{"picture": row["image"], "query": row["prompt"], "label": row["answer"]} for row in rows])
    whole.cast_column("picture", datasets.Image()).to_parquet(tmp_path / "set.parquet")
    whole.save_to_disk(str(tmp_path / "set"))
    for path in ("set.parquet", "set"):
        config = declared_items(path=str(tmp_path / path), columns={"image": "picture", "prompt": "query", "answer": "label"}, limit=2)
        items = items_of(config, "data")
        assert [item["prompt"] for item in items] == [row["prompt"] for row in rows[:2]]
        assert items[0]["image"].tobytes() == rows[0]["image"].tobytes() and items[1]["answer"] == rows[1]["answer"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.txt"}, "data: .*a.txt is no file that datasets reads: it takes .json, .jsonl, .csv, .parquet"),
        ({"path": "b.json"}, "data: the set '.*b.json' could not be read"),
        ({"factory": MAKE, "arguments": {"m": 2}}, "data: vlm_core.tests.tiny:make_items does not take its arguments \\{'m': 2\\}"),
        ({"factory": MAKE, "arguments": {"n": 0}}, "data: it holds no items"),
        ({"factory": "builtins:dict"}, "data: items must be a sequence of items, got a mapping"),
    ],
)
def test_items_that_cannot_be_had(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    Path("b.json").write_text("{")
    with pytest.raises(ValueError, match=message):
        items_of(declared_items(**source), "data")


def declared_items(**source):
    from vlm_core.settings import declared

    return declared(Items, source)


# -- what is refused --------------------------------------------------------------------------------------------------


def leaking(declared, **changes):
    """The evaluation set's pictures are the first of the data."""
    return declared(evaluation={"test": {"factory": MAKE, "arguments": {"n": 8, "seed": 1}}}, **changes)


def test_leaked_items_are_refused_before_anything_is_asked(declared, tmp_path, capsys):
    assert main(["--config", written(leaking(declared), tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "8 of 24 items that are taught show a picture that is evaluated on" in said and "leaked = 'drop'" in said
    assert not (tmp_path / "out" / "stages").exists() and not (tmp_path / "out" / "kept").exists()


def test_leaked_items_are_dropped_and_counted_where_that_is_asked(declared, tmp_path):
    out = distill(DistillConfig.from_dict(leaking(declared, leaked="drop")))
    card = (out / "data-card.md").read_text()
    assert "a picture of an evaluation set: 8" in card and "Compared by pixels with test" in card
    taught = datasets.load_from_disk(str(next((out / "kept" / "data").iterdir())))
    assert sum(len(row["messages"]) for row in taught) == 2 * 16


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"tetcher": 1}, 2, "plan.yaml: there is no setting 'tetcher'"),
        ({"teacher": {"path": "nowhere/at/all"}}, 2, "subject 'nowhere/at/all' was not found"),
        ({"teacher": {"recorded": "nothing.jsonl"}}, 2, "there is no file of recorded answers at 'nothing.jsonl'"),
        ({"stages": [{"kind": "sft", "steps": 1, "recipe": "none.json"}]}, 2, "there is no recipe at none.json"),
        ({"filters": {"longest": 1}, "answers": {"max_new_tokens": 3}}, 2, "the filter 'within_length' leaves none"),
        ({"stages": [{"kind": "sft", "steps": 2, "learning_rate": 1.0e38}]}, 1, "diverged: lower the learning rate"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(changes, status, message, declared, tmp_path, capsys):
    assert main(["--config", written(declared(**changes), tmp_path)]) == status
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("python -m vlm_core.distill: ") and message in line
    assert not (tmp_path / "out" / "student").exists()


def test_two_runs_do_not_share_a_folder(declared):
    from filelock import FileLock

    config = DistillConfig.from_dict(declared())
    Path(config.out).mkdir()
    with FileLock(Path(config.out) / ".lock"), pytest.raises(ValueError, match="another process distils into"):
        distill(config)


# -- again ------------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_found(declared, monkeypatch):
    stages = [{"kind": "sft", "name": name, "steps": 2, "batch_size": 2} for name in ("a", "b")]
    config = DistillConfig.from_dict(declared(stages=stages))
    out = distill(config)
    trained, measured, asked = [], [], []

    def noting(student, data, budget, folder, **options):
        trained.append(folder.name)
        return sft(student, data, budget, folder, **options)

    monkeypatch.setattr(running, "sft", noting)
    monkeypatch.setattr(running, "evaluate", lambda *args, **options: measured.append(args))
    monkeypatch.setattr(running, "SubjectTeacher", lambda *args, **options: asked.append(args))
    tables = [out / "student-metrics.csv", out / "data-costs.csv"]
    before = [table.read_text() for table in tables]
    distill(config)
    assert not trained and not measured and not asked and [table.read_text() for table in tables] == before
    monkeypatch.undo()
    monkeypatch.setattr(running, "sft", noting)
    stages[1]["learning_rate"] = 1e-4
    distill(DistillConfig.from_dict(declared(stages=stages)))
    assert len(trained) == 1 and trained[0].startswith("2-b-"), "the first stage is the same"
    distill(DistillConfig.from_dict(declared(stages=stages, seed=1)))
    assert len(trained) == 3, "another seed changes both"


class Counting:
    """A teacher that counts what it is asked, and may die on the way."""

    def __init__(self, dies_at=None):
        self.seen, self.dies_at = [], dies_at

    def identity(self):
        return {"name": "counting"}

    def answers(self, items):
        if len(self.seen) == self.dies_at:
            raise KeyboardInterrupt
        self.seen.append(len(items))
        return [f"{item['id']} it is" for item in items]

    def samples(self, items, n, *, temperature=1.0, seed=0):
        return [tuple(f"{item['id']} {temperature} {seed} {k}" for k in range(n)) for item in items]

    def scores(self, items, answers):
        return np.array([float(len(answer)) if answer else -np.inf for answer in answers])


def test_a_teacher_is_asked_once_also_after_a_kill(tmp_path):
    items = [{**item, "id": f"{number}"} for number, item in enumerate(make_items(2 * PIECE + 10))]
    dying, told = Counting(dies_at=1), []
    with pytest.raises(KeyboardInterrupt):
        AskedOnce(lambda: dying, "key", tmp_path, told.append).answers(items)
    again = Counting()
    assert AskedOnce(lambda: again, "key", tmp_path, told.append).answers(items) == Counting().answers(items)
    assert dying.seen == [PIECE] and again.seen == [PIECE, 10], "what was said before the kill is not asked again"
    other = Counting()
    AskedOnce(lambda: other, "other", tmp_path, told.append).answers(items[:3])
    assert other.seen == [3], "another teacher is another"
    first = AskedOnce(Counting, "key", tmp_path, told.append)
    never = AskedOnce(lambda: pytest.fail("loaded without need"), "key", tmp_path, told.append)
    for ask in (
        lambda one: one.samples(items, 2, temperature=0.5, seed=3),
        lambda one: one.scores(items[:3], ["ab", "", "abc"]).tolist(),
        lambda one: one.identity(),
    ):
        assert ask(first) == ask(never)
    assert never.scores(items[:3], ["ab", "", "abc"]).tolist() == [2.0, -np.inf, 3.0]
    assert np.isnan(never.operations["scores"]), "of a teacher that counts nothing"
    assert first.samples(items[:2], 2, temperature=0.5, seed=4) != first.samples(items[:2], 2, temperature=0.5, seed=3)


def launch(arguments, **environment):
    """The command in a process of its own."""
    return Warm(arguments, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment})


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(declared, tmp_path):
    torch.set_num_threads(1)
    stages = [
        {"kind": "sft", "name": "first", "steps": 2, "batch_size": 2},
        {"kind": "sft", "name": "second", "steps": 40, "batch_size": 2},
    ]
    whole = distill(DistillConfig.from_dict(declared(stages=stages, out=str(tmp_path / "whole"))))
    config = written(declared(stages=stages, out=str(tmp_path / "killed")), tmp_path)
    process = launch(["-m", "vlm_core.distill", "--config", config])
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "stages").glob("2-second-*.checkpoints/checkpoint-*/whole")):
        assert process.poll() is None and time.monotonic() < deadline, process.said()
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "student").exists(), "it was killed midway"
    said = []
    out = distill(DistillConfig.from_file(config), say=said.append)
    assert any("first: found, trained before" in line for line in said)
    assert any("second: goes on from its newest checkpoint" in line for line in said)
    assert not any("step 4 of 40" in line for line in said) and any("step 40 of 40" in line for line in said)
    assert same(out / "student", whole / "student")
    metrics = [pd.read_csv(folder / "student-metrics.csv") for folder in (out, whole)]
    pd.testing.assert_frame_equal(*metrics)
    assert not list((out / "stages").glob("*.checkpoints")) and not list((out / "stages").glob("*.partial"))


# -- several processes ------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def accelerated(config, processes=2):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    port = ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
    process = launch([*launcher, *port, "-m", "vlm_core.distill", "--config", config], ACCELERATE_USE_CPU="true")
    return process.wait(timeout=300), process.said()[1]


LOSSES_AGREE = 1e-4
"""Relative: sums of float32 in another order, over a few steps."""
WEIGHTS_AGREE = 1e-2
"""Of how far training moved them."""


def moved(before, after, other):
    """How far two trained checkpoints lie apart, as a share of how far the first lies from where both began."""
    start, first, second = (
        torch.cat([tensor.flatten().double() for tensor in weights(folder).values()]) for folder in (before, after, other)
    )
    return float((first - second).norm() / (first - start).norm())


def test_two_processes_are_one_with_twice_the_batch(declared, models, asked, tmp_path):
    def stage(batch_size):
        return [{"kind": "sft", "steps": STEPS, "batch_size": batch_size}]

    config = written(declared(stages=stage(2), out=str(tmp_path / "two")), tmp_path)
    status, said = accelerated(config)
    assert status == 0, said
    assert said.count("the teacher answers 24 questions") == 1 and said.count("sft: measured") == 1, "the first alone builds and measures"
    assert declared()["stages"] == stage(2)
    one = {2: asked, 4: distill(DistillConfig.from_dict(declared(stages=stage(4), out=str(tmp_path / "one-4"))))}
    logs = {name: json.loads((out / "student" / "training.json").read_text()) for name, out in {"two": tmp_path / "two", **one}.items()}
    np.testing.assert_allclose(logs["two"]["losses"], logs[4]["losses"], rtol=LOSSES_AGREE)
    assert not np.allclose(logs["two"]["losses"], logs[2]["losses"], rtol=LOSSES_AGREE), "the batch is really twice as large"
    assert logs["two"]["images"] == logs[4]["images"] == 2 * logs[2]["images"] and logs["two"]["tokens"] == logs[4]["tokens"]
    assert moved(models["student"], one[4] / "student", tmp_path / "two" / "student") < WEIGHTS_AGREE
    assert moved(models["student"], one[4] / "student", one[2] / "student") > 10 * WEIGHTS_AGREE


def test_two_processes_train_in_every_way(declared, tmp_path):
    """With adapters, on pairs that are drawn from the stage before, and on what the student says."""
    config = written(declared(stages=STAGES, out=str(tmp_path / "two")), tmp_path)
    status, said = accelerated(config)
    assert status == 0, said
    logs = {log["kind"]: log for log in (json.loads(path.read_text()) for path in (tmp_path / "two").rglob("training.json"))}
    for stage in STAGES:
        log = logs[stage["kind"]]
        assert np.isfinite(log["losses"]).all() and log["images"] == 2 * stage["steps"] * stage["batch_size"]
    assert logs["preference"]["lora"]["layers"] == [1]
    load_vlm(tmp_path / "two" / "student", check=False)


# Two processes are told what launchers tell, and nobody stops the second after the first.
LAUNCHED = """
import os, signal, sys
from vlm_core.distill.__main__ import main
for rank in "01":
    if not os.fork():
        signal.alarm(200)
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
        os._exit(main(["--config", sys.argv[2]]))
print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))
"""


def test_an_error_of_the_first_process_ends_all_of_them(declared, tmp_path):
    config = written(leaking(declared), tmp_path)
    process = launch(["-c", LAUNCHED, str(free_port()), config], ACCELERATE_USE_CPU="true")
    assert process.wait(timeout=300) == 0, process.said()
    ended, said = process.said()
    assert ended.split() == ["2", "2"], said
    assert said.count("show a picture that is evaluated on") == 1
    assert not (tmp_path / "out" / "stages").exists()


def test_processes_that_accelerate_did_not_start_are_missed(monkeypatch):
    assert Processes.joined().count == 1
    for name, value in (("ACCELERATE_MIXED_PRECISION", "no"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="accelerate launch --cpu starts a single process without MPI"):
        Processes.joined()


def test_a_recorded_teacher_is_read_from_what_came_out(asked, models):
    items = make_items(24, seed=1)
    said = SubjectTeacher(load_vlm(models["teacher"]), max_new_tokens=3).answers(items)
    assert RecordedTeacher(asked / "teacher-answers.jsonl").answers(items) == said
