"""H1: where the answer's information is, by activation patching.

Layers and places are those of the prompt; no place or layer is chosen. The pairs that patching needs differ in one attribute of one object,
or in noise on the image. What is decided is a handover in two parts, each with an interval of its own: the image's tokens hold more of the
answer in the first half of the depth, the last token in the second; in both directions (sufficient, necessary) and under both corruptions.
"""

import numpy as np
import pytest

from hypotheses.h1.controls import pooled_grounding, worth_something
from reports import exhibits
from vlm_core.stats import Claim, Control, Superiority, estimate_statistic
from vlm_core.tracing.patching import DIRECTIONS

SOURCE = "methods: Meng et al. 2022, arXiv:2202.05262; Zhang & Nanda 2024, arXiv:2309.16042; the contrast is ours"
EARLY = Claim(
    id="H1.patching",
    sentence="In the first half of the layers patching the image's tokens moves more of the answer than patching the last token.",
    effect="share of the logit difference moved by the image's tokens - share moved by the last token, mean over the first half of the inner "
    "layers; a ratio of sums over items",
    test=Superiority(0.0),
    source=SOURCE,
    tier="exploratory",
)
LATE = Claim(
    id="H1.patching_last",
    sentence="In the second half of the layers patching the last token moves more of the answer than patching the image's tokens.",
    effect="share of the logit difference moved by the last token - share moved by the image's tokens, mean over the second half of the inner "
    "layers; a ratio of sums over items",
    test=Superiority(0.0),
    source=SOURCE,
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
CORRUPTIONS = ("Gaussian noise", "paired image")


@pytest.mark.claim(EARLY)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_image_holds_the_answer_at_first(corruption, direction, floors, patching, evidence):
    layers = patching(corruption)

    def show():
        meaning = {direction: MEANING[direction]}
        exhibits.tracing.patching_curves(evidence, corruption, layers, meaning)
        exhibits.tracing.patching_heads(evidence, corruption, patching(corruption, heads=True), meaning)

    decide(EARLY, layers, ("image", "last"), direction, "first", floors, evidence, show)


@pytest.mark.claim(LATE)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_last_token_holds_it_in_the_end(corruption, direction, floors, patching, evidence):
    decide(LATE, patching(corruption), ("last", "image"), direction, "second", floors, evidence)


def decide(claim, layers, places, direction, half, floors, evidence, show=lambda: None) -> None:
    """Decide a claim on the lead of one place over another in half of the depth; ``show()`` draws, where there are halves."""
    details = {
        "items": len(layers.items),
        "logit_difference": {"clean": float(layers.clean.mean()), "corrupted": float(layers.corrupted.mean())},
        "layers": list(layers.layers),
        "share": dict(zip(layers.places, layers.share(direction).T.tolist(), strict=True)),
        "literature": LITERATURE,
    }
    try:
        lead = layers.lead(*places, direction, half)
    except ValueError as reason:
        evidence.decide(claim, None, missing=str(reason), details=details)
        return
    show()
    alpha = evidence.alpha
    evidence.decide(
        claim,
        estimate_statistic(lead, layers.clusters, smallest_alpha=alpha, rng=evidence.seed),
        controls=[
            pooled_grounding(floors, layers.items, 0.05),
            worth_something("the corruption costs the answer", "floor", layers.gap, layers.clusters),
            every_token_recovers(layers),
            itself_changes_nothing(layers),
        ],
        details=details,
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
