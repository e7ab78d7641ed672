"""Where the rows of a batch part from the sequences that they share.

``Branches``    per layer, which elements are gathered anew, and where each row then is
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["Branches"]


@dataclass(frozen=True, eq=False)
class Branches:
    """Rows that leave their trunk before the first layer that they touch.

    Parameters
    ----------
    gather : dict of layer to int array ``[element]``
        Element, before the layer, that each element comes from.
    rows : dict of layer to int array ``[element]``
        A row that each element stands for; under -1 those that the batch starts with.
    elements_at : list of int array ``[row]``
        Element that holds each row in each layer, and last at the final norm.
    """

    gather: dict[int, np.ndarray]
    rows: dict[int, np.ndarray]
    elements_at: list[np.ndarray]

    @staticmethod
    @lru_cache(maxsize=256)
    def none(n_rows: int, n_layers: int) -> Branches:
        """Every row is a sequence of its own to the end."""
        rows = np.arange(n_rows)
        return Branches({}, {-1: rows}, [rows] * (n_layers + 1))

    @classmethod
    def plan(cls, first: np.ndarray, trunk: np.ndarray, n_layers: int) -> Branches:
        """Branches of rows of which ``first`` ``[row]`` are the first layers touched, ``trunk`` ``[row]`` the sequences."""
        n_rows = len(first)
        if np.array_equal(trunk, np.arange(n_rows)):
            return cls.none(n_rows, n_layers)
        n_elements = int(trunk.max()) + 1 if n_rows else 0
        starting = np.zeros(n_elements, dtype=np.int64)
        starting[trunk[::-1]] = np.arange(n_rows)[::-1]
        elements, gather, rows, elements_at = trunk, {}, {-1: starting}, []
        for layer in range(n_layers):
            if (first == layer).any():
                codes = np.where(first <= layer, np.arange(n_rows), n_rows + trunk)
                _, representatives, inverse = np.unique(codes, return_index=True, return_inverse=True)
                gather[layer] = elements[representatives]
                rows[layer] = representatives
                elements = inverse
            elements_at.append(elements)
        return cls(gather, rows, [*elements_at, elements])
