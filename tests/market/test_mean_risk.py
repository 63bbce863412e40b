"""The mean-risk portfolio: its weights against a general solver's, its bounds in a backtest, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("skfolio")

from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf

from fireflyer.errors import UserError
from fireflyer.market.engine import BacktestResult, BacktestSettings, backtest
from fireflyer.market.mean_risk import Bounds, MeanRisk, best_weights
from fireflyer.market.panel import Floats, How, Panel
from fireflyer.market.portfolio import Decision
from fireflyer.market.synthetic import synthetic_panel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
PANEL = synthetic_panel(4, days=110, names=40, signal=0.2)


def reversal(panel: Panel) -> Floats:
    adjusted = panel.adjusted_close
    scores = np.full(panel.shape, np.nan)
    scores[5:] = 1 - adjusted[5:] / adjusted[:-5]
    return scores


@pytest.mark.parametrize("between", [None, (0.7, 0.9)])
def test_weights_are_a_general_solvers(between: tuple[float, float] | None) -> None:
    rng = np.random.default_rng(0)
    market = rng.normal(0, 0.01, 90)
    beta = rng.uniform(0.5, 1.5, 8)
    returns = market[:, None] * beta + rng.normal(0, 0.015, (90, 8))
    scores, before = rng.normal(size=8), rng.dirichlet(np.ones(8)) * 0.9
    bounds = Bounds(np.zeros(8), np.full(8, 0.3), 0.9, before, 0.6, beta, between)
    found = best_weights(returns, scores, bounds, 0.05, 5.0, where="here")
    expected = 0.05 * returns.std(0) * (scores - scores.mean()) / scores.std()
    covariance = ledoit_wolf(returns)[0]

    def loss(parts: np.ndarray) -> float:  # bought and sold apart: the turnover is linear in them
        weights = before + parts[:8] - parts[8:]
        return (5.0 * weights @ covariance @ weights - weights @ expected) * 1e4

    def weights_of(parts: np.ndarray) -> np.ndarray:
        return before + parts[:8] - parts[8:]

    constraints = [
        {"type": "eq", "fun": lambda parts: weights_of(parts).sum() - 0.9},
        {"type": "ineq", "fun": lambda parts: 0.6 - parts.sum()},
        {"type": "ineq", "fun": weights_of},
        {"type": "ineq", "fun": lambda parts: 0.3 - weights_of(parts)},
    ]
    if between:
        constraints += [
            {"type": "ineq", "fun": lambda parts: weights_of(parts) @ beta - 0.9 * between[0]},
            {"type": "ineq", "fun": lambda parts: 0.9 * between[1] - weights_of(parts) @ beta},
        ]
    solved = minimize(loss, np.zeros(16), bounds=[(0, 1)] * 16, constraints=constraints, options={"maxiter": 500})
    np.testing.assert_allclose(found, weights_of(solved.x), atol=2e-3)
    assert np.abs(found - before).sum() <= 0.6 + 1e-4
    if between:
        assert 0.9 * between[0] - 1e-4 <= found @ beta <= 0.9 * between[1] + 1e-4


@pytest.fixture(scope="module")
def result() -> BacktestResult:
    return backtest(PANEL, reversal(PANEL), BacktestSettings(portfolio=MeanRisk(candidates=30, most=0.08)))


def test_a_backtest_keeps_to_the_bounds(result: BacktestResult) -> None:
    rows = sorted({order.signal_row for order in result.orders})
    assert rows[0] == 20  # no covariance before
    assert all(row % 5 == 0 for row in rows)
    turnover = 2 * result.turnover()
    assert turnover[rows[0] + 1] > 0.8  # from nothing to the whole
    assert turnover[rows[1] + 1 :].max() < 0.3 + 0.1  # prices move between the decision and its fill
    price = dict(zip(PANEL.symbols, range(PANEL.shape[1]), strict=True))
    first = [fill for fill in result.fills if fill.signal_row == rows[0]]
    for fill in first:
        assert fill.shares * PANEL.close[rows[0], price[fill.symbol]] <= 0.08 * 0.95 * 10_000_000 * 1.001
    index = PANEL.index_returns()[rows[0] + 2 :]
    assert 0.6 < np.polyfit(index, result.returns()[rows[0] + 2 :], 1)[0] < 1.2
    assert result.nav[-1] / result.nav[0] > PANEL.index_close[-1] / PANEL.index_close[rows[0]]


@pytest.mark.parametrize("how", ["noise", "nan", "truncate"])
def test_a_changed_future_leaves_every_order_before_it(how: How) -> None:
    settings = BacktestSettings(portfolio=MeanRisk(candidates=30, most=0.08, beta=None))
    panel = PANEL.slice(0, 70)
    orders = backtest(panel, reversal(panel), settings).orders
    other = panel.replace_future(55, how, np.random.default_rng(0))
    changed = backtest(other, reversal(other), settings).orders
    assert [o for o in changed if o.signal_row <= 55] == [o for o in orders if o.signal_row <= 55]


def test_what_closed_at_its_limit_isnt_asked_for() -> None:
    """The best of all, but at its upper limit: nobody will sell it tomorrow."""
    panel = synthetic_panel(1, days=40, names=12)
    on = panel.traded.all(axis=0)
    names = np.flatnonzero(on)
    panel = panel.select([panel.symbols[name] for name in names.tolist()])
    close = np.array(panel.close)
    scores = np.linspace(-1, 1, panel.shape[1])
    rule = MeanRisk(candidates=12, most=0.2, beta=None)
    held = np.zeros(panel.shape[1], np.int64)

    def asked() -> int:
        made = replace(panel, close=close, open=None, high=None, low=None, factor=np.ones(panel.shape))
        return int(rule.orders(Decision(made, 39, scores, held, close[39], 10_000_000_00))[0][-1])

    close[39, -1] = close[38, -1] * 1.02
    assert asked() > 0
    close[39, -1] = round(close[38, -1] * (1.2 if panel.symbols[-1].startswith(("30", "688")) else 1.1), 2)
    assert asked() == 0


def test_what_it_refuses() -> None:
    for changes, words in (
        ({"candidates": 1}, r"portfolio\.candidates = 1"),
        ({"most": 0.01}, r"can't fill the portfolio"),
        ({"turnover": 0.0}, r"portfolio\.turnover = 0"),
        ({"beta": (1.2, 0.8)}, "the lower bound first"),
    ):
        with pytest.raises(UserError, match=words):
            replace(MeanRisk(), **changes)
    with pytest.raises(UserError, match="no weights meet all bounds"):
        backtest(PANEL, reversal(PANEL), BacktestSettings(portfolio=MeanRisk(beta=(3.0, 4.0))))
