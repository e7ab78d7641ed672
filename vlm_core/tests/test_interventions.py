"""Every intervention equals a slow oracle without the seam: at heads, positions, layers and rows, alone and together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm_core import (
    DropTokens,
    GaussianNoise,
    HeadDirections,
    HeadMeans,
    ImageKV,
    ImageKVMeans,
    KnockOut,
    MeanHeads,
    MergeTokens,
    Patch,
    RedirectHeads,
    ReplaceImageKV,
    ReplaceTokens,
    ResampleHeads,
    Steer,
    Vector,
    ZeroHeads,
    capture_activations,
    capture_embeddings,
    capture_image_kv,
    mean_token,
    token_spread,
    touches,
)
from vlm_core.items import item_number
from vlm_core.seam.plan import parts
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.tests.oracles import (
    causal,
    counted,
    edit_heads,
    edit_stream,
    hooked,
    logits,
    mask_layers,
    members,
    merge_by_hand,
    read_site,
    replace_image_kv,
    run_shortened,
)
from vlm_core.tests.tiny import make_items, normal, tiny_subject

SUBJECTS = ["subject", "gqa_subject", "eager_subject"]
N_IMAGE = 17
POSITIONS = ["text", "question", "preamble", "last", "image", (0, 5, -2)]


@pytest.fixture(params=SUBJECTS)
def any_subject(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def items():
    """Two lengths of prompt: one of four is longer."""
    return make_items(4)


@pytest.fixture(scope="module")
def batch(subject, items):
    batch = subject.encode_items(items)
    assert not bool(batch.valid.all()), "left padding is part of the tests"
    return batch


def intervened(subject, batch, plan, **options):
    with subject.intervene(plan, batch, **options):
        return logits(subject, batch)


def same(seen, expected, batch, plain):
    """Equal where there are tokens, and not because nothing happened."""
    torch.testing.assert_close(seen[batch.valid], expected[batch.valid], rtol=1e-4, atol=1e-4)
    assert (seen - plain)[batch.valid].abs().max() > 1e-3


def partners(items):
    """The same prompts, each with another image."""
    return [{**item, "image": items[(number + 1) % len(items)]["image"], "id": f"{item['id']}-p"} for number, item in enumerate(items)]


def twice(batch, vector):
    return torch.stack([vector] * len(batch))


# -- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_zeroed_heads_at_positions(any_subject, batch, positions):
    chosen = members(batch, positions)
    plain = logits(any_subject, batch)

    def zero(heads):
        heads[:, :, 2][chosen] = 0.0

    with hooked(edit_heads(any_subject, 1, zero)):
        expected = logits(any_subject, batch)
    same(intervened(any_subject, batch, ZeroHeads([(1, 2)], positions)), expected, batch, plain)


@pytest.mark.parametrize("positions", ["last", "text", (1, -1)])
def test_mean_heads_at_positions(any_subject, batch, positions):
    means = HeadMeans(normal(3, 4, 8))
    chosen = members(batch, positions)

    def put(heads):
        heads[:, :, 0][chosen] = means.values[1, 0]
        heads[:, :, 3][chosen] = means.values[1, 3]

    with hooked(edit_heads(any_subject, 1, put)):
        expected = logits(any_subject, batch)
    seen = intervened(any_subject, batch, MeanHeads([(1, 0), (1, 3)], means, positions))
    same(seen, expected, batch, logits(any_subject, batch))


@pytest.mark.parametrize("positions", ["all", "last", "text", (1, -1)])
def test_redirected_heads_keep_their_length_at_positions(any_subject, batch, positions):
    given = 3.0 * normal(3, 4, 8)
    chosen = members(batch, positions)

    def turn(heads):
        for head in (0, 3):
            lengths = heads[:, :, head][chosen].square().sum(-1).sqrt()
            heads[:, :, head][chosen] = lengths[:, None] * given[1, head] / given[1, head].square().sum().sqrt()

    with hooked(edit_heads(any_subject, 1, turn)):
        expected = logits(any_subject, batch)
    seen = intervened(any_subject, batch, RedirectHeads([(1, 0), (1, 3)], HeadDirections(given), positions))
    same(seen, expected, batch, logits(any_subject, batch))


def test_random_directions_are_drawn_evenly_and_follow_their_seed():
    drawn = HeadDirections.random(20, 50, 3, seed=1)
    torch.testing.assert_close(drawn.values.norm(dim=-1), torch.ones(20, 50))
    assert drawn.values.mean((0, 1)).abs().max() < 0.1  # a sphere has no side
    torch.testing.assert_close(drawn.values.flatten(0, 1).T.cov(), torch.eye(3) / 3, atol=0.05, rtol=0)
    narrow = HeadDirections(drawn.values.bfloat16())
    assert HeadDirections(narrow.values) == narrow and narrow.values.norm(dim=-1).sub(1).abs().max() < 1e-6
    assert HeadDirections.random(20, 50, 3, seed=1) == drawn != HeadDirections.random(20, 50, 3, seed=2)


def test_a_direction_without_length_is_refused():
    values = normal(3, 4, 8)
    values[2, 1] = 0
    with pytest.raises(ValueError, match=r"the direction of head 2\.1 is zero"):
        HeadDirections(values)
    with pytest.raises(ValueError, match="directions of RedirectHeads must be HeadDirections, got HeadMeans"):
        RedirectHeads([(0, 0)], HeadMeans(normal(3, 4, 8)))


@pytest.mark.parametrize("positions", ["all", "image", "last"])
def test_resampled_heads_come_from_another_run(any_subject, batch, items, positions):
    others = partners(items)
    chosen, other_batch = members(batch, positions), any_subject.encode_items(others)
    kept = read_site(any_subject, other_batch, "head", 1)

    def put(heads):
        heads[:, :, 1][chosen] = kept[:, :, 1][chosen]

    with hooked(edit_heads(any_subject, 1, put)):
        expected = logits(any_subject, batch)
    plan = [ResampleHeads([(1, 1)], capture_activations(any_subject, other, "head", 1), positions) for other in others]
    same(intervened(any_subject, batch, plan), expected, batch, logits(any_subject, batch))


# -- image keys and values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["all", "question", "text", "last", "image", (-3, -1)])
def test_image_keys_and_values_for_some_queries(any_subject, batch, queries):
    means = ImageKVMeans(normal(3, 4, 8, seed=1), normal(3, 4, 8, seed=2))
    batch, chosen = counted(batch), members(batch, queries)
    with hooked(*replace_image_kv(any_subject, batch, 1, 2, means.keys[1, 2], means.values[1, 2], chosen)):
        expected = logits(any_subject, batch)
    seen = intervened(any_subject, batch, ReplaceImageKV([(1, 2)], means, queries))
    same(seen, expected, batch, logits(any_subject, batch))


@pytest.mark.parametrize("queries", ["all", "question"])
def test_image_keys_and_values_of_another_image(any_subject, batch, items, queries):
    source = capture_image_kv(any_subject, partners(items)[0])
    assert source.keys.shape == (3, 4, N_IMAGE, 8)
    batch, chosen = counted(batch), members(batch, queries)
    with hooked(*replace_image_kv(any_subject, batch, 1, 3, source.keys[1, 3], source.values[1, 3], chosen)):
        expected = logits(any_subject, batch)
    seen = intervened(any_subject, batch, ReplaceImageKV([(1, 3)], source, queries))
    same(seen, expected, batch, logits(any_subject, batch))


def test_the_own_keys_and_values_put_back_change_nothing(any_subject, items):
    batch = any_subject.encode_items(items[:1])
    source = capture_image_kv(any_subject, items[0])
    seen = intervened(any_subject, batch, ReplaceImageKV(any_subject.heads, source))
    torch.testing.assert_close(seen, logits(any_subject, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shorter", [DropTokens(2, 0.5), MergeTokens(2, 0.4)])
def test_keys_and_values_of_tokens_that_are_left_find_their_own(subject, items, shorter):
    """The own keys and values, put back token by token after others have left, change nothing where none was merged."""
    batch = subject.encode_items(items[:1])
    source = capture_image_kv(subject, items[0])
    heads = [(2, head) for head in range(4)]
    seen, expected = intervened(subject, batch, (shorter, ReplaceImageKV(heads, source))), intervened(subject, batch, shorter)
    gap = float((seen - expected).abs().max())
    assert (gap < 1e-4) == isinstance(shorter, DropTokens), gap


# -- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "keys"),
    [("question", "object"), ("image", "image"), ("image", "preamble"), ("object", "bos"), ((-1, -2), (3, 4))],
)
@pytest.mark.parametrize("heads", [(), (1, 2)])
@pytest.mark.parametrize("name", SUBJECTS)
def test_knocked_out_edges_between_named_groups(request, batch, name, queries, keys, heads):
    subject = request.getfixturevalue(name)
    oracle = request.getfixturevalue("gqa_subject" if name == "gqa_subject" else "subject")
    named = {"object": batch.image & (torch.arange(batch.image.shape[1]) % 3 == 0)}
    edges = members(batch, queries, named)[:, None, :, None] & members(batch, keys, named)[:, None, None, :]
    edges = edges & ~torch.eye(edges.shape[-1], dtype=torch.bool)
    touched = torch.tensor([not heads or head in heads for head in range(4)])[:, None, None]
    with hooked(*mask_layers(oracle, lambda layer: causal(batch) & ~(edges & touched) if layer in (1, 2) else causal(batch))):
        expected = logits(oracle, batch)
    seen = intervened(subject, batch, KnockOut(queries, keys, (1, 2), heads), groups=named)
    same(seen, expected, batch, logits(subject, batch))


# -- activation patching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["residual", "attention", "mlp", "head"])
@pytest.mark.parametrize("positions", ["all", "image", "last", (2, -1)])
def test_patching_equals_hooks(any_subject, batch, items, site, positions):
    others = partners(items)
    layers = (0, 2)
    chosen, other_batch = members(batch, positions), any_subject.encode_items(others)
    kept = {layer: read_site(any_subject, other_batch, site, layer) for layer in layers}

    def put(layer):
        def edit(tensor):
            tensor[chosen] = kept[layer][chosen]

        return edit

    with hooked(*(edit_stream(any_subject, site, layer, put(layer)) for layer in layers)):
        expected = logits(any_subject, batch)
    plan = [Patch(site, layers, capture_activations(any_subject, other, site, layers), positions) for other in others]
    same(intervened(any_subject, batch, plan), expected, batch, logits(any_subject, batch))


def test_patching_some_heads_only(any_subject, batch, items):
    others = partners(items)
    kept = read_site(any_subject, any_subject.encode_items(others), "head", 1)

    def put(heads):
        heads[:, :, [0, 3]] = kept[:, :, [0, 3]]

    with hooked(edit_heads(any_subject, 1, put)):
        expected = logits(any_subject, batch)
    plan = [Patch("head", (), capture_activations(any_subject, other, "head", 1), heads=((1, 0), (1, 3))) for other in others]
    same(intervened(any_subject, batch, plan), expected, batch, logits(any_subject, batch))


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_denoising_all_of_the_stream_gives_the_clean_run(subject, items, layer):
    clean, corrupted = items[0], partners(items)[0]
    source = capture_activations(subject, clean, layers=layer)
    batch, clean_batch = subject.encode_items([corrupted]), subject.encode_items([clean])
    seen = intervened(subject, batch, Patch("residual", layer, source))
    torch.testing.assert_close(seen, logits(subject, clean_batch), rtol=1e-5, atol=1e-5)
    assert (seen - logits(subject, batch)).abs().max() > 1e-2


def test_named_groups_are_matched_member_by_member(subject, items):
    batch = subject.encode_items(items[1:2])
    columns = batch.image[0].nonzero()[:, 0]
    here, there = torch.zeros_like(batch.image), torch.zeros_like(batch.image)
    here[0, columns[:3]] = True
    there[0, columns[5:8]] = True
    other = partners(items)[1]
    source = capture_activations(subject, other, "residual", 1, groups={"object": there[0].numpy()})
    kept = read_site(subject, subject.encode_items([other]), "residual", 1)

    def put(hidden):
        hidden[here] = kept[there]

    with hooked(edit_stream(subject, "residual", 1, put)):
        expected = logits(subject, batch)
    seen = intervened(subject, batch, Patch("residual", 1, source, "object"), groups={"object": here})
    same(seen, expected, batch, logits(subject, batch))


@pytest.mark.parametrize("site", ["residual", "mlp", "head"])
def test_noise_is_added_and_depends_on_the_item_alone(any_subject, batch, site):
    noise, numbers = GaussianNoise(0.5, seed=3), [11, 5, 7, 11]
    chosen = members(batch, "image")
    width = 32

    def add(tensor):
        for row in range(len(batch)):
            drawn = noise.draw(numbers[row], site, 1, batch.valid.shape[1], width).view(-1, *tensor.shape[2:])
            first = int(batch.valid[row].int().argmax())
            for column in chosen[row].nonzero()[:, 0].tolist():
                tensor[row, column] += drawn[column - first]

    with hooked(edit_stream(any_subject, site, 1, add)):
        expected = logits(any_subject, batch)
    plan = Patch(site, 1, noise, "image")
    seen = intervened(any_subject, batch, plan, items=numbers)
    same(seen, expected, batch, logits(any_subject, batch))


def test_noise_has_its_scale_and_differs_between_items_layers_and_seeds():
    noise = GaussianNoise(2.0, seed=1)
    drawn = noise.draw(3, "mlp", 0, 400, 64)
    assert abs(float(drawn.std()) - 2.0) < 0.05
    assert abs(float(drawn.mean())) < 0.05
    assert torch.equal(drawn[:100], noise.draw(3, "mlp", 0, 100, 64))
    others = [noise.draw(4, "mlp", 0, 400, 64), noise.draw(3, "mlp", 1, 400, 64), GaussianNoise(2.0, seed=2).draw(3, "mlp", 0, 400, 64)]
    others += [noise.draw(3, site, 0, 400, 64) for site in ("residual", "attention", "head")]
    for other in others:
        assert abs(float((other * drawn).mean())) < 0.1, "noise of two places is correlated (4 is the variance)"


def test_noise_and_random_drops_belong_to_items_where_a_batch_names_them_else_to_rows(subject, items):
    """One prompt five times: as items, two of which are one item; and as five images and prompts that name no item."""
    again = [{**items[1], "id": name} for name in ("a", "b", "b", "c", "a")]
    named = subject.encode_items(again)
    unnamed = subject.encode([items[1]["image"]] * 5, [items[1]["prompt"]] * 5)
    for plan in (ReplaceTokens(GaussianNoise(1.5)), DropTokens(1, 0.3, "random")):
        seen = intervened(subject, named, plan)[:, -1]
        apart = torch.cdist(seen, seen) > 1e-3
        same_item = torch.tensor([[one["id"] == other["id"] for other in again] for one in again])
        assert torch.equal(apart, ~same_item)
        torch.testing.assert_close(seen, intervened(subject, named, plan, items=list(map(item_number, again)))[:, -1])
        alone = intervened(subject, subject.encode_items(again[3:4]), plan)[0, -1]
        torch.testing.assert_close(seen[3], alone, rtol=1e-4, atol=1e-4)
        rows = intervened(subject, unnamed, plan)[:, -1]
        assert bool((torch.cdist(rows, rows) > 1e-3)[~torch.eye(5, dtype=torch.bool)].all())
        torch.testing.assert_close(rows, intervened(subject, unnamed, plan, items=range(5))[:, -1])
    with pytest.raises(ValueError, match="2 items were named for 5 prompts"):
        intervened(subject, unnamed, plan, items=[1, 2])


# -- tokens in embedding space, directions --------------------------------------------------------------------------


def edit_embeddings(subject, edit):
    """Hook that changes the merged embeddings before the language model sees them."""

    def hook(args, kwargs):
        embeds = kwargs["inputs_embeds"].clone()
        edit(embeds)
        return args, {**kwargs, "inputs_embeds": embeds}

    return subject.anatomy.language_model, "pre", hook


@pytest.mark.parametrize("tokens", ["image", "object", (4, 5)])
def test_tokens_become_the_mean_token(any_subject, batch, items, tokens):
    mean = mean_token(any_subject, items)
    named = {"object": batch.image & (torch.arange(batch.image.shape[1]) % 4 == 0)}
    chosen = members(batch, tokens, named)

    def put(embeds):
        embeds[chosen] = mean.values

    with hooked(edit_embeddings(any_subject, put)):
        expected = logits(any_subject, batch)
    seen = intervened(any_subject, batch, ReplaceTokens(mean, tokens), groups=named)
    same(seen, expected, batch, logits(any_subject, batch))


def test_tokens_become_those_of_another_item_or_noisy(any_subject, batch, items):
    others = partners(items)
    with hooked(edit_embeddings(any_subject, lambda embeds: kept.append(embeds))):
        kept = []
        logits(any_subject, any_subject.encode_items(others))
    noise = GaussianNoise(1.5)

    def put(embeds):
        for row, column in batch.image.nonzero().tolist():
            if row % 2:
                embeds[row, column] = kept[0][row, column]
            else:
                first = int(batch.valid[row].int().argmax())
                embeds[row, column] += noise.draw(row, "residual", 0, 64, 32)[column - first]

    with hooked(edit_embeddings(any_subject, put)):
        expected = logits(any_subject, batch)
    plan = [ReplaceTokens(capture_embeddings(any_subject, other) if row % 2 else noise) for row, other in enumerate(others)]
    same(intervened(any_subject, batch, plan, items=range(4)), expected, batch, logits(any_subject, batch))


def test_the_mean_token_and_the_spread_are_those_of_all_image_tokens(subject, items):
    tokens = []
    for item in items:
        batch = subject.encode_items([item])
        with torch.inference_mode():
            tokens.append(read_site(subject, batch, "residual", 0)[batch.image])
    tokens = torch.cat(tokens)
    torch.testing.assert_close(mean_token(subject, items, batch=3).values, tokens.mean(0), rtol=1e-4, atol=1e-5)
    expected = float(tokens.var(0, correction=0).mean().sqrt())
    assert token_spread(subject, items, batch=3) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("positions", ["all", "question", "last", (0,)])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_steering_adds_a_direction(any_subject, batch, positions, layer):
    direction = normal(32)
    chosen = members(batch, positions)

    def add(hidden):
        hidden[chosen] += -1.5 * direction

    with hooked(edit_stream(any_subject, "residual", layer, add)):
        expected = logits(any_subject, batch)
    seen = intervened(any_subject, batch, Steer(layer, direction, -1.5, positions))
    same(seen, expected, batch, logits(any_subject, batch))


# -- drops and merges -----------------------------------------------------------------------------------------------


def test_dropping_candidates_only(subject, batch):
    named = {"object": batch.image & (torch.arange(batch.image.shape[1]) % 3 == 0)}
    with subject.intervene(DropTokens(1, 0.0, tokens="object"), batch, groups=named) as run:
        seen = logits(subject, batch)
    kept = batch.valid & ~named["object"]
    with hooked(*mask_layers(subject, lambda layer: causal(batch) & kept[:, None, None, :] if layer >= 1 else causal(batch))):
        expected = logits(subject, batch)
    still = run.tokens.valid
    torch.testing.assert_close(seen[still], expected[kept], rtol=1e-4, atol=1e-4)
    assert seen.shape[1] == int(kept.sum(1).max())


@pytest.mark.parametrize("shorter", [DropTokens(1, 0.5, tokens="object"), MergeTokens(1, 0.5, tokens="object")])
def test_a_fraction_of_the_candidates_is_left(subject, batch, shorter):
    named = {"object": batch.image & (batch.image.long().cumsum(1) % 3 == 1)}
    assert named["object"].sum(1).tolist() == [6] * 4
    with subject.intervene(shorter, batch, groups=named) as run:
        logits(subject, batch)
    assert run.tokens.image.sum(1).tolist() == [N_IMAGE - 3] * 4
    assert run.tokens.group("object").sum(1).tolist() == [3] * 4


def test_the_question_stays_the_question_when_the_image_is_gone(subject, items):
    batch = subject.encode_items(items[:1])
    preamble = members(batch, "preamble")[0].nonzero()[:, 0].tolist()
    gone, direction = DropTokens(1, 0.0), normal(32)
    dropped = intervened(subject, batch, gone)[0]
    for edit in (Steer(2, direction, positions="question"), ZeroHeads([(2, 1)], "question")):
        edited = intervened(subject, batch, (gone, edit))[0]
        assert torch.equal(edited[preamble], dropped[preamble])
        assert bool((edited != dropped)[len(preamble) :].any(1).all())


@pytest.mark.parametrize("similarity", ["hidden", "keys"])
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("keep", [0.7, 0.3, 0.06])
def test_merging_equals_a_loop_over_tokens(any_subject, items, similarity, proportional, keep):
    """0.7 takes one round of matching, 0.3 two, 0.06 five."""
    batch = any_subject.encode_items(items[:1])
    image = batch.image[0].nonzero()[:, 0].tolist()
    anatomy = any_subject.anatomy

    def shorten(hidden):
        stream = [hidden[column] for column in image]
        compared = stream
        if similarity == "keys":
            before = anatomy.layers[0]
            entered = before.input_layernorm(read_site(any_subject, batch, "residual", 0))
            keys = anatomy.attentions[0].k_proj(entered).unflatten(-1, (anatomy.n_kv_heads, 8)).transpose(1, 2)
            cosines, sines = anatomy.language_model.rotary_emb(entered, torch.arange(entered.shape[1])[None])
            half = keys.shape[-1] // 2
            keys = keys * cosines[:, None] + torch.cat([-keys[..., half:], keys[..., :half]], -1) * sines[:, None]
            compared = [keys[0, :, column].mean(0) for column in image]
        merged = merge_by_hand(stream, compared, max(1, round(keep * N_IMAGE)))
        left = {image[place]: (vector, size) for place, vector, size in merged}
        columns = [column for column in range(len(hidden)) if column not in image or column in left]
        vectors = [left[column][0] if column in left else hidden[column] for column in columns]
        sizes = [left[column][1] if column in left and proportional else 1.0 for column in columns]
        assert sum(size for _, _, size in merged) == N_IMAGE
        return columns, vectors, sizes

    with torch.inference_mode():
        expected = run_shortened(any_subject, batch, 1, shorten)
    with any_subject.intervene(MergeTokens(1, keep, similarity, proportional), batch) as run:
        seen = logits(any_subject, batch)
    assert run.tokens.image.sum() == max(1, round(keep * N_IMAGE))
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_merged_tokens_weigh_what_they_weighed_apart(items, attention):
    """Where image tokens are alike and have no positions, merging them changes nothing for later text, if their sizes count."""
    shallow = tiny_subject(layers=1, kv_heads=2, attention=attention)
    batch = shallow.encode_items(items[:1])
    mean = ReplaceTokens(mean_token(shallow, items))
    still = (shallow.anatomy.language_model.rotary_emb, "post", lambda output: (torch.ones_like(output[0]), torch.zeros_like(output[1])))
    gaps = {}
    with hooked(still):
        apart = intervened(shallow, batch, mean)[0, -1]
        for proportional in (True, False):
            merged = intervened(shallow, batch, (mean, MergeTokens(0, 0.2, proportional=proportional)))[0, -1]
            gaps[proportional] = float((merged - apart).abs().max())
    assert gaps[True] < 1e-4
    assert gaps[False] > 1e-2


def test_merged_prompts_are_shorter_to_the_end(subject, batch):
    with subject.intervene(MergeTokens(1, 0.25), batch) as run, torch.inference_mode():
        cache = subject.model(**batch.inputs, use_cache=True).past_key_values
    n = batch.valid.shape[1]
    assert [cache.get_seq_length(layer) for layer in range(3)] == [n, n - N_IMAGE + 4, n - N_IMAGE + 4]
    assert run.tokens.image.sum(1).tolist() == [4] * 4


def test_merging_again_counts_what_was_merged(subject, items):
    batch = subject.encode_items(items[:1])
    image = batch.image[0].nonzero()[:, 0].tolist()
    twice_merged = (MergeTokens(1, 0.5), MergeTokens(2, 0.25))
    with subject.intervene(twice_merged, batch) as run:
        logits(subject, batch)
    weighed = run._weighed_at[2]
    assert run.tokens.image.sum() == 4
    assert float(weighed.sizes[0][run.tokens.image[0]].sum()) == N_IMAGE
    assert float(weighed.sizes[0][~run.tokens.image[0]].sum()) == batch.valid.shape[1] - len(image)


# -- everything together --------------------------------------------------------------------------------------------


def every_kind(subject, items):
    """One of each, and tuples; sources fit every one of the ``items``, which share one prompt."""
    anatomy = subject.anatomy
    source = capture_activations(subject, items[-1], ("residual", "attention", "mlp", "head"), range(3))
    means = ImageKVMeans(normal(3, 4, 8, seed=4), normal(3, 4, 8, seed=5))
    head_means = HeadMeans(normal(3, 4, 8, seed=6))
    other = capture_image_kv(subject, items[-1])
    direction = normal(anatomy.hidden_size, seed=7)
    return [
        None,
        ZeroHeads([(0, 1), (2, 3)]),
        ZeroHeads([(1, 1)], "question"),
        MeanHeads([(1, 2)], head_means, "last"),
        RedirectHeads([(1, 2), (2, 0)], HeadDirections(head_means.values), "question"),
        RedirectHeads([(0, 3)], HeadDirections(normal(3, 4, 8, seed=8))),
        ResampleHeads([(1, 0), (2, 2)], source, "image"),
        ReplaceImageKV([(0, 0), (1, 3)], means),
        ReplaceImageKV([(1, 1), (2, 0)], means, "question"),
        ReplaceImageKV([(2, 1)], other, "last"),
        ReplaceImageKV([(1, 1)], other),
        KnockOut("question", "image", (1, 2)),
        KnockOut("last", "image", (1,), (2,)),
        Patch("residual", 1, source, "image"),
        Patch("residual", 2, source, "last"),
        Patch("attention", (1, 2), source, "text"),
        Patch("mlp", 2, source, (0, -1)),
        Patch("head", (), source, heads=((2, 1),)),
        Patch("residual", 1, GaussianNoise(0.7), "image"),
        ReplaceTokens(GaussianNoise(0.5, 2)),
        ReplaceTokens(Vector(direction), (5, 6)),
        Steer(1, direction),
        Steer(3, direction, 2.0, "last"),
        DropTokens(1, 0.4),
        DropTokens(2, 0.3, "attention"),
        MergeTokens(1, 0.5),
        MergeTokens(2, 0.3, "keys", False),
        (MergeTokens(1, 0.5), DropTokens(2, 0.25), ZeroHeads([(2, 0)])),
        (ReplaceTokens(Vector(direction), (5,)), ReplaceImageKV([(0, 2)], means, "last"), Steer(2, direction, 0.5, "question")),
        (DropTokens(1, 0.5), ReplaceImageKV([(2, 1)], other), Patch("residual", 2, source, "image")),
        (ReplaceImageKV([(1, 1)], means), ReplaceImageKV([(1, 2)], other, "question"), KnockOut("last", "bos", (1,))),
    ]


@pytest.fixture(scope="module")
def one_prompt():
    """Items with one prompt, so that activations fit."""
    return [make_items(6)[number] for number in (1, 2, 4)]


def alone(subject, item, plan):
    batch = subject.encode_items([item])
    return intervened(subject, batch, plan, items=[item_number(item)])[0, -1]


def test_mixed_rows_of_the_engine_equal_each_alone(any_subject, one_prompt):
    plans = every_kind(any_subject, one_prompt)
    encoded = encode_items(any_subject, one_prompt)
    rows = [(index, plan) for index in range(3) for plan in range(len(plans))]
    np.random.default_rng(0).shuffle(rows)
    trunk = np.array([index for index, _ in rows])
    wanted = (np.arange(len(rows)), np.array([len(encoded[index]) - 1 for index in trunk]))
    numbers = [item_number(item) for item in one_prompt]
    hidden, run = forward_rows(any_subject, encoded, trunk, [plans[plan] for _, plan in rows], numbers, wanted)
    seen = read_logits(any_subject, hidden)
    plain = {index: alone(any_subject, one_prompt[index], None) for index in range(3)}
    for row, (index, plan) in enumerate(rows):
        expected = alone(any_subject, one_prompt[index], plans[plan])
        torch.testing.assert_close(seen[row], expected, rtol=1e-4, atol=3e-4, msg=lambda text, plan=plan: f"{plans[plan]}: {text}")
        # The last item is the source itself.
        assert plans[plan] is None or index == 2 or (seen[row] - plain[index]).abs().max() > 1e-4, plans[plan]


def test_named_groups_follow_rows_that_branch_and_get_shorter(any_subject, items):
    """Two prompts, each with its own groups; rows branch at three layers."""
    encoded = encode_items(any_subject, items[:2])
    named = [{"object": torch.from_numpy(np.arange(len(one)) % (number + 3) == 0)} for number, one in enumerate(encoded)]
    plans = [
        None, ZeroHeads([(1, 1)], "object"), Steer(2, normal(32), positions="object"),
        (DropTokens(1, 0.5, tokens="object"), Steer(2, normal(32), positions="object")),
        (MergeTokens(0, 0.5, tokens="object"), KnockOut("question", "object", (1,))), ReplaceTokens(GaussianNoise(1.0), "object"),
        ZeroHeads([(1, 1), (2, 0)], (-1, 3, -4)),
    ]  # fmt: skip
    trunk = np.arange(14) % 2
    wanted = (np.arange(14), np.array([len(encoded[index]) - 1 for index in trunk]))
    sequences = [replace(one, groups=groups) for one, groups in zip(encoded, named, strict=True)]
    numbers = [item_number(item) for item in items[:2]]
    hidden, _ = forward_rows(any_subject, sequences, trunk, [plans[row // 2] for row in range(14)], numbers, wanted)
    seen = read_logits(any_subject, hidden)
    for row in range(14):
        single = any_subject.encode_items([items[row % 2]])
        groups = {"object": named[row % 2]["object"][None]}
        expected = intervened(any_subject, single, plans[row // 2], items=numbers[row % 2 : row % 2 + 1], groups=groups)[0, -1]
        torch.testing.assert_close(seen[row], expected, rtol=1e-4, atol=2e-4)
        assert row < 2 or (seen[row] - seen[row % 2]).abs().max() > 1e-3


def test_half_precision_comes_close(items):
    """Sources in float32 go into a bfloat16 stream, sizes and noise into its masks."""
    some = [items[1], items[2]]
    exact, coarse = tiny_subject(kv_heads=2), tiny_subject(kv_heads=2)
    coarse.model.to(torch.bfloat16)
    plans = every_kind(exact, some)
    for plan in plans:
        if any(isinstance(part, DropTokens | MergeTokens) and getattr(part, "policy", "attention") == "attention" for part in parts(plan)):
            continue  # what is kept hangs on ties that rounding turns
        seen, expected = (alone(subject, some[0], plan).float() for subject in (coarse, exact))
        assert float(torch.nn.functional.cosine_similarity(seen, expected, dim=0)) > 0.99, plan
    with coarse.intervene(MergeTokens(1, 0.5), coarse.encode_items(some[:1])) as run:
        assert logits(coarse, coarse.encode_items(some[:1])).dtype == torch.bfloat16
        assert run.tokens.image.sum() == 8


def test_mixed_prompts_equal_each_alone(any_subject, items):
    """A different intervention per prompt, prompts of two lengths."""
    lasting = [plan for plan in every_kind(any_subject, [items[1], items[0]]) if not _needs_equal_prompts(plan)]
    numbers = list(range(4))
    batch = any_subject.encode_items(items)
    for start in range(0, len(lasting), 4):
        plans = (lasting[start : start + 4] + [None] * 4)[:4]
        with any_subject.intervene(plans, batch, items=numbers) as run:
            together = logits(any_subject, batch)
        for row, plan in enumerate(plans):
            single = any_subject.encode_items([items[row]])
            expected = intervened(any_subject, single, plan, items=[row])[0, -1]
            torch.testing.assert_close(together[row, int(run.tokens.last[row])], expected, rtol=1e-4, atol=3e-4)


def _needs_equal_prompts(plan):
    # Keys are rotated to their places; "text" and "all" of two prompts have different sizes.
    parts = plan if isinstance(plan, tuple) else (plan,)
    rotated = [part for part in parts if isinstance(part, ReplaceImageKV) and isinstance(part.means, ImageKV)]
    return bool(rotated) or any(isinstance(part, Patch) and part.positions in ("text", "all") for part in parts)


def test_what_touches_says_is_where_things_change(subject, one_prompt):
    n = subject.anatomy.n_layers
    item = one_prompt[0]
    batch = subject.encode_items([item])
    after = int(batch.image[0].nonzero()[-1]) + 1
    plain = [read_site(subject, batch, "residual", layer) for layer in range(n + 1)]
    for plan in every_kind(subject, one_prompt):
        touch = touches(plan, n)
        with subject.intervene(plan, batch, items=[item_number(item)]) as run:
            streams = [read_site(subject, batch, "residual", layer) for layer in range(n + 1)]
        if plan is None:
            assert touch == (n, "question")
            continue
        for layer in range(touch.layer):
            assert torch.equal(streams[layer], plain[layer]), (plan, layer)
        changed = streams[-1].shape != plain[-1].shape or (streams[-1] - plain[-1]).abs().max() > 1e-4
        assert changed, plan
        if touch.scope == "question":
            for layer in range(n + 1):
                gap = (streams[layer][:, :after] - plain[layer][:, :after]).abs().max()
                assert gap < 1e-5, (plan, layer, gap)
        assert run.program.touch[0] == touch


def test_a_scope_of_all_is_not_given_away(subject, one_prompt):
    """Plans that reach the prompt's image or preamble say so."""
    means = ImageKVMeans(normal(3, 4, 8), normal(3, 4, 8))
    batch = subject.encode_items(one_prompt[:1])
    after = int(batch.image[0].nonzero()[-1]) + 1
    plain = read_site(subject, batch, "residual", 3)
    for plan in (
        ZeroHeads([(0, 0)], "text"), ZeroHeads([(0, 0)], (2,)), ReplaceImageKV([(0, 0)], means), ReplaceImageKV([(0, 0)], means, "image"),
        KnockOut("image", "image", (0,)), Steer(0, normal(32), positions="bos"), ReplaceTokens(Vector(normal(32))),
    ):
        assert touches(plan, 3).scope == "all"
        with subject.intervene(plan, batch):
            assert (read_site(subject, batch, "residual", 3) - plain)[:, :after].abs().max() > 1e-4, plan
    assert touches(ReplaceImageKV([(0, 0)], means, "text"), 3) == (0, "question")
    assert touches(ReplaceImageKV([(0, 0)], means, "text"), 3, contiguous=False) == (0, "all")
