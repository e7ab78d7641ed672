"""H1: few heads are enough, and without them little is left.

Heads are taken in the order of attribution, task by task. How many are enough is found on discovery items; what they do is measured on
confirmation items: as a share of what the image does for the answer's margin, over all items of all tasks whose attribution may be used.
"""

import pandas as pd
import pytest

from fixtures.h1_rankings import MOST_HEADS, SUFFICIENT
from hypotheses.h1.controls import grounded_overall, usable_in_most_tasks
from reports import exhibits_ablation as exhibits
from vlm_core.heads.curves import curves, share_of_effect
from vlm_core.stats import Claim, Control, Superiority

SUFFICIENCY = Claim(
    id="H1.sufficiency",
    sentence="The fewest heads with faithfulness above 0.8, at most 25 % of all, keep it on new scenes; their completeness is below 0.2.",
    effect="[z(only these heads) - z(none)] / [z(all) - z(none)], or [z(all) - z(all but these)] / [z(all) - z(none)] (1 - completeness); z: margin",
    test=Superiority(SUFFICIENT),
    source="Kim et al. 2025, arXiv:2509.17588",
)
LITERATURE = {"published": "faithfulness > 0.8 and completeness < 0.2 with fewer heads than rival rankings", "where": "LLaVA-1.5-7B, COCO"}


@pytest.mark.claim(SUFFICIENCY)
@pytest.mark.parametrize("measure", ["faithfulness", "completeness"])
def test_few_heads_are_enough(measure, subject, floors, usable, sufficient, carried, evidence):
    chosen = {task: sufficient(task) for task in usable()}
    rows = pd.concat([found.rows for found in chosen.values()]) if chosen else pd.DataFrame()
    targeted, random = (share_carried(rows, ranking, measure) for ranking in ("attribution", "random"))
    if measure == "faithfulness":
        exhibits.faithfulness_curves(evidence, {task: carried(task) for task in chosen}, len(subject.heads))
    evidence.decide(
        SUFFICIENCY,
        targeted,
        controls=[grounded_overall(floors), usable_in_most_tasks(chosen), not_any_heads(random)],
        details={
            "heads": {task: [list(head) for head in found.heads] for task, found in chosen.items()},
            "share_of_all_heads": {task: len(found.heads) / len(subject.heads) for task, found in chosen.items()},
            "enough_on_discovery": {task: found.reached for task, found in chosen.items()},
            "most_heads": MOST_HEADS,
            "by_task": {task: task_shares(found.rows) for task, found in chosen.items()},
            "literature": LITERATURE,
        },
    )


def share_carried(rows, ranking, measure):
    """What the heads carry of the image's effect: alone (faithfulness), or by what is lost without them (1 - completeness)."""
    if rows.empty:
        return None
    own = rows[rows["ranking"] == ranking]
    part = own["only"] if measure == "faithfulness" else own["every"] + own["none"] - own["without"]
    return share_of_effect(part, own["every"], own["none"], own["cluster"])


def task_shares(rows):
    """Faithfulness and completeness of the targeted and the random heads of one task."""
    return {f"{row.share}, {row.ranking}": row.value for row in curves(rows).itertuples()}


def not_any_heads(random) -> Control:
    """As many heads drawn at random must not be enough: else the measure is met by anything."""
    upper = None if random is None else random.bounds(0.025)[1]
    return Control("as many random heads", "negative", upper is not None and upper < SUFFICIENT, upper, f"an upper bound below {SUFFICIENT:g}")
