"""H2: the reduction that discovery items lead to really saves: in arithmetic, and on the clock.

Of the reductions that lose less than 2.5 points over all tasks, and less than 5 in any, on discovery items, the eight that save most operations are timed, and the fastest is the
recipe; what loses more on the first half of these items than it may on all is not tried on the others. Time is that of the
language model on prompts (their images' features given), 16 at a time, with everything that the policy computes, paired and interleaved with the untouched model.
"""

import pytest

from fixtures.token_measurements import BATCH
from hypotheses.h1.controls import grounded_overall
from hypotheses.h2.controls import LITERATURE, nothing_saves_nothing
from reports import exhibits, recipes
from vlm_core.reduction.costs import saved_flops
from vlm_core.stats import Claim, Control, Superiority

FLOPS = Claim(
    id="H2.compute_flops",
    sentence="The recommended recipe saves at least 25 % of the prefill's operations.",
    effect="1 - operations(recipe) / operations(all tokens), per prompt",
    test=Superiority(0.25),
    source="Chen et al. 2024, arXiv:2403.06764",
)
LATENCY = Claim(
    id="H2.compute_latency",
    sentence="The recommended recipe saves at least 25 % of the prefill's time.",
    effect="1 - time(recipe) / time(all tokens), per paired run",
    test=Superiority(0.25),
    source="Chen et al. 2024, arXiv:2403.06764",
    unit="paired run",
)
NONE = "no reduction was found that loses less than 2.5 points over all tasks and less than 5 in each on discovery items, so none is recommended"


def loses_little(recipe) -> Control:
    """A recipe that loses more on confirmation items than it was chosen for saves at the reader's cost."""
    expected = recipe.expected
    return Control("loss on confirmation items", "condition", expected["upper"] < recipe.margin, expected["upper"], f"an upper bound below {recipe.margin:g}")


@pytest.mark.claim(FLOPS)
def test_the_recipe_saves_operations(subject, probes, floors, recipe, evidence):
    found = recipe()
    if found is None:
        evidence.decide(FLOPS, None, missing=NONE)
        return
    recipes.leave(evidence, found)
    items = probes.spread("confirmation", -(-84 // len(probes.tasks)))
    evidence.decide(
        FLOPS,
        saved_flops(subject, items, found.reduction),
        clusters=[item["scene_id"] for item in items],
        controls=[grounded_overall(floors), loses_little(found)],
        details=about(found),
    )


@pytest.mark.claim(LATENCY)
def test_the_recipe_saves_time(subject, floors, recipe, timings, costs, evidence):
    found = recipe()
    if found is None:
        evidence.decide(LATENCY, None, missing=NONE)
        return
    exhibits.tokens.saved_against_lost(evidence, costs(), f"{found.policy}, {found.keep:g} from layer {found.layer}")
    pairs = timings(found.reduction)
    evidence.decide(
        LATENCY,
        pairs["saved"],
        clusters=pairs["round"],
        bounds=None,  # a run that something held up saves less than nothing, without limit
        controls=[grounded_overall(floors), loses_little(found), nothing_saves_nothing(timings(None))],
        details=about(found) | {"prompts a pass": BATCH},
    )


def about(found) -> dict:
    """What a reader wants to know of a recipe beside its verdict."""
    return {
        "policy": found.policy, "layer": found.layer, "kept": found.keep, "saving": dict(found.saving), "expected": dict(found.expected),
        "not for": list(found.not_for), "literature": LITERATURE,
    }  # fmt: skip
