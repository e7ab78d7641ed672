"""p-values from random draws: never 0, because the observed arrangement is itself one of the draws.

``never_zero``
    a p-value of a textbook test, with a bound where it is too small to compute
``monte_carlo_p``
    one measured value against draws of a matched random control
``sign_flip_p``
    paired effects against "the sign of each cluster's effect is a coin toss"
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .intervals import cluster_totals


def never_zero(p_value: float) -> float:
    """The p-value, or where it came out as 0 the bound below which it lies: the spacing of floats at 1 (2.2e-16)."""
    return float(p_value) if p_value > 0 else float(np.finfo(float).eps)


def monte_carlo_p(observed: float, draws: ArrayLike) -> float:
    """Share of draws at least as large as the observed value, ``(1 + #{draw >= observed}) / (R + 1)``.

    Parameters
    ----------
    observed
        The statistic of the targeted set.
    draws : [R]
        The same statistic for R matched random sets.

    References
    ----------
    Phipson & Smyth 2010, "Permutation p-values should never be zero" (arXiv:1603.05766).
    """
    draws = np.asarray(draws, dtype=float).ravel()
    if not np.isfinite(observed) or not np.all(np.isfinite(draws)):
        raise ValueError("monte_carlo_p needs finite numbers: the observed value or a draw is NaN or infinite")
    return float((1 + np.count_nonzero(draws >= observed)) / (draws.size + 1))


def sign_flip_p(
    effect: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    alternative: str = "greater",
    n_resamples: int = 9999,
    rng: int | np.random.Generator = 0,
) -> float:
    """Sign-flip permutation p-value of "the mean paired effect is zero", whole clusters flipped together.

    Exact when flipping a cluster's sign leaves the null distribution unchanged (an intervention that does
    nothing); all ``2^n`` flips are enumerated when they are no more than ``n_resamples``. It is a test of zero,
    made for exploratory lists; a threshold other than zero is the interval's business, in `decide`.

    Parameters
    ----------
    effect : [item]
        Paired effects.
    clusters : [item], optional
        Cluster of each item; each item its own where absent.
    alternative
        ``"greater"``, ``"less"`` or ``"two-sided"``.
    """
    effect = np.asarray(effect, dtype=float)
    if effect.ndim != 1 or effect.size == 0 or not np.all(np.isfinite(effect)):
        raise ValueError("sign_flip_p needs a non-empty one-dimensional effect of finite numbers")
    totals, _ = cluster_totals(effect, np.arange(effect.size) if clusters is None else clusters)
    result = stats.permutation_test(
        (totals,),
        lambda x, axis: np.sum(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        alternative=alternative,
        n_resamples=n_resamples,
        batch=max(1, 4_000_000 // totals.size),
        rng=np.random.default_rng(rng),
    )
    return float(result.pvalue)
