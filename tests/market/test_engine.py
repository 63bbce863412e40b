"""The backtest: nothing is filled before it was decided, all of it adds up, futures by hand, and one hash anywhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.account import StockAccount
from fireflyer.market.engine import BacktestResult, BacktestSettings, backtest, why_nothing
from fireflyer.market.futures import FuturesAccount
from fireflyer.market.orders import FutureTrade
from fireflyer.market.panel import Floats, Panel
from fireflyer.market.portfolio import Decision, TopK
from fireflyer.market.rules import contract_on, last_trading_day, listed_months
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(4, days=160, names=40, signal=0.2)


def reversal(panel: Panel) -> Floats:
    """Scores out of the last five days: what fell is bought."""
    adjusted = panel.adjusted_close
    scores = np.full(panel.shape, np.nan)
    scores[5:] = 1 - adjusted[5:] / adjusted[:-5]
    return scores


@pytest.fixture(scope="module", params=["long-only", "market-neutral"])
def result(request: pytest.FixtureRequest) -> BacktestResult:
    return backtest(PANEL, reversal(PANEL), BacktestSettings(mode=request.param, portfolio=TopK(10, 3)))


def test_fills_come_a_session_after_their_signal(result: BacktestResult) -> None:
    assert len(result.fills) > 100
    for fill in result.fills:
        assert fill.forced or fill.fill_row == fill.signal_row + 1
    for fill in result.fills:
        if not fill.forced:
            assert fill.price == PANEL.close[fill.fill_row, PANEL.symbols.index(fill.symbol)]


def test_the_account_adds_up_over_all_days(result: BacktestResult) -> None:
    """From the fills alone: cash, shares and their value on every day, and what futures gained."""
    shares = dict.fromkeys(PANEL.symbols, 0)
    place = {symbol: column for column, symbol in enumerate(PANEL.symbols)}
    start = int(result.nav[0])
    cash = int(result.cash[0])
    by_row: dict[int, list] = {}
    for fill in result.fills:
        by_row.setdefault(fill.fill_row, []).append(fill)
    splits = 0
    for row in range(1, len(result.dates)):
        for symbol, held in shares.items():
            before = PANEL.previous_bar[row, place[symbol]]
            if held and PANEL.traded[row, place[symbol]]:
                ratio = PANEL.factor[row, place[symbol]] / PANEL.factor[before, place[symbol]]
                if ratio != 1:
                    splits += 1
                    shares[symbol] = int(held * ratio + 1e-6)
        moved = 0
        for fill in by_row.get(row, []):
            moved += (fill.money_fen if fill.shares < 0 else -fill.money_fen) - fill.fee_fen
            shares[fill.symbol] += fill.shares
        left_over = int(result.cash[row]) - cash - moved
        assert left_over == 0 or 0 <= left_over < 50_00 * 2 * max(splits, 1)  # parts of a share that a split left
        cash = int(result.cash[row])
        assert all(held >= 0 for held in shares.values())
        assert cash >= 0
    assert result.nav.tolist() == (result.cash + result.holdings + result.futures).tolist()
    assert start == 10_000_000_00


def test_turnover_and_fees_are_the_fills(result: BacktestResult) -> None:
    stocks_only = result.futures.max() == 0
    if stocks_only:
        assert result.fees.sum() == sum(fill.fee_fen for fill in result.fills)
        assert result.traded.sum() == sum(fill.money_fen for fill in result.fills if not fill.forced)
    assert (result.turnover() >= 0).all()
    assert np.prod(1 + result.returns()) == pytest.approx(result.nav[-1] / result.nav[0])


def test_the_planted_signal_earns_and_a_hedge_takes_the_market_out() -> None:
    long_only, neutral = (
        backtest(PANEL, reversal(PANEL), BacktestSettings(mode=mode, portfolio=TopK(10, 3)))
        for mode in ("long-only", "market-neutral")
    )
    market = PANEL.index_returns()[10:]

    def beta(result: BacktestResult) -> float:
        return float(np.polyfit(market, result.returns()[10:], 1)[0])

    assert long_only.nav[-1] > 1.1 * long_only.nav[0]
    assert beta(long_only) > 0.6
    assert abs(beta(neutral)) < 0.25
    worst = backtest(PANEL, -reversal(PANEL), BacktestSettings(portfolio=TopK(10, 3)))
    assert worst.nav[-1] < long_only.nav[-1]


def test_the_hedge_comes_on_the_day_of_the_stocks_it_is_for() -> None:
    settings = BacktestSettings(mode="market-neutral", future="IF", portfolio=TopK(10, 3))
    result = backtest(PANEL, reversal(PANEL), settings)
    first = result.orders[0].signal_row
    assert result.futures_trades[0].fill_row == result.fills[0].fill_row == first + 1
    place = {symbol: column for column, symbol in enumerate(PANEL.symbols)}
    asked = sum(o.shares * PANEL.close[first, place[o.symbol]] for o in result.orders if o.signal_row == first)
    assert result.futures_trades[0].count == -round(asked / (PANEL.index_close[first] * 300))


def test_same_bar_fills_are_marked_and_only_on_request() -> None:
    cheating = backtest(PANEL, reversal(PANEL), BacktestSettings(portfolio=TopK(10, 3), same_bar=True))
    assert cheating.same_bar
    assert all(fill.fill_row == fill.signal_row for fill in cheating.fills if not fill.forced)


def test_the_last_session_is_legal_and_decides_for_a_day_that_isnt_there() -> None:
    scores = np.full(PANEL.shape, np.nan)
    scores[-1] = 1.0
    result = backtest(PANEL, scores, BacktestSettings())
    assert result.orders
    assert result.fills == []
    assert (
        why_nothing(result) == "the only orders were made on the last session, after which there is none to fill them"
    )


def test_why_nothing_was_bought_is_said() -> None:
    poor = backtest(PANEL, reversal(PANEL), BacktestSettings(cash_fen=50_00))
    assert "no order was filled: less than one lot" in str(why_nothing(poor))
    assert "give more cash" in str(why_nothing(poor))
    silent = backtest(PANEL, np.full(PANEL.shape, np.nan), BacktestSettings())
    assert "there is no score on any day" in str(why_nothing(silent))
    assert silent.nav.tolist() == [10_000_000_00] * len(PANEL.dates)


def test_the_portfolio_by_hand() -> None:
    rule = TopK(names=3, drop=1, invested=1.0)
    scores = np.array([0.9, 0.8, 0.7, 0.1, np.nan, 0.95])
    member = np.array([True, True, True, True, True, False])
    held = np.array([0, 0, 500, 500, 500, 500])
    panel = replace(synthetic_panel(0, days=1, names=6), member=member[None])
    shares, _ = rule.orders(Decision(panel, 0, scores, held, np.full(6, 10.0), 30_000_00))
    # The one that left the universe goes; of those judged the worst goes for the best not held; unscored ones stay.
    assert shares.tolist() == [1000, 0, 0, -500, 0, -500]
    fresh, priority = rule.orders(Decision(panel, 0, scores, np.zeros(6, np.int64), np.full(6, 10.0), 30_000_00))
    assert fresh.tolist() == [1000, 1000, 1000, 0, 0, 0]
    assert priority[4] == -np.inf


SESSIONS = np.busday_offset(np.datetime64("2024-01-02"), np.arange(80)).astype("datetime64[D]")


def test_index_futures_by_hand() -> None:
    """Decided at 3,000.0: two contracts sold a day later at 2,990.2, closed at 3,010.0; IF, 300 yuan a point."""
    account = FuturesAccount("IF", 1_000_000_00)
    assert account.settle(SESSIONS[0], 0, 3000.0, hedged_fen=1_800_000_00) == []
    assert (account.count, account.target) == (0, -2)
    (sold,) = account.settle(SESSIONS[1], 1, 2990.2, hedged_fen=1_800_000_00)
    opening = round(2990.2 * 300 * 2 * 0.253e-4 * 100)
    assert sold == FutureTrade("IF2401", -2, 2990.2, opening, 1)
    assert account.value_fen == 1_000_000_00 - opening
    assert account.settle(SESSIONS[2], 2, 3000.0, hedged_fen=0) == []
    assert account.value_fen == 1_000_000_00 - opening - round(9.8 * 300 * 2 * 100)
    (bought,) = account.settle(SESSIONS[3], 3, 3010.0, hedged_fen=0)
    closing = round(3010.0 * 300 * 2 * 0.253e-4 * 100)
    assert (bought.count, bought.fee_fen, account.count) == (2, closing, 0)
    assert account.value_fen == 1_000_000_00 - opening - closing - round(19.8 * 300 * 2 * 100)
    assert account.fees_fen == opening + closing


def test_the_recorded_fee_of_january_2017() -> None:
    """IF1701 at 2445.6: 18.562 yuan; the margin was 40 %, and closing on the same day took 23 bp."""
    day = np.datetime64("2017-01-12")
    terms = contract_on("IF", day)
    assert terms.fee_fen(2445.6, 1) == pytest.approx(1856.2, abs=5e-2)
    assert terms.fee_fen(2445.6, 1, closing=True, today=True) == pytest.approx(2445.6 * 300 * 23e-4 * 100)
    assert terms.margin_fen(2445.6, -1) == round(2445.6 * 300 * 0.4 * 100)
    account = FuturesAccount("IF", 1_000_000_00, month="2017-01", settled=2445.6)
    trade = account.trade(day, 0, 2445.6, 2445.6, 1)
    assert (trade.contract, trade.fee_fen, account.value_fen) == ("IF1701", 18_56, 1_000_000_00 - 18_56)


def test_terms_have_their_dates() -> None:
    found = [contract_on("IF", np.datetime64(day)).margin for day in ("2015-09-06", "2015-09-07", "2024-01-02")]
    assert found == [0.12, 0.40, 0.12]
    assert [contract_on(code, SESSIONS[0]).multiplier for code in ("IF", "IH", "IC", "IM")] == [300, 300, 200, 200]
    with pytest.raises(UserError, match="IM futures are traded since 2022-07-22"):
        backtest(PANEL, reversal(PANEL), BacktestSettings(mode="market-neutral", future="IM"))


def test_margin_bounds_the_hedge_and_a_loss_cuts_it() -> None:
    account = FuturesAccount("IC", 300_000_00)
    account.settle(SESSIONS[0], 0, 5000.0, hedged_fen=100_000_000_00)
    account.settle(SESSIONS[1], 1, 5000.0, hedged_fen=100_000_000_00)
    assert account.count == -2  # 140,000 yuan each
    account.settle(SESSIONS[2], 2, 5100.0, hedged_fen=100_000_000_00)  # 40,000 yuan lost
    assert account.count == -1
    assert account.value_fen >= contract_on("IC", SESSIONS[2]).margin_fen(5100.0, 1)


def test_limits_are_the_contracts_and_prices_in_ticks() -> None:
    account = FuturesAccount("IF", 10_000_000_00)
    account.settle(SESSIONS[0], 0, 3000.07, hedged_fen=900_000_00)
    assert account.settled == 3000.0
    (refused,) = account.settle(SESSIONS[1], 1, 2700.0, hedged_fen=900_000_00)
    assert (refused.refused, refused.count, account.count) == ("at the lower limit", 0, 0)
    (sold,) = account.settle(SESSIONS[2], 2, 2700.2, hedged_fen=0)
    assert (sold.refused, sold.count) == (None, -1)
    (refused,) = account.settle(SESSIONS[3], 3, 2970.2, hedged_fen=0)
    assert (refused.refused, account.count) == ("at the upper limit", -1)
    assert account.value_fen == 10_000_000_00 - sold.fee_fen - round(270.0 * 300 * 100)


def test_a_thousand_random_streams_of_futures_balance() -> None:
    """What every trade gained, from its own points to the last, less fees: nothing else moves the account's cash."""
    traded = 0
    for stream in range(1000):
        rng = np.random.default_rng(stream)
        code = ("IF", "IH", "IC", "IM")[stream % 4]
        multiplier = (300, 300, 200, 200)[stream % 4]
        start = int(rng.integers(500_000_00, 50_000_000_00))
        account = FuturesAccount(code, start)
        points = np.round(np.cumsum(rng.normal(0, 60, 20)) / 0.2) * 0.2 + 4000
        trades = []
        for row in range(20):
            done = account.settle(
                SESSIONS[row], row, float(points[row]), hedged_fen=int(rng.integers(0, 40_000_000_00))
            )
            trades += done
            held = sum(trade.count for trade in trades)
            gains = sum(round((account.settled - trade.points) * 5) * multiplier * 20 * trade.count for trade in trades)
            assert account.count == held <= 0
            assert account.value_fen == start + gains - account.fees_fen
            assert account.fees_fen == sum(trade.fee_fen for trade in trades)
            exact = [Fraction(round(t.points * 5), 5) * multiplier * abs(t.count) * Fraction(253, 10**7) for t in done]
            assert [t.fee_fen for t in done] == [floor(fee * 100 + Fraction(1, 2)) for fee in exact]
        traded += len(trades)
    assert traded > 10_000


def test_expiry_is_the_third_friday_and_positions_roll_before_it() -> None:
    sessions = np.busday_offset(np.datetime64("2024-01-02"), np.arange(60)).astype("datetime64[D]")
    assert str(last_trading_day("2024-02", sessions)) == "2024-02-16"
    without = sessions[sessions != np.datetime64("2024-02-16")]
    assert str(last_trading_day("2024-02", without)) == "2024-02-19"
    with pytest.raises(UserError, match="the sessions end on"):
        last_trading_day("2025-02", sessions)
    assert listed_months(np.datetime64("2024-01-10")) == ["2024-01", "2024-02", "2024-03", "2024-06"]
    account = FuturesAccount("IF", 10_000_000_00)
    months = []
    for row in range(50):
        account.settle(sessions[row], row, 3500.0, hedged_fen=5_000_000_00)
        months.append(account.month)
    assert months[0] == "2024-01"
    assert [month for row, month in enumerate(months) if row == 0 or month != months[row - 1]] == [
        "2024-01", "2024-02", "2024-03",
    ]  # fmt: skip
    rolled = next(row for row, month in enumerate(months) if month == "2024-02")
    assert sessions[rolled] < np.datetime64("2024-01-19")


def test_two_processes_one_hash() -> None:
    code = (
        "from tests.market.test_engine import PANEL, reversal;"
        "from fireflyer.market.engine import *; from fireflyer.market.portfolio import TopK;"
        "print(backtest(PANEL, reversal(PANEL), BacktestSettings(portfolio=TopK(10, 3))).order_hash)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    mine = backtest(PANEL, reversal(PANEL), BacktestSettings(portfolio=TopK(10, 3))).order_hash
    assert seen == mine
    other = backtest(PANEL, -reversal(PANEL), BacktestSettings(portfolio=TopK(10, 3))).order_hash
    assert other != mine


def test_a_changed_future_leaves_every_order_before_it() -> None:
    settings = BacktestSettings(portfolio=TopK(10, 3))
    orders = backtest(PANEL, reversal(PANEL), settings).orders
    for seed in range(3):
        row = int(np.random.default_rng(seed).integers(20, 140))
        other = PANEL.replace_future(row, "noise", np.random.default_rng(seed))
        changed = backtest(other, reversal(other), settings).orders
        assert [o for o in changed if o.signal_row <= row] == [o for o in orders if o.signal_row <= row]


def test_what_settings_refuse() -> None:
    for settings, words in (
        ({"mode": "short"}, "mode = 'short'; it can be long-only"),
        ({"fill": "low"}, "fill = 'low'"),
        ({"future": "CU"}, "future = 'CU'; there are IF"),
        ({"cash_fen": 0}, "buys nothing"),
    ):
        with pytest.raises(UserError, match=words):
            replace(BacktestSettings(), **settings)
    with pytest.raises(UserError, match="scores are"):
        backtest(PANEL, np.zeros((3, 3)), BacktestSettings())
    with pytest.raises(UserError, match=r"portfolio\.names = 0"):
        TopK(names=0)
    assert StockAccount.of(2, 5).value_fen() == 0
