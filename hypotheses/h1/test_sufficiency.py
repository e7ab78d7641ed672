"""H1: few heads are enough, and without them little is left.

Heads are taken in the order of attribution, task by task. How many are enough is found on discovery items: the fewest whose faithfulness has a
lower 97.5 % bound above 0.8, among at most a quarter of all heads. What they do is measured on confirmation items: as a share of what the image
does for the answer's margin, over all items of all tasks whose attribution may be used. Where a quarter of the heads is not enough on a task's
discovery items, there is no small sufficient set, and neither claim can be supported.
"""

import pandas as pd
import pytest

from fixtures.h1_rankings import MOST_HEADS, SUFFICIENT
from hypotheses.h1.controls import grounded_overall, usable_in_most_tasks
from reports import exhibits_ablation as exhibits
from vlm_core.heads.curves import curves, share_of_effect
from vlm_core.stats import Claim, Control, Superiority

SOURCE = "Kim et al. 2025, arXiv:2509.17588"
LITERATURE = {"published": "faithfulness > 0.8 and completeness < 0.2 with fewer heads than rival rankings", "where": "LLaVA-1.5-7B, COCO"}
CHOICE = "the fewest heads whose faithfulness has a lower bound above 0.8 on discovery scenes (at most 25 % of all, in every task)"

SUFFICIENCY = Claim(
    id="H1.sufficiency",
    sentence=f"Alone, {CHOICE} have a faithfulness above 0.8 on new scenes.",
    effect="[z(only these heads see the image) - z(none)] / [z(all) - z(none)], sums over items of all usable tasks; z: margin",
    test=Superiority(SUFFICIENT),
    source=SOURCE,
)
COMPLETENESS = Claim(
    id="H1.completeness",
    sentence=f"Without {CHOICE} less than 20 % of the image's effect is left on new scenes (completeness below 0.2).",
    effect="1 - completeness: [z(all) - z(all but these heads see the image)] / [z(all) - z(none)], sums over items of all usable tasks; z: margin",
    test=Superiority(SUFFICIENT),
    source=SOURCE,
)


@pytest.mark.claim(SUFFICIENCY)
def test_few_heads_are_enough(subject, floors, usable, sufficient, carried, evidence):
    chosen = {task: sufficient(task) for task in usable()}
    exhibits.faithfulness_curves(evidence, {task: carried(task) for task in chosen}, len(subject.image_heads))
    decide(SUFFICIENCY, "faithfulness", chosen, subject, floors, evidence)


@pytest.mark.claim(COMPLETENESS)
def test_little_is_left_without_them(subject, floors, usable, sufficient, evidence):
    decide(COMPLETENESS, "completeness", {task: sufficient(task) for task in usable()}, subject, floors, evidence)


def decide(claim, measure, chosen, subject, floors, evidence) -> None:
    """Decide a claim on the share that the chosen heads carry."""
    rows = pd.concat([found.rows for found in chosen.values()]) if chosen else pd.DataFrame()
    options = {"smallest_alpha": claim.alpha / evidence.family_size, "rng": evidence.seed}
    targeted, random = (share_carried(rows, ranking, measure, **options) for ranking in ("attribution", "random"))
    evidence.decide(
        claim,
        targeted,
        controls=[grounded_overall(floors), usable_in_most_tasks(chosen), enough_were_found(chosen), not_any_heads(random)],
        details={
            "heads": {task: [list(head) for head in found.heads] for task, found in chosen.items()},
            "share_of_all_heads": {task: len(found.heads) / len(subject.image_heads) for task, found in chosen.items()},
            "enough_on_discovery": {task: found.reached for task, found in chosen.items()},
            "by_task": {task: task_shares(found.rows) for task, found in chosen.items()},
            "literature": LITERATURE,
        },
    )


def share_carried(rows, ranking, measure, **options):
    """What the heads carry of the image's effect: alone (faithfulness), or by what is lost without them (1 - completeness)."""
    if rows.empty:
        return None
    own = rows[rows["ranking"] == ranking]
    part = own["only"] if measure == "faithfulness" else own["every"] + own["none"] - own["without"]
    return share_of_effect(part, own["every"], own["none"], own["cluster"], **options)


def task_shares(rows):
    """Faithfulness and completeness of the targeted and the random heads of one task."""
    return {f"{row.share}, {row.ranking}": row.value for row in curves(rows).itertuples()}


def enough_were_found(chosen) -> Control:
    """On every task's discovery items some small set must have been enough: a claim about the fewest such heads is about nothing otherwise."""
    missed = [task for task, found in chosen.items() if not found.reached]
    said = f"{MOST_HEADS:.0%} of the heads were not enough on discovery: {', '.join(missed)}" if missed else ""
    share = 1 - len(missed) / len(chosen) if chosen else 0.0
    return Control("tasks with a small sufficient set on discovery", "condition", bool(chosen) and not missed, share, "every one", said)


def not_any_heads(random) -> Control:
    """As many heads drawn at random, over several orders, must not be enough: else the measure is met by anything."""
    upper = None if random is None else random.bounds(0.025)[1]
    return Control("as many random heads", "negative", upper is not None and upper < SUFFICIENT, upper, f"an upper bound below {SUFFICIENT:g}")
