"""The section on heads: what a test leaves, what the page shows of it, with and without pictures, and nothing without a report."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from reports import figures, heads, page
from reports.evidence import Evidence
from vlm_core.heads.report import HeadReport

from . import sample_run
from .test_page import Reader


def text_of(folder, **options):
    """The page of a run of one claim, with the map of its heads."""
    entry = sample_run.make("H1.necessity", "supported", 0.3, 0.1, figures=[sample_run.head_map(np.random.default_rng(0))])
    return page.render(sample_run.write(folder, [entry], **options)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_of(tmp_path_factory.mktemp("run"))


def cards(text):
    return re.findall(r'<article class="card head-card".*?</article>', text, flags=re.DOTALL)


def test_every_head_has_a_card_with_its_sentence_category_and_numbers(text):
    found = cards(text)
    assert [re.search(r'<h3 id="head-([\d.]+)">Head \1</h3>', card)[1] for card in found] == ["3.2", "4.5", "4.1"]
    for card in found:
        assert "cross-modal grounding <span" in card and "in 93% of resamples" in card
        assert "the margin falls by 1.20 [−0.90, 1.50]." in card  # a minus sign, and hyphens where words have them
    assert 'margin of the answer (nats lost) <span class="n">1.20 <span class="ci">[0.90, 1.50]</span>' in found[0]
    assert "Of the image: tile 70%, thumbnail 30%" in found[0] and "Of the image" not in found[1]
    assert "168 confirmation items in 44 scenes, 95 % intervals" in text and "order means little" not in text


def test_heads_without_an_effect_and_too_few_with_one_are_said(text, tmp_path):
    assert text.count("no effect shown") == 1 and "<b>2 of 3 heads have both kinds of evidence, fewer than 5.</b>" in text
    enough = text_of(tmp_path, heads=sample_run.described(shortfall=""))
    assert "fewer than 5" not in enough and "2 of 3 heads have both an effect on the margin whose interval excludes 0" in enough


def test_what_was_not_measured_or_has_no_interval_shows_none(text):
    card = cards(text)[0]
    assert re.search(r'even share</th><td class="num">0.11</td>', card)
    assert ">iou<" not in card


def test_effects_lie_on_one_scale_and_are_coloured_by_what_their_interval_says(text):
    strips = [re.search(r'strip side-(\w+)" role="img" aria-label="margin of the answer[^"]*"', card)[1] for card in cards(text)]
    assert strips == ["lost", "none", "gained"]
    model = heads.section(sample_run.described())
    scale = model["scales"]["margin"]
    assert [card["effects"][0]["scale"] is scale for card in model["heads"]] == [True] * 3
    assert scale.low < -0.6 < 1.5 < scale.high and scale.supported is None
    assert model["heads"][0]["effects"][0]["drawn"]["at"] == scale.at(1.2)


def test_parts_of_attention_fill_the_bar(text):
    for card in cards(text):
        widths = [float(width) for width in re.findall(r'class="part-\d" style="width:([\d.]+)%"', card)]
        assert len(widths) == 3 and sum(widths) == pytest.approx(100)
    assert 'aria-label="the asked object 25%, the rest of the image 37%, words 38%"' in text


def test_pictures_are_embedded_once_and_overlaid_on_every_card(text):
    assert text.count('<symbol id="picture-') == 4  # two pictures, two outlines
    assert text.count('<use href="#picture-1"/>') == 1 + 3  # by itself, and on three cards
    for card in cards(text):
        (first, second) = re.findall(r'aria-label="(Head [^"]*)"', card)[:2]
        assert "0.60 of its attention on the image, 0.31 of that on the asked object" in first and "What colour is the square" in second
        assert "31% on the object" in card


def test_heat_is_transparent_where_nothing_is_and_full_at_its_own_peak():
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(heads._heat([[0.0, 0.1], [None, 0.2]])))))
    assert pixels[..., 3].tolist() == [[0, 102], [0, 204]]
    assert heads._heat([[0.0, None]]) == heads._heat([[0.0, 0.0]])


def test_the_outline_is_the_objects_edge():
    example = {"mask": [[1, 0], [0, 0]], "width": 10, "height": 20}
    edges = set(re.findall(r"M[\d. ]+[HV]\d+", heads._path(example)))
    assert edges == {"M0 0H5", "M0 10H5", "M0 0V10", "M5 0V10"}
    assert heads._path({**example, "mask": None}) == heads._path({**example, "mask": [[0, 0]]}) == ""


def test_a_run_without_pictures_says_why(tmp_path):
    text = text_of(tmp_path, heads=sample_run.described(pictures=0))
    assert "No pictures: its image tokens are learned queries" in text
    assert len(cards(text)) == 3 and "picture-1" not in text and "on the object" not in "".join(cards(text))
    read = Reader(text)
    assert read.badly_nested == [] and set(read.links) <= set(read.ids) and all(read.labels)


def test_a_ranking_that_predicts_nothing_is_said_to_mean_little(tmp_path):
    weak = sample_run.described()
    weak["about"]["attribution_r2"] = 0.41
    assert "explain only 0.41 of the variance of masks they never saw" in text_of(tmp_path, heads=weak)


def test_without_the_report_there_is_no_trace_of_it(tmp_path):
    text = text_of(tmp_path, heads=False)
    assert 'id="heads"' not in text and "head-card" not in text.split("</style>")[1] and 'href="#head' not in text
    empty = sample_run.described(names=())
    assert 'id="heads"' not in text_of(tmp_path / "empty", heads=empty)


@pytest.mark.parametrize(("part", "name", "said"), [("heads", "evidence", "in an entry of &#39;heads&#39;"), ("about", "both", "in &#39;about&#39;")])
def test_a_report_of_another_version_is_one_sentence_on_the_page(tmp_path, part, name, said):
    older = sample_run.described()
    for entry in older["heads"] if part == "heads" else [older["about"]]:
        del entry[name]
    text = text_of(tmp_path, heads=older)
    assert f"Its head-report.json lacks &#39;{name}&#39; {said}: another version of the suite wrote it." in text
    assert not cards(text) and "one by one" not in text and 'href="#head' not in text
    read = Reader(text)
    assert read.badly_nested == [] and set(read.links) <= set(read.ids)


def test_cells_of_head_maps_lead_to_the_evidence_of_their_heads(text):
    svg = re.search(r"<svg[^>]*aria-label=\"Few heads carry the image.*?</svg>", text, flags=re.DOTALL)[0]
    led = re.findall(r'<a href="#(head-[\d.]+)" tabindex="-1"', svg)
    assert led == [f"head-{layer}.{head}" for layer in range(6) for head in range(8)]
    assert len(re.findall(r'<tbody id="head-[\d.]+">', text)) == 48 - 3 and len(cards(text)) == 3
    older = {key: value for key, value in sample_run.described().items() if key != "map"}
    assert list(heads.links(older)) == ["3.2", "4.5", "4.1"] and heads.section(older)["map"] is None


def test_the_map_shows_attribution_as_strength_and_the_category_as_a_letter(text):
    table = re.search(r'<table class="cells">.*?</table>', text, flags=re.DOTALL)[0]
    cells = dict(re.findall(r'<td><a href="#head-([\d.]+)"(.*?)</a></td>', table, flags=re.DOTALL))
    assert len(cells) == 48
    assert "--strength:100%" in cells["3.2"] and "--strength:75%" in cells["4.5"] and ">G<" in cells["3.2"]
    assert 'class="carded"' in cells["4.1"] and 'class="carded"' not in cells["4.2"]
    assert "Head 5.0: does not see the image" in cells["5.0"] and "--strength:0%" in cells["5.0"]


def test_a_figure_without_links_is_one_picture():
    plain = figures.render("head_map", {"values": [[0.1, 0.2]]}, prefix="a", label="map")
    assert "<a " not in plain and 'role="img"' in plain


def test_a_card_is_safe_from_what_a_prompt_says(tmp_path):
    hostile = sample_run.described()
    hostile["examples"][0]["prompt"] = hostile["heads"][0]["sentence"] = '<script>alert("x")</script>'
    assert "<script>alert" not in text_of(tmp_path, heads=hostile)


def test_a_test_leaves_the_report_with_small_pictures():
    evidence = Evidence(None)
    example = {"id": "a", "task": "color", "prompt": "p", "answer": "red", "mask": None}
    items = [{"id": "a", "image": Image.new("RGB", (640, 320))}, {"id": "b", "image": Image.new("RGB", (8, 8))}]
    heads.leave(evidence, HeadReport([], [example, {**example, "id": "b"}], {"items": 2}), items, {"entropy": "spread"})
    (artifact,) = evidence.payload()["artifacts"]
    assert artifact["name"] == heads.ARTIFACT and artifact["content"]["notes"] == {"entropy": "spread"}
    sizes = [(one["width"], one["height"]) for one in artifact["content"]["examples"]]
    assert sizes == [(64, 32), (8, 8)]
    assert [Image.open(io.BytesIO(base64.b64decode(one["image"]))).size for one in artifact["content"]["examples"]] == sizes
