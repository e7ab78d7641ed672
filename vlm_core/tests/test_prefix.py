"""Rows that start from a recorded trunk give the numbers that whole prompts give, on every family, or say why they cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, Gemma2Config, LlavaConfig, LlavaForConditionalGeneration

from vlm_core import HeadMeans, ImageKV, ImageKVMeans, KnockOut, MeanHeads, ReplaceImageKV, Subject, SubjectError, ZeroHeads
from vlm_core.interventions import DropTokens, GaussianNoise, MergeTokens, Patch, ReplaceTokens, Steer
from vlm_core.subjects.embed import capture, encode_items
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.sweeps import recorded
from vlm_core.sweeps.branches import Branches
from vlm_core.sweeps.budget import Budget
from vlm_core.sweeps.engine import RowJob, choose_path, run_rows
from vlm_core.sweeps.prefix import forward_shared
from vlm_core.sweeps.resume import spares_last_layer
from vlm_core.sweeps.sharing import why_not_shared
from vlm_core.sweeps.trunk import Unshareable, record_trunks, same_prefixes
from vlm_core.tests.family_models import BUILDERS, IMAGE_TOKEN, TEXT, TINY, VISION
from vlm_core.tests.tiny import loud, make_items, tiny_subject

BUDGET = Budget(tokens=4096, most=65536, stored=2**28)


def question_rows(anatomy):
    """Interventions that leave everything up to the last image token alone."""
    shape = (anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
    generator = torch.Generator().manual_seed(0)
    means = ImageKVMeans(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    heads = HeadMeans(torch.randn(shape, generator=generator))
    last, every = anatomy.n_layers - 1, tuple(range(anatomy.n_heads))
    return [
        None,
        ReplaceImageKV([(1, 0), (2, 1)], means, "question"),
        ReplaceImageKV([(0, head) for head in every], means, "last"),
        ReplaceImageKV([(last, 1), (last, 3)], means),
        (ReplaceImageKV([(1, 0), (1, 2)], means, "question"), KnockOut("last", "image", (1, 2)), ZeroHeads([(2, 2)], "last")),
        KnockOut("question", "bos", (0, 2)),
        KnockOut("last", "all", tuple(range(anatomy.n_layers))),
        KnockOut("image", "image", (last,)),
        ZeroHeads([(1, 1), (2, 0)], "question"),
        MeanHeads([(0, 1), (2, 3)], heads, "last"),
        MeanHeads([(last, 0)], heads),
        (ZeroHeads([(1, 2)], "question"), DropTokens(2, 1.0)),
        (ReplaceImageKV([(1, 0)], means, "question"), ReplaceImageKV([(1, 0), (1, 1)], means, "last")),
        (ReplaceImageKV([(last, 2)], means), ReplaceImageKV([(last, 2), (last, 3)], ImageKVMeans(means.keys, means.values), "last")),
    ]


def everywhere_rows(anatomy):
    """Interventions that change image tokens too, from different layers on."""
    shape = (anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
    generator = torch.Generator().manual_seed(1)
    means = ImageKVMeans(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    return [
        ZeroHeads([(1, 1)]),
        ZeroHeads([(2, 0), (3, 1)]),
        ReplaceImageKV([(1, 2)], means),
        KnockOut("image", "image", (1, 2)),
        KnockOut("all", "image", (1, anatomy.n_layers - 1)),
        KnockOut("image", "bos", (1,)),
        DropTokens(2, 0.5),
        DropTokens(2, 0.5, "attention"),
        Steer(2, torch.randn(anatomy.hidden_size, generator=generator)),
    ]


def compare(subject, sequences, jobs, budget=BUDGET):
    """Rows through the engine and through whole prompts: ``(fast logits, slow logits, paths)`` read by read."""
    fast = [None] * len(jobs)

    def consume(numbers, hidden):
        pieces = hidden.split([len(jobs[number].reads) for number in numbers])
        for number, piece in zip(numbers, pieces, strict=True):
            assert fast[number] is None
            fast[number] = piece

    items = list(range(len(sequences)))
    counts = run_rows(subject, sequences, jobs, items, consume, budget)
    slow = []
    for job in jobs:
        sequence = sequences[job.prompt].extended(subject, job.prefix)
        wanted = np.zeros(len(job.reads), dtype=int), np.array(job.reads)
        slow.append(forward_rows(subject, [sequence], np.array([0]), [job.intervention], [items[job.prompt]], wanted)[0])
    return read_logits(subject, torch.cat(fast)), read_logits(subject, torch.cat(slow)), counts.to_dict()


@pytest.fixture(scope="module", params=BUILDERS)
def family(request):
    model, inputs = BUILDERS[request.param]()
    subject = Subject(model, name=request.param)
    with torch.inference_mode():
        return subject, capture(subject, inputs)


def test_a_shared_prefix_gives_the_numbers_of_whole_prompts(family):
    subject, sequences = family
    refused = subject.anatomy.family.refusals.get("shared_prefix")
    last = len(sequences[0]) - 1
    if not subject.anatomy.family.image_in_sequence:
        path, reason = choose_path(subject.anatomy, sequences[0], None)
        assert path == "whole" and "behind cross-attention layers" in reason
        return
    jobs = [RowJob(0, (), row, (last,)) for row in question_rows(subject.anatomy)]
    fast, slow, counts = compare(subject, sequences, jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert ((fast[1:] - fast[0]).abs().max(1).values > 1e-3)[[0, 1, 2, 3, 4, 5, 7, 8, 9]].all()
    if refused is None:
        assert counts == {"paths": {"shared prefix": len(jobs)}, "reasons": {}}
    else:
        assert "shared prefix" not in counts["paths"]
        assert all(refused in reason for reason in counts["reasons"])


def test_resumed_rows_give_the_numbers_of_whole_prompts(family):
    subject, sequences = family
    last = len(sequences[0]) - 1
    rows = everywhere_rows(subject.anatomy)
    if not subject.anatomy.family.image_in_sequence:
        rows = rows[:2]
    jobs = [RowJob(0, (), row, (last,)) for row in rows]
    # One row a batch: what one row needs must not come from its neighbours.
    fast, slow, counts = compare(subject, sequences, jobs, replace(BUDGET, rows=1))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    if subject.anatomy.family.image_in_sequence:
        assert counts["paths"] == {"resume": len(jobs)}
    else:
        assert counts["paths"] == {"whole": len(jobs)}
        assert all("behind cross-attention layers" in reason for reason in counts["reasons"])


def test_answers_of_several_tokens_grow_on_one_trunk(family):
    subject, sequences = family
    n, in_sequence = len(sequences[0]), subject.anatomy.family.image_in_sequence
    rows = [None, ZeroHeads([(1, 1)]), KnockOut("last", "bos", (0, 2))]
    if in_sequence:
        rows += [*question_rows(subject.anatomy)[1:4], KnockOut("last", "image", (1, 2)), DropTokens(2, 0.5)]
    prefixes = {(): (n - 1,), (20,): (n - 1, n), (21, 22, 23): (n - 1, n, n + 1, n + 2), (21, 24): (n + 1, n)}
    jobs = [RowJob(0, prefix, row, reads) for row in rows for prefix, reads in prefixes.items()]
    fast, slow, counts = compare(subject, sequences, jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert ("whole" in counts["paths"]) == (not in_sequence)


def test_answers_after_one_prompt_run_as_one_row(subject, monkeypatch):
    """The prompt's own tokens run once an intervention, whatever its answers begin with."""
    sequences = encode_items(subject, make_items(2))
    rows = question_rows(subject.anatomy)[:4]
    jobs = [RowJob(k, prefix, row, (len(sequences[k]) - 1,)) for k in (0, 1) for row in rows for prefix in ((5,), (6, 7), (6, 8))]
    tokens = []

    def counting(subject, recording, batch, entries):
        tokens.extend(row.stem.n_suffix for row in batch)
        return forward_shared(subject, recording, batch, entries)

    monkeypatch.setattr(recorded, "forward_shared", counting)
    fast, slow, counts = compare(subject, sequences, jobs, replace(BUDGET, rows=3))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    asked = [len(one) - 1 - int(one.image.nonzero()[-1]) for one in sequences]
    assert sorted(tokens) == sorted(n + 4 for n in asked for _ in rows) and counts["paths"] == {"shared prefix": len(jobs)}


def test_many_answers_run_a_few_hundred_tokens_at_a_time(subject, monkeypatch):
    (sequence,) = encode_items(subject, make_items(1))
    last, longest = len(sequence) - 1, []
    prefixes = [(5 + k % 20, 5 + k // 20, 7) for k in range(100)]
    jobs = [RowJob(0, prefix, row, (last + 3,)) for row in question_rows(subject.anatomy)[:2] for prefix in prefixes]

    def counting(subject, recording, batch, entries):
        longest.extend(row.stem.n_suffix for row in batch)
        return forward_shared(subject, recording, batch, entries)

    monkeypatch.setattr(recorded, "forward_shared", counting)
    fast, slow, _ = compare(subject, [sequence], jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    n = last - int(sequence.image.nonzero()[-1])
    assert len(longest) == 4 and n + 100 < max(longest) <= n + recorded._BRANCH_TOKENS


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_an_answer_sees_the_prompt_and_itself_among_branches(prefixes, n_prompt):
    branches = Branches(tuple(prefixes))
    seen, tokens = branches.seen(n_prompt, "cpu"), [*range(100, 100 + n_prompt), *branches.tokens]
    at = branches.positions(n_prompt, 0, torch.device("cpu"))
    assert len(branches.tokens) == len({prefix[:length] for prefix in prefixes for length in range(1, len(prefix) + 1)})
    for prefix in prefixes:
        alone = [*range(100, 100 + n_prompt), *prefix]
        for last, where in enumerate(branches.reads(prefix, range(len(alone)), n_prompt)):
            among = seen[where].nonzero()[:, 0].tolist()
            assert [tokens[place] for place in among] == alone[: last + 1] and at[among].tolist() == list(range(last + 1))


def questions_about(subject, sequence):
    """Three prompts that begin as ``sequence`` does, of different lengths, and one about another image."""
    asked = [sequence.extended(subject, tokens) for tokens in ((), (20, 21, 22), (23,))]
    asked = [replace(one, n_prompt=len(one), groups={}) for one in asked]
    embeds = asked[1].embeds.clone()
    embeds[asked[1].image] = torch.randn(int(asked[1].image.sum()), embeds.shape[1], generator=torch.Generator().manual_seed(0))
    return [*asked, replace(asked[1], embeds=embeds)]


def test_questions_about_one_image_share_its_prefix(family):
    subject, sequences = family
    prompts = questions_about(subject, sequences[0])
    in_sequence = subject.anatomy.family.image_in_sequence
    refused = not in_sequence or "shared_prefix" in subject.anatomy.family.refusals
    assert same_prefixes(prompts) == ({0: 0, 1: 0, 2: 0, 3: 3} if in_sequence else {})

    def jobs(rows):
        return [
            RowJob(number, prefix, row, (len(prompt) - 1, len(prompt) - 1 + len(prefix)))
            for number, prompt in enumerate(prompts) for prefix in ((), (24, 25)) for row in rows
        ]  # fmt: skip

    fast, slow, counts = compare(subject, prompts, [RowJob(number, (), None, (len(one) - 1,)) for number, one in enumerate(prompts)])
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert (fast[1] - fast[3]).abs().max() > 1e-3 or not in_sequence
    assert counts["paths"] == ({"whole": 4} if refused else {"shared prefix": 3, "whole": 1})
    rows = [None, ZeroHeads([(1, 1)]), KnockOut("last", "bos", (0, 2))]
    if in_sequence:
        rows += [*question_rows(subject.anatomy)[1:4], DropTokens(2, 0.5), Steer(3, torch.ones(subject.anatomy.hidden_size))]
    fast, slow, counts = compare(subject, prompts, jobs(rows))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    only_resumed = [DropTokens(2, 0.5)] if in_sequence else [None]
    fast, slow, counts = compare(subject, prompts, jobs(only_resumed))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)


def test_a_prefix_is_shared_only_bit_for_bit(subject):
    (sequence,) = encode_items(subject, make_items(1))
    embeds = sequence.embeds.round()
    sequence, nearly = replace(sequence, embeds=embeds), replace(sequence, embeds=embeds.flip(1))
    assert not torch.equal(nearly.embeds, embeds) and float(nearly.embeds.sum()) == float(embeds.sum())
    moved = replace(sequence, positions=torch.arange(len(sequence))[None] + 1)
    assert same_prefixes([sequence, nearly, moved, sequence]) == {0: 0, 1: 1, 2: 2, 3: 0}


def test_the_prefix_of_several_questions_runs_once(subject):
    (sequence,) = encode_items(subject, make_items(1))
    prompts = questions_about(subject, sequence)[:3]
    n, n_prefix = len(prompts[1]), 1 + int(sequence.image.nonzero()[-1])
    sizes = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, number=number: sizes.append((number, *args[0].shape[:2])))
        for number, layer in enumerate(subject.anatomy.layers)
    ]
    jobs = [RowJob(number, (), None, (len(one) - 1,)) for number, one in enumerate(prompts)]
    try:
        run_rows(subject, prompts, jobs, [0, 1, 2], lambda numbers, hidden: None, BUDGET)
    finally:
        for handle in handles:
            handle.remove()
    # The longest as the trunk; what follows the image, of all three; the last layer for what is read.
    assert sizes == [(0, 1, n), (1, 1, n), (2, 1, n), (0, 3, n - n_prefix), (1, 3, n - n_prefix), (2, 3, n - n_prefix), (2, 3, 1)]


def lengthened(name: str, tail: int):
    """A family's model with a question of ``tail`` more tokens."""
    model, inputs = BUILDERS[name]()
    extra = torch.arange(20, 20 + tail)[None]
    padded = {
        key: torch.cat([value, torch.ones_like(extra) if key == "attention_mask" else torch.zeros_like(extra)], dim=1)
        for key, value in inputs.items()
        if key in ("attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    return model, {**inputs, **padded, "input_ids": torch.cat([inputs["input_ids"], extra], dim=1)}


def test_a_window_shorter_than_the_question_is_kept():
    model, inputs = lengthened("gemma3", 20)
    subject = Subject(model)
    with torch.inference_mode():
        (sequence,) = capture(subject, inputs)
    rows = question_rows(subject.anatomy)
    jobs = [RowJob(0, prefix, row, (len(sequence) - 1 + len(prefix),)) for row in rows for prefix in ((), (5, 6))]
    fast, slow, counts = compare(subject, [sequence], jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert counts["paths"] == {"shared prefix": len(jobs)}


def test_capped_attention_scores_are_kept():
    generator = torch.Generator().manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=16),
        text_config=Gemma2Config(**TEXT, query_pre_attn_scalar=8, sliding_window=64, attn_logit_softcapping=2.0),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    subject = Subject(loud(LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")).eval())
    ids = torch.tensor([[1, 10, *[IMAGE_TOKEN] * 16, 12, 13, 14]])
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    with torch.inference_mode():
        (sequence,) = capture(subject, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    jobs = [RowJob(0, (), row, (len(sequence) - 1,)) for row in question_rows(subject.anatomy)]
    fast, slow, counts = compare(subject, [sequence], jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert counts["paths"] == {"shared prefix": len(jobs)}


def test_a_prompt_that_sees_itself_both_ways_is_noticed_though_its_family_does_not_say_so():
    model, inputs = BUILDERS["paligemma"]()
    subject = Subject(model)
    subject.anatomy = replace(subject.anatomy, family=replace(subject.anatomy.family, causal_prompt=True))
    with torch.inference_mode():
        (sequence,) = capture(subject, inputs)
    jobs = [RowJob(0, (), ZeroHeads([(1, head)], "question"), (len(sequence) - 1,)) for head in range(3)]
    fast, slow, counts = compare(subject, [sequence], jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert counts["paths"] == {"whole": 3}
    assert "its image tokens see the question" in next(iter(counts["reasons"]))


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject", "eager_subject"])
@pytest.mark.parametrize("rows_at_once", [2, 7, 64])
def test_items_share_batches(request, fixture, rows_at_once):
    subject = request.getfixturevalue(fixture)
    sequences = encode_items(subject, make_items(4))
    assert len({len(sequence) for sequence in sequences}) == 2
    rows = [*question_rows(subject.anatomy), ZeroHeads([(1, 1)]), DropTokens(1, 0.5), None, ZeroHeads([(0, 0)])]
    jobs = [RowJob(prompt, (), row, (len(sequences[prompt]) - 1,)) for row in rows for prompt in (2, 0, 3, 1)]
    fast, slow, counts = compare(subject, sequences, jobs, Budget(4096, 65536, 2**28, rows=rows_at_once))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert counts["paths"] == {"shared prefix": 60, "resume": 12}


def test_prefixes_of_one_length_keep_their_own_order():
    """Text before the image, and the same text in the middle of it: recorded together as alone, the image tokens last."""
    model, inputs = BUILDERS["llava"]()
    subject, ids = Subject(model), inputs["input_ids"][0]
    text, image, rest = ids[:3], ids[3:19], ids[19:]
    rows = [torch.cat(parts)[None] for parts in ((text, image, rest), (text[:1], image[:8], text[1:], image[8:], rest))]
    with torch.inference_mode():
        sequences = [
            capture(subject, {"input_ids": row, "attention_mask": torch.ones_like(row), "pixel_values": inputs["pixel_values"][:1]})[0]
            for row in rows
        ]
    kept = {"keys_from": 0, "keys_to": subject.anatomy.n_layers, "suffix_at": (0,)}
    together = record_trunks(subject, sequences, **kept).trunks
    assert together[0].n_prefix == together[1].n_prefix and not torch.equal(together[0].order, together[1].order)
    for trunk, sequence in zip(together, sequences, strict=True):
        (alone,) = record_trunks(subject, [sequence], **kept).trunks
        for layer in range(subject.anatomy.n_layers):
            torch.testing.assert_close(trunk.keys[layer], alone.keys[layer])
            torch.testing.assert_close(trunk.values[layer], alone.values[layer])


def test_the_text_between_two_images_belongs_to_the_prefix():
    model, inputs = BUILDERS["llava"]()
    image = inputs["input_ids"][0, 3:19]
    ids = torch.cat([inputs["input_ids"][0, :19], torch.tensor([20, 21]), image, torch.tensor([22, 23, 24])])[None]
    subject = Subject(model)
    with torch.inference_mode():
        (sequence,) = capture(
            subject, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16)}
        )
    assert int(sequence.image.sum()) == 32
    rows = question_rows(subject.anatomy)
    means = rows[1].means
    jobs = [RowJob(0, (), row, (len(sequence) - 1,)) for row in (*rows, ReplaceImageKV([(0, 1)], means, "text"))]
    fast, slow, counts = compare(subject, [sequence], jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    # "text" reaches the two tokens between the images, which come before the last image token.
    assert counts["paths"] == {"shared prefix": len(rows), "whole": 1} or counts["paths"] == {"shared prefix": len(rows), "resume": 1}


def test_the_prefix_runs_once_and_rows_run_their_question_only(subject, means):
    (sequence,) = encode_items(subject, make_items(1))
    n, n_suffix = len(sequence), len(sequence) - 1 - int(sequence.image.nonzero()[-1])
    sizes = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, number=number: sizes.append((number, *args[0].shape[:2])))
        for number, layer in enumerate(subject.anatomy.layers)
    ]
    jobs = [RowJob(0, (), ReplaceImageKV([(1, head)], means, "question"), (n - 1,)) for head in range(4)]
    try:
        run_rows(subject, [sequence], jobs, [0], lambda numbers, hidden: None, BUDGET)
    finally:
        for handle in handles:
            handle.remove()
    # The trunk, as far as its keys and values; the rows from the layer they touch; the last layer for what is read.
    assert sizes == [(0, 1, n), (1, 1, n), (2, 1, n), (1, 4, n_suffix), (2, 4, n_suffix), (2, 4, 1)]


def test_resumed_rows_start_where_they_touch(subject):
    (sequence,) = encode_items(subject, make_items(1))
    n = len(sequence)
    sizes = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, number=number: sizes.append((number, *args[0].shape[:2])))
        for number, layer in enumerate(subject.anatomy.layers)
    ]
    jobs = [RowJob(0, (), ZeroHeads([(1, head)]), (n - 1,)) for head in range(4)]
    try:
        run_rows(subject, [sequence], jobs, [0], lambda numbers, hidden: None, Budget(4096, 65536, 2**28, rows=2))
    finally:
        for handle in handles:
            handle.remove()
    trunk, rows = sizes[:3], sizes[3:]
    assert [size[:2] for size in trunk] == [(0, 1), (1, 1), (2, 1)] and trunk[0][2] == n
    # The trunk ends with a single token; in the rows' last layer only the token that is read goes on.
    assert trunk[1][2] == trunk[2][2] == 1
    assert rows == [(1, 2, n), (2, 2, n), (2, 2, 1)] * 2


LATE = {  # on three layers: what is done within the last one, or after it, needs all of it; what is done before it does not
    "stream that enters the last": (Patch("residual", (2,), GaussianNoise(1.0), "text"), True),
    "direction in the last": (Steer(2, torch.ones(32)), True),
    "drop before the last": (DropTokens(2, 0.5, "attention"), True),
    "merge before the last": (MergeTokens(2, 0.5), True),
    "merge, then drop": ((MergeTokens(1, 0.5), DropTokens(2, 0.5)), True),
    "MLP before the last": (Patch("mlp", (1,), GaussianNoise(1.0)), True),
    "noise on image tokens, heads after": ((ReplaceTokens(GaussianNoise(1.0)), ZeroHeads([(1, 0)])), True),
    "stream that enters the norm": ((Patch("residual", (3,), GaussianNoise(1.0)), ZeroHeads([(1, 0)])), False),
    "direction before the norm": ((Steer(3, torch.ones(32)), ZeroHeads([(1, 0)])), False),
    "MLP of the last": ((Patch("mlp", (2,), GaussianNoise(1.0)), ZeroHeads([(1, 0)])), False),
    "heads of the last": (Patch("head", (), GaussianNoise(1.0), heads=((2, 1),)), False),
}


@pytest.mark.parametrize("name", LATE)
def test_a_last_layer_is_cut_short_only_where_nothing_happens_within_it(subject, name):
    row, spared = LATE[name]
    sequences = encode_items(subject, make_items(2))
    reads = [(len(one) - 2, len(one) - 1) for one in sequences]
    # Beside a row that starts earlier, on a batch of both, with more reads than one.
    jobs = [RowJob(prompt, (), each, reads[prompt]) for prompt in (0, 1) for each in (row, ZeroHeads([(1, 1)]))]
    fast, slow, counts = compare(subject, sequences, jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert counts["paths"]["resume"] >= 2 and spares_last_layer(row, 3) == spared
    plain, _ = forward_rows(subject, sequences[:1], np.array([0]), [None], [0], (np.array([0, 0]), np.array(reads[0])))
    assert not torch.allclose(slow[:2], read_logits(subject, plain)), "the row does something"


@pytest.mark.parametrize(
    ("intervention", "why"),
    [
        (ZeroHeads([(0, 0)]), "ZeroHeads changes tokens up to the last image token"),
        (Steer(1, torch.ones(32), positions="question"), "Steer has no form that shares the prefix"),
        (KnockOut("question", "image", (0,), heads=(1,)), "a knock-out in single heads"),
        (DropTokens(1, 0.5), "DropTokens changes tokens"),
        (DropTokens(1, 1.0), None),
        (ZeroHeads([(2, 0)]), None),
    ],
)
def test_why_not_shared(intervention, why):
    found = why_not_shared(intervention, 3)
    assert (found is None) if why is None else (why in found)


def test_visual_features_added_again_end_before_rows_resume():
    model, inputs = BUILDERS["qwen3_vl"]()
    subject = Subject(model)
    with torch.inference_mode():
        (sequence,) = capture(subject, inputs)
    assert choose_path(subject.anatomy, sequence, ZeroHeads([(1, 0)]))[0] == "resume"
    path, reason = choose_path(subject.anatomy, sequence, ZeroHeads([(0, 0)]))
    assert path == "whole" and "visual features are added again up to layer 1" in reason


def test_bfloat16_rows_agree_as_far_as_bfloat16_does():
    subject = tiny_subject()
    subject.model.to(torch.bfloat16)
    sequences = encode_items(subject, make_items(1))
    jobs = [RowJob(0, (), row, (len(sequences[0]) - 1,)) for row in question_rows(subject.anatomy)]
    fast, slow, counts = compare(subject, sequences, jobs)
    assert counts["paths"] == {"shared prefix": len(jobs)}
    torch.testing.assert_close(fast, slow, rtol=0.05, atol=0.15)


def test_what_a_whole_run_refuses_a_shared_pass_refuses(subject, means):
    (sequence,) = encode_items(subject, make_items(1))
    shape = (2, 4, 8)
    other = ImageKVMeans(torch.zeros(shape), torch.zeros(shape))
    for intervention, why in [
        (ZeroHeads([(1, 9)], "question"), "head"),
        (ReplaceImageKV([(1, 1)], other, "question"), "do not fit this model"),
        (KnockOut("question", "landmark", (1,)), "no token group 'landmark'"),
        ((ReplaceImageKV([(1, 0)], means, "question"), ReplaceImageKV([(1, 0)], other, "last")), "at most one"),
    ]:
        with pytest.raises(ValueError, match=why):
            run_rows(subject, [sequence], [RowJob(0, (), intervention, (len(sequence) - 1,))], [0], lambda numbers, hidden: None, BUDGET)


def test_named_groups_and_positions_reach_every_path(subject):
    (sequence,) = encode_items(subject, make_items(1))
    image = sequence.image.nonzero()[:, 0]
    members = torch.zeros_like(sequence.image)
    members[image[3:9]] = True
    sequence = replace(sequence, groups={"object": members})
    rows = [
        KnockOut("last", "object", (0, 1, 2)),
        KnockOut("question", tuple(image[3:9].tolist()), (1,)),
        KnockOut("object", "image", (1,)),
        ZeroHeads([(2, 0)], (-1,)),
        ReplaceImageKV([(2, head) for head in range(4)], ImageKVMeans(torch.ones(3, 4, 8), torch.ones(3, 4, 8)), (-1, -2)),
        (KnockOut("last", "object", (2,)), ReplaceImageKV([(2, 1)], ImageKVMeans(torch.ones(3, 4, 8), torch.ones(3, 4, 8)))),
    ]
    jobs = [RowJob(0, prefix, row, (len(sequence) - 1 + len(prefix),)) for row in rows for prefix in ((), (5,))]
    fast, slow, counts = compare(subject, [sequence], jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert counts["paths"] == {"shared prefix": 10, "resume": 2}


@pytest.mark.parametrize("layer, path", [(0, "whole"), (2, "resume")])
def test_rows_that_take_images_of_other_sizes_run_in_batches_of_their_own(layer, path):
    """Prompts with one image and with two, each replaced by others of its own length, beside rows that replace nothing."""
    subject = Subject(BUILDERS["llava"]()[0], name="llava")
    with torch.inference_mode():
        sequences = capture(subject, TINY["llava"].prompts((1, 2), ((12, 13, 14), (12, 13))))
    anatomy, generator = subject.anatomy, torch.Generator().manual_seed(0)

    def other(n):
        shape = (anatomy.n_layers, anatomy.n_heads, n, anatomy.head_dim)
        return ImageKV(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))

    images = [int(sequence.image.sum()) for sequence in sequences]
    assert images[0] != images[1]
    rows = [
        (prompt, row)
        for prompt in (0, 1)
        for row in (
            ReplaceImageKV([(layer, 0)], other(images[prompt])),
            ZeroHeads([(layer, 1)]),
            (ReplaceImageKV([(layer, 1)], other(images[prompt]), "question"), ZeroHeads([(layer, 2)])),
        )
    ]
    jobs = [RowJob(prompt, (), row, (len(sequences[prompt]) - 1,)) for prompt, row in rows]
    fast, slow, counts = compare(subject, sequences, jobs)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    assert counts["paths"] == {path: 6}


class OutOfMemory:
    """Raises what a full device raises while more than ``most`` elements enter a layer."""

    def __init__(self, subject, most: int, error: Exception) -> None:
        self.most, self.sizes, self.error = most, [], error
        self.handles = [layer.register_forward_pre_hook(self) for layer in subject.anatomy.layers]

    def __call__(self, module, args):
        self.sizes.append(args[0].shape[0])
        if args[0].shape[0] > self.most:
            raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


FULL = {
    "device": torch.OutOfMemoryError("simulated"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
}


@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("path", ["shared prefix", "resume", "whole"])
def test_batches_that_run_out_of_memory_are_halved(subject, path, full):
    sequences = encode_items(subject, make_items(4))
    layer, queries = {"shared prefix": (1, "question"), "resume": (1, "all"), "whole": (0, "all")}[path]
    jobs = [
        RowJob(prompt, (), ZeroHeads([(layer, head)], queries), (len(sequences[prompt]) - 1,)) for prompt in range(4) for head in range(4)
    ]
    with OutOfMemory(subject, most=3, error=FULL[full]) as memory:
        fast = [None] * len(jobs)

        def consume(numbers, hidden):
            for number, one in zip(numbers, hidden, strict=True):
                assert fast[number] is None
                fast[number] = one

        counts = run_rows(subject, sequences, jobs, [0] * 4, consume, Budget(4096, 65536, 2**28, rows=8))
    assert counts.to_dict()["paths"] == {path: 16}
    assert max(memory.sizes) > 3
    _, slow, _ = compare(subject, sequences, jobs)
    torch.testing.assert_close(read_logits(subject, torch.stack(fast)), slow, rtol=1e-4, atol=2e-5)
    with OutOfMemory(subject, most=0, error=FULL[full]), pytest.raises(SubjectError, match="a single row does not fit"):
        run_rows(subject, sequences[:1], jobs[:2], [0], consume, BUDGET)


def test_a_group_halved_for_memory_and_then_refused_hands_over_every_row_once(subject, monkeypatch):
    sequences = encode_items(subject, make_items(4))
    jobs = [RowJob(prompt, (), ZeroHeads([(1, head)], "question"), (len(sequences[prompt]) - 1,)) for prompt in range(4) for head in range(2)]
    seen, record = [], recorded.record_trunks

    def fails(subject, sequences, **wanted):
        seen.append(len(sequences))
        if len(sequences) > 2:
            raise FULL["device"]
        if len(seen) > 2:
            raise Unshareable("the second half is refused")
        return record(subject, sequences, **wanted)

    with monkeypatch.context() as patched:
        patched.setattr(recorded, "record_trunks", fails)
        fast = [None] * len(jobs)

        def consume(numbers, hidden):
            for number, one in zip(numbers, hidden, strict=True):
                assert fast[number] is None
                fast[number] = one

        counts = run_rows(subject, sequences, jobs, [0] * 4, consume, BUDGET)
    assert seen == [4, 2, 2]
    assert counts.to_dict() == {
        "paths": {"shared prefix": 4, "whole": 4}, "reasons": {"whole: the second half is refused": 4},
    }
    _, slow, _ = compare(subject, sequences, jobs)
    torch.testing.assert_close(read_logits(subject, torch.stack(fast)), slow, rtol=1e-4, atol=2e-5)
