"""Needle: the colour of a dot three to four pixels wide, somewhere in the background."""

from ..scene import COLORS, recolored
from .question import Question, Task, other_than


def ask(scene, rng):
    swapped = other_than(scene.detail.color, tuple(COLORS), rng)
    return Question(
        prompt="what color is the dot ?",
        paraphrase="the dot has which color ?",
        answer=scene.detail.color,
        candidates=tuple(COLORS),
        target=(),
        partner=scene.replace(detail=recolored(scene.detail, swapped, rng)),
        partner_answer=swapped,
    )


TASK = Task("needle", "name the colour of a tiny dot hidden in the background", ask, tuple(COLORS))
