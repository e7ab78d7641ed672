"""Declarations: what they say, what they refuse, and hashes that notice every change."""

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from vlm_core.stats import Claim, Equivalence, NonInferiority, Superiority, Trend

CLAIM = Claim(
    id="H1.necessity",
    sentence="Removing the image from the top 10 % of heads costs at least 10 points of accuracy.",
    effect="accuracy(full) - accuracy(ablated), paired per item",
    test=Superiority(0.10),
    source="Kim et al. 2025, arXiv:2509.17588",
)

CHANGES = {
    "id": "H1.necessary",
    "sentence": "Removing the image costs 10 points.",
    "effect": "something else",
    "test": Superiority(0.11),
    "source": "elsewhere",
    "tier": "exploratory",
    "alpha": 0.01,
    "unit": "image",
    "min_clusters": 31,
    "min_seeds": 3,
    "direction": "gain",
}


def test_hash_is_the_same_on_every_machine_and_day():
    assert CLAIM.hash == "213d3a9508fbb8bb"


def test_every_field_has_a_change_to_try():
    assert set(CHANGES) == {field.name for field in fields(Claim)}


@pytest.mark.parametrize("name", CHANGES)
def test_changing_any_field_changes_the_hash(name):
    assert replace(CLAIM, **{name: CHANGES[name]}).hash != CLAIM.hash


def test_margins_of_different_kinds_hash_apart():
    hashes = {replace(CLAIM, test=test).hash for test in (NonInferiority(0.1), Equivalence(0.1), Trend())}
    assert len(hashes) == 3


def test_declaration_survives_json():
    declared = CLAIM.as_dict()
    assert json.loads(json.dumps(declared, allow_nan=False)) == declared
    assert declared["test"] == {"kind": "superiority", "threshold": 0.10}


def test_hypothesis_is_the_first_part_of_the_id():
    assert CLAIM.hypothesis == "H1"


def test_a_claim_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        CLAIM.alpha = 0.5


@pytest.mark.parametrize(
    ("test", "kind", "limit", "words"),
    [
        (Superiority(0.1), "superiority", 0.1, "above 0.1"),
        (NonInferiority(0.05), "non-inferiority", 0.05, "loss is below 0.05"),
        (Equivalence(0.03), "equivalence", 0.03, "within ±0.03"),
        (Trend(), "trend", 0.0, "above 0"),
    ],
)
def test_each_test_describes_itself(test, kind, limit, words):
    assert test.kind == kind
    assert test.limit == limit
    assert words in test.describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "necessity"}, "must read 'hypothesis.name'"),
        ({"test": 0.1}, "must be Superiority"),
        ({"tier": "important"}, "tier must be"),
        ({"direction": "up"}, "direction must be"),
        ({"alpha": 0.0}, "alpha must lie"),
        ({"alpha": 0.5}, "alpha must lie"),
        ({"min_clusters": 1}, "min_clusters"),
        ({"min_seeds": 0}, "min_seeds"),
    ],
)
def test_impossible_declarations_are_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        replace(CLAIM, **change)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Superiority(-0.1),
        lambda: Superiority(float("nan")),
        lambda: NonInferiority(0.0),
        lambda: Equivalence(float("inf")),
    ],
)
def test_impossible_margins_are_refused(make):
    with pytest.raises(ValueError, match="must be a finite number"):
        make()
