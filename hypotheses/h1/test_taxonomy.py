"""H1: heads have kinds of work, and what they look at tells which.

Categories come from interventions on discovery items (which path through a head the answer needs), features from attention on confirmation
items: nothing that defines a category is among what predicts it.
"""

import numpy as np
import pytest

from fixtures.measurements import TOP_HEADS
from hypotheses.h1.controls import grounded_overall, prediction_of_unseen_masks
from reports import exhibits
from vlm_core.heads.features import FEATURES
from vlm_core.heads.probing import tell_categories, tell_grounded
from vlm_core.heads.taxonomy import category_agreement, cluster_heads
from vlm_core.stats import Claim, Superiority

SOURCE = "Kim et al. 2025, arXiv:2509.17588; control as in Hewitt & Liang 2019, arXiv:1909.03368"
TAXONOMY = Claim(
    id="H1.taxonomy",
    sentence="A linear probe tells head categories apart from head features, above label-shuffled controls by 0.2.",
    effect="balanced accuracy on heads of layers that the probe was not fitted to, features around their layer's mean - that of probes "
    "fitted to labels shuffled among the heads of each layer, so that the gain is what tells heads of one layer apart",
    test=Superiority(0.2),
    source=SOURCE,
    tier="exploratory",
    unit="layer",
    min_clusters=12,  # models have 24 to 80 layers, and few have kinds of heads in all of them: t on the layers' means is made for so few
)
GROUNDEDNESS = Claim(
    id="H1.taxonomy_groundedness",
    sentence="A linear probe tells groundedness from head features, above label-shuffled controls by 0.2.",
    effect="balanced accuracy on answers of other scenes than the probe was fitted to - that of probes fitted to answers of which it is drawn "
    "at random which of an item's two images is called its own",
    test=Superiority(0.2),
    source=SOURCE,
    tier="exploratory",
)


@pytest.mark.claim(TAXONOMY)
def test_features_tell_categories_apart(
    probes, floors, seed, taxonomy, seen_features, attribution, pooled_attribution, other_scores, other_words, evidence
):
    seen = seen_features("discovery")
    clusters = cluster_heads(seen.matrix(), seed=seed)
    same = category_agreement(taxonomy.effects, least=taxonomy.least, seed=seed)
    stability = {"scenes": (same, seen.agreement(seed), {}), "wordings": other_words()}
    exhibits.heads.taxonomy(evidence, taxonomy.as_dict(seen), clusters, taxonomy.least, stability)
    exhibits.heads.head_features(evidence, feature_tables(probes.tasks, seen, attribution, pooled_attribution, taxonomy, other_scores), FEATURES)
    told, heads, missing = tell_categories(seen_features("confirmation").matrix(), taxonomy.category, seed=seed)
    exhibits.heads.probe(
        evidence, "the category of a head", told, "Heads of layers that the probe was not fitted to, features of confirmation items; labels are "
        "shuffled within layers",
    )  # fmt: skip
    evidence.decide(
        TAXONOMY,
        None if missing else told.gain,
        missing=missing,
        clusters=heads // taxonomy.category.shape[1],
        bounds=None,
        p_value=told.p_value,
        controls=[grounded_overall(floors, TAXONOMY.test.threshold), prediction_of_unseen_masks(pooled_attribution)],
        details={
            "accuracy": told.accuracy,
            "control_accuracy": told.control_accuracy,
            "heads_by_category": taxonomy.counts(),
            "same_category_between": {name: {"share": one.share, "by chance": one.by_chance} for name, (one, *_) in stability.items()},
            "categories_told_apart": list(told.classes),
            "silhouette": {"k": clusters.k, "measured": clusters.silhouette, "features permuted": clusters.permuted.mean()},
        },
    )


@pytest.mark.claim(GROUNDEDNESS)
def test_features_tell_whether_an_answer_is_grounded(floors, seed, grounded_answers, evidence):
    learnt, asked = grounded_answers("discovery"), grounded_answers("confirmation")
    told = tell_grounded(learnt, asked, seed=seed)
    exhibits.heads.probe(evidence, "groundedness of an answer", told, "Confirmation answers, the probe fitted to discovery answers")
    evidence.decide(
        GROUNDEDNESS,
        told.gain,
        clusters=asked.clusters,
        bounds=None,
        p_value=told.p_value,
        controls=[grounded_overall(floors, GROUNDEDNESS.test.threshold)],
        details={
            "accuracy": told.accuracy,
            "control_accuracy": told.control_accuracy,
            "pairs": {"discovery": len(learnt.items) // 2, "confirmation": len(asked.items) // 2, "items": asked.asked},
            "label": "an answer that is right with its own image and lost with another's, under either image; the others are those of the pairs, exchanged",
        },
    )


def feature_tables(tasks, seen, attribution, pooled, taxonomy, other_scores) -> dict:
    """One row a head: of all tasks, and of each task's own discovery items."""

    def known(ranked):
        chosen = np.zeros(ranked.coefficients.shape, dtype=bool)
        chosen[tuple(np.transpose(ranked.top(TOP_HEADS)))] = True
        return {
            "attribution": (ranked.per_item, ranked.clusters),
            "targeted": chosen,
            "category": taxonomy.category,
            "confidence": taxonomy.confidence,
        }

    tables = {task: seen.of(task).table(known(attribution(task))) for task in tasks}
    return {"all": seen.table(known(pooled) | taxonomy.effects.table() | other_scores()), **tables}
