"""Colour: "what color is the circle ?" where the scene holds one circle."""

from ..scene import COLORS, recolored
from .question import Question, Task, choose, other_than


def ask(scene, rng):
    objects = scene.unique_by("shape")
    if not objects:
        return None
    target = choose(objects, rng)
    swapped = other_than(target.color, tuple(COLORS), rng)
    return Question(
        prompt=f"what color is the {target.shape} ?",
        paraphrase=f"the {target.shape} has which color ?",
        answer=target.color,
        candidates=tuple(COLORS),
        target=(target.id,),
        partner=scene.replace(recolored(target, swapped, rng)),
        partner_answer=swapped,
    )


TASK = Task("color", "name the colour of the object with a given shape", ask, tuple(COLORS))
