"""How a claim gets its verdict: declarations, intervals, power, and the one function that decides.

NumPy, SciPy and pandas only: a report can be rendered, and a verdict re-read, without a model or a test runner.

>>> claim = Claim("H1.necessity", "Removing ten heads costs 10 points.", "paired drop", Superiority(0.10), "here")
>>> decision = decide(claim, effect=[1.0, 0.0] * 40, clusters=range(80))
>>> decision.verdict.value
'supported'
"""

from .claims import Claim, ClaimTest, Equivalence, NonInferiority, Superiority, Trend
from .counts import GoodnessOfFit, goodness_of_fit
from .descriptive import Interval, interval, interval_each
from .eprocess import Replication, clusters_promised, night_values, nights_promised
from .intervals import Estimate, estimate_mean
from .multiplicity import holm
from .permutation import monte_carlo_p, never_zero, sign_flip_p
from .statistic import estimate_statistic, friedman, jackknife_statistic, kendall_w, kruskal, per_cluster
from .trend import linear_contrast, page_p
from .verdict import Baseline, Control, Decision, Verdict, decide

__all__ = [
    "Baseline",
    "Claim",
    "ClaimTest",
    "Control",
    "Decision",
    "Equivalence",
    "Estimate",
    "GoodnessOfFit",
    "Interval",
    "NonInferiority",
    "Replication",
    "Superiority",
    "Trend",
    "Verdict",
    "clusters_promised",
    "decide",
    "estimate_mean",
    "estimate_statistic",
    "friedman",
    "goodness_of_fit",
    "holm",
    "interval",
    "interval_each",
    "jackknife_statistic",
    "kendall_w",
    "kruskal",
    "linear_contrast",
    "monte_carlo_p",
    "night_values",
    "nights_promised",
    "never_zero",
    "page_p",
    "per_cluster",
    "sign_flip_p",
]
