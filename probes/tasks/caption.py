"""Captions: every object with its shape, colour and cell; the wrong candidates swap one attribute."""

import dataclasses

from ..scene import COLORS, SHAPES, Scene, recolored
from .question import Question, Task, cell_words, choose, other_than


def describe(objects) -> str:
    """The caption of these objects, in the order given."""
    return " ; ".join(f"the {o.shape} is {o.color} at {cell_words(o)}" for o in objects)


def caption(scene: Scene) -> str:
    """The caption of a scene: objects in reading order."""
    return describe(sorted(scene.objects, key=lambda o: (o.row, o.column)))


def ask(scene, rng):
    target = choose(scene.objects, rng)
    recoloured = scene.replace(recolored(target, other_than(target.color, tuple(COLORS), rng), rng))
    reshaped = scene.replace(dataclasses.replace(target, shape=other_than(target.shape, SHAPES, rng)))
    right, wrong = caption(scene), (caption(recoloured), caption(reshaped))
    order = rng.permutation(3)
    return Question(
        prompt="describe the image .",
        paraphrase="what is in the image ?",
        answer=right,
        candidates=tuple((right, *wrong)[i] for i in order),
        target=tuple(o.id for o in scene.objects),
        partner=recoloured,
        partner_answer=wrong[0],
    )


TASK = Task("caption", "describe every object: its shape, colour and cell", ask, None, grounding=False)
