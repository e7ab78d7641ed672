"""Records that keep what they were given: validated, exact, appended as claims finish, with the identity of their run."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reports import __main__ as command
from reports import collect, provenance, record

from . import sample_run
from .suites import REFUTED, SUPPORTED

pytest_plugins = ["pytester"]

NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(width=32).map(np.float32), st.integers().filter(lambda n: abs(n) < 2**70))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text().filter(lambda text: text not in record.NON_FINITE)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)


def _run(tmp_path, **options):
    given = {"subject": "a/vlm", "subject_name": "vlm", "profile": "smoke", "seed": 3, "alpha": None, "revision": None, "expectations": None}
    return collect.Run(SimpleNamespace(out=tmp_path / "runs", **given, **options), command="pytest", root=tmp_path)


def _payload(entry, order=0, **parts):
    nothing = {"tables": [], "artifacts": [], "figures": [], "drawings": {}, "arrays": {}, "control": None, "about": {"subject": {}, "data": {}}}
    used = {"process": "main", "peaks_mb": (1.0, 0.0), "accelerator": None}
    return {**nothing, "record": entry, "order": order, "used": used, "left_out": [], **parts}


def _same(given, back):
    if isinstance(given, dict):
        return given.keys() == back.keys() and all(_same(given[name], back[name]) for name in given)
    if isinstance(given, list):
        return len(given) == len(back) and all(map(_same, given, back))
    if isinstance(given, (float, np.floating)) and math.isnan(given):
        return isinstance(back, float) and math.isnan(back)
    return given == back and math.copysign(1, given) == math.copysign(1, back) if isinstance(given, (float, np.floating)) else given == back


@settings(deadline=None)
@given(JSON)
@example({"all": [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308, np.float32(0.1), np.float32("nan"), 2**70]})
def test_what_goes_into_details_comes_back_from_json(value):
    written = record.dumps(record.to_builtins(value, keep=record.NON_FINITE))
    assert _same(value, record.from_builtins(json.loads(written)))


def test_a_text_that_means_a_number_in_a_record_is_refused():
    with pytest.raises(TypeError, match=r"details\.worst is the text 'NaN', which stands for the number"):
        record.to_builtins({"worst": "NaN"}, "details", keep=record.NON_FINITE)


def test_schemas_are_valid_and_refuse_what_is_no_record():
    for name in ("record", "run"):
        jsonschema.Draft202012Validator.check_schema(record.schema(name))
    entry = sample_run.make("H2.trend", "supported", 0.3, 0.1)
    for wrong, message in (
        (lambda e: e.update(lower=math.inf), r"H2\.trend\.lower is float, expected number or null"),
        (lambda e: e["declaration"].pop("hash"), r"H2\.trend\.declaration lacks hash"),
        (lambda e: e["declaration"].update(declared={"alpha": 0.1}), r"declaration\.declared lacks hash"),
        (lambda e: e["figures"].append({"kind": "x"}), r"figures\[\d\] lacks title, caption, alt, data"),
    ):
        broken = copy.deepcopy(entry)
        wrong(broken)
        with pytest.raises(record.RecordError, match=message):
            record.validate(broken)


def test_a_record_that_is_none_is_not_written(tmp_path):
    run = _run(tmp_path)
    with pytest.raises(record.RecordError, match="verdict is 'perhaps'"):
        run.add(_payload({**sample_run.make("H2.trend", "supported", 0.3, 0.1), "verdict": "perhaps"}))
    assert not (tmp_path / "runs").exists()


LARGE = """
@pytest.mark.claim(ONE)
@pytest.mark.parametrize("task", ["color", "shape"])
def test_large(evidence, task):
    curve = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32)
    curve[0, :3] = np.nan, np.inf, -0.0
    evidence.decide(ONE, effects(0.5), clusters=clusters(), details={"curve": curve.T, "few": curve[0, :3]})

@pytest.mark.claim(TWO)
def test_crash(evidence):
    evidence._arrays["0" * 64] = b"of a claim without evidence"
    raise RuntimeError
"""


def test_a_large_array_is_a_file_named_by_its_content(suite):
    suite.write(LARGE)
    suite.run()
    folder = suite.runs / "latest"
    one, two, _ = suite.latest()[1]
    assert one["details"]["few"] == ["NaN", "Infinity", -0.0] and one["details"]["curve"] == two["details"]["curve"]
    reference = one["details"]["curve"]
    assert {name: reference[name] for name in ("shape", "dtype")} == {"shape": [64, 64], "dtype": "float32"}
    files = {path.stem: path for path in (folder / record.ARRAYS).iterdir()}
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == digest for digest, path in files.items())
    expected = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32)
    expected[0, :3] = np.nan, np.inf, -0.0
    found = record.read_array(folder, reference)
    assert found.dtype == np.float32 and found.tobytes() == np.ascontiguousarray(expected.T).tobytes()
    file = files[reference["array"]]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(record.RecordError, match="is not what it was"):
        record.read_array(folder, reference)


def test_tables_keep_infinities_and_leave_missing_numbers_empty(suite):
    suite.write("""
@pytest.mark.claim(ONE)
def test_table(evidence):
    import pandas as pd
    evidence.table("rows.csv", pd.DataFrame({"value": [1 / 3, np.inf, -np.inf, np.nan, np.float32(0.1)]}))
    evidence.decide(ONE, effects(0.5), clusters=clusters())
""")
    import pandas as pd

    suite.run()
    back = pd.read_csv(suite.runs / "latest" / "rows.csv")["value"]
    assert sorted(back.dropna()) == [-math.inf, float(np.float32(0.1)), 1 / 3, math.inf] and back.isna().sum() == 1


def test_records_are_appended_as_claims_finish_and_never_rewritten(tmp_path):
    run = _run(tmp_path)
    entries = [sample_run.make(f"H1.{name}", "supported", 0.3, 0.1) for name in ("specificity", "necessity")]
    run.add(_payload(entries[0], order=1))
    appended = (run.folder / "records.jsonl").read_bytes()
    run.add(_payload(entries[1], order=0))
    longer = (run.folder / "records.jsonl").read_bytes()
    assert longer.startswith(appended) and longer.count(b"\n") == 2
    folder = run.finish(problems=[], exit_code=0, partial_families=False)
    assert (folder / "records.jsonl").read_bytes() == longer
    assert [json.loads(line)["claim_id"] for line in longer.splitlines()] == ["H1.specificity", "H1.necessity"]
    _, ordered = record.load_run(folder)
    assert [entry["claim_id"] for entry in ordered] == ["H1.necessity", "H1.specificity"] and ordered[0]["p_holm"] is not None


def test_a_killed_run_is_rendered_with_what_had_finished_and_says_so(tmp_path, capsys):
    run = _run(tmp_path)
    run.add(_payload(sample_run.make("H1.necessity", "supported", 0.3, 0.1)))
    run.add(_payload(sample_run.make("H1.specificity", "refuted", 0.0, 0.1)))
    with (run.folder / "records.jsonl").open("ab") as lines:
        lines.write('{"schema_version": 1, "claim_id": "H1.thrée'.encode()[:-2])
    assert command.main(["render", str(run.folder)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(run.folder / "report.html")
    ended = "the run ended before it was finished; it has the 2 claims that had finished by then and one was being written"
    assert said.err.strip() == f"{run.folder} is incomplete: {ended}"
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "the run ended before it was finished" in page and "H1.necessity" in page and "H1.specificity" in page


def test_workers_that_disagree_about_a_claim_make_the_run_incomplete(tmp_path):
    run = _run(tmp_path)
    entry = sample_run.make("H1.necessity", "supported", 0.3, 0.1)
    run.add(_payload(entry))
    run.add(_payload({**entry, "duration_s": 99.0}))
    assert run.problems == []
    run.add(_payload({**entry, "estimate": 0.31}))
    assert run.problems == ["workers disagree about H1.necessity, the evidence that came first is kept"]
    assert [one["estimate"] for one in run.records] == [0.3] and (run.folder / "records.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_a_run_says_what_was_run_on_what_and_where(suite, monkeypatch):
    checkout = suite.pytester.path
    for line in ("init -q", "-c user.name=x -c user.email=x@y commit -q --allow-empty -m first"):
        subprocess.run(["git", *line.split()], cwd=checkout, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()
    suite.write(
        SUPPORTED,
        REFUTED.replace(
            "    evidence.decide",
            "    evidence.about(subject={'weights': 'ab12', 'dtype': 'float32', 'device': 'cpu'}, data={'confirmation': 'cd34'})\n    evidence.decide",
        ),
    )
    suite.run("--claims-seed=5")
    run, records = suite.latest()
    assert run["commit"] == head + "+"
    assert {"weights": "ab12", "dtype": "float32", "device": "cpu", "source": "fixtures/embedded/vlm"}.items() <= run["subject"].items()
    assert run["data"] == {"confirmation": "cd34"} and run["seed"] == 5
    assert run["declarations"] == {entry["claim_id"]: entry["declaration"]["hash"] for entry in records} and len(run["declarations"]) == 2
    for package in ("torch", "transformers", "numpy", "scipy", "scikit-learn", "pytest"):
        assert run["versions"][package] == importlib.metadata.version(package)
    assert run["machine"]["cores"] and run["machine"]["accelerator"] is None and run["peak_accelerator_memory_mb"] is None
    assert run["peak_memory_mb"] > 1 and run["duration_s"] > 0 and all(entry["duration_s"] >= 0 for entry in records)
    subprocess.run(["git", "add", "-A"], cwd=checkout, check=True)
    subprocess.run("git -c user.name=x -c user.email=x@y commit -q -m all".split(), cwd=checkout, check=True)
    assert provenance.commit(checkout) and not provenance.commit(checkout).endswith("+")
    assert provenance.commit(Path("/")) is None


def test_the_accelerator_that_a_worker_uses_is_the_runs(tmp_path, monkeypatch):
    cuda = SimpleNamespace(is_initialized=lambda: True, get_device_name=lambda: "H200", max_memory_allocated=lambda: 3 * 2**20)
    monkeypatch.setitem(provenance.sys.modules, "torch", SimpleNamespace(cuda=cuda))
    used = {"process": "gw1", "peaks_mb": provenance.peaks_mb(), "accelerator": provenance.accelerator()}
    monkeypatch.undo()
    run = _run(tmp_path)
    run.add(_payload(sample_run.make("H1.necessity", "supported", 0.3, 0.1), used=used))
    identity = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert identity["machine"]["accelerator"] == "H200" and identity["peak_accelerator_memory_mb"] == 3.0
