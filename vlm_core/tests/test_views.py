"""Token groups, and attention seen in blocks: the numbers of the whole map without the map."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from vlm_core import Batch, Subject
from vlm_core.seam import views
from vlm_core.seam.views import Tokens
from vlm_core.subjects import batch as batches
from vlm_core.tests.family_models import AFTER, IMAGE_TOKEN, TINY

# Text before, two images with text between, text after; then one filled up on the left; then one whose image was dropped.
IMAGE = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]]).bool()
VALID = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()


@pytest.fixture(autouse=True)
def layouts_of_its_own():
    """Layouts are shared between batches, and with them blocks, whose size some tests change."""
    batches._laid_out.cache_clear()
    yield
    batches._laid_out.cache_clear()


def tokens(**extra) -> Tokens:
    return Tokens(image=IMAGE, valid=VALID, rows=torch.arange(3), **extra)


def positions(members: torch.Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in members]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("image", [[1, 2, 4], [3, 4], []]),
        ("text", [[0, 3, 5, 6], [2, 5, 6], [0, 1, 2, 3, 4]]),
        ("question", [[5, 6], [5, 6], [0, 1, 2, 3, 4]]),
        ("preamble", [[0], [2], []]),
        ("last", [[6], [6], [4]]),
        ("bos", [[0], [2], [0]]),
        ("all", [[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6], [0, 1, 2, 3, 4]]),
    ],
)
def test_groups(group, expected):
    assert positions(tokens().group(group)) == expected


def test_named_groups_hold_valid_tokens_only_and_unknown_ones_are_refused():
    everywhere = torch.ones_like(VALID)
    named = tokens(named={"object": everywhere})
    assert torch.equal(named.group("object"), VALID)
    with pytest.raises(ValueError, match="no token group 'objekt': this batch knows image, .*, preamble, .*, object"):
        named.group("objekt")


def test_pinned_groups_outlive_the_image():
    pinned = tokens().pinned()
    without = Tokens(torch.zeros_like(IMAGE), VALID & ~IMAGE, torch.arange(3), named=pinned.named)
    assert positions(without.group("question")) == [[5, 6], [5, 6], [0, 1, 2, 3, 4]]
    assert positions(without.group("preamble")) == [[0], [2], []]


def test_generated_tokens_extend_the_question_and_no_other_named_group():
    longer = tokens(named={"object": IMAGE}).pinned().extended(9)
    assert positions(longer.group("question")) == [[5, 6, 7, 8], [5, 6, 7, 8], [0, 1, 2, 3, 4, 7, 8]]
    assert positions(longer.group("object")) == positions(IMAGE & VALID)
    assert positions(tokens().extended(9).group("question"))[0] == [5, 6, 7, 8]


def test_members_are_in_order_and_say_which_are_real():
    order, real = tokens().members("image")
    assert order[0].tolist() == [1, 2, 4] and order[1, :2].tolist() == [3, 4]
    assert real.tolist() == [[True] * 3, [True, True, False], [False] * 3]


@pytest.mark.parametrize("name", ["image", "text", "question", "preamble", "last", "bos", "all"])
def test_members_of_one_sequence_are_those_that_it_has_in_a_batch(name):
    order, real = tokens().members(name)
    for element in range(3):
        alone = Tokens(IMAGE[element][None], VALID[element][None], torch.zeros(1, dtype=torch.long))
        found, members = alone.members(name)
        assert bool(members.all()) and found.tolist() == [order[element][real[element]].tolist()]


class Grab:
    """Keeps what the seam shows."""

    def __init__(self) -> None:
        self.views = {}

    def attention(self, view):
        self.views[view.layer] = view


@cache
def seen_and_expected(name: str, side: str, attention: str):
    """Views of two prompts of different lengths, and the whole maps of the plain eager model."""
    inputs = TINY[name].prompts((1, 1), (AFTER, AFTER[:2]), side)
    batch = Batch(inputs, inputs["input_ids"] == IMAGE_TOKEN, inputs["attention_mask"].bool())
    grab = Grab()
    subject = Subject(TINY[name].model(attention), name=name)
    with torch.inference_mode(), subject.intervene(None, batch, observers=[grab]):
        subject.model(**inputs, use_cache=False)
    with torch.inference_mode():
        maps = TINY[name].model("eager")(**inputs, use_cache=False, output_attentions=True).attentions
    return grab.views, maps, batch


# Grouped queries, bidirectional image blocks with sliding windows, a soft cap; the last has no sdpa.
SEEN = [
    (name, side, attention)
    for name in ("llava", "gemma3", "paligemma", "qwen2_5_vl", "paligemma2")
    for side in ("left", "right")
    for attention in TINY[name].attentions
]


@pytest.mark.parametrize(("name", "side", "attention"), SEEN)
@pytest.mark.parametrize("queries", ["all", "text", "image", "last"])
def test_blocks_are_the_rows_of_the_map(monkeypatch, name, side, attention, queries):
    monkeypatch.setattr(views, "_BLOCK_SCORES", 1)
    monkeypatch.setattr(views, "_BLOCK_QUERIES", 3)
    seen, maps, batch = seen_and_expected(name, side, attention)
    for layer, view in seen.items():
        view._kept.clear()
        view.tokens._kept.clear()
        found = torch.zeros_like(maps[layer])
        members = torch.zeros_like(batch.valid)
        for block in view.blocks(queries):
            assert block.probabilities.shape[2] <= 3
            for element, head in ((e, h) for e in range(2) for h in range(maps[layer].shape[1])):
                real = block.real[element]
                rows = block.positions[element][real]
                found[element, head, rows, : block.probabilities.shape[3]] = block.probabilities[element, head, real]
                members[element, rows] = True
        assert torch.equal(members, view.tokens.group(queries))
        expected = maps[layer] * members[:, None, :, None]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        mean = expected.sum(2) / members.sum(1)[:, None, None]
        torch.testing.assert_close(view.mean(queries), mean, rtol=1e-4, atol=1e-6)


def test_models_with_and_without_capped_scores_share_a_layout():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 7, 4)
    tokens = Tokens(IMAGE[:1], torch.ones_like(IMAGE[:1]), torch.zeros(1, dtype=torch.long))
    later = torch.full((7, 7), -torch.inf).triu(1)
    for softcap in (None, 0.5, None):
        view = views.AttentionView(0, query, key, key, query.transpose(1, 2), None, 0.5, softcap, tokens)
        scores = query @ key.mT * 0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        torch.testing.assert_close(view.mean("all"), (scores + later).softmax(-1).mean(2), rtol=1e-5, atol=1e-6)


def test_attention_is_computed_once_for_all_who_ask():
    view = seen_and_expected("llava", "left", "sdpa")[0][1]
    assert next(view.blocks("last")).probabilities is next(view.blocks("last")).probabilities
    assert view.mean("all") is view.mean("all")


def test_a_causal_block_leaves_out_the_keys_that_none_of_it_sees(monkeypatch):
    monkeypatch.setattr(views, "_BLOCK_SCORES", 1)
    monkeypatch.setattr(views, "_BLOCK_QUERIES", 4)
    seen, _, _ = seen_and_expected("llava", "right", "sdpa")
    # Without padding the model hands the seam no mask at all.
    view = seen[0]
    causal = views.AttentionView(
        0, view.query[:1], view.key[:1], view.value[:1], view.output[:1], None, view.scaling, None,
        Tokens(view.tokens.image[:1], torch.ones_like(view.tokens.valid[:1]), torch.zeros(1, dtype=torch.long)),
    )
    widths = [block.probabilities.shape[3] for block in causal.blocks("all")]
    assert widths == [min(4 * (number + 1), view.query.shape[2]) for number in range(len(widths))]
    whole = causal.probabilities(torch.arange(view.query.shape[2])[None])
    assert torch.equal(whole.tril(), whole)
    torch.testing.assert_close(torch.cat([block.probabilities.sum(3) for block in causal.blocks("all")], 2), whole.sum(3))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_narrowed_view_is_some_heads_of_the_whole(name):
    seen, maps, _ = seen_and_expected(name, "left", "sdpa")
    narrowed = seen[2].narrowed((3, 0))
    torch.testing.assert_close(narrowed.mean("all"), seen[2].mean("all")[:, [3, 0]])
    assert torch.equal(narrowed.output, seen[2].output[:, :, [3, 0]])
    assert narrowed.query.shape[1] == narrowed.key.shape[1] == 2


GROUPS_ASKED = ("image", "text", "last", "bos")


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma", "qwen2_5_vl", "paligemma2"])
@pytest.mark.parametrize("kept", [views.MASK_KEPT, 0])
def test_shares_of_groups_are_those_of_the_whole_map(name, kept, monkeypatch):
    """One sequence at a time, where attention over group membership stands for the map; queries alone, in between and all."""
    monkeypatch.setattr(views, "MASK_KEPT", kept)
    inputs = TINY[name].prompts((1,), (AFTER,), "left")
    batch = Batch(inputs, inputs["input_ids"] == IMAGE_TOKEN, inputs["attention_mask"].bool())
    grab, attention = Grab(), "sdpa" if "sdpa" in TINY[name].attentions else "eager"
    subject = Subject(TINY[name].model(attention), name=name)
    with torch.inference_mode(), subject.intervene(None, batch, observers=[grab]):
        subject.model(**inputs, use_cache=False)
    with torch.inference_mode():
        maps = TINY[name].model("eager")(**inputs, use_cache=False, output_attentions=True).attentions
    fused = set()
    for layer, view in grab.views.items():
        for queries in ("text", "last", "image", "all"):
            for groups in (GROUPS_ASKED, ("image",), ("last",)):
                members = torch.stack([view.keys_of(group) for group in groups], dim=2).float()
                expected = maps[layer][:, :, view.tokens.group(queries)[0]].mean(2) @ members
                torch.testing.assert_close(view.shares(queries, groups), expected, rtol=1e-5, atol=1e-6)
                if groups == GROUPS_ASKED and ("mean", queries) not in view._kept:
                    fused.add(queries)
        wide = tuple(f"all{i}" for i in range(view.key.shape[3] + 1))
        many = replace(view, tokens=replace(view.tokens, named={group: view.tokens.valid for group in wide}))
        assert torch.allclose(many.shares("last", wide), torch.ones(()), atol=1e-6)
    causal = all(view.mask is None and view.softcap is None for view in grab.views.values())
    grouped = any(view.query.shape != view.key.shape for view in grab.views.values())
    assert causal == (name in ("llava", "qwen2_5_vl")) and grouped
    assert fused == ({"text", "last", "image", "all"} if causal and kept else set())


def test_shares_of_no_queries_are_nan_and_follow_a_mean_that_is_there_already():
    seen, _, batch = seen_and_expected("llava", "left", "sdpa")
    view = next(iter(seen.values()))
    alone = views.AttentionView(
        view.layer, view.query[:1], view.key[:1], view.value[:1], view.output[:1], None, view.scaling, None,
        Tokens(torch.zeros_like(batch.image[:1]), batch.valid[:1], torch.zeros(1, dtype=torch.long)),
    )  # fmt: skip
    assert alone.shares("image", ("text",)).isnan().all()
    alone._kept["mean", "last"] = torch.full((1, view.query.shape[1], view.key.shape[2]), 0.5)
    assert torch.equal(alone.shares("last", ("bos",)), torch.full((1, view.query.shape[1], 1), 0.5))


@pytest.mark.parametrize("queries", ["all", "text", "image"])
def test_shares_where_every_head_has_keys_of_its_own(queries):
    """Also where a sequence begins with padding: then the queries are not all there are."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 3, 7, 4)
    scores = (query @ key.mT * 0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    for element in (0, 1):
        seen = Tokens(IMAGE[element][None], VALID[element][None], torch.zeros(1, dtype=torch.long))
        view = views.AttentionView(0, query, key, key, query.transpose(1, 2), None, 0.5, None, seen)
        for groups in (GROUPS_ASKED, ("image",), ("last",)):
            members = torch.stack([seen.group(group) for group in groups], dim=2).float()
            expected = scores.softmax(-1)[:, :, seen.group(queries)[0]].mean(2) @ members
            torch.testing.assert_close(view.shares(queries, groups), expected, rtol=1e-5, atol=1e-6)
            assert view._kept == {} or groups != GROUPS_ASKED


@pytest.mark.parametrize("order", ["ITIT", "TTII", "IITT", "TIIT"])
def test_shares_of_queries_that_see_nothing_of_a_group(order):
    """Text around, before and between the image: what lies before all of a group gives it nothing, and may be all there is."""
    torch.manual_seed(1)
    image = torch.tensor([[one == "I" for one in order]])
    query, key = torch.randn(2, 1, 2, 4, 4)
    weights = (query @ key.mT * 0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)
    tokens = Tokens(image, torch.ones_like(image), torch.zeros(1, dtype=torch.long))
    view = views.AttentionView(0, query, key, key, query.transpose(1, 2), None, 0.5, None, tokens)
    for queries, group in (("text", "image"), ("image", "text")):
        expected = weights[:, :, tokens.group(queries)[0]].mean(2) @ tokens.group(group)[0].float()
        torch.testing.assert_close(view.shares(queries, (group,))[..., 0], expected, rtol=1e-5, atol=1e-6)
