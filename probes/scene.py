"""Scenes: what is in a probe image, before a single pixel is drawn.

A scene is a few objects on a 4 × 4 layout of cells plus one tiny dot (the *detail* of the needle task).  Everything about it follows
from a seed, so a scene is its own ground truth: every answer, mask and counterfactual is derived from it, never from pixels.

Exports: ``COLORS``, ``SHAPES``, ``SIZES``, ``SceneObject``, ``Detail``, ``Scene``, ``sample_scene``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np

IMAGE_SIZE = 64  # pixels, square
CELLS = 4  # rows and columns of the layout
CELL_SIZE = IMAGE_SIZE // CELLS

COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (236, 206, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = {"small": 4.8, "large": 6.8}  # radius in pixels
BACKGROUNDS = ("plain", "gradient", "noise", "stripes")


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object.  ``center`` is (x, y) and ``radius`` a length, both in pixels; ``angle`` is in degrees; ``row``/``column`` count cells from 0."""

    id: int
    shape: str
    color: str
    size: str
    row: int
    column: int
    center: tuple[float, float]
    radius: float
    angle: float
    tint: tuple[int, int, int]  # what is really drawn: the named colour, jittered


@dataclasses.dataclass(frozen=True)
class Detail:
    """The tiny dot of the needle task; ``center`` is (x, y) in pixels."""

    color: str
    row: int
    column: int
    center: tuple[float, float]
    radius: float
    tint: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects, the dot and the background; ``seed`` only feeds the background's texture."""

    objects: tuple[SceneObject, ...]
    detail: Detail
    background: str
    shade: int
    seed: int

    def as_dict(self) -> dict:
        """Builtins only, the JSON that `content_hash` and the dataset's ``objects`` column hold."""
        return dataclasses.asdict(self)

    @property
    def content_hash(self) -> str:
        """Hash of everything drawn; two scenes with the same hash are the same picture."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def with_shape(self, shape: str) -> list[SceneObject]:
        """All objects of this shape."""
        return [o for o in self.objects if o.shape == shape]

    def unique_by(self, attribute: str) -> list[SceneObject]:
        """Objects whose ``shape`` or ``color`` no other object of the scene has."""
        counts = Counter(getattr(o, attribute) for o in self.objects)
        return [o for o in self.objects if counts[getattr(o, attribute)] == 1]

    def replace(self, *changed: SceneObject, detail: Detail | None = None) -> "Scene":
        """The same scene with some objects (matched by id) or the dot exchanged: a counterfactual."""
        by_id = {o.id: o for o in changed}
        objects = tuple(by_id.get(o.id, o) for o in self.objects)
        return dataclasses.replace(self, objects=objects, detail=detail or self.detail)

    def free_cells(self) -> list[tuple[int, int]]:
        """(row, column) of the cells that hold neither an object nor the dot."""
        taken = {(o.row, o.column) for o in self.objects} | {(self.detail.row, self.detail.column)}
        return [(r, c) for r in range(CELLS) for c in range(CELLS) if (r, c) not in taken]


def tint(color: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """The named colour with a little jitter, so that no colour is one exact RGB value."""
    return tuple(int(np.clip(v + rng.integers(-18, 19), 0, 255)) for v in COLORS[color])


def center_in(row: int, column: int, radius: float, rng: np.random.Generator) -> tuple[float, float]:
    """A jittered centre (x, y) that keeps a disc of this radius inside its cell."""
    slack = max(CELL_SIZE / 2 - radius - 0.5, 0.0)
    dx, dy = rng.uniform(-slack, slack, size=2)
    return (round((column + 0.5) * CELL_SIZE + dx, 2), round((row + 0.5) * CELL_SIZE + dy, 2))


def recolored(thing, color: str, rng: np.random.Generator):
    """The object or dot in another named colour."""
    return dataclasses.replace(thing, color=color, tint=tint(color, rng))


def moved(obj: SceneObject, row: int, column: int, rng: np.random.Generator) -> SceneObject:
    """The object in another cell."""
    return dataclasses.replace(obj, row=row, column=column, center=center_in(row, column, obj.radius, rng))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: one shape repeated one to four times, one to three other shapes once each, a dot in a free cell.

    Repeating one shape gives counting something to count while the others stay nameable by shape alone.
    """
    repeated, *others = rng.permutation(SHAPES).tolist()
    shapes = [repeated] * int(rng.integers(1, 5)) + others[: int(rng.integers(1, 4))]
    shapes = rng.permutation(shapes).tolist()
    cells = rng.permutation(CELLS * CELLS)
    objects = []
    for i, shape in enumerate(shapes):
        row, column = divmod(int(cells[i]), CELLS)
        size = str(rng.choice(list(SIZES)))
        radius = round(SIZES[size] + float(rng.uniform(-0.4, 0.4)), 2)
        color = str(rng.choice(list(COLORS)))
        angle = round(float(rng.uniform(-12, 12)), 1)
        objects.append(SceneObject(i, shape, color, size, row, column, center_in(row, column, radius, rng), radius, angle, tint(color, rng)))
    row, column = divmod(int(cells[len(shapes)]), CELLS)
    color = str(rng.choice(list(COLORS)))
    radius = round(float(rng.uniform(1.5, 2.0)), 2)
    x, y = ((column + 0.5) * CELL_SIZE, (row + 0.5) * CELL_SIZE)
    dx, dy = rng.uniform(-5, 5, size=2)
    detail = Detail(color, row, column, (round(x + dx, 2), round(y + dy, 2)), radius, tint(color, rng))
    return Scene(tuple(objects), detail, str(rng.choice(BACKGROUNDS)), int(rng.integers(150, 226)), int(rng.integers(2**31)))
