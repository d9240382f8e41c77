"""The page in a browser without network: it opens, sorts, filters, tells, switches and opens runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sweep_runs import EVIL, evil_sweep, needs_report, write_sweep

from lightning_prune.sweeps import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FAR = 3 + 9
"""A point with no other near it, behind those of the three dense twins."""

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH, or its path in CHROMIUM"),
    needs_report,
]


class Watched:
    """A page, and everything that it asked the network for or complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.complaints.append(request.url))

    def open(self, path: Path, ending: str = "") -> Page:
        self.page.goto(path.as_uri() + ending)
        self.page.wait_for_selector("html[data-ready]", state="attached")
        assert self.complaints.pop(0).startswith("file:")
        self.complaints[:] = [each for each in self.complaints if not each.startswith(("data:", "blob:"))]
        return self.page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    watched = Watched(context.new_page())
    yield watched
    context.close()
    assert watched.complaints == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sweep(tmp_path_factory.mktemp("sweep"))
    return write_report([folder], folder / "report").page


def column(page: Page, number: int) -> list[str]:
    """Return what the rows that are seen say in a column."""
    rows = page.locator(f"#runs tbody:not([hidden]) tr.group > :nth-child({number})")
    return [text.split()[0] for text in rows.all_inner_texts()]


def opened(page: Page) -> Locator:
    return page.locator("main.run:not([hidden]) h1")


def marks(page: Page) -> Locator:
    """Return the drawn points, trace by trace; the first three are the dense twins."""
    return page.locator("#front .scatterlayer .point")


def test_the_front_is_drawn(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    assert marks(page).count() == 3 + 36
    assert page.locator("#front .xtitle").text_content() == "MACs"
    assert page.locator("#shown").text_content() == "12 of 12 configurations"


def test_the_axis_is_switched(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    for name in ("parameters", "latency, batch 1", "latency, batch 64"):
        page.get_by_text(name, exact=True).first.click()
        assert page.locator("#front .xtitle").text_content() == name
    page.get_by_text("means of seeds").click()
    assert marks(page).count() == 3 + 12
    assert page.locator("#front .errorbar").count() == 12


def test_the_axis_is_switched_by_keys(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    page.locator("input[name=cost]").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#front .xtitle").text_content() == "parameters"


def test_hover_tells_the_run(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    marks(page).nth(FAR).hover(force=True)
    told = page.locator("#front .hoverlayer").text_content() or ""
    assert "method=fisher, method.pruning_ratio=0.9, seed 0" in told
    assert "255 k (10% of dense)" in told


def test_a_point_opens_its_run(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    marks(page).nth(FAR).click(force=True)
    opened(page).wait_for()
    assert opened(page).inner_text() == "method=fisher, method.pruning_ratio=0.9, seed 0"


def test_a_mean_opens_its_seeds(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    page.get_by_text("means of seeds").click()
    marks(page).nth(3).click(force=True)
    page.locator("tr.seed:not([hidden])").first.wait_for()
    assert page.locator("tr.seed:not([hidden])").count() == 3
    assert page.locator("#overview").is_visible()


def test_the_table_is_sorted(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    accuracies = [float(text) for text in column(page, 4)]
    assert accuracies == sorted(accuracies, reverse=True)
    page.get_by_role("button", name="MACs").click()
    assert column(page, 3) == ["0.9"] * 3 + ["0.7"] * 3 + ["0.5"] * 3 + ["0.3"] * 3
    assert (
        page.locator("th[aria-sort]").inner_text() == "MACs ↑" or page.locator("th[aria-sort=ascending]").count() == 1
    )
    page.get_by_role("button", name="MACs").press("Enter")
    assert column(page, 3) == ["0.3"] * 3 + ["0.5"] * 3 + ["0.7"] * 3 + ["0.9"] * 3
    page.get_by_role("button", name="method", exact=True).click()
    assert column(page, 2) == ["fisher"] * 4 + ["magnitude"] * 4 + ["slimming"] * 4


def test_the_table_is_filtered_and_with_it_the_front(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    page.locator("#filter").fill("SLIM 0.5")
    assert (column(page, 2), column(page, 3)) == (["slimming"], ["0.5"])
    assert page.locator("#shown").text_content() == "1 of 12 configurations"
    faint = marks(page).evaluate_all("points => points.filter(point => getComputedStyle(point).opacity < 0.5).length")
    assert faint == 36 - 3
    page.locator("#filter").fill("")
    page.locator("[data-facet=method]").select_option("magnitude")
    assert column(page, 2) == ["magnitude"] * 4
    page.locator("#filter").fill("no such run")
    assert column(page, 2) == []


def test_a_group_shows_its_seeds_and_one_is_opened(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    button = page.locator(".expand").first
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    page.locator("tr.seed:not([hidden]) td").nth(2).click()
    opened(page).wait_for()
    assert page.url.partition("#")[2].startswith("run=")
    assert opened(page).inner_text() == "method=fisher, method.pruning_ratio=0.3, seed 0"
    run = page.locator("main.run:not([hidden])")
    run.locator("[data-figure=widths] .barlayer .point").first.wait_for(state="attached")
    assert run.locator("[data-figure=widths] .barlayer .point").count() == 2 * 20
    assert run.locator("[data-figure=curves] .scatterlayer .trace").count() == 4 + 1
    assert run.locator("[data-figure=curves] .shapelayer path").count() == 1
    assert run.locator("[data-figure=scales] .heatmaplayer image").count() == 1
    page.keyboard.press("Escape")
    page.locator("#overview").wait_for()
    assert not run.is_visible()


def test_a_run_has_an_address(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    page.locator(".expand").first.click()
    address = page.locator("tr.seed a").nth(1).get_attribute("href") or ""
    again = Watched(page.context.new_page())
    assert opened(again.open(report, address)).inner_text().endswith("seed 1")
    assert again.complaints == []


def test_the_command_is_copied(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".expand").first.click()
    page.locator("tr.seed a").first.click()
    page.locator("main.run:not([hidden]) .copy").click()
    page.get_by_text("copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "lightning-prune method=fisher method.pruning_ratio=0.3 seed=0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_ground(watched: Watched, report: Path, scheme: str) -> None:
    watched.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page = watched.open(report)
    brightness = "element => getComputedStyle(element).color.match(/\\d+/g).slice(0, 3).map(Number)"
    ground = page.locator("body").evaluate(brightness.replace(".color", ".backgroundColor"))
    for words in ("td.figure", "#shown", ".state.failed", ".expand"):
        ink = page.locator(words).first.evaluate(brightness)
        assert contrast(ink, ground) > 4.5, words
    tick = page.locator("#front .xtick text").first.evaluate(brightness.replace(".color", ".fill"))
    assert contrast(tick, ground) > 4.5


def contrast(one: list[int], other: list[int]) -> float:
    """Return the contrast ratio of WCAG 2, of which 4.5 is enough for small text."""

    def luminance(colour: list[int]) -> float:
        shares = [value / 255 for value in colour]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_narrow_page_does_not_scroll_sideways(watched: Watched, report: Path) -> None:
    watched.page.set_viewport_size({"width": 400, "height": 800})
    page = watched.open(report)
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_no_text_of_a_run_is_run(watched: Watched, tmp_path: Path) -> None:
    page = watched.open(write_report([evil_sweep(tmp_path)], tmp_path / "report").page)
    marks(page).last.hover(force=True)
    assert "window.hacked" in (page.locator("#front .hoverlayer").text_content() or "")
    page.locator("#runs a").first.click()
    page.locator("main.run:not([hidden]) [data-figure=widths] .barlayer .point").first.wait_for(state="attached")
    assert EVIL in (opened(page).text_content() or "")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0
