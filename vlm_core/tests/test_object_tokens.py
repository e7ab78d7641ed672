"""Which tokens are replaced, by hand; what the replacement costs, by positions given one by one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vlm_core import IntegratedGradients, ReplaceTokens, Subject, capture_embeddings, mean_token, observe, sweep
from vlm_core.families.layout import object_tokens
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import make_items
from vlm_core.tracing import object_tokens as module
from vlm_core.tracing.object_tokens import ObjectTokens, item_layouts, object_groups, replace_object_tokens, smallest_ring

SIDE = 16


def corner(item) -> np.ndarray:
    """A 4 x 4 patch of 16: the one in row 1, column 1 or 2."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    column = 4 * (1 + int(item["id"].split("-")[1]) % 2)
    mask[4:8, column : column + 4] = True
    return mask


@pytest.fixture
def taken(monkeypatch):
    """What the sweep was asked for."""
    asked = {}

    def recording(subject, items, rows, *, groups, **options):
        prompts = [np.zeros(len(one)) for one in (capture_embeddings(subject, item).image for item in items)]
        asked.update(rows=rows, groups={item["id"]: groups(item, prompt) for item, prompt in zip(items, prompts, strict=True)})
        return sweep(subject, items, rows, groups=groups, **options)

    monkeypatch.setattr(module, "sweep", recording)
    return asked


def test_the_object_its_rings_and_as_many_others_are_replaced(subject, items, taken):
    mean = mean_token(subject, items)
    found = replace_object_tokens(subject, items, corner, mean, rings=(0, 1), draws=2, high_norm=True, gradient_items=3, seed=4)
    every_norm = []
    for item in items:
        captured = capture_embeddings(subject, item)
        every_norm.append(np.linalg.norm(captured.at("residual", 0).numpy(), axis=1)[captured.image.numpy()])
    level = np.concatenate(every_norm).mean() + 2 * np.concatenate(every_norm).std()
    gradients = observe(subject, items[:3], IntegratedGradients())["attribution"]
    shares = {0: [], 1: []}
    for number, (item, norms) in enumerate(zip(items, every_norm, strict=True)):
        layout = subject.layout(item["image"], item["prompt"])
        groups = {name: members[layout.positions] for name, members in taken["groups"][item["id"]].items()}
        for ring, size in ((0, 1), (1, 9)):
            own = groups[f"object, ring {ring}"]
            np.testing.assert_array_equal(own, object_tokens(layout, corner(item), rings=ring))
            assert own.sum() == size
            outside = ~own & (layout.kind == "patch")
            if size > outside.sum():
                assert not any(name.startswith(("random", "high-norm")) for name in groups if name.endswith(f"ring {ring}"))
            else:
                for draw in range(2):
                    random = groups[f"random/{draw}, ring {ring}"]
                    assert random.sum() == size and not random[~outside].any()
                highest = groups[f"high-norm, ring {ring}"]
                assert highest.sum() == size and not highest[~outside].any()
                assert norms[highest].min() >= norms[outside & ~highest].max(initial=0.0)
                shares[ring] += (norms[highest] > level).tolist()
            if number < 3:
                best = groups[f"gradients, ring {ring}"]
                assert best.sum() == size and gradients[number][best].min() >= gradients[number][~best].max()
            else:
                assert f"gradients, ring {ring}" not in groups
    assert found.replaced["object, ring 0"] == found.replaced["random, ring 0"] == found.replaced["high-norm, ring 0"] == 1
    # with its ring the object holds 9 of 16 patches: there are not as many others
    assert found.replaced["object, ring 1"] == 9 and found.replaced["random, ring 1"] == found.replaced["high-norm, ring 1"] == 0
    pd.testing.assert_series_equal(found.tokens["object, ring 0"], found.tokens["high-norm, ring 0"], check_names=False)
    assert np.isnan(found.drop("random, ring 1")).all() and np.isfinite(found.drop("random, ring 0")).all()
    assert found.registers == pytest.approx(np.mean([(norms > level).sum() for norms in every_norm]))
    assert found.registers_taken == pytest.approx({0: np.mean(shares[0]), 1: 0.0})
    draws = [{name: groups[f"random/{draw}, ring 0"] for name, groups in taken["groups"].items()} for draw in range(2)]
    assert any((draws[0][name] != draws[1][name]).any() for name in draws[0])
    assert all(row == ReplaceTokens(mean, label) for label, row in taken["rows"].items() if label != "full")


def test_answers_are_those_of_replacing_the_positions_one_by_one(subject, items):
    mean = mean_token(subject, items)
    found = replace_object_tokens(subject, items, corner, mean, rings=(1,), draws=0)
    assert found.correct.columns.tolist() == ["cluster", "task", "full", "object, ring 1"]
    for item in items:
        layout = subject.layout(item["image"], item["prompt"])
        positions = tuple(int(at) for at in layout.positions[object_tokens(layout, corner(item), rings=1)])
        table = sweep(subject, [item], {"full": None, "cut": ReplaceTokens(mean, positions)}, metrics=("correct",))
        assert found.correct.loc[item["id"], ["full", "object, ring 1"]].tolist() == table["value"].tolist()
    assert (found.drop("object, ring 1") == found.correct["full"] - found.correct["object, ring 1"]).all()
    assert found.clusters.tolist() == [item["scene_id"] for item in items]


def test_random_is_the_mean_over_draws_and_follows_the_seed(subject, items, taken):
    mean = mean_token(subject, items)
    first = replace_object_tokens(subject, items, corner, mean, rings=(0,), draws=3, seed=1)
    drawn = taken["groups"]
    again = replace_object_tokens(subject, items, corner, mean, rings=(0,), draws=3, seed=1)
    assert all((drawn[name][label] == members).all() for name, groups in taken["groups"].items() for label, members in groups.items())
    pd.testing.assert_frame_equal(first.correct, again.correct)
    replace_object_tokens(subject, items, corner, mean, rings=(0,), draws=3, seed=2)
    assert any((drawn[name]["random/0, ring 0"] != groups["random/0, ring 0"]).any() for name, groups in taken["groups"].items())
    assert set(np.round(first.correct["random, ring 0"] * 3, 9)) <= {0.0, 1.0, 2.0, 3.0}


def frame(**columns) -> ObjectTokens:
    about = {"cluster": list("abcd"), "task": ["t"] * 4}
    return ObjectTokens(pd.DataFrame(about | {name.replace("_", ", ring "): values for name, values in columns.items()}), pd.DataFrame(), 0.0, {})


def test_the_ring_is_the_smallest_that_costs_enough():
    full = [1.0, 1.0, 1.0, 1.0]
    half, one = [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]
    assert smallest_ring(frame(full=full, object_0=half, object_1=one, object_2=[0.0] * 4)) == 1
    assert smallest_ring(frame(full=full, object_0=half, object_1=half, object_2=one)) == 2
    assert smallest_ring(frame(full=full, object_0=half, object_1=half, object_2=half)) == 1
    assert frame(full=half, object_0=[0.0, 1.0, 0.0, 0.0]).relative_drop("object, ring 0") == 0.5
    assert frame(full=[0.0] * 4, object_0=[0.0] * 4).relative_drop("object, ring 0") == 0.0
    assert frame(full=half, random_0=[0.0, np.nan, np.nan, np.nan]).relative_drop("random, ring 0") == 1.0  # of the items it was measured on


def test_items_without_their_object_are_left_out(subject, items):
    mean = mean_token(subject, items)
    masks = {item["id"]: corner(item) for item in items} | {"item-3": np.zeros((SIDE, SIDE), bool)}
    found = replace_object_tokens(subject, items, masks, mean, rings=(0,))
    assert found.correct.index.tolist() == [item["id"] for item in items if item["id"] != "item-3"]
    with pytest.raises(ValueError, match="no item shows its object"):
        replace_object_tokens(subject, items[3:4], masks, mean)
    with pytest.raises(ValueError, match="no items"):
        replace_object_tokens(subject, [], masks, mean)


def test_groups_are_those_of_the_layouts(subject, items):
    layouts = item_layouts(subject, items, batch=5)
    assert [len(one) for one in layouts] == [17] * len(items)
    groups = object_groups(layouts, items, {"object": corner}, rings=1)
    for item, layout in zip(items, layouts, strict=True):
        named = groups(item, np.zeros(40))["object"]
        assert np.flatnonzero(named).tolist() == layout.positions[object_tokens(layout, corner(item), rings=1)].tolist()


@pytest.mark.parametrize(("name", "reason"), [("blip-2", "none has a place"), ("mllama", "outside the token sequence")])
def test_families_whose_tokens_have_no_place_are_refused(name, reason):
    processor, model = PROCESSORS[name]()
    with pytest.raises(ValueError, match=reason):
        item_layouts(Subject(model, processor, name=name), make_items(2))
