"""The token recipe on the page: what to keep, what it costs, where not to use it; and the file is one that the library loads."""

from __future__ import annotations

import json

import pytest

from reports import page, recipes
from vlm_core import DropTokens, Recipe
from vlm_core.reduction import FastV

from . import sample_run
from .test_page import Reader

LOSS = {"loss": 0.01, "lower": -0.01, "upper": 0.03, "confidence": 0.95, "items": 1120, "scenes": 160}
RECIPE = Recipe(
    (DropTokens(3, 0.5, FastV()), DropTokens(4, 0.125, "stride")), 6, "fastv, <then> stride", 0.125, LOSS,
    {"prefill_flops": 0.31, "prefill_latency": 0.12, "prefill_latency_alone": -0.04, "cache": 0.27},
    {"color": LOSS, "count": {**LOSS, "loss": 0.2, "upper": 0.24}}, ("count",), 0.05,
)  # fmt: skip


class Kept:
    """Stands in for a test's evidence: keeps what is left with it."""

    def __init__(self):
        self.artifacts = {}

    def artifact_json(self, name, content):
        self.artifacts[name] = json.loads(json.dumps(content))


def shown(recipe):
    return page.text(sample_run.identity(), sample_run.records(), None, recipe)


@pytest.fixture
def left():
    kept = Kept()
    recipes.leave(kept, RECIPE)
    return kept.artifacts[recipes.ARTIFACT]


def test_what_is_left_is_a_recipe_that_the_library_loads(tmp_path, left):
    (tmp_path / recipes.ARTIFACT).write_text(json.dumps(left))
    assert recipes.load(tmp_path) == left
    assert Recipe.load(tmp_path / recipes.ARTIFACT) == RECIPE


def test_the_page_says_what_to_keep_and_what_it_costs(left):
    text = shown(left)
    part = text.split('<section class="recipe"')[1].split("</section>")[0]
    assert "<b>fastv, &lt;then&gt; stride</b>" in part
    assert "keeping <b>50%</b> of the image tokens from layer <b>3</b> of 6 on, then keeping <b>12%</b> of the image tokens from layer <b>4</b>" in part
    assert "31% saved" in part and "4% more" in part
    assert "count: the loss there is not surely below 0.05" in part
    rows = [row for row in part.split("<tr>") if 'scope="row"' in row]
    assert ["yes" in row for row in rows] == [True, False]
    assert 'href="#recipe"' in text
    read = Reader(text)
    assert read.badly_nested == [] and set(read.links) <= set(read.ids)


def test_without_a_recipe_there_is_no_trace_of_it(tmp_path):
    assert recipes.load(tmp_path) is None
    text = shown(None)
    assert 'id="recipe"' not in text and 'href="#recipe"' not in text


def test_a_recipe_of_another_version_is_one_sentence(left):
    del left["saving"]
    text = shown(left)
    assert "Its token-recipe.json lacks 'saving': another version of the suite wrote it." in text
