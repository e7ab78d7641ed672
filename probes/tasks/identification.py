"""Identification: "what is at row two column three ?", the question whose answer sits in one object's own tokens."""

import dataclasses

from ..scene import SHAPES
from .question import Question, Task, cell_words, choose, other_than


def ask(scene, rng):
    target = choose(scene.objects, rng)
    swapped = other_than(target.shape, SHAPES, rng)
    return Question(
        prompt=f"what is at {cell_words(target)} ?",
        paraphrase=f"which shape is at {cell_words(target)} ?",
        answer=target.shape,
        candidates=SHAPES,
        target=(target.id,),
        partner=scene.replace(dataclasses.replace(target, shape=swapped)),
        partner_answer=swapped,
    )


TASK = Task("identification", "name the shape at a given row and column", ask, SHAPES, grounding=False)
