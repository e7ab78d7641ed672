"""The reproduce lane: identical, within the noise, drift, regression; what a baseline holds for; exit code 11."""

from __future__ import annotations

import json
import textwrap

import numpy as np
import pytest

from reports.nights import baselines
from vlm_core import stats

from .sample_nights import DROP, IDENTITY, LOSS, entry
from .suites import EXPLORATORY, INCONCLUSIVE, REFUTED, SUPPORTED

pytest_plugins = ["pytester"]

class Lane:
    """A baseline file of one claim, and runs against it; ``bounds``: what one effect cannot leave."""

    def __init__(self, folder, claim=DROP, bounds=(-1.0, 1.0)):
        self.folder, self.claim, self.bounds = folder, claim, bounds
        self.path = folder / "kept" / "baseline.jsonl"
        self.run, self.runs = folder / "run", 0

    def update(self, effect, reason="made", **identity):
        self.runs += 1
        return baselines.update(self.path, {**IDENTITY, "name": f"run-{self.runs}", **identity}, [entry(self.run, self.claim, effect, bounds=self.bounds)], self.run, reason)

    def compare(self, effect, claim=None, **identity):
        made = entry(self.run, claim or self.claim, effect, bounds=self.bounds)
        return baselines.compare(baselines.load(self.path), {**IDENTITY, **identity}, made, self.run)


def answers(margins):
    return (np.asarray(margins) > 0).astype(float)


def test_the_same_effects_are_identical_and_one_bit_is_not(tmp_path):
    lane, effect = Lane(tmp_path), np.random.default_rng(0).uniform(0, 1, 100)
    assert lane.update(effect) == 1
    assert lane.compare(effect)["state"] == "identical"
    assert lane.compare(np.nextafter(effect, 1))["state"] == "drift"


def test_a_supported_claim_that_falls_is_a_regression_without_any_noise_measured(tmp_path):
    lane = Lane(tmp_path)
    lane.update(np.r_[np.ones(50), np.zeros(50)])
    found = lane.compare(np.r_[np.ones(12), np.zeros(88)])
    assert found["state"] == "regression" and "supported in the baseline of 2026-01-01, inconclusive now" in found["sentence"]
    assert lane.compare(np.zeros(100))["state"] == "regression"


def test_a_claim_that_was_never_supported_cannot_fall(tmp_path):
    lane = Lane(tmp_path)
    lane.update(np.r_[np.ones(12), np.zeros(88)])
    assert lane.compare(np.zeros(100))["state"] == "drift"


def test_items_that_moved_against_the_claim_beyond_the_noise_are_a_regression_though_the_verdict_stays(tmp_path):
    lane, effect = Lane(tmp_path), np.r_[np.ones(70), np.zeros(130)]
    worse, better = effect.copy(), effect.copy()
    worse[:20], better[70:90] = 0, 1
    lane.update(effect)
    unmeasured = lane.compare(worse)
    assert unmeasured["state"] == "drift" and "--claims-update-baseline=A/A" in unmeasured["sentence"]
    lane.update(effect, "A/A")
    found = lane.compare(worse)
    assert found["state"] == "regression" and found["worse"] == pytest.approx(0.1) and 0.04 < found["lower"] < 0.1 and found["floor"] == 0
    assert lane.compare(better)["state"] == "drift"
    noisy = effect.copy()
    noisy[:30] = 0
    lane.update(noisy, "A/A")
    assert lane.compare(worse)["state"] == "within noise"


@pytest.mark.parametrize(
    ("then", "now", "state"),
    [
        ((-1.0, 1.0), (-1.0, 1.0), "drift"),
        ((0.0, 1.0), (0.0, 1.0), "regression"),
        ((0.0, 1.0), (-1.0, 1.0), "drift"),
        ((-1.0, 1.0), (0.0, 1.0), "drift"),
        (None, None, "regression"),
    ],
)
def test_few_items_that_tip_are_held_against_what_an_unseen_one_could_do(tmp_path, then, now, state):
    """Five items of sixty fell by 1 and none rose. Where one could rise by 2, as differences of answers can, that is not surely worse; where it cannot, it is."""
    lane, effect = Lane(tmp_path, bounds=then), np.r_[np.ones(30), np.zeros(30)]
    for reason in ("made", "A/A"):
        lane.update(effect, reason)
    lane.bounds = now
    found = lane.compare(np.r_[np.zeros(5), np.ones(25), np.zeros(30)])
    assert found["state"] == state and found["worse"] == pytest.approx(5 / 60) and (found["lower"] > 0) == (state == "regression")


def test_against_a_loss_more_is_worse(tmp_path):
    lane, effect = Lane(tmp_path, LOSS), np.zeros(400)
    more = effect.copy()
    more[:12] = 1
    for reason in ("made", "A/A"):
        lane.update(effect, reason)
    assert lane.compare(more)["state"] == "regression"
    assert lane.compare(-more)["state"] == "drift"


@pytest.mark.parametrize("noise", [0.0, 1e-3], ids=["runs of the same code agree", "runs of the same code differ"])
def test_an_upgrade_that_moves_numbers_only_in_the_noise_does_not_fire(tmp_path, noise):
    """Answers are margins above zero; an upgrade adds rounding noise to each margin, and tips some over. A real loss of 8 points is found."""
    rng, fired, found_real, runs = np.random.default_rng(0), 0, 0, 100
    for run in range(runs):
        lane, margins = Lane(tmp_path / str(run)), rng.normal(0.3, 0.5, 300)
        lane.update(answers(margins))
        lane.update(answers(margins + rng.normal(0, noise, 300)), "A/A")
        tipped = answers(margins + rng.normal(0, 5e-3, 300))
        fired += lane.compare(tipped, versions={"torch": "2.13"})["state"] == "regression"
        if run < 5:
            found_real += lane.compare(answers(margins - 0.2), versions={"torch": "2.13"})["state"] == "regression"
    print(f"{fired} of {runs} upgrades fired")  # 0 of 200 in a longer trial of either kind
    assert fired <= DROP.alpha * runs and found_real == 5


def test_a_shift_of_everything_by_a_rounding_error_does_not_fire(tmp_path):
    lane, effect = Lane(tmp_path), np.random.default_rng(0).uniform(0.2, 0.6, 200)
    for reason in ("made", "A/A"):
        lane.update(effect, reason)
    moved = np.random.default_rng(1).uniform(0.5, 1.5, 200)
    found = lane.compare(effect - 1e-7 * moved)
    assert found["state"] == "drift" and found["lower"] > 0
    assert lane.compare(effect - 0.01 * moved)["state"] == "regression"


def test_what_a_baseline_holds_for(tmp_path):
    lane, effect = Lane(tmp_path), np.r_[np.ones(50), np.zeros(50)]
    lane.update(effect)
    others = {
        "subject": {"subject": {**IDENTITY["subject"], "weights": "v" * 64}},
        "data": {"data": {"confirmation": "beef"}},
        "platform": {"machine": {**IDENTITY["machine"], "instructions": "avx512f"}},
    }
    for name, change in [*others.items(), ("data", {"seed": 1}), ("data", {"profile": "smoke"})]:
        found = lane.compare(effect, **change)
        assert found["state"] == "no baseline" and found["sentence"] == f"the baseline is of another {name}"
    for kept in ({"data": {"confirmation": "c0ffee", "baseline": []}}, {"versions": {}}, {"commit": None}):
        assert lane.compare(effect, **kept)["state"] == "identical"


def test_a_changed_declaration_voids_the_entry_and_says_so(tmp_path):
    lane, effect = Lane(tmp_path), np.r_[np.ones(50), np.zeros(50)]
    lane.update(effect)
    other = stats.Claim("H1.one", "It costs ten points, really.", "accuracy lost per item", stats.Superiority(0.1), "here")
    found = lane.compare(np.zeros(100), claim=other)
    assert found["state"] == "voided" and DROP.hash in found["sentence"] and other.hash in found["sentence"]


def test_instances_of_one_claim_are_kept_apart(suite):
    """The two trade places: each is worse or better than its own baseline, which neither would see of the other's."""
    claim = """
    @pytest.mark.claim(ONE)
    @pytest.mark.parametrize("task", ["color", "shape"])
    def test_it(evidence, task):
        evidence.decide(ONE, effects({"color": COLOR, "shape": SHAPE}[task]), clusters=clusters())
    """
    claim = textwrap.dedent(claim)
    suite.write(claim.replace("COLOR", "0.9").replace("SHAPE", "0.12"))
    assert suite.run("--claims-baseline=base.jsonl", "--claims-update-baseline=first").ret == 10
    entries = [json.loads(line) for line in (suite.pytester.path / "base.jsonl").read_text().splitlines()]
    assert [(entry_["params"], entry_["estimate"]) for entry_ in entries] == [({"task": "color"}, 0.9), ({"task": "shape"}, 0.12)]
    assert len({entry_["id"] for entry_ in entries}) == 2
    for color, shape, code, states in (("0.9", "0.12", 10, ["identical"] * 2), ("0.12", "0.9", 11, ["regression", "drift"])):
        suite.write(claim.replace("COLOR", color).replace("SHAPE", shape))
        assert suite.run("--claims-baseline=base.jsonl").ret == code
        assert [entry_["reproduced"]["state"] for entry_ in suite.latest()[1]] == states


def test_the_newest_entry_counts_and_the_older_ones_stay(tmp_path):
    lane, first, second = Lane(tmp_path), np.r_[np.ones(50), np.zeros(50)], np.r_[np.ones(40), np.zeros(60)]
    lane.update(first)
    there = lane.path.read_bytes()
    lane.update(first, "A/A")
    lane.update(second, "fewer heads are taken")
    assert lane.path.read_bytes().startswith(there) and [json.loads(line)["reason"] for line in lane.path.read_text().splitlines()] == [
        "made", "A/A", "fewer heads are taken",
    ]  # fmt: skip
    assert lane.compare(second)["state"] == "identical"
    assert lane.compare(second)["floor"] is None, "the noise was that of the older entry"


@pytest.mark.parametrize("change", [{"commit": "def"}, {"versions": {"torch": "2.13"}}])
def test_an_a_a_run_is_of_the_same_code(tmp_path, change):
    lane, effect = Lane(tmp_path), np.r_[np.ones(50), np.zeros(50)]
    lane.update(effect)
    with pytest.raises(ValueError, match="this is not the code of its baseline"):
        lane.update(effect, "A/A", **change)
    assert len(lane.path.read_text().splitlines()) == 1


def test_a_baseline_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "baseline.jsonl"
    path.write_text('{"kind": "baseline"')
    with pytest.raises(ValueError, match="line 1, is no JSON object"):
        baselines.load(path)


def test_options_of_the_baseline_are_checked(suite):
    suite.write(SUPPORTED)
    for arguments, sentence in (
        (["--claims-baseline=gone.jsonl"], "gone.jsonl was not found: --claims-update-baseline=REASON makes it"),
        (["--claims-update-baseline=why"], "--claims-update-baseline needs the file"),
        (["--claims-baseline=b.jsonl", "--claims-update-baseline= "], "takes the reason for it"),
        (["--claims-baseline=b.jsonl", "--claims-update-baseline=A/A"], "holds no baseline yet"),
    ):
        result = suite.run(*arguments)
        assert result.ret == 4 and sentence in result.stderr.str()


def test_a_regression_ends_with_11_and_is_said(suite):
    fallen = SUPPORTED.replace("effects(0.5)", "effects(0.12)")
    suite.write(SUPPORTED)
    assert suite.run("--claims-baseline=base.jsonl", "--claims-update-baseline=first").ret == 0
    again = suite.run("--claims-baseline=base.jsonl", "-n", "1")
    assert again.ret == 0
    again.stdout.fnmatch_lines(["against the baseline: 1 identical"])
    suite.write(fallen)
    result = suite.run("--claims-baseline=base.jsonl")
    assert result.ret == 11
    result.stdout.fnmatch_lines(["against the baseline: 1 regression", "regression: H1.one: supported in the baseline of *, inconclusive now"])
    run, (entry_,) = suite.latest()
    assert run["exit_code"] == 11 and entry_["reproduced"]["state"] == "regression"
    assert suite.run("--claims-baseline=base.jsonl", "--claims-update-baseline=it is so now").ret == 10
    assert suite.run("--claims-baseline=base.jsonl").ret == 10


def test_a_run_with_nothing_to_compare_with_says_so_and_becomes_the_baseline_where_that_is_asked(suite):
    """Another platform is one that the stored entries do not name; what is compared at all is never replaced by itself."""
    path, asked = suite.pytester.path / "base.jsonl", ("--claims-baseline=base.jsonl", "--claims-update-baseline=none yet")
    suite.write(SUPPORTED, EXPLORATORY)
    first = suite.run(*asked)
    first.stdout.fnmatch_lines(["2 claims had nothing to compare with: no baseline holds this claim", "baseline: 2 claims added to *"])
    there = path.read_text()
    suite.run(*asked).stdout.fnmatch_lines(["against the baseline: 2 identical"])
    assert path.read_text() == there
    path.write_text(there.replace('"platform": "', '"platform": "another '))
    elsewhere = path.read_text()
    silent = suite.run("--claims-baseline=base.jsonl")
    silent.stdout.fnmatch_lines(["2 claims had nothing to compare with: the baseline is of another platform"])
    assert silent.ret == 0 and path.read_text() == elsewhere != there
    suite.run(*asked).stdout.fnmatch_lines(["2 claims had nothing to compare with: the baseline is of another platform", "baseline: 2 claims added to *"])
    both = path.read_text()
    assert both.startswith(elsewhere) and [json.loads(line)["reason"] for line in both.splitlines()] == ["none yet"] * 4
    suite.write(SUPPORTED.replace("effects(0.5)", "effects(0.12)"), EXPLORATORY, INCONCLUSIVE)
    fallen = suite.run(*asked, "--claims-inconclusive=warn")
    fallen.stdout.fnmatch_lines(["against the baseline: 1 identical, 1 regression, 1 no baseline", "1 claim had nothing to compare with: no baseline holds this claim"])
    assert fallen.ret == 11 and path.read_text() == both, "a regression does not become the baseline because a claim is new"


def test_what_is_worse_than_a_regression_is_said_by_the_exit_code_first(suite):
    base = "--claims-baseline=base.jsonl"
    suite.write(SUPPORTED, EXPLORATORY)
    suite.run(base, "--claims-update-baseline=first")
    suite.write(REFUTED, SUPPORTED.replace("effects(0.5)", "effects(0.12)"))
    refuted = suite.run(base)
    assert refuted.ret == 1, "a refuted claim"
    refuted.stdout.fnmatch_lines(["1 claim of the baseline not run: H1.look"])
    suite.write(SUPPORTED.replace("effects(0.5)", "effects(0.12)"), INCONCLUSIVE)
    assert suite.run(base, "--claims-inconclusive=warn").ret == 11
    suite.write(SUPPORTED, EXPLORATORY.replace("effects(0.0)", "effects(0.3)"))
    assert suite.run(base).ret == 0, "an exploratory claim only drifts"


def test_a_run_with_missing_evidence_does_not_become_the_baseline(suite):
    suite.write(SUPPORTED, "def test_breaks():\n    import os\n    os._exit(3)\n")
    result = suite.run("-n", "1", "--max-worker-restart", "0", "--claims-baseline=base.jsonl", "--claims-update-baseline=first")
    assert result.ret == 3 and not (suite.pytester.path / "base.jsonl").exists()
    result.stdout.fnmatch_lines(["evidence is incomplete: nothing was added to the baseline or the history"])
