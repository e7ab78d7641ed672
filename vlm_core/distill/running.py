"""One distillation from its declaration to a student, its tables and its data card; goes on where it was killed.

``distill(config)``   build the data, train the stages in order, measure before and after

    out/config.json               what was asked
    out/data-card.md              what was taught, counted
    out/teacher-answers.jsonl     what the teacher said: recorded = this file teaches again without it
    out/student                   the last stage's student (a link)
    out/stages/1-sft-<hash>/      each stage's student: model, processor, training.json
    out/student-metrics.csv       accuracy per stage, evaluation set and task, with intervals
    out/training-costs.csv        images, tokens, operations and seconds of training per stage, and what they bought
    out/data-costs.csv            operations of making what the stages are trained on: answers, samples, scores
    out/costs.csv                 student beside teacher: size, operations, memory, latency
    out/evaluation/*.jsonl        every answer, before and after
    out/kept/                     what a run that was killed finds again: answers in pieces, data sets
    out/log.txt, out/logs/        what happened when; TensorBoard's files, where it is installed

What is finished is known by a hash of everything it follows from (weights, data, declaration, seed, versions), so that a run with other
settings in the same folder uses what it shares with the one before, and replaces nothing but tables. A stage that was being trained goes
on from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import datasets
import pandas as pd
import torch
from filelock import FileLock, Timeout

from vlm_core.distill.asked_once import AskedOnce, rows_digest
from vlm_core.distill.building import Lessons
from vlm_core.distill.config import DistillConfig, OnPolicy, Preference, Stage
from vlm_core.distill.costs import model_costs, quality_per_flop, training_costs
from vlm_core.distill.on_policy import on_policy
from vlm_core.distill.preference import preference
from vlm_core.distill.processes import Processes
from vlm_core.distill.sft import sft
from vlm_core.distill.teachers import RecordedTeacher, SubjectTeacher, Teacher
from vlm_core.distill.training import newest_checkpoint
from vlm_core.evaluation import accuracy_table, evaluate
from vlm_core.families.processing import load_processor
from vlm_core.files import write_whole
from vlm_core.identity import digest, item_digest, library_digest
from vlm_core.interventions import Row
from vlm_core.items import SCORED, require_items
from vlm_core.memory import give_back_memory
from vlm_core.reduction.recipe import Recipe
from vlm_core.sources import checkpoint_digest, items_of, located
from vlm_core.subjects.load import load_vlm
from vlm_core.subjects.subject import Subject

__all__ = ["distill"]

VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate")


def distill(config: DistillConfig, *, together: Processes | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Distil a teacher into a student.

    Parameters
    ----------
    config : DistillConfig
    together : Processes, optional
        Those that train together: the first alone builds data, evaluates and writes; all train. Default: this one alone.
    say : callable, optional
        Told, in words, what happens.

    Returns
    -------
    Path
        ``config.out``.

    Raises
    ------
    ValueError, SubjectError
        One sentence: what is wrong with an input; leaked items, where the configuration refuses them.
    TrainingDiverged
    """
    together = together or Processes()
    run = _Run(config, together.count, say or (lambda words: None))
    try:
        together.first(run.prepare)
        for number in range(len(config.stages)):
            task = together.first(partial(run.task, number))
            if not task.finished:
                _train(config, task, run.told if together.is_first else None)
                together.first(partial(run.keep, task))
        together.first(run.report)
    finally:
        run.close()
    return run.out


@dataclass(frozen=True)
class _Task:
    """One stage that is to be trained, in words that every process understands."""

    stage: Stage
    start: str
    teacher: str | None
    data: str
    out: str
    log_to: str

    @property
    def finished(self) -> bool:
        return (Path(self.out) / "training.json").is_file()

    @property
    def partial(self) -> Path:
        return Path(f"{self.out}.partial")

    @property
    def checkpoints(self) -> Path:
        return Path(f"{self.out}.checkpoints")


def _train(config: DistillConfig, task: _Task, told: Callable[[int, int], None] | None) -> None:
    stage, data = task.stage, datasets.load_from_disk(task.data)
    options = {
        "seed": config.seed,
        "lora": stage.lora,
        "checkpoints": task.checkpoints,
        "log_to": Path(task.log_to),
        "progress": told,
    }
    if stage.recipe is not None:
        options["recipe"] = Recipe.load(stage.recipe)
    if isinstance(stage, Preference):
        how = {"beta": stage.beta, "image_term": stage.image_term, "anchor_term": stage.anchor_term, "answer_term": stage.answer_term}
        preference(task.start, data, stage.budget, task.partial, **how, **options)
    elif isinstance(stage, OnPolicy):
        how = {"divergence": stage.divergence, "temperature": stage.temperature, "max_new_tokens": stage.max_new_tokens}
        on_policy(task.start, task.teacher, data, stage.budget, task.partial, **how, **options)
    else:
        sft(task.start, data, stage.budget, task.partial, **options)


class _Run:
    """What the first process does."""

    def __init__(self, config: DistillConfig, processes: int, say: Callable[[str], None]) -> None:
        self.config, self.processes, self._say = config, processes, say
        self.out = Path(config.out)
        self._lock: FileLock | None = None
        self._students: list[tuple[str, str]] = []  # (key, folder) before training and after each stage so far
        self._frames: dict[tuple[str, str, str], pd.DataFrame] = {}  # (stage, recipe, evaluation set)
        self._asking: list[dict[str, object]] = []  # rows of data-costs.csv

    def say(self, words: str) -> None:
        """Tell whoever listens, and the log."""
        self._say(words)
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now().isoformat(timespec='seconds')}  {words}\n")

    # -- before training ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything up to the first stage: what is wrong with the inputs shows here, before anything is trained."""
        self.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.out / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process distils into {self.out}: wait for it, or name another folder (out)") from None
        self._lock = lock
        config = self.config
        for stage in config.stages:
            if stage.recipe is not None:
                Recipe.load(stage.recipe)
        student, self._teacher_path = located(config.student.path, config.student.revision), None
        self._students.append((checkpoint_digest(student), student))
        if config.teacher.path is not None:
            self._teacher_path = located(config.teacher.path, config.teacher.revision)
            self.teacher: Teacher = self._asked_once(checkpoint_digest(self._teacher_path), self._teacher_path)
        else:
            self.teacher = RecordedTeacher(config.teacher.recorded)
        self.evaluated = {name: items_of(source, f"evaluation.{name}", answered=True) for name, source in config.evaluation.items()}
        for name, items in self.evaluated.items():
            if _choices(items):
                require_items(items, SCORED)
            elif config.answers.kind == "grounded":
                raise ValueError(
                    f"evaluation.{name}: its items have no candidates, so that an answer is right where it equals the known one; grounded "
                    f"answers never do: give the items candidates, or teach other answers"
                )
        write_whole(self.out / "config.json", json.dumps(config.to_dict(), indent=1))
        self.lessons = Lessons(config, items_of(config.data, "data"), self.evaluated, self.teacher, load_processor(student).tokenizer, self.say)
        self._asking += _data_costs("all", "teacher", self.teacher.operations)
        self._measure("before", self._students[0], None)

    def _asked_once(self, key: str, path: str) -> AskedOnce:
        longest = self.config.answers.max_new_tokens

        def make() -> SubjectTeacher:
            return SubjectTeacher(load_vlm(path), max_new_tokens=longest)

        return AskedOnce(make, [key, longest, _versions()], self.out / "kept" / "answers", self.say)

    # -- a stage ------------------------------------------------------------------------------------------------------

    def task(self, number: int) -> _Task:
        """The next stage: its data built from the student that enters it."""
        config, stage = self.config, self.config.stages[number]
        key, start = self._students[-1]
        student = self._asked_once(key, start)
        data = self.lessons.data(stage, student)
        self._asking += _data_costs(stage.name, "student", student.operations)
        self._asking += _data_costs(stage.name, "teacher", self.teacher.operations)
        taught = rows_digest(data)
        declared = {**asdict(stage), "kind": stage.kind}
        teacher = checkpoint_digest(self._teacher_path) if isinstance(stage, OnPolicy) else None
        recipe = None if stage.recipe is None else Recipe.load(stage.recipe).to_dict()["row"]
        accelerated = torch.cuda.is_available()
        own = digest([key, taught, declared, teacher, recipe, config.seed, self.processes, accelerated, _versions()])
        stored = self.out / "kept" / "data" / taught
        if not stored.is_dir():
            unfinished = stored.with_name(f"{taught}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            data.save_to_disk(str(unfinished))
            os.replace(unfinished, stored)
        name = f"{number + 1}-{stage.name}-{own[:10]}"
        task = _Task(stage, start, self._teacher_path, str(stored), str(self.out / "stages" / name), str(self.out / "logs" / name))
        self._students.append((own, task.out))
        if task.finished:
            self.say(f"{stage.name}: found, trained before")
            self._measured(number)
        else:
            task.partial.parent.mkdir(exist_ok=True)
            begins = "goes on from its newest checkpoint" if newest_checkpoint(task.checkpoints) else "begins"
            self.say(f"{stage.name}: {begins}, {stage.steps} steps on {len(data)} rows")
            shutil.rmtree(task.partial, ignore_errors=True)
            for asked in (student, self.teacher):
                if isinstance(asked, AskedOnce):
                    asked.close()
            give_back_memory()
        return task

    def told(self, done: int, steps: int) -> None:
        """A step is done."""
        if done * 10 // steps > (done - 1) * 10 // steps:
            self.say(f"step {done} of {steps}")

    def keep(self, task: _Task) -> None:
        """A stage is trained: its folder appears whole."""
        losses = json.loads((task.partial / "training.json").read_text())["losses"]
        self.say(f"{task.stage.name}: trained, its loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
        os.replace(task.partial, task.out)
        shutil.rmtree(task.checkpoints, ignore_errors=True)
        self._measured(len(self._students) - 2)

    def _measured(self, number: int) -> None:
        stage = self.config.stages[number]
        self._measure(stage.name, self._students[number + 1], stage.recipe)

    # -- what came out ------------------------------------------------------------------------------------------------

    def _measure(self, stage: str, student: tuple[str, str], recipe: str | None) -> None:
        """Accuracy on every evaluation set, each measured once; with the recipe and without."""
        key, folder = student
        subject: Subject | None = None
        for name, items in self.evaluated.items():
            for path in (None, recipe)[: 1 if recipe is None else 2]:
                row = None if path is None else Recipe.load(path).to_dict()["row"]
                asked = [[item.get("scene_id"), item.get("task"), item_digest(item)] for item in items]
                own = digest([key, row, asked, _versions()])[:10]
                kept = self.out / "evaluation" / f"{stage}-{name}{'-recipe' if path else ''}-{own}.jsonl"
                if not kept.is_file():
                    if subject is None:
                        self.say(f"{stage}: measured")
                        subject = load_vlm(folder)
                    plan = None if path is None else Recipe.load(path).row(subject.anatomy)
                    frame = evaluate(subject, items, plan=plan, mode="candidates" if _choices(items) else "greedy")
                    write_whole(kept, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in frame.to_dict("records")))
                self._frames[stage, path or "", name] = pd.DataFrame([json.loads(line) for line in kept.read_text().splitlines()])
        del subject
        give_back_memory()

    def report(self) -> None:
        """Tables and the link to the student."""
        if self._teacher_path is not None:
            self._measure("teacher", (checkpoint_digest(self._teacher_path), self._teacher_path), None)
        metrics = _metrics(self._frames)
        _write_table(metrics, self.out / "student-metrics.csv")
        stages = self.config.stages
        first = next(iter(self.evaluated))
        overall = metrics[(metrics["task"] == "all") & (metrics["set"] == first)].set_index(["stage", "recipe"])["accuracy"]
        costs = training_costs({stage.name: folder for stage, (_, folder) in zip(stages, self._students[1:], strict=True)})
        reached = {stage.name: overall[stage.name, stage.recipe or ""] for stage in stages}
        _write_table(quality_per_flop(costs, reached, overall["before", ""]), self.out / "training-costs.csv")
        _write_table(pd.DataFrame(self._asking), self.out / "data-costs.csv")
        _write_table(self._beside_teacher(), self.out / "costs.csv")
        link = self.out / "student.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(self._students[-1][1]).relative_to(self.out), target_is_directory=True)
        os.replace(link, self.out / "student")
        for (stage, recipe), accuracy in overall.items():
            self.say(f"{stage}{' under its recipe' if recipe else ''}: {accuracy:.3f} of {first} right")

    def _beside_teacher(self) -> pd.DataFrame:
        config, items = self.config, next(iter(self.evaluated.values()))
        student = load_vlm(self._students[-1][1])
        models: dict[str, tuple[Subject, Row]] = {"student": (student, None)}
        if self._teacher_path is not None:
            models["teacher"] = (load_vlm(self._teacher_path), None)
        if config.stages[-1].recipe is not None:
            models["student under its recipe"] = (student, Recipe.load(config.stages[-1].recipe).row(student.anatomy))
        how = config.costs
        reference = "teacher" if "teacher" in models else None
        return model_costs(models, items, reference=reference, batch=how.batch, rounds=how.rounds, tokens=how.tokens, seed=config.seed)

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            self._lock.release()


@cache
def _versions() -> list[str]:
    return [library_digest(), *(f"{name} {version(name)}" for name in VERSIONS)]


def _choices(items: list[dict]) -> bool:
    return all(item.get("candidates") for item in items)


def _metrics(frames: Mapping[tuple[str, str, str], pd.DataFrame]) -> pd.DataFrame:
    tables = []
    for (stage, recipe, name), frame in frames.items():
        whole = accuracy_table(frame.assign(task="all"))
        table = pd.concat([accuracy_table(frame), whole], ignore_index=True).rename(columns={"n": "items"})
        table.insert(0, "stage", stage)
        table.insert(1, "recipe", recipe)
        table.insert(2, "set", name)
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    before = table[table["stage"] == "before"].set_index(["set", "task"])["accuracy"]
    return table.assign(gain=table["accuracy"].to_numpy() - before.loc[list(zip(table["set"], table["task"], strict=True))].to_numpy())


def _data_costs(stage: str, model: str, operations: dict[str, float]) -> list[dict[str, object]]:
    """A row for each thing that a model was asked for a stage, with its operations (NaN where nobody knows), which begin anew."""
    rows = [{"stage": stage, "model": model, "asked": what, "flops": flops} for what, flops in operations.items()]
    operations.clear()
    return rows


def _write_table(table: pd.DataFrame, path: Path) -> None:
    write_whole(path, table.to_csv(index=False))
