"""The probe tasks behind one registry.

``TASKS`` maps a name to its `Task`; ``GROUNDING_TASKS`` are the names the confirmatory claims are about.  A new task is one module
with a ``TASK`` and one entry here.
"""

from . import binding, caption, color, count, identification, needle, position, relation, shape
from .question import Question, Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (color, shape, count, relation, binding, position, needle, identification, caption)
}
GROUNDING_TASKS: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.grounding)

__all__ = ["GROUNDING_TASKS", "TASKS", "Question", "Task"]
