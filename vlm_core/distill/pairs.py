"""Which of two answers is preferred, from three sources, and what controls train on instead.

``Pair``                                           one preference
``teacher_ranked``                                 the sample that the teacher scores highest over the one it scores lowest
``teacher_against_student``                        the teacher's answer over the student's
``rubric``                                         a right sample over a wrong one, by exact match
``preference_set(items, pairs)``                   a TRL data set of them
``swapped_images``, ``swapped_preferences``, ``shuffled_answers``   the same data with what should teach taken out
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
import numpy as np

from vlm_core.distill.instructions import conversations, require_answers, stored_images
from vlm_core.identity import picture_digest
from vlm_core.items import item_field, plain, require_distinct, require_items, take

if TYPE_CHECKING:
    from vlm_core.distill.teachers import Teacher

__all__ = [
    "Pair",
    "preference_set",
    "rubric",
    "shuffled_answers",
    "swapped_images",
    "swapped_preferences",
    "teacher_against_student",
    "teacher_ranked",
]


@dataclass(frozen=True)
class Pair:
    """One answer preferred to another.

    Parameters
    ----------
    item : str
        Id of the item that both answer.
    chosen, rejected : str
    source : {"teacher_ranked", "teacher_against_student", "rubric"}
    margin : float or None
        By how much, in the source's own scores; None where nobody scored them.
    """

    item: str
    chosen: str
    rejected: str
    source: str
    margin: float | None = None

    def __post_init__(self) -> None:
        for name in ("chosen", "rejected"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"the {name} answer of item {self.item!r} is {getattr(self, name)!r}: a text is needed")
        if plain(self.chosen) == plain(self.rejected):
            raise ValueError(f"item {self.item!r}: chosen and rejected are both {self.chosen!r}, which prefers nothing")


def teacher_ranked(items: Sequence, samples: Sequence[Sequence[str]], teacher: Teacher, at_least: float = 0.0) -> list[Pair]:
    """Of each item's samples the one that the teacher scores highest over the one that it scores lowest.

    Parameters
    ----------
    samples : sequence of sequences of str
        Of the student, of the teacher, or of both; one sequence an item.
    at_least : float
        Smallest margin (nats, for a subject as teacher); an item whose samples are closer, or all the same, gives no pair.

    Returns
    -------
    list of Pair
        ``margin`` is the difference of scores, ``inf`` where the teacher cannot write the rejected answer.
    """
    items = _with_samples(items, samples)
    distinct = [_distinct(said) for said in samples]
    flat = [(number, answer) for number, answers in enumerate(distinct) if len(answers) > 1 for answer in answers]
    if not flat:
        return []
    scores = teacher.scores([items[number] for number, _ in flat], [answer for _, answer in flat])
    ranked: dict[int, list[tuple[float, str]]] = {}
    for (number, answer), score in zip(flat, np.asarray(scores, dtype=float).tolist(), strict=True):
        if math.isnan(score):
            raise ValueError(f"the teacher's score of {answer!r} for item {item_field(items[number], 'id')!r} is not a number")
        ranked.setdefault(number, []).append((score, answer))
    pairs = []
    for number, answers in ranked.items():
        best, worst = max(answers, key=lambda one: one[0]), min(answers, key=lambda one: one[0])
        margin = best[0] - worst[0] if best[0] > worst[0] else 0.0
        if margin > 0 and margin >= at_least:
            pairs.append(Pair(str(item_field(items[number], "id")), best[1], worst[1], "teacher_ranked", margin))
    return pairs


def teacher_against_student(items: Sequence, taught: Sequence[str], said: Sequence[str], teacher: Teacher | None = None) -> list[Pair]:
    """The teacher's answer over the student's, wherever they differ in more than case, punctuation and spacing.

    Parameters
    ----------
    taught, said : sequence of str
        What the teacher and the student answer, one an item.
    teacher : Teacher, optional
        To give each pair its margin: by how much the teacher's score of its own answer exceeds that of the student's.
    """
    require_answers(items, taught, "a preference")
    require_answers(items, said, "a preference")
    items, taught, said = take(items, range(len(items))), list(taught), list(said)
    apart = [
        number
        for number, (one, other) in enumerate(zip(map(plain, taught), map(plain, said), strict=True))
        if one and other and one != other
    ]
    margins: list[float | None] = [None] * len(apart)
    if teacher is not None and apart:
        both = teacher.scores([items[n] for n in apart] * 2, [taught[n] for n in apart] + [said[n] for n in apart])
        margins = (both[: len(apart)] - both[len(apart) :]).tolist()
    return [
        Pair(str(item_field(items[n], "id")), taught[n], said[n], "teacher_against_student", margin)
        for n, margin in zip(apart, margins, strict=True)
    ]


def rubric(items: Sequence, samples: Sequence[Sequence[str]]) -> list[Pair]:
    """A sample that is right over the commonest that is wrong, by exact match with the item's answer ignoring case and punctuation.

    An item all of whose samples are right, or all wrong, gives no pair. ``margin`` is how much commoner the right ones are among the
    samples than the rejected one, -1 to 1.
    """
    items = _with_samples(items, samples)
    pairs = []
    for item, said in zip(items, samples, strict=True):
        answer = item_field(item, "answer")
        if not isinstance(answer, str):
            raise ValueError(f"item {item_field(item, 'id')!r} has no known answer: a rubric of exact match needs one")
        right = [one for one in said if plain(one) == plain(answer)]
        wrong = [one for one in said if plain(one) and plain(one) != plain(answer)]
        if right and wrong:
            counts = Counter(map(plain, wrong))
            worst = next(one for one in wrong if counts[plain(one)] == max(counts.values()))
            margin = (len(right) - counts[plain(worst)]) / len(said)
            pairs.append(Pair(str(item_field(item, "id")), right[0], worst, "rubric", margin))
    return pairs


def preference_set(items: Sequence, pairs: Sequence[Pair]) -> datasets.Dataset:
    """A preference set in TRL's conversational form, one row a pair.

    Parameters
    ----------
    items : sequence of items
        Those of the pairs among them.

    Returns
    -------
    datasets.Dataset
        Columns ``images`` (a list), ``prompt``, ``chosen``, ``rejected`` (one message each).

    Raises
    ------
    ValueError
        For a pair of an item that is not there.
    """
    require_items(items, ("id", "image", "prompt"))
    require_distinct(items)
    by_id = {str(item_field(item, "id")): item for item in take(items, range(len(items)))}
    for pair in pairs:
        if pair.item not in by_id:
            raise ValueError(f"a pair is about item {pair.item!r}, which is not among the {len(by_id)} items")
    stored = stored_images([by_id[pair.item] for pair in pairs])
    rows = [
        {
            "images": images,
            "prompt": [{"role": "user", "content": item_field(by_id[pair.item], "prompt")}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for images, pair in zip(stored, pairs, strict=True)
    ]
    return conversations(rows, "prompt", "chosen", "rejected")


def swapped_images(data: datasets.Dataset, seed: int) -> datasets.Dataset:
    """The same rows with another picture each, never the own: a student that learns as much from them does not use its eyes.

    The distinct pictures (by their pixels) change places in one cycle, so that rows about one picture are again about one.

    Parameters
    ----------
    data : datasets.Dataset
        With a column ``images``.

    Raises
    ------
    ValueError
        Without such a column, or where all rows show one picture.
    """
    if "images" not in data.column_names:
        raise ValueError(f"swapped_images needs a column 'images' (the data set has {', '.join(data.column_names)})")
    shown = [picture_digest(images) for images in data["images"]]
    first = {digest: row for row, digest in reversed(list(enumerate(shown)))}
    pictures = sorted(first)
    if len(pictures) < 2:
        raise ValueError(f"all {len(data)} rows show one picture: there is no other to swap it with")
    order = [pictures[int(place)] for place in np.random.default_rng(seed).permutation(len(pictures))]
    other = dict(zip(order, [*order[1:], order[0]], strict=True))
    table = data.with_format("arrow")[:]
    column = table.column_names.index("images")
    images = table["images"].take([first[other[digest]] for digest in shown])
    table = table.set_column(column, table.schema.field(column), images)
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=data.features))


def swapped_preferences(data: datasets.Dataset) -> datasets.Dataset:
    """The same pairs with chosen and rejected in each other's place.

    Raises
    ------
    ValueError
        For what is no preference set.
    """
    missing = [name for name in ("chosen", "rejected") if name not in data.column_names]
    if missing:
        raise ValueError(f"swapped_preferences needs a column '{missing[0]}' (the data set has {', '.join(data.column_names)})")
    return data.rename_columns({"chosen": "rejected", "rejected": "chosen"}).select_columns(data.column_names)


def shuffled_answers(items: Sequence, answers: Sequence[str], seed: int) -> list[str]:
    """Answers dealt out anew within each task, as few as possible to an item that had the same.

    Every task keeps its answers as often as they were. An item keeps its answer only where more than half of its task has that one.

    Parameters
    ----------
    items : sequence of items
        With ``task``.
    """
    require_answers(items, answers, "shuffling")
    generator, answers = np.random.default_rng(seed), list(answers)
    by_task: dict[str, list[int]] = {}
    for number, item in enumerate(take(items, range(len(items)))):
        by_task.setdefault(str(item_field(item, "task")), []).append(number)
    shuffled = answers.copy()
    for task in sorted(by_task):
        numbers = by_task[task]
        own = [answers[number] for number in numbers]
        for number, place in zip(numbers, _derangement(own, generator), strict=True):
            shuffled[number] = own[place]
    return shuffled


def _derangement(values: list[str], generator: np.random.Generator) -> list[int]:
    """A random order in which as few as possible keep their value.

    One that has kept ``a`` trades with any that neither had nor got an ``a``; where there is none, all others had or got one, which is
    the fewest that can keep it.
    """
    order = list(range(len(values)))

    def trades(place: int, other: int) -> bool:
        return values[other] != values[place] and values[order[other]] != values[place]

    for place in generator.permutation(len(values)).tolist():
        if values[order[place]] != values[place]:
            continue
        # Nearly always one of a few drawn at random will do; all are looked through where none does.
        others = [other for other in generator.integers(len(values), size=16).tolist() if trades(place, other)][:1]
        others = others or [other for other in range(len(values)) if trades(place, other)]
        if others:
            other = others[int(generator.integers(len(others)))]
            order[place], order[other] = order[other], order[place]
    return order


def _with_samples(items: Sequence, samples: Sequence[Sequence[str]]) -> list:
    require_items(items, ("id", "image", "prompt"))
    if len(items) != len(samples):
        raise ValueError(f"{len(items)} items but samples of {len(samples)}: give each item its samples")
    for number, said in enumerate(samples):
        if isinstance(said, str) or not all(isinstance(one, str) for one in said):
            raise ValueError(f"the samples of item {number} are {said!r:.60}: a list of str is needed")
    return take(items, range(len(items)))


def _distinct(said: Sequence[str]) -> list[str]:
    """The samples that differ in more than case, punctuation and spacing, in their order; empty ones are none."""
    seen: dict[str, str] = {}
    for one in said:
        if plain(one):
            seen.setdefault(plain(one), one)
    return list(seen.values())
