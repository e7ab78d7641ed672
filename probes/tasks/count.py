"""Counting: "how many circles are there ?", one to four."""

import dataclasses

from .question import NUMBERS, Question, Task, choose, plural


def ask(scene, rng):
    shape = choose(sorted({o.shape for o in scene.objects}), rng)
    counted = scene.with_shape(shape)
    rest = [o for o in scene.objects if o.shape != shape]
    if len(counted) > len(NUMBERS) or not rest:
        return None
    if len(counted) > 1:  # one counted object turns into something else
        loser = choose(counted, rng)
        partner, partner_count = scene.replace(dataclasses.replace(loser, shape=choose(rest, rng).shape)), len(counted) - 1
    else:
        winner = choose(rest, rng)
        partner, partner_count = scene.replace(dataclasses.replace(winner, shape=shape)), len(counted) + 1
    return Question(
        prompt=f"how many {plural(shape)} are there ?",
        paraphrase=f"what is the number of {plural(shape)} ?",
        answer=NUMBERS[len(counted) - 1],
        candidates=NUMBERS,
        target=tuple(o.id for o in counted),
        partner=partner,
        partner_answer=NUMBERS[partner_count - 1],
    )


TASK = Task("count", "count the objects of a given shape", ask, NUMBERS)
