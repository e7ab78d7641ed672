"""H1: where the answer's information is, by activation patching.

Layers and places are those of the prompt; no place or layer is chosen. The pairs that patching needs differ in one attribute of one object,
or in noise on the image.
"""

import numpy as np
import pytest

from hypotheses.h1.controls import pooled_grounding, worth_something
from reports import exhibits_tracing
from vlm_core.stats import Claim, Control, Superiority, estimate_statistic
from vlm_core.tracing.patching import DIRECTIONS

PATCHING = Claim(
    id="H1.patching",
    sentence="In the first half of the layers the image's tokens, in the second half the last token are sufficient and necessary.",
    effect="half of (share of the logit difference held by the image's tokens minus by the last token: mean over the first half of the "
    "inner layers minus mean over the second), the lesser of denoising and noising, pooled over items; 0.5 is an even pace",
    test=Superiority(0.25),
    source="methods: Meng et al. 2022, arXiv:2202.05262; Zhang & Nanda 2024, arXiv:2309.16042; the contrast and its threshold are ours",
    tier="exploratory",
)
LITERATURE = {
    "published": "none for this contrast; noise and counterfactual pairs are known to disagree (Zhang & Nanda 2024)",
    "where": "language models",
}
MEANING = {
    "sufficient": "1: putting the clean run's activations into the corrupted run brings back the clean answer.",
    "necessary": "1: putting the corrupted run's activations into the clean run destroys it as the corruption does.",
}


@pytest.mark.claim(PATCHING)
@pytest.mark.parametrize("corruption", ["Gaussian noise", "paired image"])
def test_the_answer_goes_from_the_image_to_the_last_token(corruption, floors, patching, evidence):
    layers, heads = patching(corruption), patching(corruption, heads=True)
    exhibits_tracing.patching_curves(evidence, corruption, layers, MEANING)
    exhibits_tracing.patching_heads(evidence, corruption, heads, MEANING)
    alpha = PATCHING.alpha / evidence.family_size
    evidence.decide(
        PATCHING,
        estimate_statistic(layers.handover(), layers.clusters, smallest_alpha=alpha, rng=evidence.seed),
        controls=[
            pooled_grounding(floors, layers.items, 0.05),
            worth_something("the corruption costs the answer", "floor", layers.gap, layers.clusters),
            every_token_recovers(layers),
            itself_changes_nothing(layers),
        ],
        details={
            "items": len(layers.items),
            "logit_difference": {"clean": float(layers.clean.mean()), "corrupted": float(layers.corrupted.mean())},
            "layers": list(layers.layers),
            "share": {d: dict(zip(layers.places, layers.share(d).T.tolist(), strict=True)) for d in DIRECTIONS},
            "literature": LITERATURE,
        },
    )


def every_token_recovers(layers) -> Control:
    """Every token patched at one layer is the other run from there on: all of the difference is moved, whatever the layer."""
    every = layers.places.index("all")
    off = max(float(np.abs(layers.share(direction)[:, every] - 1).max()) for direction in DIRECTIONS)
    return Control("every token patched", "positive", off <= 0.05, off, "at most 0.05 away from the other run")


def itself_changes_nothing(layers) -> Control:
    """A run that is patched by itself is that run."""
    off = float(np.abs(layers.itself - layers.corrupted).mean() / max(abs(layers.gap.mean()), 1e-12))
    return Control("a run patched by itself", "negative", off <= 0.05, off, "at most 0.05 of the logit difference moved")
