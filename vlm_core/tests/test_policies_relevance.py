"""Relevance budgets against their definition in plain loops, by hand, and by what must hold of floors, ceilings and totals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_core import DropTokens, sweep
from vlm_core.interventions.policy import Visual
from vlm_core.interventions.sources import Couplings
from vlm_core.interventions.stored import load_interventions, save_interventions
from vlm_core.reduction import RelevanceBudget
from vlm_core.reduction.relevance import SCORES
from vlm_core.reduction.relevance_maps import asked_otherwise, calibrated, relevance_maps
from vlm_core.tests.policy_states import attention_of, permuted, seen_of
from vlm_core.tests.tiny import make_items, normal

ITEM = 7


def image_of(rows, columns, hidden=8, unplaced=0, seed=0, asked=3, grids=1):
    """Candidates of ``grids`` grids after tokens without a place, and a question."""
    cells = [(grid, row, column) for grid in range(grids) for row in range(rows) for column in range(columns)]
    places = torch.tensor([(-1, -1, -1)] * unplaced + cells).T
    return seen_of(places.shape[1], asked, hidden, seed=seed, item=ITEM, visual=Visual(*places))


def given_by(values):
    values = torch.as_tensor(values, dtype=torch.float32)
    return Couplings(torch.tensor([ITEM]), torch.tensor([len(values)]), values)


def cosine(one, other):
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def stretched(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high - low > 1e-5 else 1.0 for value in values]


def to_mean_one(values):
    mean = sum(values) / len(values)
    return [value / mean for value in values]


def slow(policy, seen, keep, coupling):
    """Kept tokens, budgets by region and the demand, token by token."""
    n, x = len(seen), seen.hidden.tolist()
    places = [tuple(int(part[i]) for part in (seen.visual.grid, seen.visual.row, seen.visual.column)) for i in range(n)]
    novelty = [1 - sum(cosine(x[i], x[j]) for j in range(n) if j != i) / (n - 1) for i in range(n)]
    contrast = []
    for i, (grid, row, column) in enumerate(places):
        near = [
            j
            for j, (other, r, c) in enumerate(places)
            if j != i and grid >= 0 and other == grid and max(abs(r - row), abs(c - column)) == 1
        ]
        contrast.append(1 - sum(cosine(x[i], x[j]) for j in near) / len(near) if near else novelty[i])
    scores = [to_mean_one(one) for one in (stretched(novelty), stretched(contrast), coupling)]
    members = {}
    for i, (grid, row, column) in enumerate(places):
        rows = 1 + max(r for g, r, _ in places if g == grid)
        columns = 1 + max(c for g, _, c in places if g == grid)
        name = (grid, row * policy.regions // rows, column * policy.regions // columns) if grid >= 0 else (math.inf,)
        members.setdefault(name, []).append(i)
    regions = [members[name] for name in sorted(members)]
    shares = []
    for score in scores:
        parts = []
        for region in regions:
            inside = [score[i] for i in region]
            parts.append(len(region) * ((1 - policy.diversify) * max(inside) + policy.diversify * sum(inside) / len(inside)))
        shares.append([part / sum(parts) for part in parts])
    e, p = policy.explore, policy.particularise
    mixed = [e * (a + b) / 2 + (1 - e) * c for a, b, c in zip(*shares, strict=True)]
    weights = [(1 - p) * len(region) / n + p * one for region, one in zip(regions, mixed, strict=True)]
    chance = [one / sum(coupling) for one in coupling]
    demand = math.exp(-sum(one * math.log(one) for one in chance if one > 0)) / n
    total = keep
    if policy.demand is not None:
        centre, scale = policy.demand
        far = max(-1.0, min(1.0, (demand - centre) / scale))
        total = max(1, math.floor(keep * (1 + min(policy.elasticity, n / keep - 1) * far) + 0.5))
    even = [keep * len(region) / n for region in regions]
    budget = [math.floor(policy.floor * one + 1e-9) for one in even]
    most = [min(len(region), math.ceil(policy.ceiling * one - 1e-9)) for region, one in zip(regions, even, strict=True)]
    while sum(budget) < total:
        open_ones = [k for k in range(len(regions)) if budget[k] < most[k]]
        budget[max(open_ones, key=lambda k: (weights[k] / (budget[k] + 0.5), -k))] += 1
    tokens = [e * (a + b) / 2 + (1 - e) * c for a, b, c in zip(*scores, strict=True)]
    kept = [i for region, k in zip(regions, budget, strict=True) for i in sorted(region, key=lambda i: (-tokens[i], i))[:k]]
    return sorted(kept), budget, demand


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"rows": 4, "columns": 4}, {}),
        ({"rows": 4, "columns": 4, "unplaced": 1}, {"particularise": 1.0, "explore": 0.2}),
        ({"rows": 5, "columns": 7, "hidden": 16}, {"regions": 3, "diversify": 0.0, "demand": (0.5, 0.2)}),
        ({"rows": 8, "columns": 8}, {"particularise": 1.0, "explore": 0.0, "floor": 0.0, "ceiling": 4.0, "demand": (0.7, 0.1)}),
        ({"rows": 3, "columns": 4, "grids": 2, "unplaced": 2}, {"regions": 2, "explore": 1.0, "diversify": 1.0}),
        ({"rows": 9, "columns": 10, "hidden": 4}, {"particularise": 0.9, "demand": (0.6, 0.3)}),
    ],
)
def test_it_is_its_definition_in_plain_loops(shape, options):
    for seed in range(3):
        seen = image_of(**shape, seed=seed)
        n = len(seen)
        coupling = normal(n, seed=100 + seed).square().tolist()
        policy = RelevanceBudget(given_by(coupling), **options)
        for keep in sorted({1, n // 3, n - 1}):
            kept, budget, demand = slow(policy, seen, keep, coupling)
            assert policy.relevance(seen).demand == pytest.approx(demand, rel=1e-5)
            assert policy.budget(policy.relevance(seen), keep).tolist() == budget
            assert policy.choose(seen, keep).kept.tolist() == kept


def test_by_hand():
    """A 2 x 4 grid of one-hot streams: a cosine is 1 between two alike, else 0."""
    seen = image_of(2, 4, hidden=3)
    a, b, c = torch.eye(3)
    #   a a | c c
    #   a b | c c
    seen.stream[seen.candidates] = torch.stack([a, a, c, c, a, b, c, c])
    policy = RelevanceBudget(given_by([0, 0, 6, 2, 0, 0, 0, 0]), regions=1, explore=0.5, diversify=1.0, particularise=1.0)
    found = policy.relevance(seen)
    # 1 - mean cosine with seven others: a 5/7, b 1, c 4/7; from 0 to 1: a 1/3, b 1, c 0.
    novelty = torch.tensor([1 / 3, 1 / 3, 0, 0, 1 / 3, 1, 0, 0])
    # 1 - mean cosine with neighbours. Corners have three, others five: a a c c over a b c c.
    contrast = 1 - torch.tensor([2 / 3, 2 / 5, 3 / 5, 1, 2 / 3, 0, 3 / 5, 1])
    torch.testing.assert_close(found.scores[0], novelty / 0.25, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.scores[1], contrast / contrast.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.scores[2], torch.tensor([0.0, 0, 6, 2, 0, 0, 0, 0]), rtol=1e-6, atol=0)
    # The question couples to 3/4 and 1/4: a perplexity of 4 / 3^(3/4) tokens out of eight.
    assert found.demand == pytest.approx(4 / 3**0.75 / 8, rel=1e-6)
    assert found.region.tolist() == [0] * 8 and policy.choose(seen, 1).kept.tolist() == [2]

    split = replace(policy, regions=2, explore=0.0)
    # Rows and columns are cut in two: four regions of one row and two columns, and the coupling lies in the second alone.
    assert split.relevance(seen).region.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert split.relevance(seen).shares[2].tolist() == [0, 1, 0, 0]
    # Of four tokens the even share is one: the floor is 0, the ceiling 2 of 2; what is left goes to the first of those without relevance.
    assert split.budget(split.relevance(seen), 4).tolist() == [2, 2, 0, 0]
    assert replace(split, floor=1.0, elasticity=0.0).budget(split.relevance(seen), 4).tolist() == [1, 1, 1, 1]
    assert split.uniform().budget(split.uniform().relevance(seen), 4).tolist() == [1, 1, 1, 1]


def test_similarity_by_hand():
    seen = image_of(2, 2, hidden=4, asked=2)
    seen.stream[seen.candidates], seen.stream[seen.question] = torch.eye(4), torch.eye(4)[:2]
    found = RelevanceBudget("similarity").couplings(seen)
    touched = (math.exp(10) + 1) / 2
    torch.testing.assert_close(found, torch.tensor([touched, touched, 1.0, 1.0]), rtol=1e-5, atol=0)
    nothing = replace(seen, question=torch.tensor([], dtype=torch.long), _kept={})
    assert RelevanceBudget("similarity").couplings(nothing).tolist() == [1.0] * 4


def test_attention_by_hand():
    seen = image_of(3, 3, seed=2)
    asked = [[attention_of(seen.before, head, query) for head in range(4)] for query in seen.question.tolist()]
    expected = torch.tensor(asked).mean((0, 1))[seen.candidates]
    torch.testing.assert_close(RelevanceBudget().couplings(seen), expected, rtol=1e-5, atol=1e-7)


def test_attention_of_the_question_is_what_the_model_prints(subject, eager_subject):
    items = make_items(3)
    batch = eager_subject.encode_items(items, padding_side="right")
    with torch.inference_mode():
        maps = eager_subject.model(**batch.inputs, output_attentions=True).attentions[1]
    for row, found in enumerate(relevance_maps(subject, items, 2, 0.5)):
        image = batch.image[row].nonzero()[:, 0]
        asked = slice(int(image[-1]) + 1, int(batch.valid[row].sum()))
        expected = maps[row][:, asked][..., image].mean((0, 1))
        np.testing.assert_allclose(found.scores[2], expected / expected.mean(), rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_floors_ceilings_and_totals_hold(data):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))
    seen = image_of(rows, columns, unplaced=data.draw(st.integers(0, 2)), seed=data.draw(st.integers(0, 50)))
    n = len(seen)
    floor, ceiling = data.draw(st.floats(0, 1)), data.draw(st.floats(1, 4))
    elasticity = data.draw(st.floats(0, 1)) * min(1 - floor, ceiling - 1)
    coupling = data.draw(st.lists(st.floats(0, 100), min_size=n, max_size=n))
    demand = data.draw(st.none() | st.tuples(st.floats(0, 1), st.floats(0.01, 1)))
    tensions = {name: data.draw(st.floats(0, 1)) for name in ("particularise", "explore", "diversify")}
    regions = data.draw(st.integers(1, 6))
    policy = RelevanceBudget(
        given_by(coupling), **tensions, regions=regions, floor=floor, ceiling=ceiling, elasticity=elasticity, demand=demand
    )
    keep = data.draw(st.integers(1, n - 1))
    found = policy.relevance(seen)
    budget, even = policy.budget(found, keep), found.sizes * keep / n
    assert bool((budget >= (floor * even - 1).ceil()).all()) and bool((budget <= found.sizes).all())
    assert bool((budget <= (ceiling * even).ceil() + 1e-9).all())
    kept = policy.choose(seen, keep).kept
    assert len(kept) == int(budget.sum()) == policy.total(found.demand, keep, n)
    assert found.region[kept].bincount(minlength=len(budget)).tolist() == budget.tolist()
    assert abs(len(kept) - keep) <= elasticity * keep + 0.5 and (demand is not None or len(kept) == keep)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_region_that_the_question_couples_to_more_never_gets_fewer_tokens(data):
    seen = image_of(6, 6, seed=data.draw(st.integers(0, 20)))
    coupling = np.array(data.draw(st.lists(st.floats(0.1, 10), min_size=36, max_size=36)))
    tensions = {name: data.draw(st.floats(0, 1)) for name in ("particularise", "explore", "diversify")}
    region = RelevanceBudget(given_by(coupling), regions=3).relevance(seen).region.numpy()
    more = coupling.copy()
    chosen = data.draw(st.integers(0, 8))
    more[region == chosen] += data.draw(st.lists(st.floats(0, 20), min_size=4, max_size=4))
    keep = data.draw(st.integers(1, 35))
    budgets = []
    for one in (coupling, more):
        policy = RelevanceBudget(given_by(one), regions=3, **tensions)
        budgets.append(int(policy.budget(policy.relevance(seen), keep)[chosen]))
    assert budgets[1] >= budgets[0]


def test_the_order_of_candidates_does_not_matter():
    """But for which of two alike goes first: tokens have places, so that moving both moves the choice."""
    for seed in range(5):
        seen = image_of(6, 6, unplaced=1, seed=seed)
        order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))
        moved = permuted(seen, order)
        for keep, coupling in ((4, "similarity"), (12, "attention"), (30, "none")):
            policy = RelevanceBudget(coupling, regions=3)
            assert sorted(order[policy.choose(moved, keep).kept].tolist()) == policy.choose(seen, keep).kept.tolist()


def test_where_a_token_lies_matters():
    """Streams that change places without their grid are another image."""
    seen = image_of(6, 6)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    policy = RelevanceBudget("similarity", regions=3)
    moved = replace(permuted(seen, order), ordinals=seen.ordinals)
    assert sorted(order[policy.choose(moved, 12).kept].tolist()) != policy.choose(seen, 12).kept.tolist()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"coupling": "magic"}, "coupling must be one of attention, similarity, none"),
        ({"explore": 1.5}, "explore is a place between two ends"),
        ({"floor": 1.2}, "0 <= floor <= 1 <= ceiling"),
        ({"ceiling": 0.9}, "0 <= floor <= 1 <= ceiling"),
        ({"elasticity": 0.7}, "elasticity must be between 0 and 0.6"),
        ({"regions": 0}, "regions must be 1 or more"),
        ({"demand": (0.5, 0.0)}, "scale must be above 0"),
        ({"demand": 0.5}, "must be a pair"),
        ({"coupling": "none", "demand": (0.5, 0.1)}, "every question demands the same"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        RelevanceBudget(**options)


def test_couplings_must_be_of_the_item():
    seen = image_of(2, 2)
    with pytest.raises(ValueError, match="not those of item number 8"):
        RelevanceBudget(given_by([1, 1, 1, 1])).choose(replace(seen, item=8, _kept={}), 2)
    with pytest.raises(ValueError, match="couplings to 3 image tokens"):
        RelevanceBudget(given_by([1, 1, 1])).choose(seen, 2)
    with pytest.raises(ValueError, match="must be 0 or more"):
        given_by([1, -1])
    with pytest.raises(ValueError, match="for 3 values"):
        Couplings(torch.tensor([1, 2]), torch.tensor([1, 1]), torch.ones(3))
    with pytest.raises(ValueError, match="each item once"):
        Couplings(torch.tensor([1, 1]), torch.tensor([1, 1]), torch.ones(2))


def test_a_calibrated_total_is_what_is_asked_for_in_the_mean(subject):
    items = make_items(24)
    for coupling in ("attention", "similarity"):
        policy = calibrated(subject, items, 1, RelevanceBudget(coupling))
        for keep in (0.3, 0.5, 0.8):
            totals = np.array([one.kept.sum() for one in relevance_maps(subject, items, 1, keep, policy)])
            assert abs(totals.mean() - round(keep * 17)) <= 0.5 and len(set(totals.tolist())) > 1
        ranked = [one.demand for one in relevance_maps(subject, items, 1, 0.5, policy)]
        wanted = [one.kept.sum() for one in relevance_maps(subject, items, 1, 0.5, policy)]
        assert np.corrcoef(ranked, wanted)[0, 1] > 0.8
        assert {one.kept.sum() for one in relevance_maps(subject, items, 1, 0.5, policy.uniform())} == {8}
    with pytest.raises(ValueError, match="all demand the same"):
        calibrated(subject, [items[0], {**items[0], "id": "again"}], 1)


def test_asked_otherwise_has_the_couplings_of_another_question(subject, tmp_path):
    items = make_items(8)
    items[5]["prompt"] = "is the square red ?"
    policy = calibrated(subject, items, 1)
    other = asked_otherwise(subject, items, 1, policy)
    prompts = {item["prompt"] for item in items}
    for item, own, shuffled in zip(
        items, relevance_maps(subject, items, 1, 0.5, policy), relevance_maps(subject, items, 1, 0.5, other), strict=True
    ):
        asked = [{**item, "prompt": prompt} for prompt in prompts - {item["prompt"]}]
        possible = [one.scores for one in relevance_maps(subject, asked, 1, 0.5)]
        assert any(np.allclose(shuffled.scores, one, rtol=1e-4, atol=1e-5) for one in possible)
        assert not np.allclose(shuffled.scores[2], own.scores[2], rtol=1e-3)
        np.testing.assert_allclose(shuffled.scores[:2], own.scores[:2], rtol=1e-4, atol=1e-5)
    assert asked_otherwise(subject, items, 1, policy) == other != asked_otherwise(subject, items, 1, policy, seed=1)
    # It is measured like any other, and goes to a file and back.
    rows = {"other": DropTokens(1, 0.5, other)}
    save_interventions(tmp_path / "rows.json", rows)
    assert load_interventions(tmp_path / "rows.json") == rows
    assert np.isfinite(sweep(subject, items, rows, metrics=("margin",))["value"]).all()
    with pytest.raises(ValueError, match="all 2 items ask the same"):
        asked_otherwise(subject, [items[0], {**items[0], "id": "again"}], 1)
    with pytest.raises(ValueError, match="can be asked otherwise"):
        asked_otherwise(subject, items, 1, RelevanceBudget("none"))


def test_maps_are_what_the_policy_does(subject):
    items = make_items(4)
    policy = RelevanceBudget(particularise=1.0)
    batch = subject.encode_items(items)
    with subject.intervene(DropTokens(1, 0.5, policy), batch) as run, torch.inference_mode():
        subject.model(**batch.inputs)
    for row, found in enumerate(relevance_maps(subject, items, 1, 0.5, policy)):
        first = int(batch.image[row].int().argmax())
        left = run.tokens.index[row][run.tokens.image[row] & run.tokens.valid[row]] - first
        assert np.flatnonzero(found.kept).tolist() == left.tolist()
        assert found.item == items[row]["id"] and found.budget.sum() == 8
        assert np.bincount(found.region[found.kept], minlength=len(found.budget)).tolist() == found.budget.tolist()
        assert found.region.tolist() == [16, *range(16)] and found.row.tolist()[1:6] == [0, 0, 0, 0, 1]
        assert found.dominant == tuple(SCORES[one] for one in (found.shares * 1e5).round().argmax(0))
    for keep in (0.0, 1.0):
        assert {one.kept.sum() for one in relevance_maps(subject, items, 1, keep, policy)} == {17 * keep}
    with pytest.raises(TypeError, match="must be a RelevanceBudget"):
        relevance_maps(subject, items, 1, 0.5, "attention")
