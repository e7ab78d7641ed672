"""H2: visual tokens become redundant after the middle layers.

Policy and layer are chosen on the discovery split, task by task; the claims are decided on the confirmation split. A dropped token leaves the
sequence for good; kept tokens keep their positions.
"""

import pytest

from probes import GROUNDING_TASKS
from reports import exhibits
from vlm_core.stats import Claim, Control, NonInferiority, Trend, interval, linear_contrast, page_p
from vlm_core.tokens import POLICIES, choose_drop, mid_depth, spread

KEEPS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # of the curves over policies
COARSE_KEEPS = (0.0, 0.25, 0.5, 1.0)  # of the map over all layers
LITERATURE = {"published": "after layer 2 of 32, half of the visual tokens can go at no cost", "where": "Chen et al. 2024 (FastV), LLaVA-1.5-7B"}

NONINFERIOR = Claim(
    id="H2.noninferior",
    sentence="Dropping half of the visual tokens from mid-depth on costs less than 5 points of accuracy.",
    effect="accuracy(all tokens) - accuracy(half of them from the chosen layer on), paired per item",
    test=NonInferiority(0.05),
    source="Chen et al. 2024, arXiv:2403.06764",
)
TREND = Claim(
    id="H2.trend",
    sentence="Sensitivity to dropping the visual tokens falls with the layer at which they go.",
    effect="slope of accuracy per layer, every visual token gone from that layer on, per item",
    test=Trend(),
    source="Chen et al. 2024, arXiv:2403.06764; Xing et al. 2024, arXiv:2410.17247",
)


@pytest.mark.claim(NONINFERIOR)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_half_of_the_tokens_can_go_from_mid_depth(task, subject, floors, drop_grid, evidence):
    candidates = drop_grid(task, "discovery", mid_depth(subject), KEEPS, POLICIES)
    chosen = choose_drop(candidates, keep=0.5)
    measured = drop_grid(task, "confirmation", (chosen.layer,), (1.0, 0.5), (chosen.policy,))
    full, half = (measured[measured["keep"] == keep].set_index("item") for keep in (1.0, 0.5))
    exhibits.drop_curves(evidence, candidates, task, chosen.layer)
    sensitivity = drop_grid(task, "discovery", spread(subject), COARSE_KEEPS, ("stride",))
    exhibits.layer_sensitivity(evidence, sensitivity, task, "stride", NONINFERIOR.test.margin)
    evidence.decide(
        NONINFERIOR,
        full["correct"] - half["correct"],
        clusters=full["cluster"],
        baseline=floors.of(task),
        controls=[floors.grounded(task, NONINFERIOR.test.margin), tokens_matter(sensitivity, NONINFERIOR.test.margin)],
        details={"layer": chosen.layer, "policy": chosen.policy, "depth": subject.anatomy.n_layers, "literature": LITERATURE},
    )


@pytest.mark.claim(TREND)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_tokens_matter_less_the_later_they_go(task, subject, floors, drop_grid, evidence):
    layers = spread(subject)
    if len(layers) < 3:
        pytest.skip(f"a trend needs three layers and the subject has {len(layers)}")
    measured = drop_grid(task, "confirmation", layers, (0.0,), ("stride",))
    accuracy = measured.pivot(index="item", columns="layer", values="correct")[list(layers)]
    clusters = measured.drop_duplicates("item").set_index("item")["cluster"].loc[accuracy.index]
    baseline = floors.of(task)
    exhibits.layer_trend(evidence, task, accuracy, clusters, baseline.accuracy)
    evidence.decide(
        TREND,
        linear_contrast(accuracy),
        clusters=clusters,
        baseline=baseline,
        controls=[floors.grounded(task, NONINFERIOR.test.margin)],
        p_value=page_p(accuracy, clusters),
        details={"layers": list(layers), "accuracy": accuracy.mean().tolist()},
    )


def tokens_matter(sensitivity, margin) -> Control:
    """Dropping every token before the first layer must hurt; a drop that cannot hurt proves nothing when it does not."""
    rows = sensitivity[sensitivity["layer"] == sensitivity["layer"].min()]
    full, none = (rows[rows["keep"] == keep].set_index("item") for keep in (1, 0))
    lost = interval(full["correct"] - none["correct"], full["cluster"])
    return Control("every token dropped before the first layer", "positive", lost.lower > margin, lost.lower, f"a loss surely above {margin:g}")
