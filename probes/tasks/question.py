"""What a task asks of a scene: the `Question` and `Task` records, and the words they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ..scene import Scene, SceneObject

NUMBERS = ("one", "two", "three", "four")
PLURALS = {"cross": "crosses"}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one scene.

    ``partner`` is the counterfactual scene, the same picture with one attribute swapped so that the right answer becomes
    ``partner_answer``; ``target`` holds the ids of the objects the answer is read from (empty: the dot).
    """

    prompt: str
    paraphrase: str
    answer: str
    candidates: tuple[str, ...]
    target: tuple[int, ...]
    partner: Scene
    partner_answer: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A probe task.  ``ask`` returns None where the scene admits no unambiguous question of this kind."""

    name: str
    description: str
    ask: Callable[[Scene, np.random.Generator], Question | None]
    answers: tuple[str, ...] | None  # None: open answers (captions), not balanced
    grounding: bool = True  # counted in the confirmatory claims


def plural(shape: str) -> str:
    """The plural word of a shape."""
    return PLURALS.get(shape, shape + "s")


def choose(options, rng: np.random.Generator):
    """One of the options at random, the same draw for lists of dataclasses as for lists of strings."""
    return options[int(rng.integers(len(options)))]


def other_than(value: str, options, rng: np.random.Generator) -> str:
    """A random option different from the value."""
    return choose([o for o in options if o != value], rng)


def cell_words(obj: SceneObject) -> str:
    """``row two column three``: the cell of an object in words."""
    return f"row {NUMBERS[obj.row]} column {NUMBERS[obj.column]}"
