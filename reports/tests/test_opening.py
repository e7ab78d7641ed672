"""The first lines of a report say what the verdicts and their numbers say, for whatever a run holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from reports import markdown, page, summary
from reports.opening import GAINS, MORE, STATEMENTS
from reports.tests import sample_run

VERDICTS = ("supported", "refuted", "inconclusive", "invalid")


def entry(claim, verdict, where="", estimate=0.2, half=0.1, threshold=0.05, **details):
    """A record of any claim."""
    estimate = None if verdict == "invalid" else estimate
    made = sample_run.make("H1.necessity", verdict, estimate, half, params={"task": where} if where else {})
    return {**made, "claim_id": claim, "hypothesis": claim.split(".")[0], "threshold": threshold, "details": {name.replace("_", " "): value for name, value in details.items()}}


def opening(*entries):
    return summary.page(sample_run.identity(), list(entries))["sentences"]


def heads(n, of=48, **extra):
    return {"heads": [[0, number] for number in range(n)], "heads_that_see_the_image": of, **extra}


HORIZON = {"layer": 4, "depth": 6}


def test_what_holds_is_said_with_what_was_measured():
    assert opening(
        entry("H1.necessity", "supported", "color", 0.25, **heads(4)), entry("H1.necessity", "supported", "needle", 0.784, **heads(4)),
        entry("H1.sufficiency", "supported", "color", **heads(2)), entry("H1.sufficiency", "supported", "needle", **heads(9)),
        entry("H2.horizon", "supported", "color", **HORIZON), entry("H2.noninferior", "supported", "color", layer=3, depth=6),
        entry("H2.compute_flops", "supported", estimate=0.542), entry("H2.compute_latency", "supported", estimate=0.354),
        entry("H3.sft", "supported", "before", 0.1), entry("H3.sft", "supported", "more data", 0.157), entry("H3.retention", "supported", "color"),
    ) == [
        "H1 holds: taking the image from 4 of 48 heads costs 25 to 78 points and 2 to 9 heads are enough.",
        "H2 holds: all visual tokens can go from layer 4 of 6 on and the recipe saves 54 % of the operations and 35 % of the time.",
        "H3 holds: for training on the teacher's answers (+10 to +16 points).",
    ]  # fmt: skip


def test_where_it_does_not_is_named_with_its_verdict():
    of = {"color": "supported", "shape": "supported", "count": "refuted", "position": "inconclusive", "binding": "invalid"}
    assert opening(*(entry("H2.horizon", verdict, task, **HORIZON) for task, verdict in of.items())) == [
        "H2 holds in part: all visual tokens can go from layer 4 of 6 on (count refuted, position undecided, binding not testable)."
    ]
    of = dict.fromkeys(("a", "b", "c", "d"), "inconclusive")
    for held, said in ((["e"], "e only"), (["e", "f", "g"], "e, f and g only"), (["e", "f", "g", "h"], "in 4 of 8 cases")):
        found = opening(*(entry("H2.horizon", verdict, task, **HORIZON) for task, verdict in (of | dict.fromkeys(held, "supported")).items()))
        assert found == [f"H2 holds in part: all visual tokens can go from layer 4 of 6 on ({said})."]


def test_claims_with_the_same_exceptions_are_said_together_and_those_that_nothing_supports_last():
    of = {"color": "supported", "count": "inconclusive"}
    assert opening(
        *(entry("H1.necessity", verdict, task, **heads(4)) for task, verdict in of.items()),
        *(entry("H1.sufficiency", verdict, task, **heads(1)) for task, verdict in of.items()),
    ) == ["H1 holds in part: taking the image from 4 of 48 heads costs 20 points and 1 head is enough (count undecided)."]
    assert opening(
        entry("H1.necessity", "supported", **heads(4)),
        *(entry("H1.sufficiency", verdict, str(number), **heads(3)) for number, verdict in enumerate(("refuted", "refuted", "invalid"))),
    ) == ["H1 holds in part: taking the image from 4 of 48 heads costs 20 points; that 3 heads are enough is refuted in 2 cases and not testable in 1."]
    assert opening(entry("H2.horizon", "refuted", **HORIZON), entry("H2.compute_flops", "inconclusive", estimate=0.1, threshold=0.25)) == [
        "H2 is not supported: that all visual tokens can go from layer 4 of 6 on is refuted; that the recipe saves 25 % of the operations is undecided."
    ]


def test_ways_to_train_are_told_apart_by_what_they_gain():
    assert opening(
        entry("H3.sft", "supported", estimate=0.101), entry("H3.preference", "inconclusive", estimate=0.02, half=0.03),
        entry("H3.grounded_answers", "refuted", estimate=-0.06), entry("H3.head_informed", "invalid"),
    ) == [
        "H3 holds in part: for training on the teacher's answers (+10 points); not for grounded answers (−6 points); "
        "no measurable gain by preference tuning; not testable for head-informed tuning."
    ]  # fmt: skip
    surely = entry("H3.preference", "inconclusive", estimate=0.02, half=0.015)
    assert opening(surely, entry("H3.sft", "refuted", estimate=0.012)) == [
        "H3 is not supported: not for training on the teacher's answers (+1 point); undecided for preference tuning."
    ], "an interval above zero is more than nothing"
    some = opening(entry("H3.sft", "supported", "before", 0.1), entry("H3.sft", "inconclusive", "more data", 0.004))
    assert some == ["H3 holds in part: in some comparisons for training on the teacher's answers (0 to +10 points)."]


def test_a_number_that_a_record_lacks_is_not_made_up():
    missing = entry("H1.necessity", "supported", "shape", heads=[[0, 1]])
    found = opening(entry("H1.necessity", "supported", "color", **heads(4)), missing, entry("H1.sufficiency", "supported"), entry("H2.horizon", "supported", layer=4))
    assert found == [
        "H1 holds: taking the image from a few heads costs 20 points and few heads are enough.",
        "H2 holds: all visual tokens can go from three quarters of the depth on.",
    ]
    differing = opening(entry("H2.horizon", "supported", "a", **HORIZON), entry("H2.horizon", "supported", "b", layer=5, depth=6))
    assert differing == ["H2 holds: all visual tokens can go from layer 4 to 5 of 6 on."]


def test_other_claims_are_counted():
    others = [entry("H2.mine", "supported"), entry("H2.trend", "supported", "color"), entry("H2.trend", "refuted", "needle")]
    assert opening(*others) == ["H2 holds in part: 2 of 3 verdicts supported, 1 refuted."]
    assert opening(entry("H2.horizon", "supported", **HORIZON), *others) == [
        "H2 holds in part: all visual tokens can go from layer 4 of 6 on; 2 of 3 other verdicts supported, 1 refuted."
    ]
    assert opening(entry("H7.mine", "supported")) == ["H7 holds."]
    assert opening({**entry("H7.mine", "supported"), "tier": "exploratory"}) == ["H7 has exploratory claims only."]


def test_of_two_claims_the_one_that_says_more_is_spoken_of():
    half = entry("H2.noninferior", "supported", layer=3, depth=6)
    assert opening(half) == ["H2 holds: half of the visual tokens can go from layer 3 of 6 on."]
    assert opening(entry("H2.horizon", "supported", **HORIZON), half) == ["H2 holds: all visual tokens can go from layer 4 of 6 on."]
    assert opening(entry("H2.horizon", "refuted", **HORIZON), half) == [
        "H2 holds in part: half of the visual tokens can go from layer 3 of 6 on; that all visual tokens can go from layer 4 of 6 on is refuted."
    ]


SPOKEN_OF = ("H1.necessity", "H1.sufficiency", "H2.horizon", "H2.noninferior", "H2.compute_flops", "H2.compute_latency",
             "H3.sft", "H3.preference", "H3.grounded_answers", "H3.head_informed", "H1.other")  # fmt: skip


@pytest.mark.parametrize("claim", SPOKEN_OF)
def test_every_combination_of_verdicts_is_one_true_line(claim):
    """Of a claim's cases, and of a claim that stands beside it: holds only where all do, refuted only where all are, and no case is called supported that is not."""
    name = claim.split(".")[0]
    for first, second, beside in itertools.product(VERDICTS, repeat=3):
        cases = (entry(claim, first, "count"), entry(claim, second, "needle"))
        (said,) = opening(*cases, entry(f"{name}.trend", beside))
        found = [first, second, beside]
        whole = {"supported": "holds", "refuted": "is refuted", "inconclusive": "is undecided", "invalid": "could not be tested"}
        state = whole[first] if len(set(found)) == 1 else "holds in part" if "supported" in found else "is not supported"
        assert said.startswith((f"{name} {state}:", f"{name} {state}.")) and len(said) < 200 and said.count(name) == 1
        if len(set(found)) > 1:
            assert f"{int(beside == 'supported')} of 1 other verdicts supported" in said or f"{found.count('supported')} of 3 verdicts supported" in said
        if claim in SPOKEN_OF[:6] and state in ("holds in part", "is not supported"):
            for where, verdict in (("count", first), ("needle", second)):
                word = {"refuted": "refuted", "inconclusive": "undecided", "invalid": "not testable"}.get(verdict)
                assert word is None or word in said and (where in said or "that " in said), said


def test_what_is_spoken_of_is_declared():
    plan = (Path(__file__).resolve().parents[2] / "hypotheses" / "README.md").read_text()
    assert all(f"* **{claim}** (confirmatory)" in plan for claim in STATEMENTS | GAINS | MORE)


def test_it_is_the_beginning_of_the_page_and_of_a_job_s_summary(tmp_path):
    folder = sample_run.write(tmp_path, [entry("H2.horizon", "supported", "color", **HORIZON)], heads=False)
    line = "H2 holds: all visual tokens can go from layer 4 of 6 on."
    assert f'<p class="lede">{line}</p>' in page.render(folder).read_text()
    assert line in markdown.summary(folder)
