"""The pages in a real browser: nothing fails, nothing runs, nothing is fetched, and a phone can show them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pretrain.evaluation.reports.comparison import write_comparison
from pretrain.evaluation.reports.evaluation import write_evaluation_report
from pretrain.evaluation.reports.run import write_report
from pretrain.evaluation.results import EvaluationResult, write_result
from tests.integration.browser import Browser, find_chromium
from tests.unit.evaluation.pages import ATTACK, comparison, evaluation_result, extras
from tests.unit.evaluation.test_report import full_report

pytestmark = pytest.mark.browser

LONG_WORD = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 3

#: Texts whose contrast with what is behind them is below 4.5 (WCAG 2.2, 1.4.3), as [text, contrast].
LOW_CONTRAST = """
(() => {
  const channels = colour => {
    const numbers = colour.match(/[\\d.]+(e-\\d+)?/g).map(Number);
    const scale = colour.startsWith('color(') ? 1 : 255;
    return [...numbers.slice(0, 3).map(value => value / scale), numbers.length > 3 ? numbers[3] : 1];
  };
  const luminance = rgb => rgb.slice(0, 3)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    if (!element) return [1, 1, 1, 1];
    const colour = channels(getComputedStyle(element).backgroundColor);
    if (colour[3] === 1) return colour;
    const below = behind(element.parentElement);
    return below.map((v, i) => i < 3 ? colour[3] * colour[i] + (1 - colour[3]) * v : 1);
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.tagName === 'SCRIPT') continue;
    const pair = [channels(getComputedStyle(element).color), behind(element)].map(luminance).sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) low.push([walker.currentNode.data.trim().slice(0, 40), contrast]);
  }
  return low;
})()
"""
#: Elements that reach beyond the screen and are in no box that scrolls.
TOO_WIDE = """
[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll, svg'))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.tagName + '.' + e.className)
"""

#: What a phone does not show whole, all details open: a box whose table is wider (a confusion matrix of many classes
#: may be), a cell whose content leaves it, a number on two lines.
CUT = """
(() => {
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const cut = [];
  for (const box of document.querySelectorAll('.scroll:has(table:not(.many))')) {
    const name = box.getAttribute('aria-label').slice(0, 40);
    if (box.scrollWidth > box.clientWidth) cut.push([name, 'scrolls', box.scrollWidth]);
    const right = box.getBoundingClientRect().right + 0.5;
    for (const cell of box.querySelectorAll('th, td')) {
      const inside = document.createRange();
      inside.selectNodeContents(cell);
      const [own, edge] = [inside.getBoundingClientRect().right, cell.getBoundingClientRect().right + 0.5];
      const hidden = cell.closest('thead') && getComputedStyle(cell.closest('thead')).position === 'absolute';
      if (!hidden && own > Math.min(edge, right)) cut.push([name, 'leaves its cell', cell.textContent.slice(0, 40)]);
    }
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      if (!walker.currentNode.parentElement.closest('td')) continue;
      for (const number of walker.currentNode.data.matchAll(/(^|\\s)[-+]?[\\d,.]*\\d(?=\\s|$)/g)) {
        const range = document.createRange();
        range.setStart(walker.currentNode, number.index + number[1].length);
        range.setEnd(walker.currentNode, number.index + number[0].length);
        const tops = [...range.getClientRects()].map(r => r.top);
        if (new Set(tops).size > 1) cut.push([name, 'broken', number[0]]);
      }
    }
  }
  return cut;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with Browser(path, tmp_path_factory.mktemp("profile")) as started:
        yield started


def of_many_images(result: EvaluationResult) -> EvaluationResult:
    """Counts of seven digits, and of four in the confusion matrix: the widest that a phone has to show."""
    text = result.model_dump_json().replace('"n":457', '"n":1234567').replace('"n":440', '"n":1203441')
    of = EvaluationResult.model_validate_json(text)
    first, *others = of.tasks
    assert first.confusion is not None
    counts = tuple(tuple(100 * count for count in row) for row in first.confusion.counts)
    first = first.model_copy(update={"confusion": first.confusion.model_copy(update={"counts": counts})})
    return of.model_copy(update={"tasks": (first, *others)})


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each page, of harmless names, of hostile ones, and of words that no line breaks."""
    directory = tmp_path_factory.mktemp("pages")
    made = {}
    for kind, name in (("plain", "nevus"), ("hostile", ATTACK), ("long", LONG_WORD)):
        sizes = {"evaluation": 8} if kind == "long" else {"evaluation": 8, "wide matrix": 16, "many classes": 40}
        for page, num_classes in sizes.items():
            folder = directory / f"{kind} {page}"
            folder.mkdir()
            write_result(folder, of_many_images(evaluation_result(name, num_classes)))
            made[f"{kind} {page}"] = write_evaluation_report(folder, extras(name))
        made[f"{kind} comparison"] = write_comparison(directory / f"{kind} comparison.html", comparison(name))
        made[f"{kind} run"] = directory / f"{kind} run.html"
        write_report(made[f"{kind} run"], full_report(name))
    return made


NAMES = [f"{kind} {page}" for kind in ("plain", "hostile", "long") for page in ("evaluation", "comparison", "run")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [360, 1280])
@pytest.mark.parametrize("name", [*NAMES, "plain many classes", "hostile many classes"])
def test_page(browser: Browser, pages: dict[str, Path], name: str, width_px: int, scheme: str) -> None:
    browser.open(pages[name], width_px, scheme)
    assert browser.faults() == []
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width_px
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.evaluate("document.images.length") > 0
    assert browser.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.alt)") == []
    assert browser.evaluate(LOW_CONTRAST) == []


@pytest.mark.parametrize("width_px", [390, 600])
@pytest.mark.parametrize("name", [*NAMES, "plain wide matrix", "hostile wide matrix"])
def test_tables_are_whole_on_a_phone(browser: Browser, pages: dict[str, Path], name: str, width_px: int) -> None:
    browser.open(pages[name], width_px)
    assert browser.evaluate(CUT) == []


def test_a_wide_matrix_shows_that_it_scrolls(browser: Browser, pages: dict[str, Path]) -> None:
    """A shadow at its edge, and the names of its rows stay."""
    browser.open(pages["plain wide matrix"], 390)
    assert browser.evaluate("(b => b.scrollWidth > b.clientWidth)(document.querySelector('.many').parentElement)")
    style = "getComputedStyle(document.querySelector('.many').parentElement)"
    assert browser.evaluate(f"{style}.backgroundAttachment") == "local, local, scroll, scroll"
    place = "(document.querySelector('.many tbody th').getBoundingClientRect().left)"
    before = browser.evaluate(place)
    browser.evaluate("document.querySelector('.many').parentElement.scrollLeft = 90")
    assert browser.evaluate("document.querySelector('.many').parentElement.scrollLeft") == 90
    assert browser.evaluate(place) == pytest.approx(before, abs=1)  # borders are shared


@pytest.mark.parametrize("name", NAMES)
def test_dark_and_light_differ_in_page_and_charts(browser: Browser, pages: dict[str, Path], name: str) -> None:
    shown = {}
    for scheme in ("light", "dark"):
        browser.open(pages[name], 1280, scheme)
        shown[scheme] = (
            browser.evaluate("getComputedStyle(document.body).backgroundColor"),
            browser.evaluate("document.querySelector('picture img').currentSrc"),
        )
    assert shown["light"][0] == "rgb(255, 255, 255)" and shown["dark"][0] == "rgb(18, 24, 29)"
    assert shown["light"][1] != shown["dark"][1]


@pytest.mark.parametrize("name", NAMES)
def test_page_has_an_order_to_read_aloud(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], 1280)
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert browser.evaluate("document.querySelectorAll('main').length") == 1
    assert browser.evaluate("document.documentElement.lang") == "en"
    assert browser.evaluate("[...document.images].filter(i => !i.alt.trim()).length") == 0
    for requirement in (
        "[...document.querySelectorAll('thead th')].filter(h => h.scope !== 'col').length",
        "[...document.querySelectorAll('tbody th')].filter(h => h.scope !== 'row').length",
        "[...document.querySelectorAll('table')].filter(t => !t.tHead || !t.closest('[aria-label]')).length",
        "[...document.querySelectorAll('.scroll')].filter(s => s.tabIndex !== 0).length",
        "(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))",
        "[...document.querySelectorAll('a')].filter(a => !document.getElementById(a.hash.slice(1))).length",
    ):
        assert browser.evaluate(requirement) == 0, requirement


def test_the_checks_can_fail(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width, initial-scale=1'>"
        "<body><p style='width: 500px; color: #999'>pale</p><img src='missing.png'><script>console.error(1)</script>"
    )
    browser.open(page, 360)
    assert "Runtime.consoleAPICalled" in [fault["method"] for fault in browser.faults()]
    assert browser.evaluate("document.documentElement.scrollWidth") > 360
    assert browser.evaluate(TOO_WIDE) == ["P."]
    assert [text for text, _ in browser.evaluate(LOW_CONTRAST)] == ["pale"]
    assert len(browser.requests()) == 2
