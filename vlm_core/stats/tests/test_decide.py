"""The verdict table, line by line: every way to be supported, refuted, inconclusive or invalid."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_core.stats import Baseline, Claim, Control, Equivalence, NonInferiority, Superiority, Trend, Verdict, decide

DROP = Claim("H1.necessity", "It costs 10 points.", "paired drop", Superiority(0.10), "a paper")
LOSS = replace(DROP, id="H2.noninferior", test=NonInferiority(0.05))
SAME = replace(DROP, id="H3.uses_image", test=Equivalence(0.10))
RISE = replace(DROP, id="H2.trend", test=Trend())
GAIN = replace(DROP, id="H3.sft", direction="gain", min_seeds=3)

N = 100
NOISE = np.random.default_rng(0).normal(0, 0.1, N)
NOISE -= NOISE.mean()


def around(mean, claim=DROP, **options):
    """Decide a claim from 100 clusters whose mean effect is exactly ``mean`` and whose standard error is about 0.01."""
    return decide(claim, mean + NOISE, clusters=range(N), **options)


@pytest.mark.parametrize(
    ("claim", "mean", "verdict", "words"),
    [
        (DROP, 0.20, "supported", "lies above the declared 0.1"),
        (DROP, 0.10, "inconclusive", "includes the declared 0.1"),
        (DROP, 0.00, "refuted", "lies below the declared 0.1"),
        (LOSS, 0.00, "supported", "lies below the declared margin 0.05"),
        (LOSS, 0.05, "inconclusive", "includes the declared margin 0.05"),
        (LOSS, 0.15, "refuted", "lies above the declared margin 0.05"),
        (SAME, 0.00, "supported", "lies within the declared margin ±0.1"),
        (SAME, 0.10, "inconclusive", "crosses the declared margin ±0.1"),
        (SAME, -0.10, "inconclusive", "crosses the declared margin ±0.1"),
        (SAME, 0.20, "refuted", "lies outside the declared margin ±0.1"),
        (SAME, -0.20, "refuted", "lies outside the declared margin ±0.1"),
        (RISE, 0.10, "supported", "lies above zero"),
        (RISE, 0.00, "inconclusive", "includes zero"),
        (RISE, -0.10, "refuted", "lies below zero"),
    ],
)
def test_the_verdict_table(claim, mean, verdict, words):
    decision = around(mean, claim, p_value=0.001 if claim is RISE else None)
    assert decision.verdict.value == verdict
    assert words in decision.reason
    assert decision.estimate == pytest.approx(mean)
    assert decision.lower < mean < decision.upper


def test_the_reason_carries_the_numbers():
    decision = around(0.20)
    assert decision.reason == f"the interval {decision.lower:.2f} to {decision.upper:.2f} lies above the declared 0.1"


def test_the_reason_never_rounds_a_bound_onto_the_limit():
    effect = np.tile([0.1012, 0.1013], 50)
    assert "0.101 to 0.101 lies above" in decide(DROP, effect, clusters=range(100)).reason


def test_symbols_differ_without_colour():
    assert [verdict.symbol for verdict in Verdict] == ["●", "✕", "◐", "–"]


def test_larger_families_need_stronger_evidence():
    alone, crowded = around(0.12), around(0.12, family_size=20)
    assert alone.verdict is Verdict.SUPPORTED
    assert crowded.verdict is Verdict.INCONCLUSIVE
    assert crowded.lower < alone.lower and crowded.upper > alone.upper
    assert (alone.confidence, crowded.confidence) == pytest.approx((0.9, 0.995))
    assert crowded.p_value == pytest.approx(alone.p_value, rel=0.1)


@pytest.mark.parametrize(("claim", "mean"), [(DROP, 0.121), (LOSS, 0.03), (SAME, 0.08), (SAME, -0.08)])
def test_p_value_and_interval_agree(claim, mean):
    p = around(mean, claim).p_value
    assert 1e-4 < p < 0.05
    barely, not_quite = replace(claim, alpha=1.1 * p), replace(claim, alpha=0.9 * p)
    assert around(mean, barely).verdict is Verdict.SUPPORTED
    assert around(mean, not_quite).verdict is Verdict.INCONCLUSIVE


def test_a_handed_in_p_value_is_a_second_condition():
    supported = around(0.20, RISE, p_value=0.01)
    assert supported.verdict is Verdict.SUPPORTED
    assert (supported.p_value, supported.given_p_value) == (0.01, 0.01)
    unordered = around(0.20, RISE, p_value=0.06)
    assert unordered.verdict is Verdict.INCONCLUSIVE
    assert "p = 0.06 of its own test is not below 0.05" in unordered.reason
    assert around(0.20, p_value=0.06).verdict is Verdict.INCONCLUSIVE
    assert around(0.00, p_value=0.06).verdict is Verdict.REFUTED
    assert around(0.20, RISE, p_value=0.01, family_size=10).verdict is Verdict.INCONCLUSIVE


def test_a_condition_that_is_not_met_keeps_a_claim_from_support_and_from_nothing_else():
    met = Control("Monte-Carlo p", "condition", True, 0.01, "below 0.05")
    unmet = Control("Monte-Carlo p", "condition", False, 0.12, "below 0.05")
    assert around(0.20, controls=[met]).verdict is Verdict.SUPPORTED
    kept = around(0.20, controls=[met, unmet])
    assert kept.verdict is Verdict.INCONCLUSIVE
    assert kept.reason.endswith("lies above the declared 0.1, but 'Monte-Carlo p' is not met (expected below 0.05, was 0.12)")
    assert around(0.00, controls=[unmet]).verdict is Verdict.REFUTED
    assert "is not met" not in around(0.00, controls=[unmet]).reason
    assert kept.p_value == around(0.20).p_value and kept.given_p_value is None


def test_what_a_control_has_to_say_is_said_with_the_verdict():
    said = Control("tasks", "positive", True, 0.9, "most", "left out: binding (R² 0.52)")
    decision = around(0.20, controls=[said, Control("others", "info", False, None, "", "left out: binding (R² 0.52)")])
    assert decision.verdict is Verdict.SUPPORTED
    assert decision.reason.endswith("lies above the declared 0.1; left out: binding (R² 0.52)")
    assert around(0.0, controls=[said]).reason.endswith("; left out: binding (R² 0.52)")


def test_a_missing_effect_is_invalid_for_the_reason_given():
    decision = decide(DROP, None, missing="two heads localise, three are compared")
    assert decision.verdict is Verdict.INVALID and decision.reason == "two heads localise, three are compared"


def test_a_trend_needs_the_p_value_of_an_ordered_test():
    with pytest.raises(ValueError, match="page_p"):
        around(0.2, RISE)


@pytest.mark.parametrize("p_value", [float("nan"), 1.5, -0.1])
def test_an_impossible_p_value_is_invalid(p_value):
    decision = around(0.2, RISE, p_value=p_value)
    assert decision.verdict is Verdict.INVALID
    assert "not a number between 0 and 1" in decision.reason


# Rows that cannot be read


@pytest.mark.parametrize(
    ("effect", "clusters", "seeds", "words"),
    [
        (np.r_[np.nan, NOISE[1:]], range(N), None, "1 of 100 effects are NaN"),
        (np.r_[np.inf, NOISE[1:]], range(N), None, "1 of 100 effects are NaN or infinite"),
        ([None] + [0.1] * (N - 1), range(N), None, "1 of 100 effects are NaN"),
        (NOISE, range(N - 1), None, "unmatched pairs: 100 effects but 99 cluster ids"),
        (NOISE, [None] + ["a"] * (N - 1), None, "1 of 100 items have no cluster id"),
        (NOISE, [np.nan] + [1.0] * (N - 1), None, "1 of 100 items have no cluster id"),
        (NOISE, range(N), range(3), "unmatched pairs: 100 effects but 3 seed ids"),
        (NOISE, range(N), [None] * N, "have no seed id"),
        (NOISE, range(N), [0] * 50 + [1] * 50, "not measured on the same items"),
        (NOISE.reshape(10, 10), range(N), None, "must have one dimension"),
        ([], [], None, "there are no items"),
        (NOISE + 3, range(N), None, "outside the stated bounds -1 to 1"),
    ],
)
def test_unreadable_rows_are_invalid(effect, clusters, seeds, words):
    decision = decide(DROP, effect, clusters=clusters, seeds=seeds)
    assert decision.verdict is Verdict.INVALID
    assert words in decision.reason
    assert decision.estimate is None and decision.p_value is None


@pytest.mark.parametrize("name", ["clusters", "seeds"])
def test_series_with_different_indexes_are_unmatched(name):
    effect = pd.Series(0.2 + np.tile(NOISE, 3))
    ids = {"clusters": pd.Series(np.tile(np.arange(N), 3)), "seeds": pd.Series(np.repeat(range(3), N))}
    assert decide(DROP, effect, **ids).verdict is Verdict.SUPPORTED
    ids[name] = ids[name].iloc[::-1]
    decision = decide(DROP, effect, **ids)
    assert decision.verdict is Verdict.INVALID
    assert f"is not the index of the {name}" in decision.reason


# Numbers that may not speak


def test_fewer_clusters_than_declared_are_invalid():
    decision = decide(DROP, 0.5 + NOISE[:29], clusters=range(29))
    assert decision.verdict is Verdict.INVALID
    assert "29 clusters (scene), fewer than the 30 declared" in decision.reason
    assert decision.estimate is not None


def test_many_items_of_few_scenes_are_invalid():
    assert decide(DROP, 0.5 + NOISE, clusters=np.arange(N) // 10).verdict is Verdict.INVALID


def seeded(means):
    k = len(means)
    effect = (np.asarray(means)[:, None] + NOISE).ravel()
    return {"effect": effect, "clusters": np.tile(np.arange(N), k), "seeds": np.repeat(np.arange(k), N)}


def test_fewer_seeds_than_declared_are_invalid():
    two = decide(GAIN, **seeded([0.5, 0.5]))
    assert two.verdict is Verdict.INVALID
    assert "2 seeds, fewer than the 3 declared" in two.reason
    none = decide(GAIN, 0.5 + NOISE, clusters=range(N))
    assert "1 seed, fewer than the 3 declared" in none.reason


def test_seeds_that_disagree_are_inconclusive_whatever_the_items_say():
    assert decide(GAIN, **seeded([0.30, 0.31, 0.32])).verdict is Verdict.SUPPORTED
    decision = decide(GAIN, **seeded([0.05, 0.30, 0.58]))
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert "more seeds might" in decision.reason
    assert decision.n_needed is None
    assert (decision.n_items, decision.n_clusters, decision.n_seeds) == (N, N, 3)


@pytest.mark.parametrize("kind", ["negative", "positive", "floor", "ceiling", "placebo"])
def test_a_failed_control_overrules_the_numbers(kind):
    decision = around(0.3, controls=[Control("random heads", kind, False, 0.12, "below 0.05")])
    assert decision.verdict is Verdict.INVALID
    assert decision.reason == f"the {kind} control 'random heads' failed: expected below 0.05, was 0.12"
    assert decision.lower > 0.1


def test_passed_and_informative_controls_do_not():
    controls = [Control("a", "negative", True, 0.0, "0"), Control("b", "info", False, None, "anything")]
    decision = around(0.3, controls=iter(controls))
    assert decision.verdict is Verdict.SUPPORTED
    assert decision.controls == tuple(controls)


def test_a_control_of_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        Control("a", "vague", True, 0.0, "0")


@pytest.mark.parametrize(
    ("claim", "mean", "baseline", "words"),
    [
        (DROP, 0.20, Baseline(0.33, 0.25, 0.20), "no room to drop: accuracy 0.33 is 0.08 above the blind floor 0.25"),
        (DROP, 0.20, Baseline(0.33, 0.10, 0.25), "above the chance 0.25"),
        (LOSS, 0.00, Baseline(0.28, 0.25, 0.20), "no room to drop"),
        (SAME, 0.00, Baseline(0.28, 0.25, 0.20), "no room to drop"),
        (replace(DROP, test=Superiority(0.0)), 0.20, Baseline(0.25, 0.25, 0.2), "no room to drop"),
        (replace(DROP, direction="gain"), 0.20, Baseline(0.95, 0.25, 0.2), "no room to gain: accuracy 0.95 leaves 0.05"),
        (DROP, 0.20, Baseline(float("nan"), 0.25, 0.2), "the baseline holds a NaN"),
    ],
)
def test_a_model_without_room_to_move_is_no_evidence(claim, mean, baseline, words):
    decision = around(mean, claim, baseline=baseline)
    assert decision.verdict is Verdict.INVALID
    assert words in decision.reason


@pytest.mark.parametrize(
    ("claim", "mean", "baseline"),
    [
        (DROP, 0.20, Baseline(0.9, 0.25, 0.2)),
        (DROP, 0.20, Baseline(0.3, 0.2, 0.1)),
        (LOSS, 0.00, Baseline(0.9, 0.25, 0.2)),
        (replace(DROP, direction="gain"), 0.20, Baseline(0.25, 0.25, 0.2)),
    ],
)
def test_a_model_with_room_is_judged(claim, mean, baseline):
    assert around(mean, claim, baseline=baseline).verdict is Verdict.SUPPORTED


def test_every_objection_is_named():
    reason = around(
        0.3, controls=[Control("a", "floor", False, None, "x")], baseline=Baseline(0.3, 0.29, 0.2)
    ).reason
    assert "'a' failed" in reason and "no room to drop" in reason


# Effects that do not vary


def test_no_loss_at_all_supports_with_enough_clusters_and_not_with_few():
    many, few = decide(LOSS, np.zeros(59), clusters=range(59)), decide(LOSS, np.zeros(58), clusters=range(58))
    assert many.verdict is Verdict.SUPPORTED
    assert few.verdict is Verdict.INCONCLUSIVE and few.underpowered and few.n_needed == 59
    assert "0 of 59 clusters deviating" in many.method
    assert 0 < many.p_value < 0.05 < few.p_value


def test_a_constant_effect_is_judged_by_what_could_have_been_missed():
    assert decide(DROP, np.full(60, 0.5), clusters=range(60)).verdict is Verdict.SUPPORTED
    assert decide(DROP, np.full(30, 0.15), clusters=range(30)).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("claim", [DROP, LOSS, SAME])
def test_a_constant_effect_without_bounds_is_invalid(claim):
    decision = decide(claim, np.full(60, 0.2), clusters=range(60), bounds=None)
    assert decision.verdict is Verdict.INVALID
    assert "zero variance where variance is needed" in decision.reason


def test_a_constant_trend_is_invalid():
    decision = decide(RISE, np.full(60, 0.2), clusters=range(60), p_value=0.001)
    assert decision.verdict is Verdict.INVALID
    assert "zero variance" in decision.reason


def test_a_trend_may_leave_the_bounds_of_an_accuracy():
    assert decide(RISE, 3 + NOISE, clusters=range(N), p_value=0.001).verdict is Verdict.SUPPORTED


def test_unbounded_effects_are_judged_when_they_vary():
    assert decide(DROP, 3 + NOISE, clusters=range(N), bounds=None).verdict is Verdict.SUPPORTED


# Power


def test_an_underpowered_claim_says_so_and_what_it_would_take():
    decision = decide(DROP, 0.1 + 5 * NOISE, clusters=range(N), bounds=None)
    assert decision.verdict is Verdict.INCONCLUSIVE and decision.underpowered
    assert decision.mde > 0.1
    assert decision.n_needed > N
    assert f"about {decision.n_needed} clusters would do" in decision.reason


def test_a_powerful_sample_next_to_the_limit_is_not_underpowered():
    decision = around(0.10)
    assert decision.verdict is Verdict.INCONCLUSIVE and not decision.underpowered
    assert decision.mde == pytest.approx((1.66 + 0.845) * 0.1 / np.sqrt(N), rel=0.1)


def test_a_limit_of_zero_asks_for_no_number_of_clusters():
    decision = around(0.0, replace(DROP, test=Superiority(0.0)))
    assert decision.n_needed is None and not decision.underpowered


# The record


def plain(value):
    """Every leaf is exactly a builtin type."""
    if type(value) is dict:
        return all(type(key) is str and plain(item) for key, item in value.items())
    if type(value) is list:
        return all(plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize(
    "decision",
    [
        around(0.2, baseline=Baseline(np.float32(0.9), np.float64(0.2), 0.1)),
        around(0.2, controls=[Control("a", "info", np.bool_(True), np.float64("nan"), "x")], family_size=np.int64(3)),
        around(0.2, RISE, p_value=np.float64(0.01)),
        decide(DROP, [np.nan] * 40, clusters=range(40), p_value=float("inf")),
        decide(GAIN, **seeded([0.1, 0.2, 0.3])),
        decide(LOSS, np.zeros(40), clusters=np.arange(40)),
    ],
)
def test_a_decision_survives_json(decision):
    record = decision.as_dict()
    assert plain(record)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_a_nan_control_value_becomes_none():
    record = around(0.2, controls=[Control("a", "info", True, float("nan"), "x")]).as_dict()
    assert record["controls"][0]["value"] is None


def test_a_family_has_members():
    with pytest.raises(ValueError, match="family_size must be at least 1"):
        around(0.2, family_size=0)


def test_the_same_rows_give_the_same_decision_and_another_seed_another_interval():
    assert around(0.2) == around(0.2)
    assert around(0.2).lower != around(0.2, rng=1).lower


# Deterministic facts, for any data

ORDER = [Verdict.REFUTED, Verdict.INCONCLUSIVE, Verdict.SUPPORTED]
DATA = st.tuples(st.integers(0, 2**20), st.sampled_from([30, 45]), st.sampled_from(["votes", "rare", "smooth"]))


def draw_effect(data):
    """Clustered effects within ±0.5, of the three kinds that take different routes to an interval."""
    seed, n, kind = data
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, n, size=2 * n)
    clusters[:n] = np.arange(n)
    effect = {
        "votes": rng.choice([-0.5, 0, 0.5], size=2 * n),
        "rare": np.where(rng.random(2 * n) < 0.05, 0.5, 0.0),
        "smooth": np.clip(rng.normal(0.1, 0.1, 2 * n), -0.5, 0.5),
    }[kind]
    return effect, clusters


@settings(max_examples=25, deadline=None, derandomize=True)
@given(DATA, st.floats(0, 0.5))
def test_a_larger_effect_never_gets_a_lower_verdict(data, shift):
    effect, clusters = draw_effect(data)
    before, after = (decide(DROP, x, clusters=clusters) for x in (effect, effect + shift))
    assert after.lower >= before.lower - 1e-9
    assert ORDER.index(after.verdict) >= ORDER.index(before.verdict)
    loss_before, loss_after = (decide(LOSS, x, clusters=clusters) for x in (effect, effect + shift))
    assert ORDER.index(loss_after.verdict) <= ORDER.index(loss_before.verdict)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(DATA, st.randoms(use_true_random=False))
def test_order_and_names_of_items_do_not_matter(data, random):
    effect, clusters = draw_effect(data)
    rows = list(range(effect.size))
    random.shuffle(rows)
    names = [f"scene {(clusters[row] * 7919) % 1009}" for row in rows]
    assert decide(DROP, effect[rows], clusters=names) == decide(DROP, effect, clusters=clusters)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(DATA)
def test_mirrored_effects_have_mirrored_intervals(data):
    effect, clusters = draw_effect(data)
    one, other = (decide(SAME, x, clusters=clusters) for x in (effect, -effect))
    width = one.upper - one.lower
    assert other.estimate == pytest.approx(-one.estimate, abs=1e-12)
    assert (-other.upper, -other.lower) == pytest.approx((one.lower, one.upper), abs=0.05 * width)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(DATA, st.integers(2, 50))
def test_a_larger_family_never_decides_more(data, family_size):
    effect, clusters = draw_effect(data)
    alone, crowded = (decide(DROP, effect, clusters=clusters, family_size=size) for size in (1, family_size))
    assert crowded.verdict in (alone.verdict, Verdict.INCONCLUSIVE)
