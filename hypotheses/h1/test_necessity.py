"""H1: a small subset of heads carries most cross-modal grounding.

Heads are ranked by attribution on the discovery split, task by task; the claims are decided on the confirmation split. "Removing the
image" from a head replaces the image keys and values that the text sees through it by their mean over images and places: the head goes on
working, it cannot tell what is in this image, nor where.

Specificity is a matter of items and of heads. The interval speaks for items: each item's mean over random draws against the targeted heads.
The Monte-Carlo p speaks for heads: how many random sets cost as much as the targeted one, all of them run on the same items as it, so that
nothing but their heads tells them apart (`vlm_core.heads.draws.assign_shared`). The interval holds the error rate of the whole family; the
p-value is a condition of each task's claim, at the declared alpha. A second null, sets of as many heads from any layer, is measured in the same
way on a third of these items; it is told beside and decides nothing.

It is a matter of the image, too. In a subject where any disturbance of the top heads costs as much as removing the image from them, random heads
may cost little and the claim would hold, although nothing about the image was shown. There the placebo costs as much as the removal: the same
heads, moved as far at the same tokens in random directions, with what they say of the image still in their outputs. So the removal must cost more
than the placebo. It costs answers of their margin before it costs answers, so margins are compared; a claim that the interval refutes stays refuted.
"""

import math

import pandas as pd
import pytest

from fixtures.measurements import TOP_HEADS
from hypotheses.h1.controls import prediction_of_unseen_masks, too_few_heads, worth_something
from probes import GROUNDING_TASKS, target_mask
from reports import exhibits
from vlm_core import attention_heatmap
from vlm_core.heads.draws import assign_shared, draw_losses, draw_means, draw_p, layer_free, layer_matched, matching_sets
from vlm_core.stats import Claim, Control, Superiority, interval

SHOWN_SIDE = 64  # pixels of the map of attention, however many the subject looks at
SOURCE = "Kim et al. 2025, arXiv:2509.17588"
LITERATURE = {"published": "a small set of mid-to-late heads carries the image-to-text flow (faithfulness > 0.8)", "where": "LLaVA-1.5-7B, COCO"}

DRAWS_PER_ITEM = {"matched": 4, "anywhere": 2}  # random sets behind the mean of an item on which not every set is run

NECESSITY = Claim(
    id="H1.necessity",
    sentence="Removing the image from the top 10 % of heads costs at least 10 points of accuracy.",
    effect="accuracy(full) - accuracy(image removed from the top heads), paired per item",
    test=Superiority(0.10),
    source=SOURCE,
)
SPECIFICITY = Claim(
    id="H1.specificity",
    sentence="Removing the image from the top 10 % of heads costs at least 5 points more than from random heads of the same layers and number, "
    "more than 95 % of such sets of heads cost, and more than disturbing the same heads as much.",
    effect="accuracy(image removed from random heads, mean over draws) - accuracy(image removed from the top heads), paired per item; condition: "
    "Monte-Carlo p below 0.05, (1 + draws that cost at least as much) / (draws + 1), all sets on the same items; condition: the margin lost is above "
    "that lost when a random vector, as long as what the removal changes, is added to the outputs of the same heads (lower 99.5 % bound above 0)",
    test=Superiority(0.05),
    source=SOURCE,
)


@pytest.mark.claim(NECESSITY)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_few_heads_carry_the_image(task, subject, probes, floors, attribution, removal, evidence):
    if reason := too_few_heads(subject, TOP_HEADS):
        return evidence.decide(NECESSITY, None, missing=reason)
    ranked = attribution(task)
    heads, baseline, measured = ranked.top(TOP_HEADS), floors.of(task), removal(task)
    blind = floors.blind[floors.blind["task"] == task]["correct"].to_numpy()
    conditions = {
        "full": ("baseline", measured["full"]),
        f"top {len(heads)} heads lose the image": ("targeted", measured["targeted"]),
        "every head loses the image": ("floor", measured["every"]),
        "another scene's image": ("floor", blind),
    }
    exhibits.ablation.head_ablation(evidence, task, conditions, measured["cluster"], heads, baseline.chance)
    exhibits.heads.head_map(evidence, task, ranked.coefficients, heads, ranked.r2)
    show_attention(evidence, task, subject, probes.confirmation[task], floors, heads)
    evidence.jsonl("baseline-outputs.jsonl", floors.seeing[floors.seeing["task"] == task])
    evidence.decide(
        NECESSITY,
        measured["full"] - measured["targeted"],
        clusters=measured["cluster"],
        baseline=baseline,
        controls=[floors.grounded(task, NECESSITY.test.threshold), no_head_sees(measured, baseline), prediction_of_unseen_masks(ranked)],
        details={
            "heads": [list(h) for h in heads],
            "heads that see the image": len(subject.image_heads),
            "attribution_r2": ranked.r2,
            "literature": LITERATURE,
        },
    )


@pytest.mark.claim(SPECIFICITY)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_random_heads_do_not(task, subject, probes, profile, seed, floors, blinded, attribution, removal, ablations, placebo, sweeps, evidence):
    if reason := too_few_heads(subject, TOP_HEADS):
        return evidence.decide(SPECIFICITY, None, missing=reason)
    ranked, items, measured = attribution(task), probes.confirmation[task], removal(task)
    heads = ranked.top(TOP_HEADS)
    exhibits.ablation.ablation_grid(evidence, ablations(task), task, floors.chance[task])
    try:
        matched = layer_matched(heads, subject, profile.random_draws, seed)
    except ValueError as reason:
        return evidence.decide(SPECIFICITY, None, missing=str(reason))
    drawn = {"matched": matched, "anywhere": layer_free(heads, subject, profile.free_draws, seed)}
    shares = {"matched": profile.items_per_draw, "anywhere": -(-profile.items_per_draw // 3)}  # sets of any layer inform, they decide nothing
    conditions, plan, common = {}, [], {}
    for group, sets in drawn.items():
        some = {f"{group}/{i}": blinded(h) for i, h in enumerate(sets)}
        runs, shared = assign_shared(list(some), len(items), shares[group], DRAWS_PER_ITEM[group], seed)
        conditions, plan = conditions | some, plan + runs
        common[group] = [items[k]["id"] for k in shared]
    table = sweeps(f"random heads, {task}", items, conditions, metrics=("correct",), assignments=plan)
    possible = {"matched": matching_sets(heads, subject), "anywhere": math.comb(len(subject.image_heads), len(heads))}
    nulls = {group: against(table, group, measured, common[group], possible[group]) for group in drawn}
    random, lost, p_value = (nulls["matched"][name] for name in ("each item", "lost", "p"))
    targeted = float((measured["full"] - measured["targeted"]).loc[common["matched"]].mean())
    evidence.table("random-heads.csv", pd.DataFrame([{"task": task, "heads": group, **null["row"]} for group, null in nulls.items()]))
    exhibits.heads.null_draws(evidence, task, lost, targeted, p_value)
    as_much = placebo(task, "margin")
    evidence.decide(
        SPECIFICITY,
        random - measured["targeted"],
        clusters=measured["cluster"],
        baseline=floors.of(task),
        controls=[
            floors.grounded(task, SPECIFICITY.test.threshold), prediction_of_unseen_masks(ranked), stands_out(p_value, lost, len(common["matched"])),
            more_than_any_disturbance(as_much),
            stands_out(nulls["anywhere"]["p"], nulls["anywhere"]["lost"], len(common["anywhere"]), "any layer", "info"),
        ],
        details={
            "heads": [list(h) for h in heads],
            "draws": len(lost),
            "items of every draw": len(common["matched"]),
            "monte_carlo_p": p_value,
            "accuracy_lost": {
                "targeted": float((measured["full"] - measured["targeted"]).mean()),
                "random, same layers": float((measured["full"] - random).mean()),
                "random, any layer": float((measured["full"] - nulls["anywhere"]["each item"]).mean()),
            },
            "margin_lost": {
                "image removed": float(as_much["removed"].mean()),
                "disturbed as much": float(as_much["disturbed"].mean()),
                "items": len(as_much),
            },
            "against random heads of any layer": nulls["anywhere"]["row"],
            "literature": LITERATURE,
        },
    )


def against(table, group, measured, common, possible) -> dict:
    """Random sets of one kind against the targeted one: what they leave of ``each item``, what each has ``lost`` on the items that all were run
    on, the Monte-Carlo ``p`` among ``possible`` sets, and the numbers for a reader as a ``row``."""
    left = draw_means(table, group, measured.index)
    lost = draw_losses(table, group, measured["full"], common)
    targeted = float((measured["full"] - measured["targeted"]).loc[common].mean())
    p_value = draw_p(targeted, lost, possible)
    gap = interval((left - measured["targeted"]).to_numpy(), measured["cluster"])
    row = {"draws": len(lost), "items_of_every_draw": len(common), "targeted_lost": targeted, "random_lost": float(lost.mean()), "monte_carlo_p": p_value}
    row |= {"items": len(left), "targeted_beyond_random": gap.estimate, "lower": gap.lower, "upper": gap.upper}
    return {"each item": left, "lost": lost, "p": p_value, "row": row}


def stands_out(p_value, lost, n_items, layers="the same layers", kind="condition") -> Control:
    """The targeted heads must cost more than nearly all sets that match them, not only more than their mean."""
    limit = SPECIFICITY.alpha
    expected = f"below {limit:g} over {len(lost)} sets on the same {n_items} items"
    return Control(f"Monte-Carlo p against sets of {layers}", kind, p_value < limit, p_value, expected)


def more_than_any_disturbance(as_much) -> Control:
    """The image must be what its removal costs: disturbing the same heads as much, what they say left in place, must cost less."""
    return worth_something(
        "removing the image against disturbing the same heads as much", "condition", as_much["removed"] - as_much["disturbed"], as_much["cluster"]
    )


def no_head_sees(measured, baseline) -> Control:
    """With the image removed from every head, accuracy must be near what blindness gives: the intervention does what it says."""
    left = float(measured["every"].mean())
    return Control("image removed from every head", "positive", left <= baseline.floor + 0.10, left, f"at most {baseline.floor + 0.10:.2f}")


def show_attention(evidence, task, subject, items, floors, heads) -> None:
    """Attention of the targeted heads over the first item that was answered right, where image tokens have places on the image."""
    right = floors.seeing[(floors.seeing["task"] == task) & floors.seeing["correct"]]["item"]
    item = next((item for item in items if item["id"] in set(right)), None)
    if item is None:
        return
    mask = target_mask({**item, "image": item["image"].resize((SHOWN_SIDE, SHOWN_SIDE))})
    if not subject.layout(item["image"], item["prompt"]).reason:
        heat = attention_heatmap(subject, item, heads, mask.shape)
        exhibits.heads.attention_overlay(evidence, item, heat, mask, f"{task}: where the targeted heads look")
