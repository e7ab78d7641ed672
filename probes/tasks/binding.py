"""Text-image binding: does "a red circle and a blue square" fit, when the false captions swap the colours of two objects that are there?"""

from ..scene import recolored
from .question import Question, Task, choose


def ask(scene, rng):
    have = {(o.color, o.shape) for o in scene.objects}
    pairs = [
        (a, b)
        for a in scene.objects
        for b in scene.objects
        if a.color != b.color and a.shape != b.shape and (b.color, a.shape) not in have and (a.color, b.shape) not in have
    ]
    if not pairs:
        return None
    first, second = choose(pairs, rng)
    fits = bool(rng.integers(2))
    c1, c2 = (first.color, second.color) if fits else (second.color, first.color)
    caption = f"a {c1} {first.shape} and a {c2} {second.shape}"
    partner = scene.replace(recolored(first, second.color, rng), recolored(second, first.color, rng))
    if fits and {(first.color, first.shape), (second.color, second.shape)} & {(o.color, o.shape) for o in partner.objects}:
        return None  # a twin of the object keeps the caption half true
    return Question(
        prompt=f"is there {caption} ?",
        paraphrase=f"does this caption fit : {caption} ?",
        answer="yes" if fits else "no",
        candidates=("yes", "no"),
        target=(first.id, second.id),
        partner=partner,
        partner_answer="no" if fits else "yes",
    )


TASK = Task("binding", "tell a caption from the same caption with two colours swapped", ask, ("yes", "no"))
