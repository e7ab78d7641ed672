"""Every subject answers every set; goes on where it was killed.

``run_evaluation(config)``   answer, measure, and put the subjects side by side

    out/<subject>/<set>/      answers.jsonl, metrics.csv, run.json (`vlm_core.harness.run_folder`)
    out/<subject>/log.txt     what happened when
    out/summary.csv           mean scores of all subjects that are in ``out``

Answers follow from weights, items, settings and versions, and ``run.json`` says which by their hashes: a folder that holds answers of
others is refused, and nothing in it is changed. All subjects in a folder answer the same items, asked alike.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from filelock import FileLock, Timeout

from vlm_core.files import as_folder, write_whole
from vlm_core.harness.answering import answer
from vlm_core.harness.asked import AskedSet
from vlm_core.harness.config import EvaluationConfig, SubjectAt
from vlm_core.harness.run_folder import WINDOW, OtherAnswers, RunFolder
from vlm_core.harness.tables import metrics_table, summary_table
from vlm_core.identity import library_digest
from vlm_core.items import take
from vlm_core.memory import give_back_memory
from vlm_core.secrets import hidden, hidden_in
from vlm_core.sources import checkpoint_digest, located
from vlm_core.subjects.checkpoint import inspect_checkpoint
from vlm_core.subjects.load import load_vlm, require_loadable
from vlm_core.subjects.subject import Subject

__all__ = ["described", "run_evaluation", "versions"]


def run_evaluation(config: EvaluationConfig, *, say: Callable[[str], None] | None = None) -> Path:
    """Let every subject answer every set.

    Parameters
    ----------
    config : EvaluationConfig
    say : callable, optional
        Told, in words, what happens.

    Returns
    -------
    Path
        ``config.out``.

    Raises
    ------
    ValueError, SubjectError
        One sentence: what is wrong with an input; a folder that holds answers of another run (`OtherAnswers`). What is wrong with a checkpoint's files, with
        items or with folders shows before anybody answers.
    """
    as_folder(config.out, "the folder of an evaluation (out)")
    runs = [_SubjectRun(config, subject, say or (lambda words: None)) for subject in config.subjects]
    for run in runs:
        run.locate()
    sets = [AskedSet.read(name, source, config.modes(name)) for name, source in config.sets.items()]
    for asked in sets:
        _require_same_data(Path(config.out), asked)
    for run in runs:
        run.refuse(sets)
    for asked in sets:
        _require_asked_alike(config, asked)
    for run in runs:
        run.answer(sets)
    write_whole(Path(config.out) / "summary.csv", summary_table(config.out).to_csv(index=False))
    return Path(config.out)


def described(subject: SubjectAt, weights: str, asked: AskedSet, config: EvaluationConfig) -> dict[str, Any]:
    """What ``run.json`` says: what the answers follow from, and where it was found.

    Parameters
    ----------
    weights : str
        Hash of the checkpoint.
    """
    device, _ = require_loadable(subject.device, subject.dtype, subject.quantization)
    commit = inspect_checkpoint(subject.path, subject.revision).commit
    about = {
        "subject": {**asdict(subject), "commit": commit, "weights": weights, "device": device.type},
        "data": {"set": asked.name, "items": len(asked.items), "digest": asked.digest, "source": asdict(config.sets[asked.name])},
        "asked": {
            "modes": list(asked.modes),
            "max_new_tokens": config.max_new_tokens if "greedy" in asked.modes else None,
            "logits": config.logits and "candidates" in asked.modes,
            "seed": config.seed,
            "batch_rows": config.batch_rows,
            "decoding": "greedy: the likeliest token by the model's own logits, no beams, no penalties",
        },
        "versions": versions(),
    }
    return hidden_in(about)


@dataclass
class _SubjectRun:
    """One subject of an evaluation."""

    config: EvaluationConfig
    at: SubjectAt
    tell: Callable[[str], None]
    path: str = ""
    weights: str = ""
    subject: Subject | None = field(default=None, repr=False)

    @property
    def out(self) -> Path:
        return Path(self.config.out) / self.at.name

    def locate(self) -> None:
        """Find the checkpoint; what its files have wrong shows here, and what this machine lacks."""
        require_loadable(self.at.device, self.at.dtype, self.at.quantization)
        self.path = located(self.at.path, self.at.revision)
        self.weights = checkpoint_digest(self.path)

    def refuse(self, sets: list[AskedSet]) -> None:
        """Make sure that nothing here is of another run."""
        for asked in sets:
            RunFolder(self.out / asked.name).require(described(self.at, self.weights, asked, self.config))

    def say(self, words: str) -> None:
        """Tell whoever listens, and the log."""
        words = hidden(f"{self.at.name}: {words}")
        self.tell(words)
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now().isoformat(timespec='seconds')}  {words}\n")

    def answer(self, sets: list[AskedSet]) -> None:
        """All sets, one after the other."""
        self.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.out / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process writes into {self.out}: wait for it, or name another folder (out)") from None
        try:
            for asked in sets:
                self._answer(asked)
        finally:
            self.subject = None
            give_back_memory()
            lock.release()

    def _answer(self, asked: AskedSet) -> None:
        folder = RunFolder(self.out / asked.name)
        folder.begin(described(self.at, self.weights, asked, self.config))
        due = [(fact["item"], mode) for fact in asked.facts for mode in asked.modes]
        n, known = len(asked.items), folder.whole(due, WINDOW * len(asked.modes)) // len(asked.modes)
        if known:
            self.say(f"{known} of {n} items of {asked.name} found, answered before")
        if known < n:
            folder.metrics_file.unlink(missing_ok=True)  # whoever reads it takes the run for finished
        start = perf_counter()
        for first in range(known, n, WINDOW):
            some = range(first, min(first + WINDOW, n))
            rows = answer(
                self._loaded(),
                take(asked.items, some),
                [asked.facts[number] for number in some],
                asked.modes,
                max_new_tokens=self.config.max_new_tokens,
                logits=self.config.logits,
                batch_rows=self.config.batch_rows,
                seed=self.config.seed,
            )
            folder.append(rows)
            rate = (some.stop - known) / (perf_counter() - start)
            self.say(f"{some.stop} of {n} items of {asked.name}, {rate:.1f} a second")
        answers = folder.all_answers()
        write_whole(folder.metrics_file, metrics_table(answers, asked.name).to_csv(index=False))
        cut = int(answers.loc[answers["mode"] == "greedy", "cut_off"].sum()) if "greedy" in asked.modes else 0
        if cut:
            self.say(f"{cut} of {n} generated answers to {asked.name} had not ended after {self.config.max_new_tokens} tokens (max_new_tokens)")

    def _loaded(self) -> Subject:
        if self.subject is None:
            self.say("loads")
            self.subject = load_vlm(self.path, **self.at.loading)
            self.subject.name = self.at.name
        return self.subject


def _require_same_data(out: Path, asked: AskedSet) -> None:
    """Refuse a set of which another subject's folder in ``out`` holds answers to other items."""
    for folder in _begun(out, asked):
        about = folder.about()
        if about["data"]["digest"] != asked.digest:
            raise OtherAnswers(
                f"{folder.path} holds answers to other items than sets.{asked.name} has now ({about['data']['items']} there, "
                f"{len(asked.items)} now): all subjects in a folder answer the same; evaluate into a new folder (out)"
            )


def _require_asked_alike(config: EvaluationConfig, asked: AskedSet) -> None:
    """Refuse a set to which another subject in ``out`` was given another length to answer, or another seed: one table has them side by side."""
    for folder in _begun(Path(config.out), asked):
        then = folder.about()["asked"]
        for name, now in (("max_new_tokens", config.max_new_tokens if "greedy" in asked.modes else None), ("seed", config.seed)):
            if None not in (now, then.get(name)) and then[name] != now:
                raise OtherAnswers(
                    f"{folder.path} holds answers by {name} = {then[name]}, not {now}: all subjects in a folder are asked alike; evaluate into a "
                    f"new folder (out)"
                )


def _begun(out: Path, asked: AskedSet) -> list[RunFolder]:
    """Of all subjects in ``out``, the folders with answers to a set."""
    return [folder for file in sorted(out.glob(f"*/{asked.name}/run.json")) if (folder := RunFolder(file.parent)).begun]


@cache
def versions() -> dict[str, str]:
    """Of what answers follow from beside weights and items, this library's code by its hash."""
    return {
        "python": platform.python_version(),
        "vlm_core": library_digest(),
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow")},
    }
