"""The desk's page: a made-up market's demo in a real browser, its audit at the head; stopped, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import chromium, opened
from playwright.sync_api import Browser, expect

from fireflyer.cli.market_demo import described
from fireflyer.errors import Stopped
from fireflyer.market.appraisal import Appraisal, appraise
from fireflyer.market.audit import Audit, Finding
from fireflyer.market.demo import REPORT, run_demo
from fireflyer.market.engine import BacktestSettings
from fireflyer.market.portfolio import TopK
from fireflyer.market.recipe import load_market_recipe
from fireflyer.market.report import market_page
from fireflyer.market.study import Study
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(2, days=300, names=24, bars=False)
RECIPE = load_market_recipe(
    None,
    [
        "steps=2",
        "batch_size=8",
        "seq_len=40",
        "threads=1",
        "schedule.warmup_steps=1",
        "model.hidden_size=32",
        "model.n_routed_experts=4",
        "market.train_months=6",
        "market.test_months=3",
    ],
)
SETTINGS = BacktestSettings(portfolio=TopK(names=8, drop=2))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk") / "market"
    with pytest.raises(Stopped, match="the same command goes on"):  # after training, while it is appraised
        run_demo(
            PANEL, RECIPE, folder, on_part=lambda _: None, should_stop=lambda: (folder / "test-2021-10-01").exists()
        )
    parts: list[str] = []
    facts = run_demo(PANEL, RECIPE, folder, audit_dates=2, on_part=parts.append)
    assert facts["audit"] == "passed 9 of 9 leak tests", facts["findings"]
    assert parts[:3] == ["forecasts of every session", "Ridge and LightGBM on the same folds", "trading: decoder"]
    return folder


@pytest.fixture(scope="module")
def appraised(demo: Path) -> Appraisal:
    found = appraise(PANEL, Study.load(demo), SETTINGS, trials=3, audit_dates=1)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_a_finished_demo_is_only_read(demo: Path) -> None:
    parts: list[str] = []
    facts = run_demo(PANEL, RECIPE, demo, on_part=parts.append)
    assert parts == []
    assert facts == json.loads((demo / "summary.json").read_text())
    assert list(facts["models"]) == ["decoder", "Ridge", "LightGBM", "decoder and Ridge"]
    shown = "\n".join(described(facts))
    assert shown.index("audit: passed 9 of 9") < shown.index("RankIC")


def test_the_page_says_what_it_stands_on_and_draws(demo: Path, browser: Browser) -> None:
    with opened(browser, (demo / REPORT).as_uri()) as page:
        expect(page.locator("h1")).to_have_text("market")
        expect(page.locator(".head")).not_to_have_class("failed")
        for fact in (
            "made up, seed 2; closes only",
            "synthetic;",
            "stamp duty",
            "passed 9 of 9 leak tests",
            "14 strat",
        ):
            expect(page.locator(".facts")).to_contain_text(fact)
        expect(page.locator(".uplot canvas")).to_have_count(6)
        expect(page.locator(".map canvas")).to_have_count(1)
        page.locator(".map canvas").hover(position={"x": 2, "y": 3})
        expect(page.locator(".map .reading")).to_contain_text("expert 0")
        for row in ("LightGBM", "determinism", "Calibration", "Orders that were not filled"):
            expect(page.locator("#tables")).to_contain_text(row)


def test_a_phone_needs_no_sideways_scrolling(demo: Path, browser: Browser) -> None:
    with opened(browser, (demo / REPORT).as_uri(), viewport={"width": 360, "height": 740}) as page:
        expect(page.locator(".uplot canvas").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_where_the_audit_fails_no_figure_leads(appraised: Appraisal, browser: Browser, tmp_path: Path) -> None:
    leak = Audit((Finding("execution", False, "<b>same bar</b>"), *appraised.audit.findings[1:]))
    path = tmp_path / "leak.html"
    path.write_text(market_page(replace(appraised, audit=leak), "</script><b>x"), encoding="utf-8")
    with opened(browser, path.as_uri()) as page:
        expect(page.locator("h1")).to_have_text("</script><b>x")
        expect(page.locator(".head.failed > p")).to_have_text(
            "The audit failed 1 of 9 leak tests: execution. No figure on this page can be relied on."
        )
        expect(page.locator("#tables")).to_contain_text("<b>same bar</b>")


def test_gross_is_net_with_the_fees_given_back(appraised: Appraisal) -> None:
    one = appraised.models[0]
    growth = 1.0
    for day in range(1, len(one.result.nav)):
        growth *= (one.result.nav[day] + one.result.fees[day]) / one.result.nav[day - 1]
    assert one.gross == pytest.approx(growth ** (244 / (len(one.result.nav) - 1)) - 1)
    assert one.gross > one.net
    assert appraised.trials == one.deflated.trials == 3
