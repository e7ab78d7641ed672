"""Activation patching against plain hooks, and its summaries against hand-made cases."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_core import GaussianNoise, Subject
from vlm_core.items import item_number
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.oracles import hooked, logits
from vlm_core.tests.tiny import tiny_subject
from vlm_core.tests.tracing_items import make_pairs, square
from vlm_core.tracing.patching import DIRECTIONS, PAIRED, PLACES, Patching, activation_patching, contrasting
from vlm_core.tracing.places import token_places

NOISE = GaussianNoise(2.0, seed=3)
HEAD_PLACES = ("all", "object", "background", "context", "last")


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(4)


@pytest.fixture(scope="module", params=[PAIRED, NOISE], ids=["paired", "noise"])
def corruption(request):
    return request.param


@pytest.fixture(scope="module")
def patched(subject, pairs, corruption):
    return activation_patching(subject, contrasting(subject, pairs), corruption, masks=square, heads=HEAD_PLACES)


class Plain:
    """Runs of one item with plain hooks: streams and heads are read, noise is added and activations are written by hand."""

    def __init__(self, subject, item, corruption):
        self.subject, self.item = subject, item
        self.batch = {"clean": subject.encode_items([item])}
        self.batch["corrupted"] = subject.encode_items([{**item, "image": item["partner_image"]}] if corruption == PAIRED else [item])
        self.noise = None
        if corruption != PAIRED:
            n, width = self.batch["clean"].image.shape[1], subject.anatomy.embedding.weight.shape[1]
            self.noise = corruption.draw(item_number(item), "residual", 0, n, width) * self.batch["clean"].image[0][:, None]
        anatomy = subject.anatomy
        self.streams = [*anatomy.layers, anatomy.norm]
        self.outputs = [attention.o_proj for attention in anatomy.attentions]
        self.kept = {run: self._read(run) for run in self.batch}

    def _noisy(self, run):
        if run == "clean" or self.noise is None:
            return []
        return [(self.streams[0], "pre", lambda args, kwargs: ((args[0] + self.noise, *args[1:]), kwargs))]

    def _read(self, run):
        kept = {}

        def keep(name):
            return lambda args, kwargs: kept.__setitem__(name, args[0].clone())

        reads = [(module, "pre", keep(("residual", k))) for k, module in enumerate(self.streams)]
        reads += [(module, "pre", keep(("head", k))) for k, module in enumerate(self.outputs)]
        with hooked(*self._noisy(run), *reads):
            kept["value"] = self.difference(run)
        return kept

    def difference(self, run):
        first, second = (self.subject.continuation(self.item[name])[0] for name in ("answer", "partner_answer"))
        found = logits(self.subject, self.batch[run])[0, -1]
        return float(found[first] - found[second])

    def patched(self, run, site, layer, where):
        """The run with what the other one has at a site; ``where`` a mask of what the hook sees of the prompt."""
        other = self.kept["corrupted" if run == "clean" else "clean"][site, layer]
        module = (self.streams if site == "residual" else self.outputs)[layer]
        write = (module, "pre", lambda args, kwargs: ((torch.where(where, other, args[0]), *args[1:]), kwargs))
        with hooked(*self._noisy(run), write):
            return self.difference(run)


def places_of(subject, item, corruption):
    """Every place as a mask ``[token]``, from the item's own square: its counterfactual differs nowhere else."""
    named = token_places(subject, [item], square)(item)
    image = named["object"] | named["background"]
    steps = np.arange(len(image))
    return {**named, "image": image, "last": steps == len(image) - 1, "all": np.ones_like(image)}


def test_every_run_is_that_of_plain_hooks(subject, pairs, corruption, patched):
    n_layers, size = subject.anatomy.n_layers, subject.anatomy.head_dim
    assert patched.layers == (0, 1, 2, 3) and patched.places == PLACES and patched.n_layers == n_layers
    for number, item in enumerate(pairs):
        plain, places = Plain(subject, item, corruption), places_of(subject, item, corruption)
        for run in ("clean", "corrupted"):
            np.testing.assert_allclose(getattr(patched, run)[number], plain.kept[run]["value"], atol=1e-3)
        for layer in patched.layers:
            for k, place in enumerate(PLACES):
                where = torch.as_tensor(places[place])[None, :, None]
                for run, found in (("corrupted", patched.denoised), ("clean", patched.noised)):
                    expected = plain.patched(run, "residual", layer, where)
                    np.testing.assert_allclose(found[number, layer, k], expected, atol=1e-3, err_msg=f"{run} {layer} {place}")
        for layer, head in ((0, 0), (1, 3), (n_layers - 1, 2)):
            where = torch.zeros(subject.anatomy.n_heads * size, dtype=torch.bool)
            where[head * size : (head + 1) * size] = True
            for k, place in enumerate(HEAD_PLACES):
                there = where & torch.as_tensor(places[place])[None, :, None]
                for run, found in (("corrupted", patched.heads_denoised), ("clean", patched.heads_noised)):
                    expected = plain.patched(run, "head", layer, there)
                    np.testing.assert_allclose(found[number, layer, head, k], expected, atol=1e-3, err_msg=f"{run} {layer} {head} {place}")


def test_every_token_moves_all_and_a_run_patched_by_itself_nothing(patched):
    every = PLACES.index("all")
    assert np.abs(patched.gap).min() > 0.01  # the corruption is felt: what follows is not true of nothing
    for direction in DIRECTIONS:
        np.testing.assert_allclose(patched.share(direction)[:, every], 1, atol=1e-3)
        assert not np.allclose(patched.share(direction)[1:3, PLACES.index("image")], 1, atol=1e-2)
    np.testing.assert_allclose(patched.itself, patched.corrupted, atol=1e-4)
    np.testing.assert_allclose(patched.moved("sufficient"), patched.denoised - patched.corrupted[:, None, None])
    np.testing.assert_allclose(patched.moved("necessary", "heads"), patched.clean[:, None, None, None] - patched.heads_noised)


def test_in_the_last_layer_a_head_reaches_the_answer_at_the_last_token_alone(patched):
    assert patched.head_places == HEAD_PLACES and patched.heads_denoised.shape[1:] == (3, 4, len(HEAD_PLACES))
    for direction in DIRECTIONS:
        moved = dict(zip(HEAD_PLACES, np.moveaxis(patched.moved(direction, "heads"), -1, 0), strict=True))
        for place in ("object", "background", "context"):
            np.testing.assert_allclose(moved[place][:, -1], 0, atol=1e-4)
            assert np.abs(moved[place][:, 0]).max() > 1e-3  # felt further down
        np.testing.assert_allclose(moved["last"][:, -1], moved["all"][:, -1], atol=1e-4)
        assert np.abs(moved["last"][:, -1]).max() > 1e-3


def test_a_moved_object_counts_where_it_was_and_where_it_is(subject, pairs):
    there = square({"corner": [0 if place >= 8 else 12 for place in pairs[0]["corner"]]})
    pixels = np.asarray(pairs[0]["image"]).copy()
    pixels[there] = (255, 0, 0)
    moved = {**pairs[0], "partner_image": Image.fromarray(pixels)}
    one = contrasting(subject, [moved])
    found = activation_patching(subject, one, masks=square, layers=(0,))
    object_, image = (found.denoised[0, 0, PLACES.index(place)] for place in ("object", "image"))
    # CLIP's class token and every patch see all pixels, so the rest of the image differs too; by hand:
    plain = Plain(subject, moved, PAIRED)
    named = token_places(subject, [moved], lambda item: square(item) | there)(moved)["object"]
    np.testing.assert_allclose(object_, plain.patched("corrupted", "residual", 0, torch.as_tensor(named)[None, :, None]), atol=1e-3)
    np.testing.assert_allclose(image, found.clean[0], atol=1e-3)


def test_families_with_tiles_and_several_rows_are_patched():
    processor, model = PROCESSORS["qwen2_vl"]()
    subject = Subject(model, processor, name="qwen2_vl")
    found = activation_patching(subject, contrasting(subject, make_pairs(2)), masks=square, layers=(1, 2))
    np.testing.assert_allclose(found.share("sufficient")[:, PLACES.index("all")], 1, atol=1e-2)
    assert np.isfinite(found.denoised).all() and found.heads_denoised is None


def test_chunks_change_nothing(subject, pairs, monkeypatch, tmp_path):
    items, told = contrasting(subject, pairs), []
    whole = activation_patching(subject, items, masks=square, layers=(1,))
    monkeypatch.setattr("vlm_core.tracing.patching._BYTES", 1)
    parts = activation_patching(
        subject, items, masks=square, layers=(1,), store=tmp_path, progress=lambda done, total: told.append((done, total))
    )
    again = activation_patching(subject, items, masks=square, layers=(1,), store=tmp_path)
    for name in ("clean", "corrupted", "denoised", "noised"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-4)
        np.testing.assert_array_equal(getattr(again, name), getattr(parts, name))
    assert told == [(15 * k, 60) for k in range(1, 5)]


def test_items_are_those_that_one_token_tells_apart(subject, pairs):
    first, second, third, fourth = (dict(item) for item in pairs)
    second |= {"answer": "dark red", "partner_answer": "light red", "candidates": ["dark red", "light red"]}
    third |= {"answer": "dark red", "partner_answer": "dark blue", "candidates": ["dark red", "dark blue"]}
    fourth["partner_image"] = fourth["partner_image"].resize((8, 8))
    kept = contrasting(subject, [first, second, third, fourth])
    assert [(one["id"], one["candidates"]) for one in kept] == [
        ("pair-0", [first["answer"], first["partner_answer"]]),
        ("pair-1", ["dark", "light"]),
    ]
    assert kept[1]["answer"] == "dark" and second["answer"] == "dark red"


def made(ahead, n_layers=None):
    """A patching in which the image holds ``(1 + ahead) / 2`` and the last token the rest, in both directions, for six items."""
    ahead = np.asarray(ahead, dtype=float)
    layers = tuple(range(1, len(ahead) + 1))
    gap, shares = np.arange(1.0, 7.0), np.zeros((len(ahead), len(PLACES)))
    shares[:, PLACES.index("image")], shares[:, PLACES.index("last")] = (1 + ahead) / 2, (1 - ahead) / 2
    moved = gap[:, None, None] * shares
    clean, corrupted = gap, np.zeros(6)
    about = (tuple("abcdef"), tuple("aabbcc"), ("t",) * 6, layers, PLACES, n_layers or len(ahead) + 1)
    return Patching(*about, clean, corrupted, corrupted, moved, clean[:, None, None] - moved)


@pytest.mark.parametrize(
    ("ahead", "first", "second"),
    [
        ([1, 1, -1, -1], 1.0, -1.0),
        ([1, 1, 0.3, -1, -1], 1.0, -1.0),  # a layer in the middle counts to neither half
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0.6, 0.2, -0.2, -0.6], 0.4, -0.4),
        ([-1, -1, 1, 1], -1.0, 1.0),
    ],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_lead_of_a_place_in_hand_made_cases(ahead, first, second, direction):
    weights = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]])
    for half, expected in (("first", first), ("second", second)):
        np.testing.assert_allclose(made(ahead).lead("image", "last", direction, half)(weights), expected)
        np.testing.assert_allclose(made(ahead).lead("last", "image", direction, half)(weights), -expected)


def test_directions_are_told_apart():
    clear, none = made([1, 1, -1, -1]), made([0, 0, 0, 0])
    both = dataclasses.replace(clear, noised=none.noised)
    leads = [both.lead("image", "last", direction, "first")(np.ones((1, 3)))[0] for direction in DIRECTIONS]
    assert leads == pytest.approx([1.0, 0.0])


def test_a_lead_is_a_ratio_of_sums_over_the_items_drawn():
    found = made([0.5, -0.5])
    weights = np.array([[2.0, 0.0, 1.0]])
    moved = found.denoised.copy()
    moved[:2, 0, PLACES.index("image")] = 0.0  # two items of one scene, which weighs twice
    one = dataclasses.replace(found, denoised=moved).lead("image", "last", "sufficient", "first")(weights)[0]
    gap = np.array([2, 2, 0, 0, 1, 1]) * found.gap
    image = np.where(np.arange(6) < 2, 0.0, 0.75)
    assert one == pytest.approx((gap * image).sum() / gap.sum() - 0.25)


def test_ends_are_no_evidence_of_where_the_answer_is():
    """What enters the first layer is the image, what enters the final norm is read at the last token: of any model."""
    ends = made([1, 1, -1, -1])
    shifted = dataclasses.replace(ends, layers=(0, 1, 2, 3), n_layers=3)
    leads = [shifted.lead("image", "last", "sufficient", half)(np.ones((1, 3)))[0] for half in ("first", "second")]
    assert leads == pytest.approx([1.0, -1.0])  # layers 1 and 2 alone
    with pytest.raises(ValueError, match="halves of the depth need two layers between"):
        dataclasses.replace(ends, layers=(0, 1, 2, 3), n_layers=2).lead("image", "last", "sufficient", "first")
    with pytest.raises(ValueError, match="no half 'middle'"):
        ends.lead("image", "last", "sufficient", "middle")


def test_wrong_input_is_said(subject, pairs):
    items = contrasting(subject, pairs)
    with pytest.raises(ValueError, match="there are no items to patch"):
        activation_patching(subject, [], masks=square)
    with pytest.raises(ValueError, match="corruption is 'blur': expected 'paired image' or GaussianNoise"):
        activation_patching(subject, items, "blur", masks=square)
    with pytest.raises(ValueError, match="item 'pair-0': its picture, the counterfactual one and the mask have sizes"):
        activation_patching(subject, items[:1], masks=lambda item: np.ones((4, 4), dtype=bool))
    without = activation_patching(subject, items[:1], masks=square, layers=(1,))
    with pytest.raises(ValueError, match="heads were not patched"):
        without.share("sufficient", "heads")
    with pytest.raises(ValueError, match="patched in the place 'question': expected some of object, background, image, context, last, all"):
        activation_patching(subject, items, masks=square, heads=("all", "question"))
    with pytest.raises(ValueError, match="no patching 'useful' of 'places'"):
        without.share("useful")


def test_pictures_of_other_tokens_are_refused():
    processor, model = PROCESSORS["qwen2_vl"]()
    subject = Subject(model, processor, name="qwen2_vl")
    (item,) = contrasting(subject, make_pairs(1))
    wide = {**item, "partner_image": item["partner_image"].resize((96, 32)), "image": item["image"].resize((32, 96))}
    with pytest.raises(ValueError, match="have sizes"):
        activation_patching(subject, [wide], masks=lambda one: np.ones((96, 32), dtype=bool))


def test_tiny_layers_only_heads():
    subject = tiny_subject(layers=2, seed=4)
    found = activation_patching(subject, contrasting(subject, make_pairs(2)), masks=square, layers=(), heads="last")
    assert found.denoised.shape == (2, 0, len(PLACES)) and found.heads_noised.shape == (2, 2, 4, 1) and found.head_places == ("last",)
    assert np.abs(found.moved("sufficient", "heads")).max() > 1e-3
