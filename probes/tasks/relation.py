"""Spatial relation: "is the circle left or right of the square ?", "is the circle above or below the square ?"."""

from ..scene import CELLS, moved
from .question import Question, Task, choose


def ask(scene, rng):
    objects = scene.unique_by("shape")
    horizontal = bool(rng.integers(2))
    axis, before, after = ("column", "left", "right") if horizontal else ("row", "above", "below")
    pairs = [(a, b) for a in objects for b in objects if getattr(a, axis) != getattr(b, axis)]
    if not pairs:
        return None
    first, second = choose(pairs, rng)
    is_before = getattr(first, axis) < getattr(second, axis)
    # the partner moves the first object to the other side of the second, within its own row (or column) where a cell is free
    free = [
        (r, c)
        for r, c in scene.free_cells()
        if (r == first.row if horizontal else c == first.column)
        and (((c if horizontal else r) > getattr(second, axis)) if is_before else ((c if horizontal else r) < getattr(second, axis)))
    ]
    if not free:
        return None
    row, column = choose(free, rng)
    assert 0 <= row < CELLS and 0 <= column < CELLS
    side = f"{before} or {after}" + (" of" if horizontal else "")
    return Question(
        prompt=f"is the {first.shape} {side} the {second.shape} ?",
        paraphrase=f"{side} the {second.shape} : where is the {first.shape} ?",
        answer=before if is_before else after,
        candidates=(before, after),
        target=(first.id, second.id),
        partner=scene.replace(moved(first, row, column, rng)),
        partner_answer=after if is_before else before,
    )


TASK = Task("relation", "say on which side of one object another one is", ask, ("left", "right", "above", "below"))
