"""Pixels, masks, boxes and patches of a scene.

Drawing is done at four times the size and averaged down, so edges are anti-aliased; a mask holds the pixels an object covers by more
than half.  ``patch_mask`` is the one map from an object to a grid of image patches or tokens.

Exports: ``render``, ``object_mask``, ``object_box``, ``detail_mask``, ``patch_mask``.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from .scene import IMAGE_SIZE, Detail, Scene, SceneObject

SUPERSAMPLING = 4


def _outline(shape: str, x: float, y: float, r: float, angle: float) -> list[tuple[float, float]]:
    if shape == "square":
        corners = [(r * 0.88, 45 + 90 * k) for k in range(4)]
        corners = [(radius * math.sqrt(2) * 0.9, a) for radius, a in corners]
    elif shape == "triangle":
        corners = [(r * 1.12, -90 + 120 * k) for k in range(3)]
    elif shape == "diamond":
        corners = [(r * (1.12 if k % 2 else 0.72), 90 * k) for k in range(4)]
    elif shape == "star":
        corners = [(r * (1.12 if k % 2 == 0 else 0.46), -90 + 36 * k) for k in range(10)]
    elif shape == "cross":
        w, h = 0.36 * r, 1.02 * r
        points = [(-w, -h), (w, -h), (w, -w), (h, -w), (h, w), (w, w), (w, h), (-w, h), (-w, w), (-h, w), (-h, -w), (-w, -w)]
        corners = [(math.hypot(px, py), math.degrees(math.atan2(py, px))) for px, py in points]
    else:
        raise ValueError(f"shape '{shape}' cannot be drawn: expected one of circle, square, triangle, diamond, star, cross")
    return [(x + q * math.cos(math.radians(a + angle)), y + q * math.sin(math.radians(a + angle))) for q, a in corners]


def _draw(draw: ImageDraw.ImageDraw, thing: SceneObject | Detail, fill) -> None:
    s = SUPERSAMPLING
    x, y, r = thing.center[0] * s, thing.center[1] * s, thing.radius * s
    if isinstance(thing, Detail) or thing.shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    else:
        draw.polygon(_outline(thing.shape, x, y, r, thing.angle), fill=fill)


def _background(scene: Scene) -> np.ndarray:
    rng = np.random.default_rng(scene.seed)
    n = IMAGE_SIZE
    y, x = np.mgrid[0:n, 0:n] / n
    base = np.full((n, n), float(scene.shade))
    if scene.background == "gradient":
        a = rng.uniform(0, 2 * np.pi)
        base += 40 * (np.cos(a) * (x - 0.5) + np.sin(a) * (y - 0.5))
    elif scene.background == "noise":
        base += rng.normal(0, 9, size=(n, n))
    elif scene.background == "stripes":
        a = rng.uniform(0, 2 * np.pi)
        base += 11 * np.sin(2 * np.pi * rng.uniform(3, 8) * (np.cos(a) * x + np.sin(a) * y) + rng.uniform(0, 2 * np.pi))
    return base


@functools.lru_cache(maxsize=4096)
def _coverage(thing: SceneObject | Detail) -> np.ndarray:
    s = SUPERSAMPLING
    canvas = Image.new("L", (IMAGE_SIZE * s, IMAGE_SIZE * s), 0)
    _draw(ImageDraw.Draw(canvas), thing, 255)
    return np.asarray(canvas.reduce(s), dtype=np.float32) / 255.0


def render(scene: Scene) -> Image.Image:
    """Draw the scene.

    Returns
    -------
    PIL.Image.Image
        RGB, 64 × 64 pixels, the same bytes in every process.
    """
    pixels = np.repeat(_background(scene)[:, :, None], 3, axis=2)
    for thing in (*scene.objects, scene.detail):
        alpha = _coverage(thing)[:, :, None]
        pixels = pixels * (1 - alpha) + np.asarray(thing.tint, dtype=np.float64) * alpha
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "RGB")


def object_mask(obj: SceneObject) -> np.ndarray:
    """Pixels the object covers by more than half: bool, ``[64, 64]`` (row, column)."""
    return _coverage(obj) > 0.5


def detail_mask(detail: Detail) -> np.ndarray:
    """Pixels the dot covers by more than half: bool, ``[64, 64]``."""
    return _coverage(detail) > 0.5


def object_box(obj: SceneObject) -> tuple[int, int, int, int]:
    """The mask's bounding box ``(left, top, right, bottom)`` in pixels, right and bottom exclusive."""
    rows, columns = np.nonzero(object_mask(obj))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def patch_mask(mask: np.ndarray, grid: tuple[int, int], coverage: float = 0.0) -> np.ndarray:
    """Which patches of a grid a pixel mask touches.

    Parameters
    ----------
    mask : bool array ``[height, width]``
    grid : (rows, columns) of patches over the whole image
    coverage : float
        A patch counts when more than this share of its pixels is inside the mask; 0 means any pixel.

    Returns
    -------
    bool array ``[rows, columns]``
    """
    rows, columns = grid
    height, width = mask.shape
    r = np.arange(height) * rows // height
    c = np.arange(width) * columns // width
    inside = np.zeros(grid)
    total = np.zeros(grid)
    np.add.at(inside, (r[:, None], c[None, :]), mask)
    np.add.at(total, (r[:, None], c[None, :]), 1)
    return inside / total > coverage
