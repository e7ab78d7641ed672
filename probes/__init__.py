"""Procedural probes: scenes whose every answer, mask and counterfactual is known.

``build(split)`` gives a balanced `datasets.Dataset`, ``items_of(dataset)`` its items; ``TASKS`` is the registry; ``CARD.md`` is the data card.
"""

from .dataset import assert_disjoint, build, content_hash, debug_set, items_of, on_disk, scene_stream, target_mask
from .render import object_box, object_mask, patch_mask, render
from .scene import Scene, sample_scene
from .tasks import GROUNDING_TASKS, TASKS, Question, Task

__all__ = [
    "GROUNDING_TASKS",
    "TASKS",
    "Question",
    "Scene",
    "Task",
    "assert_disjoint",
    "build",
    "content_hash",
    "debug_set",
    "items_of",
    "object_box",
    "object_mask",
    "on_disk",
    "patch_mask",
    "render",
    "sample_scene",
    "scene_stream",
    "target_mask",
]
