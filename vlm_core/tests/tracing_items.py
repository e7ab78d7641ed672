"""Items for tests of `vlm_core.tracing`: a coloured square on a grey picture, and its counterfactual in another colour."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlm_core.tests.tiny import COLOURS

SIDE = 16
PATCH = 4


def square(item) -> np.ndarray:
    """Where an item's square is, bool ``[height, width]``."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    top, left = item["corner"]
    mask[top : top + 4, left : left + 4] = True
    return mask


def make_pairs(n: int, seed: int = 0) -> list[dict]:
    """Items of two tasks, every one of its own scene; prompts of two lengths."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(n):
        answer, partner = rng.permutation(list(COLOURS))[:2]
        corner = [int(place) for place in rng.integers(0, SIDE - 4, 2)]
        grey = rng.integers(90, 160, (SIDE, SIDE, 1)) + np.zeros(3, dtype=int)
        pictures = []
        for colour in (answer, partner):
            pixels = grey.copy()
            pixels[corner[0] : corner[0] + 4, corner[1] : corner[1] + 4] = COLOURS[colour]
            pictures.append(Image.fromarray(pixels.astype(np.uint8)))
        items.append(
            {
                "id": f"pair-{number}",
                "scene_id": f"scene-{number}",
                "task": ("color", "shape")[number % 2],
                "image": pictures[0],
                "partner_image": pictures[1],
                "corner": corner,
                "prompt": "what color is the square ?" if number % 3 else "what is the color of the big square ?",
                "answer": str(answer),
                "partner_answer": str(partner),
                "candidates": list(COLOURS),
            }
        )
    return items
