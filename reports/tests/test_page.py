"""The page: from JSON alone, self-contained, accessible, escaped; every figure kind drawn."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from reports import figures, page, record, summary, wording
from reports.__main__ import main
from reports.drawings import claims
from reports.scale import Scale

from . import sample_run

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Collects ids, local links, labels of drawings and badly nested elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.open, self.badly_nested, self.labels = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.links += [attrs[name][1:] for name in ("href", "xlink:href") if attrs.get(name, "").startswith("#")]
        if attrs.get("role") == "img":
            self.labels.append(attrs.get("aria-label", ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.badly_nested.append(tag)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = sample_run.write(tmp_path_factory.mktemp("run"))
    return page.render(folder).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_every_local_link_has_a_target(text):
    read = Reader(text)
    assert read.badly_nested == [] and read.open == []
    assert len(read.ids) == len(set(read.ids))
    assert set(read.links) <= set(read.ids)


def test_the_page_needs_nothing_but_itself(text):
    assert len(text.encode()) < 5_000_000
    loaded = re.findall(r'(?:src|href)="([^"#][^"]*)"|url\(([^)#]+)\)|@import', text)
    outside = [link for pair in loaded for link in pair if link and not link.startswith(("data:", "https://arxiv.org/abs/"))]
    assert not re.findall(r'src="(?!data:)|<link|@import', text)  # papers are links, nothing is loaded
    assert set(outside) == {"run.json", "evidence.json", "head-ablation.csv", "token-drop-curves.csv"}


def test_every_drawing_has_a_text_alternative(text):
    labels = Reader(text).labels
    assert len(labels) > 30 and all(labels)


def test_the_page_says_what_was_found(text):
    assert (
        "H1 holds in part: specificity holds, redundancy is undecided, object tokens could not be tested, "
        "necessity holds in 5 of 7 cases (count refuted, position undecided)." in text
    )
    assert "H3 holds in part: sft holds, uses image is undecided." in text
    opening = (
        "H1 holds in part: taking the image from a few heads costs 22 to 51 points (count refuted, position undecided); 1 of 3 other verdicts supported.<br>"
        "H2 holds: half of the visual tokens can go from mid-depth on.<br>"
        "H3 holds in part: for training on the teacher&#39;s answers (+12 points); 0 of 1 other verdicts supported."
    )
    assert f'<p class="lede">{opening}</p>' in text
    for verdict, count in (("supported", 9), ("refuted", 1), ("inconclusive", 3), ("invalid", 1)):
        assert re.search(rf"<b>{count}</b> <span>{verdict}</span>", text)
    assert "1 control failed: other scene&#39;s image (H1.object_tokens)" in text
    assert "loss of 0.6 points at 50 % kept" in text and "Table 1" in text


def test_the_card_of_a_claim_says_all_that_its_verdict_rests_on(tmp_path):
    """Each number is another one, on the card and nowhere else in its place."""
    control = {"name": "random heads", "kind": "negative", "passed": True, "value": 0.021, "expected": "below 0.05", "detail": "200 draws"}
    failed = {"name": "other scene", "kind": "negative", "passed": False, "value": 0.34, "expected": "below 0.30", "detail": ""}
    numbers = {"p_value": 0.0123, "p_holm": 0.0456, "mde": 0.0789, "n_needed": 137.0, "n_items": 408, "n_clusters": 151, "alpha": 0.04, "family_size": 19}
    declaration = {**sample_run.make("H2.trend", "supported", 0.3, 0.1)["declaration"], "hash": "0a1b2c3d4e5f6789"}
    facts = {**numbers, "declaration": declaration, "reason": "the interval lies wholly above 0", "reproduce": "python -m pytest -k trend --claims-seed=7"}
    other = sample_run.make("H1.specificity", "supported", 0.29, 0.07)
    folder = sample_run.write(tmp_path, [sample_run.make("H2.trend", "invalid", 0.31, 0.12, controls=[control, failed], **facts), other])
    articles = re.findall(r"<article.*?</article>", page.render(folder).read_text(encoding="utf-8"), flags=re.DOTALL)
    (card,) = [one for one in articles if 'data-claim="H2.trend"' in one]
    heads = re.findall(r"<th [^>]*>(?:<abbr[^>]*>)?([^<]+)", re.search(r'<table class="data">.*?</thead>', card, flags=re.DOTALL)[0])
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", re.search(r'<table class="data">.*?<tbody>(.*?)</tbody>', card, flags=re.DOTALL)[1])
    told = dict(zip(heads, cells, strict=True))
    assert {name: told[name] for name in ("Items", "Scenes", "p", "p (Holm)", "MDE", "n for the declared effect", "α / family")} == {
        "Items": "408", "Scenes": "151", "p": "0.012", "p (Holm)": "0.046", "MDE": "0.079", "n for the declared effect": "137", "α / family": "0.04 / 19",
    }  # fmt: skip
    assert "408 items, 151 scenes; p 0.012 (Holm 0.046); detects 0.079 at 80 % power" in card
    assert "<dt>Declaration</dt><dd><code>0a1b2c3d4e5f6789</code></dd>" in card
    assert '<pre tabindex="0"><code>python -m pytest -k trend --claims-seed=7</code></pre>' in card
    assert '<td role="cell" colspan="4">the interval lies wholly above 0</td>' in card
    assert '<td role="cell" class="num">0.31 <span class="ci">[0.19, 0.43]</span></td>' in card
    controls = re.findall(r'<b>([^<]+)</b> <span class="state">(\w+)</span>\s*<span class="kind">(\w+)</span>\s*<p><span class="n">([\d.]+)</span>, expected ([^<]+)</p>', card)
    assert controls == [
        ("random heads", "passed", "negative", "0.021", "below 0.05. 200 draws"), ("other scene", "failed", "negative", "0.34", "below 0.30"),
    ]  # fmt: skip


def test_what_the_subject_can_do_is_at_the_top_in_one_line_and_in_full_below(tmp_path):
    baseline = [{"task": "color <i>", "accuracy": 0.97, "blind": 0.2, "chance": 0.17}, {"task": "count", "accuracy": 0.62, "blind": 0.2}]
    text = page.render(sample_run.write(tmp_path, data={"baseline": baseline})).read_text(encoding="utf-8")
    line = text.index('<p class="subject">Accuracy (chance): color &lt;i&gt;&nbsp;97%&nbsp;(17%), count&nbsp;62%</p>')
    assert text.index('class="masthead') < text.index('<p class="subject">LLaVA') < line < text.index("</header>") < text.index('aria-labelledby="overview"')
    assert text.index('aria-labelledby="overview"') < text.index('<section aria-labelledby="baseline">')
    unmeasured = page.render(sample_run.write(tmp_path, data={})).read_text(encoding="utf-8")
    assert "Accuracy (chance)" not in unmeasured


def test_works_are_beside_what_was_measured_on_them_here(text):
    table = re.search(r'<table class="data works">.*?</table>', text, flags=re.DOTALL)[0]
    rows = {re.search(r"<b>(.*?)</b>", row)[1]: row for row in re.findall(r"<tr>\s*<th scope=\"row\">.*?</tr>", table, flags=re.DOTALL)}
    assert set(rows) == {"Head attribution (HeAr)", "Object tokens and the logit lens", "FastV"}
    fastv = rows["FastV"]
    assert "After layer 2 of 32, half of the visual tokens can go at no cost." in fastv and 'href="https://arxiv.org/abs/2403.06764"' in fastv
    assert 'href="#H2.noninferior">H2.noninferior</a> <span class="n">0.008</span>' in fastv
    assert 'href="#H1.object_tokens">H1.object_tokens</a> <span class="n">not measured</span>' in rows["Object tokens and the logit lens"]
    assert "0.06 to 0.51" in rows["Head attribution (HeAr)"]
    others = text[text.index("Claims that rest on other work") : text.index('id="limits"')]
    assert "Jain &amp; Wallace 2019" in others and "H2.noninferior" not in others


def test_limitations_say_what_limits_this_run(text):
    said = text[text.index('id="limits"') : text.index('id="use"')]
    assert "One subject of 1.83 M parameters was tested, with seed 0 and profile default." in said
    assert "3 of 14 confirmatory verdicts had too few scenes" in said and "H1.redundancy" in said
    assert "1 confirmatory claim could not be tested and counts neither way: H1.object_tokens." in said
    few = summary.limits(sample_run.identity(), [sample_run.make("H2.trend", "supported", 0.3, 0.1, n_clusters=9)])
    assert few[-1].startswith("The smallest sample of a confirmatory claim has 9 independent units")


def test_the_page_says_how_its_findings_may_be_used(text):
    said = re.findall(r"<li>(.*?)</li>", text[text.index('id="use"') : text.index('<section aria-labelledby="provenance">')])
    assert [html.unescape(one) for one in said] == list(summary.RESPONSIBLE_USE) and len(said) == 4
    for word in ("ready to be deployed, safe or fair", "evaluate on the data that model serves", "licence", "look at them before you share it"):
        assert sum(word in one for one in said) == 1, word


def test_a_failed_control_behind_an_expected_verdict_is_said_to_be_expected():
    failed = {"name": "floor", "kind": "negative", "passed": False, "value": 0.3, "expected": "below 0.2", "detail": ""}
    entries = [sample_run.make("H2.trend", "invalid", None, 0, controls=[failed], outcome="expected")]
    assert summary.band(sample_run.identity(), entries) == ["1 control failed: floor (H2.trend, as expected). The claims behind are invalid."]


def test_a_condition_that_is_not_met_is_no_failed_control(tmp_path):
    unmet = {"name": "Monte-Carlo p", "kind": "condition", "passed": False, "value": 0.12, "expected": "below 0.05", "detail": ""}
    entries = [sample_run.make("H1.specificity", "inconclusive", 0.3, 0.1, controls=[unmet])]
    text = page.render(sample_run.write(tmp_path, entries)).read_text(encoding="utf-8")
    assert 'class="band"' not in text and '<span class="state">not met</span>' in text


def test_a_sound_run_has_no_band(tmp_path):
    entries = [sample_run.make("H2.trend", "supported", 0.3, 0.1)]
    assert 'class="band"' not in page.render(sample_run.write(tmp_path, entries)).read_text(encoding="utf-8")
    text = page.render(sample_run.write(tmp_path, entries, problems=["a worker died"])).read_text(encoding="utf-8")
    assert "Evidence is incomplete: a worker died." in text


def test_text_from_a_record_is_escaped(tmp_path):
    hostile = """<script>alert("x")</script><img src=x onerror=alert(1)>'"</style></script><svg onload=alert(2)>"""
    figure = sample_run.figure("null_histogram", {"draws": [0.1] * 9, "observed": 0.2, "x_label": hostile}, hostile)
    crossing = sample_run.make("H1.necessity", "invalid", None, None, reason=f"the test crashed before a verdict: OSError: {hostile}", outcome="crashed")
    entry = sample_run.make("H2.trend", "supported", 0.3, 0.1, reason=hostile, figures=[figure], params={"task": hostile}, details={"said": hostile})
    subject = {name: hostile for name in ("name", "source", "family", "revision", "device", "quantization")}
    folder = sample_run.write(tmp_path, [entry, crossing], subject=subject, problems=[hostile], command=hostile)
    text = page.render(folder).read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert not any(one in text for one in ("<script>alert", "<img src=x", "<svg onload", "</style></script>")), "only as text"


def test_one_figure_of_several_instances_is_shown_once():
    figure = sample_run.bars()
    group = [sample_run.make("H1.necessity", "supported", 0.3, 0.1, params={"task": task}, figures=[figure]) for task in ("color", "shape")]
    assert summary.figures(group) == [figure]


def test_rows_of_one_table_are_together_whichever_instance_left_them():
    def table(task, title="Table 1"):
        return sample_run.figure("table", {"columns": ["task", "accuracy"], "rows": [{"label": task, "cells": [{"text": "0.5"}]}]}, title)

    group = [
        sample_run.make("H1.necessity", "supported", 0.3, 0.1, params={"task": task}, figures=[table(task), table(task, "Another")][: 1 + (task == "shape")])
        for task in ("color", "shape", "color")
    ]
    first, other = summary.figures(group)
    assert [row["label"] for row in first["data"]["rows"]] == ["color", "shape"] and [row["label"] for row in other["data"]["rows"]] == ["shape"]
    assert [len(entry["figures"][0]["data"]["rows"]) for entry in group] == [1, 1, 1], "records stay as they are"


def test_details_are_said_in_words_with_sensible_digits():
    assert page.shown({"prefill": 0.5418391709982454, "by task": {"color": -0.25}, "not for": []}) == "prefill 0.54, by task color −0.25, not for none"
    assert page.shown([0.123456] * 14).endswith("0.12 and 2 more") and page.shown(True) == "yes" and page.shown(3) == "3"


def test_completeness_and_controls_are_at_the_top(text):
    head = text[text.index('class="masthead') : text.index("</header>")]
    assert "Evidence is complete: 15 of 15 verdicts measured. 16 of 17 controls passed." in head
    crashed = sample_run.make("H2.trend", "invalid", None, 0, outcome="crashed")
    assert summary.checks({"complete": False}, [crashed]) == "Evidence is incomplete: 0 of 1 verdict measured."


def _luminance(colour):
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _colour(name, scheme):
    """A colour of the page's style sheet, ``[red, green, blue]`` from 0 to 1; ``scheme`` 0 is light, 1 dark."""
    css = (figures.TEMPLATES / "report.css").read_text(encoding="utf-8")
    found = re.search(rf"--{name}: (?:light-dark\((#\w+), (#\w+)\)|(#\w+)|var\(--([\w-]+)\));", css)
    if found[4]:
        return _colour(found[4], scheme)
    text = found[3] or found[1 + scheme]
    return np.array([int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)])


def _contrast(one, other):
    """Of WCAG: from 1, none, to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


SCHEMES = pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])


@SCHEMES
@pytest.mark.parametrize("hue", ["targeted", "alert"])
def test_text_in_cells_of_maps_can_be_read_on_every_strength_of_colour(scheme, hue):
    """As the browser mixes a cell's colour with the page's."""
    for share in np.linspace(0, 1, 101):
        strength = 0.05 + 0.85 * share
        cell = strength * _colour(f"fig-{hue}", scheme) + (1 - strength) * _colour("card", scheme)
        assert _contrast(cell, _colour("fig-on-strong" if share > claims.STRONG else "fig-on-weak", scheme)) >= 4.5, f"share {share:.2f}"


def test_text_on_a_strong_cell_is_dark_and_on_a_weak_one_the_pages():
    svg = figures.render("layer_heatmap", {"rows": [0], "columns": [0.5, 1.0], "values": [[1.0, 0.2]]}, prefix="a", label="map")
    fills = re.findall(r'<text style="[^"]*fill: var\(--(fig-on-\w+)\)"[^>]*>([^<]+)<', svg)
    assert fills == [("fig-on-strong", "1.00"), ("fig-on-weak", "0.20")]


@SCHEMES
def test_words_in_drawings_can_be_read_in_every_colour(text, scheme):
    used = set(re.findall(r'<text style="[^"]*fill: var\(--([\w-]+)\)', text))
    assert "fig-alert-text" in used and used <= {"fig-ink", "fig-on-weak", "fig-on-strong"} | {f"fig-{name}-text" for name in figures.COLOURS}
    for name in (used | {f"fig-{name}-text" for name in figures.COLOURS if not name.startswith(("ink", "line", "paper", "on-"))}) - {"fig-on-weak", "fig-on-strong"}:
        assert min(_contrast(_colour(name, scheme), _colour(ground, scheme)) for ground in ("card", "page")) >= 4.5, name


def test_rendering_again_gives_the_same_page(tmp_path, capsys):
    folder = sample_run.write(tmp_path)
    first = page.render(folder).read_text(encoding="utf-8")
    assert main(["render", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text(encoding="utf-8") == first
    assert main(["render", str(tmp_path / "nowhere")]) == 1
    assert "is not a run that can be rendered" in capsys.readouterr().err


def test_the_sample_has_every_figure_kind():
    kinds = {figure["kind"] for entry in sample_run.records() for figure in entry["figures"]}
    assert kinds == set(figures.KINDS)


def test_a_map_of_many_heads_is_one_picture_of_the_same_colours():
    values = np.random.default_rng(0).normal(size=(32, 32))
    svg = figures.render("head_map", {"values": values.tolist()}, prefix="a", label="map")
    assert len(svg) < 60_000 and "<title>" not in svg
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r'href="data:image/png;base64,([^"]+)"', svg)[1])))
    pixels = np.asarray(picture.convert("RGBA"), dtype=int)
    assert pixels.shape == (32, 32, 4)
    strongest = np.unravel_index(np.abs(values).argmax(), values.shape)
    assert pixels[..., 3].argmax() == np.ravel_multi_index(strongest, values.shape) and pixels[strongest][3] == pytest.approx(0.9 * 255, abs=1)
    assert (pixels[..., 0] > pixels[..., 2])[values < 0].all() and (pixels[..., 0] < pixels[..., 2])[values > 0].all()


def test_a_figure_keeps_real_text_and_follows_the_page_colours():
    svg = figures.render(**_drawable(sample_run.bars()), prefix="a", label="bars & more")
    assert ">targeted 10 %<" in svg and "DejaVu" not in svg
    assert 'role="img" aria-label="bars &amp; more"' in svg
    assert "var(--fig-targeted)" in svg and not any(colour in svg.lower() for colour in figures.COLOURS.values())


def test_a_drawing_on_the_page_is_that_of_matplotlib_to_a_hundredth_of_a_point():
    drawing = figures.draw(**_drawable(sample_run.bars()))
    on_page = figures.render(**_drawable(sample_run.bars()), prefix="a", label="bars", drawing=drawing)
    paths = [re.findall(r' d="([^"]+)"', svg) for svg in (drawing["svg"], on_page)]
    assert len(paths[0]) == len(paths[1]) > 10 and len(on_page) < 0.85 * len(drawing["svg"])
    for whole, short in zip(*paths, strict=True):
        numbers = [[float(one) for one in re.findall(r"-?\d+(?:\.\d+)?", path)] for path in (whole, short)]
        assert numbers[1] == pytest.approx(numbers[0], abs=0.01) and re.sub(r"[^A-Za-z]", "", whole) == re.sub(r"[^A-Za-z]", "", short)


def test_a_cell_of_a_head_map_tells_its_value():
    svg = figures.render(**_drawable(sample_run.head_map(np.random.default_rng(0))), prefix="a", label="map")
    assert "<title>layer 3, head 2: 0.42</title>" in svg


def _drawable(figure):
    return {"kind": figure["kind"], "data": figure["data"]}


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("pie", {}, "no figure kind 'pie'"),
        ("head_map", {}, "needs 'values'"),
        ("keep_curves", {"series": [{"name": "random"}]}, "needs 'points' in each of its series"),
        ("accuracy_bars", [{"label": "a", "value": 1}], "takes a mapping with 'bars', not a list"),
    ],
)
def test_data_that_cannot_be_drawn_is_refused(kind, data, message):
    with pytest.raises(ValueError, match=message):
        figures.check(kind, data)


@pytest.mark.parametrize(
    "figure",
    [
        ("head_map", {"values": [[0.0, None], [-0.2, 0.1]]}),
        ("layer_heatmap", {"rows": [0], "columns": [0.5], "values": [[None]]}),
        ("keep_curves", {"series": [{"name": "one", "points": [{"x": 1.0, "y": 0.5}]}]}),
        ("accuracy_bars", {"bars": [{"label": "none", "value": 0.0, "lower": None, "upper": None}]}),
        ("null_histogram", {"draws": [0.0, 0.0, None], "observed": 0.0}),
    ],
    ids=lambda figure: figure[0],
)
def test_gaps_and_single_points_can_be_drawn(figure):
    kind, data = figure
    assert figures.render(kind, data, prefix="a", label="gaps").startswith("<svg")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8333333, "0.83"), (0.0421, "0.042"), (0.05, "0.05"), (-0.00001, "0.00"), (12.345, "12.3"), (1234.5, "1,234"), (None, "–")],
)
def test_numbers_have_sensible_digits(value, text):
    assert wording.number(value) == text


def test_an_interval_shares_its_decimals():
    entry = sample_run.make("H2.noninferior", "supported", 0.008, 0.021)
    assert wording.interval_numbers(entry) == ("0.008", "-0.013", "0.029")
    assert wording.interval_numbers({"estimate": 0.5, "lower": 0.43, "upper": 0.57}) == ("0.50", "0.43", "0.57")


def test_a_scale_holds_the_threshold_and_shades_the_supporting_side():
    scale = Scale.of([sample_run.make("H2.noninferior", "supported", 0.008, 0.021)])
    (edge,) = scale.edges
    assert scale.supported == (0.0, edge) and edge == scale.at(0.05)
    above = Scale.of([sample_run.make("H1.necessity", "supported", 0.4, 0.1)])
    assert above.supported[0] == above.at(0.1) and sum(above.supported) == pytest.approx(100)
    both = Scale.of([sample_run.make("H3.uses_image", "inconclusive", 0.0, 0.1)])
    assert both.edges == [both.at(-0.03), both.at(0.03)]
    assert [text for _, text in above.ticks] == ["0.0", "0.2", "0.4"]


def test_a_record_is_held_to_its_schema():
    entry = sample_run.make("H2.trend", "supported", 0.3, 0.1)
    for change, message in (
        ({"verdict": "maybe"}, "verdict is 'maybe'"),
        ({"estimate": "0.3"}, "estimate is str"),
        ({"estimate": float("nan")}, "estimate is float"),
        ({"n_items": True}, "n_items is bool"),
        ({"surprise": 1}, "surprise is not a field"),
        ({"controls": [{"name": "x", "kind": "floor"}]}, r"controls\[0\] lacks passed"),
    ):
        with pytest.raises(record.RecordError, match=message):
            record.validate({**entry, **change})
    del entry["reason"]
    with pytest.raises(record.RecordError, match="lacks reason"):
        record.validate(entry)


def test_only_what_json_can_hold_becomes_a_record():
    with pytest.raises(TypeError, match=r"details\.model is a object"):
        record.to_builtins({"model": object()}, "details")
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.dumps({"a": float("nan")})


def test_a_page_takes_figures_that_are_drawn_already_and_is_the_same(tmp_path, monkeypatch):
    entries = sample_run.records()
    folder = sample_run.write(tmp_path, entries)
    again = page.render(folder).read_text(encoding="utf-8")
    shown = [(figure["kind"], figure["data"]) for entry in entries for figure in entry["figures"]]
    drawings = {figures.key(kind, data): figures.draw(kind, data) for kind, data in shown}
    monkeypatch.setattr(figures, "draw", lambda kind, data: pytest.fail("a figure was drawn twice"))
    assert page.render(folder, drawings).read_text(encoding="utf-8") == again


def test_groups_of_a_drawing_lead_where_they_are_told_to():
    data = sample_run.head_map(np.random.default_rng(0))["data"]
    svg = figures.render("head_map", data, prefix="a", label="map", links={"cell-0-1": "#head-0.1", "cell-9-9": "#nowhere"})
    assert re.findall(r'<a href="#([^"]+)" tabindex="-1" aria-label="layer 0, head 1: [^"]+"><path ', svg) == ["head-0.1"]
    assert 'role="group" aria-label="map"' in svg
    assert re.search(r"<title>layer 0, head 1: [^<]*</title><a ", svg), "the cell that leads there is that head's"


def test_what_is_written_in_words_stands_beside_the_choice_among_candidates(tmp_path):
    entry = sample_run.make("H2.trend", "supported", 0.3, 0.1)
    folder = sample_run.write(tmp_path, [entry])
    rows = json.loads((folder / "run.json").read_text())["data"]["baseline"]
    text = page.render(folder).read_text(encoding="utf-8")
    shown = re.findall(r'data-name="(accuracy|in words)">(\d+)', text)
    assert [int(number) for _, number in shown[:2]] == [round(100 * rows[0]["accuracy"]), round(100 * rows[0]["spoken"])]
    assert [name for name, _ in shown].count("in words") == len(rows)
