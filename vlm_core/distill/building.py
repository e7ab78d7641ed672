"""What a student is taught, built as a configuration declares it: the teacher's answers, filters, pairs, and the card that counts them.

``Lessons``   items with what is taught about them; ``data(stage, student)`` gives a stage its data set, ``card()`` the data card
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import datasets

from vlm_core.distill.card import data_card
from vlm_core.distill.config import DistillConfig, OnPolicy, Preference
from vlm_core.distill.filters import Kept, agreeing, deduplicated, self_consistent, within_length, writable
from vlm_core.distill.grounded import by_asking, by_box, grounded_answers
from vlm_core.distill.instructions import instruction_set, prompt_set
from vlm_core.distill.leakage import leaks, require_disjoint
from vlm_core.distill.pairs import Pair, preference_set, rubric, teacher_against_student, teacher_ranked
from vlm_core.distill.teachers import Teacher, record_answers
from vlm_core.files import write_whole
from vlm_core.sources import named_function

__all__ = ["Lessons"]


class Lessons:
    """What is taught.

    The data card (and, of a teacher that is asked here, its answers as a file that a recorded teacher reads) is written to ``config.out``.

    Parameters
    ----------
    config : DistillConfig
    items : list of items
        All that might be taught.
    evaluated : mapping of name to items
        What must not be.
    teacher : Teacher
    tokenizer : transformers tokenizer
        The student's: answers that it has no tokens for are not taught.
    say : callable
        Told, in words, what happens.

    Attributes
    ----------
    items, answers : list
        What is left after filters, one answer an item.

    Raises
    ------
    ValueError
        One sentence: items leaked where that is refused, or a filter left nothing.
    """

    def __init__(
        self, config: DistillConfig, items: list[dict], evaluated: Mapping[str, Sequence], teacher: Teacher, tokenizer, say: Callable[[str], None]
    ) -> None:
        self.config, self.teacher, self.say, self._tokenizer = config, teacher, say, tokenizer
        self._filters: list[Kept] = []
        self._pairs: list[Pair] = []
        self._leaks = leaks(items, evaluated)
        how, filters = config.answers, config.filters
        if len(self._leaks) and config.leaked == "refuse":
            try:
                require_disjoint(items, evaluated)
            except ValueError as error:
                raise ValueError(f"{error}; or write leaked = 'drop' to teach without them") from error
        if len(self._leaks):
            (items,) = self._keep(_without(items, set(self._leaks["item"])), items)
        if filters.deduplicated:
            (items,) = self._keep(deduplicated(items), items)
        say(f"the teacher answers {len(items)} questions")
        if how.kind == "self-consistent":
            samples = teacher.samples(items, how.samples, temperature=how.temperature, seed=config.seed)
            if filters.agreement is not None:
                items, samples = self._keep(agreeing(samples, filters.agreement), items, samples)
            answers, _ = self_consistent(samples)
        else:
            answers = teacher.answers(items)
        items, answers = self._keep(within_length(answers, filters.longest, filters.shortest), items, answers)
        items, answers = self._keep(writable(answers, tokenizer), items, answers)
        if how.kind == "grounded":
            answers = grounded_answers(items, answers, self._where(items), how.template)
        self.items, self.answers = items, answers
        if config.teacher.path is not None:
            record_answers(teacher, items, Path(config.out) / "teacher-answers.jsonl")
        self.card()

    def data(self, stage, student: Teacher) -> datasets.Dataset:
        """The data set of a stage, for the student that enters it.

        Raises
        ------
        ValueError
            Where there is no pair to learn from.
        """
        if isinstance(stage, OnPolicy):
            return prompt_set(self.items)
        if not isinstance(stage, Preference):
            return instruction_set(self.items, self.answers)
        how = stage.pairs
        if how.source == "against-student":
            self.say(f"{stage.name}: the student answers {len(self.items)} questions")
            answers = dict(zip((item["id"] for item in self.items), self.answers, strict=True))
            items, said = self._fit([[one] for one in student.answers(self.items)])
            pairs = teacher_against_student(items, [answers[item["id"]] for item in items], [one for (one,) in said])
        else:
            self.say(f"{stage.name}: the {how.of} draws {how.samples} answers to each of {len(self.items)} questions")
            asked = student if how.of == "student" else self.teacher
            samples = asked.samples(self.items, how.samples, temperature=how.temperature, seed=self.config.seed)
            items, samples = self._fit(samples)
            pairs = rubric(items, samples) if how.source == "rubric" else teacher_ranked(items, samples, self.teacher)
        if not pairs:
            raise ValueError(
                f"stage '{stage.name}' has no pair to learn from: all answers to each question are alike (source = '{how.source}'): "
                f"draw more samples, or take another source"
            )
        self.say(f"{stage.name}: {len(pairs)} pairs of {len(self.items)} questions")
        self._pairs += pairs
        self.card()
        return preference_set(self.items, pairs)

    def _fit(self, samples: Sequence[Sequence[str]]) -> tuple[list[dict], list[list[str]]]:
        """Items, and of what was drawn for each what might be taught: of the declared length, in words that the student has."""
        filters = self.config.filters
        flat = [(number, said) for number, drawn in enumerate(samples) for said in drawn]
        for fits in (lambda said: within_length(said, filters.longest, filters.shortest), lambda said: writable(said, self._tokenizer)):
            kept = fits([said for _, said in flat])
            (flat,) = self._keep(replace(kept, name=f"{kept.name}, answers to be paired"), flat, what="answers to be paired")
        left: dict[int, list[str]] = {}
        for number, said in flat:
            left.setdefault(number, []).append(said)
        return [self.items[number] for number in left], list(left.values())

    def card(self) -> None:
        """Write the data card, ``data-card.md``."""
        config = self.config
        text = data_card(
            Path(config.out).name,
            self.items,
            self.answers,
            licence=config.licence,
            kinds=config.answers.kind,
            teacher=self.teacher,
            filters=self._filters,
            pairs=self._pairs,
            leakage=self._leaks,
            evaluated=tuple(config.evaluation),
            source=_source(config.data),
        )
        write_whole(Path(config.out) / "data-card.md", text)

    def _keep(self, kept: Kept, *values: list, what: str = "items") -> list[list]:
        self._filters.append(kept)
        for reason, n in kept.dropped.items():
            self.say(f"{n} of {len(values[0])} {what} dropped: {reason}")
        if not kept.kept:
            raise ValueError(f"the filter '{kept.name}' leaves none of the {len(values[0])} {what}: there is nothing to teach")
        return [kept.of(one) for one in values]

    def _where(self, items: list[dict]) -> Callable:
        where = self.config.answers.where
        if where.box is not None:
            return by_box(where.box, where.rows, where.columns)
        if where.question is not None:
            return by_asking(self.teacher, items, where.question)
        return named_function(where.function, "answers.where.function")


def _source(items) -> str:
    if items.factory is not None:
        return f"`{items.factory}` with {json.dumps(dict(items.arguments))}"
    return f"`{items.path}`, split {items.split}" + (f", revision {items.revision}" if items.revision else "")


def _without(items: list[dict], names: set[str]) -> Kept:
    kept = tuple(number for number, item in enumerate(items) if str(item["id"]) not in names)
    return Kept("leakage", kept, {"a picture of an evaluation set": len(items) - len(kept)})
