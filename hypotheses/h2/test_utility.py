"""H2: hardly any visual token is needed by itself.

Image tokens leave the sequence one at a time, a random sixteen of each image, from the early layer on; beside it, fewer of them at every layer.
"""

import pytest

from hypotheses.h1.controls import grounded_overall
from reports import exhibits
from vlm_core.reduction.curves import early, spread
from vlm_core.stats import Claim, Control, Superiority, interval

LITTLE = 0.05  # of the margin

UTILITY = Claim(
    id="H2.utility",
    sentence="At least 80 % of image tokens can go one at a time, early, with the answer's margin changing by less than 5 %.",
    effect="share of an item's image tokens whose removal changes the margin by less than 5 %",
    test=Superiority(0.80),
    source="after Chen et al. 2024, arXiv:2403.06764",
    tier="exploratory",
)


@pytest.mark.claim(UTILITY)
def test_hardly_any_token_is_needed_alone(subject, floors, utilities, evidence):
    found = utilities(early(subject))
    exhibits.tokens.utility(evidence, found, {layer: utilities(layer) for layer in sorted({early(subject), *spread(subject)})}, LITTLE)
    shares = found.inert(LITTLE)
    evidence.decide(
        UTILITY,
        shares["share"],
        clusters=shares["cluster"],
        bounds=(0.0, 1.0),
        controls=[grounded_overall(floors), all_matter(found)],
        details={"layer": found.layer, "items": len(shares), "loss by group": found.groups.groupby("group")["loss"].mean().to_dict()},
    )


def all_matter(found) -> Control:
    """All image tokens at once must change the margin by more than 5 %: else that single ones do not says nothing."""
    rows = found.groups[found.groups["group"] == "all"]
    changed = (rows["loss"].abs() > LITTLE * rows["full"].abs()).to_numpy(float)
    share = interval(changed, rows["cluster"], bounds=(0.0, 1.0))
    return Control("all image tokens at once change the margin", "positive", share.lower > 0.5, share.lower, "a lower bound above half of the items")
