"""H1: which edges, cut in which window of layers, hurt most.

The edge, its window and the runner-up, the window in which the same edge costs most beside it, are chosen on the discovery split and put to the
test on the confirmation split: the comparison is with one window that was named before, not with the best of several after the fact.
"""

import numpy as np
import pytest

from hypotheses.h1.controls import pooled_baseline, pooled_grounding
from reports import exhibits
from vlm_core.stats import Claim, Control, Superiority, interval

KNOCKOUT = Claim(
    id="H1.knockout",
    sentence="The most damaging edge and window of layers costs at least 5 points more than the same edge in its next most damaging window.",
    effect="accuracy lost by cutting the chosen edge in the chosen window - in the runner-up window, paired per item; all chosen on discovery",
    test=Superiority(0.05),
    source="Neo et al., ICLR 2025, arXiv:2410.07149; Zhang et al., CVPR 2025, arXiv:2411.18620",
    tier="exploratory",
)
LITERATURE = {
    "published": "Neo et al.: object → last in middle to late layers; cross-modal flow: image → question early, question → last later, "
    "image → last small",
    "where": "LLaVA-1.5-7B",
}


@pytest.mark.claim(KNOCKOUT)
def test_one_window_of_edges_hurts_most(floors, windows, evidence):
    found = windows("discovery")
    edge, window = found.worst()
    losses = windows("confirmation")
    exhibits.tracing.window_map(evidence, losses, (edge, window))
    baseline = pooled_baseline(floors, losses.items)
    try:
        second = found.runner_up(edge, window)
    except ValueError as reason:
        evidence.decide(KNOCKOUT, None, missing=str(reason))
        return
    evidence.decide(
        KNOCKOUT,
        losses.at(edge, window) - losses.at(edge, second),
        clusters=losses.clusters,
        baseline=baseline,
        controls=[pooled_grounding(floors, losses.items, KNOCKOUT.test.threshold), blind_without_edges(losses, baseline)],
        details={
            "chosen": {"edge": edge, "window": window, "layers": list(losses.windows[window])},
            "runner-up": {"window": second, "layers": list(losses.windows[second])},
            "accuracy_lost": {name: float(losses.at(edge, name).mean()) for name in losses.windows},
            "accounts": accounts(losses),
            "literature": LITERATURE,
        },
    )


def blind_without_edges(losses, baseline) -> Control:
    """All edges from the image to later text cut: the knock-out must leave the subject blind."""
    left = float(losses.blind["correct"].mean())
    return Control("text cut off from the image", "positive", left <= baseline.floor + 0.10, left, f"at most {baseline.floor + 0.10:.2f}")


def accounts(losses) -> dict:
    """Each published account beside what was measured: the window that costs most, its middle as a share of the depth, and the cost."""
    said = {
        "Neo: object → last, middle to late": "object → last",
        "flow: image → question, early": "image → question",
        "flow: question → last, later": "question → last",
        "flow: image → last, small": "image → last",
    }
    return {account: costliest(losses, edge) for account, edge in said.items()}


def costliest(losses, edge: str) -> dict:
    """The window in which an edge costs most accuracy (of those alike, most margin)."""
    window = max(losses.windows, key=lambda name: (losses.at(edge, name).mean(), losses.at(edge, name, "margin").mean()))
    found = interval(losses.at(edge, window), losses.clusters)
    depth = (np.mean(losses.windows[window]) + 0.5) / losses.n_layers
    return {"window": window, "depth": float(depth), "accuracy_lost": found.estimate, "lower": found.lower, "upper": found.upper}
