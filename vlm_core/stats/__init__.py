"""How a claim gets its verdict: declarations, intervals, power, and the one function that decides.

NumPy, SciPy and pandas only: a report can be rendered, and a verdict re-read, without a model or a test runner.

>>> from vlm_core.stats import Claim, Superiority, decide
>>> claim = Claim("H1.necessity", "Removing ten heads costs 10 points.", "paired drop", Superiority(0.10), "here")
>>> decision = decide(claim, effect=[1.0, 0.0] * 40, clusters=range(80))
>>> decision.verdict.value
'supported'
"""

from vlm_core.lazily import exported

_HOMES = {
    "claims": ("CONTROL_KINDS", "Claim", "ClaimTest", "Equivalence", "NonInferiority", "Superiority", "Trend"),
    "counts": ("GoodnessOfFit", "goodness_of_fit"),
    "descriptive": ("Interval", "interval", "interval_each"),
    "eprocess": ("Replication", "clusters_promised", "night_values", "nights_promised", "unsuited"),
    "intervals": ("Estimate", "estimate_mean"),
    "multiplicity": ("holm",),
    "permutation": ("monte_carlo_p", "never_zero", "sign_flip_p"),
    "statistic": ("estimate_statistic", "friedman", "jackknife_statistic", "kendall_w", "kruskal", "per_cluster"),
    "trend": ("linear_contrast", "page_p"),
    "verdict": ("Baseline", "Control", "Decision", "Verdict", "decide"),
}

__getattr__, __dir__, __all__ = exported(__name__, _HOMES)
