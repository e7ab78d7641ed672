"""Position: "where is the circle ?", the quarter of the image in two words."""

from ..scene import CELLS, moved
from .question import Question, Task, choose

QUARTERS = ("top left", "top right", "bottom left", "bottom right")


def quarter(row: int, column: int) -> str:
    """The quarter of the image a cell lies in."""
    return f"{'top' if row < CELLS // 2 else 'bottom'} {'left' if column < CELLS // 2 else 'right'}"


def ask(scene, rng):
    objects = scene.unique_by("shape")
    if not objects:
        return None
    target = choose(objects, rng)
    answer = quarter(target.row, target.column)
    free = [cell for cell in scene.free_cells() if quarter(*cell) != answer]
    if not free:
        return None
    row, column = choose(free, rng)
    return Question(
        prompt=f"where is the {target.shape} ?",
        paraphrase=f"in which corner is the {target.shape} ?",
        answer=answer,
        candidates=QUARTERS,
        target=(target.id,),
        partner=scene.replace(moved(target, row, column, rng)),
        partner_answer=quarter(row, column),
    )


TASK = Task("position", "say in which quarter of the image an object is", ask, QUARTERS)
