"""What answers lose without image tokens: against edges that are cut in every later layer, and on prompts in which one token matters."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vlm_core import DropTokens, KnockOut, image_groups, marginal_utility, sweep
from vlm_core.interventions import parts
from vlm_core.reduction import utility as module
from vlm_core.reduction.utility import MarginalUtility
from vlm_core.tests.test_redundancy import corner, noise
from vlm_core.tests.tiny import make_items

N_IMAGE = 17


@pytest.fixture(scope="module")
def items():
    """Pictures of noise, so that tokens differ and some stand out."""
    return noise(make_items(5))


def margins(subject, item, rows, groups=None) -> dict[str, float]:
    return sweep(subject, [item], rows, metrics=("margin",), groups=groups).set_index("intervention")["value"].to_dict()


def at(subject, item) -> np.ndarray:
    return subject.layout(item["image"], item["prompt"]).positions


@pytest.fixture(scope="module")
def measured(subject, items):
    return marginal_utility(subject, items[:4], 1, corner, draws=2, seed=3)


def test_a_token_that_is_dropped_is_one_that_nobody_attends_to(subject, items, measured):
    """The same losses with the sequence as long as before and every edge to the token cut from the layer on."""
    layers = tuple(range(1, subject.anatomy.n_layers))
    assert len(measured.tokens) == 4 * N_IMAGE and measured.layer == 1
    for item in items[:4]:
        rows = {"full": None} | {token: KnockOut("all", (int(where),), layers) for token, where in enumerate(at(subject, item))}
        cut = margins(subject, item, rows)
        own = measured.tokens[measured.tokens["item"] == item["id"]].set_index("token")
        assert own.index.tolist() == [*range(N_IMAGE)]
        assert own["full"].unique() == pytest.approx([cut["full"]], abs=1e-4)
        np.testing.assert_allclose(own["loss"], [cut["full"] - cut[token] for token in own.index], rtol=1e-3, atol=1e-4)
        assert own["loss"].abs().max() > 0.01
        assert set(own["cluster"]) == {item["scene_id"]} and set(own["task"]) == {item["task"]}


def test_a_group_is_dropped_as_a_whole(subject, items, measured):
    groups = image_groups(subject, items[:4], corner)
    layers, n_groups = tuple(range(1, subject.anatomy.n_layers)), 0
    for item in items[:4]:
        own = measured.groups[measured.groups["item"] == item["id"]].set_index("group")
        members = {name: np.flatnonzero(one) for name, one in groups.of(item).items() if one.any()}
        assert own.index.tolist() == list(members)
        assert own["n_tokens"].to_dict() == {name: len(one) for name, one in members.items()}
        rows = {name: KnockOut("all", tuple(at(subject, item)[one].tolist()), layers) for name, one in members.items()}
        cut = margins(subject, item, {"full": None} | rows)
        np.testing.assert_allclose(own["loss"], [cut["full"] - cut[name] for name in own.index], rtol=1e-3, atol=1e-4)
        n_groups += len(own)
    assert n_groups > 3 * 4 and (measured.groups["group"] == "high-norm").any()


@pytest.fixture
def asked(monkeypatch):
    """What the sweep was asked for; ``alone``: what is done beside every row."""
    seen = {"alone": {}}

    def recording(subject, items, rows, *, groups, assignments, **options):
        def both(item, prompt):
            found = groups(item, prompt)
            seen.setdefault("groups", {})[item["id"]] = {name: np.flatnonzero(one) for name, one in found.items()}
            others = np.asarray(prompt.image).copy()
            others[np.flatnonzero(others)[seen["alone"].get(item["id"], 0)]] = False
            return found | {"others": others}

        seen.update(rows=rows, assignments=assignments)
        if seen["alone"]:
            layers = tuple(range(subject.anatomy.n_layers))
            rows = {label: (KnockOut("all", "others", layers), *parts(row)) for label, row in rows.items()}
        return sweep(subject, items, rows, groups=both, assignments=assignments, **options)

    monkeypatch.setattr(module, "sweep", recording)
    return seen


def test_only_the_token_that_matters_is_missed(subject, items, asked):
    """No other image token is attended to by anything in any layer: dropping it, or all of them, costs nothing."""
    asked["alone"] = {"item-0": 1, "item-1": 6, "item-4": 12}
    chosen = [items[0], items[1], items[4]]
    found = marginal_utility(subject, chosen, 0, corner, draws=0)
    for item in chosen:
        token = asked["alone"][item["id"]]
        own = found.tokens[found.tokens["item"] == item["id"]].set_index("token")["loss"]
        assert abs(own[token]) > 0.01 and own.drop(token).abs().max() < 1e-4
        lost = found.groups[found.groups["item"] == item["id"]].set_index("group")["loss"]
        group = {1: "object", 6: "boundary", 12: "background"}[token]
        for name in ("object", "boundary", "background"):
            assert lost[name] == pytest.approx(own[token] if name == group else 0.0, abs=1e-4)
        assert lost["all"] == pytest.approx(own[token], abs=1e-4)
    np.testing.assert_allclose(found.inert()["share"], 16 / 17)


def test_as_many_random_tokens_as_the_group_has(subject, items, asked):
    groups = image_groups(subject, items[:4], corner)
    found = marginal_utility(subject, items[:4], 1, groups=groups, most_tokens=0, draws=3, seed=1)
    assert found.tokens.empty and found.inert().empty
    drawn = asked["groups"]
    for item in items[:4]:
        own = found.groups[found.groups["item"] == item["id"]].set_index("group")
        for name in own.index.drop("all"):
            sets = [drawn[item["id"]][f"random/{draw}, {name}"] for draw in range(3)]
            assert all(len(one) == own.loc[name, "n_tokens"] and np.isin(one, at(subject, item)).all() for one in sets)
            rows = {k: DropTokens(1, 0.0, tokens=tuple(one.tolist())) for k, one in enumerate(sets)}
            cut = margins(subject, item, {"full": None} | rows)
            assert own.loc[name, "random"] == pytest.approx(np.mean([cut["full"] - cut[k] for k in range(3)]), abs=1e-4)
        assert own.loc["all", "random"] == own.loc["all", "loss"]
    assert any(len({tuple(drawn[item["id"]][f"random/{draw}, background"]) for draw in range(3)}) > 1 for item in items[:4])
    again = marginal_utility(subject, items[3:0:-1], 1, groups=groups, most_tokens=0, draws=3, seed=1)
    both = again.groups.merge(found.groups, on=["item", "group"], suffixes=("", "_before"))
    np.testing.assert_allclose(both["random"], both["random_before"], atol=1e-4)  # draws are the item's own, whatever its place
    other = marginal_utility(subject, items[:4], 1, groups=groups, most_tokens=0, draws=3, seed=2)
    assert not np.allclose(other.groups["random"], found.groups["random"])
    none = marginal_utility(subject, items[:4], 1, groups=groups, most_tokens=0, draws=0)
    assert none.groups.set_index("group")["random"].drop("all").isna().all()


def test_tokens_may_be_drawn(subject, items, measured):
    some = marginal_utility(subject, items[:4], 1, corner, most_tokens=5, draws=0, seed=3)
    assert (some.tokens.groupby("item").size() == 5).all() and len({tuple(own["token"]) for _, own in some.tokens.groupby("item")}) > 1
    both = some.tokens.merge(measured.tokens, on=["item", "token"], suffixes=("", "_all"))
    assert len(both) == 20
    np.testing.assert_allclose(both["loss"], both["loss_all"], atol=1e-4)


def test_the_share_that_does_next_to_nothing_by_hand():
    rows = [("a", 2.0, 0.09), ("a", 2.0, -0.09), ("a", 2.0, 0.1), ("a", 2.0, -3.0), ("b", -1.0, 0.04), ("b", -1.0, 0.06), ("c", 0.0, 0.0)]
    tokens = pd.DataFrame([{"item": name, "cluster": name, "task": "t", "token": 0, "full": full, "loss": loss} for name, full, loss in rows])
    found = MarginalUtility(0, tokens, pd.DataFrame())
    assert found.inert().set_index("item")["share"].to_dict() == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert found.inert(2.0).set_index("item")["share"].to_dict() == {"a": 1.0, "b": 1.0, "c": 0.0}
    with pytest.raises(ValueError, match="above 0"):
        found.inert(0.0)


def test_bad_arguments_are_refused(subject, items):
    groups = image_groups(subject, items[:1])
    for options, message in (
        ({"layer": 3}, "layer 3"),
        ({"layer": -1}, "layer"),
        ({"layer": 0, "draws": -1}, "draws"),
        ({"layer": 0, "most_tokens": -2}, "most_tokens"),
        ({"layer": 0, "objects": corner, "groups": groups}, "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            marginal_utility(subject, items[:1], **options)
    with pytest.raises(ValueError, match="no items"):
        marginal_utility(subject, [], 0)
