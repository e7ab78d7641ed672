"""The benchmark measures what it says: equal work or no figure, every bar judged, every absence told. Nothing here looks at a clock."""

import itertools
import json
import math
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from vlm_core import HeadId, ReplaceImageKV, ZeroHeads
from vlm_core.allocation import peak_bytes
from vlm_core.bench import __main__ as command
from vlm_core.bench import works
from vlm_core.bench.flops import sweep_flops, typical_width
from vlm_core.bench.markdown import render
from vlm_core.bench.peers import PEERS, open_peers
from vlm_core.bench.plain import OutputAttentions, PlainHooks
from vlm_core.bench.report import Report, Row, machine
from vlm_core.bench.subjects import SHAPES, open_case
from vlm_core.bench.timing import BLOCK, CLOCKS, compare, in_pairs, interleave
from vlm_core.bench.works import WORKS, Agreement, Bars, measure, same_work

FIELDS = {
    "work": str,
    "subject": str,
    "by": str,
    "against": str,
    "figure": float | None,
    "unit": str,
    "low": float | None,
    "high": float | None,
    "bar": float | None,
    "at_least": bool,
    "own": float | None,
    "other": float | None,
    "measured_in": str,
    "difference": float | None,
    "rounds": int,
    "note": str,
    "met": bool | None,
}


@pytest.fixture(scope="module", autouse=True)
def few_forward_passes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(works, "SECONDS_OF_FORWARDS", 0.0)
        patch.setattr(works, "SHARE_OF_PRODUCTS", 0.0)
        yield


@pytest.fixture(scope="module")
def case():
    return open_case("tiny")


@pytest.fixture(scope="module")
def rows(case):
    return measure(case, rounds=1, peers={}, bars=Bars(zero_heads=1e-6, text_mass=1e6, no_op=1e-6))


def by_work(rows, start):
    return [row for row in rows if row.work.startswith(start)]


# -- the same work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_a_pass", [1, 4])
def test_hooks_do_what_the_interventions_say(case, rows_a_pass):
    prompt, plain = case.prompt(0), PlainHooks(case, rows_a_pass)
    for hooked, intervention in (
        (plain.replace_image_kv(prompt, case.heads), lambda head: ReplaceImageKV([head], case.means, queries="text")),
        (plain.zero_heads(prompt, case.heads), lambda head: ZeroHeads([head])),
    ):
        for head, logits in zip(case.heads, hooked, strict=True):
            with torch.inference_mode(), case.subject.intervene(intervention(head), prompt.batch):
                expected = case.subject.model(**prompt.batch.inputs, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_hooks_leave_the_plain_model_as_it_was(case):
    prompt, plain = case.prompt(0), PlainHooks(case)
    before = plain.forward(prompt)
    plain.zero_heads(prompt, case.heads)
    plain.image_mass(prompt)
    assert torch.equal(plain.forward(prompt), before)


def test_three_ways_to_the_image_mass_agree(case):
    prompt = case.prompt(0)
    mass = OutputAttentions(case).image_mass(prompt)
    assert mass.shape == (3, 2)
    assert mass.min() > 0 and mass.max() < 1 and mass.std() > 1e-3
    torch.testing.assert_close(PlainHooks(case).image_mass(prompt), mass, rtol=0, atol=1e-6)


class Counted(PlainHooks):
    """Hooks that do something else than they should, and know how often they were asked."""

    name = "wrong"

    def __init__(self, case, wrong_from=0):
        super().__init__(case)
        self.name, self.calls, self.wrong_from = "wrong", 0, wrong_from

    def replace_image_kv(self, prompt, heads):
        self.calls += 1
        return self.wrong(prompt, heads) if self.calls > self.wrong_from else super().replace_image_kv(prompt, heads)


class Forgetful(Counted):
    def wrong(self, prompt, heads):
        return self.forward(prompt).expand(len(heads), -1)


class NextHead(Counted):
    def wrong(self, prompt, heads):
        return PlainHooks.replace_image_kv(self, prompt, [HeadId(head.layer, 1 - head.head) for head in heads])


class AllQueries(Counted):
    def wrong(self, prompt, heads):
        subject, logits = self.case.subject, []
        for head in heads:
            with torch.inference_mode(), subject.intervene(ReplaceImageKV([head], self.case.means), prompt.batch):
                logits.append(subject.model(**prompt.batch.inputs, use_cache=False).logits[:, -1])
        return torch.cat(logits)


class TooFew(Counted):
    def wrong(self, prompt, heads):
        return PlainHooks.replace_image_kv(self, prompt, heads[:-1])


class NotANumber(Counted):
    def wrong(self, prompt, heads):
        return torch.full((len(heads), SHAPES["tiny"].vocabulary), float("nan"))


@pytest.mark.parametrize("kind", [Forgetful, NextHead, AllQueries, TooFew, NotANumber])
def test_a_competitor_that_does_something_else_is_not_timed(case, kind):
    wrong = kind(case)
    found = works.sweep_rows(case, "image-kv", {"right": PlainHooks(case), "wrong": wrong}, 1, Bars(image_kv=0.0))
    right, row, _ = found
    assert right.against == "right" and right.figure > 0 and right.note == ""
    assert row.against == "wrong" and row.figure is None and row.note.startswith("not the same work")
    assert wrong.calls == 1


def test_a_competitor_that_goes_wrong_while_timed_has_no_figure(case):
    wrong = Forgetful(case, wrong_from=1)
    row, _ = works.sweep_rows(case, "image-kv", {"wrong": wrong}, 2, Bars())
    assert wrong.calls == 3
    assert row.figure is None and row.note.endswith("(in a timed round)")


def test_a_competitor_that_fails_is_a_row(case):
    class Failing(Counted):
        def wrong(self, prompt, heads):
            raise RuntimeError("no such hook\nand more")

    row, _ = works.sweep_rows(case, "image-kv", {"wrong": Failing(case)}, 1, Bars())
    assert row.figure is None and row.note == "failed: RuntimeError: no such hook"


def test_vlm_core_is_held_to_the_same(case, monkeypatch):
    monkeypatch.setattr(works.Own, "replace_image_kv", works.Own.zero_heads)
    row, efficiency = works.sweep_rows(case, "image-kv", {"right": PlainHooks(case)}, 1, Bars(image_kv=0.0))
    assert row.figure is None and row.note.startswith("vlm_core not the same work")
    assert efficiency.figure is None and efficiency.note == row.note


def test_a_mass_that_differs_has_no_figure(case, monkeypatch):
    monkeypatch.setattr(
        works.Own, "image_mass", lambda self, prompt, queries="text": OutputAttentions(self.case).image_mass(prompt, "text")
    )
    text, everything, *_ = works.forward_rows(case, ["mass"], {}, 1, Bars())
    assert text.figure > 0 and everything.figure is None and everything.note.startswith("not the same work")


def test_agreement_is_no_wider_than_a_part_of_the_effect():
    clean = np.zeros((1, 3))
    small = Agreement.of(np.full((4, 3), 1e-4), clean)
    assert small.allowed == pytest.approx(5e-6)
    assert small.judge(np.zeros((4, 3)), np.full((4, 3), 1e-4))[1]
    assert Agreement.of(np.full((4, 3), 10.0), clean).allowed == pytest.approx(1e-3)
    assert "change nothing" in Agreement.of(np.zeros((4, 3)), clean).judge(np.zeros((4, 3)), np.zeros((4, 3)))[1]


# -- peers ------------------------------------------------------------------------------------------------------------


class Refusing:
    distribution, supported = "torch", "2"

    def __init__(self, case):
        raise ValueError("no adapter for this model\nsee the manual")


class Absent:
    distribution, supported = "no-such-interpretability-tool", "1"


class Old:
    distribution, supported = "torch", "0.4"


def test_peers_that_take_no_part_are_listed_with_the_reason(case):
    rows = measure(case, works=[], rounds=1, peers={"refusing": Refusing, "absent": Absent, "old": Old})
    notes = {row.against: row.note for row in rows}
    assert notes["refusing"].endswith("does not take this subject: ValueError: no adapter for this model")
    assert "is not installed" in notes["absent"]
    assert notes["old"].endswith("the comparison is written for 0.4")
    assert all(row.figure is None and row.met is None for row in rows)


@pytest.mark.parametrize("peer", PEERS)
def test_an_installed_peer_does_the_same_work(case, peer):
    opened, missing = open_peers(case, {peer: PEERS[peer]})
    if "installed" in missing.get(peer, ""):
        pytest.skip(missing[peer])
    assert not missing
    prompt = case.prompt(0)
    for work in ("image-kv", "zero-heads"):
        judged, _ = same_work(case, work, opened, prompt, case.heads)
        assert [reason for _, reason in judged.values()] == [""]
    (tool,) = opened.values()
    torch.testing.assert_close(tool.forward(prompt), PlainHooks(case).forward(prompt), rtol=0, atol=1e-4)
    torch.testing.assert_close(tool.image_mass(prompt), OutputAttentions(case).image_mass(prompt), rtol=0, atol=1e-5)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_work_has_its_rows(case, rows):
    n = len(case.heads)
    for work in ("image-kv", "zero-heads"):
        pair = by_work(rows, f"{n} {WORKS[work]}")
        assert [row.against for row in pair] == ["plain hooks", "plain hooks, 8 rows a pass"]
    assert len(by_work(rows, "arithmetic efficiency")) == 2
    assert [row.by for row in by_work(rows, WORKS["no-op"])] == ["vlm_core"]
    assert [row.by for row in by_work(rows, WORKS["mass"])] == ["vlm_core", "vlm_core", "plain hooks", "output_attentions=True"]
    assert len(by_work(rows, WORKS["memory"])) == 2
    for row in rows:
        assert row.note == "" or row.figure is not None, row
        assert math.isfinite(row.figure) and row.figure >= 0
    (no_op,) = by_work(rows, WORKS["no-op"])
    assert no_op.difference == 0.0


def test_bars_are_judged_where_they_were_set(rows):
    met = {(row.work.split(" ", 1)[1] if row.work[0].isdigit() else row.work, row.by, row.against): row.met for row in rows}
    assert met[WORKS["zero-heads"], "vlm_core", "plain hooks"] is True
    assert met[WORKS["zero-heads"], "vlm_core", "plain hooks, 8 rows a pass"] is None
    assert met[WORKS["image-kv"], "vlm_core", "plain hooks"] is None
    assert met[f"{WORKS['mass']}, text queries", "vlm_core", "plain forward"] is True
    assert met[f"{WORKS['mass']}, text queries", "plain hooks", "plain forward"] is None
    assert met[WORKS["no-op"], "vlm_core", "plain forward"] is False


def test_the_bars_are_those_of_the_project():
    midsize, embedded = works.BARS["midsize"], works.BARS["embedded"]
    assert (midsize.image_kv, midsize.zero_heads, midsize.text_mass, midsize.all_mass) == (25.0, 1.8, 1.15, 1.5)
    assert (midsize.memory, midsize.no_op, midsize.efficiency) == (0.05, 1.02, 0.60)
    assert (embedded.image_kv, embedded.efficiency, embedded.zero_heads) == (None, None, 1.8)


@pytest.mark.parametrize(
    ("figure", "bar", "at_least", "met"),
    [
        (1.8, 1.8, True, True),
        (1.79, 1.8, True, False),
        (1.02, 1.02, False, True),
        (1.03, 1.02, False, False),
        (None, 1.8, True, False),
        (2.0, None, True, None),
    ],
)
def test_a_bar_is_met_or_not(figure, bar, at_least, met):
    assert Row("work", "subject", "a", "b", figure=figure, bar=bar, at_least=at_least).met is met


def test_json_has_every_field(rows):
    report = Report(machine(1), {"subjects": ["tiny"], "works": list(WORKS), "rounds": 1, "clock": "wall", "seed": 0}, rows)
    told = json.loads(report.as_json())
    assert set(told) == {"machine", "settings", "seconds", "rows"}
    assert set(told["machine"]) >= {"cpu", "cores", "threads", "versions", "date"}
    assert told["machine"]["versions"]["torch"] and len(told["rows"]) == len(rows)
    for row in told["rows"]:
        assert set(row) == set(FIELDS)
        assert all(isinstance(row[name], kind) for name, kind in FIELDS.items()), row


def test_markdown_tells_figures_bars_and_reasons():
    rows = [
        Row(
            "sweep",
            "tiny",
            "vlm_core",
            "hooks",
            figure=30.04,
            low=28.0,
            high=31.0,
            bar=25.0,
            own=2.0,
            other=60.0,
            difference=1e-6,
            rounds=3,
        ),
        Row(
            "memory",
            "tiny",
            "vlm_core",
            "maps",
            figure=0.08,
            unit="of the memory",
            bar=0.05,
            at_least=False,
            own=1.0,
            other=12.5,
            measured_in="MB",
        ),
        Row("sweep", "tiny", "vlm_core", "other", note="not the same work: a | b"),
    ]
    page = render(Report(machine(1), {"rounds": 3, "clock": "wall", "seed": 0, "dtype": "float32"}, rows))
    assert "| sweep | vlm_core | hooks | **30.0** x faster | 28.0 to 31.0 | ≥ 25.0 | yes | 2, 60 ms | 1e-06 |  |" in page
    assert "**8.0 %** of the memory |  | ≤ 5.0 % | **no** | 1, 12.5 MB" in page
    assert "| – |  |  |  |  |  | not the same work: a \\| b |" in page


# -- instruments ------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_nobody_always_follows_the_same_one():
    order = []
    seconds = interleave({name: lambda number, name=name: (order.append((number, name)), 2)[1] for name in "abc"}, 30)
    assert all({name for _, name in order[3 * number : 3 * number + 3]} == set("abc") for number in range(30))
    assert [number for number, _ in order] == [number for number in range(30) for _ in "abc"]
    pairs = Counter((one, other) for (_, one), (_, other) in itertools.pairwise(order))
    assert all(pairs[one, other] >= 5 for one, other in itertools.permutations("abc", 2))
    assert {name: len(found) for name, found in seconds.items()} == dict.fromkeys("abc", 30)


@pytest.mark.parametrize(("clock", "seconds"), [("wall", 2.5), ("cpu", 0.5)])
def test_time_is_read_from_the_clock_that_was_asked_for(monkeypatch, clock, seconds):
    for name, step in (("wall", 5.0), ("cpu", 1.0)):
        ticks = itertools.count(0.0, step)
        monkeypatch.setitem(CLOCKS, name, lambda ticks=ticks: next(ticks))
    assert interleave({"work": lambda number: 2}, 3, clock) == {"work": [seconds] * 3}


def test_ratios_are_paired():
    ratio = compare([2.0, 20.0, 6.0, 8.0, 10.0], [1.0, 10.0, 2.0, 2.0, 2.0])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(("rounds", "below", "above"), [(6, 0, 5), (10, 1, 8), (20, 5, 14)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(rounds, below, above):
    """The order statistics of the published tables (Conover, Practical Nonparametric Statistics, 3.2)."""
    ratios = np.random.default_rng(0).permutation(np.arange(rounds) ** 2.0)
    found = compare(ratios, np.ones(rounds))
    assert found.within == max(found.median - below**2, above**2 - found.median)
    assert compare(ratios[:5], np.ones(5)).within == math.inf, "five rounds have no interval of 95 %"


@pytest.mark.parametrize(("unsteady", "within", "expected"), [(0.0, 0.01, 10), (0.05, 0.02, (40, 150)), (0.5, 0.01, 300)])
def test_pairs_are_timed_until_the_median_is_known(monkeypatch, unsteady, within, expected):
    seconds, now, asked = np.random.default_rng(0), [0.0], {"ours": [], "theirs": []}
    monkeypatch.setitem(CLOCKS, "wall", lambda: now[0])

    def contestant(name, cost):
        def work(number):
            asked[name].append(number)
            now[0] += cost * np.exp(unsteady * seconds.standard_normal())
            return 1

        return work

    ours, theirs = in_pairs(contestant("ours", 2.0), contestant("theirs", 1.0), 300, 2 * within)
    assert asked["ours"] == asked["theirs"] == list(range(len(ours))) and len(ours) == len(theirs)
    least, most = expected if isinstance(expected, tuple) else (expected, expected)
    assert least <= len(ours) <= most
    assert abs(compare(ours, theirs).median - 2.0) < 2 * (within if unsteady < 0.5 else 0.2)


@pytest.mark.parametrize(("bar", "known"), [(1.02, 0.01), (1.15, 0.015), (1.5, 0.05), (None, 0.05)])
@pytest.mark.parametrize(("seconds", "pairs"), [(0.01, 200), (8.0, 16), (200.0, 2)])
def test_how_well_a_ratio_has_to_be_known_follows_from_its_bar(case, monkeypatch, bar, known, seconds, pairs):
    asked = []
    monkeypatch.setattr(works, "SECONDS_OF_FORWARDS", 128.0)
    monkeypatch.setattr(works, "interleave", lambda timed, *args, **options: {works.PLAIN: [seconds]})
    monkeypatch.setattr(works, "in_pairs", lambda work, plain, *rest, before: asked.append(rest) or ([1.0], [1.0]))
    works._beside_plain(case, case.prompt(0), PlainHooks(case), lambda prompt: None, bar, 2, "wall")
    assert asked[0][:2] == (pairs, pytest.approx(known))


def test_every_pass_beside_a_plain_one_is_on_a_batch_of_its_own(case, monkeypatch):
    seen = []
    monkeypatch.setattr(works, "SECONDS_OF_FORWARDS", 1e9)
    monkeypatch.setattr(works, "PAIRS_A_ROUND", 3)
    works._beside_plain(case, case.prompt(0), PlainHooks(case), lambda prompt: seen.append(prompt.batch), 1.02, 4, "wall")
    assert len(seen) >= 10 and len({id(batch) for batch in seen}) == len(seen)


def test_batches_are_encoded_a_block_at_a_time_and_let_go(case, monkeypatch):
    held, most = weakref.WeakSet(), []
    monkeypatch.setattr(works, "SECONDS_OF_FORWARDS", 1e9)
    monkeypatch.setattr(works, "KNOWN", (0.0, 0.0))

    def work(prompt):
        held.add(prompt.batch)
        most.append(len(held))

    works._beside_plain(case, case.prompt(0), PlainHooks(case), work, 1.02, 1, "wall")
    assert len(most) == works.PAIRS_A_ROUND and max(most) <= 2 * BLOCK


@pytest.mark.parametrize("wrong", ["another result", "NaN", "an error"])
@pytest.mark.parametrize("whose", ["own", "a peer's"])
def test_a_forward_pass_that_goes_wrong_while_timed_has_no_figure(case, monkeypatch, whose, wrong):
    """And the others have theirs."""
    kind, calls = (works.Own if whose == "own" else Counted), []
    right = works.Own.image_mass if whose == "own" else OutputAttentions(case).image_mass

    def image_mass(self, prompt, queries="text"):
        calls.append(queries)
        mass = right(self, prompt, queries) if whose == "own" else right(prompt, queries)
        if calls.count("text") == 1 or queries == "all":
            return mass
        if wrong == "an error":
            raise RuntimeError("out of memory")
        return mass + 100 if wrong == "another result" else mass * float("nan")

    monkeypatch.setattr(kind, "image_mass", image_mass, raising=False)
    rows = works.forward_rows(case, ["mass"], {} if whose == "own" else {"wrong": Counted(case), "right": OutputAttentions(case)}, 1, Bars())
    by = works.Own.name if whose == "own" else "wrong"
    (row,) = (one for one in rows if one.by == by and "text" in one.work)
    assert row.figure is None
    assert row.note == "failed: RuntimeError: out of memory" if wrong == "an error" else row.note.endswith("(in a timed round)")
    assert all(one.figure > 0 for one in rows if one is not row)


def test_peak_counts_what_is_held_at_once():
    def work():
        first = torch.zeros(1000, 250)
        second = first + 1
        del first
        return [second * 2 for _ in range(2)]

    assert peak_bytes(work) == pytest.approx(3e6, rel=1e-3)
    assert peak_bytes(lambda: [torch.zeros(1000, 250).sum() for _ in range(5)]) == pytest.approx(1e6, rel=1e-3)


def test_arithmetic_by_formula(case):
    prompt, width, feed, n, words = case.prompt(0), 32, 64, 28, 64
    weights, key_value = 4 * width * width + 3 * width * feed, 2 * width * width
    assert prompt.question == 9
    whole = 2 * n * weights + 4 * width * n * (n + 1) // 2
    question = 2 * 9 * weights + 4 * width * sum(range(20, 29))
    once = 2 * whole + 2 * n * key_value
    read = 2 * (weights - key_value) + 4 * width * n + 2 * width * words
    heads = [HeadId(0, 0), HeadId(2, 1)]
    assert sweep_flops(case, prompt, [], whole=True) == once
    assert sweep_flops(case, prompt, heads, whole=True) == once + 2 * whole + 2 * (2 * n * key_value + read)
    assert sweep_flops(case, prompt, heads, whole=False) == once + 2 * question + 2 * (2 * 9 * key_value + read)


def test_the_typical_width_halves_the_work(case):
    assert typical_width({600: 40, 21: 5, 189: 30, 105: 25}, default=1) == 189
    assert typical_width({}, default=7) == 7
    found = works.Own(case).widths(lambda: PlainHooks(case).forward(case.prompt(0)))
    assert found == {}, "the plain model is another one"
    weights = sum(
        module.weight.numel() for layer in case.subject.anatomy.layers for module in layer.modules() if isinstance(module, torch.nn.Linear)
    )
    assert works.Own(case).widths(lambda: works.Own(case).forward(case.prompt(0))) == {28: 28 * weights}


def test_the_midsize_subject_is_as_announced():
    shape = SHAPES["midsize"]
    assert (shape.grid**2, shape.hidden, shape.layers, shape.heads, shape.text) == (576, 512, 12, 8, 24)


def test_prompts_have_the_announced_tokens_and_different_images(case):
    first, second = case.prompt(0), case.prompt(1)
    assert (int(first.image.sum()), len(first.text)) == (16, SHAPES["tiny"].text)
    assert not torch.equal(first.embeds, second.embeds)
    with torch.inference_mode():
        whole = case.plain(**first.batch.inputs, use_cache=False).logits[:, -1]
    torch.testing.assert_close(PlainHooks(case).forward(first), whole, rtol=0, atol=1e-5)


# -- command line -----------------------------------------------------------------------------------------------------


def test_json_on_stdout(capsys):
    assert command.main(["--subject", "tiny", "--only", "memory", "--rounds", "1", "--clock", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"] == {"subjects": ["tiny"], "works": ["memory"], "rounds": 1, "clock": "cpu", "seed": 0, "device": "cpu", "dtype": "float32"}
    assert {row["work"] for row in told["rows"]} - {"not compared"} == {
        f"{WORKS['memory']}, {queries} queries" for queries in ("text", "all")
    }


def test_page_and_json_are_written(tmp_path, capsys):
    page, told = tmp_path / "BENCH.md", tmp_path / "bench.json"
    assert command.main(["--subject", "tiny", "--only", "memory", "--rounds", "1", "--json", str(told), "--write", str(page)]) == 0
    assert capsys.readouterr().out.strip() == page.read_text().strip()
    assert "## tiny" in page.read_text() and json.loads(told.read_text())["rows"]


def test_what_is_known_of_the_other_kind_of_device_stays_on_the_page():
    def page_of(work, gpu, before=""):
        found = {**machine(1), "gpu": gpu}
        row = Row(work, "tiny", "vlm_core", "hooks", figure=2.0, own=1.0, other=2.0)
        return render(Report(found, {"rounds": 3, "clock": "wall", "seed": 0, "dtype": "float32"}, [row]), before)

    first = page_of("on the processor", None)
    assert "# On a GPU\n\nNo GPU has been measured" in first
    both = page_of("on the accelerator", {"name": "one GPU", "gib": 80, "cuda": "12.8"}, first)
    assert "| on the processor |" in both and "| on the accelerator |" in both and "one GPU (80 GiB, CUDA 12.8); " in both
    again = page_of("on the processor again", None, both)
    assert "| on the accelerator |" in again and "| on the processor again |" in again and "| on the processor |" not in again
    assert "No GPU" not in again and again.count("# On a") == 2


def test_the_page_says_whether_a_gpu_was_measured():
    told = command.PAGE.read_text().split("# On a GPU")[1]
    assert told.strip().startswith("No GPU has been measured") or "GiB, CUDA" in told


def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda:0"]) == 2
    assert capsys.readouterr().err.strip() == "--device cuda:0 is not there: choose cpu"
    assert command.main(["--device", "tpu"]) == 2


def test_bfloat16_is_measured_without_bars(capsys):
    """The same work to its own rounding; bars are those of float32."""
    options = ["--subject", "tiny", "--only", "image-kv", "--only", "mass", "--rounds", "1", "--dtype", "bfloat16", "--json"]
    assert command.main(options) == 0
    told = json.loads(capsys.readouterr().out)
    rows = [row for row in told["rows"] if row["by"] == "vlm_core" and row["work"] != "not compared"]
    assert told["settings"]["dtype"] == "bfloat16" and all(row["bar"] is None for row in rows)
    hooks = [row for row in rows if row["against"] in ("plain hooks", "plain forward")]
    assert hooks and all(row["figure"] is not None for row in hooks), [row["note"] for row in hooks]
    assert any(row["difference"] > 1e-5 for row in hooks), "bfloat16 it was"


def test_waiting_for_a_gpu_is_part_of_its_time(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    interleave({"a": lambda number: 1, "b": lambda number: 1}, 3, device="cuda:0")
    assert len(waited) == 2 * 2 * 3
    interleave({"a": lambda number: 1}, 3)
    assert len(waited) == 12


def test_a_checkpoint_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert command.main(["--subject", "embedded", "--checkpoint", str(tmp_path / "none")]) == 1
    assert "needs a checkpoint, there is none at" in capsys.readouterr().err


def test_no_rounds_is_refused(capsys):
    assert command.main(["--rounds", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
