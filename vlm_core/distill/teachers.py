"""Who answers: the teacher of a student, on this machine or recorded.

``Teacher``          what a teacher can be asked
``SubjectTeacher``   any local or hub VLM as a subject (``vlm_core.load_vlm``)
``RecordedTeacher``  what an API teacher, or any other, once said: a file of JSON lines, no network
``record_answers``   writes such a file

The file has one JSON object a line, UTF-8:

``image``        digest of the picture (``vlm_core.identity.picture_digest``): SHA-256, in hexadecimal, of the text ``"<width>x<height> "``
                 followed by the RGB pixels, one byte a channel, row by row from the top; several pictures: their digests joined by ``+``
``prompt``       what was asked, as the items have it
``answers``      list of texts: first the teacher's answer (its best: temperature 0), then samples, if there are any
``scores``       optional list of numbers, one an answer: its summed log-probability, or any number by which the teacher ranks its answers;
                 null for minus infinity, which JSON cannot write
``temperature``  optional: at which the samples were drawn
``model``        who answered: name and version as the provider gives them
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm_core.identity import picture_digest
from vlm_core.interventions.numeric import integer
from vlm_core.items import SHOWN, item_field, require_items, take

__all__ = ["RecordedTeacher", "SubjectTeacher", "Teacher", "record_answers"]


@runtime_checkable
class Teacher(Protocol):
    """What a teacher can be asked. Items need ``id``, ``image`` and ``prompt``, and no answer."""

    def identity(self) -> dict[str, Any]:
        """Facts that name it, builtins only."""

    def answers(self, items: Sequence) -> list[str]:
        """Its answer to each item."""

    def samples(self, items: Sequence, n: int, *, temperature: float = 1.0, seed: int = 0) -> list[tuple[str, ...]]:
        """``n`` answers drawn for each item."""

    def scores(self, items: Sequence, answers: Sequence[str]) -> np.ndarray:
        """How likely it finds one answer an item, float array ``[item]``; larger is better."""


class SubjectTeacher:
    """A subject that answers.

    Parameters
    ----------
    subject : Subject
    max_new_tokens : int
        Where an answer is cut off that has not ended.
    batch_rows : int, optional
        Prompts per forward pass.

    Attributes
    ----------
    operations : dict of str to int
        Floating-point operations so far of its ``answers``, ``samples`` and ``scores``, by formula (`vlm_core.distill.asking`).
    """

    def __init__(self, subject, *, max_new_tokens: int = 16, batch_rows: int | None = None) -> None:
        from vlm_core.subjects.subject import require_subject

        require_subject(subject)
        self.subject, self.max_new_tokens, self.batch_rows = subject, max_new_tokens, batch_rows
        self.operations: dict[str, int] = {}

    def identity(self) -> dict[str, Any]:
        """The subject's, with ``kind`` ``"subject"``."""
        return {"kind": "subject", **self.subject.identity()}

    def answers(self, items: Sequence) -> list[str]:
        """Greedy answers (`vlm_core.evaluate` in mode ``"greedy"``)."""
        from vlm_core.distill.asking import answering_flops
        from vlm_core.evaluation import generated

        said = generated(self.subject, items, max_new_tokens=self.max_new_tokens, batch_rows=self.batch_rows)
        self._took("answers", answering_flops(self.subject, said))
        return [one.text for one in said]

    def samples(self, items: Sequence, n: int, *, temperature: float = 1.0, seed: int = 0) -> list[tuple[str, ...]]:
        """See `vlm_core.sampling.sampled`."""
        from vlm_core.distill.asking import sampling_flops
        from vlm_core.sampling import sampled

        drawn = sampled(
            self.subject, items, n, temperature=temperature, seed=seed, max_new_tokens=self.max_new_tokens, batch_rows=self.batch_rows
        )
        self._took("samples", sampling_flops(self.subject, drawn))
        return [one.answers for one in drawn]

    def scores(self, items: Sequence, answers: Sequence[str]) -> np.ndarray:
        """Summed log-probability of each answer's tokens as they follow the prompt, as a sweep scores candidates.

        The end of the answer is not among the tokens: an answer that begins with another can never be likelier than that one. ``-inf``
        where the subject cannot write the answer: no token, or one that its tokenizer does not know.
        """
        from vlm_core.distill.asking import scoring_flops
        from vlm_core.sweeps.answers import answer_scores

        scores = answer_scores(self.subject, items, answers, batch_rows=self.batch_rows)
        self._took("scores", scoring_flops(self.subject, items, answers))
        return scores

    def _took(self, what: str, flops: int) -> None:
        self.operations[what] = self.operations.get(what, 0) + flops


class RecordedTeacher:
    """A teacher whose answers were recorded; see the module for the file.

    Attributes
    ----------
    operations : dict of str to float
        Of what it was asked: NaN, nobody knows what its answers took.

    Raises
    ------
    ValueError
        For a line that is not of that form, or two lines that answer the same question about the same picture differently.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.operations: dict[str, float] = {}
        if not self.path.is_file():
            raise ValueError(f"there is no file of recorded answers at '{self.path}'")
        content = self.path.read_bytes()
        self._sha256 = hashlib.sha256(content).hexdigest()
        self._lines: dict[tuple[str, str], dict] = {}
        try:
            lines = content.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"'{self.path}' is no UTF-8 text ({error.reason} at byte {error.start})") from error
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            line = _recorded(text, f"line {number} of '{self.path}'")
            key = line["image"], line["prompt"]
            if self._lines.setdefault(key, line) != line:
                raise ValueError(f"line {number} of '{self.path}' answers {line['prompt']!r} otherwise than an earlier line about that picture")
        if not self._lines:
            raise ValueError(f"'{self.path}' holds no recorded answers")

    def identity(self) -> dict[str, Any]:
        """``kind`` ``"recorded"``, the file with its hash, and the models that answered."""
        models = sorted({line["model"] for line in self._lines.values()})
        return {"kind": "recorded", "path": str(self.path), "sha256": self._sha256, "models": models, "questions": len(self._lines)}

    def answers(self, items: Sequence) -> list[str]:
        """The first recorded answer of each item."""
        self.operations["answers"] = math.nan
        return [line["answers"][0] for line in self._found(items)]

    def samples(self, items: Sequence, n: int, *, temperature: float = 1.0, seed: int = 0) -> list[tuple[str, ...]]:
        """The first ``n`` recorded samples, whatever the seed.

        Raises
        ------
        ValueError
            Where fewer were recorded, or at another temperature.
        """
        integer(n, "n", least=1)
        self.operations["samples"] = math.nan
        drawn = []
        for item, line in zip(take(items, range(len(items))), self._found(items), strict=True):
            samples = line["answers"][1:]
            if len(samples) < n:
                raise ValueError(f"'{self.path}' holds {len(samples)} samples for item {item_field(item, 'id')!r}, {n} were asked for")
            if line.get("temperature") not in (None, temperature):
                raise ValueError(f"'{self.path}' holds samples at temperature {line['temperature']}, not {temperature}: ask for those")
            drawn.append(tuple(samples[:n]))
        return drawn

    def scores(self, items: Sequence, answers: Sequence[str]) -> np.ndarray:
        """The recorded scores.

        Raises
        ------
        ValueError
            For an answer that was recorded without a score, or not at all: nobody can be asked any more.
        """
        from vlm_core.distill.instructions import require_answers

        require_answers(items, answers, "a teacher's scores")
        self.operations["scores"] = math.nan
        found = []
        for item, line, answer in zip(take(items, range(len(items))), self._found(items), answers, strict=True):
            known = dict(zip(line["answers"], line.get("scores", []), strict=False))
            if answer not in known:
                raise ValueError(f"'{self.path}' holds no score of the answer {answer!r} to item {item_field(item, 'id')!r}")
            found.append(-math.inf if known[answer] is None else known[answer])
        return np.array(found, dtype=float)

    def _found(self, items: Sequence) -> list[dict]:
        require_items(items, SHOWN)
        found = []
        for item in take(items, range(len(items))):
            line = self._lines.get((picture_digest(item_field(item, "image")), item_field(item, "prompt")))
            if line is None:
                raise ValueError(
                    f"'{self.path}' has no answer for item {item_field(item, 'id')!r} ({item_field(item, 'prompt')!r}): record it, or "
                    f"leave the item out"
                )
            found.append(line)
        return found


def record_answers(
    teacher: Teacher, items: Sequence, path: str | Path, samples: int = 0, *, temperature: float = 1.0, seed: int = 0, scores: bool = False
) -> Path:
    """Write what a teacher says to items, for a `RecordedTeacher`.

    Parameters
    ----------
    samples : int
        Sampled answers an item, after the teacher's own.
    scores : bool
        Also the score of every answer.

    Returns
    -------
    Path
        The file, which appears whole or not at all.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"'{path}' is a directory: name the file that the answers go to")
    integer(samples, "samples", least=0)
    require_items(items, SHOWN)
    items = _asked_once(take(items, range(len(items))))
    said = [(answer,) for answer in teacher.answers(items)]
    if samples:
        drawn = teacher.samples(items, samples, temperature=temperature, seed=seed)
        said = [first + tuple(more) for first, more in zip(said, drawn, strict=True)]
    identity = teacher.identity()
    model = identity.get("name") or " + ".join(identity.get("models", ())) or type(teacher).__name__
    values = None
    if scores:
        each = [(item, answer) for item, answers in zip(items, said, strict=True) for answer in answers]
        values = iter(teacher.scores([item for item, _ in each], [answer for _, answer in each]).tolist())
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for item, answers in zip(items, said, strict=True):
            line = {"image": picture_digest(item_field(item, "image")), "prompt": item_field(item, "prompt"), "answers": list(answers)}
            if values is not None:
                line["scores"] = [value if value > -math.inf else None for value in itertools.islice(values, len(answers))]
            if samples:
                line["temperature"] = temperature
            file.write(json.dumps({**line, "model": model}, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(path)
    return path


def _asked_once(items: Sequence) -> list:
    """The first of the items that ask the same about the same picture."""
    seen: dict[tuple[str, str], Any] = {}
    for item in items:
        seen.setdefault((picture_digest(item_field(item, "image")), item_field(item, "prompt")), item)
    return list(seen.values())


def _recorded(text: str, where: str) -> dict:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error.msg} at character {error.pos})") from error
    if not isinstance(line, dict):
        raise ValueError(f"{where} is a {type(line).__name__}: a JSON object with image, prompt, answers and model is needed")
    for name, kind in (("image", str), ("prompt", str), ("answers", list), ("model", str)):
        if not isinstance(line.get(name), kind):
            raise ValueError(f"{where} has {name} {line.get(name)!r:.40}: a {'text' if kind is str else 'list of texts'} is needed")
    if not line["answers"] or not all(isinstance(answer, str) for answer in line["answers"]):
        raise ValueError(f"{where} has answers {line['answers']!r:.60}: a list of at least one text is needed")
    scores = line.get("scores", [])
    numbers = isinstance(scores, list) and all(score is None or _number(score) for score in scores)
    if not numbers or ("scores" in line and len(scores) != len(line["answers"])):
        raise ValueError(f"{where} has scores {scores!r:.60}: one number for each of its {len(line['answers'])} answers is needed")
    temperature = line.get("temperature")
    if temperature is not None and not _number(temperature):
        raise ValueError(f"{where} has temperature {temperature!r:.40}: a number is needed, or none at all")
    return line


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
