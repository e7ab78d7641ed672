"""Procedural probes: scenes whose every answer, mask and counterfactual is known.

``build(split)`` gives a balanced `datasets.Dataset`, ``items_of(dataset)`` its items; ``TASKS`` is the registry; ``CARD.md`` is the data card. What makes
sets of items is loaded on first use: ``datasets`` takes a second to import.
"""

from vlm_core.lazily import exported

from .render import object_box, object_mask, patch_mask, render
from .scene import Scene, sample_scene
from .tasks import GROUNDING_TASKS, TASKS, Question, Task

_HOMES = {"dataset": ("assert_disjoint", "build", "content_hash", "debug_set", "items_of", "on_disk", "scene_stream", "target_mask")}
__getattr__, _, _SETS = exported(__name__, _HOMES)

__all__ = [
    "GROUNDING_TASKS",
    "TASKS",
    "Question",
    "Scene",
    "Task",
    "object_box",
    "object_mask",
    "patch_mask",
    "render",
    "sample_scene",
    *_SETS,
]


def __dir__() -> list[str]:
    return __all__
