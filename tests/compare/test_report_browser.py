"""The report in a real browser: its layout at three widths, in light and in dark, its keyboard, its accessibility."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hal_compare import report
from hal_compare.assumed import with_assumed_power

from . import comparisons
from .chromium import VARIABLE, Chromium, program

pytestmark = [
    pytest.mark.skipif(
        program() is None,
        reason=f"no Chromium or Chrome is on PATH, and {VARIABLE} does not name one (apt install chromium)",
    ),
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("browser"),
]

WIDTHS = (400, 800, 1400)
#: Rectangles of the text that is shown: of each text node (HTML) and each text element (SVG).
TEXTS = """
const rect = (r) => ({left: r.left, right: r.right, top: r.top, bottom: r.bottom});
const shown = (e) => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
const texts = (root) => {
  const found = [];
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, e = node.parentElement;
    if (!node.textContent.trim() || !shown(e) || e.closest("script, style, title")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) if (r.width > 0) found.push({text: node.textContent.trim(), e, ...rect(r)});
  }
  return found;
};
const meets = (a, b) => a.left + 1 < b.right && b.left + 1 < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of as many rows as there can be, all kinds of them."""
    target = tmp_path_factory.mktemp("report") / "report.html"
    report.write(with_assumed_power(comparisons.every_family(), 65), target)
    return target


def shown(browser: Chromium, page: Path, width: int, dark: bool = False, unfold: bool = True) -> Chromium:
    browser.open(page, width, dark=dark)
    assert browser.messages == [], "the page's script failed, or its policy stopped something"
    if unfold:
        browser.run("document.querySelectorAll('.fold').forEach(e => e.click())")
        browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    return browser


def ask(browser: Chromium, code: str) -> Any:
    """The value of a function body that may use `texts`, `shown` and `meets`."""
    return browser.run(f"(() => {{ {TEXTS} {code} }})()")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_scrolls_in_one_direction_and_cuts_nothing_off(browser, page, width):
    shown(browser, page, width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    outside = ask(
        browser, f"return texts(document.body).filter(t => t.left < 0 || t.right > {width}).map(t => t.text);"
    )
    assert outside == []
    cut = ask(
        browser,
        """return [...document.querySelectorAll("main *")].filter(e => shown(e) && !e.closest("svg")
             && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
             && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && getComputedStyle(e).display !== "inline")
           .map(e => e.className + " " + e.textContent.slice(0, 40));""",
    )
    assert cut == []
    out = ask(
        browser,
        """return [...document.querySelectorAll("figure")].flatMap(f => { const box = f.getBoundingClientRect();
             return texts(f).filter(t => t.left < box.left || t.right > box.right || t.bottom > box.bottom + 1)
               .map(t => t.text); });""",
    )
    assert out == [], "text hangs out of its figure"


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_covers_another(browser, page, width):
    shown(browser, page, width)
    covered = ask(
        browser,
        """const found = [];
           for (const box of document.querySelectorAll("svg, .rows, tr, .facts, .legend, header, dl")) {
             if (!shown(box)) continue;
             const all = texts(box);
             all.forEach((a, i) => all.slice(i + 1).forEach(b => {
               if (meets(a, b) && a.e !== b.e) found.push([a.text, b.text]); }));
           }
           return found;""",
    )
    assert covered == []
    assert ask(browser, "return document.querySelectorAll('svg text.name').length") > 20, "labels are there to be seen"


@pytest.mark.parametrize("width", WIDTHS)
def test_text_is_large_enough_to_read(browser, page, width):
    shown(browser, page, width)
    small = ask(
        browser,
        """return texts(document.body).filter(t => {
             const svg = t.e.closest("svg");
             const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
             return parseFloat(getComputedStyle(t.e).fontSize) * scale < 10; }).map(t => t.text);""",
    )
    assert small == []


def test_a_narrow_page_shows_the_chart_drawn_for_it(browser, page):
    for width, kind in ((400, "narrow"), (1400, "wide")):
        shown(browser, page, width)
        seen = ask(
            browser, "return [...document.querySelectorAll('.pareto svg')].filter(shown).map(e => e.classList[0]);"
        )
        assert set(seen) == {kind}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_text_stands_out_from_its_ground(browser, page, width, dark):
    shown(browser, page, width, dark=dark)
    poor = ask(
        browser,
        """
        const numbers = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length === 3 ? [...m, 1] : m; };
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
          .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const ground = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
          if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
        return texts(document.body).map(t => { const s = getComputedStyle(t.e);
          const ink = numbers(t.e.closest("svg") ? s.fill : s.color), back = ground(t.e);
          const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
          const large = parseFloat(s.fontSize) >= 24 || (parseFloat(s.fontSize) >= 18.66 && s.fontWeight >= 700);
          return {text: t.text, ratio: (a + .05) / (b + .05), need: large ? 3 : 4.5};
        }).filter(t => t.ratio < t.need);
        """,
    )
    assert poor == []


def test_dark_is_dark_and_light_is_light(browser, page):
    grounds = []
    for dark in (False, True):
        shown(browser, page, 800, dark=dark)
        grounds.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(246, 245, 242)", "rgb(20, 22, 26)"]


def test_variants_are_folded_into_their_family_and_unfold_by_the_keyboard(browser, page):
    shown(browser, page, 1400, unfold=False)
    count = "[...document.querySelectorAll('tr.variant')].filter(e => e.checkVisibility()).length"
    assert browser.run(count) == 0
    assert browser.run("document.querySelectorAll('section table')[0].tBodies.length") == 9
    browser.run("document.querySelector('.fold').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert browser.run(count) == 2
    browser.press(" ", 32, " ")
    assert browser.run("document.activeElement.getAttribute('aria-expanded')") == "false"
    assert browser.run(count) == 0


@pytest.mark.parametrize("width", [400, 1400])
def test_every_control_is_reached_by_tab_and_shows_that_it_is(browser, page, width):
    shown(browser, page, width, unfold=False)
    wanted = ask(browser, "return [...document.querySelectorAll('button, a, summary')].filter(shown).length;")
    browser.run("document.activeElement.blur(), window.scrollTo(0, 0)")
    reached, unseen = set(), []
    for _ in range(wanted):
        browser.press("Tab", 9)
        place = browser.run("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        reached.add(place)
        if browser.run("getComputedStyle(document.activeElement).outlineStyle") == "none":
            unseen.append(browser.run("document.activeElement.textContent"))
    assert len(reached) == wanted
    assert unseen == []


def test_columns_sort_by_the_keyboard_and_say_so(browser, page):
    shown(browser, page, 1400, unfold=False)
    column = """[...document.querySelector('section table').tBodies].map(b => b.rows[0].cells[4])
                .map(c => [c.dataset.group || '0', c.dataset.value === undefined ? null : Number(c.dataset.value)])"""
    head = "document.querySelector('section table thead').rows[0].cells[4]"
    browser.run(f"{head}.querySelector('button').focus()")
    for direction in ("ascending", "descending"):
        browser.press("Enter", 13, "\r")
        assert browser.run(f"{head}.getAttribute('aria-sort')") == direction
        others = "[...document.querySelectorAll('section table')[0].querySelectorAll('th[aria-sort]')]"
        assert browser.run(f"{others}.filter(e => e.getAttribute('aria-sort') !== 'none').length") == 1
        found = browser.run(column)
        assert found[-1][1] is None, "what did not run is last"
        for group in ("0", "1"):
            values = [value for each, value in found if each == group and value is not None]
            assert len(values) >= 4
            assert values == sorted(values, reverse=direction == "descending")
        groups = [each for each, value in found if value is not None]
        assert groups == sorted(groups), "modelled times stay below measured ones"


def test_variants_stay_with_their_family_when_sorted(browser, page):
    shown(browser, page, 1400)
    names = (
        "[...document.querySelector('section table').tBodies].map(b => [...b.rows].map(r => r.cells[0].textContent))"
    )
    before = {tuple(sorted(group)) for group in browser.run(names)}
    browser.run("document.querySelectorAll('section table thead button')[2].click()")
    assert {tuple(sorted(group)) for group in browser.run(names)} == before


def test_without_its_script_the_page_shows_everything(browser, page):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page, 1400)
        assert browser.run("document.documentElement.className") == ""
        assert ask(browser, "return [...document.querySelectorAll('tr')].filter(e => !shown(e)).length;") == 0
        assert ask(browser, "return [...document.querySelectorAll('.fold')].filter(shown).length;") == 0
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_structure_that_assistive_software_needs(browser, page):
    shown(browser, page, 1400)
    levels = ask(browser, "return [...document.querySelectorAll('h1,h2,h3,h4')].map(e => Number(e.tagName[1]));")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip([0, *levels], levels, strict=False)), "a level is skipped"
    faults = ask(
        browser,
        """
        const bad = [];
        const name = e => (e.getAttribute("aria-label") || e.textContent).trim();
        for (const e of document.querySelectorAll("[role=img], button, a, summary"))
          if (!name(e)) bad.push(e.outerHTML);
        for (const e of document.querySelectorAll("svg")) if (e.getAttribute("role") !== "img") bad.push("svg");
        const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
        if (new Set(ids).size !== ids.length) bad.push("an id twice");
        for (const e of document.querySelectorAll("[aria-controls]"))
          for (const id of e.getAttribute("aria-controls").split(" ")) if (!document.getElementById(id)) bad.push(id);
        for (const t of document.querySelectorAll("table")) {
          if (!t.caption || !t.caption.textContent) bad.push("a table without caption");
          for (const e of t.tHead.rows[0].cells) if (e.scope !== "col") bad.push(e.outerHTML);
          for (const b of t.tBodies) for (const r of b.rows) if (r.cells[0].scope !== "row") bad.push(r.outerHTML);
        }
        if (!document.documentElement.lang) bad.push("no language");
        if (!document.title) bad.push("no title");
        if (document.querySelectorAll("main").length !== 1) bad.push("main");
        const roles = {TABLE: "table", TR: "row", TD: "cell", TBODY: "rowgroup", THEAD: "rowgroup"};
        for (const [tag, role] of Object.entries(roles)) for (const e of document.querySelectorAll(tag))
          if (e.getAttribute("role") !== role) bad.push(tag + " loses its role where it is a block");
        return bad;
        """,
    )
    assert faults == []


#: Where axe-core is looked for: this environment variable, and node_modules here or above.
AXE = "HAL_AXE"


def axe() -> Path | None:
    """axe.min.js, of the package axe-core; None where it is not installed."""
    places = [Path(os.environ[AXE])] if AXE in os.environ else []
    here = Path(__file__).resolve()
    places += [folder / "node_modules" / "axe-core" / "axe.min.js" for folder in here.parents]
    return next((place for place in places if place.is_file()), None)


@pytest.mark.skipif(
    axe() is None, reason=f"axe-core is not installed (npm install axe-core), and {AXE} names no axe.min.js"
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_axe_finds_nothing_serious(browser, page, width, dark):
    found = axe()
    assert found is not None
    shown(browser, page, width, dark=dark)
    browser.run(found.read_text(encoding="utf-8") + "; 0")
    violations = browser.run(
        "axe.run(document).then(r => r.violations.map(v => "
        "({id: v.id, impact: v.impact, nodes: v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))})))"
    )
    assert violations == []
