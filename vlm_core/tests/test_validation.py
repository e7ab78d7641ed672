"""What does not fit is refused in one sentence; what is a number in other clothes is taken as that number."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
import torch

from vlm_core import (
    At,
    AttentionEntropy,
    AttentionMass,
    DropTokens,
    GaussianNoise,
    HeadMeans,
    HiddenStates,
    ImageKV,
    ImageKVMeans,
    KnockOut,
    MaskIoU,
    MeanHeads,
    MergeTokens,
    Patch,
    ReplaceImageKV,
    ReplaceTokens,
    Steer,
    TopTokens,
    Vector,
    ZeroHeads,
    attention_map,
    observe,
    sweep,
)
from vlm_core.families.anatomy import HeadId
from vlm_core.interventions import Activations, Intervention, sources
from vlm_core.observation.lens import LogitLens
from vlm_core.observation.recording_config import KINDS
from vlm_core.tests.oracles import logits
from vlm_core.tests.tiny import make_items

DIRECTION = torch.arange(32.0)
NAN = torch.tensor([1.0, torch.nan])


def one_sentence(call, match, kind=ValueError):
    with pytest.raises(kind, match=match) as refused:
        call()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


@pytest.mark.parametrize("wrong", [1.5, 1.0, True, np.True_, "1", np.float64(1.0), torch.tensor(1.0), torch.tensor(True), None])
def test_layers_heads_and_positions_are_whole_numbers(wrong):
    one_sentence(lambda: Steer(wrong, DIRECTION), "layer of Steer must be an integer")
    one_sentence(lambda: DropTokens(wrong, 0.0), "layer must be an integer")
    one_sentence(lambda: MergeTokens(wrong, 0.5), "layer must be an integer")
    one_sentence(lambda: DropTokens(1, 0.5, seed=wrong), "seed must be an integer")
    one_sentence(lambda: ZeroHeads([(wrong, 0)]), "a head's layer must be an integer")
    one_sentence(lambda: ZeroHeads([(0, wrong)]), "a head's number must be an integer")
    one_sentence(lambda: KnockOut("last", "image", [wrong]), "each of layers must be an integer")
    one_sentence(lambda: KnockOut("last", "image", (1,), heads=(wrong,)), "each of heads must be an integer")
    one_sentence(lambda: KnockOut("last", (wrong,), (1,)), "each of keys must be an integer")
    one_sentence(lambda: Steer(1, DIRECTION, positions=(wrong,)), "each of positions must be an integer")
    one_sentence(lambda: Patch("mlp", [wrong], GaussianNoise(1.0)), "each of layers must be an integer")
    one_sentence(lambda: HiddenStates(layers=(wrong,)), "each of layers of HiddenStates must be an integer")
    one_sentence(lambda: HiddenStates(positions=(wrong,)), "each of positions of HiddenStates must be an integer")
    one_sentence(lambda: LogitLens(layers=(wrong,)), "each of layers of LogitLens must be an integer")
    one_sentence(lambda: At(AttentionMass(), heads=(wrong,)), "each of heads of At must be an integer")
    one_sentence(lambda: TopTokens(wrong), "k must be an integer")


def test_text_is_no_list_of_layers():
    one_sentence(lambda: KnockOut("last", "image", "12"), "layers must be one integer or several, got '12'")
    one_sentence(lambda: KnockOut("last", "image", None), "layers must be one integer or several, got None")
    one_sentence(lambda: At(AttentionMass(), layers="12"), "layers of At must be integers, got '12'")


@pytest.mark.parametrize("wrong", [3, None, "31", HeadId(1, 0)])
def test_heads_are_several_pairs(wrong):
    one_sentence(lambda: ZeroHeads(wrong), r"heads must be several \(layer, head\) pairs, got")


@pytest.mark.parametrize("wrong", [3, "31", (1, 2, 3), None])
def test_a_head_is_a_pair(wrong):
    one_sentence(lambda: ZeroHeads([wrong]), r"heads must be \(layer, head\) pairs, got .* among them")


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16, torch.tensor])
def test_integers_of_other_libraries_are_integers(kind):
    assert DropTokens(kind(1), 0.5, seed=kind(3)) == DropTokens(1, 0.5, seed=3)
    assert MergeTokens(kind(1), np.float32(0.5), proportional=np.True_) == MergeTokens(1, 0.5)
    assert Steer(kind(1), DIRECTION, positions=kind(2)) == Steer(1, DIRECTION, positions=(2,))
    assert KnockOut("last", "image", kind(2)) == KnockOut("last", "image", (2,))
    assert ZeroHeads([(kind(1), kind(2))]) == ZeroHeads([(1, 2)])
    assert ZeroHeads(np.array([[1, 2], [0, 3]])) == ZeroHeads([(1, 2), (0, 3)])
    assert type(DropTokens(kind(1), 0.5).layer) is int
    assert HiddenStates(layers=(kind(1),)) == HiddenStates(layers=(1,)) == HiddenStates(layers=kind(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    mean, kv, vector = torch.zeros(3, 4, 8), torch.zeros(3, 4, 2, 8), torch.zeros(8)
    for tensor in (mean, kv, vector):
        tensor.view(-1)[3] = bad
    one_sentence(lambda: HeadMeans(mean), "values of HeadMeans must be finite, got NaN or infinity in 1 of 96")
    one_sentence(lambda: ImageKVMeans(mean, torch.zeros(3, 4, 8)), "keys of ImageKVMeans must be finite")
    one_sentence(lambda: ImageKVMeans(torch.zeros(3, 4, 8), mean), "values of ImageKVMeans must be finite")
    one_sentence(lambda: ImageKV(kv, torch.zeros(3, 4, 2, 8)), "keys of ImageKV must be finite")
    one_sentence(lambda: ImageKV(torch.zeros(3, 4, 2, 8), kv), "values of ImageKV must be finite")
    one_sentence(lambda: Vector(vector), "values of Vector must be finite")
    one_sentence(lambda: Steer(1, vector), "values of Vector must be finite")
    one_sentence(lambda: ReplaceTokens(vector), "values of Vector must be finite")
    one_sentence(
        lambda: Activations({("mlp", 2): mean[0]}, torch.ones(4, dtype=torch.bool)), "activations of site 'mlp' at layer 2 must be finite"
    )
    one_sentence(lambda: Steer(1, DIRECTION, scale=bad), "scale of Steer must be finite")
    one_sentence(lambda: GaussianNoise(bad), "scale of GaussianNoise must be finite")
    one_sentence(lambda: DropTokens(1, bad), "keep must be finite")


def test_numbers_that_are_none_are_refused():
    one_sentence(lambda: GaussianNoise(1.0, seed=-1), "seed of GaussianNoise must be 0 or more, got -1")
    one_sentence(lambda: GaussianNoise(1.0, seed=1.5), "seed of GaussianNoise must be an integer")
    one_sentence(lambda: GaussianNoise("1"), "scale of GaussianNoise must be a number")
    one_sentence(lambda: DropTokens(1, 0.5, seed=-1), "seed must be 0 or more, got -1")
    one_sentence(lambda: DropTokens(1, "0.5"), "keep must be a number")
    one_sentence(lambda: Steer(1, DIRECTION, scale=True), "scale of Steer must be a number")
    one_sentence(lambda: Steer(1, "up"), "a direction must be a Vector or a tensor")
    one_sentence(lambda: MergeTokens(1, 0.5, proportional="no"), "proportional must be True or False")
    assert GaussianNoise(np.float64(0.5), np.int64(2)) == GaussianNoise(0.5, 2)


BOOLEANS = [
    (make, entry.name)
    for make, kind in (
        *((kind, kind) for kind in KINDS.values()),
        (lambda **options: MergeTokens(1, 0.5, **options), MergeTokens),
    )
    for entry in fields(kind)
    if entry.type == "bool"
]


@pytest.mark.parametrize("wrong", [1, 0, "no", None, 0.0, (), torch.tensor(True)])
def test_truth_values_are_bools(wrong):
    assert len(BOOLEANS) >= 3
    assert not any(entry.type == "bool" for kind in get_args(Intervention) for entry in fields(kind) if kind is not MergeTokens)
    for make, name in BOOLEANS:
        one_sentence(lambda make=make, name=name: make(**{name: wrong}), f"{name}.* must be True or False, got")
        assert getattr(make(**{name: np.True_}), name) is True


def test_keys_and_values_have_one_shape():
    one_sentence(lambda: ImageKVMeans(torch.zeros(3, 4, 8), torch.zeros(3, 4, 1)), "keys and values of ImageKVMeans must have one shape")
    one_sentence(lambda: ImageKV(torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 3, 8)), "keys and values of ImageKV must have one shape")
    flat = torch.zeros(4, 8)
    one_sentence(lambda: ImageKVMeans(flat, flat), r"must be \[layer, head, head_dim\], got a tensor of shape \(4, 8\)")
    one_sentence(lambda: ImageKV(torch.zeros(3, 4, 8), torch.zeros(3, 4, 8)), r"must be \[layer, head, image token, head_dim\]")
    one_sentence(lambda: HeadMeans(torch.zeros(3, 32)), r"values of HeadMeans must be \[layer, head, head_dim\]")
    one_sentence(lambda: HeadMeans(np.zeros((3, 4, 8))), "values of HeadMeans must be a tensor, got ndarray")


def test_digests_tell_shapes_and_small_differences_apart():
    values = torch.arange(24.0)
    assert HeadMeans(values.view(2, 3, 4)) != HeadMeans(values.view(2, 4, 3))
    wide = torch.full((32,), 0.1, dtype=torch.float64)
    assert Vector(wide) != Vector(wide + 1e-12)
    assert Vector(DIRECTION) == Vector(DIRECTION.double()) == Vector(DIRECTION.bfloat16())
    keys, shifted = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert ImageKVMeans(keys, shifted) != ImageKVMeans(shifted, keys)


def test_labels_do_not_round():
    close = 0.1 + 1e-9
    assert Steer(1, DIRECTION, scale=0.1).describe() != Steer(1, DIRECTION, scale=close).describe()
    assert f"{close!r} x " in Steer(1, DIRECTION, scale=close).describe()
    assert "2 x " in Steer(1, DIRECTION, scale=2.0).describe()
    assert DropTokens(1, 0.1).describe() != DropTokens(1, close).describe()
    assert MergeTokens(1, 0.1).describe() != MergeTokens(1, close).describe()


def test_few_noise_arrays_are_held():
    sources._normal.cache_clear()
    for item in range(40):
        GaussianNoise(1.0).draw(item, "mlp", 0, 2, 3)
    assert sources._normal.cache_info().currsize == 16


def test_layers_that_are_not_there_are_refused(subject):
    items = make_items(1)
    n_layers = subject.anatomy.n_layers
    one_sentence(lambda: observe(subject, items, HiddenStates(layers=(0, 99))), "HiddenStates names layer 99: .* 3 layers")
    one_sentence(lambda: observe(subject, items, HiddenStates(layers=(-1,))), "HiddenStates names layer -1")
    one_sentence(lambda: observe(subject, items, LogitLens(layers=(1, 77))), "LogitLens names layer 77: this model has 3 layers")
    assert observe(subject, items, HiddenStates(layers=(0, n_layers))).shape[1] == 2
    assert observe(subject, items, LogitLens(layers=(0, n_layers)))["index"].shape[1] == 2


def test_a_head_that_is_not_there_has_no_map(subject):
    (item,) = make_items(1)
    for head in ((-1, 0), (0, -1), (3, 0), (0, 4)):
        one_sentence(lambda head=head: attention_map(subject, item, head), "there is no head L.*: this model has 3 layers of 4 heads")
    one_sentence(lambda: attention_map(subject, item, (1.0, 0)), "a head's layer must be an integer")
    np.testing.assert_array_equal(attention_map(subject, item, (2, 1)), attention_map(subject, item)[2, 1])


@pytest.mark.parametrize("batch_rows", [0, -1, 1.5])
def test_a_pass_has_rows(subject, batch_rows):
    one_sentence(lambda: observe(subject, make_items(1), HiddenStates(), batch_rows=batch_rows), "batch_rows must be")


def test_a_single_name_is_one_group(subject):
    items = make_items(2)
    assert AttentionMass(groups="image") == AttentionMass(groups=("image",))
    assert AttentionEntropy(over="image") == AttentionEntropy(over=("image",))
    seen = observe(subject, items, [AttentionMass(groups="image"), AttentionMass()])
    np.testing.assert_allclose(seen[0][..., 0], seen[1][..., 0], rtol=1e-6)


def test_an_empty_group_is_undefined(subject):
    items = make_items(2)

    def groups(item, encoded):
        nobody = np.zeros(len(encoded), dtype=bool)
        some = nobody.copy()
        some[0] = item is items[0]
        return {"nobody": nobody, "some": some, "object": encoded.image.cpu().numpy()}

    asked = [HiddenStates(positions="some"), MaskIoU(queries="some"), MaskIoU(), HiddenStates(positions="nobody")]
    some, overlap, plain, nobody = observe(subject, items, asked, groups=groups)
    assert np.isfinite(some[0]).all() and np.isnan(some[1]).all() and np.isnan(nobody).all()
    assert np.isfinite(overlap[0]).all() and np.isnan(overlap[1]).all() and np.isfinite(plain).all()


@pytest.mark.parametrize("plan", [None, DropTokens(1, 0.25, "stride")])
def test_top_tokens_are_numbered_from_the_prompts_start(subject, plan):
    items = make_items(6)
    seen = {}
    for side in ("left", "right"):
        batch = subject.encode([i["image"] for i in items], [i["prompt"] for i in items], padding_side=side)
        assert not bool(batch.valid.all())
        with subject.intervene(plan, batch, observers=[TopTokens(4, "text")]) as run:
            logits(subject, batch)
        seen[side] = torch.stack([run.record(0, layer)["index"] for layer in range(subject.anatomy.n_layers)])
    assert torch.equal(seen["left"], seen["right"])


@pytest.mark.parametrize("queries", ["all", "question"])
@pytest.mark.parametrize("shape", [(3, 4, 1), (3, 4, 4), (2, 4, 8), (3, 2, 8)])
def test_means_of_another_model_are_refused_on_every_path(subject, queries, shape):
    assert (subject.anatomy.n_layers, subject.anatomy.n_heads, subject.anatomy.head_dim) == (3, 4, 8)
    images = ReplaceImageKV([(1, 1)], ImageKVMeans(torch.zeros(shape), torch.zeros(shape)), queries=queries)
    for row in (images, MeanHeads([(1, 1)], HeadMeans(torch.zeros(shape)), queries=queries)):
        with pytest.raises(ValueError, match="compute them on the same subject"):
            sweep(subject, make_items(1), {"x": row})
