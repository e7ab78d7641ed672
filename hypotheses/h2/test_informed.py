"""H2: where few tokens are kept early, looking at them pays.

Tokens go where FastV drops them, after the second of 32 layers (in proportion, never before the first). The policy is chosen on discovery items of all tasks, among
those that look at the tokens and keep exactly as many as asked.
"""

import pytest

from fixtures.token_measurements import KEPT
from hypotheses.h1.controls import grounded_overall
from hypotheses.h2.controls import left_by
from reports import exhibits
from vlm_core.reduction.curves import REFERENCES, Cell, early, losses
from vlm_core.stats import Claim, Superiority

INFORMED = Claim(
    id="H2.informed",
    sentence="At 25 % kept from an early layer on, the best informed policy is at least 3 points better than one that does not look at the tokens.",
    effect="accuracy(informed policy) - accuracy(uninformed policy), paired per item, all tasks together",
    test=Superiority(0.03),
    source="Chen et al. 2024, arXiv:2403.06764; Wen et al. 2025, arXiv:2502.11501",
    direction="gain",
)
LITERATURE = {
    "published": "at 144 of 576 tokens random keeps 95.0 %, pooling 96.4 %, FastV 89.8 %, SparseVLM 93.5 % of the accuracy",
    "where": "LLaVA-1.5-7B",
}


@pytest.mark.claim(INFORMED)
@pytest.mark.parametrize("against", REFERENCES)
def test_looking_at_the_tokens_pays(against, subject, floors, policies, best_informed, confirmed, kept_examples, evidence):
    if against in policies.missing:
        evidence.decide(INFORMED, None, missing=f"{against} is not possible here: {policies.missing[against]}")
        return
    layer, chosen = early(subject), best_informed()
    if chosen is None:
        evidence.decide(INFORMED, None, missing="no policy that looks at the tokens and keeps exactly as many as asked is possible here")
        return
    reference = Cell(layer, KEPT, against)
    both = [losses(confirmed(cell), cell).set_index("item") for cell in (reference, chosen)]
    gain = both[0]["loss"] - both[1].loc[both[0].index, "loss"]
    exhibits.tokens.kept_tokens(evidence, *kept_examples(chosen.policy, layer), chosen.policy, layer)
    evidence.decide(
        INFORMED,
        gain,
        clusters=both[0]["cluster"],
        baseline=left_by(floors, both[0]),
        controls=[grounded_overall(floors)],
        details={
            "policy": chosen.policy, "layer": layer, "kept": KEPT, "literature": LITERATURE,
            "by task": gain.groupby(floors.seeing.set_index("item")["task"].loc[gain.index].to_numpy()).mean().to_dict(),
        },
    )  # fmt: skip
