"""H2: from some layer on, no visual token is needed any more.

The layer is chosen on discovery items, task by task: the first at or before 3/4 of the depth from which the loss stays below the margin, or, where
none does, the one that loses least.
"""

import pytest

from hypotheses.h2.controls import tokens_matter
from probes import GROUNDING_TASKS
from reports import exhibits_tokens
from vlm_core.reduction.curves import Cell, losses
from vlm_core.stats import Claim, NonInferiority

HORIZON = Claim(
    id="H2.horizon",
    sentence="From some layer at or before 3/4 of the depth, all visual tokens can go for less than 5 points of accuracy.",
    effect="accuracy(all tokens) - accuracy(none of them from the chosen layer on), paired per item",
    test=NonInferiority(0.05),
    source="Lin et al. 2024, arXiv:2405.16473; Xing et al. 2024, arXiv:2410.17247",
)
LITERATURE = {"published": "about layer 16 of 32 on MME, about 24 on TextVQA: it depends on the task", "where": "LLaVA-1.5-7B"}


@pytest.mark.claim(HORIZON)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_all_tokens_can_go_from_some_layer_on(task, subject, floors, curves, confirmed, evidence):
    table = curves()[(curves()["task"] == task) & ((curves()["policy"] == "stride") | (curves()["keep"] == 1))]
    latest = 3 * subject.anatomy.n_layers // 4
    layer = chosen_layer(table, latest, HORIZON.test.margin)
    exhibits_tokens.horizon(evidence, task, table, HORIZON.test.margin, layer, latest)
    cell = Cell(layer, 0.0, "stride")
    measured = confirmed(cell)
    lost = losses(measured[measured["task"] == task], cell)
    evidence.decide(
        HORIZON,
        lost["loss"],
        clusters=lost["cluster"],
        baseline=floors.of(task),
        controls=[floors.grounded(task, HORIZON.test.margin), tokens_matter(table, HORIZON.test.margin)],
        details={"layer": layer, "latest": latest, "depth": subject.anatomy.n_layers, "literature": LITERATURE},
    )


def chosen_layer(table, latest, margin) -> int:
    """The first layer up to ``latest`` from which the mean loss stays below ``margin`` up to there; else the layer that loses least."""
    layers = [layer for layer in sorted(table.loc[table["keep"] == 0, "layer"].unique()) if layer <= latest]
    lost = {layer: losses(table, Cell(layer, 0.0, "stride"))["loss"].mean() for layer in layers}
    fine = [layer for k, layer in enumerate(layers) if all(lost[later] < margin for later in layers[k:])]
    return int(fine[0] if fine else min(layers, key=lambda layer: (lost[layer], -layer)))
