"""H2: from some layer on, no visual token is needed any more.

The claim is put to the test at 3/4 of the depth, the last layer that it allows: the fewest layers are left there that could read the tokens. From which layer on they could
really go is read from discovery items and reported beside it.
"""

import pandas as pd
import pytest

from hypotheses.h2.controls import tokens_matter
from probes import GROUNDING_TASKS
from reports import exhibits
from vlm_core.reduction.curves import Cell, losses, three_quarters
from vlm_core.reduction.horizon import information_horizon
from vlm_core.stats import Claim, NonInferiority

HORIZON = Claim(
    id="H2.horizon",
    sentence="From some layer at or before 3/4 of the depth, all visual tokens can go for less than 5 points of accuracy.",
    effect="accuracy(all tokens) - accuracy(none of them from 3/4 of the depth on), paired per item",
    test=NonInferiority(0.05),
    source="Lin et al. 2024, arXiv:2405.05803; Xing et al. 2024, arXiv:2410.17247",
)
LITERATURE = {"published": "about layer 16 of 32 on MME, about 24 on TextVQA: it depends on the task", "where": "LLaVA-1.5-7B"}


@pytest.mark.claim(HORIZON)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_all_tokens_can_go_from_some_layer_on(task, subject, floors, sensitivity, emptied, evidence):
    table = sensitivity()[sensitivity()["task"] == task]
    latest = three_quarters(subject)
    first = information_horizon(table, HORIZON.test.margin).horizons.loc[task, "estimated"]
    exhibits.tokens.horizon(evidence, task, table, HORIZON.test.margin, latest)
    cell = Cell(latest, 0.0, "stride")
    lost = losses(emptied(task), cell)
    evidence.decide(
        HORIZON,
        lost["loss"],
        clusters=lost["cluster"],
        baseline=floors.of(task),
        controls=[floors.grounded(task, HORIZON.test.margin), tokens_matter(table, HORIZON.test.margin)],
        details={"layer": latest, "first layer on discovery items": None if pd.isna(first) else int(first), "depth": subject.anatomy.n_layers, "literature": LITERATURE},
    )

