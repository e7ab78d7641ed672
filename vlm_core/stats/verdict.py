"""The one function that decides a claim.

``decide``
    effects in, `Decision` out: *supported*, *refuted*, *inconclusive* or *invalid*, with the numbers behind it
``Control``, ``Baseline``
    what else must hold before a number may speak
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from .claims import CONTROL_KINDS, Claim
from .intervals import Bounds, Estimate, estimate_mean
from .power import clusters_needed, minimum_detectable_effect


class Verdict(str, Enum):
    """What a claim's evidence amounts to."""

    SUPPORTED = "supported"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"
    INVALID = "invalid"

    @property
    def symbol(self) -> str:
        """One character, distinct without colour."""
        return {"supported": "●", "refuted": "✕", "inconclusive": "◐", "invalid": "–"}[self.value]

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Control:
    """Something checked beside the claim.

    A failed one makes the claim invalid. Of two kinds it does not: one that is ``"info"`` decides nothing; a ``"condition"`` is a part of the
    claim itself beside its interval (a p-value, a choice that had to succeed), without which the claim cannot be supported, while an interval
    that refutes it still does. ``detail`` is said with the verdict's reason, whatever the outcome: what was left out, say.
    """

    name: str
    kind: str
    passed: bool
    value: float | None
    expected: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.kind not in CONTROL_KINDS:
            raise ValueError(f"control {self.name!r}: kind must be one of {', '.join(CONTROL_KINDS)}, not {self.kind!r}")

    def as_dict(self) -> dict:
        return {
            "name": str(self.name),
            "kind": self.kind,
            "passed": bool(self.passed),
            "value": _number(self.value),
            "expected": str(self.expected),
            "detail": str(self.detail),
        }


@dataclass(frozen=True)
class Baseline:
    """Accuracy before any intervention, and what a model gets without looking."""

    accuracy: float
    blind: float
    chance: float
    majority: float | None = None

    @property
    def floor(self) -> float:
        """The better of blind and chance."""
        return max(self.blind, self.chance)

    def as_dict(self) -> dict:
        return {name: _number(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Decision:
    """A verdict and everything it was read from.

    Attributes
    ----------
    verdict, reason
        The outcome, and one sentence with its numbers.
    estimate, lower, upper
        Mean effect and one-sided bounds, each at ``alpha / family_size``; None where undefined.
    threshold
        The declared threshold or margin (0 for a trend).
    alpha, family_size
        Declared error rate and the number of instances that share it.
    confidence
        Two-sided confidence of ``lower`` to ``upper``: ``1 - 2 alpha / family_size``.
    method
        How the bounds were made.
    p_value
        One-sided p-value of the claim's own null, at its threshold; the larger one where a p-value was handed in.
    given_p_value
        The p-value handed in (Page's trend test, a Monte-Carlo control), else None.
    n_items, n_clusters, n_seeds
        What the mean is over.
    mde
        Distance from the threshold that a sample like this decides at 80 % power.
    n_needed
        Clusters at which that distance equals the declared threshold; None where meaningless.
    underpowered
        The interval decides nothing, and the sample could not have told the declared effect from none.
    controls, baseline
        As handed in.
    """

    verdict: Verdict
    reason: str
    estimate: float | None
    lower: float | None
    upper: float | None
    threshold: float
    alpha: float
    family_size: int
    confidence: float
    method: str | None
    p_value: float | None
    given_p_value: float | None
    n_items: int
    n_clusters: int
    n_seeds: int
    mde: float | None
    n_needed: int | None
    underpowered: bool
    controls: tuple[Control, ...] = ()
    baseline: Baseline | None = None

    def as_dict(self) -> dict:
        """Builtins only, floats finite or None: JSON gives back the same dictionary."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["verdict"] = self.verdict.value
        plain["controls"] = [control.as_dict() for control in self.controls]
        plain["baseline"] = None if self.baseline is None else self.baseline.as_dict()
        return plain


def _number(value: float | None) -> float | None:
    """A finite builtin float, or None."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def _show(value: float, *others: float) -> str:
    """Shortest rounding from 2 decimals on that keeps the value apart from the others."""
    for digits in range(2, 7):
        text = f"{value:.{digits}f}"
        if all(value == other or text != f"{other:.{digits}f}" for other in others):
            break
    return "0.00" if float(text) == 0 else text


def _misfits(effect: object, clusters: object, seeds: object, bounds: Bounds | None) -> list[str]:
    """Reasons why the rows cannot be read as paired effects; an empty list when they can."""
    for name, ids in (("clusters", clusters), ("seeds", seeds)):
        both = isinstance(effect, pd.Series) and isinstance(ids, pd.Series)
        if both and not effect.index.equals(ids.index):
            return [f"unmatched pairs: the index of the effect is not the index of the {name}"]
    values = np.asarray(effect, dtype=float)
    if values.ndim != 1:
        return [f"the effect must have one dimension, one value per item, not shape {values.shape}"]
    if values.size == 0:
        return ["there are no items"]
    for name, ids in (("cluster", clusters), ("seed", seeds)):
        if ids is None:
            continue
        ids = np.asarray(ids)
        if ids.shape != values.shape:
            return [f"unmatched pairs: {values.size} effects but {ids.size} {name} ids"]
        if pd.isna(ids).any():
            return [f"{int(pd.isna(ids).sum())} of {values.size} items have no {name} id"]
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        return [f"{bad} of {values.size} effects are NaN or infinite"]
    if bounds is not None and (values.min() < bounds[0] or values.max() > bounds[1]):
        return [
            f"effects reach from {_show(values.min())} to {_show(values.max())}, outside the stated bounds "
            f"{bounds[0]:g} to {bounds[1]:g} (bounds=None states that there are none)"
        ]
    if seeds is not None:
        table = pd.crosstab(np.asarray(seeds), np.asarray(clusters)).to_numpy()
        if np.any(table != table[0]):
            return ["unmatched pairs: the seeds were not measured on the same items of every cluster"]
    return []


def _missing_room(claim: Claim, baseline: Baseline) -> str | None:
    """Why the model could not have shown the declared change, or None."""
    if not all(math.isfinite(v) for v in (baseline.accuracy, baseline.blind, baseline.chance)):
        return "the baseline holds a NaN: the task's accuracy, blind floor or chance was not measured"
    limit = claim.test.limit
    if claim.direction == "gain":
        room = 1 - baseline.accuracy
        where = f"accuracy {_show(baseline.accuracy)} leaves {_show(room, limit)} to the ceiling"
    else:
        room = baseline.accuracy - baseline.floor
        name = "blind floor" if baseline.blind >= baseline.chance else "chance"
        where = f"accuracy {_show(baseline.accuracy)} is {_show(room, limit)} above the {name} {_show(baseline.floor)}"
    if room < limit - 1e-12 or room <= 0:
        return f"no room to {claim.direction}: {where}, and the claim is about {limit:g}"
    return None


def _expected(control: Control) -> str:
    measured = _number(control.value)
    return f"expected {control.expected}" + ("" if measured is None else f", was {_show(measured)}")


def _blockers(
    claim: Claim, n_clusters: int, n_seeds: int, baseline: Baseline | None, controls: Iterable[Control]
) -> list[str]:
    """Reasons why the numbers may not speak, whatever they say."""
    found = []
    if n_clusters < claim.min_clusters:
        found.append(f"{n_clusters} clusters ({claim.unit}), fewer than the {claim.min_clusters} declared")
    if n_seeds < claim.min_seeds:
        found.append(f"{n_seeds} seed{'s' * (n_seeds != 1)}, fewer than the {claim.min_seeds} declared")
    for control in controls:
        if control.kind not in ("info", "condition") and not control.passed:
            found.append(f"the {control.kind} control '{control.name}' failed: {_expected(control)}")
    if baseline is not None:
        room = _missing_room(claim, baseline)
        if room:
            found.append(room)
    return found


def _compare(kind: str, lower: float, upper: float, limit: float) -> tuple[Verdict, str]:
    """The verdict table: the interval against the declared limit, strict inequalities."""
    span = f"the interval {_show(lower, limit, -limit)} to {_show(upper, limit, -limit)}"
    at = f"the declared {limit:g}"
    if kind in ("superiority", "trend"):
        at = "zero" if kind == "trend" else at
        if lower > limit:
            return Verdict.SUPPORTED, f"{span} lies above {at}"
        if upper < limit:
            return Verdict.REFUTED, f"{span} lies below {at}"
    elif kind == "non-inferiority":
        if upper < limit:
            return Verdict.SUPPORTED, f"{span} lies below the declared margin {limit:g}"
        if lower > limit:
            return Verdict.REFUTED, f"{span} lies above the declared margin {limit:g}"
        at = f"the declared margin {limit:g}"
    else:
        at = f"the declared margin ±{limit:g}"
        if lower > -limit and upper < limit:
            return Verdict.SUPPORTED, f"{span} lies within {at}"
        if upper < -limit or lower > limit:
            return Verdict.REFUTED, f"{span} lies outside {at}"
        return Verdict.INCONCLUSIVE, f"{span} crosses {at}"
    return Verdict.INCONCLUSIVE, f"{span} includes {at}"


def _own_p(kind: str, estimate: Estimate, limit: float) -> float:
    if kind == "non-inferiority":
        return estimate.p_below(limit)
    if kind == "equivalence":
        return max(estimate.p_above(-limit), estimate.p_below(limit))
    return estimate.p_above(limit)


def decide(
    claim: Claim,
    effect: ArrayLike | Estimate | None,
    *,
    clusters: ArrayLike | None = None,
    seeds: ArrayLike | None = None,
    family_size: int = 1,
    baseline: Baseline | None = None,
    controls: Iterable[Control] = (),
    p_value: float | None = None,
    rng: int | np.random.Generator = 0,
    bounds: Bounds | None = (-1.0, 1.0),
    missing: str = "the statistic is the same in every resample: zero variance where variance is needed",
) -> Decision:
    """Decide a claim from its paired effects.

    Each bound is one-sided at ``claim.alpha / family_size`` (Bonferroni over the declared family), so a verdict needs
    no other claim's result. Numbers are reported for invalid claims too, where they exist.

    Parameters
    ----------
    claim
        The declaration.
    effect : [item] or [item × seed], or Estimate
        Paired effects in the claim's direction: a drop, a gain, or for non-inferiority a *loss*. An `Estimate` where the effect is no mean
        over items (`estimate_statistic`); it brings its own bounds, and its None makes the claim invalid.
    clusters : [item]
        Resampling unit of each row; needed unless ``effect`` is an `Estimate`.
    seeds : [item], optional
        Training seed of each row; every seed measured on the same items.
    family_size
        Confirmatory claim instances that share ``claim.alpha``.
    baseline
        The task's accuracy and floors; checks that the model has room to move by the declared amount, down to the
        better of blind and chance or, for ``direction="gain"``, up to 1.
    controls
        See `Control`: a failed one makes the claim invalid, a failed ``"condition"`` keeps it from being supported.
    p_value
        A second condition: support also needs it below ``alpha / family_size``. Required for ``Trend``.
    bounds
        Range of one effect, used where almost nothing varies; None for effects without one (logits, slopes).
        Ignored for ``Trend``, which needs variance.
    missing
        Why there is no effect, where ``effect`` is None.
    """
    kind, limit = claim.test.kind, claim.test.limit
    if family_size < 1:
        raise ValueError(f"{claim.id}: family_size must be at least 1, not {family_size!r}")
    if kind == "trend" and p_value is None:
        raise ValueError(f"{claim.id}: a trend needs the p_value of an ordered test, such as page_p")
    controls = tuple(controls)
    alpha = claim.alpha / family_size
    bounds = None if kind == "trend" else bounds

    n_items = n_clusters = n_seeds = 0
    estimate: Estimate | None = None
    if effect is None:
        problems = [missing]
    elif isinstance(effect, Estimate):
        estimate = effect
        n_items, n_clusters, n_seeds = effect.n_items, effect.n_clusters, effect.n_seeds
        problems = _blockers(claim, n_clusters, n_seeds, baseline, controls)
    elif clusters is None:
        raise ValueError(f"{claim.id}: effects per item need the cluster of each")
    else:
        problems = _misfits(effect, clusters, seeds, bounds)
    if estimate is None and not problems:
        estimate = estimate_mean(effect, clusters, seeds, bounds=bounds, smallest_alpha=alpha, rng=rng)
        n_clusters = np.unique(np.asarray(clusters)).size
        n_seeds = 1 if seeds is None else np.unique(np.asarray(seeds)).size
        n_items = np.size(effect) // n_seeds
        problems = _blockers(claim, n_clusters, n_seeds, baseline, controls)
        if estimate is None:
            value = float(np.mean(np.asarray(effect, dtype=float)))
            problems.append(f"the effect is {_show(value)} in every cluster: zero variance where variance is needed")
    if p_value is not None and not 0 <= p_value <= 1:
        problems.append(f"the p-value handed in is {p_value}, not a number between 0 and 1")

    lower = upper = p = mde = needed = None
    underpowered = False
    if estimate is not None:
        lower, upper = (float(bound) for bound in estimate.bounds(alpha))
        p = max(_own_p(kind, estimate, limit), p_value if p_value is not None else 0.0)
        mde = minimum_detectable_effect(estimate, claim.test, alpha)
        needed = clusters_needed(estimate, claim.test, alpha, bounds)
    if problems:
        verdict, reason = Verdict.INVALID, "; ".join(problems)
    else:
        verdict, reason = _compare(kind, lower, upper, limit)
        underpowered = verdict is Verdict.INCONCLUSIVE and limit > 0 and mde > limit
        unmet = [f"'{one.name}' is not met ({_expected(one)})" for one in controls if one.kind == "condition" and not one.passed]
        if p_value is not None and not p_value < alpha:
            unmet.insert(0, f"p = {p_value:.2g} of its own test is not below {alpha:.2g}")
        if verdict is Verdict.SUPPORTED and unmet:
            verdict, reason = Verdict.INCONCLUSIVE, f"{reason}, but {' and '.join(unmet)}"
        if underpowered:
            more = f"about {needed} clusters would do" if needed else "more clusters alone would not do, more seeds might"
            reason = f"{reason}: underpowered, it detects {_show(mde, limit)} at 80 % power ({more})"
    reason = "; ".join([reason, *dict.fromkeys(control.detail for control in controls if control.detail)])
    return Decision(
        verdict=verdict,
        reason=reason,
        estimate=None if estimate is None else _number(estimate.value),
        lower=_number(lower),
        upper=_number(upper),
        threshold=limit,
        alpha=float(claim.alpha),
        family_size=int(family_size),
        confidence=float(1 - 2 * alpha),
        method=None if estimate is None else estimate.method,
        p_value=_number(p),
        given_p_value=_number(p_value),
        n_items=int(n_items),
        n_clusters=int(n_clusters),
        n_seeds=int(n_seeds),
        mde=_number(mde),
        n_needed=needed,
        underpowered=bool(underpowered),
        controls=controls,
        baseline=baseline,
    )
