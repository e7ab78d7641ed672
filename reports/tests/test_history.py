"""The replicate lane: fresh shards only, evidence that goes on from night to night, nothing half written."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest

from reports import effects
from reports.nights import history, ledger
from vlm_core import stats

from . import sample_nights
from .suites import REFUTED

pytest_plugins = ["pytester"]

NIGHTLY = """
@pytest.mark.claim(ONE)
def test_nightly(claims_options, evidence):
    seed = claims_options.seed
    drawn = np.random.default_rng(seed).random(60)
    names = [f"confirmation-{seed}-{item:06d}-{seed * 1000 + item:016x}" for item in range(60)]
    evidence.about(data={"confirmation": f"hash{seed}"})
    evidence.decide(ONE, (drawn < SHARE).astype(float), clusters=names)
"""
SLOPE = """
from vlm_core.stats import Trend
RISING = Claim(id="H2.rising", sentence="It rises.", effect="slope", test=Trend(), source="here")

@pytest.mark.claim(RISING)
def test_slope(claims_options, evidence):
    evidence.decide(RISING, np.linspace(1, 2, 60), clusters=range(60), p_value=0.001)
"""


def nights(suite, count, *arguments, share=0.4):
    suite.write(NIGHTLY.replace("SHARE", str(share)), SLOPE)
    return [suite.run("--claims-history=nights", *arguments) for _ in range(count)]


def lines(suite):
    return ledger.read(suite.pytester.path / "nights" / "history.jsonl")


def test_evidence_goes_on_from_night_to_night_over_fresh_shards(suite):
    first, second, third = nights(suite, 3)
    assert (first.ret, second.ret, third.ret) == (0, 0, 0)
    kept = [line for line in lines(suite) if line["claim_id"] == "H1.one"]
    assert [line["night"] for line in kept] == [1, 2, 3] and len({line["seed"] for line in kept}) == 3
    assert [line["replicated"]["nights"] for line in kept] == [1, 2, 3]
    folder = suite.pytester.path / "nights"
    rows = [effects.load(folder, line["effects"]) for line in kept]
    again = stats.Replication("superiority", 0.1, (-1.0, 1.0))
    for night in rows:
        again.update(stats.night_values(night["effect"], night["clusters"]))
    assert kept[-1]["state"] == json.loads(json.dumps(again.as_dict())), "the evidence can be made again from what is kept"
    third.stdout.fnmatch_lines(["night 3 (seed 1000003):", "  H1.one: * by 3 nights: E is * for and * against, 20.0 decides"])
    _, records = suite.latest()
    assert "3 nights from " in (suite.runs / "latest" / "report.html").read_text(encoding="utf-8"), "a claim's nights are drawn beside its verdict"
    said = records[0]["replicated"]
    assert said["nights"] == 3 and said["log10_e_support"] == pytest.approx(again.log_e("support") / math.log(10))
    assert said["promised"] >= 1 and said["log10_needed"] == pytest.approx(math.log10(20))


def test_what_is_no_mean_over_items_is_kept_without_evidence(suite):
    nights(suite, 1)
    (line,) = [line for line in lines(suite) if line["claim_id"] == "H2.rising"]
    assert line["state"] is None and "a trend claim is no statement about a mean" in line["replicated"]["sentence"] and line["estimate"] is not None


def test_workers_draw_the_scenes_of_the_night(suite):
    (result,) = nights(suite, 1, "-n", "2")
    (line,) = [line for line in lines(suite) if line["claim_id"] == "H1.one"]
    assert result.ret == 0 and line["seed"] == 1000001 and line["data"] == {"confirmation": "hash1000001"}


def test_a_seed_that_a_night_has_used_is_refused_before_anything_runs(suite):
    nights(suite, 1, "--claims-seed=7")
    (again,) = nights(suite, 1, "--claims-seed=7")
    assert again.ret == 4 and "seed 7 was that of night 1: a night needs scenes that no other has used" in again.stderr.str()
    assert len(lines(suite)) == 2


def test_scenes_that_come_again_under_another_seed_are_refused_by_their_content(suite):
    nights(suite, 1)
    there = (suite.pytester.path / "nights" / "history.jsonl").read_bytes()
    suite.write(NIGHTLY.replace("SHARE", "0.4").replace("seed * 1000 +", "1000001000 + 30 +"))
    result = suite.run("--claims-history=nights")
    assert result.ret == 3
    result.stdout.fnmatch_lines(["evidence is incomplete: 30 scenes of tonight's 60 (*) served on night 1 already*"])
    assert (suite.pytester.path / "nights" / "history.jsonl").read_bytes() == there
    (folder,) = [folder for folder in suite.folders if folder.name.endswith("-incomplete")]
    assert suite.read(folder)[0]["exit_code"] == 3


def test_a_changed_declaration_starts_anew_and_says_so(suite):
    nights(suite, 2)
    suite.write(NIGHTLY.replace("SHARE", "0.4").replace("ONE", "OTHER"), 'OTHER = Claim(id="H1.one", sentence="Otherwise.", **ASKED)')
    source = (suite.pytester.path / "hypotheses" / "test_claims.py").read_text()
    head, declared = source.rsplit("\n", 1)
    (suite.pytester.path / "hypotheses" / "test_claims.py").write_text(head.replace("@pytest.mark.claim", declared + "\n@pytest.mark.claim", 1))
    result = suite.run("--claims-history=nights")
    result.stdout.fnmatch_lines(["warning: H1.one: its declaration changed, the evidence starts anew"])
    assert lines(suite)[-1]["replicated"]["nights"] == 1


def test_an_invalid_night_adds_nothing(suite):
    nights(suite, 1)
    failed = NIGHTLY.replace("SHARE", "0.4").replace("clusters=names)", 'clusters=names, controls=[Control("x", "negative", False, 0.4, "less")])')
    suite.write(failed)
    assert suite.run("--claims-history=nights").ret == 10
    first, second = (line for line in lines(suite) if line["claim_id"] == "H1.one")
    assert second["replicated"]["verdict"] == first["replicated"]["verdict"] == "supported"
    assert second["state"] == first["state"] and second["replicated"]["sentence"].startswith("invalid tonight, nothing added")


def test_a_claim_that_was_never_valid_has_no_verdict_of_the_nights(tmp_path):
    entry = sample_nights.entry(tmp_path, sample_nights.DROP, [1.0, 0.0] * 20, verdict="invalid")
    history.Night(tmp_path / "nights", 1).write(sample_nights.IDENTITY, [entry], tmp_path)
    (line,) = ledger.read(tmp_path / "nights" / "history.jsonl")
    assert line["replicated"]["verdict"] is None and line["replicated"]["sentence"] == "invalid tonight, nothing added"


def test_an_incomplete_night_is_not_added_and_its_shard_is_not_used_again(suite):
    suite.write(REFUTED, NIGHTLY.replace("SHARE", "0.4"))
    stopped = suite.run("--claims-history=nights", "-x")
    assert stopped.ret == 1 and not (suite.pytester.path / "nights" / "history.jsonl").exists()
    stopped.stdout.fnmatch_lines(["evidence is incomplete: nothing was added to the baseline or the history"])
    nights(suite, 1)
    assert {line["night"] for line in lines(suite)} == {2}


def test_shards_taken_at_the_same_time_differ(tmp_path):
    taken = []
    threads = [threading.Thread(target=lambda: taken.append(history.reserve(tmp_path / "nights"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(shard for shard, _ in taken) == list(range(1, 9)) and len({seed for _, seed in taken}) == 8


def test_lines_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    ledger.append(path, [{"a": 1}])
    monkeypatch.setattr(ledger.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        ledger.append(path, [{"a": 2}])
    assert ledger.read(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a"', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2, is no JSON object"):
        ledger.read(path)


def test_scenes_are_known_by_their_content():
    assert history.picture("confirmation-3-000012-00ff00ff00ff00ff") == history.picture("confirmation-4-000001-00ff00ff00ff00ff")
    assert history.picture("confirmation-3-000012") == "confirmation-3-000012"


def test_drift_is_said_where_a_night_is_unlike_those_before(tmp_path):
    night = history.Night(tmp_path, 20)
    entry = {"claim_id": "H1.one", "params": {}, "estimate": 0.5, "verdict": "supported"}
    usual = [0.30, 0.31, 0.29, 0.30, 0.32, 0.28, 0.30, 0.31]
    night._look_for_drift({**entry, "estimate": 0.31}, usual)
    night._look_for_drift(entry, usual[:-1])
    night._look_for_drift({**entry, "verdict": "invalid"}, usual)
    assert night.warnings == []
    night._look_for_drift(entry, usual)
    assert night.warnings == ["H1.one drifted: 0.50 tonight, 0.30 on the 8 nights before; its verdict is supported"]


def test_drift_is_rare_where_there_is_none():
    rng, night = np.random.default_rng(0), history.Night(None, 1)
    entry = {"claim_id": "H1.one", "params": {}, "verdict": "supported"}
    for _ in range(2000):
        *before, tonight = rng.normal(0.3, 0.05, 12)
        night._look_for_drift({**entry, "estimate": tonight}, before)
    assert len(night.warnings) <= 2000 * history.SURPRISE + 3 * math.sqrt(2000 * history.SURPRISE)


def test_shards_of_the_probes_share_no_scene_and_the_same_shard_shares_all():
    import probes

    drawn = [probes.build("confirmation", tasks=("color", "count"), n_per_task=8, seed=history.FIRST_SEED + shard)["scene_id"] for shard in (1, 2, 1)]
    first, second, again = ({history.picture(scene) for scene in scenes} for scenes in drawn)
    assert len(first) >= 8 and all(len(one) == 16 for one in first) and first.isdisjoint(second) and first == again


def test_where_nothing_is_selected_nothing_is_added(suite):
    suite.write(NIGHTLY.replace("SHARE", "0.4"))
    assert suite.run("--claims-history=nights", "-k", "nothing").ret == 5
    assert not (suite.pytester.path / "nights" / "history.jsonl").exists() and not suite.runs.joinpath("latest").exists()
