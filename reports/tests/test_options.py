"""Options: one sentence and exit code 4 for what cannot be; the list of claims; expectations."""

from __future__ import annotations

import json

import pytest

import vlm_core.quantization
import vlm_core.subjects.load  # noqa: F401  (loaded here, or pytester would unload torch after a sample run)
from reports import provenance

from .suites import CRASHING, EXPLORATORY, INCONCLUSIVE, REFUTED, SUPPORTED

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--claims-profile=quick", "--claims-profile takes one of smoke, default, nightly, not 'quick'"),
        ("--claims-inconclusive=maybe", "--claims-inconclusive takes one of fail, warn, not 'maybe'"),
        ("--claims-seed=x", "--claims-seed takes a whole number, not 'x'"),
        ("--claims-alpha=0.7", "--claims-alpha takes a number between 0 and 0.5, not '0.7'"),
        ("--claims-alpha=nan", "--claims-alpha takes a number between 0 and 0.5, not 'nan'"),
        ("--claims-alpha=x", "--claims-alpha takes a number between 0 and 0.5, not 'x'"),
        ("--claims-device=gpu", "--claims-device takes cpu, cuda, cuda:0, mps or auto (spread over all that are there), not 'gpu'"),
        ("--claims-dtype=int8", "--claims-dtype takes one of auto, float32, bfloat16, float16, float64, not 'int8'"),
        ("--claims-quantization=2bit", "--claims-quantization takes one of 4bit, 8bit, not '2bit'"),
        ("--claims-device=cuda:99", "device 'cuda:99' is not there: use 'auto' or 'cpu'"),
        ("--claims-seed=-1", "--claims-seed takes a number from 0 on, not -1"),
        ("--claims-subject=", "--claims-subject takes a path or a model id, not an empty string"),
        ("--claims-expectations=gone.toml", "gone.toml was not found"),
        ("--claims-out=hypotheses/test_claims.py/runs", "cannot be written: Not a directory"),
    ],
)
def test_a_bad_value_is_one_sentence_and_exit_code_4(suite, argument, sentence):
    suite.write(SUPPORTED)
    result = suite.run(argument)
    assert result.ret == 4
    (line,) = [line for line in result.stderr.lines if line.startswith("ERROR")]
    assert sentence in line


def test_the_seed_reaches_fixtures_as_a_number(suite):
    suite.write("def test_seed(claims_options, pytestconfig): assert claims_options.seed == pytestconfig.getoption('claims_seed') == 5\n")
    assert suite.run("--claims-seed=5").ret == 0


def test_the_list_names_every_claim_and_runs_none(suite):
    suite.write(SUPPORTED, REFUTED, INCONCLUSIVE, EXPLORATORY, "def test_plain(): raise SystemExit(9)\n")
    result = suite.run("--claims-list", "-n", "2", "--claims-subject=/nowhere")
    assert result.ret == 0 and not suite.runs.exists()
    result.stdout.fnmatch_lines(
        ["H1.one  confirmatory, superiority*declaration *", "*It costs ten points.", "H1.look  exploratory*", "4 claims, 4 instances"]
    )


def test_an_expected_refutation_passes_and_says_so(suite):
    suite.write(SUPPORTED, REFUTED)
    (suite.pytester.path / "known.toml").write_text('[[expected]]\nclaim = "H1.two"\nverdict = "refuted"\nreason = "small"\n')
    result = suite.run("-v", "--claims-expectations=known.toml")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*REFUTED (expected)*", "✕ REFUTED *H1.two*expected"])
    _, records = suite.latest()
    assert [entry["outcome"] for entry in records] == ["decided", "expected"]


def test_an_expectation_holds_in_the_profiles_it_names(suite):
    suite.write(SUPPORTED, REFUTED)
    entries = '[[expected]]\nclaim = "H1.{}"\nprofiles = ["default", "nightly"]\nreason = "small"\n'
    (suite.pytester.path / "known.toml").write_text(entries.format("two"))
    outcomes = {}
    for profile in ("smoke", "default", "nightly"):
        result = suite.run("--claims-expectations=known.toml", f"--claims-profile={profile}")
        outcomes[profile] = result.ret, [entry["outcome"] for entry in suite.latest()[1]]
        result.stdout.no_fnmatch_line("*matches no claim*")
    assert outcomes == {"smoke": (1, ["decided", "decided"]), **dict.fromkeys(("default", "nightly"), (0, ["decided", "expected"]))}
    suite.write(SUPPORTED)
    (suite.pytester.path / "known.toml").write_text(entries.format("one"))
    assert [suite.run("--claims-expectations=known.toml", f"--claims-profile={profile}").ret for profile in ("smoke", "default")] == [0, 1]


def test_expectations_beside_the_subject_are_found(suite):
    suite.write(REFUTED)
    suite.pytester.mkdir("model")
    (suite.pytester.path / "model" / "expectations.toml").write_text('[[expected]]\nclaim = "H1.two"\nreason = "small"\n')
    assert suite.run("--claims-subject=model").ret == 0


def test_unexpected_support_fails(suite):
    suite.write(SUPPORTED)
    (suite.pytester.path / "known.json").write_text('[{"claim": "H1.one", "verdict": "refuted", "reason": "was so"}]')
    result = suite.run("-v", "--claims-expectations=known.json")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*SUPPORTED (not expected)*", "● SUPPORTED *not expected"])


def test_an_expectation_swallows_neither_a_crash_nor_another_verdict(suite):
    suite.write(CRASHING, INCONCLUSIVE)
    (suite.pytester.path / "known.json").write_text(
        '[{"claim": "H1.one", "params": {"part": "crash"}, "reason": "x"}, {"claim": "H2.three", "reason": "x"}]'
    )
    result = suite.run("--claims-expectations=known.json")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["E *no such layer"])
    suite.write(INCONCLUSIVE)
    assert suite.run("--claims-expectations=known.json").ret == 10


def test_expectations_that_match_nothing_are_pointed_out(suite):
    suite.write(SUPPORTED, EXPLORATORY)
    (suite.pytester.path / "known.json").write_text('[{"claim": "H9.gone", "reason": "x"}, {"claim": "H1.look", "reason": "x"}]')
    result = suite.run("--claims-expectations=known.json")
    assert result.ret == 0
    result.stdout.fnmatch_lines_random(["*expectation for H9.gone*matches no claim*", "*H1.look is exploratory*"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[[expected]\n", "cannot be read"),
        ('[[expected]]\nclaim = "H1.one"\n', "entry 1 needs a reason"),
        ('[[expected]]\nclaim = "H1.one"\nreason = "x"\nverdict = "supported"\n', "has verdict 'supported'"),
        ('[[expected]]\nclaim = "H1.one"\nreason = "x"\nwhen = "always"\n', "unknown key 'when'"),
        ('[[expected]]\nclaim = "H1.one"\nreason = "x"\nprofiles = ["quick"]\n', "has profile 'quick', expected one of smoke, default, nightly"),
        ('[[expected]]\nclaim = "H1.one"\nreason = "x"\nprofiles = "smoke"\n', "entry 1 has profiles that are not a list"),
    ],
)
def test_a_broken_expectations_file_is_one_sentence(suite, content, sentence):
    suite.write(SUPPORTED)
    (suite.pytester.path / "known.toml").write_text(content)
    result = suite.run("--claims-expectations=known.toml")
    assert result.ret == 4
    assert any(sentence in line and "known.toml" in line for line in result.stderr.lines)


def test_a_subject_of_the_checkout_is_found_from_any_folder(suite, monkeypatch):
    suite.write("def test_path(claims_options):\n    from pathlib import Path\n    assert Path(claims_options.subject).is_dir()\n")
    (suite.pytester.path / "fixtures" / "embedded" / "vlm").mkdir(parents=True)
    monkeypatch.chdir(suite.pytester.path / "hypotheses")
    assert suite.run("--rootdir", str(suite.pytester.path), "-c", str(suite.pytester.path / "tox.ini"), "test_claims.py").ret == 0


LOADED = """
import json
@pytest.mark.claim(ONE)
def test_loading(claims_options, evidence):
    evidence.about(subject={"weights": "ab12", "dtype": "bfloat16", "quantization": claims_options.quantization, "device": "cpu"})
    evidence.decide(ONE, effects(0.5), clusters=clusters(), details={"loading": json.dumps(claims_options.loading)})
"""


def test_how_a_subject_is_loaded_is_asked_for_recorded_and_repeated(suite, monkeypatch):
    suite.write(LOADED)
    monkeypatch.setattr(vlm_core.quantization, "find_spec", lambda name: None)
    refused = suite.run("--claims-quantization=4bit")
    assert refused.ret == 4 and "quantization '4bit' needs bitsandbytes, which is not installed" in refused.stderr.str()
    monkeypatch.setattr(vlm_core.quantization, "find_spec", lambda name: name)
    asked = ["--claims-device=auto", "--claims-dtype=bfloat16", "--claims-quantization=4bit"]
    assert suite.run("--claims-revision=v1", *asked).ret == 0
    run, (entry,) = suite.latest()
    wanted = {"revision": "v1", "dtype": "bfloat16", "quantization": "4bit", "device_map": "auto"}
    assert json.loads(entry["details"]["loading"]) == wanted and all(one in entry["reproduce"] for one in asked)
    assert (run["subject"]["quantization"], run["subject"]["device"], run["revision"]) == ("4bit", "cpu", "v1")
    assert "bfloat16 · 4bit weights · cpu" in (suite.runs / "latest" / "report.html").read_text(encoding="utf-8")
    assert provenance.subject_key(run) == "ab12 bfloat16 4bit"
    assert suite.run().ret == 0
    assert json.loads(suite.latest()[1][0]["details"]["loading"]) == {"revision": None, "dtype": "auto", "quantization": None, "device": "auto"}
