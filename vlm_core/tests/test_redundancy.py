"""Groups of image tokens by hand on a small grid, and redundancy in every layer against states captured prompt by prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_core import Subject, TokenLikeness, attention_map, capture_embeddings, image_groups, observe, redundancy
from vlm_core.observation.likeness import MEASURES as ALIKE
from vlm_core.observation.likeness import likeness
from vlm_core.reduction import redundancy as module
from vlm_core.stats import interval_each
from vlm_core.sweeps.features import prompts_of
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import make_items

SIDE = 16


def corner(item) -> np.ndarray:
    """The top left patch of 16; nothing in item-2, everything in item-3."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    size = {"item-2": 0, "item-3": SIDE}.get(item["id"], 4)
    mask[:size, :size] = True
    return mask


def noise(items: list[dict]) -> list[dict]:
    """The same items with pictures of noise, some patches of which stand out."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(items), SIDE, SIDE, 3), dtype=np.uint8)
    return [{**item, "image": Image.fromarray(one)} for item, one in zip(items, pixels, strict=True)]


@pytest.fixture(scope="module")
def pictures():
    return noise(make_items(5))


@pytest.fixture(scope="module")
def found(subject, pictures):
    return redundancy(subject, pictures, corner, batch_rows=2)


def streams(subject, item, layer: int) -> torch.Tensor:
    """What enters a layer at the image tokens, from the model's own output."""
    batch = subject.encode_items([item])
    with torch.inference_mode():
        states = subject.model(**batch.inputs, output_hidden_states=True).hidden_states
    return states[layer][0][batch.image[0]]


def test_groups_by_hand(subject, pictures):
    groups = image_groups(subject, pictures, corner)
    assert groups.names == ("all", "object", "boundary", "background", "high-norm")
    norms = []
    for item in pictures:
        captured = capture_embeddings(subject, item)
        norms.append(captured.at("residual", 0)[captured.image].norm(dim=1).numpy())
    level = np.concatenate(norms).mean() + 2 * np.concatenate(norms).std()
    assert groups.level == pytest.approx(level)
    assert any((own > level).any() for own in norms) and not all((own > level).any() for own in norms)
    for item, own, prompt in zip(pictures, norms, prompts_of(subject, pictures), strict=True):
        members = {name: np.flatnonzero(one).tolist() for name, one in groups.of(item).items()}
        shown = {"item-2": [], "item-3": [*range(1, 17)]}.get(item["id"], [1])
        around = [] if item["id"] in ("item-2", "item-3") else [2, 5, 6]
        assert members["all"] == [*range(17)]
        assert members["object"] == shown and members["boundary"] == around
        assert members["background"] == [token for token in range(17) if token not in shown + around]
        assert members["high-norm"] == np.flatnonzero(own > level).tolist()
        at = subject.layout(item["image"], item["prompt"]).positions
        named = groups(item, prompt)
        assert "all" not in named
        for name, one in named.items():
            assert np.flatnonzero(one).tolist() == at[members[name]].tolist()


def test_without_objects_there_are_all_and_those_that_stand_out(subject, pictures):
    groups = image_groups(subject, pictures[:2])
    assert groups.names == ("all", "high-norm")
    with pytest.raises(KeyError, match="item 'item-4' was not grouped"):
        groups.of(pictures[4])


def test_every_layer_and_group_by_the_models_own_states(subject, pictures, found):
    groups = image_groups(subject, pictures, corner)
    assert found.per_item.shape == (5, subject.anatomy.n_layers + 1, 5, len(module.MEASURES))
    assert found.measures == tuple(module.MEASURES) and found.groups == groups.names
    for number, item in enumerate(pictures):
        for k, name in enumerate(found.groups):
            members = groups.of(item)[name]
            assert found.sizes[number, k] == members.sum()
            for layer in range(subject.anatomy.n_layers):
                expected = likeness(streams(subject, item, layer)[members]).numpy()
                np.testing.assert_allclose(found.per_item[number, layer, k, : len(ALIKE)], expected, rtol=1e-4)


def test_what_enters_the_final_norm_is_the_last_layer(subject, pictures, found):
    alike = observe(subject, pictures, TokenLikeness())
    np.testing.assert_allclose(found.per_item[:, -1, 0, : len(ALIKE)], alike[:, -1, 0], rtol=1e-5)
    assert not np.allclose(alike[:, -1], alike[:, -2])


def test_attention_entropy_by_hand(subject, pictures, found):
    groups = image_groups(subject, pictures, corner)
    entropy = found.per_item[..., list(found.measures).index("attention entropy")]
    assert np.isnan(entropy[:, -1]).all() and np.isfinite(entropy[:, :-1, 0]).all()
    for number, item in enumerate(pictures):
        maps = attention_map(subject, item)
        for k, name in enumerate(found.groups):
            members = groups.of(item)[name]
            own = maps[:, :, members]
            if members.sum() < 2:
                assert np.isnan(entropy[number, :, k]).all()
            else:
                own = own / own.sum(2, keepdims=True)
                np.testing.assert_allclose(entropy[number, :-1, k], -(own * np.log(own)).sum(2).mean(1), rtol=1e-4)


def test_groups_of_fewer_than_two_tokens_have_no_numbers(found):
    few = found.sizes < 2
    assert few.any() and not few.all()
    assert (np.isnan(found.per_item).all((1, 3)) == few).all()


def test_the_table_has_every_number_once(pictures, found):
    table = found.table()
    assert table.columns.tolist() == ["item", "cluster", "task", "layer", "group", "measure", "value"]
    assert len(table) == found.per_item.size and not table.duplicated(["item", "layer", "group", "measure"]).any()
    indexed = table.set_index(["item", "layer", "group", "measure"])["value"]
    assert indexed.loc["item-4", 2, "background", "nearest"] == found.per_item[4, 2, 3, 1] == found.of("nearest", "background")[4, 2]
    about = table.drop_duplicates("item").set_index("item")
    assert about["cluster"].tolist() == [item["scene_id"] for item in pictures]
    assert about["task"].tolist() == [item["task"] for item in pictures]


def test_curves_are_means_with_intervals_over_scenes(found):
    curves = found.curves().set_index(["layer", "group", "measure"])
    mean, lower, upper = interval_each(found.of("cosine"), found.clusters)
    np.testing.assert_allclose(curves.xs(("all", "cosine"), level=("group", "measure")), np.stack([mean, lower, upper, [5] * 4], 1))
    assert curves.loc[(0, "boundary", "cosine"), "n_items"] == 3
    of_color = found.curves("color").set_index(["layer", "group", "measure"])
    rows = [task == "color" for task in found.tasks]
    assert of_color.loc[(1, "all", "nearest"), "mean"] == pytest.approx(found.of("nearest")[rows, 1].mean())
    assert of_color.loc[(1, "all", "nearest"), "n_items"] == sum(rows) == 3


def test_entropy_has_no_last_layer_and_names_are_checked(found):
    assert found.of("attention entropy").shape[1] == found.of("cosine").shape[1] - 1
    for arguments, message in ((("rank",), "no measure 'rank'"), (("cosine", "sky"), "no group 'sky'")):
        with pytest.raises(ValueError, match=message):
            found.of(*arguments)
    with pytest.raises(ValueError, match="no items of task 'depth'"):
        found.curves("depth")


def test_groups_may_be_made_once(subject, pictures, found):
    groups = image_groups(subject, pictures, corner)
    np.testing.assert_array_equal(redundancy(subject, pictures, groups=groups, batch_rows=2).per_item, found.per_item)
    with pytest.raises(ValueError, match="not both"):
        redundancy(subject, pictures, corner, groups=groups)
    with pytest.raises(ValueError, match="no items"):
        redundancy(subject, [])


def test_what_is_kept_does_not_grow_with_states(subject, pictures, monkeypatch):
    """Of each pass a few numbers a layer and group are kept: nothing as wide as the residual stream."""
    seen = []
    plain = module.observed

    def watched(*arguments, **options):
        for some in plain(*arguments, **options):
            seen.append(max(values[""].numel() / len(some.items) for values in some.values))
            yield some

    monkeypatch.setattr(module, "observed", watched)
    redundancy(subject, pictures[:4], batch_rows=2)
    assert len(seen) == 2 and max(seen) < 4 * 2 * len(module.MEASURES) + 1 < subject.anatomy.hidden_size * 17


@pytest.mark.parametrize("objects", [None, corner])
def test_images_outside_the_sequence_are_refused(objects):
    processor, model = PROCESSORS["mllama"]()
    with pytest.raises(ValueError, match="outside the token sequence"):
        redundancy(Subject(model, processor, name="mllama"), make_items(2), objects)


def test_tokens_without_a_place_have_no_objects_but_are_measured():
    processor, model = PROCESSORS["blip-2"]()
    subject = Subject(model, processor, name="blip-2")
    with pytest.raises(ValueError, match="none has a place"):
        redundancy(subject, make_items(2), corner)
    assert np.isfinite(redundancy(subject, make_items(2)).of("cosine")).all()
