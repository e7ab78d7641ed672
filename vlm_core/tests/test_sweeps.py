"""Sweeps give the numbers that the whole model gives, in a tidy table, and resume."""

from __future__ import annotations

import gc
import signal
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import vlm_core.sweeps.recorded
import vlm_core.sweeps.scoring
import vlm_core.sweeps.sweep
from vlm_core import (
    DropTokens,
    GaussianNoise,
    KnockOut,
    Patch,
    ReplaceImageKV,
    ReplaceTokens,
    SerialExecutor,
    Steer,
    SubjectError,
    Vector,
    ZeroHeads,
    sweep,
)
from vlm_core.items import item_number
from vlm_core.reduction import DivPrune, FastV, ToMe
from vlm_core.seam.shortening import Shortening
from vlm_core.tests.tiny import make_items, tiny_subject
from vlm_core.tests.warm import Warm

METRICS = ("correct", "logit", "logprob", "margin", "choice")


def by_hand(subject, item, intervention):
    """Scores of one item through the whole model, one candidate at a time."""
    sums, logit = [], None
    for candidate in item["candidates"]:
        batch = subject.encode([item["image"]], [item["prompt"]], answers=[candidate])
        n_prompt = subject.encode_items([item]).image.shape[1]
        with subject.intervene(intervention, batch, items=[item_number(item)]) as run, torch.inference_mode():
            logits = subject.model(**batch.inputs).logits[0]
        dropped = batch.image.shape[1] - logits.shape[0]
        assert dropped == 0 or run.tokens.index is not None
        tokens = subject.continuation(candidate)
        steps = logits[n_prompt - dropped - 1 :][: len(tokens)]
        index = torch.arange(len(tokens)), torch.tensor(tokens)
        sums.append(float(steps.log_softmax(-1)[index].sum()))
        if candidate == item["answer"]:
            others = [subject.continuation(one) for one in item["candidates"]]
            telling = 0
            while all(other[: telling + 1] == tokens[: telling + 1] for other in others):
                telling += 1
            logit = float(steps[index][telling])
    right = item["candidates"].index(item["answer"])
    margin = sums[right] - max(value for number, value in enumerate(sums) if number != right)
    return {
        "correct": float(margin > 0), "logit": logit, "logprob": sums[right], "margin": margin,
        "choice": float(np.argmax(sums)),
    }


@pytest.mark.parametrize("multi_token", [False, True])
@pytest.mark.parametrize("batch_rows", [5, 64])
def test_values_equal_scoring_by_hand(subject, means, multi_token, batch_rows):
    items = make_items(6, multi_token=multi_token)
    interventions = {
        "none": None,
        "zero": ZeroHeads([(0, 0), (2, 1)]),
        "kv": ReplaceImageKV([(1, 0), (1, 1)], means),
        "drop": DropTokens(1, 0.4),
    }
    table = sweep(subject, items, interventions, batch_rows=batch_rows, metrics=METRICS)
    assert list(table.columns) == ["item", "cluster", "task", "intervention", "metric", "value"]
    assert len(table) == 6 * 4 * len(METRICS)
    values = table.set_index(["item", "intervention", "metric"])["value"]
    for item in items:
        for name, intervention in interventions.items():
            for metric, expected in by_hand(subject, item, intervention).items():
                assert values[item["id"], name, metric] == pytest.approx(expected, abs=2e-3), (item["id"], name, metric)


def test_multi_token_candidates_share_rows(subject):
    item = make_items(1, multi_token=True)[0]
    one = vlm_core.sweeps.sweep.candidate_set(subject, item)
    dark = subject.continuation("dark red")[0]
    assert one.prefixes == ((dark,),)
    assert one.reads == ((0, 0), (0, 1))


def test_rows_of_a_sequence_of_interventions_are_labelled(subject):
    table = sweep(subject, make_items(2), [None, ZeroHeads([(0, 1)])], metrics=("margin",))
    assert table["intervention"].tolist() == ["none", "zero(L0.H1)"] * 2
    assert table["cluster"].tolist() == ["scene-0"] * 4
    with pytest.raises(ValueError, match="same description"):
        sweep(subject, make_items(2), [None, None])


def test_assignments_run_only_the_rows_asked_for(subject):
    items = make_items(4)
    interventions = {"a": ZeroHeads([(0, 1)]), "b": ZeroHeads([(1, 1)])}
    table = sweep(subject, items, interventions, assignments=[(2, "b"), (0, "a"), (0, "b")], metrics=("margin",))
    assert list(zip(table["item"], table["intervention"], strict=True)) == [
        ("item-0", "a"), ("item-0", "b"), ("item-2", "b"),
    ]
    full = sweep(subject, items, interventions, metrics=("margin",)).set_index(["item", "intervention"])["value"]
    assert table["value"].tolist() == pytest.approx([full["item-0", "a"], full["item-0", "b"], full["item-2", "b"]])
    with pytest.raises(ValueError, match="not among the interventions"):
        sweep(subject, items, interventions, assignments=[(0, "c")])


def test_repeated_assignments_each_get_their_value(subject):
    table = sweep(
        subject, make_items(2, multi_token=True), {"a": None}, assignments=[(1, "a"), (1, "a")], metrics=METRICS
    )
    assert len(table) == 2 * len(METRICS)
    assert np.array_equal(table["value"][: len(METRICS)], table["value"][len(METRICS) :])


@pytest.mark.parametrize(
    ("candidates", "answer", "telling"),
    [
        (["red", "green", "blue"], "green", (1, "green")),
        (["dark red", "light red", "dark blue"], "dark blue", (2, "dark")),  # as "top left" among four corners
        (["big dark red", "big dark blue"], "big dark blue", (1, "blue")),
        (["dark", "dark red"], "dark red", (1, "red")),
        (["dark", "dark red"], "dark", (0, "dark")),
    ],
)
def test_the_logit_is_of_the_first_token_that_chooses(subject, candidates, answer, telling):
    item = make_items(1)[0] | {"candidates": candidates, "answer": answer}
    found = vlm_core.sweeps.scoring.candidate_set(subject, item)
    number, word = telling
    candidate, _, token = found.terms[found.telling]
    assert (candidate, token) == (number, subject.continuation(word)[0])
    by_row = sweep(subject, [item], [None, ZeroHeads([(0, 1)])], metrics=("logit", "logprob"))["value"].to_numpy().reshape(2, 2)
    seen = subject.encode([item["image"]], [item["prompt"]], answers=[answer])
    with torch.inference_mode():
        logits = subject.model(**seen.inputs).logits[0]
    offset = subject.continuation(answer).index(token)
    assert by_row[0, 0] == pytest.approx(float(logits[-1 - len(subject.continuation(answer)) + offset, token]), abs=1e-4)
    assert by_row[0, 0] != pytest.approx(by_row[0, 1])


def test_ties_are_wrong(subject):
    scores = np.array([[-1.0, -1.0], [-1.0, -2.0]])
    sets = [SimpleNamespace(answer=0)] * 2
    assert vlm_core.sweeps.sweep.score_candidates(sets, scores, np.zeros(2))["correct"].tolist() == [0.0, 1.0]


def test_items_may_be_objects(subject):
    items = make_items(2)
    as_objects = [SimpleNamespace(**item) for item in items]
    pd.testing.assert_frame_equal(sweep(subject, as_objects, [None]), sweep(subject, items, [None]))


def test_a_killed_sweep_resumes(monkeypatch, tmp_path, subject):
    monkeypatch.setattr(vlm_core.sweeps.sweep, "_BLOCK_ITEMS", 2)
    items, interventions = make_items(6), {"none": None, "zero": ZeroHeads([(0, 1)])}
    expected = sweep(subject, items, interventions)
    work, calls = vlm_core.sweeps.sweep._measure, []

    def dies_in_the_third_block(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(*args)

    monkeypatch.setattr(vlm_core.sweeps.sweep, "_measure", dies_in_the_third_block)
    with pytest.raises(KeyboardInterrupt):
        sweep(subject, items, interventions, store=tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    seen = []
    resumed = sweep(subject, items, interventions, store=tmp_path, progress=lambda done, n: seen.append((done, n)))
    assert len(calls) == 4
    assert seen == [(4, 12), (8, 12), (12, 12)]
    pd.testing.assert_frame_equal(resumed, expected)
    assert not list(tmp_path.glob("*.partial"))


def test_a_store_is_not_taken_for_another_subject_image_or_intervention(tmp_path, subject):
    items = make_items(2)
    sweep(subject, items, {"x": None}, store=tmp_path)
    sweep(subject, items, {"x": ZeroHeads([(0, 1)])}, store=tmp_path)
    sweep(tiny_subject(seed=5), items, {"x": None}, store=tmp_path)
    flipped = [{**item, "image": item["image"].rotate(180)} for item in items]
    sweep(subject, flipped, {"x": None}, store=tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == 4


def test_what_cannot_be_scored_is_refused(subject):
    item = make_items(1)[0]
    with pytest.raises(ValueError, match="not among its candidates"):
        sweep(subject, [{**item, "answer": "circle"}], [None])
    with pytest.raises(SubjectError, match="cannot write the answer 'mauve'"):
        sweep(subject, [{**item, "candidates": [*item["candidates"], "mauve"]}], [None])
    with pytest.raises(ValueError, match="unknown metrics"):
        sweep(subject, [item], [None], metrics=("accuracy",))
    with pytest.raises(ValueError, match="has no field 'candidates'"):
        sweep(subject, [{name: value for name, value in item.items() if name != "candidates"}], [None])


def test_an_item_with_nothing_to_be_wrong_with_is_refused(subject):
    item = make_items(1)[0]
    with pytest.raises(ValueError, match="item 'item-0' has the single candidate 'red', which nothing could beat"):
        sweep(subject, [{**item, "answer": "red", "candidates": ["red"]}], [None])


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_two_items_of_one_id_are_refused_before_anything_is_done(tmp_path, subject, kind):
    items = make_items(3)
    items[2] = {**items[2], "id": "item-1"}
    given = items if kind == "list" else Columns(items)
    with pytest.raises(ValueError, match="two items have the id 'item-1'.*give each its own"):
        sweep(subject, given, [None], store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


class Columns:
    """A dataset that gives columns by name and must not be asked for an item."""

    column_names = ("id",)

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        assert key == "id"
        return [item["id"] for item in self.items]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["hidden", "logits", "a token that is no candidate"])
def test_numbers_that_are_not_finite_are_neither_right_nor_wrong(subject, monkeypatch, where, value):
    items = make_items(2, multi_token=True)
    metrics = (*METRICS, "candidate 0", "candidate 1")
    table = sweep(subject, items, {"none": None, "zero": ZeroHeads([(2, 1)])}, metrics=metrics)
    assert np.isfinite(table["value"]).all()
    read = vlm_core.sweeps.scoring.read_logits
    token = subject.continuation(items[0]["answer"])[-1]

    def overflowing(subject, hidden):
        if where == "hidden":
            hidden = hidden.clone()
            hidden[0, 3] = value
            return read(subject, hidden)
        logits = read(subject, hidden).clone()
        logits[0, token if where == "logits" else 1] = value
        return logits

    monkeypatch.setattr(vlm_core.sweeps.scoring, "read_logits", overflowing)
    found = sweep(subject, items[:1], {"none": None, "zero": ZeroHeads([(2, 1)])}, metrics=metrics, batch_rows=1)
    values = found.pivot(index="intervention", columns="metric", values="value")
    if where == "a token that is no candidate" and value == -np.inf:
        # A model that never writes a token says so.
        assert np.isfinite(values.to_numpy()).all()
    else:
        assert values.isna().to_numpy().all()


def test_an_empty_sweep_is_an_empty_table(subject):
    assert list(sweep(subject, [], [None]).columns) == list(vlm_core.sweeps.sweep.COLUMNS)


def test_paths_and_reasons_are_told(tmp_path, subject, means):
    items = make_items(2)
    interventions = {
        "none": None,
        "question": ReplaceImageKV([(1, 1)], means, "question"),
        "later": ZeroHeads([(1, 1)]),
        "first": ZeroHeads([(0, 1)]),
    }
    for _ in range(2):
        table = sweep(subject, items, interventions, metrics=("margin",), store=tmp_path)
        assert table.attrs["paths"] == {"shared prefix": 4, "resume": 4}
        assert table.attrs["reasons"] == {"resume: ZeroHeads changes tokens up to the last image token": 4}
    table = sweep(subject, items, {"first": ZeroHeads([(0, 1)])}, metrics=("margin",))
    assert table.attrs["paths"] == {"whole": 2}
    assert list(table.attrs["reasons"]) == ["whole: ZeroHeads changes tokens up to the last image token, from the first layer on"]
    table = sweep(subject, items, [None], metrics=("margin",))
    assert table.attrs == {"paths": {"whole": 2}, "reasons": {}}


def test_token_groups_of_items_reach_the_interventions(tmp_path, subject):
    items, knock = make_items(3), {"x": KnockOut("last", "half", (0, 1, 2))}

    def half(item, prompt):
        image = prompt.image.numpy()
        return {"half": image & (image.cumsum() <= image.sum() * (0.5 if item["id"] != "item-1" else 1.0))}

    table = sweep(subject, items, knock, metrics=("logprob",), groups=half, store=tmp_path)
    whole = sweep(subject, items, {"x": KnockOut("last", "image", (0, 1, 2))}, metrics=("logprob",))
    assert table["value"][1] == pytest.approx(whole["value"][1], abs=1e-5)
    assert abs(table["value"][0] - whole["value"][0]) > 1e-4
    other = sweep(subject, items, knock, metrics=("logprob",), store=tmp_path, groups=lambda item, prompt: {"half": prompt.image})
    assert other["value"].tolist() == pytest.approx(whole["value"].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="no token group 'half'"):
        sweep(subject, items, knock)
    with pytest.raises(ValueError, match="give one boolean per token"):
        sweep(subject, items, knock, groups=lambda item, prompt: {"half": [True]})


@pytest.mark.parametrize("grouped", [False, True])
def test_a_stored_sweep_is_found_without_any_forward_pass(tmp_path, subject, grouped):
    items = make_items(3)
    knock = {"x": KnockOut("last", "half" if grouped else "image", (0, 1, 2))}
    ran, part = [], 0.5

    def half(item, prompt):
        return {"half": prompt.image.numpy() & (prompt.image.numpy().cumsum() <= int(prompt.image.sum()) * part)}

    def work():
        ran.clear()
        handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: ran.append(type(module).__name__))
        try:
            return sweep(subject, items, knock, metrics=("logprob",), store=tmp_path, groups=half if grouped else None)
        finally:
            handle.remove()

    first = work()
    assert "CLIPVisionModel" in ran
    again = work()
    assert not ran
    pd.testing.assert_frame_equal(first, again)
    if grouped:
        # What the groups say counts, not what they are called or who says it.
        part = 1.0
        other = work()
        assert ran and not np.allclose(other["value"], first["value"])


def test_a_progress_bar_counts_rows_and_tells_the_time_left(subject, capsys, monkeypatch):
    monkeypatch.setattr(vlm_core.sweeps.sweep, "_BLOCK_ITEMS", 2)
    sweep(subject, make_items(4), [None, ZeroHeads([(0, 1)])], progress=True)
    shown = capsys.readouterr().err
    assert "8/8" in shown and "<00:0" in shown


def test_the_time_left_is_that_of_rows_computed_here(capsys):
    bar = vlm_core.sweeps.sweep.progress_bar()
    bar.found(80)
    bar(80, 100)
    # Ten rows in a hundred seconds, ten to go.
    bar.bar.start_t -= 100
    bar(90, 100)
    assert "90/100 [01:40<01:40" in str(bar.bar)
    bar.found(5)
    bar(95, 100)
    assert "95/100 [01:40<00:50" in str(bar.bar)
    bar(100, 100)
    capsys.readouterr()


@pytest.mark.parametrize("where", ["here", "executor"])
def test_what_comes_from_the_store_is_told_apart_from_what_is_computed(tmp_path, subject, monkeypatch, where):
    monkeypatch.setattr(vlm_core.sweeps.sweep, "_BLOCK_ITEMS", 1)

    class Progress:
        def __init__(self):
            self.seen = []

        def __call__(self, done, total):
            self.seen.append((done, total))

        def found(self, rows):
            self.seen.append(rows)

    def work(items):
        progress, executor = Progress(), None if where == "here" else SerialExecutor()
        sweep(subject, items, [None, ZeroHeads([(0, 1)])], store=tmp_path, progress=progress, executor=executor)
        return progress.seen

    items = make_items(3)
    assert work(items[:2]) == [(2, 4), (4, 4)]
    assert work(items) == [2, (2, 6), 2, (4, 6), (6, 6)]
    assert not list((tmp_path / "locks").iterdir())


def test_blocks_hold_so_many_rows_at_most(subject, monkeypatch):
    monkeypatch.setattr(vlm_core.sweeps.sweep, "_BLOCK_ROWS", 5)
    seen = []
    sweep(subject, make_items(4), [None, ZeroHeads([(0, 1)])], progress=lambda done, n: seen.append(done))
    assert seen == [4, 8]


def test_rows_that_keep_as_much_stand_together_and_as_many_as_their_length_allows(subject, monkeypatch):
    """Shortened rows carry no place that another row needs, and a batch of them has more rows than one of whole prompts."""
    call, passes = vlm_core.sweeps.resume.call_layer, []

    def watched(layer, entering, kwargs):
        left = call(layer, entering, kwargs)
        passes.append(tuple(left.shape[:2]))
        return left

    monkeypatch.setattr(vlm_core.sweeps.resume, "call_layer", watched)
    items = make_items(4)
    for item in items:
        item["prompt"] = items[0]["prompt"]
    whole = len(subject.encode_items(items[:1]).valid[0])
    n_image = int(subject.encode_items(items[:1]).image.sum())
    monkeypatch.setattr(vlm_core.sweeps.budget.Budget, "of", classmethod(lambda cls, *args: cls(tokens=2 * whole, most=10**6, stored=10**9)))
    keeps = (0.25, 0.5, 0.75)
    sweep(subject, items, {f"{keep}/{number}": DropTokens(1, keep, "stride" if number else "random") for keep in keeps for number in range(2)})
    lengths = {whole - n_image + round(keep * n_image) for keep in keeps}
    ran = {length: sum(rows for rows, found in passes if found == length) for length in lengths}
    assert len(set(ran.values())) == 1 and min(ran.values()) > 0, "as many rows of each length: none runs at the length of another"
    assert all(rows <= 2 * whole // length for rows, length in passes if length in lengths)
    assert max(rows for rows, length in passes if length == min(lengths)) > 2, "short rows fill the batch"


def test_policies_see_a_prompt_once_in_all_batches_of_a_group(monkeypatch):
    """Whatever its fraction; and what was done before to a row is seen by that row alone."""
    subject, items, looked = tiny_subject(), make_items(3), []

    def looks(shortening, layer, *rest, look=Shortening._seen):
        looked.append(layer)
        return look(shortening, layer, *rest)

    monkeypatch.setattr(Shortening, "_seen", looks)
    plain = {f"{policy.name}/{keep}": DropTokens(2, keep, policy) for policy in (FastV(), DivPrune(), ToMe()) for keep in (0.25, 0.5, 0.75)}
    found = sweep(subject, items, plain, batch_rows=2)
    # FastV and ToMe read the attention of the layer before, in batches of their own or not: at most with it and without.
    assert looked.count(2) == len(looked) <= 2 * len(items)
    for item in items:
        for name, row in plain.items():
            alone = sweep(subject, [item], {name: row})
            together = found[(found["item"] == item["id"]) & (found["intervention"] == name)]
            np.testing.assert_allclose(together["value"].to_numpy(float), alone["value"].to_numpy(float), atol=1e-5)
    looked.clear()
    zeroed = {f"{name} without heads": (ZeroHeads([(0, 1)]), row) for name, row in plain.items()}
    sweep(subject, items, zeroed, batch_rows=2)
    assert len(looked) == len(zeroed) * len(items)


def test_what_policies_saw_before_one_layer_goes_before_the_next(monkeypatch):
    subject, layers, run = tiny_subject(), [], vlm_core.sweeps.recorded.forward_resumed

    def watched(subject, recording, stems, *rest):
        hidden = run(subject, recording, stems, *rest)
        layers.append({key[0] for stem in recording.stems for key in stem.seen})
        return hidden

    monkeypatch.setattr(vlm_core.sweeps.recorded, "forward_resumed", watched)
    sweep(subject, make_items(2), {f"{layer}/{keep}": DropTokens(layer, keep, DivPrune()) for layer in (1, 2) for keep in (0.25, 0.5)}, batch_rows=2)
    assert layers == [{1}, {1}, {2}, {2}]


def test_what_a_policy_had_begun_when_memory_ran_out_is_begun_anew(monkeypatch):
    subject, items = tiny_subject(), make_items(2)
    rows = {str(keep): DropTokens(1, keep, DivPrune()) for keep in (0.25, 0.5, 0.75)}
    expected, failed, minimum = sweep(subject, items, rows), [], torch.minimum

    def full_once(*args):
        if len(failed) < 1:
            failed.append(1)
            raise torch.OutOfMemoryError
        return minimum(*args)

    monkeypatch.setattr(torch, "minimum", full_once)
    found = sweep(subject, items, rows)
    assert failed
    np.testing.assert_allclose(found["value"].to_numpy(float), expected["value"].to_numpy(float), atol=1e-5)


def test_two_processes_share_a_sweep_and_one_killed_in_its_block_holds_up_nobody(tmp_path):
    """The first is killed, really, while it holds its second block and the other has nothing else to do."""
    processes = {role: Warm(["-c", SHARED, tmp_path, role]) for role in ("victim", "other")}
    ended = {role: process.wait(timeout=120) for role, process in processes.items()}
    assert ended == {"victim": -signal.SIGKILL, "other": 0}, [process.said() for process in processes.values()]
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [block for role, word, block in log if role == "victim"] == ["item-0", "item-0", "item-2"]
    # Nothing that was finished is computed again, and what the dead one was at is, once.
    assert [block for role, word, block in log if role == "other" and word == "end"] == ["item-4", "item-6", "item-2"]
    assert len(list((tmp_path / "store").glob("*.parquet"))) == 4
    assert not list((tmp_path / "store" / "locks").iterdir())


SHARED = """
import os, signal, sys, time
from pathlib import Path
import vlm_core.sweeps.sweep
from vlm_core import ZeroHeads, sweep
from vlm_core.tests.tiny import make_items, tiny_subject

folder, role = Path(sys.argv[1]), sys.argv[2]
work, log = vlm_core.sweeps.sweep._measure, folder / "log"

def note(*words):
    with log.open("a") as file:
        file.write(" ".join((role, *words)) + chr(10))

def wait_for(line):
    deadline = time.monotonic() + 100
    while not (log.exists() and line in log.read_text().splitlines()):
        assert time.monotonic() < deadline, line
        time.sleep(0.01)

def measure(subject, block, *more):
    name = block.items[0]["id"]
    note("start", name)
    if role == "victim" and name == "item-2":
        wait_for("other end item-6")
        # Long enough for the other to ask for this block, and be told to wait.
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    table = work(subject, block, *more)
    note("end", name)
    return table

vlm_core.sweeps.sweep._BLOCK_ITEMS, vlm_core.sweeps.sweep._measure = 2, measure
subject = tiny_subject()
if role == "other":
    wait_for("victim start item-2")
table = sweep(subject, make_items(8), [None, ZeroHeads([(0, 1)])], store=folder / "store")
assert len(table) == 8 * 2 * 3
"""


@pytest.mark.parametrize(
    "intervention",
    [
        ZeroHeads([(0, 1), (1, 2)], queries="last"),
        ZeroHeads([(0, 1), (1, 2)], queries=(-1,)),
        KnockOut("last", "image", (1, 2)),
        DropTokens(2, 0.25, "attention"),
        Patch("mlp", [1], GaussianNoise(1.0)),
        ReplaceTokens(Vector(torch.ones(32)), tokens="text"),
        Steer(1, torch.ones(32), positions="last"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_an_answer_appended_is_scored_as_the_model_would_write_it(subject, intervention):
    """Teacher-forced rows equal the steps of generation under the intervention, and a longer candidate changes no shorter one."""
    (item,) = make_items(1)
    item = {**item, "id": "one", "answer": "red", "candidates": ["red", "dark red", "dark circle"]}
    batch, number = subject.encode_items([item]), item_number(item)
    expected = []
    for candidate in item["candidates"]:
        tokens, cache, total = subject.continuation(candidate), None, 0.0
        with torch.inference_mode(), subject.intervene(intervention, batch, items=[number]):
            inputs = dict(batch.inputs)
            for token in tokens:
                seen = subject.model(**inputs, past_key_values=cache, use_cache=True)
                cache = seen.past_key_values
                total += seen.logits[0, -1].float().log_softmax(-1)[token].item()
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
                where = mask.sum(1, keepdim=True) - 1
                inputs = {"input_ids": torch.tensor([[token]]), "attention_mask": mask, "position_ids": where}
        expected.append(total)
    metrics = [f"candidate {number}" for number in range(3)]
    found = sweep(subject, [item], {"cut": intervention}, metrics=metrics)["value"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    alone = sweep(subject, [{**item, "candidates": ["red", "green"]}], {"cut": intervention}, metrics=["candidate 0"])["value"]
    np.testing.assert_allclose(alone, found[:1], rtol=1e-5, atol=1e-5)


def test_a_sweep_lets_go_of_what_it_was_given(subject):
    direction = torch.ones(32)
    gone = weakref.ref(direction)
    steer = Steer(1, direction)
    kept = weakref.ref(steer.direction)
    sweep(subject, make_items(1), {"x": steer})
    del steer, direction
    gc.collect()
    assert gone() is None and kept() is None
