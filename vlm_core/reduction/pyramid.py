"""Fewer tokens in stages (PyramidDrop, Xing et al. 2024, arXiv:2410.17247).

``pyramid(...)``       the published stages: at 1/4, 1/2 and 3/4 of the depth, half of the tokens that are left
``pyramid_of(...)``    stages that leave on average as many tokens as one drop does, for comparisons at equal tokens
"""

from __future__ import annotations

from vlm_core.interventions.numeric import integer, real
from vlm_core.interventions.policy import Policy
from vlm_core.interventions.tokens import DropTokens
from vlm_core.reduction.fastv import FastV

__all__ = ["N_STAGES", "pyramid", "pyramid_of"]

N_STAGES = 3
"""After the first part of the depth, which sees all tokens."""
_LAST = FastV()


def pyramid(n_layers: int, layer: int | None = None, ratio: float = 0.5, policy: Policy | str = _LAST) -> tuple[DropTokens, ...]:
    """Three drops that divide the layers from ``layer`` on into thirds, each keeping ``ratio`` of what the one before left.

    Parameters
    ----------
    n_layers : int
        Of the language model.
    layer : int, optional
        The first stage. Default: a quarter of the depth, so that stages lie at 1/4, 1/2 and 3/4 as published; places are rounded.
    ratio : float
        In (0, 1]: fractions of the original tokens are ``ratio``, its square and its cube.
    policy : Policy or str
        Default: the attention of the prompt's last token in the layer before each stage. A reconstruction: the published code scores with
        queries and keys of the stage's own layer.

    Raises
    ------
    ValueError
        Where three stages do not fit behind one another.
    """
    layers = _stages(n_layers, layer)
    ratio = real(ratio, "ratio")
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio must be above 0 and up to 1, got {ratio}")
    return tuple(DropTokens(one, ratio ** (number + 1), policy) for number, one in enumerate(layers))


def pyramid_of(keep: float, n_layers: int, layer: int | None = None, policy: Policy | str = _LAST) -> tuple[DropTokens, ...]:
    """The ``pyramid`` whose layers from ``layer`` on hold, on average, the fraction ``keep`` of the image tokens.

    So it holds as many tokens in all layers together as ``DropTokens(layer, keep)`` does, up to the rounding of each stage's count.
    Arguments as in ``pyramid``; its ratio is solved for.

    Raises
    ------
    ValueError
        For a ``keep`` outside (0, 1], or as ``pyramid``.
    """
    layers = _stages(n_layers, layer)
    keep = real(keep, "keep")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be a fraction above 0 and up to 1, got {keep}")
    bounds = (*layers, n_layers)
    lengths = [after - before for before, after in zip(bounds[:-1], bounds[1:], strict=True)]

    def mean(ratio: float) -> float:
        return sum(length * ratio ** (number + 1) for number, length in enumerate(lengths)) / sum(lengths)

    lower, upper = 0.0, 1.0
    while keep < 1.0 and lower < (middle := (lower + upper) / 2) < upper:
        lower, upper = (middle, upper) if mean(middle) < keep else (lower, middle)
    return pyramid(n_layers, layers[0], upper, policy)


def _stages(n_layers: int, layer: int | None) -> list[int]:
    n_layers = integer(n_layers, "n_layers", least=1)
    first = n_layers / (N_STAGES + 1) if layer is None else integer(layer, "layer", least=0)
    stages = [int(first + number * (n_layers - first) / N_STAGES + 0.5) for number in range(N_STAGES)]
    if not all(before < after for before, after in zip(stages, (*stages[1:], n_layers), strict=True)):
        raise ValueError(
            f"{N_STAGES} stages do not fit into {n_layers} layers from layer {stages[0]} on: leave at least {N_STAGES} layers for them"
        )
    return stages
