"""The page in a real browser: no errors, both schemes, phone and laptop, keyboard, without JavaScript, on paper, and clean for axe.

Needs Debian's ``chromium`` (or another one named by ``CHROMIUM``) and Playwright's Python package.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import unicodedata
from pathlib import Path

import pytest

from reports import compare, index, models, page, record
from reports.nights import sparkline, trend

from . import sample_models, sample_nights, sample_run
from .test_sparkline import nights

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here: install Debian's package, or name one in CHROMIUM")
playwright_ = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed: pip install 'vlm-claims[test]'")

UNFOLD = "document.querySelectorAll('details').forEach((details) => { details.open = true; })"
LAPTOP, PHONE = {"width": 1440, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def chromium():
    with playwright_.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # root, in a container
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of the sample run, one claim with a history; ``VLM_CLAIMS_PAGE`` names another page to look at."""
    if given := os.environ.get("VLM_CLAIMS_PAGE"):
        return Path(given).resolve().as_uri()
    folder = sample_run.write(tmp_path_factory.mktemp("run"))
    history = {record.instance_key("H2.trend", {}): nights(0.3, 0.31, 0.29)}
    (folder / sparkline.ARTIFACT).write_text(record.dumps(history), encoding="utf-8")
    return page.render(folder).as_uri()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The pages about several runs, by name."""
    folder = tmp_path_factory.mktemp("runs")
    two = [
        sample_nights.write(folder / name, {sample_nights.DROP: [1.0, 0.0] * 20, sample_nights.LOSS: [0.0] * 39 + [lost]})
        for name, lost in (("a", 0.0), ("b", 1.0))
    ]
    subjects = models.gather([f"{name}={run}" for name, run in sample_models.write(folder / "subjects").items()])
    nights_page = trend.render(sample_nights.nights(folder / "history", 6))
    return {
        "compare": compare.render(compare.between(*two), folder / "compare.html").as_uri(),
        "trend": nights_page.as_uri(),
        "index": index.render(folder).as_uri(),
        "models": models.render(subjects, folder / "models", missing=["fourth h1: failed"]).as_uri(),
    }


@pytest.fixture
def opened(chromium, address):
    """``opened(viewport, scheme, ...)``: the page in a fresh context; whatever it logs or throws fails the test."""
    contexts, said = [], []

    def open_(viewport=LAPTOP, scheme="light", at=address, **options):
        context = chromium.new_context(viewport=viewport, color_scheme=scheme, **options)
        contexts.append(context)
        one = context.new_page()
        one.on("console", lambda message: said.append(message.text))
        one.on("pageerror", lambda error: said.append(str(error)))
        one.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
        one.goto(at)
        return one

    yield open_
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def reading(chromium, address):
    """One laptop page that tests look at without changing it."""
    context = chromium.new_context(viewport=LAPTOP)
    one = context.new_page()
    one.goto(address)
    yield one
    context.close()


def shown_rows(one):
    return one.locator(".sortable tbody tr:visible")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_nothing_scrolls_sideways_and_the_scheme_is_the_systems(opened, viewport, scheme):
    one = opened(viewport, scheme)
    one.evaluate(UNFOLD)
    assert one.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    background = one.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 380) == (scheme == "light")
    outside = one.evaluate(
        """() => [...document.querySelectorAll('p, td, th, h1, h2, h3, li, summary, figcaption')].filter((one) => {
          const box = one.getBoundingClientRect();
          return box.width && !one.closest('.scroll, .visually-hidden') && (box.right > innerWidth + 1 || box.left < -1);
        }).map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert outside == []


def test_the_button_changes_the_scheme_and_back(opened):
    one = opened()
    before = one.evaluate("getComputedStyle(document.body).backgroundColor")
    one.get_by_role("button", name="Dark page").click()
    assert one.evaluate("getComputedStyle(document.body).backgroundColor") != before
    one.get_by_role("button", name="Light page").click()
    assert one.evaluate("getComputedStyle(document.body).backgroundColor") == before


def test_claims_are_filtered_by_verdict_hypothesis_tier_and_text(opened):
    one = opened()
    everything = shown_rows(one).count() + one.locator(".exploratory-rows tbody tr").count()
    total = one.locator("#tools output")
    assert total.inner_text() == f"{everything} of {everything} verdicts shown"
    one.get_by_role("checkbox", name="supported").uncheck()
    left = shown_rows(one).evaluate_all("(rows) => rows.map((row) => row.dataset.verdict)")
    assert left and "supported" not in left
    one.get_by_role("button", name="All claims").click()
    one.get_by_label("H1", exact=True).uncheck()
    assert set(shown_rows(one).evaluate_all("(rows) => rows.map((row) => row.dataset.hypothesis)")) == {"H2", "H3"}
    assert not one.locator("article[data-claim='H1.necessity']").is_visible() and one.locator("article[data-claim='H2.trend']").is_visible()
    one.get_by_role("button", name="All claims").click()
    one.get_by_label("Tier").select_option("exploratory")
    assert set(shown_rows(one).evaluate_all("(rows) => rows.map((row) => row.dataset.tier)")) == {"exploratory"}
    one.get_by_role("button", name="All claims").click()
    one.get_by_label("Find").fill("necessity count")
    assert shown_rows(one).evaluate_all("(rows) => rows.map((row) => row.dataset.text.split(']')[0])") == ["H1.necessity [task=count"]
    assert total.inner_text() == f"1 of {everything} verdicts shown"
    one.get_by_role("button", name="All claims").click()
    assert total.inner_text() == f"{everything} of {everything} verdicts shown"


def test_claims_are_sorted_and_put_back(opened):
    one = opened()
    rows = one.locator(".sortable").first.locator("tbody tr")
    names = "(rows) => rows.map((row) => row.dataset.text)"
    declared = rows.evaluate_all(names)
    order = one.get_by_label("Order")
    order.select_option("estimate")
    values = [value for value in rows.evaluate_all("(rows) => rows.map((row) => row.dataset.estimate)") if value is not None]
    assert values == sorted(values, key=float, reverse=True)
    order.select_option("p")
    values = [float(value) for value in rows.evaluate_all("(rows) => rows.map((row) => row.dataset.p)") if value is not None]
    assert values == sorted(values) and all(rows.nth(place).locator("th a").is_visible() for place in range(3))
    order.select_option("verdict")
    ranks = rows.evaluate_all("(rows) => rows.map((row) => ['supported', 'refuted', 'inconclusive', 'invalid'].indexOf(row.dataset.verdict))")
    assert ranks == sorted(ranks)
    order.select_option("")
    assert rows.evaluate_all(names) == declared


def test_a_link_to_a_claim_that_is_filtered_away_shows_it(opened):
    one = opened()
    one.get_by_label("Find").fill("trend")
    assert not one.locator("article[data-claim='H1.necessity']").is_visible()
    one.evaluate("location.hash = '#H1.necessity'")
    one.locator("article[data-claim='H1.necessity']").wait_for(state="visible")


def test_a_cell_of_the_head_map_opens_its_head_by_keyboard(opened):
    one = opened()
    panel = one.locator(".head-map .opened")
    assert not panel.is_visible()
    first = one.locator(".cells a").first
    first.focus()
    one.keyboard.press("ArrowDown")
    one.keyboard.press("ArrowDown")
    one.keyboard.press("ArrowRight")
    cell = one.locator(".cells a:focus")
    row, column = cell.get_attribute("data-row"), cell.get_attribute("data-column")
    assert (row, column) == ("2", "1")
    assert float(cell.evaluate("(cell) => parseFloat(getComputedStyle(cell).outlineWidth)")) >= 2
    one.keyboard.press("Enter")
    assert panel.is_visible() and f"Head {row}.{column}" in panel.inner_text()
    assert one.evaluate("document.activeElement.classList.contains('opened')")
    one.keyboard.press("Escape")
    assert not panel.is_visible() and one.locator(".cells a:focus").get_attribute("data-column") == column
    carded = one.locator(".cells a.carded").first
    carded.click()
    assert panel.locator("svg.picture").count() > 0 and panel.locator(".sentence").is_visible()
    ids = one.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))


def test_the_slider_shows_one_share_of_kept_tokens_at_a_time(opened):
    one = opened()
    figure = one.locator(".kept-tokens").first
    slider = figure.get_by_role("slider")
    slider.focus()
    one.keyboard.press("Home")
    examples = figure.locator(".example").count()
    assert figure.locator("li:visible").count() == examples and figure.locator("output").inner_text() == "100 %"
    assert set(figure.locator("li:visible .gone").evaluate_all("(paths) => paths.map((path) => path.getAttribute('d'))")) == {""}
    one.keyboard.press("ArrowRight")
    assert figure.locator("output").inner_text() == slider.get_attribute("aria-valuetext") != "100 %"
    assert all(figure.locator("li:visible .gone").evaluate_all("(paths) => paths.map((path) => path.getAttribute('d'))"))


def test_without_javascript_the_page_is_complete(opened):
    one = opened(java_script_enabled=False)
    assert not one.locator("#tools").is_visible() and not one.locator(".slide").first.is_visible()
    figure = one.locator(".kept-tokens").first
    assert figure.locator("li:visible").count() == figure.locator("li").count() > figure.locator(".example").count()
    assert one.locator(".sortable tbody tr").first.is_visible()
    cell = one.locator(".cells a:not(.carded)").last
    row = one.locator(f"[id='{cell.get_attribute('href')[1:]}']")
    assert not row.is_visible()
    cell.click()
    assert row.is_visible()  # a link into what is folded opens it


def test_every_control_is_reached_and_named(reading):
    named = reading.evaluate(
        """() => [...document.querySelectorAll('button, input, select, summary, a[href], [tabindex="0"]')].filter((one) => one.checkVisibility()).filter((one) =>
          !(one.getAttribute('aria-label') || one.innerText || one.labels?.[0]?.innerText || one.querySelector('title'))).map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert named == []


MARGIN, WIDE, HIGH = 12, 186, 273  # of an A4 sheet, in mm


def test_it_prints_to_clean_pages(opened):
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed: pip install 'vlm-claims[test]'")
    one = opened()
    printed = one.pdf(format="A4", print_background=True, margin=dict.fromkeys(("top", "bottom", "left", "right"), f"{MARGIN}mm"))
    sheets = [plain(sheet.extract_text()) for sheet in pypdf.PdfReader(io.BytesIO(printed)).pages]
    text = "".join(sheets)
    assert "Allclaims" not in text and "Darkpage" not in text and "Provenance" in text
    # What fits on a sheet is not split: a card's first words and its last, the command that reproduces it, are on one.
    one.emulate_media(media="print")
    one.set_viewport_size({"width": round(WIDE * 96 / 25.4), "height": 900})
    one.evaluate(UNFOLD)
    cards = one.locator("article[data-claim]").evaluate_all(
        "(cards) => cards.map((card) => [card.querySelector('.sentence').innerText, card.querySelector('.why').innerText,"
        " [...card.querySelectorAll('pre')].pop().innerText, card.getBoundingClientRect().height])"
    )
    fitting = [words for *words, height in cards if height < 0.97 * HIGH * 96 / 25.4]
    assert len(fitting) > len(cards) / 2 and len(fitting) > 4
    for words in fitting:
        assert any(all(plain(one) in sheet for one in words) for sheet in sheets), f"the card that begins {words[0]!r} is split"
    # A card that does not fit is split between its figures: title and all words of one are on one sheet.
    tall = [words[0] for *words, height in cards if height > HIGH * 96 / 25.4]
    figures = one.locator("article[data-claim] figure:has(svg)").evaluate_all(
        "(figures) => figures.map((figure) => [figure.closest('article').querySelector('.sentence').innerText,"
        " [figure.querySelector('b').innerText, ...[...figure.querySelectorAll('svg text')].map((text) => text.textContent)]])"
    )
    inside = [words for sentence, words in figures if sentence in tall]
    assert tall and len(inside) > 2 * len(tall) and sum(map(len, inside)) > 100
    for words in inside:
        assert any(all(plain(one) in sheet for one in words) for sheet in sheets), f"the figure {words[0]!r} is split"


def plain(text):
    """Letters alone, ligatures taken apart: where a printed line ends does not matter."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text))


def violations(one):
    axe = pytest.importorskip("axe_playwright_python", reason="axe is not installed: pip install 'vlm-claims[test]'")
    one.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    one.evaluate(UNFOLD)
    found = one.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [(rule["id"], len(rule["nodes"]), rule["nodes"][0]["html"][:160]) for rule in found]


@pytest.mark.parametrize(("viewport", "scheme"), [(LAPTOP, "light"), (LAPTOP, "dark"), (PHONE, "light")], ids=["laptop", "dark", "phone"])
def test_axe_finds_nothing(opened, viewport, scheme):
    assert violations(opened(viewport, scheme)) == []


@pytest.mark.parametrize("name", ["compare", "trend", "index", "models"])
def test_pages_about_several_runs_fit_a_phone_and_axe_finds_nothing(opened, several, name):
    one = opened(PHONE, "dark", at=several[name])
    assert one.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert violations(one) == []
