"""Shape: "what shape is the red object ?" where the scene holds one red object."""

import dataclasses

from ..scene import SHAPES
from .question import Question, Task, choose, other_than


def ask(scene, rng):
    objects = scene.unique_by("color")
    if not objects:
        return None
    target = choose(objects, rng)
    swapped = other_than(target.shape, SHAPES, rng)
    return Question(
        prompt=f"what shape is the {target.color} object ?",
        paraphrase=f"the {target.color} object has which shape ?",
        answer=target.shape,
        candidates=SHAPES,
        target=(target.id,),
        partner=scene.replace(dataclasses.replace(target, shape=swapped)),
        partner_answer=swapped,
    )


TASK = Task("shape", "name the shape of the object with a given colour", ask, SHAPES)
