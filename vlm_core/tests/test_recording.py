"""A recording is what observing item by item gives, on disk, in bounded memory, whatever happens to the process."""

from __future__ import annotations

import gc
import json
import re
import signal
import tracemalloc
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import vlm_core
from vlm_core import (
    At,
    AttentionMass,
    HeadGradients,
    HeadOutputs,
    HiddenStates,
    ImageAttention,
    KeyValues,
    LogitLens,
    Recording,
    RecordingConfig,
    SinkMass,
    TopTokens,
    ZeroHeads,
    key_value_moments,
    observe,
    record,
    recording,
)
from vlm_core.observation import observing
from vlm_core.observation.recording_config import KINDS
from vlm_core.tests.oracles import logits
from vlm_core.tests.tiny import make_items, tiny_subject
from vlm_core.tests.warm import run

TOML = """
dtype = "float16"
shard_items = 5
heads = [0, 2]

[observers.mass]
kind = "attention_mass"
queries = "text"
groups = ["image", "bos"]

[observers.attention_entropy]
layers = [1]
heads = [3]

[observers.hidden_states]
layers = [0, 3]

[observers.full_attention]
enabled = false
"""
YAML = """
dtype: float16
shard_items: 5
heads: [0, 2]
observers:
  mass: {kind: attention_mass, queries: text, groups: [image, bos]}
  attention_entropy:
    layers: [1]
    heads: [3]
  hidden_states: {layers: [0, 3]}
  full_attention:
    enabled: off
"""
OBSERVERS = {
    "mass": AttentionMass("text"),
    "gradients": HeadGradients(),
    "norms": HeadOutputs("norm"),
    "map": At(ImageAttention(), heads=(1,)),
    "tokens": HiddenStates(layers=(1, 3), positions="question tokens"),
    "lens": LogitLens(top=2, words="candidates"),
    "top": TopTokens(3),
    "kv": KeyValues(),
}


def config(**changes) -> RecordingConfig:
    return RecordingConfig(**{"observers": OBSERVERS, "shard_items": 4, **changes})


@pytest.fixture(scope="module")
def recorded(subject, tmp_path_factory):
    """Ten items, four a shard, three a pass."""
    out = tmp_path_factory.mktemp("recorded")
    return record(subject, make_items(10), config(batch_rows=3), out)


def test_files_say_what_python_says(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.yaml").write_text(YAML)
    toml, yaml = (RecordingConfig.from_file(tmp_path / name) for name in ("a.toml", "a.yaml"))
    assert toml == yaml == RecordingConfig.from_dict(toml.to_dict())
    assert set(toml.observers) == {"mass", "attention_entropy", "hidden_states"}
    assert toml.observers["mass"] == At(AttentionMass("text", ("image", "bos")), heads=(0, 2))
    assert (toml.observers["attention_entropy"].layers, toml.observers["attention_entropy"].heads) == ((1,), (3,))
    assert toml.observers["hidden_states"] == HiddenStates(layers=(0, 3))
    assert (toml.dtype, toml.shard_items) == ("float16", 5)


def test_layers_and_heads_of_the_whole_recording_are_defaults():
    some = RecordingConfig.from_dict(
        {"layers": [1], "observers": {"hidden_states": {}, "logit_lens": {"layers": [2]}, "attention_mass": {}}}
    ).observers
    assert some["hidden_states"].layers == (1,) and some["logit_lens"].layers == (2,)
    assert some["attention_mass"] == At(AttentionMass(), layers=(1,))


@pytest.mark.parametrize("kind", KINDS)
def test_every_observer_can_be_named_in_a_file(kind):
    named = RecordingConfig.from_dict({"observers": {kind: {}}})
    assert type(named.observers[kind]) is KINDS[kind]
    assert RecordingConfig.from_dict(named.to_dict()) == named


def test_every_observer_there_is_can_be_recorded():
    public = (getattr(vlm_core, name) for name in vlm_core.__all__)
    found = {one for one in public if isinstance(one, type) and one.__module__.startswith("vlm_core.observation.") and is_dataclass(one)}
    observers = {one for one in found if any(hasattr(one, name) for name in ("attention", "layer", "site", "parts", "measure"))}
    # ``At`` is what ``layers`` and ``heads`` of any of them make.
    assert observers - {At} == set(KINDS.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"observers": {"mass": {}}}, "observer 'mass' is of unknown kind 'mass': choose from attention_mass"),
        ({"observers": {"attention_mass": {"query": "text"}}}, "has no parameter 'query': it takes enabled, kind, queries, groups, layers"),
        ({"observers": {"head_gradients": {"heads": [1]}}}, "has no parameter 'heads': it takes enabled, kind, target"),
        ({"observers": {"attention_mass": {"enabled": False}}}, "at least one observer that is switched on"),
        ({"observers": {"a/b": {"kind": "attention_mass"}}}, "'a/b' cannot name an observer"),
        ({"dtype": "int8", "observers": {"attention_mass": {}}}, "dtype must be one of float32, float16, bfloat16"),
        ({"shard_items": 0, "observers": {"attention_mass": {}}}, "shard_items must be a number of items"),
        ({"shards": 3}, "a recording has no setting 'shards': it takes dtype"),
        ({1: 2, "shards": 3}, "a recording has no setting '1': it takes dtype"),
        ([1], r"a recording's configuration is a table of settings, got \[1\]"),
        ({"observers": ["attention_mass"]}, "observers are tables by name"),
        ({"observers": {"attention_mass": False}}, "'attention_mass' is a table of its parameters, got False: write enabled"),
        ({"observers": {"attention_mass": "yes"}}, "'attention_mass' is a table of its parameters, got 'yes'"),
        ({"observers": {"attention_mass": {"enabled": "no"}}}, "enabled of observer 'attention_mass' must be True or False, got 'no'"),
        ({"observers": {"a": {"kind": ["x"]}}}, "observer 'a' is of unknown kind"),
        ({"observers": {"attention_mass": {"groups": 3}}}, "groups of AttentionMass must be token groups by name"),
        ({"shard_items": True, "observers": {"attention_mass": {}}}, "shard_items must be a number of items"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(content, message):
    with pytest.raises(ValueError, match=message):
        RecordingConfig.from_dict(content)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="neither .toml nor .yaml"):
        RecordingConfig.from_file(tmp_path / "a.json")
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="holds no table of settings"):
        RecordingConfig.from_file(tmp_path / "a.yaml")
    for name, text, words in (
        ("b.toml", b"a = = 3", "b.toml is no TOML"),
        ("b.toml", b"\xff\xfe", "b.toml is no TOML"),
        ("b.yaml", b"a: [1\nb: }", "b.yaml is no YAML"),
        ("c.toml", None, "there is no configuration at .*c.toml"),
    ):
        if text is not None:
            (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=words) as refused:
            RecordingConfig.from_file(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="read from a file's path, got None"):
        RecordingConfig.from_file(None)
    with pytest.raises(ValueError, match="a mapping of names to observers"):
        RecordingConfig([AttentionMass()])
    with pytest.raises(ValueError, match="'1' cannot name an observer"):
        RecordingConfig({1: AttentionMass()})


def test_what_comes_back_is_what_observing_gives(subject, recorded):
    items = make_items(10)
    expected = dict(zip(OBSERVERS, observe(subject, items, list(OBSERVERS.values())), strict=True))
    assert recorded.items == [item["id"] for item in items]
    assert recorded.tables == ["mass", "gradients", "norms"]
    mass = recorded.table("mass")
    assert list(mass.columns) == ["item", "layer", "head", "group", "value"]
    assert len(mass) == expected["mass"].size
    np.testing.assert_allclose(mass["value"].to_numpy().reshape(expected["mass"].shape), expected["mass"], rtol=1e-4, atol=1e-6)
    (row,) = mass[(mass["item"] == "item-7") & (mass["layer"] == 2) & (mass["head"] == 1) & (mass["group"] == "bos")]["value"]
    assert row == pytest.approx(expected["mass"][7, 2, 1, 3], rel=1e-4)
    gradients = recorded.table("gradients").pivot(index="item", columns=["layer", "head"], values="value")
    np.testing.assert_allclose(
        gradients.loc["item-4"].to_numpy(), expected["gradients"][4].reshape(-1), rtol=1e-3, atol=1e-5
    )
    for row, item in enumerate(items):
        image = recorded.array("map", item["id"])
        np.testing.assert_allclose(image, expected["map"][row], rtol=1e-4, atol=1e-6)
        batch = subject.encode_items([item])
        question = batch.image.shape[1] - int(batch.image[0].nonzero().max()) - 1
        tokens = recorded.array("tokens", item["id"])
        assert tokens.shape == (2, question, 32) and not np.isnan(tokens).any()
        np.testing.assert_allclose(tokens, expected["tokens"][row, :, :question], rtol=1e-3, atol=1e-5)
        for key in ("index", "rank"):
            np.testing.assert_array_equal(recorded.array(f"lens.{key}", item["id"]), expected["lens"][key][row])
        np.testing.assert_array_equal(recorded.array("top.index", item["id"]), expected["top"]["index"][row])
    assert recorded.layers("tokens") == (1, 3) and recorded.layers("lens.rank") == (0, 1, 2, 3)
    assert recorded.layers("gradients") == ()
    moments = key_value_moments(subject, items)
    torch.testing.assert_close(recorded.moments("kv").mean, moments.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(recorded.moments("kv").std, moments.std, rtol=1e-4, atol=1e-6)
    assert torch.equal(recorded.moments("kv").count, moments.count)


@pytest.mark.parametrize("kind", ["relative_distance", "rotary_bias"])
def test_what_positions_do_is_recorded_head_by_head(subject, tmp_path, kind):
    items = make_items(5)
    recorded = record(subject, items, RecordingConfig.from_dict({"shard_items": 2, "observers": {kind: {}}}), tmp_path)
    table, seen = recorded.table(kind), observe(subject, items, KINDS[kind]())
    assert list(table.columns) == ["item", "layer", "head", "kind", "value"]
    assert table["kind"].unique().tolist() == list(KINDS[kind]().axes[-1][1])
    np.testing.assert_allclose(table["value"].to_numpy().reshape(seen.shape), seen, rtol=1e-4, atol=1e-6)
    (one,) = table[(table["item"] == "item-3") & (table["layer"] == 2) & (table["head"] == 1)]["value"].tolist()[1:]
    assert one == pytest.approx(seen[3, 2, 1, 1], rel=1e-4)


def test_heads_of_a_table_keep_their_own_numbers(subject, tmp_path):
    some = RecordingConfig({"mass": At(AttentionMass(groups=("image",)), layers=(2,), heads=(3, 1))})
    table = record(subject, make_items(2), some, tmp_path).table("mass")
    assert table["layer"].unique().tolist() == [2] and table["head"].unique().tolist() == [3, 1]


def test_the_identity_says_what_was_recorded(subject, recorded):
    identity = recorded.identity
    assert identity["subject"]["weights"] == subject.fingerprint[0]
    assert identity["versions"]["torch"] == torch.__version__
    assert identity["intervention"] == {"what": "none", "parts": []}
    assert RecordingConfig.from_dict(identity["config"]).observers == OBSERVERS


@pytest.mark.parametrize(("dtype", "stored"), [("float16", np.float16), ("bfloat16", np.float32)])
def test_arrays_take_the_dtype_asked_for(subject, recorded, tmp_path, dtype, stored):
    small = record(subject, make_items(2), config(dtype=dtype), tmp_path)
    seen = small.array("map", "item-1")
    assert seen.dtype == stored and small.array("top.index", "item-1").dtype == np.int32
    np.testing.assert_allclose(seen.astype(np.float32), recorded.array("map", "item-1"), rtol=1e-2, atol=1e-3)
    assert not np.array_equal(seen.astype(np.float32), recorded.array("map", "item-1"))
    assert small.table("mass")["value"].dtype == np.float32


def test_two_hundred_examples_are_logged_as_if_one_by_one(subject, tmp_path):
    items = make_items(200)
    several = RecordingConfig({"mass": AttentionMass("text"), "last": HiddenStates()})
    whole = record(subject, items, several, tmp_path)
    table = whole.table("mass").set_index("item")
    assert table.index.unique().tolist() == [item["id"] for item in items]
    for item in items:
        mass, hidden = observe(subject, [item], list(several.observers.values()))
        np.testing.assert_allclose(table.loc[item["id"], "value"].to_numpy(), mass.reshape(-1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(whole.array("last", item["id"]), hidden[0], rtol=1e-3, atol=1e-5)


class Endless(Sequence):
    """Items made when asked for, so that only a recording could hold on to them."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        (item,) = make_items(1, seed=index)
        return {**item, "id": f"item-{index}"}


def held_bytes() -> int:
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]


def record_and_count(folder: Path) -> None:
    """Record 200 items and compare what is held, and the peaks, after 50 and after 200 of them."""
    several = RecordingConfig({"hidden": HiddenStates(positions="all"), "mass": AttentionMass("text")}, shard_items=10)
    held, highest = {}, {}

    def measure(done, total):
        if done in (50, 200):
            highest[done] = tracemalloc.get_traced_memory()[1]  # before counting, which lists every object there is
            held[done] = held_bytes()
            tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        written = record(tiny_subject(), Endless(200), several, folder, progress=measure)
    finally:
        tracemalloc.stop()
    per_item = written.array("hidden", "item-0").nbytes
    # Had the 150 items in between stayed, they would take 150 of these; the index takes a name and two numbers each.
    assert held[200] - held[50] < 10 * per_item, (held, per_item)
    assert highest[200] - highest[50] < 20 * per_item, (highest, per_item)


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path):
    # In a process of its own: what is counted is the whole process, other tests' threads and leftovers included.
    code = "import sys, pathlib; from vlm_core.tests.test_recording import record_and_count; record_and_count(pathlib.Path(sys.argv[1]))"
    done = run(["-c", code, tmp_path])
    assert done.returncode == 0, done.stderr


KILLED = """
import os, signal, sys
from vlm_core import AttentionMass, HiddenStates, RecordingConfig, record, recording
from vlm_core.tests.tiny import make_items, tiny_subject
save, shards = recording.save_file, []
def save_and_die(arrays, path):
    shards.append(path)
    save(arrays, path)
    if len(shards) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
recording.save_file = save_and_die
config = RecordingConfig({"mass": AttentionMass("text"), "last": HiddenStates()}, shard_items=4)
record(tiny_subject(), make_items(18), config, sys.argv[1])
"""


def test_a_killed_run_goes_on_where_it_stopped(subject, tmp_path, monkeypatch):
    killed = run(["-c", KILLED, tmp_path / "out"])
    assert killed.returncode == -signal.SIGKILL
    finished = [path.name for path in (tmp_path / "out" / "shards").iterdir() if not path.name.startswith(".")]
    assert sorted(name[:5] for name in finished) == ["00000", "00001"]
    with pytest.raises(ValueError, match="is unfinished: call record"):
        Recording.open(tmp_path / "out")
    several = RecordingConfig({"mass": AttentionMass("text"), "last": HiddenStates()}, shard_items=4)
    computed, encode = [], observing.encode_items
    monkeypatch.setattr(
        observing, "encode_items", lambda s, items, **k: computed.extend(item["id"] for item in items) or encode(s, items, **k)
    )
    resumed = record(subject, make_items(18), several, tmp_path / "out")
    assert computed == [f"item-{number}" for number in range(8, 18)]
    whole = record(subject, make_items(18), several, tmp_path / "whole")
    pd.testing.assert_frame_equal(resumed.table("mass"), whole.table("mass"))
    for item in whole.items:
        np.testing.assert_array_equal(resumed.array("last", item), whole.array("last", item))
    assert not list((tmp_path / "out" / "shards").glob(".*"))
    computed.clear()
    record(subject, make_items(18), several, tmp_path / "out")
    assert computed == []


def test_items_can_be_added_and_changed_items_are_observed_again(subject, tmp_path, monkeypatch):
    several, items = RecordingConfig({"mass": AttentionMass("text")}, shard_items=2), make_items(6)
    record(subject, items[:4], several, tmp_path)
    computed, encode = [], observing.encode_items
    monkeypatch.setattr(
        observing, "encode_items", lambda s, items, **k: computed.extend(item["id"] for item in items) or encode(s, items, **k)
    )
    items[3] = {**items[3], "image": items[0]["image"]}
    assert record(subject, items, several, tmp_path).items == [item["id"] for item in items]
    assert computed == ["item-2", "item-3", "item-4", "item-5"]


def test_a_directory_holds_one_recording(subject, gqa_subject, tmp_path):
    several, items = RecordingConfig({"mass": AttentionMass()}), make_items(2)
    record(subject, items, several, tmp_path)
    for other in (
        {"subject": gqa_subject, "config": several, "what": "subject"},
        {"subject": subject, "config": RecordingConfig({"mass": AttentionMass("text")}), "what": "config"},
        {"subject": subject, "config": several, "what": "intervention", "intervention": ZeroHeads([(0, 0)])},
    ):
        what, config_ = other.pop("what"), other.pop("config")
        with pytest.raises(ValueError, match=f"recording with another {what}: record into a new directory"):
            record(other.pop("subject"), items, config_, tmp_path, **other)
    assert len(record(subject, items, RecordingConfig({"mass": AttentionMass()}, batch_rows=1), tmp_path).items) == 2


def test_sinks_stay_what_they_were_found_to_be(subject, tmp_path, monkeypatch):
    several = RecordingConfig({"sinks": SinkMass()}, shard_items=2)
    first = record(subject, make_items(2), several, tmp_path)
    assert first.identity["prepared"]["observers"]["sinks"]["sinks"]["dimensions"] == []
    monkeypatch.setattr(SinkMass, "prepare", lambda *a: pytest.fail("found again"))
    assert len(record(subject, make_items(4), several, tmp_path).items) == 4


def test_what_is_not_there_is_said(subject, recorded, tmp_path):
    with pytest.raises(ValueError, match="has no 'map' of this kind: it has mass, gradients, norms"):
        recorded.table("map")
    with pytest.raises(ValueError, match="has no 'lens' of this kind: it has lens.index"):
        recorded.array("lens", "item-0")
    with pytest.raises(ValueError, match="item 'item-99' is not in the recording of 10 items"):
        recorded.array("map", "item-99")
    with pytest.raises(ValueError, match="holds no recording"):
        Recording.open(tmp_path)
    several, (item,) = RecordingConfig({"mass": AttentionMass()}), make_items(1)
    with pytest.raises(ValueError, match="two items have the id 'item-0'"):
        record(subject, [item, item], several, tmp_path / "twice")
    with pytest.raises(ValueError, match="pass at least one item"):
        record(subject, [], several, tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"subject": "x"}, TypeError, "must be a Subject, got 'x'"),
        ({"config": "a.toml"}, TypeError, r"must be a RecordingConfig, got 'a.toml' .*RecordingConfig.from_file"),
        ({"config": None}, TypeError, "must be a RecordingConfig, got None"),
        ({"items": None}, ValueError, "items must be a sequence"),
        ({"items": [{**make_items(1)[0], "image": None}]}, ValueError, "the image of item 'item-0'"),
        ({"items": make_items(1) * 2}, ValueError, "two items have the id 'item-0'"),
        ({"out": None}, TypeError, "directory must be a path, got None"),
        ({"intervention": "zero"}, TypeError, "intervention must be None, an intervention such as"),
        ({"intervention": ZeroHeads([(9, 0)])}, ValueError, "outside this model's 3 layers"),
        ({"groups": "object"}, TypeError, "groups must be a callable or None"),
        ({"progress": True}, TypeError, "progress must be a callable or None"),
    ],
)
def test_wrong_arguments_leave_no_directory(subject, tmp_path, changes, kind, words):
    usual = {"subject": subject, "items": make_items(2), "config": RecordingConfig(), "out": tmp_path / "out"}
    batch = subject.encode_items(make_items(1))
    before = logits(subject, batch)
    with pytest.raises(kind, match=words):
        record(**{**usual, **changes})
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(subject, batch), before)


def test_a_recording_goes_into_no_file_and_is_none_when_damaged(subject, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file, name another path"):
        record(subject, make_items(1), RecordingConfig(), tmp_path / "file" / "below")
    record(subject, make_items(1), RecordingConfig(), tmp_path / "out")
    (tmp_path / "out" / "identity.json").write_text("{")
    for call in (lambda: Recording.open(tmp_path / "out"), lambda: record(subject, make_items(1), RecordingConfig(), tmp_path / "out")):
        with pytest.raises(ValueError, match="identity.json is damaged .*record into a new directory"):
            call()


def test_a_recording_that_recorded_nothing_blocks_no_other(subject, tmp_path):
    with pytest.raises(ValueError, match="there is no token group 'objekt'"):
        record(subject, make_items(1), RecordingConfig({"mass": AttentionMass(groups=("objekt",))}), tmp_path)
    mended = record(subject, make_items(1), RecordingConfig({"mass": AttentionMass(groups=("image",))}), tmp_path)
    assert mended.identity["config"]["observers"]["mass"]["groups"] == ["image"] and len(mended.table("mass"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subject": "nowhere"}, "nowhere' was not found"),
        ({"config": "nowhere.toml"}, "there is no configuration at"),
        ({"items": "nowhere.jsonl"}, "there are no items at"),
        ({"lines": ""}, "pass at least one item"),
        ({"lines": "{x"}, "line 1 of .*items.jsonl is no JSON"),
        ({"lines": "[1]"}, r"line 1 of .*items.jsonl is no object but \[1\]"),
        ({"lines": '{"id": "a", "prompt": "what ?"}'}, "item 'a' has no field 'image'"),
        ({"lines": '{"id": "a", "prompt": "what ?", "image": "b.png"}'}, "names the image 'b.png': there is no such file"),
        ({"lines": '{"id": "a", "prompt": 3, "image": "b.png"}'}, "the prompt of item 'a' must be a str"),
        ({"lines": '{"id": "a", "prompt": "what ?", "image": "config.toml"}'}, "'config.toml' of item 'a' is no image that Pillow knows"),
    ],
)
def test_the_command_line_ends_in_one_sentence(subject, tmp_path, monkeypatch, capsys, changes, words):
    (tmp_path / "config.toml").write_text("[observers.attention_mass]\n")
    (tmp_path / "items.jsonl").write_text(changes.pop("lines", '{"id": "a", "prompt": "what ?", "image": "config.toml"}'))
    if "subject" not in changes:
        monkeypatch.setattr(recording, "load_vlm", lambda path: subject)
    options = {"subject": "tiny", "config": "config.toml", "items": "items.jsonl", "out": "out", **changes}
    with pytest.raises(SystemExit) as ended:
        recording.main([word for name, value in options.items() for word in (f"--{name}", str(tmp_path / value))])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and said.startswith("python -m vlm_core.recording: ") and "\n" not in said
    assert re.search(words, said)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[observers.logit_lens]\ntop = 'x'", "top of LogitLens must be an integer, got 'x'"),
        ("[observers.logit_lens]\nwords = 3", "words of LogitLens are 'answer', 'candidates' or several words, got 3"),
        ("[observers.attention_mass]\nqueries = ['text']", "queries of AttentionMass must be a token group's name"),
        ("[observers.key_values]\ntokens = 1", "tokens of KeyValues must be a token group's name"),
        ("[observers.mask_iou]\nthresholds = 3", "thresholds of MaskIoU must be several, got 3"),
        ("[observers.sink_mass.sinks]\ndimensions = [1]", "sinks of SinkMass are their dimensions and threshold, got dimensions"),
        ("[observers.sink_mass.sinks]\ndimensions = 1\nthreshold = 2.0", "observer 'sink_mass' .sink_mass. cannot be made of its parameters"),
        ("[observers.integrated_gradients]\nsteps = 'x'", "steps must be an integer, got 'x'"),
        ("layers = 'x'\n[observers.attention_mass]", "layers of At must be integers, got 'x'"),
        ("[observers.head_outputs]\nreduce = [1]", r"reduce must be last, mean or norm, got '\[1\]'"),
    ],
)
def test_a_bad_configuration_ends_the_command_line_in_one_sentence(tmp_path, monkeypatch, capsys, config, words):
    (tmp_path / "config.toml").write_text(config)
    monkeypatch.setattr(recording, "load_vlm", lambda name: pytest.fail("a model was loaded first"))
    with pytest.raises(SystemExit) as ended:
        recording.main(["--subject", "x", "--config", str(tmp_path / "config.toml"), "--items", "none", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and said.startswith("python -m vlm_core.recording: ") and "\n" not in said
    assert re.search(words, said)
    assert not (tmp_path / "out").exists()


def test_what_a_recording_does_not_take_ends_the_command_line_in_one_sentence(subject, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.toml").write_text("[observers.attention_mass]\n")
    (tmp_path / "items.jsonl").write_text("")

    def refuse(*_):
        raise TypeError("the subject must be\na Subject")

    monkeypatch.setattr(recording, "load_vlm", refuse)
    files = {"config": "config.toml", "items": "items.jsonl", "out": "out"}
    with pytest.raises(SystemExit) as ended:
        recording.main(["--subject", "x", *(word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file)))])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "python -m vlm_core.recording: the subject must be a Subject\n"


def test_the_command_line(subject, tmp_path, monkeypatch, capsys):
    items = make_items(3)
    with (tmp_path / "items.jsonl").open("w") as lines:
        for item in items:
            item["image"].save(tmp_path / f"{item['id']}.png")
            lines.write(json.dumps({"id": item["id"], "prompt": item["prompt"], "image": f"{item['id']}.png"}) + "\n")
    (tmp_path / "config.toml").write_text("[observers.attention_mass]\n")
    monkeypatch.setattr(recording, "load_vlm", lambda path: subject)
    options = {"subject": "tiny", "config": "config.toml", "items": "items.jsonl", "out": "out"}
    recording.main([word for name, value in options.items() for word in (f"--{name}", str(tmp_path / value))])
    assert "3 items" in capsys.readouterr().out
    table = Recording.open(tmp_path / "out").table("attention_mass")
    expected = observe(subject, items, AttentionMass())
    np.testing.assert_allclose(table["value"].to_numpy().reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)


def test_a_recording_is_not_continued_with_other_groups(subject, tmp_path):
    def first(count):
        return lambda item, encoded: {"object": np.arange(len(encoded)) < count}

    several, items = RecordingConfig({"mass": AttentionMass("last", ("object",))}), make_items(2)
    record(subject, items, several, tmp_path, groups=first(4))
    record(subject, items, several, tmp_path, groups=first(4))
    with pytest.raises(ValueError, match="another groups"):
        record(subject, items, several, tmp_path, groups=first(5))
