"""A positive control: where exactly two heads carry the image, every method that names heads names those two, and the claims hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_core import ReplaceImageKV, head_attribution, image_kv_means, sweep
from vlm_core.heads.draws import layer_matched
from vlm_core.heads.ranking import top_heads
from vlm_core.heads.rankings import attention_mass
from vlm_core.heads.taxonomy import NO_EFFECT, categorise, path_effects
from vlm_core.stats import Baseline, Claim, Superiority, decide
from vlm_core.tables import wide
from vlm_core.tests.planted import planted_subject
from vlm_core.tests.tiny import WORDS, make_items

PLANTED = ((0, 1), (2, 3))
DECOY = (1, 2)
NECESSITY = Claim("T.necessity", "s", "e", Superiority(0.10), "here")
SPECIFICITY = Claim("T.specificity", "s", "e", Superiority(0.05), "here")


def plain_images(items):
    """The items over images of one colour each, which differ more than noise does."""
    rng = np.random.default_rng(0)
    return [{**item, "image": Image.new("RGB", item["image"].size, tuple(rng.integers(0, 256, 3).tolist()))} for item in items]


def answered_by(subject, items):
    """Items whose right answer is what the subject says: it is never wrong until something is taken from it."""
    words = [word for word in WORDS if word not in (":", "?")]
    said = [{**item, "candidates": words, "answer": words[0]} for item in items]
    choice = sweep(subject, said, [None], metrics=("choice",))["value"].astype(int)
    return [{**item, "answer": words[k]} for item, k in zip(said, choice, strict=True)]


@pytest.fixture(scope="module")
def planted():
    """The subject, its items and mean image; the decoy head stares at the image and passes nothing on."""
    subject = planted_subject(PLANTED)
    layer, head = DECOY
    attention = subject.model.model.language_model.layers[layer].self_attn
    rows = slice(8 * head, 8 * head + 8)
    stares = 20 * torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.o_proj.weight[:, rows] = 0
        attention.k_proj.weight[rows] = 0
        attention.k_proj.weight[rows, :10] = stares
        subject.model.get_output_embeddings().weight[:, 10:22] *= 0.05  # the image decides, not the question
        if attention_mass(subject, make_items(4)).mean(0)[DECOY] < 0.5:
            attention.k_proj.weight[rows, :10] = -stares  # its queries point the other way
    items = answered_by(subject, plain_images(make_items(60)))
    assert len({item["answer"] for item in items}) > 3
    return subject, items, image_kv_means(subject, items)


@pytest.fixture(scope="module")
def single(planted):
    """Correctness and margin per item with the image removed from one head, from the planted ones, from all others, from all."""
    subject, items, means = planted
    others = [head for head in subject.heads if head not in PLANTED]
    sets = {"planted": PLANTED, "others": others, "all": subject.heads, **{str(head): [head] for head in subject.heads}}
    conditions = {"full": None, **{label: ReplaceImageKV(heads, means, queries="text") for label, heads in sets.items()}}
    return sweep(subject, items, conditions, metrics=("correct", "margin"))


def test_the_surgery_did_what_it_says(single):
    right = wide(single).mean(numeric_only=True)
    assert right["full"] == right["others"] == 1.0
    margins = wide(single, "margin")
    np.testing.assert_allclose(margins["others"], margins["full"], atol=1e-4)
    np.testing.assert_allclose(margins["planted"], margins["all"], atol=1e-4)
    assert right["planted"] < 0.7


def test_attribution_and_ablation_name_exactly_the_planted_heads(planted, single):
    subject, items, means = planted
    found = head_attribution(subject, items, means, masks_per_item=48, keep_probability=0.8)
    assert set(found.top(len(PLANTED))) == set(PLANTED) and found.r2 > 0.7
    weakest = min(found.coefficients[head] for head in PLANTED)
    assert max(abs(found.coefficients[head]) for head in subject.heads if head not in PLANTED) < weakest / 4
    margins = wide(single, "margin")
    lost = np.array([(margins["full"] - margins[str(head)]).mean() for head in subject.heads]).reshape(found.coefficients.shape)
    assert set(top_heads(lost, len(PLANTED))) == set(PLANTED)


def test_a_head_that_stares_at_the_image_and_passes_nothing_on_is_not_named(planted):
    subject, items, means = planted
    mass = attention_mass(subject, items).mean(0)
    assert mass[DECOY] > max(0.7, *(mass[head] for head in subject.heads if head not in (DECOY, *PLANTED)))  # by its looks it would be named
    found = head_attribution(subject, items, means, masks_per_item=48, keep_probability=0.8)
    assert abs(found.coefficients[DECOY]) < 0.02 * max(found.coefficients[head] for head in PLANTED)


def test_the_claims_hold_for_the_planted_heads_and_for_no_others(planted, single):
    subject, items, means = planted
    right = wide(single)
    baseline = Baseline(1.0, float(right["all"].mean()), 1 / len(items[0]["candidates"]))
    necessity = decide(NECESSITY, right["full"] - right["planted"], clusters=right["cluster"], baseline=baseline)
    assert necessity.verdict.value == "supported", necessity.reason
    others = decide(NECESSITY, right["full"] - right["others"], clusters=right["cluster"], baseline=baseline)
    assert others.verdict.value == "refuted"
    draws = [heads for heads in layer_matched(PLANTED, subject, 12) if not set(heads) & set(PLANTED)]
    random = wide(sweep(subject, items, {str(k): ReplaceImageKV(heads, means, queries="text") for k, heads in enumerate(draws)}))
    mean = random[[str(k) for k in range(len(draws))]].astype(float).mean(1)
    specificity = decide(SPECIFICITY, mean - right["planted"], clusters=right["cluster"], baseline=baseline)
    assert specificity.verdict.value == "supported", specificity.reason


def test_the_taxonomy_calls_the_planted_heads_grounding_and_the_staring_head_nothing(planted):
    subject, items, means = planted
    found = categorise(path_effects(subject, items[:30], means), draws=100)
    assert {head for head in subject.heads if found.category[head] == "cross-modal grounding"} == set(PLANTED)
    assert found.category[DECOY] == NO_EFFECT
