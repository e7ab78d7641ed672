"""The same numbers from the same prompt, whatever it is padded with."""

from __future__ import annotations

import torch

from vlm_core import (
    AttentionEntropy,
    AttentionMass,
    Batch,
    HeadOutputs,
    HiddenStates,
    ImageAttention,
    MaskIoU,
    SinkMass,
    Sinks,
    Subject,
    TopTokens,
)
from vlm_core.interventions import DropTokens, KnockOut, MergeTokens, ReplaceImageKV, ZeroHeads
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import batch_of, close, image_heads, logits_under, some_means, subject_of
from vlm_core.tests.family_models import AFTER


@conforms("padding")
def test_padding(name):
    subject = subject_of(name)
    intervention = (
        ZeroHeads([(1, 0), (2, 3)]),
        ReplaceImageKV(image_heads(subject.anatomy), some_means(subject.anatomy)),
        KnockOut("text", "image", subject.anatomy.image_layers[:1]),
    )
    for closings in (((12, 17), AFTER), (AFTER, (12, 17))):
        alone = logits_under(subject, intervention, batch_of(name, after=closings[:1]))[0, -1]
        seen = {}
        for side in ("left", "right"):
            batch = batch_of(name, counts=(1, 1), after=closings, side=side)
            last = batch.valid.shape[1] - 1 - batch.valid.flip(1).int().argmax(1)
            seen[side] = logits_under(subject, intervention, batch)[torch.arange(2), last]
            close(seen[side][0], alone, f"{side} padding")
        close(seen["left"], seen["right"], "left and right")


OBSERVERS = (
    AttentionMass("last", groups=("image", "text", "last", "bos")),
    AttentionMass("text", groups=("image", "text")),
    AttentionEntropy("text", over=("all", "image")),
    ImageAttention("question"),
    MaskIoU("object"),
    SinkMass(queries="text", sinks=Sinks((0, 3), 1.0)),
    TopTokens(3, "last"),
    TopTokens(2, "text", among="image"),
    HeadOutputs("last"),
    HeadOutputs("mean"),
    HeadOutputs("norm"),
    HiddenStates(),
    HiddenStates(positions="image"),
    HiddenStates(positions=(1, -2)),
)


@conforms("observers")
def test_observers_see_no_padding(name):
    """The prompt alone, padded on the left and on the right: also where an image token that it began with is gone."""
    subject, closings = subject_of(name), ((12, 17), AFTER)
    plans = [[None, ZeroHeads([(0, 1), (1, 2)])]]
    if "drop" in subject.capabilities:
        plans += [[DropTokens(1, 0.25, "stride"), DropTokens(1, 0.5, "stride")], [None, MergeTokens(1, 0.5)]]
    for plan in plans:
        prompts = [batch_of(name, after=closings[row : row + 1], start=row) for row in (0, 1)]
        alone = [observed(subject, plan[row], prompts[row], 0) for row in (0, 1)]
        for side in ("left", "right"):
            batch = batch_of(name, counts=(1, 1), after=closings, side=side)
            for row in (0, 1):
                seen = observed(subject, plan, batch, row)
                assert seen.keys() == alone[row].keys()
                for place, value in seen.items():
                    same(value, alone[row][place], f"{plan}, {side} padding, prompt {row}, {place}")
        for drop, prompt, seen in zip(plan, prompts, alone, strict=True):
            if isinstance(drop, DropTokens):
                numbers = prompt.image[0].nonzero()[:, 0]
                left = drop.count(len(numbers))
                kept = {int(numbers[int((place + 0.5) * len(numbers) / left)]) for place in range(left)}
                told = {int(number) for (_, _, part, layer), index in seen.items() if part == "index" and layer >= 1
                        for number in index.flatten() if number >= 0 and prompt.image[0, number]}
                assert told <= kept, f"top tokens {sorted(told)} are none of those left, {sorted(kept)}"


def observed(subject: Subject, plan, batch: Batch, row: int) -> dict[tuple, torch.Tensor]:
    """What every observer sees of one prompt, by observer, name and layer."""
    every_third = batch.image & (batch.image.cumsum(1) % 3 == 1)
    with torch.inference_mode(), subject.intervene(plan, batch, OBSERVERS, groups={"object": every_third}) as run:
        subject.model(**batch.inputs, use_cache=False)
    found = {}
    for number, observer in enumerate(OBSERVERS):
        for layer in run.records[number]:
            record = run.record(number, layer)
            for part, values in (record if isinstance(record, dict) else {"": record}).items():
                # As wide as the widest of its batch, filled up with NaN.
                width = int(batch.image.sum(1).max()) - values.shape[-1] if -1 in getattr(observer, "ragged", {}) else 0
                found[type(observer).__name__, number, part, layer] = torch.nn.functional.pad(
                    values[row], (0, max(0, width)), value=torch.nan
                )
    return found


def same(seen: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    """``close``, with NaN and whole numbers in the same places."""
    if not seen.is_floating_point():
        assert torch.equal(seen, expected), message
        return
    assert torch.equal(seen.isnan(), expected.isnan()), message
    if bool(seen.isfinite().any()):
        close(seen.nan_to_num(), expected.nan_to_num(), message)
