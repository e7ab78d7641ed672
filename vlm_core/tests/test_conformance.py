"""Every family measures the same way: the conformance suite, on tiny random-weight models built from configs.

One test a capability, run on every model of ``family_models.TINY``. What a family lacks must be refused in the sentence that
``Family.refusals`` gives. Each outcome is compared with its cell of ``SUPPORT.md`` (``python -m vlm_core.support`` writes it).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
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
    SubjectError,
    TopTokens,
    selfcheck,
)
from vlm_core.interventions import (
    DropTokens,
    GaussianNoise,
    ImageKVMeans,
    KnockOut,
    MergeTokens,
    Patch,
    ReplaceImageKV,
    ReplaceTokens,
    Steer,
    ZeroHeads,
)
from vlm_core.subjects.activations import capture_activations
from vlm_core.subjects.embed import capture
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.support import CLAIMS, contradiction, outcome_property
from vlm_core.sweeps.budget import Budget
from vlm_core.sweeps.engine import RowJob, run_rows
from vlm_core.tests.family_models import AFTER, IMAGE_TOKEN, TINY
from vlm_core.tests.oracles import hooked, merge_by_hand


@cache
def subject_of(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Subject:
    return Subject(TINY[name].model(attention, dtype), name=name)


@cache
def plain_model(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The same weights without any seam."""
    return TINY[name].model(attention, dtype)


def batch_of(name: str, dtype: torch.dtype = torch.float32, **layout) -> Batch:
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in TINY[name].prompts(**layout).items()
    }
    return Batch(inputs, inputs["input_ids"] == IMAGE_TOKEN, inputs["attention_mask"].bool())


def logits_of(model, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch.inputs, use_cache=False).logits


def logits_under(subject: Subject, intervention, batch: Batch, observers=()) -> torch.Tensor:
    with subject.intervene(intervention, batch, observers=observers):
        return logits_of(subject.model, batch)


TOLERANCE = 2e-5
"""Largest difference between two ways to compute the same numbers in float32, as a share of the largest of them.

About three times what is seen: at most 3.4e-6 between a fast path and the whole model, 6.9e-6 between a knock-out under sdpa
and a mask under eager attention, on the 23 models and all the versions of ``SUPPORT.md``. float32 resolves 1.2e-7 of each
number that enters a sum.
"""


def close(seen: torch.Tensor, expected: torch.Tensor, message: str = "") -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(seen, expected, rtol=0.0, atol=TOLERANCE * largest, msg=lambda text: f"{message}: {text}")


def some_means(anatomy, seed: int = 0) -> ImageKVMeans:
    shape = (anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
    generator = torch.Generator().manual_seed(seed)
    return ImageKVMeans(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def image_heads(anatomy) -> list[tuple[int, int]]:
    """A head of each of the last two layers that hold image keys."""
    return [(layer, head) for head, layer in enumerate(anatomy.image_layers[-2:], start=1)]


class Grab:
    """Keeps what the seam sees, and leaves no record."""

    def __init__(self) -> None:
        self.views = {}

    def attention(self, view):
        self.views[view.layer] = view


@pytest.fixture
def support(request, record_property):
    """Say what came out for a model and a capability: it must be what ``SUPPORT.md`` says."""

    def say(name: str, capability: str, verdict: str) -> None:
        record_property(*outcome_property(name, capability, verdict))
        wrong = contradiction(name, capability, verdict)
        assert wrong is None, wrong

    return say


CHECKED: list[str] = []
"""Claims of the matrix that a test below stands for."""


def conforms(title: str, needs: str | None = None, refused_by=None, unavailable=None):
    """Run a check on every model and say how it came out.

    ``needs``: a capability without which ``refused_by(subject, batch)`` must be refused with the family's reason.
    ``unavailable(name)``: why the question does not arise on a model (having checked that who asks is told), or None.
    """
    assert title in CLAIMS
    CHECKED.append(title)

    def wrap(check):
        @pytest.mark.parametrize("name", TINY)
        def test(name, support):
            reason = unavailable(name) if unavailable else None
            if reason is not None:
                support(name, title, f"not applicable: {reason}")
                return
            subject = subject_of(name)
            if needs is not None and needs not in subject.capabilities:
                with pytest.raises(ValueError, match=f"lacks '{needs}'") as refused:
                    refused_by(subject, batch_of(name))
                stated = subject.anatomy.family.refusals[needs]
                assert stated in str(refused.value)
                support(name, title, f"no: {stated}")
                return
            check(name)
            support(name, title, "yes")

        test.__doc__ = check.__doc__
        return test

    return wrap


# -- the model itself ---------------------------------------------------------------------------------------------------


@conforms("no-op")
def test_noop(name):
    for attention in TINY[name].attentions:
        batch = batch_of(name)
        plain = logits_of(plain_model(name, attention), batch)
        subject = subject_of(name, attention)
        assert torch.equal(logits_under(subject, None, batch), plain)
        assert torch.equal(logits_of(subject.model, batch), plain)


@conforms("bfloat16")
def test_bfloat16(name):
    batch, dtype = batch_of(name, torch.bfloat16), torch.bfloat16
    subject = subject_of(name, dtype=dtype)
    plain = logits_of(plain_model(name, dtype=dtype), batch)
    assert torch.equal(logits_under(subject, None, batch), plain)
    heads = [(1, 0), (3, 2)]
    zeroed = logits_under(subject, ZeroHeads(heads), batch)
    assert torch.equal(zeroed, zeroed_by_hooks(subject, heads, batch))
    assert not torch.equal(zeroed, plain)
    replaced = logits_under(subject, ReplaceImageKV(image_heads(subject.anatomy), some_means(subject.anatomy)), batch)
    assert replaced.isfinite().all() and not torch.equal(replaced, plain)


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


@conforms("hidden states")
def test_hidden_states(name):
    subject, batch = subject_of(name), batch_of(name)
    layer = 2
    zero = ZeroHeads([(layer, head) for head in range(subject.anatomy.n_heads)])
    with torch.inference_mode():
        plain = inner(subject.model(**batch.inputs, use_cache=False, output_hidden_states=True))
        with subject.intervene(zero, batch):
            seen = inner(subject.model(**batch.inputs, use_cache=False, output_hidden_states=True))
    assert len(seen.hidden_states) == subject.anatomy.n_layers + 1
    for index in range(layer + 1):
        assert torch.equal(seen.hidden_states[index], plain.hidden_states[index])
    for index in range(layer + 1, subject.anatomy.n_layers + 1):
        assert not torch.equal(seen.hidden_states[index], plain.hidden_states[index])
    assert torch.equal(seen.logits, logits_under(subject, zero, batch))


def inner(output):
    """What the language model returned, where a family wraps it."""
    return getattr(output, "language_model_outputs", None) or output


@conforms("restored")
def test_restoration(name):
    subject, batch = subject_of(name), batch_of(name)
    plain = logits_of(subject.model, batch)
    zero = ZeroHeads(subject.heads)

    class Fail:
        def attention(self, view):
            if view.layer == 2:
                raise RuntimeError("observer failed")

    with pytest.raises(RuntimeError, match="observer failed"):
        logits_under(subject, zero, batch, [Fail()])
    assert torch.equal(logits_of(subject.model, batch), plain)
    with subject.intervene(zero, batch), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits_of, subject.model, batch).result(), plain)
        assert not torch.equal(logits_of(subject.model, batch), plain)
    assert torch.equal(logits_of(subject.model, batch), plain)


@conforms("causality")
def test_causality(name):
    """What comes later changes nothing before it, except inside a prompt that sees itself both ways."""
    subject = subject_of(name)
    family = subject.anatomy.family
    if family.causal_prompt:
        first, second = (batch_of(name, after=((12, 13, 14, last),)) for last in (15, 16))
        n = first.valid.shape[1] - 1
    else:
        # The prompt's tokens see each other both ways; an answer is causal.
        first, second = (batch_of(name, after=((12, 13, 14, last),)) for last in (15, 16))
        before = logits_under(subject, None, first)[:, : -1], logits_under(subject, None, second)[:, : -1]
        assert (before[0] - before[1]).abs().max() > 1e-3
        n = first.valid.shape[1] - 2
        for batch in (first, second):
            for types, causal in family.token_types:
                batch.inputs[types][:, n:] = causal
    close(logits_under(subject, None, first)[:, :n], logits_under(subject, None, second)[:, :n], "later tokens leak")
    assert not torch.allclose(logits_of(subject.model, first)[:, -1], logits_of(subject.model, second)[:, -1])


@conforms(
    "two-way image",
    unavailable=lambda name: None if subject_of(name).anatomy.family.enter == "base" else "its image tokens are causal",
)
def test_image_tokens_see_each_other_both_ways(name):
    subject = subject_of(name)
    with torch.inference_mode():
        sequence, changed = (capture(subject, batch_of(name).inputs)[0] for _ in range(2))
        first = int(sequence.image.int().argmax())
        changed.embeds[first + 1] += 1.0
        hidden, _ = forward_rows(
            subject, [sequence, changed], np.arange(2), [None, None], [0, 0], (np.arange(2), np.full(2, first))
        )
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3


# -- heads --------------------------------------------------------------------------------------------------------------


def zeroed_by_hooks(subject: Subject, heads, batch: Batch) -> torch.Tensor:
    """The oracle: an output-projection pre-hook that zeroes a head's slice."""
    size, handles = subject.anatomy.head_dim, []

    def zero_slice(head):
        def hook(module, args):
            hidden = args[0].clone()
            hidden[..., head * size : (head + 1) * size] = 0
            return (hidden, *args[1:])

        return hook

    for layer, head in heads:
        projection = subject.anatomy.output_projection(layer)
        handles.append(projection.register_forward_pre_hook(zero_slice(head)))
    try:
        return logits_of(subject.model, batch)
    finally:
        for handle in handles:
            handle.remove()


@conforms("zero head")
def test_zero_heads(name):
    subject, batch = subject_of(name), batch_of(name)
    heads = [(0, 1), (1, 0), (1, 3), (3, 2)]
    seen = logits_under(subject, ZeroHeads(heads), batch)
    assert torch.equal(seen, zeroed_by_hooks(subject, heads, batch))
    for head in heads:
        assert not torch.equal(logits_under(subject, ZeroHeads([head]), batch), logits_of(subject.model, batch))


@conforms("gate 1")
def test_gate_one(name):
    """In a batch whose other row loses every head, a row that keeps all of them is the plain model's."""
    subject = subject_of(name)
    batch = batch_of(name, counts=(1, 1), after=((12, 13, 14),) * 2)
    plain = logits_of(subject.model, batch)
    seen = logits_under(subject, [None, ZeroHeads(subject.heads)], batch)
    assert torch.equal(seen[0], plain[0])
    assert not torch.allclose(seen[1], plain[1])


@conforms("head sum")
def test_head_contributions(name):
    subject, batch = subject_of(name), batch_of(name)
    grab, outputs, size = Grab(), {}, subject.anatomy.head_dim
    handles = [
        module.register_forward_hook(lambda module, args, output, layer=layer: outputs.__setitem__(layer, output[0]))
        for layer, module in enumerate(subject.anatomy.attentions)
    ]
    try:
        logits_under(subject, None, batch, [grab])
    finally:
        for handle in handles:
            handle.remove()
    for layer, expected in outputs.items():
        projection = subject.anatomy.output_projection(layer)
        output, weight = grab.views[layer].output, projection.weight.detach()
        parts = [
            output[:, :, head] @ weight[:, head * size : (head + 1) * size].T for head in range(subject.anatomy.n_heads)
        ]
        total = sum(parts) + (0 if projection.bias is None else projection.bias.detach())
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    assert sorted(outputs) == list(range(subject.anatomy.n_layers))


# -- attention ----------------------------------------------------------------------------------------------------------


@conforms("mass")
def test_attention_mass(name):
    subject, batch = subject_of(name, "eager"), batch_of(name)
    groups = ("image", "text")
    with torch.inference_mode(), subject.intervene(None, batch, observers=[AttentionMass(groups=groups)]) as run:
        attentions = inner(subject.model(**batch.inputs, use_cache=False, output_attentions=True)).attentions
    assert len(attentions) == subject.anatomy.n_layers
    image = batch.image[0]
    for layer, probabilities in enumerate(attentions):
        last = probabilities[0, :, -1]
        if layer in subject.anatomy.cross_layers:
            expected = torch.stack([last.sum(-1), torch.zeros(len(last))], dim=-1)
        else:
            expected = torch.stack([last[:, image].sum(-1), last[:, ~image].sum(-1)], dim=-1)
        torch.testing.assert_close(run.record(0, layer)[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run.record(0, layer)[0].sum(-1), torch.ones(len(last)), rtol=1e-4, atol=1e-4)


@conforms("knock-out")
def test_knock_out(name):
    """Against the plain eager model whose own masks lose the edges (and, where no key is left, whose output is zero)."""
    subject, batch = subject_of(name), batch_of(name)
    anatomy = subject.anatomy
    layers = anatomy.image_layers[-2:]
    for queries in ("text", "last"):
        seen = logits_under(subject, KnockOut(queries, "image", layers), batch)
        members = ~batch.image[0] if queries == "text" else torch.arange(batch.image.shape[1]) == batch.image.shape[1] - 1
        close(seen, masked_by_hooks(name, anatomy, layers, members, batch), f"{queries} -> image")
        assert not torch.allclose(seen, logits_of(subject.model, batch))


def masked_by_hooks(name: str, anatomy, layers, queries: torch.Tensor, batch: Batch) -> torch.Tensor:
    model = plain_model(name, "eager")
    own = type(anatomy).of(model, name)
    lowest = torch.finfo(torch.float32).min

    def mask_image(module, args, kwargs):
        mask = kwargs["attention_mask"].expand(batch.image.shape[0], -1, -1, -1).clone()
        mask[:, :, queries[:, None] & batch.image[0]] = lowest
        return args, {**kwargs, "attention_mask": mask}

    def zero_queries(module, args, output):
        return (output[0].masked_fill(queries[:, None], 0.0), *output[1:])

    handles = [
        own.attentions[layer].register_forward_hook(zero_queries)
        if layer in own.cross_layers
        else own.attentions[layer].register_forward_pre_hook(mask_image, with_kwargs=True)
        for layer in layers
    ]
    try:
        return logits_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@conforms("nothing out")
def test_knock_out_nothing(name):
    subject, batch = subject_of(name), batch_of(name)
    plain = logits_of(subject.model, batch)
    every_layer = tuple(range(subject.anatomy.n_layers))
    # No edge is cut, yet the mask is built in full: a token never loses its attention to itself.
    close(logits_under(subject, KnockOut("last", "last", every_layer), batch), plain)
    assert torch.equal(logits_under(subject, KnockOut("last", "image", ()), batch), plain)


@conforms("image KV")
def test_image_kv(name):
    subject, batch = subject_of(name), batch_of(name)
    anatomy = subject.anatomy
    layer = anatomy.image_layers[-1]
    head, means = 2, some_means(anatomy)
    before, after = Grab(), Grab()
    plain = logits_under(subject, None, batch, [before])
    seen = logits_under(subject, ReplaceImageKV([(layer, head)], means), batch, [after])
    old, new = before.views[layer], after.views[layer]
    groups = anatomy.n_heads // old.key.shape[1]
    image = torch.ones(old.key.shape[2], dtype=bool) if layer in anatomy.cross_layers else batch.image[0]
    for kept, changed, mean in ((old.key, new.key, means.keys), (old.value, new.value, means.values)):
        kept = kept.repeat_interleave(groups, dim=1)
        others = torch.arange(anatomy.n_heads) != head
        assert torch.equal(changed[:, others], kept[:, others])
        assert torch.equal(changed[:, head, ~image], kept[:, head, ~image])
        assert torch.equal(changed[0, head, image], mean[layer, head].expand(int(image.sum()), -1))
    assert torch.equal(new.output[:, :, others], old.output[:, :, others])
    assert not torch.allclose(seen[:, -1], plain[:, -1])
    if anatomy.family.causal_prompt and anatomy.family.image_in_sequence:
        first = int(image.int().argmax())
        assert torch.equal(seen[:, :first], plain[:, :first])


# -- tokens and rows ----------------------------------------------------------------------------------------------------


@conforms(
    "drop", "drop", lambda subject, batch: logits_under(subject, DropTokens(2, 0.0), batch)
)
def test_drop(name):
    """Without image tokens from a layer on, text is as if it could not see them, on a shorter sequence."""
    subject, batch = subject_of(name), batch_of(name)
    grab, layer = Grab(), 2
    seen = logits_under(subject, DropTokens(layer, 0.0), batch, [grab])
    cut = logits_under(subject, KnockOut("text", "image", tuple(range(layer, subject.anatomy.n_layers))), batch)
    close(seen[:, -1], cut[:, -1])
    n, n_image = batch.image.shape[1], int(batch.image.sum())
    lengths = [grab.views[index].key.shape[2] for index in range(subject.anatomy.n_layers)]
    assert lengths == [n, n, n - n_image, n - n_image]


def row_interventions(anatomy) -> list:
    rows = [
        None,
        ZeroHeads([(1, 0), (3, 2)]),
        ReplaceImageKV(image_heads(anatomy), some_means(anatomy)),
        KnockOut("last", "image", anatomy.image_layers[-2:]),
    ]
    rows += [Steer(1, torch.ones(anatomy.hidden_size)), Patch("residual", (3,), GaussianNoise(1.0, seed=0), "text")]
    if "drop" in anatomy.capabilities:
        rows += [DropTokens(2, 0.5), DropTokens(2, 0.5, "attention"), DropTokens(3, 0.0), MergeTokens(2, 0.5)]
    return rows


@conforms("rows")
def test_rows(name):
    subject, batch = subject_of(name), batch_of(name)
    rows = row_interventions(subject.anatomy)
    with torch.inference_mode():
        sequences = capture(subject, batch.inputs)
    n = len(sequences[0])
    where = (np.arange(len(rows)), np.full(len(rows), n - 1))
    hidden, _ = forward_rows(subject, sequences, np.zeros(len(rows), dtype=int), rows, [0], where)
    seen = read_logits(subject, hidden)
    plain = logits_of(subject.model, batch)[0, -1]
    for row, intervention in enumerate(rows):
        expected = logits_under(subject, intervention, batch)[0, -1]
        close(seen[row], expected, str(intervention))
        assert (intervention is None) == torch.equal(expected, plain)


def refuse(needed: str):
    """What asks for a capability, by itself."""
    return lambda subject, batch: subject.anatomy.require(needed)


def run_on_paths(name: str, interventions: list) -> tuple[torch.Tensor, set[str]]:
    """Last logits of one row per intervention from the engine, and the paths that the rows took."""
    subject, batch = subject_of(name), batch_of(name)
    with torch.inference_mode():
        (sequence,) = capture(subject, batch.inputs)
    jobs = [RowJob(0, (), intervention, (len(sequence) - 1,)) for intervention in interventions]
    seen = torch.zeros(len(jobs), subject.anatomy.hidden_size)

    def keep(rows, hidden):
        seen[list(rows)] = hidden

    counts = run_rows(subject, [sequence], jobs, [0], keep, Budget.of(subject))
    return read_logits(subject, seen), set(counts.paths)


@conforms("resume", "resume", refuse("resume"))
def test_resume(name):
    subject, batch = subject_of(name), batch_of(name)
    rows = [ZeroHeads([(2, 0)]), ZeroHeads([(2, 1), (3, 2)]), (ZeroHeads([(3, 0)]), Steer(2, torch.ones(32)))]
    seen, paths = run_on_paths(name, rows)
    assert paths == {"resume"}
    for row, intervention in enumerate(rows):
        close(seen[row], logits_under(subject, intervention, batch)[0, -1], str(intervention))


def no_prefix(name: str) -> str | None:
    """Why no part of the prompt is there to share; who asks for it is told."""
    anatomy = subject_of(name).anatomy
    if anatomy.family.causal_prompt:
        return None
    with pytest.raises(ValueError, match="lacks 'shared_prefix': its prompt attends to itself both ways"):
        anatomy.require("shared_prefix")
    return anatomy.family.refusals["shared_prefix"]


@conforms("shared prefix", "shared_prefix", refuse("shared_prefix"), unavailable=no_prefix)
def test_shared_prefix(name):
    subject, batch = subject_of(name), batch_of(name)
    means = some_means(subject.anatomy)
    rows = [
        ReplaceImageKV([(0, 1), (3, 2)], means, queries="question"),
        KnockOut("question", "image", (1, 2)),
        KnockOut("last", "preamble", (2, 3)) if name in WITH_PREAMBLE else KnockOut("last", "image", (2, 3)),
        ZeroHeads([(1, 1), (2, 3)], queries="question"),
    ]
    seen, paths = run_on_paths(name, rows)
    assert paths == {"shared prefix"}
    for row, intervention in enumerate(rows):
        close(seen[row], logits_under(subject, intervention, batch)[0, -1], str(intervention))


WITH_PREAMBLE = tuple(name for name, tiny in TINY.items() if tiny.before)


@conforms("appended")
def test_appended_tokens(name):
    subject, batch = subject_of(name), batch_of(name)
    tokens = (17, 18, 19)
    longer = lengthened(name, batch, torch.tensor([tokens]))
    with torch.inference_mode():
        extended = capture(subject, batch.inputs)[0].extended(subject, tokens)
    n = len(extended)
    hidden, _ = forward_rows(
        subject, [extended], np.array([0]), [None], [0], (np.zeros(3, dtype=int), np.arange(n - 3, n))
    )
    close(read_logits(subject, hidden), logits_of(subject.model, longer)[0, -3:])


def lengthened(name: str, batch: Batch, tokens: torch.Tensor) -> Batch:
    """A batch with causal text tokens appended to each prompt."""
    n, inputs = tokens.shape[1], dict(batch.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    for key, value in {"attention_mask": 1, "mm_token_type_ids": 0, **dict(subject_of(name).anatomy.family.token_types)}.items():
        if key in inputs:
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, n), value=value)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, n, -1, -1)], dim=1)
    return Batch(
        inputs, torch.nn.functional.pad(batch.image, (0, n)), torch.nn.functional.pad(batch.valid, (0, n), value=True)
    )


def one_image_only(name: str) -> str | None:
    subject = subject_of(name)
    if subject.anatomy.family.max_images is None:
        return None
    with pytest.raises(SubjectError, match="takes 1 image per prompt, got 2 .* ask about them one by one"):
        subject.encode([["one image", "another"]], ["?"])
    return "it takes one image per prompt: ask about several one by one"


@conforms("images", unavailable=one_image_only)
def test_several_images(name):
    """Prompts with two images and one are captured together and measured as each alone."""
    subject = subject_of(name)
    counts, closings = (2, 1), ((12, 13), (12, 13, 14, 15, 16))
    batch = batch_of(name, counts=counts, after=closings)
    rows = [ReplaceImageKV(image_heads(subject.anatomy), some_means(subject.anatomy)), ZeroHeads([(1, 0)])]
    with torch.inference_mode():
        sequences = capture(subject, batch.inputs)
    assert [int(sequence.image.sum()) for sequence in sequences] == batch.image.sum(1).tolist()
    last = np.array([len(sequence) - 1 for sequence in sequences])
    hidden, _ = forward_rows(subject, sequences, np.arange(2), rows, [0, 1], (np.arange(2), last))
    for row, seen in enumerate(read_logits(subject, hidden)):
        alone = batch_of(name, counts=counts[row : row + 1], after=closings[row : row + 1], start=2 * row)
        close(seen, logits_under(subject, rows[row], alone)[0, -1], f"row {row}")
    expected = logits_under(subject, rows, batch)
    other = dict(batch.inputs)
    other["pixel_values"] = batch.inputs["pixel_values"].clone()
    flat = other["pixel_values"].flatten(0, 1) if name in NESTED else other["pixel_values"]
    flat[len(flat) // 3 if name not in NESTED else 1] += 3.0
    changed = logits_under(subject, rows, Batch(other, batch.image, batch.valid))
    assert not torch.allclose(changed[0, last[0]], expected[0, last[0]])
    close(changed[1, last[1]], expected[1, last[1]], "the second prompt sees the first one's second image")


NESTED = ("idefics2", "idefics3", "smolvlm", "mllama")


# -- the stream ---------------------------------------------------------------------------------------------------------


@conforms("patch")
def test_patch(name):
    """The clean run's activations undo a corruption upstream of them, at every site; noise does not."""
    subject, batch = subject_of(name), batch_of(name)
    plain = logits_of(subject.model, batch)
    with torch.inference_mode():
        (sequence,) = capture(subject, batch.inputs)
    clean = capture_activations(subject, sequence, ("residual", "attention", "mlp", "head"))
    layer = subject.anatomy.image_layers[-1]
    knock = KnockOut("text", "image", (layer,))
    noise = Patch("mlp", (layer,), GaussianNoise(3.0, seed=1))
    corrupted = {
        (ZeroHeads([(1, 0), (1, 1)]),): Patch("residual", (2,), clean),
        (knock,): Patch("attention", (layer,), clean),
        (knock, ZeroHeads(())): Patch("head", (layer,), clean),
        (noise,): Patch("mlp", (layer,), clean),
    }
    for corruption, patch in corrupted.items():
        assert not torch.allclose(logits_under(subject, corruption, batch), plain, atol=1e-2)
        close(logits_under(subject, (*corruption, patch), batch), plain, patch.site)


@conforms("steer")
def test_steer(name):
    """Against a hook that adds the direction to what enters a decoder layer."""
    subject, batch = subject_of(name), batch_of(name)
    direction, layer = torch.randn(subject.anatomy.hidden_size, generator=torch.Generator().manual_seed(0)), 2

    def add(module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden = hidden.clone()
        hidden[:, -2:] += 2.0 * direction
        return (hidden, *args[1:]), kwargs

    handle = subject.anatomy.layers[layer].register_forward_pre_hook(add, with_kwargs=True)
    try:
        expected = logits_of(subject.model, batch)
    finally:
        handle.remove()
    close(logits_under(subject, Steer(layer, direction, 2.0, positions=(-2, -1)), batch), expected)
    assert not torch.allclose(expected, logits_of(subject.model, batch))


@conforms(
    "replace tokens",
    "replace_tokens",
    lambda subject, batch: logits_under(subject, ReplaceTokens(torch.zeros(subject.anatomy.hidden_size)), batch),
)
def test_replace_tokens(name):
    """Against a hook that overwrites the image tokens in what enters the first layer."""
    subject, batch = subject_of(name), batch_of(name)
    token = torch.randn(subject.anatomy.hidden_size, generator=torch.Generator().manual_seed(0))

    def overwrite(module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        return (torch.where(batch.image[:, :, None], token, hidden), *args[1:]), kwargs

    handle = subject.anatomy.layers[0].register_forward_pre_hook(overwrite, with_kwargs=True)
    try:
        expected = logits_of(subject.model, batch)
    finally:
        handle.remove()
    close(logits_under(subject, ReplaceTokens(token), batch), expected)
    assert not torch.allclose(expected, logits_of(subject.model, batch))


@conforms("merge", "merge", lambda subject, batch: logits_under(subject, MergeTokens(2, 0.5), batch))
def test_merge(name):
    """Against the plain eager model on a sequence that hooks make shorter; keeping all is the identity."""
    subject, batch, layer = subject_of(name), batch_of(name), 2
    plain = logits_of(subject.model, batch)
    n, n_image = batch.image.shape[1], int(batch.image.sum())
    for keep in (0.5, 0.25):
        for proportional in (True, False):
            grab = Grab()
            seen = logits_under(subject, MergeTokens(layer, keep, proportional=proportional), batch, [grab])
            left = max(1, round(keep * n_image))
            assert [grab.views[index].key.shape[2] for index in range(4)] == [n, n, n - n_image + left, n - n_image + left]
            close(seen, merged_by_hooks(name, layer, left, proportional, batch), f"{keep}, {proportional}")
            assert not torch.allclose(seen[:, -1], plain[:, -1])
    assert torch.equal(logits_under(subject, MergeTokens(layer, 1.0), batch), plain)


def merged_by_hooks(name: str, layer: int, keep: int, proportional: bool, batch: Batch) -> torch.Tensor:
    """Logits of the plain model on one prompt whose image tokens become ``keep`` size-weighted means before ``layer``."""
    model = plain_model(name, "eager")
    own = type(subject_of(name).anatomy).of(model, name)
    n, image, left = batch.image.shape[1], batch.image[0].nonzero()[:, 0].tolist(), {}

    def shorten(args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not left:
            stream = [hidden[0, column] for column in image]
            left.update({image[place]: (vector, size) for place, vector, size in merge_by_hand(stream, stream, keep)})
            assert sum(size for _, size in left.values()) == len(image)
            columns = [column for column in range(n) if column not in image or column in left]
            vectors = [left[column][0].to(hidden.dtype) if column in left else hidden[0, column] for column in columns]
            hidden = torch.stack(vectors)[None]
        columns = torch.tensor([column for column in range(n) if column not in image or column in left])
        kwargs["attention_mask"] = kwargs["attention_mask"][:, :, columns][:, :, :, columns]
        if proportional:
            sizes = torch.tensor([float(left[column][1]) if column in left else 1.0 for column in columns.tolist()])
            kwargs["attention_mask"] = kwargs["attention_mask"] + sizes.log()
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(table.index_select(-2, columns) for table in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].index_select(-1, columns)
        return (hidden, *args[1:]), kwargs

    with hooked(*((module, "pre", shorten) for module in own.layers[layer:])):
        return logits_of(model, batch)


# -- generation ---------------------------------------------------------------------------------------------------------


@conforms("generate")
def test_generate(name):
    subject, batch = subject_of(name), batch_of(name)
    anatomy = subject.anatomy
    plans = (
        None,
        ZeroHeads([(1, 0), (3, 2)]),
        KnockOut("text", "image", anatomy.image_layers[-2:]),
        ReplaceImageKV(image_heads(anatomy), some_means(anatomy)),
        *([DropTokens(2, 0.5, "stride")] if "drop" in subject.capabilities else ()),
    )
    told = []
    for plan in plans:
        tokens, logits = generate(subject, plan, batch)
        whole = logits_under(subject, plan, lengthened(name, batch, tokens[:, :-1]))
        close(logits, whole[:, -4:], str(plan))
        told.append(logits)
    assert all(not torch.allclose(told[0], other) for other in told[1:])
    closings = ((12, 17), AFTER)
    tokens, padded = generate(subject, plans[-1], batch_of(name, counts=(1, 1), after=closings, side="left"))
    for row in (0, 1):
        alone = batch_of(name, after=closings[row : row + 1], start=row)
        own, logits = generate(subject, plans[-1], alone)
        assert torch.equal(tokens[row], own[0])
        close(padded[row], logits[0], "generated from a prompt padded on the left")


def generate(subject: Subject, plan, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Four greedy tokens per prompt, and the logits that they were chosen by."""
    with torch.inference_mode(), subject.intervene(plan, batch):
        generated = subject.model.generate(
            **batch.inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
            suppress_tokens=[IMAGE_TOKEN, 61, 62, 63], return_dict_in_generate=True, output_logits=True,
        )
    return generated.sequences[:, -4:], torch.stack(generated.logits, dim=1)


# -- the self-check -----------------------------------------------------------------------------------------------------


@conforms("self-check")
def test_selfcheck(name):
    selfcheck(subject_of(name), batch_of(name))
