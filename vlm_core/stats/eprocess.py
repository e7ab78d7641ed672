"""Evidence that accumulates over nights and may be looked at every night: betting e-processes for a bounded mean.

``log_bets``           the factors of one e-process, ``E = prod(1 + lambda_t (x_t - m))``, against "the mean is at most m"
``Betting``            a mixture of such that begin on different nights, so that a change is found however many nights went before it
``Replication``        the e-processes of a claim: for it, and against it
``replay``             a claim's evidence made again from the values of each night
``night_values``       what one night adds: cluster means in an order that the values do not decide
``clusters_promised``  clusters within which an effect of a given size is caught
``nights_promised``    the same for a claim whose effect lies a whole threshold (or margin) from it, in nights

Under the null no E can be expected to grow: it is a supermartingale that starts at 1, so it ever reaches 1/alpha with probability at most
alpha (Ville 1939), however often and whenever one looks. Each bet ``lambda_t`` is fixed before x_t is seen: the plug-in "aGRAPA" of
Waudby-Smith & Ramdas 2024, J. R. Stat. Soc. B 86:1-27 (arXiv:2010.09686), cut to [0, c/m] with c < 1, so that no factor is below 1 - c.
The mean and the variance it is made of start at m and 1/4 (their prior weighs one observation), so the first bet is zero.

What was learned from a hundred good nights would keep a bet from being made long after the hundred-and-first went bad. So half of the
evidence is a process over all nights; the other half is spread over processes that begin on night j with weight 1/(j (j + 1)) and stop
betting after 2 · 2^v nights, 2^v being the largest power of two that divides j (a geometric cover: Daniely, Gonen & Shalev-Shwartz 2015,
arXiv:1502.07073; an e-process that has not begun is 1). A mixture of e-processes is one.

The null speaks of each night: given what came before it, no cluster's expected effect passes the limit. Choices made within a night (heads,
layers) are part of that night's effect. A claim that crosses training runs with items gives one value a night, because items answered by
the same trained student are not independent draws of the effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .claims import Equivalence, NonInferiority, Superiority
from .intervals import Bounds
from .verdict import Verdict

CAP = 0.5  # of the largest bet that keeps every factor positive


def log_bets(x: ArrayLike, mean: float, start: tuple = (0, 0.0, 0.0)) -> tuple[np.ndarray, tuple]:
    """Logarithms of the factors ``1 + lambda_t (x_t - mean)``, in the order of the values.

    Parameters
    ----------
    x : [..., t]
        Values in [0, 1]; leading axes are independent sequences.
    mean
        The null's largest mean, between 0 and 1.
    start
        How many values came before, their sum, and the sum of their squared deviations from the running mean (arrays [...] or numbers).

    Returns
    -------
    factors : [..., t]
    end : tuple
        ``start`` of the values that come next.

    Raises
    ------
    ValueError
        For a mean or a value outside its range.
    """
    x = np.asarray(x, dtype=float)
    if not 0 < mean < 1:
        raise ValueError(f"the null's mean is {mean!r}: bets need one between 0 and 1, both excluded")
    if x.size and not (np.min(x) >= 0 and np.max(x) <= 1):
        raise ValueError("a value lies outside 0 to 1: rescale effects by the range they cannot leave")
    n, total, squares = start
    before = np.asarray(n)[..., None] + np.arange(x.shape[-1])
    totals = np.asarray(total)[..., None] + np.cumsum(x, axis=-1)
    means = (mean + totals) / (before + 2)
    deviations = np.square(x - means)
    sums = np.asarray(squares)[..., None] + np.cumsum(deviations, axis=-1)
    distance = (mean + totals - x) / (before + 1) - mean
    variance = (0.25 + sums - deviations) / (before + 1)
    bets = np.clip(distance / (variance + np.square(distance)), 0.0, CAP / mean)
    end = (n, total, squares) if not x.shape[-1] else (before[..., -1] + 1, totals[..., -1], sums[..., -1])
    return np.log1p(bets * (x - mean)), end


@dataclass
class Betting:
    """The evidence against "the mean is at most ``mean``": a mixture of e-processes, one over all nights, others over stretches of them.

    Attributes
    ----------
    mean
        Between 0 and 1, on the scale of the values.
    nights, n
        Nights, and values, so far.
    processes : list of [start, n, total, squares, log E]
        Those at work: the night on which each began (0 for the one over all nights), how many values it has seen, their sum, the sum of
        their squared deviations from the running mean (what its next bet is made of), and the logarithm of its E.
    ended
        Logarithm of the weighted sum of those that have stopped; None while there is none.
    """

    mean: float
    nights: int = 0
    n: int = 0
    processes: list[list] = field(default_factory=lambda: [[0, 0, 0.0, 0.0, 0.0]])
    ended: float | None = None

    def update(self, x: ArrayLike) -> None:
        """Bet on one night's values in [0, 1], one after the other."""
        x = np.ravel(np.asarray(x, dtype=float))
        self.nights += 1
        self.n += x.size
        self.processes.append([self.nights, 0, 0.0, 0.0, 0.0])
        starts, *before, log_e = (np.array(column) for column in zip(*self.processes, strict=True))
        factors, after = log_bets(np.broadcast_to(x, (len(starts), x.size)), self.mean, tuple(before))
        columns = zip(starts.tolist(), *(part.tolist() for part in after), (log_e + factors.sum(-1)).tolist(), strict=True)
        done = {True: [], False: []}
        for process in columns:
            done[process[0] > 0 and self.nights - process[0] + 1 >= _lifetime(process[0])].append(list(process))
        self.processes = done[False]
        stopped = [_log_weight(process[0]) + process[-1] for process in done[True]]
        if stopped:
            self.ended = float(np.logaddexp.reduce([*stopped, *([] if self.ended is None else [self.ended])]))

    @property
    def log_e(self) -> float:
        """Logarithm of E; the processes that have not begun hold a weight of 1/(2 (nights + 1)) together."""
        parts = [_log_weight(process[0]) + process[-1] for process in self.processes]
        return float(np.logaddexp.reduce([*parts, -math.log(2 * (self.nights + 1)), *([] if self.ended is None else [self.ended])]))


def _log_weight(start: int) -> float:
    return -math.log(2 * start * (start + 1)) if start else -math.log(2)


def _lifetime(start: int) -> int:
    return 2 * (start & -start)


# Which sides of which limits a claim's processes bet on, in units of its limit: (sign of the limit, does the effect lie above it?)
_FOR = {"superiority": ((1, True),), "non-inferiority": ((1, False),), "equivalence": ((-1, True), (1, False))}
_AGAINST = {"superiority": ((1, False),), "non-inferiority": ((1, True),), "equivalence": ((-1, False), (1, True))}


@dataclass
class Replication:
    """What fresh shards have said about one claim so far.

    Support needs evidence against every null (both sides of an equivalence: the smaller E counts). Evidence against the claim is the mean
    of its E's, itself an e-process where the claim holds.

    Attributes
    ----------
    kind, limit
        Of the claim's test (``"superiority"``, ``"non-inferiority"``, ``"equivalence"``), and its threshold or margin.
    bounds
        Range that one effect cannot leave.
    nights
        Nights so far.
    supporting, refuting : list of Betting
    peaks : dict
        The largest logarithm of E at the end of a night, ``"support"`` and ``"refute"``.
    """

    kind: str
    limit: float
    bounds: Bounds
    nights: int = 0
    supporting: list[Betting] = field(default_factory=list)
    refuting: list[Betting] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=lambda: {"support": 0.0, "refute": 0.0})

    def __post_init__(self) -> None:
        problem = unsuited(self.kind, self.limit, self.bounds)
        if problem:
            raise ValueError(problem)
        self.bounds = (float(self.bounds[0]), float(self.bounds[1]))
        if not self.supporting:
            self.supporting, self.refuting = (
                [Betting(self._null(sign * self.limit, above)) for sign, above in sides[self.kind]] for sides in (_FOR, _AGAINST)
            )

    def _null(self, limit: float, above: bool) -> float:
        scaled = (limit - self.bounds[0]) / (self.bounds[1] - self.bounds[0])
        return scaled if above else 1 - scaled

    def update(self, effects: ArrayLike) -> None:
        """Add one night's values (see `night_values`), on the scale of the effect."""
        x = (np.ravel(np.asarray(effects, dtype=float)) - self.bounds[0]) / (self.bounds[1] - self.bounds[0])
        if not np.all(np.isfinite(x)):
            raise ValueError("an effect is NaN or infinite: it can be no evidence")
        for processes, sides in ((self.supporting, _FOR), (self.refuting, _AGAINST)):
            for process, (_, above) in zip(processes, sides[self.kind], strict=True):
                process.update(x if above else 1 - x)
        self.nights += 1
        for side in self.peaks:
            self.peaks[side] = max(self.peaks[side], self.log_e(side))

    def log_e(self, side: str) -> float:
        """Logarithm of the evidence for (``"support"``) or against (``"refute"``) the claim, as of the last night."""
        if side == "support":
            return min(process.log_e for process in self.supporting)
        values = [process.log_e for process in self.refuting]
        return float(np.logaddexp.reduce(values) - math.log(len(values)))

    @property
    def clusters(self) -> int:
        """Values so far."""
        return self.supporting[0].n

    def verdict(self, alpha: float) -> Verdict:
        """What the nights amount to at error rate ``alpha``: decided once E was 1/alpha or more at the end of a night, and for good.

        Inconclusive where neither side, or both, have got there.
        """
        reached = [side for side, peak in self.peaks.items() if peak >= -math.log(alpha)]
        if len(reached) != 1:
            return Verdict.INCONCLUSIVE
        return Verdict.SUPPORTED if reached[0] == "support" else Verdict.REFUTED

    def as_dict(self) -> dict:
        """Builtins only; `from_dict` goes on from them exactly."""
        return {**asdict(self), "bounds": list(self.bounds)}

    @classmethod
    def from_dict(cls, state: Mapping) -> Replication:
        processes = {side: [Betting(**one) for one in state[side]] for side in ("supporting", "refuting")}
        return cls(**{**state, **processes, "bounds": tuple(state["bounds"]), "peaks": dict(state["peaks"])})


def unsuited(kind: str, limit: float, bounds: Bounds | None) -> str | None:
    """Why no bets can be made about such a claim, or None."""
    if kind not in _FOR:
        return f"a {kind} claim is no statement about a mean"
    if bounds is None:
        return "its effect has no stated range"
    low, high = bounds
    if not all(low < one < high for one in ((-limit, limit) if kind == "equivalence" else (limit,))):
        return f"its limit {limit:g} lies not inside the range of one effect, {low:g} to {high:g}"
    return None


def night_values(effect: ArrayLike, clusters: ArrayLike, seeds: ArrayLike | None = None) -> np.ndarray:
    """What one night adds to a claim's evidence: the means of its clusters, in the order of the clusters' ids.

    Parameters
    ----------
    effect, clusters : [row]
    seeds : [row], optional
        Training seed of each row; then the night's mean is its one value.

    Returns
    -------
    numpy.ndarray : [cluster], or [1] with seeds
    """
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    effect = np.asarray(effect, dtype=float)
    if codes.shape != effect.shape:
        raise ValueError(f"{effect.size} effects and {codes.size} cluster ids: each effect needs exactly one")
    means = np.bincount(codes, weights=effect) / np.bincount(codes)
    return means if seeds is None else np.array([means.mean()])


def clusters_promised(
    effect: float,
    test: Superiority | NonInferiority | Equivalence,
    *,
    deviation: float | None = None,
    alpha: float = 0.05,
    power: float = 0.9,
    bounds: Bounds = (-1.0, 1.0),
) -> int:
    """Values, from the first night on, within which a claim whose true effect is ``effect`` is decided, with probability ``power``.

    From the drift and the spread of log E at the bet that the plug-in tends to, for the two-valued distribution with this mean and variance
    whose log E grows least (one value at the far end of the range), less half the logarithm of the number of values for learning the bet.

    Parameters
    ----------
    effect
        True mean, on one side of the claim's limit.
    test
    deviation
        Standard deviation of a cluster's mean; unless given the largest that the range allows.
    alpha
        Error rate of the decision (the claim's, divided by its family's size).

    Raises
    ------
    ValueError
        Where the effect lies on the limit, so that nothing will ever decide.
    """
    if problem := unsuited(test.kind, test.limit, bounds):
        raise ValueError(problem)
    low, high = bounds
    supporting, refuting = ([(sign * test.limit, above) for sign, above in sides[test.kind]] for sides in (_FOR, _AGAINST))
    grown = [side for side in refuting if effect != side[0] and (effect > side[0]) == side[1]]
    supports = not grown and all(effect != limit for limit, _ in supporting)
    chosen = supporting if supports else grown
    if not chosen:
        raise ValueError(f"an effect of {effect:g} lies on the limit: no number of values decides it")
    # evidence against an equivalence is the mean over its two sides: the side that grows must reach twice as far
    needed = math.log(2 / alpha) + (0.0 if supports else math.log(len(_AGAINST[test.kind])))
    counts = []
    for limit, above in chosen:
        mean, null = ((value - low) / (high - low) if above else (high - value) / (high - low) for value in (effect, limit))
        variance = mean * (1 - mean)
        if deviation is not None:
            variance = min(variance, (deviation / (high - low)) ** 2)
        counts.append(_values_needed(mean, null, variance, needed, float(stats.norm.ppf(power if len(chosen) == 1 else (1 + power) / 2))))
    return max(counts)


def _values_needed(mean: float, null: float, variance: float, needed: float, reach: float) -> int:
    distance = mean - null
    bet = min(distance / (variance + distance**2), CAP / null)
    share, top = mean**2 / (variance + mean**2), (variance + mean**2) / mean
    won, lost = math.log1p(bet * (top - null)), math.log1p(-bet * null)
    growth, spread = share * won + (1 - share) * lost, (won - lost) * math.sqrt(share * (1 - share))

    def caught(n: int) -> bool:
        return n * growth - reach * spread * math.sqrt(n) - math.log1p(n) / 2 >= needed

    most = 1
    while not caught(most):
        most *= 2
        if most > 2**40:
            raise ValueError(f"an effect {distance:g} of the range from the limit is too near for any number of values")
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if caught(middle) else (middle, most)
    return most


def nights_promised(
    test: Superiority | NonInferiority | Equivalence,
    clusters_a_night: int,
    *,
    after: int = 0,
    deviation: float | None = None,
    alpha: float = 0.05,
    power: float = 0.9,
    bounds: Bounds = (-1.0, 1.0),
) -> int:
    """Nights within which an effect of the declared size is caught: one that lies a whole threshold, or margin, beyond the limit.

    A drop declared to be at least δ that is none at all, a loss declared to stay below m that is 2m, an effect declared to lie within ±m
    that is 2m.

    Parameters
    ----------
    test
    clusters_a_night
        Values that a night adds.
    after
        Nights that went before it was so, whatever they said. The process that catches it begins some nights later, with a small weight.
    deviation, alpha, power, bounds
        As for `clusters_promised`.

    Raises
    ------
    ValueError
        For a threshold of zero: no effect is declared then.
    """
    if test.limit == 0:
        raise ValueError("a threshold of zero declares no size of effect")
    effect = 0.0 if test.kind == "superiority" else 2 * test.limit

    def nights(level: float) -> int:
        return math.ceil(clusters_promised(effect, test, deviation=deviation, alpha=level, power=power, bounds=bounds) / clusters_a_night)

    if not after:
        return nights(alpha)
    step = 1
    while True:  # among `step` nights one is a multiple of it, whose process bets for 2 * step nights or more
        begins = after + step
        needed = nights(alpha / (begins * (begins + 1)))
        if needed <= 2 * step:
            return step - 1 + needed
        step *= 2


def replay(kind: str, limit: float, bounds: Bounds, nights: Iterable[ArrayLike]) -> Replication:
    """The evidence made again from the values of each night."""
    found = Replication(kind, limit, bounds)
    for values in nights:
        found.update(values)
    return found
