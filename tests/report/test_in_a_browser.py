"""The page as a browser shows it, from a file and with no server behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import chromium, opened
from playwright.sync_api import Browser, expect

from fireflyer.report.page import report_page
from fireflyer.report.run_data import read_run

from .made_run import made_run

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_charts_maps_and_samples_are_there_and_answer(browser: Browser, tmp_path: Path) -> None:
    runs = [read_run(made_run(tmp_path / "one", hostile=HOSTILE)), read_run(made_run(tmp_path / "two", seed=5))]
    path = tmp_path / "report.html"
    path.write_text(report_page(runs), encoding="utf-8")
    with opened(browser, path.as_uri()) as page:
        expect(page.locator("h1")).to_have_text(["one", "two"])
        expect(page.locator(".uplot canvas")).to_have_count(page.locator("#charts .card").count())
        expect(page.locator(".map canvas")).to_have_count(4)
        expect(page.locator("#difference-table")).to_contain_text("seed05")

        sample = page.locator(".sample").first
        expect(sample.locator("pre")).to_have_text(f"Once {HOSTILE}upon 40{HOSTILE}")
        sample.locator("input").fill("0")
        expect(sample.locator("pre")).to_have_text(f"Once {HOSTILE}upon 10{HOSTILE}")

        page.locator(".map canvas").first.hover(position={"x": 10, "y": 7})
        expect(page.locator(".map .reading").first).to_have_text("step 5, expert 0: 0")
        page.select_option("#quantity", "bias")
        page.locator(".map canvas").first.hover(position={"x": 10, "y": 7})
        expect(page.locator(".map .reading").first).to_have_text("step 5, expert 0: 0.005")

        page.select_option("#axis", "steps")
        expect(page.locator("#chart-loss .u-legend")).to_contain_text("steps")


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report_page([read_run(made_run(tmp_path / "one"))]), encoding="utf-8")
    with opened(browser, path.as_uri(), viewport={"width": 360, "height": 740}) as page:
        expect(page.locator(".uplot canvas").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
