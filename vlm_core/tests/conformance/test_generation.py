"""Generated tokens under interventions."""

from __future__ import annotations

import torch

from vlm_core import Batch, Subject
from vlm_core.interventions import DropTokens, KnockOut, MergeTokens, ReplaceImageKV, ZeroHeads
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import batch_of, close, image_heads, inner, lengthened, logits_of, some_means, subject_of
from vlm_core.tests.family_models import AFTER, IMAGE_TOKEN

STEPS = 4


def plans_of(subject: Subject) -> list:
    anatomy = subject.anatomy
    means, heads = some_means(anatomy), image_heads(anatomy)
    plans = [
        None,
        ZeroHeads([(1, 0), (3, 2)]),
        KnockOut("text", "image", anatomy.image_layers[-2:]),
        KnockOut("last", "image", anatomy.image_layers),
        ReplaceImageKV(heads, means),
        ReplaceImageKV(heads, means, queries="last"),
        (ZeroHeads([(2, 1)], queries="last"), KnockOut("answer", "image", anatomy.image_layers[-1:])),
    ]
    if "drop" in subject.capabilities:
        plans += [DropTokens(2, 0.5, "stride"), DropTokens(2, 0.5, "attention"), (MergeTokens(2, 0.5), ZeroHeads([(3, 0)]))]
    return plans


@conforms("generate")
def test_generate(name):
    """Against one forward pass a token: with the cache of the passes before, and on the whole sequence without any."""
    subject, batch = subject_of(name), batch_of(name)
    told = []
    for plan in plans_of(subject):
        tokens, logits = generate(subject, plan, batch)
        close(logits, one_by_one(subject, name, plan, batch, tokens), f"{plan}, with a cache")
        close(logits, without_cache(subject, name, plan, batch, tokens), f"{plan}, without a cache")
        told.append(logits)
    for number, logits in enumerate(told):
        assert all(not torch.allclose(logits, other) for other in told[:number])


@conforms("generate padded")
def test_generate_padded(name):
    subject, closings = subject_of(name), ((12, 17), AFTER)
    for plan in plans_of(subject):
        tokens, padded = generate(subject, plan, batch_of(name, counts=(1, 1), after=closings, side="left"))
        for row in (0, 1):
            alone = batch_of(name, after=closings[row : row + 1], start=row)
            own, logits = generate(subject, plan, alone)
            assert torch.equal(tokens[row], own[0])
            close(padded[row], logits[0], f"{plan}, generated from a prompt padded on the left")


def generate(subject: Subject, plan, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens of each prompt, and the logits that they were chosen by."""
    with torch.inference_mode(), subject.intervene(plan, batch):
        generated = subject.model.generate(
            **batch.inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0,
            suppress_tokens=[IMAGE_TOKEN, 61, 62, 63], return_dict_in_generate=True, output_logits=True,
        )
    return generated.sequences[:, -STEPS:], torch.stack(generated.logits, dim=1)


def one_by_one(subject: Subject, name: str, plan, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the prompt's last token and then of one token after the other, each a call with the cache.

    A prompt alone has no padding, and needs no mask.
    """
    # BLIP-2 wants an image in every call; its language model goes on alone.
    decoder = subject.model if subject.anatomy.family.base else subject.model.language_model
    with torch.inference_mode(), subject.intervene(plan, batch):
        output = inner(subject.model(**batch.inputs, use_cache=True))
        logits = [output.logits[:, -1]]
        for step in range(1, STEPS):
            inputs = lengthened(name, batch, tokens[:, :step]).inputs
            seen = {key: inputs[key] for key in ("cross_attention_mask",) if key in inputs}
            output = decoder(inputs["input_ids"][:, -1:], **seen, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


def without_cache(subject: Subject, name: str, plan, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """The same with the whole sequence run again for every token; the answer so far is a token group."""
    logits, n = [], batch.image.shape[1]
    for step in range(STEPS):
        longer = lengthened(name, batch, tokens[:, :step])
        answer = (torch.arange(longer.image.shape[1]) >= n).expand_as(longer.image)
        with subject.intervene(plan, longer, groups={"answer": answer}):
            logits.append(logits_of(subject.model, longer)[:, -1])
    return torch.stack(logits, dim=1)
