"""H1: an object's word in the logit lens of its own image tokens.

A word that many answers use climbs everywhere late in a model; what is tested is its lead at the object's own tokens over those of other
objects. A lead grows too where the word sinks in its own tokens and sinks deeper in others': that it climbs in its own is a condition. The three stages of entropy are two claims, a fall and a rise at the end, each with bounds of its own: stages there are where both hold.
"""

import pytest

from hypotheses.h1.controls import pooled_grounding
from reports import exhibits
from vlm_core.stats import Claim, Control, Superiority, Trend, estimate_mean, linear_contrast, page_p
from vlm_core.tracing.lens_tracks import entropy_stages

WORD = Claim(
    id="H1.lens",
    sentence="The object's word climbs in the logit lens of its own patches with depth, beyond other objects' patches.",
    effect="slope over layers of log rank(others' patches) - log rank(own patches), per item; condition: -log rank(own patches) has a slope above 0",
    test=Trend(),
    source="Neo et al., ICLR 2025",
    tier="exploratory",
)
ENTROPY = Claim(
    id="H1.lens_entropy",
    sentence="The entropy of the object's patches in the logit lens falls with depth, and rises at the end.",
    effect="fall: mean over the first third of the layers - mean over the last third; rise: output - mean over the last third; nats, per item",
    test=Superiority(0.0),
    source="Neo et al., ICLR 2025; where the stages begin is ours",
    tier="exploratory",
)
LITERATURE = {"published": "the word climbs; entropy high, falling, slightly rising", "where": "LLaVA-1.5-7B, COCO"}


@pytest.mark.claim(WORD)
def test_the_word_climbs_where_its_object_is(subject, words_in_the_lens, floors, evidence):
    lead, clusters = words_in_the_lens.lead(), words_in_the_lens.clusters
    if lead.shape[1] < 3:
        pytest.skip(f"a trend needs three depths and the subject has {lead.shape[1]}")
    exhibits.masks.words_in_the_lens(evidence, words_in_the_lens)
    evidence.decide(
        WORD,
        linear_contrast(lead),
        clusters=clusters,
        controls=[pooled_grounding(floors, words_in_the_lens.items, 0.10), climbs(words_in_the_lens, evidence)],
        p_value=page_p(lead, clusters),
        details={
            "log rank, own tokens": words_in_the_lens.log_rank["own"].mean(0).tolist(),
            "log rank, other objects' tokens": words_in_the_lens.log_rank["others"].mean(0).tolist(),
            "literature": LITERATURE,
        },
    )


def climbs(tracks, evidence) -> Control:
    """The word must climb in its own patches, not only sink less there than in others'."""
    alpha = evidence.alpha
    slope = estimate_mean(linear_contrast(-tracks.log_rank["own"]), tracks.clusters, bounds=None, smallest_alpha=alpha, rng=evidence.seed)
    lower = None if slope is None else slope.bounds(alpha)[0]
    return Control("the word climbs in its own patches", "condition", lower is not None and lower > 0, lower, "a lower bound of the slope above 0")


@pytest.mark.claim(ENTROPY)
@pytest.mark.parametrize("stage", ["fall", "rise"])
def test_entropy_falls_and_rises_at_the_end(stage, subject, words_in_the_lens, floors, evidence):
    if subject.anatomy.n_layers < 3:
        pytest.skip(f"three stages need three layers and the subject has {subject.anatomy.n_layers}")
    stages = dict(zip(("fall", "rise"), entropy_stages(words_in_the_lens.entropy), strict=True))
    evidence.decide(
        ENTROPY,
        stages[stage],
        clusters=words_in_the_lens.clusters,
        controls=[pooled_grounding(floors, words_in_the_lens.items, 0.10)],
        bounds=None,
        details={"entropy": words_in_the_lens.entropy.mean(0).tolist(), "literature": LITERATURE},
    )
