"""E-processes: by hand, never wrong more often than promised however often one looks, and right within the promised number of nights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from vlm_core.stats import Equivalence, NonInferiority, Replication, Superiority, clusters_promised, night_values, nights_promised
from vlm_core.stats.eprocess import CAP, Betting, log_bets, replay

NIGHTS = 365


def three_valued(rng, shape, mean, deviation):
    """Paired differences of right and wrong answers: -1, 0 or 1."""
    changed = deviation**2 + mean**2
    assert changed >= abs(mean)
    drawn = rng.random(shape)
    return np.where(drawn < (changed + mean) / 2, 1.0, np.where(drawn < changed, -1.0, 0.0))


def test_a_hand_made_example():
    # m = 0.5. First bet: the mean is m, so 0. After x = 0.8: running mean (0.5 + 0.8)/2 = 0.65, deviation² 0.0225; second bet from mean
    # 0.65 and variance (0.25 + 0.0225)/2: 0.15/(0.13625 + 0.0225) = 0.94488..., below the cap of 1. x = 0.7: factor 1 + 0.94488 * 0.2.
    # Then mean 2/3, deviation² 1/900; third bet: (1/6)/((0.25 + 0.0225 + 1/900)/3 + 1/36) = 1.4, cut to 1; x = 0.2: factor 1 - 0.3.
    factors, (n, total, _) = log_bets([0.8, 0.7, 0.2], 0.5)
    assert np.exp(factors).tolist() == pytest.approx([1, 1 + 0.15 / 0.15875 * 0.2, 0.7])
    assert n == 3 and total == pytest.approx(1.7) and CAP == 0.5


def test_every_factor_stays_positive_and_no_bet_is_made_against_what_was_seen():
    factors, _ = log_bets([0.4] * 500 + [0.0], 0.3)
    assert np.exp(factors[500]) == pytest.approx(1 - CAP), "what varies so little asks for a larger bet than is allowed"
    assert np.allclose(log_bets([0.1] * 50, 0.3)[0], 0, atol=1e-12)


@pytest.mark.parametrize("x", [[1.2], [-0.1], [float("nan")]])
def test_a_value_outside_its_range_is_refused(x):
    with pytest.raises(ValueError, match="outside 0 to 1"):
        Betting(0.5).update(x)


@pytest.mark.parametrize(
    ("mean", "draw"),
    [
        (0.55, lambda rng, shape: (three_valued(rng, shape, 0.1, 0.5) + 1) / 2),
        (0.525, lambda rng, shape: (rng.random(shape) < 0.525).astype(float)),
        (0.1, lambda rng, shape: rng.beta(0.2, 1.8, shape)),
    ],
    ids=["paired", "two-valued", "skewed"],
)
def test_a_year_of_nights_without_an_effect_is_called_one_at_most_as_often_as_promised(mean, draw):
    """Looked at after every night (and after every cluster), at the null's worst case: a mean that is exactly the limit."""
    alpha, runs, clusters = 0.05, 1000, 6
    factors, _ = log_bets(draw(np.random.default_rng(0), (runs, NIGHTS * clusters)), mean)
    wealth = np.cumsum(factors, axis=1)
    assert np.mean(np.exp(wealth[:, 20])) < 1.3, "E is expected to be 1 at most"
    for looks in (wealth, wealth[:, clusters - 1 :: clusters]):
        reached = np.mean(looks.max(1) >= math.log(1 / alpha))
        assert reached <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_bets_that_saw_what_they_bet_on_would_fail_that_simulation():
    """The simulation can fail: with the bet for x made after x, most years without an effect reach the threshold."""
    rng = np.random.default_rng(0)
    x = (rng.random((200, NIGHTS)) < 0.5).astype(float)
    cheating = np.cumsum(np.log1p(np.where(x > 0.5, 1.0, 0.0) * (x - 0.5)), axis=1)
    assert np.mean(cheating.max(1) >= math.log(20)) > 0.5


@pytest.mark.parametrize("test", [Superiority(0.1), NonInferiority(0.05), Equivalence(0.05)], ids=lambda test: test.kind)
@pytest.mark.parametrize("deviation", [0.35, 0.6])
def test_a_change_of_the_declared_size_is_caught_within_the_promised_nights(test, deviation):
    """A drop declared to be at least 0.10 that is gone, a loss twice its margin: in nine runs of ten at least, looked at every night."""
    rng, alpha, clusters, power, runs = np.random.default_rng(1), 0.05 / 7, 160, 0.9, 50
    effect = 0.0 if test.kind == "superiority" else 2 * test.limit
    nights = nights_promised(test, clusters, deviation=deviation, alpha=alpha, power=power)
    caught = 0
    for _ in range(runs):
        found = replay(test.kind, test.limit, (-1, 1), three_valued(rng, (nights, clusters), effect, deviation))
        caught += found.verdict(alpha).value == "refuted"
    assert caught / runs >= power - 3 * math.sqrt(power * (1 - power) / runs)
    assert nights <= NIGHTS, "a promise that nobody can wait for is none"


def test_the_promise_is_no_longer_than_a_few_times_what_is_needed():
    """A quarter of the promised number must fail in most runs, or the promise says nothing."""
    rng, test, alpha = np.random.default_rng(2), NonInferiority(0.05), 0.05 / 7
    few = clusters_promised(0.10, test, deviation=0.6, alpha=alpha) // 4
    early = [replay("non-inferiority", 0.05, (-1, 1), [three_valued(rng, few, 0.10, 0.6)]).verdict(alpha).value for _ in range(60)]
    assert early.count("refuted") < 45


def test_the_promise_is_kept_by_the_distribution_that_makes_it_hardest():
    """Two values, one of them at the far end: log E of no other distribution of this mean and variance grows as slowly."""
    rng, test, alpha = np.random.default_rng(3), Superiority(0.1), 0.05 / 7
    mean, variance = (0.0 + 1) / 2, (0.35 / 2) ** 2
    share, other = mean**2 / (variance + mean**2), (variance + mean**2) / mean
    count = clusters_promised(0.0, test, deviation=0.35, alpha=alpha)
    drawn = [1 - 2 * np.where(rng.random(count) < share, other, 0.0) for _ in range(60)]
    caught = sum(replay("superiority", 0.1, (-1, 1), [x]).verdict(alpha).value == "refuted" for x in drawn)
    assert caught >= 60 * 0.9 - 3 * math.sqrt(60 * 0.9 * 0.1)


def test_promises_grow_with_what_makes_it_harder():
    base = clusters_promised(0.3, Superiority(0.1), deviation=0.4)
    assert clusters_promised(0.2, Superiority(0.1), deviation=0.4) > base
    assert clusters_promised(0.3, Superiority(0.1), deviation=0.8) > base
    assert clusters_promised(0.3, Superiority(0.1), deviation=0.4, alpha=0.005) > base
    with pytest.raises(ValueError, match="lies on the limit"):
        clusters_promised(0.1, Superiority(0.1))
    with pytest.raises(ValueError, match="threshold of zero"):
        nights_promised(Superiority(0.0), 48)


@pytest.mark.parametrize(
    ("test", "effect", "expected"),
    [
        (Superiority(0.1), 0.3, "supported"),
        (Superiority(0.1), 0.0, "refuted"),
        (NonInferiority(0.05), 0.0, "supported"),
        (NonInferiority(0.05), 0.2, "refuted"),
        (Equivalence(0.1), 0.0, "supported"),
        (Equivalence(0.1), 0.25, "refuted"),
        (Equivalence(0.1), -0.25, "refuted"),
        (Equivalence(0.1), 0.1, "inconclusive"),
    ],
)
def test_each_test_is_decided_on_its_own_side(test, effect, expected):
    rng = np.random.default_rng(3)
    found = replay(test.kind, test.limit, (-1, 1), three_valued(rng, (20, 100), effect, 0.5))
    assert found.verdict(0.05).value == expected
    if expected != "inconclusive":
        assert found.peaks["support" if expected == "supported" else "refute"] > math.log(20)


def test_one_side_of_an_equivalence_is_not_enough():
    found = replay("equivalence", 0.1, (-1, 1), three_valued(np.random.default_rng(4), (20, 100), 0.12, 0.5))
    above, below = (process.log_e for process in found.supporting)
    assert above > math.log(20) > below == found.log_e("support")


def test_a_mixture_is_made_of_processes_over_stretches_of_nights():
    """Against its definition: every process written out, stopped when its stretch ends, weighted, and added."""
    rng = np.random.default_rng(8)
    nights = [three_valued(rng, 10, 0.3, 0.6) / 2 + 0.5 for _ in range(13)]
    found = Betting(0.55)
    for night in nights:
        found.update(night)
    total = math.exp(log_bets(np.concatenate(nights), 0.55)[0].sum()) / 2
    for start in range(1, 2000):
        lifetime = 2 * max(power for power in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if start % power == 0)
        values = np.concatenate([[], *nights[start - 1 : start - 1 + lifetime]])
        total += math.exp(log_bets(values, 0.55)[0].sum()) / (start * (start + 1)) / 2
    total += 1 / 2000 / 2  # those that begin later still
    assert math.exp(found.log_e) == pytest.approx(total, rel=1e-9)
    assert len(found.processes) <= 2 * math.log2(13) + 3 and found.n == 130


@pytest.mark.parametrize("after", [30, 100])
def test_a_drop_is_caught_within_the_promised_nights_though_many_were_good(after):
    """From the first night on the effect is 0.4; then it is gone. One process over all nights would still be waiting."""
    rng, test, alpha, clusters, runs = np.random.default_rng(9), Superiority(0.1), 0.05 / 7, 60, 30
    promised = nights_promised(test, clusters, after=after, deviation=0.5, alpha=alpha)
    assert nights_promised(test, clusters, deviation=0.5, alpha=alpha) < promised < 100
    caught = slow = 0
    for _ in range(runs):
        good, gone = three_valued(rng, (after, clusters), 0.4, 0.5), three_valued(rng, (promised, clusters), 0.0, 0.5)
        found = replay("superiority", 0.1, (-1, 1), [*good, *gone])
        caught += found.peaks["refute"] >= math.log(1 / alpha)
        slow += found.refuting[0].processes[0][-1] >= math.log(1 / alpha)
    assert caught >= runs * 0.9 - 3 * math.sqrt(runs * 0.9 * 0.1) and slow < runs / 2


def test_a_year_without_an_effect_stays_so_with_processes_that_begin_every_night():
    """E of the whole mixture, at the null's worst case, looked at every night."""
    rng, runs, alpha = np.random.default_rng(10), 60, 0.05
    reached = 0
    for _ in range(runs):
        found, peak = Betting(0.55), 0.0
        for night in (three_valued(rng, (NIGHTS, 4), 0.1, 0.5) + 1) / 2:
            found.update(night)
            peak = max(peak, found.log_e)
        reached += peak >= math.log(1 / alpha)
    assert reached / runs <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_a_decision_stands_whatever_later_nights_say():
    rng = np.random.default_rng(5)
    found = replay("superiority", 0.1, (-1, 1), three_valued(rng, (1, 60), 0.35, 0.6))
    assert found.verdict(0.05).value == "supported"
    found.update(np.full(12, -1.0))
    assert found.log_e("support") < math.log(20) < found.peaks["support"] and found.verdict(0.05).value == "supported"


def test_evidence_goes_on_from_its_json_exactly():
    rng = np.random.default_rng(6)
    nights = [three_valued(rng, 50, 0.2, 0.6) for _ in range(6)]
    whole, parts = replay("equivalence", 0.1, (-1, 1), nights), Replication("equivalence", 0.1, (-1, 1))
    for night in nights:
        parts = Replication.from_dict(json.loads(json.dumps(parts.as_dict())))
        parts.update(night)
    assert parts.as_dict() == whole.as_dict() and parts.nights == 6 and parts.clusters == 300


def test_splitting_a_sequence_into_nights_does_not_change_the_process_over_all_of_them():
    x = three_valued(np.random.default_rng(7), 300, 0.2, 0.6)
    one, many = replay("superiority", 0.1, (-1, 1), [x]), replay("superiority", 0.1, (-1, 1), np.split(x, 60))
    first, second = (found.supporting[0].processes[0] for found in (one, many))
    assert first == pytest.approx(second) and one.clusters == many.clusters == 300


def test_a_night_is_its_cluster_means_in_the_order_of_their_names():
    values = night_values([1.0, 0.0, 0.5, -1.0], ["b", "a", "a", "c"])
    assert values.tolist() == [0.25, 1.0, -1.0]
    assert night_values([1.0, 0.0, 0.5, -1.0], ["b", "a", "b", "a"], [0, 0, 1, 1]).tolist() == [0.125]
    with pytest.raises(ValueError, match="4 effects and 1 cluster ids"):
        night_values([1.0, 0.0, 0.5, -1.0], ["b"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trend", 0.0, (-1, 1)), "a trend claim is no statement about a mean"),
        (("superiority", 0.1, None), "no stated range"),
        (("superiority", 1.0, (-1, 1)), "lies not inside the range"),
        (("equivalence", 0.1, (0, 1)), "lies not inside the range"),
    ],
)
def test_what_cannot_be_bet_on_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        Replication(*arguments)
