"""Exhibits of distillation against values worked out by hand; labels that do not collide; what is wrong with arms said in one sentence."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re

import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from reports import exhibits, figures, page, wording
from reports.drawings import claims as drawings
from reports.drawings import students as drawings_students
from reports.evidence import Evidence
from reports.exhibits.students import Stage
from vlm_core.stats import estimate_mean

from . import sample_run


@pytest.fixture
def evidence():
    return Evidence(None)


def left(evidence):
    """Tables by name, and figures by kind (lists)."""
    payload = evidence.payload()
    drawn = {}
    for figure in payload["figures"]:
        drawn.setdefault(figure["kind"], []).append(figure)
    return {table["name"]: pd.DataFrame(table["rows"], columns=table["columns"]) for table in payload["tables"]}, drawn


def answers(color, needle, n=10):
    """One `evaluate` table: so many right of ``n`` questions on each of two tasks, two questions a scene."""
    rows = [
        (f"{task}-{place}", f"scene-{place // 2}", task, f"what {task} ?", "own", "red" if place < right else "blue", "red", place < right, 0.0)
        for task, right in (("color", color), ("needle", needle))
        for place in range(n)
    ]
    return pd.DataFrame(rows, columns=["item", "cluster", "task", "prompt", "image", "output", "answer", "correct", "score"])


STAGES = {
    "before": Stage("baseline", False, None),
    "minimal": Stage("minimal SFT", False, "baseline"),
    "sft": Stage("SFT", False, "baseline"),
    "dpo": Stage("SFT + preference", False, "SFT"),
    "before_short": Stage("baseline", True, None),
    "sft_short": Stage("SFT", True, "baseline"),
}
ARMS = {
    "before": [answers(4, 2)],
    "minimal": [answers(5, 2), answers(4, 2)],
    "sft": [answers(8, 4), answers(6, 2), answers(7, 6)],
    "dpo": [answers(9, 4), answers(6, 4), answers(8, 6)],
    "sft_short": [answers(7, 4), answers(6, 3), answers(7, 5)],
}


# -- students ---------------------------------------------------------------------------------------------------------


def test_metrics_are_by_arm_seed_and_task_and_over_all_tasks(evidence):
    exhibits.students.students(evidence, {name: ARMS[name] for name in ("before", "minimal")}, STAGES)
    rows = left(evidence)[0]["student-metrics.csv"]
    assert rows.columns.tolist() == ["arm", "label", "reduced", "seed", "task", "accuracy", "items"]
    assert list(rows.drop(columns="reduced").itertuples(index=False, name=None)) == [
        ("before", "baseline", 0, "color", 0.4, 10), ("before", "baseline", 0, "needle", 0.2, 10), ("before", "baseline", 0, "all", pytest.approx(0.3), 20),
        ("minimal", "minimal SFT", 0, "color", 0.5, 10), ("minimal", "minimal SFT", 0, "needle", 0.2, 10), ("minimal", "minimal SFT", 0, "all", 0.35, 20),
        ("minimal", "minimal SFT", 1, "color", 0.4, 10), ("minimal", "minimal SFT", 1, "needle", 0.2, 10), ("minimal", "minimal SFT", 1, "all", 0.3, 20),
    ]  # fmt: skip
    assert not rows["reduced"].any()


def test_table_2_has_a_row_a_label_and_a_column_for_all_and_for_reduced_tokens(evidence):
    exhibits.students.students(evidence, ARMS, STAGES)
    tables, drawn = left(evidence)
    (table,) = drawn["table"]
    assert table["title"].startswith("Table 2")
    assert table["data"]["columns"] == ["student", "all visual tokens", "reduced visual tokens"]
    assert {row["label"]: [cell["text"] for cell in row["cells"]] for row in table["data"]["rows"]} == {
        "baseline": ["0.30", "–"], "minimal SFT": ["0.33", "–"], "SFT": ["0.55", "0.53"], "SFT + preference": ["0.62", "–"],
    }  # fmt: skip
    assert set(tables["student-metrics.csv"].query("reduced")["arm"]) == {"sft_short"}
    assert "20 items in 5 scenes, mean over 2 and 3 seeds" in table["caption"] and "Reduced: trained, and answering," in table["caption"]


def test_without_reduced_arms_table_2_has_no_column_for_them(evidence):
    exhibits.students.students(evidence, {name: ARMS[name] for name in ("before", "sft")}, STAGES)
    (table,) = left(evidence)[1]["table"]
    assert table["data"]["columns"] == ["student", "all visual tokens"] and "Reduced" not in table["caption"]


def test_intervals_of_table_2_are_over_seeds_and_scenes_together(evidence):
    exhibits.students.students(evidence, ARMS, STAGES)
    rows = {row["label"]: row["cells"][0] for row in left(evidence)[1]["table"][0]["data"]["rows"]}
    frame = pd.concat([run.assign(seed=seed) for seed, run in enumerate(ARMS["sft"])])
    crossed = estimate_mean(frame["correct"], frame["cluster"], frame["seed"], bounds=(0.0, 1.0), smallest_alpha=0.025, fast=True)
    lower, upper = crossed.bounds(0.025)
    assert (rows["SFT"]["lower"], rows["SFT"]["upper"]) == (max(0.0, lower), min(1.0, upper))
    # 0.6, 0.4 and 0.65 over three seeds: Student t with two degrees of freedom alone reaches 4.303 * 0.0764 to each side
    reach = 4.303 * np.std([0.6, 0.4, 0.65], ddof=1) / np.sqrt(3)
    assert rows["SFT"]["upper"] >= min(1.0, rows["SFT"]["value"] + reach) and upper - rows["SFT"]["value"] > reach
    assert rows["SFT"]["interval"] == f"[{rows['SFT']['lower']:.2f}, {rows['SFT']['upper']:.2f}]"


def test_lines_of_the_slope_chart_start_at_the_arm_that_training_went_on_from(evidence):
    exhibits.students.students(evidence, ARMS, STAGES)
    (chart,) = left(evidence)[1]["slope"]
    whole, reduced = chart["data"]["panels"]
    assert chart["data"]["stages"] == ["before", "first training", "second training"]
    assert [(arm["label"], arm["stage"], arm["start"], [round(value, 9) for value in arm["values"]]) for arm in whole["arms"]] == [
        ("baseline", 0, None, [0.3]), ("minimal SFT", 1, 0, [0.35, 0.3]), ("SFT", 1, 0, [0.6, 0.4, 0.65]), ("SFT + preference", 2, 2, [0.65, 0.5, 0.7]),
    ]  # fmt: skip
    assert [(arm["label"], arm["stage"], arm["start"]) for arm in reduced["arms"]] == [("baseline, all visual tokens", 0, None), ("SFT", 1, 0)]
    assert "SFT + preference 0.62 (all visual tokens)" in chart["alt"]


def test_an_arm_goes_on_from_one_with_its_own_tokens_where_there_is_one(evidence):
    exhibits.students.students(evidence, {**ARMS, "before_short": [answers(3, 2)]}, STAGES)
    reduced = left(evidence)[1]["slope"][0]["data"]["panels"][1]
    assert [(arm["label"], arm["start"], arm["values"][0]) for arm in reduced["arms"]] == [("SFT", 1, 0.55), ("baseline", None, 0.25)]


def test_every_seed_has_a_line_of_its_own_and_the_mean_a_bold_one(evidence):
    exhibits.students.students(evidence, {name: ARMS[name] for name in ("before", "sft", "dpo")}, STAGES)
    figure, _ = drawings_students.slope(left(evidence)[1]["slope"][0]["data"])
    lines = [(line.get_linewidth(), [round(float(y), 3) for y in line.get_ydata()]) for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert [ys for width, ys in lines if width < 1] == [[0.3, 0.6], [0.3, 0.4], [0.3, 0.65], [0.6, 0.65], [0.4, 0.5], [0.65, 0.7]]
    assert [ys for width, ys in lines if width > 2] == [[0.3, 0.55], [0.55, 0.617]]


@pytest.mark.parametrize(
    ("arms", "stages", "message"),
    [
        ({"sft": ARMS["sft"]}, STAGES, "the answers of 'before' come first, with one frame"),
        ({"before": ARMS["sft"]}, STAGES, "the answers of 'before' come first, with one frame"),
        ({"before": ARMS["before"], "lora": ARMS["sft"]}, STAGES, "arm 'lora' has no stage: expected one of before, minimal"),
        ({"before": ARMS["before"], "dpo": ARMS["dpo"]}, STAGES, "arm 'dpo' goes on from 'SFT', which is the label of none: SFT [+] preference, baseline"),
        ({"before": ARMS["before"], "sft": [answers(1, 1, 8)]}, STAGES, "arm 'sft' needs a frame a seed, each of the items of 'before'"),
        ({"before": ARMS["before"], "sft": []}, STAGES, "arm 'sft' needs a frame a seed"),
        ({"before": ARMS["before"], "sft": ARMS["sft"]}, {**STAGES, "sft": Stage("SFT", False, "SFT")}, "arm 'sft' goes on from itself: sft from sft"),
    ],
)  # fmt: skip
def test_arms_that_make_no_sense_are_named(evidence, arms, stages, message):
    with pytest.raises(ValueError, match=message):
        exhibits.students.students(evidence, arms, stages)
    assert evidence.payload()["figures"] == [] or "itself" in message


# -- contrasts --------------------------------------------------------------------------------------------------------


def contrasts():
    rows = [
        ("sft", "before", "all", 0.2, 0.15, 0.25), ("sft", "before", "color", 0.3, 0.2, 0.4), ("dpo", "sft", "all", -0.01, -0.03, 0.02), ("dpo", "sft", "color", 0.0, -0.1, 0.1),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["arm", "against", "task", "difference", "lower", "upper"])
    return frame.assign(confidence=0.99, seeds=3, items=[420, 60, 420, 60])


def test_contrasts_over_all_tasks_are_drawn_against_zero_and_every_one_is_in_the_table(evidence):
    exhibits.students.ablations(evidence, contrasts())
    tables, drawn = left(evidence)
    pd.testing.assert_frame_equal(tables["distill-ablations.csv"], contrasts(), check_dtype=False)
    (forest,) = drawn["forest"]
    assert forest["data"]["reference"] == 0.0
    assert [(row["label"], row["value"], row["lower"], row["upper"]) for row in forest["data"]["rows"]] == [
        ("sft against before", 0.2, 0.15, 0.25), ("dpo against sft", -0.01, -0.03, 0.02),
    ]  # fmt: skip
    assert "420 items, 3 seeds, 99 % intervals" in forest["caption"] and "dpo against sft -0.010" in forest["alt"]


def test_an_interval_that_holds_zero_is_hollow_and_ends_where_it_ends(evidence):
    exhibits.students.ablations(evidence, contrasts())
    figure, _ = drawings_students.forest(left(evidence)[1]["forest"][0]["data"])
    lines = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2] == [[0.0, 0.0], [0.15, 0.25], [0.0, 0.0], [-0.03, 0.02]]
    assert [line.get_markerfacecolor() == figures.COLOURS["paper"] for line in lines if line.get_marker() == "o"] == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="seeds"), "contrasts need a column 'seeds': columns are arm, against, task"),
        (lambda frame: frame[frame["task"] == "color"], "contrasts need a row of task 'all'"),
        (lambda frame: frame[:0], "contrasts need at least one row"),
    ],
)
def test_contrasts_that_lack_something_say_what(evidence, change, message):
    with pytest.raises(ValueError, match=message):
        exhibits.students.ablations(evidence, change(contrasts()))
    assert evidence.payload()["tables"] == []


# -- costs ------------------------------------------------------------------------------------------------------------


def spent():
    rows = [
        ("before", "baseline", False, 0, 0.0, 0.3, 2e8), ("sft", "SFT", False, 80, 4e12, 0.55, 2e8), ("sft_short", "SFT", True, 80, 3e12, 0.53, 1.2e8),
        ("dpo", "SFT + preference", False, 160, 1.2e13, 0.62, 2e8),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["arm", "label", "reduced", "steps", "training_flops", "accuracy", "inference_flops"])
    more = {"images": 16, "tokens": 1000, "supervised_tokens": 20, "seconds": 9.0, "lower": frame["accuracy"] - 0.05, "upper": frame["accuracy"] + 0.05}
    making = {"answering_flops": [0, 5e11, 5e11, 5e11], "sampling_flops": [0, 0, 0, 2e10], "ranking_flops": [0, 0, 0, 3e11]}
    return frame.assign(**more, **making)


def test_costs_are_drawn_over_training_and_over_a_prompt(evidence):
    exhibits.students.costs(evidence, spent())
    tables, drawn = left(evidence)
    assert tables["distill-costs.csv"]["training_flops"].tolist() == [0.0, 4e12, 3e12, 1.2e13]
    assert set(tables["distill-costs.csv"].columns) == set(spent().columns)
    (plot,) = drawn["quality_per_flop"]
    assert [(p["label"], p["reduced"], p["training"], p["inference"], p["value"]) for p in plot["data"]["points"]] == [
        ("baseline", False, 0.0, 2e8, 0.3), ("SFT", False, 4e12, 2e8, 0.55), ("SFT", True, 3e12, 1.2e8, 0.53), ("SFT + preference", False, 1.2e13, 2e8, 0.62),
    ]  # fmt: skip
    assert "SFT, reduced visual tokens: 0.53 for 3 TFLOP of training, 120 MFLOP a prompt, 500 GFLOP to make its data" in plot["alt"]
    assert "200 MFLOP a prompt;" in plot["alt"] and "200 MFLOP a prompt, 820 GFLOP to make its data" in plot["alt"]
    assert "does not count making the data (for an arm, at most: the teacher's answers 500 GFLOP, samples of a student 20 GFLOP and the teacher's ranking of them 300 GFLOP; " in plot["caption"]
    assert "Dashed lines: not trained" in plot["caption"] and "hollow: reduced ones" in plot["caption"]
    figure, tips = drawings_students.quality_per_flop(plot["data"])
    training, prompt = figure.axes
    assert training.get_xscale() == "log" and prompt.get_xscale() == "linear" and prompt.get_xlim()[0] == 0
    assert (training.get_xlabel(), prompt.get_xlabel()) == ("training (TFLOP)", "one prompt (MFLOP)")
    dots = {line.get_gid(): line for line in [*training.lines, *prompt.lines] if line.get_gid()}
    assert {gid: (float(line.get_xdata()[0]), line.get_markerfacecolor() == figures.COLOURS["paper"]) for gid, line in dots.items()} == {
        "point-training-1": (4e12, False), "point-training-2": (3e12, True), "point-training-3": (1.2e13, False),
        "point-inference-0": (2e8, False), "point-inference-1": (2e8, False), "point-inference-2": (1.2e8, True), "point-inference-3": (2e8, False),
    }  # fmt: skip
    assert tips.keys() == dots.keys()
    assert [line.get_ydata()[0] for line in training.lines if line.get_linestyle() == "--"] == [0.3]


def test_costs_that_lack_a_column_say_which(evidence):
    with pytest.raises(ValueError, match="costs need a column 'seconds'"):
        exhibits.students.costs(evidence, spent().drop(columns="seconds"))


def test_a_student_is_set_beside_its_teacher(evidence):
    rows = [
        ("teacher", "parameters", "", 1_834_112, 1.0, None, None), ("teacher", "first token", "s", 0.02, 1.0, 1.0, 1.0),
        ("student", "parameters", "", 1_090_304, 0.5945, None, None), ("student", "first token", "s", 0.0095, 0.47, 0.45, 0.5),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["model", "quantity", "unit", "value", "of_reference", "lower", "upper"])
    exhibits.students.student_against_teacher(evidence, table)
    tables, drawn = left(evidence)
    assert len(tables["student-against-teacher.csv"]) == 4
    (shown,) = drawn["table"]
    assert shown["data"]["columns"] == ["", "teacher", "student", "student / teacher"]
    assert {row["label"]: [(cell["text"], cell["interval"]) for cell in row["cells"]] for row in shown["data"]["rows"]} == {
        "parameters": [("1.83 M", ""), ("1.09 M", ""), ("0.59", "")],
        "first token": [("20 ms", ""), ("9.5 ms", ""), ("0.47", "[0.45, 0.50]")],
    }
    with pytest.raises(ValueError, match="model costs need 'teacher' and a student beside it, got 'student'"):
        exhibits.students.student_against_teacher(evidence, table[table["model"] == "student"])


# -- gained and lost --------------------------------------------------------------------------------------------------


def told(right, said):
    """Answers to six questions of two tasks: which are right, and what is said to all."""
    tasks = ["color"] * 4 + ["count"] * 2
    names = [f"i{place}" for place in range(6)]
    return pd.DataFrame(
        {"item": names, "cluster": names, "task": tasks, "prompt": [f"what is {name} ?" for name in names], "output": said, "answer": "red",
         "correct": [bool(one) for one in right]}
    )  # fmt: skip


BEFORE = told([0, 0, 1, 1, 0, 1], "blue")
AFTER = [told([1, 0, 0, 1, 1, 1], "red"), told([1, 1, 0, 1, 0, 0], "green"), told([0, 0, 1, 1, 1, 1], "red")]
# i0: wrong, then right for two of three (gained); i1: right for one (neither); i2: right, then for one (lost); i4: gained; i5: right for two (neither)


def square(item):
    return Image.new("RGB", (8, 4), (10 * int(item[1]), 0, 0))


def test_items_are_gained_and_lost_by_what_most_seeds_say(evidence):
    exhibits.students.errors(evidence, BEFORE, [run.sample(frac=1, random_state=1) for run in AFTER], square)
    tables, drawn = left(evidence)
    assert list(tables["distill-errors.csv"].itertuples(index=False, name=None)) == [("color", 1, 1, 0, 4), ("count", 1, 0, 1, 2), ("all", 2, 1, 1, 6)]
    assert tables["distill-errors.csv"].columns.tolist() == ["task", "gained", "lost", "net", "items"]
    changed = tables["distill-changed-items.csv"]
    assert changed.columns.tolist() == ["item", "task", "change", "answer", "before", "after"]
    assert list(changed[["item", "change"]].itertuples(index=False, name=None)) == [("i0", "gained"), ("i2", "lost"), ("i4", "gained")]
    assert changed["before"].tolist() == ["blue"] * 3 and changed["after"].tolist() == ["red | green | red"] * 3
    (bars,) = drawn["gained_lost"]
    assert bars["data"]["rows"] == [{"label": "color", "gained": 1, "lost": 1, "items": 4}, {"label": "count", "gained": 1, "lost": 0, "items": 2}]
    assert "Of 6 items, 2 gained and 1 lost" in bars["caption"] and "count 1 gained, 0 lost of 2" in bars["alt"]
    figure, _ = drawings_students.gained_lost(bars["data"])
    assert [patch.get_width() for patch in figure.axes[0].patches] == [-0.25, 0.25, 0, 0.5]


def test_half_of_the_seeds_decide_nothing(evidence):
    exhibits.students.errors(evidence, BEFORE, AFTER[:2], square)
    assert list(left(evidence)[0]["distill-errors.csv"].itertuples(index=False, name=None))[-1] == ("all", 1, 1, 0, 6)  # i0, i2


def test_pictures_of_gained_and_lost_items_with_what_was_said(evidence):
    exhibits.students.errors(evidence, BEFORE, AFTER, square)
    (shown,) = left(evidence)[1]["cases"]
    color, count = shown["data"]["groups"]
    assert (color["name"], count["name"]) == ("color", "count")
    assert [(case["item"], case["change"], case["prompt"], case["answer"], case["before"], case["after"]) for case in color["cases"]] == [
        ("i0", "gained", "what is i0 ?", "red", "blue", "red (2), green (1)"), ("i2", "lost", "what is i2 ?", "red", "blue", "red (2), green (1)"),
    ]  # fmt: skip
    picture = Image.open(io.BytesIO(base64.b64decode(color["cases"][1]["image"])))
    assert picture.size == (8, 4) and picture.getpixel((0, 0)) == (20, 0, 0), "its own picture, no larger than it is"
    assert "Pictures of 3 items" in shown["alt"]


def test_pictures_are_chosen_by_the_hash_of_the_item_and_are_small(evidence):
    n = 40
    before = pd.concat([told([0] * 6, "blue").assign(item=[f"i{place}-{turn}" for place in range(6)]) for turn in range(n)])
    after = before.assign(correct=True, output="red")
    exhibits.students.errors(evidence, before, [after], lambda item: Image.new("RGB", (400, 200)), per_task=3)
    color = left(evidence)[1]["cases"][0]["data"]["groups"][0]
    mine = before[before["task"] == "color"]["item"]
    assert [case["item"] for case in color["cases"]] == sorted(mine, key=lambda item: hashlib.sha256(item.encode()).hexdigest())[:3]
    assert [(case["width"], case["height"], case["after"]) for case in color["cases"]] == [(96, 48, "red")] * 3


def test_nothing_gained_or_lost_leaves_no_pictures_and_other_items_are_refused(evidence):
    exhibits.students.errors(evidence, BEFORE, [BEFORE], square)
    assert left(evidence)[1].keys() == {"gained_lost"}
    with pytest.raises(ValueError, match="the answers of seed 1 are not of the items answered before training"):
        exhibits.students.errors(evidence, BEFORE, [BEFORE, BEFORE[1:]], square)
    with pytest.raises(ValueError, match="at least one frame of answers"):
        exhibits.students.errors(evidence, BEFORE, [], square)


# -- on the page ------------------------------------------------------------------------------------------------------


def test_tables_and_pictures_are_words_on_the_page(tmp_path, evidence):
    before = BEFORE.assign(prompt='<i>"what"</i> & why')
    exhibits.students.errors(evidence, before, AFTER, square)
    exhibits.students.students(evidence, ARMS, STAGES)
    entry = sample_run.make("H3.sft", "supported", 0.117, 0.041, figures=evidence.payload()["figures"])
    text = page.render(sample_run.write(tmp_path, [entry], heads=False)).read_text(encoding="utf-8")
    table = re.search(r'<table class="data exhibit">.*?</table>', text, re.DOTALL)[0]
    assert '<caption class="visually-hidden">Accuracy of each student: baseline, all visual tokens, 0.30;' in table
    assert re.search(r'<th scope="row">SFT</th><td class="num" data-name="all visual tokens">0\.55 <span class="ci">\[', table)
    assert "&lt;i&gt;&#34;what&#34;&lt;/i&gt; &amp; why" in text and "<i>" not in text.replace("<i ", "")
    images = re.findall(r'<img src="data:image/png;base64,[^"]+" width="8" height="4" alt="([^"]*)">', text)
    assert images == ["Picture of item i0, color.", "Picture of item i2, color.", "Picture of item i4, count."]
    assert text.count('<li class="change-gained">') == 2 and text.count('<li class="change-lost">') == 1
    assert all(rule in text for rule in (".change-gained { --c", ".change-lost { --c", ".figures > .kind-table, .figures > .kind-cases, "))


def crowd(n, stage, start):
    return [{"label": f"a way of training, the {place}th of many", "stage": stage, "start": start, "values": [0.6 + 0.001 * place]} for place in range(n)]


CROWDS = {
    "slope": {
        "panels": [{"title": "t", "arms": [{"label": "baseline", "stage": 0, "start": None, "values": [0.4]}, *crowd(7, 1, 0), *crowd(6, 2, 1)]}],
        "stages": ["before", "first training", "second training"],
    },
    "quality_per_flop": {
        "points": [
            {"label": arm["label"] + str(arm["stage"]), "reduced": False, "training": 1e12, "inference": 1e8, "value": arm["values"][0], "lower": 0.3, "upper": 0.65}
            for arm in (*crowd(7, 1, 0), *crowd(6, 2, 0))
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CROWDS)
def test_labels_never_collide_and_stay_on_the_figure(kind):
    figures.check(kind, CROWDS[kind])
    with matplotlib.style.context(figures.STYLE):
        figure, _ = getattr(drawings_students, kind)(CROWDS[kind])
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    texts = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    assert len(texts) >= 13
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in texts]  # without the line that leads to a label
    for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        shared = [min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)]
        assert min(shared) <= 1.0, f"{one.get_text()!r} lies on {other.get_text()!r}"
    assert all(0 <= box.y0 and box.y1 <= figure.bbox.height for box in boxes)


def test_labels_are_moved_as_little_as_may_be():
    assert drawings.spread([0.0, 5.0], [1.0, 1.0]) == [0.0, 5.0]
    assert drawings.spread([1.0, 1.0], [1.0, 1.0]) == pytest.approx([0.5, 1.5])
    # one above the other from below: 0, 2 and 3.5 up from the lowest, which moves by the mean of 1 - 0, 1.2 - 2 and 3 - 3.5
    assert drawings.spread([3.0, 1.0, 1.2], [1.0, 2.0, 2.0]) == pytest.approx([3.4, -0.1, 1.9])
    assert drawings.spread([], []) == []
    wanted, heights = np.array([0.3, 0.1, 0.32, 2.0]), np.array([0.2, 0.4, 0.3, 0.1])
    found = np.array(drawings.spread(wanted, heights))
    order = np.argsort(wanted)
    assert (np.diff(found[order]) >= (heights[order][1:] + heights[order][:-1]) / 2 - 1e-9).all()
    assert found.mean() == pytest.approx(wanted.mean()) and found[3] == 2.0


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1_090_304, "", "1.09 M"), (7.1e9, "", "7.1 B"), (12, "", "12"), (999_700, "", "1 M"), (4_361_216, "bytes", "4.36 MB"), (512, "bytes", "512 B"), (2.1e9, "FLOP", "2.1 GFLOP"),
        (3.4e12, "FLOP", "3.4 TFLOP"), (0.0213, "s", "21.3 ms"), (0.00004, "s", "40 µs"), (95.0, "s", "95 s"), (4000.0, "s", "4,000 s"), (0.0, "s", "0 s"), (None, "s", "–"),
    ],
)  # fmt: skip
def test_quantities_have_three_digits_and_a_prefix(value, unit, text):
    assert wording.with_unit(value, unit) == text
