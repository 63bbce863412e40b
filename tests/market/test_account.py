"""The stock account: a thousand random order streams against a ledger kept with fractions, and days worked by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.account import Exchange, StockAccount
from fireflyer.market.orders import Fill
from fireflyer.market.panel import Origin, Panel
from fireflyer.market.rules import Fees, stamp_duty_bp
from fireflyer.market.synthetic import synthetic_panel

STREAMS, DAYS, NAMES = 1000, 10, 6
PANELS = [synthetic_panel(seed, days=DAYS, names=NAMES, first="2023-08-22") for seed in range(20)]


def half_up(amount: Fraction) -> int:
    return floor(amount + Fraction(1, 2))


def fen_of(price: float, shares: int) -> int:
    return half_up(Fraction(round(price * 100)) * shares)


def fee_of(money: int, selling: bool, date: np.datetime64) -> int:
    commission = max(half_up(Fraction(money) * Fraction(25, 100_000)), 500)
    duty = Fraction(10 if date < np.datetime64("2023-08-28") else 5, 10_000)
    return commission + (half_up(money * duty) if selling else 0)


def test_a_thousand_random_streams_balance_to_the_fen() -> None:
    filled = 0
    for stream in range(STREAMS):
        rng = np.random.default_rng(stream)
        panel = PANELS[stream % len(PANELS)]
        exchange = Exchange(panel, Fees(), fill=("close", "open")[stream % 2])
        start = int(rng.integers(10_000_00, 300_000_00))
        account = StockAccount.of(NAMES, start)
        cash, shares, split_fen = start, dict.fromkeys(range(NAMES), 0), 0
        last: dict[int, tuple[float, float]] = {}  # price and factor of the last bar
        for row in range(DAYS):
            before = account.cash_fen
            exchange.open_day(account, row)
            split_fen += account.cash_fen - before
            for name in range(NAMES):
                if panel.traded[row, name] and name in last and panel.factor[row, name] != last[name][1]:
                    exact = Fraction(shares[name]) * Fraction(3, 2)
                    cash += half_up(Fraction(round(last[name][0] * 100)) * Fraction(2, 3) * (exact - floor(exact)))
                    shares[name] = floor(exact)
            wanted = rng.integers(-40, 60, NAMES) * rng.choice([1, 50, 100], NAMES) * (rng.random(NAMES) < 0.7)
            morning = dict(shares)
            fills, rejections = exchange.trade(account, row, wanted, rng.random(NAMES), row)
            for fill in fills:
                name = panel.symbols.index(fill.symbol)
                price = panel.close if exchange.fill == "close" else panel.open
                assert price is not None
                assert fill.price == price[row, name]
                money = fen_of(fill.price, abs(fill.shares))
                fee = fee_of(money, fill.shares < 0, panel.dates[row])
                assert (fill.money_fen, fill.fee_fen) == (money, fee)
                cash += (money if fill.shares < 0 else -money) - fee
                shares[name] += fill.shares
                assert fill.shares * wanted[name] > 0
                assert abs(fill.shares) <= max(abs(int(wanted[name])), morning[name])
                if fill.shares < 0:
                    assert -fill.shares <= morning[name]  # T+1
            assert {r.symbol for r in rejections} >= {
                panel.symbols[name] for name in np.nonzero(wanted)[0] if not panel.traded[row, name]
            }
            exchange.close_day(account, row)
            for name in np.nonzero(panel.traded[row])[0].tolist():
                last[name] = (float(panel.close[row, name]), float(panel.factor[row, name]))
            assert account.cash_fen == cash >= 0
            assert account.held.tolist() == list(shares.values())
            assert account.value_fen() == sum(fen_of(last[n][0], held) for n, held in shares.items() if held)
            filled += len(fills)
        assert account.fees_fen >= 0
    assert filled > 5 * STREAMS


def day(symbol: str, closes: list[float], first: str = "2023-08-24", **changes) -> Panel:
    """One name; sessions on weekdays."""
    close = np.array(closes)[:, None]
    dates = np.busday_offset(np.datetime64(first), np.arange(len(closes))).astype("datetime64[D]")
    panel = Panel(
        dates=dates, symbols=(symbol,), close=close, factor=np.ones(close.shape), traded=np.isfinite(close),
        member=np.ones(close.shape, bool), index_close=np.ones(len(closes)),
        origin=Origin("by hand", "synthetic", True),
    )  # fmt: skip
    return replace(panel, **changes)


def traded(panel: Panel, rows: list[tuple[int, int]], cash_fen: int = 100_000_00, fees: Fees | None = None):
    """Orders (row, shares) one after the other; fills, reasons, account."""
    exchange = Exchange(panel, fees or Fees(commission_bp=3.0))
    account = StockAccount.of(1, cash_fen)
    fills: list[Fill] = []
    reasons: list[str] = []
    for row in range(len(panel.dates)):
        exchange.open_day(account, row)
        for at, shares in rows:
            if at == row:
                done, refused = exchange.trade(account, row, np.array([shares]), np.zeros(1), row)
                fills += done
                reasons += [rejection.reason for rejection in refused]
        exchange.close_day(account, row)
        fills += exchange.give_up(account, row, 3)
    return fills, reasons, account


def test_a_share_days_by_hand() -> None:
    """Bought on a Thursday at 10.00, sold on Friday at 10.50 under the old stamp duty and on Monday under the new."""
    panel = day("600000.XSHG", [10.0, 10.5, 10.2])
    fills, reasons, account = traded(panel, [(0, 2050), (1, -1000), (2, -1000)])
    assert reasons == []
    # Bought for 20,000.00: commission 6.00; sold for 10,500.00: 5.00 at least, duty 10.50; for 10,200.00: duty 5.10.
    assert [(f.shares, f.money_fen, f.fee_fen) for f in fills] == [
        (2000, 20_000_00, 6_00), (-1000, 10_500_00, 5_00 + 10_50), (-1000, 10_200_00, 5_00 + 5_10),
    ]  # fmt: skip
    assert account.cash_fen == 100_000_00 - 20_006_00 + 10_484_50 + 10_189_90
    assert stamp_duty_bp(np.datetime64("2023-08-27")) == 10
    assert stamp_duty_bp(np.datetime64("2023-08-28")) == 5


def test_what_is_bought_today_isnt_sold_today() -> None:
    fills, reasons, _ = traded(day("000001.XSHE", [10.0, 10.0]), [(0, 500), (0, -500), (1, -500)])
    assert [fill.shares for fill in fills] == [500, -500]
    assert reasons == ["bought today"]


@pytest.mark.parametrize(
    ("symbol", "closes", "order", "reason"),
    [
        ("600000.XSHG", [10.0, 11.0], 100, "at the upper limit"),
        ("300001.XSHE", [10.0, 12.0], 100, "at the upper limit"),
        ("688001.XSHG", [10.0, 12.0], 200, "at the upper limit"),
        ("600000.XSHG", [10.03, 11.03], 100, "at the upper limit"),  # 11.033 is rounded
        ("600000.XSHG", [10.0, np.nan], 100, "suspended"),
        ("600000.XSHG", [10.0, 10.0], 99, "less than one lot"),
        ("688001.XSHG", [10.0, 10.0], 199, "less than one lot"),
        ("600000.XSHG", [1200.0, 1200.0], 100, "not enough cash"),
    ],
)
def test_buys_that_cant_be(symbol: str, closes: list[float], order: int, reason: str) -> None:
    fills, reasons, account = traded(day(symbol, closes), [(1, order)])
    assert fills == []
    assert reasons == [reason]
    assert account.cash_fen == 100_000_00


def test_moves_just_within_the_limits_trade() -> None:
    for symbol, close in (("600000.XSHG", 10.99), ("300001.XSHE", 11.5), ("688001.XSHG", 11.99)):
        fills, reasons, _ = traded(day(symbol, [10.0, close]), [(1, 200)])
        assert [fill.shares for fill in fills] == [200]
        assert reasons == []


def test_nothing_is_sold_at_the_lower_limit_and_the_order_is_not_carried_over() -> None:
    fills, reasons, account = traded(day("600000.XSHG", [10.0, 9.0, 8.9]), [(0, 100), (1, -100)])
    assert reasons == ["at the lower limit"]
    assert [fill.shares for fill in fills] == [100]
    assert account.held.tolist() == [100]


def test_an_odd_lot_goes_whole_and_star_goes_share_by_share() -> None:
    split = np.array([[1.0], [1.5], [1.5], [1.5]])
    fills, _, account = traded(
        day("600000.XSHG", [15.0, 10.0, 10.0, 10.0], factor=split), [(0, 100), (2, -120), (3, -150)]
    )
    assert [fill.shares for fill in fills] == [100, -100, -50]
    assert account.held.tolist() == [0]
    fills, _, _ = traded(day("688001.XSHG", [10.0, 10.0, 10.0]), [(0, 403), (1, -201), (2, -202)])
    assert [fill.shares for fill in fills] == [403, -201, -202]


def test_cash_buys_what_it_can_and_serves_the_first_name_first() -> None:
    panel = day("600000.XSHG", [10.0, 10.0])
    two = Panel(
        dates=panel.dates, symbols=("600000.XSHG", "600001.XSHG"), close=np.tile(panel.close, 2),
        factor=np.ones((2, 2)), traded=np.ones((2, 2), bool), member=np.ones((2, 2), bool), index_close=np.ones(2),
        origin=panel.origin,
    )  # fmt: skip
    account = StockAccount.of(2, 10_000_00)
    fills, refused = Exchange(two, Fees()).trade(account, 0, np.array([700, 700]), np.array([0.1, 0.9]), 0)
    assert [(fill.symbol, fill.shares) for fill in fills] == [("600001.XSHG", 700), ("600000.XSHG", 200)]
    assert [(r.symbol, r.shares, r.reason) for r in refused] == [("600000.XSHG", 500, "not enough cash")]


def test_a_name_that_never_trades_again_is_given_up_at_its_last_price() -> None:
    fills, _, account = traded(day("600000.XSHG", [10.0, 9.5] + [np.nan] * 5), [(0, 100)])
    assert [(fill.shares, fill.price, fill.fill_row, fill.forced) for fill in fills] == [
        (100, 10.0, 0, False), (-100, 9.5, 5, True),
    ]  # fmt: skip
    assert account.held.tolist() == [0]


def test_orders_fill_at_the_price_that_was_asked_for_or_not_at_all() -> None:
    panel = synthetic_panel(1, days=12, names=6)
    assert panel.open is not None
    assert panel.amount is not None
    assert panel.volume is not None
    row, name = (int(place[-1]) for place in np.nonzero(panel.traded))
    for fill, price in (
        ("open", panel.open[row, name]),
        ("vwap", round(panel.amount[row, name] / panel.volume[row, name], 2)),
        ("close", panel.close[row, name]),
    ):
        account = StockAccount.of(6, 10_000_000_00)
        fills, _ = Exchange(panel, Fees(), fill).trade(account, row, np.eye(6, dtype=int)[name] * 200, np.zeros(6), row)
        assert [fill.price for fill in fills] == [price]
    closes = synthetic_panel(1, days=12, names=6, bars=False)
    for fill, words in (("open", "has no opens"), ("vwap", "has no volumes and amounts")):
        with pytest.raises(UserError, match=words):
            Exchange(closes, Fees(), fill)
    amount = panel.amount.copy()
    amount[row, name] = np.nan
    with pytest.raises(UserError, match=rf"{panel.dates[row]} {panel.symbols[name]}: traded, but no vwap"):
        Exchange(replace(panel, amount=amount), Fees(), "vwap")
