"""An honest pipeline passes all nine leak tests; each test fails by a leak that is planted for it, and by name."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.audit import TESTS, audit, audit_result
from fireflyer.market.audit_fills import wrong_fill
from fireflyer.market.engine import BacktestSettings
from fireflyer.market.orders import Fill
from fireflyer.market.panel import Panel
from fireflyer.market.pipelines import RidgePipeline, linear_scores
from fireflyer.market.plants import PLANTS
from fireflyer.market.portfolio import TopK
from fireflyer.market.recipe import load_market_recipe
from fireflyer.market.study import baseline_scores, study_folds
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(4, days=330, names=40, bars=False)
SETTINGS = load_market_recipe(None, ["market.train_months=6", "market.test_months=4"]).market
FOLDS = study_folds(PANEL, SETTINGS)


@lru_cache
def honest() -> RidgePipeline:
    return RidgePipeline.fit(PANEL, FOLDS, 5, BacktestSettings(portfolio=TopK(names=10, drop=2)))


def test_an_honest_pipeline_passes_all_nine() -> None:
    told = []
    found = audit(honest(), PANEL, dates=6, on_finding=told.append)
    assert found.passed, found.verdict()
    assert [finding.test for finding in told] == list(TESTS)
    assert found.verdict() == "passed 9 of 9 leak tests"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_leak_is_caught_by_its_name(name: str) -> None:
    kind, test = PLANTS[name]
    found = audit(kind(honest()), PANEL, dates=2, only=(test,))
    assert found.failed == (test,)
    assert not found.passed
    assert found.verdict() == f"failed 1 of 1 leak tests: {test}"


def test_on_few_names_orders_still_hang_on_the_scores() -> None:
    few = PANEL.select(PANEL.symbols[:12])
    wide = RidgePipeline(honest().fitted, honest().tested, 5, BacktestSettings(portfolio=TopK(names=50)))
    scores = wide.scores(few)
    there, all_held = wide.narrowed(12), wide.trade(few, scores)
    assert all_held.order_hash == wide.trade(few, -scores).order_hash  # what holds all can't tell a leak
    assert there.trade(few, scores).order_hash != there.trade(few, -scores).order_hash


def test_each_test_has_its_leak() -> None:
    assert sorted(test for _, test in PLANTS.values()) == sorted(TESTS)


def test_fifty_dates_with_another_future_leave_the_past_equal_to_the_bit() -> None:
    found = audit(honest(), PANEL.slice(0, 215), only=("future changed",))
    assert found.findings[0].passed
    assert found.findings[0].detail.startswith("50 dates")


def test_scores_alone_can_be_judged_by_four_tests() -> None:
    scores = honest().scores(PANEL)
    found = audit_result(PANEL, scores, honest().trade(PANEL, scores), 5)
    assert not found.failed
    assert not found.passed  # four of nine aren't all
    assert "not run: future changed, labels shuffled, oracle seen, folds, determinism" in found.verdict()


def test_what_cannot_be_audited_is_said() -> None:
    with pytest.raises(UserError, match="no score on any session"):
        audit(honest(), PANEL.slice(0, 40))


def test_the_ridge_pipeline_scores_as_the_baseline_does() -> None:
    np.testing.assert_array_equal(honest().scores(PANEL), baseline_scores(PANEL, FOLDS, 5)["Ridge"])


def test_shuffled_labels_are_learned_by_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(*PANEL.shape, 3))
    labels = features @ np.array([0.5, -1.0, 2.0])
    lessons = honest().lessons()
    scores = linear_scores(features, labels, PANEL, lessons, alpha=0.0)
    tested = slice(PANEL.row(lessons[0].tested[0]), PANEL.row(lessons[-1].tested[1]) + 1)
    there = np.isfinite(scores)
    assert there[tested].any(1).all()
    assert not there[: tested.start].any()
    assert np.corrcoef(scores[there], labels[there])[0, 1] > 0.9


# --- Universe and fills


def universe_of(panel: Panel, scores: np.ndarray) -> str:
    result = honest().trade(panel, np.where(panel.member, scores, np.nan))
    found = audit_result(panel, scores, result, 5)
    return next(finding.detail for finding in found.findings if finding.test == "universe")


def test_a_shrunken_universe_and_strangers_are_named() -> None:
    scores = honest().scores(PANEL)
    rows = np.flatnonzero(np.isfinite(scores).any(1))
    shrunken = scores.copy()
    shrunken[rows[20], 5:] = np.nan
    assert universe_of(PANEL, shrunken).startswith(f"{PANEL.dates[rows[20]]}: ")
    row, name = rows[5], int(np.flatnonzero(np.isfinite(scores[rows[5]]))[3])
    member = PANEL.member.copy()
    member[row, name] = False
    assert f"{PANEL.dates[row]} {PANEL.symbols[name]} is scored" in universe_of(replace(PANEL, member=member), scores)
    survivors = replace(PANEL, origin=replace(PANEL.origin, universe="survivors"))
    assert universe_of(survivors, scores).startswith("survivors")


def _fill(row: int, shares: int, price: float, signal: int | None = None) -> Fill:
    return Fill(PANEL.symbols[0], shares, price, 0, 0, row - 1 if signal is None else signal, row)


def test_fills_that_could_not_be() -> None:
    """The first name is on the main board."""
    rows = [row for row in range(20, 60) if PANEL.traded[row - 1 : row + 2, 0].all()]
    row, close = rows[0], float(PANEL.close[rows[0], 0])
    top = round(float(PANEL.close[row - 1, 0]) * 1.1, 2)
    assert wrong_fill(PANEL, [_fill(row, 100, close)]) is None
    assert "very bar" in (wrong_fill(PANEL, [_fill(row, 100, close, signal=row)]) or "")
    assert "beyond the limits" in (wrong_fill(PANEL, [_fill(row, 100, top * 1.01)]) or "")
    assert "upper limit" in (wrong_fill(PANEL, [_fill(row, 100, top)]) or "")
    assert "bought today" in (wrong_fill(PANEL, [_fill(row, 100, close), _fill(row, -100, close)]) or "")
    later = float(PANEL.close[row + 1, 0])
    assert wrong_fill(PANEL, [_fill(row, 100, close), _fill(row + 1, -100, later)]) is None
    traded = PANEL.traded.copy()
    traded[row, 0] = False
    assert "suspended" in (wrong_fill(replace(PANEL, traded=traded), [_fill(row, 100, close)]) or "")
