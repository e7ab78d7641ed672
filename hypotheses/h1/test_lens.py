"""H1: an object's word in the logit lens of its own image tokens.

A word that many answers use climbs everywhere late in a model; what is tested is its lead at the object's own tokens over those of other
objects.
"""

import pytest

from hypotheses.h1.controls import pooled_grounding
from reports import exhibits_masks
from vlm_core.stats import Claim, Trend, estimate_statistic, interval, linear_contrast, page_p, sign_flip_p
from vlm_core.tracing.lens_tracks import both_stages, entropy_stages

LENS = Claim(
    id="H1.lens",
    sentence="The object's word climbs in the logit lens of its own patches with depth; the lens' entropy is high, falls, rises at the end.",
    effect="rank: slope over layers of log rank(others' patches) - log rank(own patches); entropy: the smaller of its fall and its rise",
    test=Trend(),
    source="Neo et al., ICLR 2025",
    tier="exploratory",
)
LITERATURE = {"published": "the word climbs; entropy high, falling, slightly rising", "where": "LLaVA-1.5-7B, COCO"}


@pytest.mark.claim(LENS, track="rank")
def test_the_word_climbs_where_its_object_is(subject, words_in_the_lens, floors, evidence):
    lead, clusters = words_in_the_lens.lead(), words_in_the_lens.clusters
    if lead.shape[1] < 3:
        pytest.skip(f"a trend needs three depths and the subject has {lead.shape[1]}")
    exhibits_masks.words_in_the_lens(evidence, words_in_the_lens)
    evidence.decide(
        LENS,
        linear_contrast(lead),
        clusters=clusters,
        controls=[pooled_grounding(floors, words_in_the_lens.items, 0.10)],
        p_value=page_p(lead, clusters),
        details={
            "log rank, own tokens": words_in_the_lens.log_rank["own"].mean(0).tolist(),
            "log rank, other objects' tokens": words_in_the_lens.log_rank["others"].mean(0).tolist(),
            "literature": LITERATURE,
        },
    )


@pytest.mark.claim(LENS, track="entropy")
def test_entropy_has_three_stages(subject, words_in_the_lens, floors, seed, evidence):
    if subject.anatomy.n_layers < 3:
        pytest.skip(f"three stages need three layers and the subject has {subject.anatomy.n_layers}")
    clusters = words_in_the_lens.clusters
    fall, rise = entropy_stages(words_in_the_lens.entropy)
    evidence.decide(
        LENS,
        estimate_statistic(both_stages(fall, rise, clusters), clusters, smallest_alpha=LENS.alpha / evidence.family_size, rng=seed),
        controls=[pooled_grounding(floors, words_in_the_lens.items, 0.10)],
        p_value=max(sign_flip_p(fall, clusters, rng=seed), sign_flip_p(rise, clusters, rng=seed)),
        details={
            "entropy": words_in_the_lens.entropy.mean(0).tolist(),
            "fall": interval(fall, clusters, bounds=None).as_dict(),
            "rise": interval(rise, clusters, bounds=None).as_dict(),
            "literature": LITERATURE,
        },
    )
