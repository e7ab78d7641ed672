"""H1: few heads are enough, and without them little is left.

Heads are taken in the order of attribution. How many are enough is found on discovery items: the fewest whose faithfulness has a lower 97.5 %
bound above 0.8, among at most a quarter of all heads. What they do is measured on confirmation items, as a share of what the image does for
the answer's margin, sums over the task's items.

One claim a task: margins of one task can be many times those of another, so that a share pooled over tasks would be that of the tasks with the
largest, and a mean of shares would still hide one task behind six. Where a quarter of the heads is not enough on a task's discovery items, the
claims are decided on that quarter: they cannot be supported, and are refuted where even it falls short on new scenes.
"""

import pytest

from fixtures.h1_rankings import MOST_HEADS, SUFFICIENT
from hypotheses.h1.controls import prediction_of_unseen_masks, too_few_heads
from probes import GROUNDING_TASKS
from reports import exhibits
from vlm_core.heads.curves import curves, share_of_effect
from vlm_core.stats import Claim, Control, Superiority

SOURCE = "Kim et al. 2025, arXiv:2509.17588"
LITERATURE = {"published": "faithfulness > 0.8 and completeness < 0.2 with fewer heads than rival rankings", "where": "LLaVA-1.5-7B, COCO"}
CHOICE = "the fewest heads whose faithfulness has a lower bound above 0.8 on discovery scenes (at most 25 % of all)"
CONDITION = "condition: the heads were enough on discovery scenes (else the first 25 % of all heads are measured)"

SUFFICIENCY = Claim(
    id="H1.sufficiency",
    sentence=f"Alone, {CHOICE} have a faithfulness above 0.8 on new scenes.",
    effect=f"[z(only these heads see the image) - z(none)] / [z(all) - z(none)], sums over the task's items; z: margin; {CONDITION}",
    test=Superiority(SUFFICIENT),
    source=SOURCE,
)
COMPLETENESS = Claim(
    id="H1.completeness",
    sentence=f"Without {CHOICE} less than 20 % of the image's effect is left on new scenes (completeness below 0.2).",
    effect=f"1 - completeness: [z(all) - z(all but these heads see the image)] / [z(all) - z(none)], sums over the task's items; z: margin; {CONDITION}",
    test=Superiority(SUFFICIENT),
    source=SOURCE,
)


@pytest.mark.claim(SUFFICIENCY)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_few_heads_are_enough(task, subject, floors, attribution, sufficient, carried, evidence):
    if fits(attribution(task)) and not too_few_heads(subject, MOST_HEADS):
        exhibits.ablation.faithfulness_curves(evidence, task, carried(task), len(subject.image_heads))
    decide(SUFFICIENCY, "faithfulness", task, subject, floors, attribution, sufficient, evidence)


@pytest.mark.claim(COMPLETENESS)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_little_is_left_without_them(task, subject, floors, attribution, sufficient, evidence):
    decide(COMPLETENESS, "completeness", task, subject, floors, attribution, sufficient, evidence)


def fits(ranked) -> bool:
    """Whether a ranking may be used: no heads are chosen from one whose models do not fit."""
    return prediction_of_unseen_masks(ranked).passed


def decide(claim, measure, task, subject, floors, attribution, sufficient, evidence) -> None:
    """Decide a claim on the share that a task's chosen heads carry."""
    ranked = attribution(task)
    if reason := too_few_heads(subject, MOST_HEADS):
        return evidence.decide(claim, None, missing=reason)
    if not fits(ranked):
        control = prediction_of_unseen_masks(ranked)
        said = f"no heads are chosen where attribution does not predict unseen masks: expected {control.expected}"
        return evidence.decide(claim, None, controls=[control], missing=said)
    found = sufficient(task)
    options = {"smallest_alpha": evidence.alpha, "rng": evidence.seed}
    targeted, random = (share_carried(found.rows, ranking, measure, **options) for ranking in ("attribution", "random"))
    evidence.decide(
        claim,
        targeted,
        controls=[floors.grounded(task, 0.10), prediction_of_unseen_masks(ranked), enough_were_found(found), not_any_heads(random)],
        details={
            "heads": [list(head) for head in found.heads],
            "share_of_all_heads": len(found.heads) / len(subject.image_heads),
            "enough_on_discovery": found.reached,
            "shares": shares(found.rows),
            "literature": LITERATURE,
        },
    )


def share_carried(rows, ranking, measure, **options):
    """What the heads carry of the image's effect: alone (faithfulness), or by what is lost without them (1 - completeness)."""
    own = rows[rows["ranking"] == ranking]
    part = own["only"] if measure == "faithfulness" else own["every"] + own["none"] - own["without"]
    return share_of_effect(part, own["every"], own["none"], own["cluster"], **options)


def shares(rows):
    """Faithfulness and completeness of the targeted and the random heads."""
    return {f"{row.share}, {row.ranking}": row.value for row in curves(rows).itertuples()}


def enough_were_found(found) -> Control:
    """On discovery items some small set must have been enough: support for the fewest such heads would be about nothing otherwise."""
    said = "" if found.reached else f"{MOST_HEADS:.0%} of the heads were not enough on discovery"
    return Control("a small sufficient set on discovery", "condition", found.reached, None, "one was found", said)


def not_any_heads(random) -> Control:
    """As many heads drawn at random, over several orders, must not be enough: else the measure is met by anything."""
    upper = None if random is None else random.bounds(0.025)[1]
    return Control("as many random heads", "negative", upper is not None and upper < SUFFICIENT, upper, f"an upper bound below {SUFFICIENT:g}")
