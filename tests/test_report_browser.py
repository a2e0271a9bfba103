"""The report in a real browser, on a wide screen and on a phone: nothing missing, nothing fetched, nothing cut off."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import GRID, IMAGES, ROWS, entry, ranking, render, row

from evaluation.events import Events

CHROMIUM = Path("/usr/bin/chromium")  # Debian's
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser: there is no {CHROMIUM}"),
]

TRIAL, OTHER = "t0012-polynomial", "t0003-polynomial"
SCORED = {
    "score": {"mean": 9.5, "std": 0.04, "ci": [9.4, 9.6]},
    "score_pool": 9.58,
    "frechet": {"value": 105.0, "ci": [104.8, 105.2]},
    "kid": {"value": 0.0123, "ci": [0.0113, 0.0133]},
    "to_next": {"score": 0.123, "ci": [-0.05, 0.3]},
    "at_real_n": {"n": 360, "score": 9.21, "frechet": 107.9, "precision": 0.8, "recall": 0.71},
    "learning_rate": 1.23456e-4,
}
ENTRIES = [
    entry(1, TRIAL, tied_with=[OTHER], **SCORED),
    entry(2, OTHER, tied_with=[TRIAL], **SCORED),
    entry(None, "t4", reason="a reason that is too long for a phone's screen " * 3),
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [*ROWS, row("t6-a-long-name-of-a-trial", learning_rate=1.23456e-4, rungs=[]), row(TRIAL), row(OTHER)]
    scalars = {"train/loss": [(1, 0.9), (2, 0.4)], "train/learning_rate": [(1, 2e-4), (2, 1e-4)]}
    events = {TRIAL: Events(scalars, GRID, [(0.0, 7200.0)]), "t0": Events({}, GRID, [(0.0, 3600.0)])}
    file = tmp_path_factory.mktemp("report") / "index.html"
    given = {"samples": {TRIAL: IMAGES, OTHER: IMAGES}, "real_samples": IMAGES, "events": events}
    file.write_text(render(rows, ranking(*ENTRIES), **given))
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[360, 1280], ids=["phone", "desktop"])
def opened(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, with what it asked for in `page.asked` and what went wrong in `page.errors`."""
    page = browser.new_page(viewport={"width": request.param, "height": 800})
    page.asked, page.errors = [], []
    page.on("request", lambda sent: page.asked.append(sent.url))
    page.on("console", lambda said: page.errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(page_file.as_uri())
    yield page
    page.close()


def test_page_opens_without_an_error_and_without_the_network(opened: Any, page_file: Path):
    assert opened.errors == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [page_file.as_uri()]


def test_every_picture_is_there(opened: Any):
    widths = opened.eval_on_selector_all("img", "images => images.map(image => image.complete && image.naturalWidth)")
    assert len(widths) > 5
    assert all(widths)
    drawn = opened.eval_on_selector_all(".panels svg", "all => all.map(svg => svg.getBoundingClientRect().width)")
    assert len(drawn) > 8
    assert min(drawn) > 250  # so that its text can be read


def test_nothing_is_wider_than_the_screen(opened: Any):
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    # what scrolls by itself may hold more than it shows; nothing else may stick out
    sticking_out = opened.evaluate(
        """width => [...document.querySelectorAll('body *')]
            .filter(e => !e.closest('pre, svg') && e.getBoundingClientRect().right > width + 0.5 && e.offsetParent)
            .filter(e => innerWidth < 700 || !e.closest('.scroll'))
            .map(e => e.outerHTML.slice(0, 100))""",
        width,
    )
    assert sticking_out == []


def test_a_table_shows_all_its_columns_without_scrolling(opened: Any):
    wide = opened.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.scrollWidth)"
    )
    assert wide == []


def test_what_is_said_below_a_value_stands_below_it(opened: Any):
    beside = opened.evaluate(
        """() => [...document.querySelectorAll('td > small')].filter(small => {
            const before = document.createRange();
            before.setStart(small.parentElement, 0);
            before.setEndBefore(small);
            const end = Math.max(...[...before.getClientRects()].map(box => box.bottom));
            return small.getBoundingClientRect().top < end - 1;
        }).map(small => small.parentElement.innerText)"""
    )
    assert beside == []


def test_no_text_of_a_figure_is_cut_off(opened: Any):
    cut = opened.evaluate(
        """() => [...document.querySelectorAll('.panels svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1
                    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
            }).map(text => text.textContent);
        })"""
    )
    assert cut == []


def test_the_ranking_has_its_rows_in_their_order(opened: Any):
    rows = opened.eval_on_selector_all(
        "#ranking + .scroll tbody tr:not(.reference)",
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))",
    )
    assert [cells[0] for cells in rows] == [str(each["rank"] or "") for each in ENTRIES]
    assert [cells[1].split("\n")[0] for cells in rows] == [each["trial"] for each in ENTRIES]
    assert [cells[2].split()[0] for cells in rows] == ["9.50", "9.50", "–"]
    assert [cells[6] for cells in rows] == [OTHER, TRIAL, "–"]


def test_print_shows_the_whole_configuration_which_the_screen_folds_away(opened: Any):
    shown = "document.querySelector('details pre').checkVisibility({contentVisibilityAuto: true})"
    assert not opened.evaluate(shown)
    opened.emulate_media(media="print")
    opened.wait_for_function(shown, timeout=10_000)  # from the next frame on
    assert opened.eval_on_selector("details pre", "pre => pre.getBoundingClientRect().height") > 0
