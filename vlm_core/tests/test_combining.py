"""Interventions together: order, generation, positions that stay, threads, errors, JSON, and refusals in one sentence."""

from __future__ import annotations

import itertools
import json
import threading

import pytest
import torch
from transformers import StaticCache

from vlm_core import (
    Activations,
    AttentionEntropy,
    AttentionMass,
    Batch,
    DropTokens,
    FullAttention,
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
    Subject,
    Vector,
    ZeroHeads,
    capture_activations,
    capture_embeddings,
    capture_image_kv,
)
from vlm_core.interventions.stored import from_dict, load_interventions, save_interventions, tensors_of, to_dict
from vlm_core.seam.plan import Program
from vlm_core.seam.seam import current_run
from vlm_core.tests.family_models import BUILDERS, IMAGE_TOKEN
from vlm_core.tests.oracles import decode_again, hooked, logits, members, read_site
from vlm_core.tests.tiny import make_items, normal, tiny_subject
from vlm_core.tests.warm import run


@pytest.fixture(scope="module")
def items():
    return make_items(4)


@pytest.fixture(scope="module")
def batch(subject, items):
    return subject.encode_items(items)


@pytest.fixture(scope="module")
def source(subject, items):
    return capture_activations(subject, items[1], ("residual", "attention", "mlp", "head"), range(3))


def intervened(subject, batch, plan, **options):
    with subject.intervene(plan, batch, **options):
        return logits(subject, batch)


# -- order ----------------------------------------------------------------------------------------------------------


def test_the_place_in_a_tuple_does_not_matter_between_kinds(subject, items, source):
    batch = subject.encode_items(items[1:2])
    plan = (
        Steer(1, normal(32)),
        Patch("residual", 1, source, "image"),
        ZeroHeads([(1, 1)]),
        MeanHeads([(1, 1), (1, 2)], HeadMeans(normal(3, 4, 8))),
        MergeTokens(1, 0.5),
        ReplaceTokens(Vector(normal(32, seed=1)), (5,)),
    )
    expected = intervened(subject, batch, plan)
    for order in itertools.islice(itertools.permutations(plan), 0, 720, 97):
        assert torch.equal(intervened(subject, batch, order), expected)


def test_zero_comes_after_means_and_a_direction_after_a_patch(subject, items, source):
    batch = subject.encode_items(items[1:2])
    zero, mean = ZeroHeads([(1, 1)]), MeanHeads([(1, 1)], HeadMeans(normal(3, 4, 8)))
    assert torch.equal(intervened(subject, batch, (zero, mean)), intervened(subject, batch, zero))
    resample, redirect = ResampleHeads([(1, 1)], source), RedirectHeads([(1, 1)], HeadDirections(normal(3, 4, 8)))
    assert torch.equal(intervened(subject, batch, (resample, mean)), intervened(subject, batch, resample))
    assert torch.equal(intervened(subject, batch, (resample, redirect)), intervened(subject, batch, resample))
    length = mean.means.values.norm(dim=-1, keepdim=True)
    turned = MeanHeads([(1, 1)], HeadMeans(redirect.directions.values * length))
    torch.testing.assert_close(intervened(subject, batch, (redirect, mean)), intervened(subject, batch, turned), rtol=1e-4, atol=1e-4)
    direction = normal(32)
    shifted = Activations({("residual", 1): source.at("residual", 1) + direction}, source.image)
    both = (Steer(1, direction), Patch("residual", 1, source))
    torch.testing.assert_close(
        intervened(subject, batch, both), intervened(subject, batch, Patch("residual", 1, shifted)), rtol=1e-4, atol=1e-4
    )


def test_of_two_patches_the_later_holds_and_directions_add_up(subject, items, source):
    batch = subject.encode_items(items[2:3])
    other = capture_activations(subject, items[2], "residual", 1, intervention=ReplaceTokens(GaussianNoise(1.0)))
    first, second = Patch("residual", 1, source, "image"), Patch("residual", 1, other, "image")
    assert torch.equal(intervened(subject, batch, (first, second)), intervened(subject, batch, second))
    assert torch.equal(intervened(subject, batch, (second, first)), intervened(subject, batch, first))
    one, two = Steer(1, normal(32)), Steer(1, normal(32, seed=1), 2.0)
    joined = Steer(1, normal(32) + 2.0 * normal(32, seed=1))
    torch.testing.assert_close(intervened(subject, batch, (one, two)), intervened(subject, batch, joined), rtol=1e-4, atol=1e-4)


def test_means_of_different_heads_combine(subject, batch):
    one, two = HeadMeans(normal(3, 4, 8)), HeadMeans(normal(3, 4, 8, seed=1))
    values = one.values.clone()
    values[2, 3] = two.values[2, 3]
    apart = (MeanHeads([(1, 1)], one), MeanHeads([(2, 3)], two))
    assert torch.equal(
        intervened(subject, batch, apart), intervened(subject, batch, MeanHeads([(1, 1), (2, 3)], HeadMeans(values)))
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: (MeanHeads([(1, 1)], HeadMeans(normal(3, 4, 8))), MeanHeads([(1, 1)], HeadMeans(normal(3, 4, 8, seed=1)), "last")),
         r"gives a head at most one MeanHeads: L1\.H1"),
        (lambda: (RedirectHeads([(1, 1)], HeadDirections(normal(3, 4, 8))), RedirectHeads([(1, 1)], HeadDirections(normal(3, 4, 8, seed=1)))),
         r"gives a head at most one RedirectHeads: L1\.H1"),
        (lambda: (DropTokens(1, 0.5), MergeTokens(1, 0.2)), "at most once per layer"),
        (lambda: Steer(4, normal(32)), "outside this model's 3 layers"),
        (lambda: Steer(-1, normal(32)), "outside this model's 3 layers"),
        (lambda: Steer(1, normal(31)), r"brings vectors of shape \(31,\), this model has \(32,\)"),
        (lambda: MergeTokens(3, 0.5), "outside this model's 3 layers"),
        (lambda: KnockOut("text", "image", (1,), (4,)), "outside this model's 3 layers x 4 heads"),
        (lambda: Patch("mlp", 3, GaussianNoise(1.0)), "outside this model's 3 layers"),
        (lambda: Patch("head", (), GaussianNoise(1.0), heads=((1, 4),)), "outside this model's 3 layers x 4 heads"),
        (lambda: ZeroHeads([(1, -1)]), "outside this model's 3 layers x 4 heads"),
        (lambda: ZeroHeads([(1, 0)], (2, 28)), "position 28 lies outside the prompt of 28 tokens"),
        (lambda: Steer(1, normal(32), positions=(-29,)), "position -29 lies outside the prompt of 28 tokens"),
        (lambda: KnockOut("object", "image", (1,)), "no token group 'object'"),
        (lambda: DropTokens(1, 0.5, tokens="object"), "no token group 'object'"),
        (lambda: ReplaceImageKV([(1, 0)], ImageKV(normal(3, 4, 9, 8), normal(3, 4, 9, 8))),
         "of 9 image tokens cannot replace those of a prompt with 17"),
        (lambda: ReplaceImageKV([(1, 0)], ImageKVMeans(normal(2, 4, 8), normal(2, 4, 8))), "do not fit this model"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence_before_the_model_runs(subject, items, plan, message):
    batch = subject.encode_items(items[1:2])
    with pytest.raises(ValueError, match=message) as error, subject.intervene(plan(), batch):
        pytest.fail("it was accepted")
    assert "\n" not in str(error.value)
    assert current_run() is None


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda source: Patch("resid", 1, source), "'resid' is not a site: choose from residual, attention, mlp, head"),
        (lambda source: Patch("residual", 3, source), "no activations of site 'residual' at layer 3 were captured"),
        (lambda source: Patch("mlp", 1, source, heads=((1, 0),)), "heads can be patched at the site 'head' only"),
        (lambda source: Patch("head", (1, 2), source, heads=((1, 0),)), "the heads lie in layers 1, not in 1,2"),
        (lambda source: Patch("mlp", 1, normal(32)), "must be Activations or GaussianNoise, got Tensor"),
        (lambda source: ResampleHeads([(0, 0)], GaussianNoise(1.0)), "must be Activations, got GaussianNoise"),
        (lambda source: MeanHeads([(0, 0)], source), "must be HeadMeans, got Activations"),
        (lambda source: ReplaceTokens(3.0), "must be Vector or Activations or GaussianNoise, got float"),
        (lambda source: Steer(1, normal(2, 32)), r"one vector \[hidden\], got a tensor of shape \(2, 32\)"),
        (lambda source: ZeroHeads([(0, 0)], ()), "must be a group name or at least one position"),
        (lambda source: MergeTokens(1, 0.0), "merging leaves at least one token"),
        (lambda source: MergeTokens(0, 0.5, "keys"), "needs a layer before the merge"),
        (lambda source: MergeTokens(1, 0.5, "values"), "similarity must be one of hidden, keys"),
        (lambda source: GaussianNoise(-1.0), "scale must be 0 or more"),
        (lambda source: Activations({("mlp", 0): normal(4, 8)}, torch.ones(5, dtype=torch.bool)), "have 4 tokens, the prompt has 5"),
    ],
)
def test_declarations_refuse_what_they_cannot_mean(source, declare, message):
    with pytest.raises(ValueError, match=message):
        declare(source)


def test_activations_of_a_longer_prompt_are_refused(subject, items):
    short, long = items[1], items[0]
    plan = Patch("residual", 1, capture_activations(subject, long, "residual", 1))
    with pytest.raises(ValueError, match=r"replaces 28 tokens \('all'\) by 30"), subject.intervene(plan, subject.encode_items([short])):
        pass
    with pytest.raises(ValueError, match="captured from whole sequences"):
        capture_activations(subject, short, "residual", 2, intervention=DropTokens(1, 0.5))
    with pytest.raises(ValueError, match="site 'mlp' has layers 0 to 2"):
        capture_activations(subject, short, "mlp", 3)


def test_groups_of_another_shape_are_refused(subject, batch):
    with pytest.raises(ValueError, match=r"token group 'object' is torch.bool of shape \(2, 2\), the batch is \(4, 30\)"):
        intervened(subject, batch, None, groups={"object": torch.ones(2, 2, dtype=torch.bool)})


def test_a_family_without_image_tokens_in_its_sequence_says_what_it_lacks():
    model, inputs = BUILDERS["mllama"]()
    subject = Subject(model, name="mllama")
    image = inputs["input_ids"] == IMAGE_TOKEN
    batch = Batch(inputs, image, torch.ones_like(image))
    for plan, word in ((MergeTokens(1, 0.5), "merge"), (DropTokens(1, 0.5), "drop"), (ReplaceTokens(GaussianNoise(1.0)), "replace_tokens")):
        with pytest.raises(ValueError, match=f"lacks '{word}'"), subject.intervene(plan, batch):
            pass


@pytest.mark.parametrize("plan", [DropTokens(0, 0.5), MergeTokens(0, 0.5)])
def test_features_that_are_added_again_need_the_whole_sequence(plan):
    model, inputs = BUILDERS["qwen3_vl"]()
    subject = Subject(model, name="qwen3_vl")
    image = inputs["input_ids"] == IMAGE_TOKEN
    with subject.intervene(plan, Batch(inputs, image, torch.ones_like(image))), pytest.raises(ValueError, match="from layer 1 on"):
        model(**inputs)


# -- restricted to positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["image", "question", (0, 7, -1)])
def test_other_positions_are_bit_identical_at_the_layer(subject, batch, items, positions):
    chosen = members(batch, positions)
    direction, means = normal(32), HeadMeans(normal(3, 4, 8))
    plans = {  # fmt: skip
        ("head", 1): [
            ZeroHeads([(1, 0)], positions), MeanHeads([(1, 2)], means, positions),
            RedirectHeads([(1, 3)], HeadDirections(means.values), positions), Patch("head", 1, GaussianNoise(1.0), positions),
        ],
        ("residual", 1): [Steer(1, direction, positions=positions), Patch("residual", 1, GaussianNoise(1.0), positions)],
        ("attention", 1): [Patch("attention", 1, GaussianNoise(1.0), positions)],
        ("mlp", 1): [Patch("mlp", 1, GaussianNoise(1.0), positions)],
        ("residual", 0): [ReplaceTokens(Vector(direction), positions)],
    }
    for (site, layer), ways in plans.items():
        plain = read_site(subject, batch, site, layer)
        for plan in ways:
            with subject.intervene(plan, batch):
                seen = read_site(subject, batch, site, layer)
            assert torch.equal(seen[~chosen], plain[~chosen]), plan
            assert bool((seen != plain)[chosen].flatten(1).any(1).all()), plan


# -- generation -----------------------------------------------------------------------------------------------------


def plans_that_last(subject, items):
    """Plans whose positions mean the same however many tokens were generated."""
    source = capture_activations(subject, items[1], ("residual", "attention", "mlp", "head"), range(3))
    direction = 0.5 * normal(32)
    return {
        "patch": Patch("residual", 1, source, "image"),
        "patch sites": (Patch("attention", 1, source, "image"), Patch("mlp", 0, source, (0, 6))),
        "patch heads": Patch("head", (), source, "image", heads=((1, 2), (2, 0))),
        "resample": ResampleHeads([(0, 0), (1, 3)], source, "image"),
        "noise": Patch("residual", 1, GaussianNoise(0.8), "image"),
        "tokens": ReplaceTokens(Vector(direction), "image"),
        "embeddings": ReplaceTokens(capture_embeddings(subject, items[1])),
        "noisy tokens": (ReplaceTokens(GaussianNoise(1.0)), ZeroHeads([(1, 1)])),
        "steer": Steer(1, direction),
        "steer one": Steer(1, direction, positions=(5, 27)),
        "steer question": (Steer(2, direction, positions="question"), Steer(3, direction)),
        "zero question": ZeroHeads([(0, 1), (2, 2)], "question"),
        "mean text": MeanHeads([(1, 1)], HeadMeans(normal(3, 4, 8)), "text"),
        "redirect": RedirectHeads([(1, 1), (2, 0)], HeadDirections(normal(3, 4, 8)), "text"),
        "image kv question": ReplaceImageKV([(0, 1), (1, 2)], ImageKVMeans(normal(3, 4, 8), normal(3, 4, 8, seed=1)), "question"),
        "other image": ReplaceImageKV([(0, 1), (1, 2)], capture_image_kv(subject, items[1]), "all"),
        "knock out": KnockOut("question", "image", (1, 2), (0, 3)),
        "object": KnockOut("question", "object", (0, 1, 2)),
        "merge": MergeTokens(1, 0.4),
        "merge keys": MergeTokens(2, 0.3, "keys", proportional=False),
        "merge at 0": MergeTokens(0, 0.2),
        "merge, drop, steer": (MergeTokens(1, 0.5), DropTokens(2, 0.3), Steer(2, direction, positions="text")),
        "drop all, steer": (DropTokens(1, 0.0), Steer(2, direction, positions="question"), ZeroHeads([(2, 1)], "preamble")),
        "drop, kv": (
            DropTokens(1, 0.5, tokens="object"), ReplaceImageKV([(2, 1)], ImageKVMeans(normal(3, 4, 8), normal(3, 4, 8)), "question"),
        ),
    }


def objects(batch):
    """Every third image token."""
    return {"object": batch.image & (batch.image.long().cumsum(1) % 3 == 0)}


LASTING = (
    "patch", "patch sites", "patch heads", "resample", "noise", "tokens", "embeddings", "noisy tokens", "steer", "steer one",
    "steer question",
    "zero question", "mean text", "image kv question", "other image", "knock out", "object", "merge", "merge keys", "merge at 0",
    "merge, drop, steer", "drop all, steer", "drop, kv",
)  # fmt: skip


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject", "eager_subject"])
@pytest.mark.parametrize("kind", LASTING)
def test_generating_equals_running_the_whole_sequence_again(request, fixture, kind, items):
    subject = request.getfixturevalue(fixture)
    plan = plans_that_last(subject, items)[kind]
    # Activations fit prompts of one length; those of another length are left to the other kinds.
    some = [items[1], items[2]] if kind in ("embeddings", "other image") else items
    batch = subject.encode_items(some)
    steps = 5
    options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "suppress_tokens": [subject.anatomy.image_token_id]}
    with torch.inference_mode():
        with subject.intervene(plan, batch, items=range(len(some)), groups=objects(batch)):
            tokens = subject.model.generate(**batch.inputs, **options)
    assert tokens[:, -steps:].tolist() == decode_again(subject, some, plan, steps, groups=objects)


def family_decoded_again(subject, inputs, plan, steps):
    """Step-by-step greedy decoding of a family's ready-made inputs."""
    ids, outputs = inputs["input_ids"], []
    for _ in range(steps):
        extra = ids.shape[1] - inputs["input_ids"].shape[1]
        causal = {"attention_mask": 1, "mm_token_type_ids": 0, **dict(subject.anatomy.family.token_types)}
        longer = {**inputs, "input_ids": ids}
        for name, value in causal.items():
            if name in longer:
                longer[name] = torch.nn.functional.pad(inputs[name], (0, extra), value=value)
        image = ids == IMAGE_TOKEN
        with subject.intervene(plan, Batch(longer, image, torch.ones_like(image))), torch.inference_mode():
            scores = subject.model(**longer, use_cache=False).logits[0, -1]
        outputs.append(scores)
        scores = scores.clone()
        scores[IMAGE_TOKEN : IMAGE_TOKEN + 4] = -torch.inf
        ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
    return torch.stack(outputs)


SHORTER = {
    "drop at 0": DropTokens(0, 0.5),
    "drop": DropTokens(2, 0.5, "stride"),
    "merge": MergeTokens(1, 0.5),
    "zero": ZeroHeads([(0, 1), (2, 2)], "text"),
    "steer": Steer(2, 0.3 * normal(32)),
}


@pytest.mark.parametrize("name", ["gemma3", "paligemma2", "aya_vision", "qwen2_vl", "smolvlm"])
@pytest.mark.parametrize("kind", SHORTER)
def test_generating_through_sliding_windows_and_three_axes_of_positions(name, kind):
    """Gemma 3's window of 12 is shorter than the prompt: its caches slide, over tokens whose positions have gaps."""
    model, inputs = BUILDERS[name]()
    subject, plan, steps = Subject(model, name=name), SHORTER[kind], 6
    image = inputs["input_ids"] == IMAGE_TOKEN
    batch = Batch(inputs, image, torch.ones_like(image))
    options = {
        "max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "suppress_tokens": list(range(IMAGE_TOKEN, 64)), "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with torch.inference_mode(), subject.intervene(plan, batch):
        seen = torch.stack(model.generate(**inputs, **options).logits)[:, 0]
    expected = family_decoded_again(subject, inputs, plan, steps)
    torch.testing.assert_close(seen.float(), expected.float(), rtol=1e-3, atol=2e-3)


def generated(subject, batch, plan, observers=(), **options):
    """Logits of four steps and, of the prompt, what the observers saw in every layer."""
    options = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": list(range(IMAGE_TOKEN, 64)),
        "output_logits": True, "return_dict_in_generate": True, **options,
    }  # fmt: skip
    with torch.inference_mode(), subject.intervene(plan, batch, observers=observers) as run:
        logits = torch.stack(subject.model.generate(**batch.inputs, **options).logits)
    return [logits, *(run.record(number, layer) for number in range(len(observers)) for layer in range(subject.anatomy.n_layers))]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("n", [1, 4])
def test_static_caches_are_read_as_far_as_they_are_written(items, plans_by_attention, attention, n):
    subject, plans = plans_by_attention[attention]
    batch, observers = subject.encode_items(items[:n]), [AttentionMass("text"), AttentionEntropy(), FullAttention()]
    plain = generated(subject, batch, None)[0]
    for name, plan in plans.items():
        expected = generated(subject, batch, plan, observers)
        found = generated(subject, batch, plan, observers, cache_implementation="static")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
        assert name == "none" or not torch.allclose(found[0], plain, atol=1e-3), f"{name} does nothing"


@pytest.fixture(scope="module")
def plans_by_attention(items):
    found = {}
    for attention in ("sdpa", "eager"):
        subject = tiny_subject(attention=attention)
        source = capture_activations(subject, items[1], ("head",), range(3))
        means = ImageKVMeans(normal(3, 4, 8), normal(3, 4, 8, seed=1))
        found[attention] = subject, {
            "none": None,
            "zero": ZeroHeads([(0, 1), (2, 2)], "text"),
            "knock-out": KnockOut("last", "image", (0, 1)),
            "knock-out of heads": KnockOut("text", "image", (1,), heads=(0, 2)),
            "image KV": ReplaceImageKV([(1, 0), (2, 3)], means),
            "image KV of some queries": ReplaceImageKV([(1, 0), (2, 3)], means, queries="question"),
            "heads of another run": ResampleHeads([(1, 2)], source, "last"),
        }
    return found


@pytest.mark.parametrize("plan", [ZeroHeads([(0, 1), (1, 0)], "text"), KnockOut("text", "image", (0, 1)), None])
def test_static_caches_that_slide(plan):
    """Gemma 3's window of 12 is shorter than the prompt."""
    model, inputs = BUILDERS["gemma3"]()
    subject, image = Subject(model, name="gemma3"), inputs["input_ids"] == IMAGE_TOKEN
    batch, observers = Batch(inputs, image, torch.ones_like(image)), [AttentionMass()]
    found = generated(subject, batch, plan, observers, cache_implementation="static")
    torch.testing.assert_close(found, generated(subject, batch, plan, observers), rtol=1e-4, atol=2e-4)


def test_a_static_cache_at_hand_serves_a_single_pass(subject, items):
    batch, plan = subject.encode_items(items[1:2]), ZeroHeads([(1, 1)])
    cache = StaticCache(config=subject.model.config.get_text_config(), max_cache_len=64)
    with torch.inference_mode(), subject.intervene(plan, batch, observers=[AttentionMass()]) as run:
        found = subject.model(**batch.inputs, past_key_values=cache).logits, run.record(0, 1)
        cached = run.record(0, 2)
        torch.testing.assert_close(found, (subject.model(**batch.inputs).logits, run.record(0, 1)), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(cached, run.record(0, 2))


def test_static_caches_of_shorter_sequences_and_foreign_caches_are_refused(subject, items):
    batch = subject.encode_items(items[1:2])
    for plan in (DropTokens(1, 0.5), MergeTokens(1, 0.5)):
        with pytest.raises(ValueError, match="cannot shorten what a static cache holds"):
            generated(subject, batch, plan, cache_implementation="static")
    with torch.inference_mode():
        cache = subject.model(**batch.inputs, use_cache=True).past_key_values
        more = {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
        with subject.intervene(ZeroHeads([(0, 0)]), batch), pytest.raises(ValueError, match="a past which this run did not see"):
            subject.model(**more)


# -- threads and errors ---------------------------------------------------------------------------------------------


def test_plans_of_every_kind_in_threads(subject, items):
    batch = subject.encode_items(items)
    plans = plans_that_last(subject, items)
    chosen = {name: plans[name] for name in ("patch", "steer", "merge", "zero question", "noisy tokens")}
    expected = {name: intervened(subject, batch, plan, items=range(4)) for name, plan in chosen.items()}
    seen, together = {}, threading.Barrier(len(chosen))

    def work(name):
        with subject.intervene(chosen[name], batch, items=range(4)):
            together.wait(10)
            seen[name] = [logits(subject, batch) for _ in range(3)]
            together.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in chosen:
        assert all(torch.equal(one, expected[name]) for one in seen[name]), name


def test_an_error_inside_the_pass_leaves_nothing_behind(subject, batch, source):
    plain = logits(subject, batch)
    plan = (Steer(0, normal(32)), MergeTokens(1, 0.5), Patch("mlp", 0, GaussianNoise(1.0)))
    intervened(subject, batch, plan)
    # The hooks that such a run hears by stay for the next one.
    before = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in subject.model.modules()]

    def fail(output):
        raise RuntimeError("broken in layer 1")

    with pytest.raises(RuntimeError, match="broken in layer 1"), hooked((subject.anatomy.mlps[1], "post", fail)):
        intervened(subject, batch, plan)
    assert current_run() is None
    assert torch.equal(logits(subject, batch), plain)
    assert before == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in subject.model.modules()]
    first = intervened(subject, batch, plan)
    assert torch.equal(intervened(subject, batch, plan), first)


def test_one_context_serves_many_passes(subject, batch):
    with subject.intervene(MergeTokens(1, 0.5), batch):
        first = logits(subject, batch)
        assert torch.equal(logits(subject, batch), first)


# -- JSON, equality, hashes -----------------------------------------------------------------------------------------


def every_declaration(subject, items):
    named = {"object": objects(subject.encode_items([items[1]]))["object"][0]}
    source = capture_activations(subject, items[1], ("residual", "head"), (0, 1), groups=named)
    return {
        "nothing": None,
        "empty": (),
        "zero": ZeroHeads([(1, 2), (0, 0)], (3, -1)),
        "mean": MeanHeads([(1, 1)], HeadMeans(normal(3, 4, 8), 7), "text"),
        "redirect": RedirectHeads([(1, 1)], HeadDirections(normal(3, 4, 8, seed=2)), "text"),
        "resample": ResampleHeads([(1, 1)], source, "object"),
        "image kv": ReplaceImageKV([(1, 1)], ImageKVMeans(normal(3, 4, 8), normal(3, 4, 8, seed=1), 5), "question"),
        "other image": ReplaceImageKV([(1, 1)], ImageKV(normal(3, 4, 2, 8), normal(3, 4, 2, 8))),
        "knock out": KnockOut("object", (1, 2), (0, 2), (1,)),
        "patch": Patch("residual", (0, 1), source, "image"),
        "patch heads": Patch("head", (), GaussianNoise(0.25, 9), heads=((0, 1),)),
        "steer": Steer(2, normal(32), -0.5, "last"),
        "tokens": ReplaceTokens(Vector(normal(32)), (4,)),
        "noise": ReplaceTokens(GaussianNoise(3.0)),
        "tuple": (DropTokens(1, 0.25, "stride", tokens="object"), MergeTokens(2, 0.1, "keys", False), ZeroHeads([(0, 0)])),
    }


def test_json_and_back_is_the_same(subject, items, batch, tmp_path):
    rows = every_declaration(subject, items)
    save_interventions(tmp_path / "plans.json", rows)
    again = load_interventions(tmp_path / "plans.json")
    assert again == rows
    assert {name: hash(row) for name, row in again.items()} == {name: hash(row) for name, row in rows.items()}
    assert list(again) == list(rows)
    assert (again["mean"].means.count, again["image kv"].means.count) == (7, 5)
    named = objects(batch)
    for name in ("mean", "redirect", "image kv", "patch", "steer", "tokens", "tuple"):
        assert torch.equal(intervened(subject, batch, again[name], groups=named), intervened(subject, batch, rows[name], groups=named))
    save_interventions(tmp_path / "one.json", rows["zero"])
    assert load_interventions(tmp_path / "one.json") == rows["zero"]
    assert not (tmp_path / "one.safetensors").exists()
    for name, row in rows.items():
        assert from_dict(json.loads(json.dumps(to_dict(row))), tensors_of(row)) == row, name


def test_hashes_are_the_same_in_another_process(subject, items, tmp_path):
    rows = every_declaration(subject, items)
    save_interventions(tmp_path / "plans.json", rows)
    program = (
        "import sys; from vlm_core.interventions.stored import load_interventions\n"
        "for name, row in load_interventions(sys.argv[1]).items():\n"
        "    for part in row if isinstance(row, tuple) else (row,):\n"
        "        if part is not None: print(name, part.digest, hash(part))\n"
    )
    output = run(["-c", program, tmp_path / "plans.json"]).stdout.splitlines()
    parts = [(name, part) for name, row in rows.items() for part in (row if isinstance(row, tuple) else (row,)) if part is not None]
    assert output == [f"{name} {part.digest} {hash(part)}" for name, part in parts]


def test_equal_content_is_equal_and_any_difference_counts(subject, items):
    rows = [row for row in every_declaration(subject, items).values() if row not in (None, ())]
    again = [row for row in every_declaration(subject, items).values() if row not in (None, ())]
    assert rows == again
    assert len({*rows, *again}) == len(rows)
    base = KnockOut("text", "image", (1,))
    others = [
        KnockOut("question", "image", (1,)), KnockOut("text", "bos", (1,)), KnockOut("text", "image", (2,)),
        KnockOut("text", "image", (1,), (0,)),
    ]  # fmt: skip
    assert len({base, *others}) == 5
    changed = HeadMeans(normal(3, 4, 8))
    assert MeanHeads([(0, 0)], changed) != MeanHeads([(0, 0)], HeadMeans(normal(3, 4, 8, seed=1)))
    assert MeanHeads([(0, 0)], changed) == MeanHeads([(0, 0)], HeadMeans(normal(3, 4, 8)))


def test_stored_plans_that_do_not_fit_are_refused(tmp_path):
    row = MeanHeads([(0, 0)], HeadMeans(normal(3, 4, 8)))
    save_interventions(tmp_path / "plan.json", row)
    other = tensors_of(MeanHeads([(0, 0)], HeadMeans(normal(3, 4, 8, seed=1))))
    (name,) = [name for name in tensors_of(row) if name.endswith("values")]
    swapped = {**tensors_of(row), name: next(tensor for key, tensor in other.items() if key.endswith("values"))}
    with pytest.raises(ValueError, match="are not what they were"):
        from_dict(to_dict(row), swapped)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(ValueError, match=r"are missing: keep the \.safetensors file beside the JSON"):
        load_interventions(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="'Melt' is not an intervention"):
        from_dict({"kind": "Melt"})
    with pytest.raises(ValueError, match="has fields colour, heads, which it does not take"):
        from_dict({"kind": "ZeroHeads", "heads": [], "colour": "red"})


def test_labels_are_unique_and_unchanged_for_what_is_usual():
    means = HeadMeans(normal(3, 4, 8))
    assert ZeroHeads([(1, 2)]).describe() == "zero(L1.H2)"
    assert MeanHeads([(1, 2)], means).describe() == f"mean(L1.H2, {means.digest})"
    assert DropTokens(1, 0.5).describe() == "drop(layer 1, keep 0.5, random, seed 0)"
    assert KnockOut("text", "image", (0, 1)).describe() == "knockout(text->image, layers 0,1)"
    labels = [
        ZeroHeads([(1, 2)], "last"), ZeroHeads([(1, 2)], (1,)), KnockOut("text", "image", (0,), (1,)), DropTokens(1, 0.5, tokens="object"),
        MergeTokens(1, 0.5), MergeTokens(1, 0.5, proportional=False),
        Steer(1, normal(4)), Steer(1, normal(4), 2.0), Steer(1, normal(4, seed=1)),
        Patch("mlp", 1, GaussianNoise(1.0)), Patch("mlp", 1, GaussianNoise(2.0)), Patch("attention", 1, GaussianNoise(1.0)),
    ]  # fmt: skip
    assert len({part.describe() for part in labels}) == len(labels)


def test_programs_keep_what_is_unrestricted_apart():
    means = ImageKVMeans(normal(3, 4, 8), normal(3, 4, 8))
    zeros = (ZeroHeads([(2, 0)]), ZeroHeads([(2, 1)], "last"))
    rows = [ReplaceImageKV([(0, 1)], means), ReplaceImageKV([(1, 2)], means, "question"), zeros, None]
    program = Program.compile(rows, 3, 4)
    assert list(program.image_kv.mask) == [0]
    assert list(program.image_kv_at) == ["question"]
    assert program.image_kv_at["question"].mask[1].nonzero().tolist() == [[1, 2]]
    assert program.zero[2].nonzero().tolist() == [[2, 0]]
    assert program.zero_at["last"][2].nonzero().tolist() == [[2, 1]]
    assert program.first.tolist() == [0, 1, 2, 3]
    assert [touch.scope for touch in program.touch] == ["all", "question", "all", "question"]
