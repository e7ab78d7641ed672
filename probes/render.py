"""Pixels, masks, boxes and patches of a scene.

A scene is laid out on 64 × 64 units and drawn on as many pixels as are asked for. Drawing is done at four times the size and averaged down, so
edges are anti-aliased; a mask holds the pixels an object covers by more than half.  ``patch_mask`` is the one map from an object to a grid of image patches or tokens.

Exports: ``render``, ``object_mask``, ``object_box``, ``detail_mask``, ``patch_mask``.
"""

from __future__ import annotations

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


def _background(scene: Scene, size: int) -> np.ndarray:
    rng = np.random.default_rng(scene.seed)
    n = size
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


def _covered(thing: SceneObject | Detail, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Where a thing lies, as slices of rows and columns, and how much of each pixel there it covers."""
    s, scale = SUPERSAMPLING, SUPERSAMPLING * (size / IMAGE_SIZE)
    x, y, r = thing.center[0] * scale, thing.center[1] * scale, thing.radius * scale
    left, top = (max(0, math.floor((one - 1.3 * r) / s) - 1) for one in (x, y))
    right, bottom = (min(size, math.ceil((one + 1.3 * r) / s) + 1) for one in (x, y))
    canvas = Image.new("L", ((right - left) * s, (bottom - top) * s), 0)
    draw, round_ = ImageDraw.Draw(canvas), isinstance(thing, Detail) or thing.shape == "circle"
    outline = [(x - r, y - r), (x + r, y + r)] if round_ else _outline(thing.shape, x, y, r, thing.angle)
    (draw.ellipse if round_ else draw.polygon)([(px - left * s, py - top * s) for px, py in outline], fill=255)
    return (slice(top, bottom), slice(left, right)), np.asarray(canvas.reduce(s), dtype=np.float32) / 255.0


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw the scene.

    Parameters
    ----------
    size : int
        Pixels of a side, 64 at least: on fewer the dot would be lost.

    Returns
    -------
    PIL.Image.Image
        RGB, square, the same bytes in every process.

    Raises
    ------
    ValueError
        For a smaller size.
    """
    if size < IMAGE_SIZE:
        raise ValueError(f"scenes are drawn on {IMAGE_SIZE} pixels a side at least, not {size}: the smallest things would be lost")
    pixels = np.repeat(_background(scene, size)[:, :, None], 3, axis=2)
    for thing in (*scene.objects, scene.detail):
        place, alpha = _covered(thing, size)
        pixels[place] = pixels[place] * (1 - alpha[:, :, None]) + np.asarray(thing.tint, dtype=np.float64) * alpha[:, :, None]
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "RGB")


def _mask(thing: SceneObject | Detail, size: int) -> np.ndarray:
    place, alpha = _covered(thing, size)
    mask = np.zeros((size, size), dtype=bool)
    mask[place] = alpha > 0.5
    return mask


def object_mask(obj: SceneObject, size: int = IMAGE_SIZE) -> np.ndarray:
    """Pixels the object covers by more than half: bool, ``[size, size]`` (row, column)."""
    return _mask(obj, size)


def detail_mask(detail: Detail, size: int = IMAGE_SIZE) -> np.ndarray:
    """Pixels the dot covers by more than half: bool, ``[size, size]``."""
    return _mask(detail, size)


def object_box(obj: SceneObject, size: int = IMAGE_SIZE) -> tuple[int, int, int, int]:
    """The mask's bounding box ``(left, top, right, bottom)`` in pixels, right and bottom exclusive."""
    rows, columns = np.nonzero(object_mask(obj, size))
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
