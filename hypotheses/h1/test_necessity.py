"""H1: a small subset of heads carries most cross-modal grounding.

Heads are ranked by attribution on the discovery split, task by task; the claims are decided on the confirmation split. "Removing the
image" from a head replaces the image keys and values that the text sees through it by their mean over images and places: the head goes on
working, it cannot tell what is in this image, nor where.

Specificity is a matter of items and of heads. The interval speaks for items: each item's mean over random draws against the targeted heads.
The Monte-Carlo p speaks for heads: how many random sets cost as much as the targeted one, all of them run on the same items as it, so that
nothing but their heads tells them apart (`vlm_core.heads.draws.assign_shared`). The interval holds the error rate of the whole family; the
p-value is a condition of each task's claim, at the declared alpha.

It is a matter of the image, too. In a subject where any disturbance of the top heads costs as much as removing the image from them, random heads
may cost little and the claim would hold, although nothing about the image was shown. There the placebo costs as much as the removal: the same
heads, moved as far at the same tokens in random directions, with what they say of the image still in their outputs. So the removal must cost more
than the placebo. It costs answers of their margin before it costs answers, so margins are compared; a claim that the interval refutes stays refuted.
"""

import pytest

from fixtures.measurements import TOP_HEADS
from hypotheses.h1.controls import prediction_of_unseen_masks, worth_something
from probes import GROUNDING_TASKS, target_mask
from reports import exhibits, exhibits_ablation
from vlm_core import attention_heatmap
from vlm_core.heads.draws import assign_draws, assign_shared, draw_losses, draw_means, draw_p, layer_free, layer_matched, matching_sets
from vlm_core.stats import Claim, Control, Superiority

SOURCE = "Kim et al. 2025, arXiv:2509.17588"
LITERATURE = {"published": "a small set of mid-to-late heads carries the image-to-text flow (faithfulness > 0.8)", "where": "LLaVA-1.5-7B, COCO"}

DRAWS_PER_ITEM = 6  # random sets behind the mean of an item on which not every set is run

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
    ranked = attribution(task)
    heads, baseline, measured = ranked.top(TOP_HEADS), floors.of(task), removal(task)
    blind = floors.blind[floors.blind["task"] == task]["correct"].to_numpy()
    conditions = {
        "full": ("baseline", measured["full"]),
        f"top {len(heads)} heads lose the image": ("targeted", measured["targeted"]),
        "every head loses the image": ("floor", measured["every"]),
        "another scene's image": ("floor", blind),
    }
    exhibits.head_ablation(evidence, task, conditions, measured["cluster"], heads, baseline.chance)
    exhibits.head_map(evidence, task, ranked.coefficients, heads, ranked.r2)
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
    ranked, items, measured = attribution(task), probes.confirmation[task], removal(task)
    heads = ranked.top(TOP_HEADS)
    exhibits_ablation.ablation_grid(evidence, ablations(task), task, floors.chance[task])
    try:
        matched = layer_matched(heads, subject, profile.random_draws, seed)
    except ValueError as reason:
        evidence.decide(SPECIFICITY, None, missing=str(reason))
    anywhere = layer_free(heads, subject, profile.random_draws // 8, seed)
    conditions = {f"matched/{i}": blinded(h) for i, h in enumerate(matched)}
    plan, shared = assign_shared(list(conditions), len(items), profile.items_per_draw, DRAWS_PER_ITEM, seed)
    free_conditions = {f"anywhere/{i}": blinded(h) for i, h in enumerate(anywhere)}
    plan += assign_draws(list(free_conditions), len(items), DRAWS_PER_ITEM, seed)
    table = sweeps(f"random heads, {task}", items, conditions | free_conditions, metrics=("correct",), assignments=plan)
    random, free = (draw_means(table, group, measured.index) for group in ("matched", "anywhere"))
    common = [items[k]["id"] for k in shared]
    lost = draw_losses(table, "matched", measured["full"], common)
    targeted = float((measured["full"] - measured["targeted"]).loc[common].mean())
    p_value = draw_p(targeted, lost, matching_sets(heads, subject))
    exhibits.null_draws(evidence, task, lost, targeted, p_value)
    as_much = placebo(task, "margin")
    evidence.decide(
        SPECIFICITY,
        random - measured["targeted"],
        clusters=measured["cluster"],
        baseline=floors.of(task),
        controls=[
            floors.grounded(task, SPECIFICITY.test.threshold), prediction_of_unseen_masks(ranked), stands_out(p_value, lost, len(common)),
            more_than_any_disturbance(as_much),
        ],
        details={
            "heads": [list(h) for h in heads],
            "draws": len(lost),
            "items of every draw": len(common),
            "monte_carlo_p": p_value,
            "accuracy_lost": {
                "targeted": float((measured["full"] - measured["targeted"]).mean()),
                "random, same layers": float((measured["full"] - random).mean()),
                "random, any layer": float((measured["full"] - free).mean()),
            },
            "margin_lost": {
                "image removed": float(as_much["removed"].mean()),
                "disturbed as much": float(as_much["disturbed"].mean()),
                "items": len(as_much),
            },
            "literature": LITERATURE,
        },
    )


def stands_out(p_value, lost, n_items) -> Control:
    """The targeted heads must cost more than nearly all sets that match them, not only more than their mean."""
    limit = SPECIFICITY.alpha
    expected = f"below {limit:g} over {len(lost)} sets on the same {n_items} items"
    return Control("Monte-Carlo p against sets of the same layers", "condition", p_value < limit, p_value, expected)


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
    mask = target_mask(item)
    if not subject.layout(item["image"], item["prompt"]).reason:
        heat = attention_heatmap(subject, item, heads, mask.shape)
        exhibits.attention_overlay(evidence, item, heat, mask, f"{task}: where the targeted heads look")
