"""H2: the later the visual tokens go, the less they are missed."""

import pytest

from probes import GROUNDING_TASKS
from reports import exhibits
from vlm_core.reduction.curves import spread
from vlm_core.stats import Claim, Trend, linear_contrast, page_p

TREND = Claim(
    id="H2.trend",
    sentence="Sensitivity to dropping the visual tokens falls with the layer at which they go.",
    effect="slope of accuracy per step through the depth, every visual token gone from there on, per item",
    test=Trend(),
    source="Chen et al. 2024, arXiv:2403.06764; Xing et al. 2024, arXiv:2410.17247",
)
GROUNDED = 0.05  # what the scene's own image must be worth


@pytest.mark.claim(TREND)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_tokens_matter_less_the_later_they_go(task, subject, floors, emptied, evidence):
    layers = spread(subject)
    if len(layers) < 3:
        pytest.skip(f"a trend needs three layers and the subject has {len(layers)}")
    measured = emptied(task).query("keep == 0")
    accuracy = measured.pivot(index="item", columns="layer", values="correct")[list(layers)]
    clusters = measured.drop_duplicates("item").set_index("item")["cluster"].loc[accuracy.index]
    baseline = floors.of(task)
    exhibits.tokens.layer_trend(evidence, task, accuracy, clusters, baseline.accuracy)
    evidence.decide(
        TREND,
        linear_contrast(accuracy),
        clusters=clusters,
        baseline=baseline,
        controls=[floors.grounded(task, GROUNDED)],
        p_value=page_p(accuracy, clusters),
        details={"layers": list(layers), "accuracy": accuracy.mean().tolist()},
    )
