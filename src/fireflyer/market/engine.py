"""The daily backtest: decided at the close of t with what was known then, filled on the next session.

In: a panel, scores (D, N) and settings. Out: the account day by day, and every order, fill and rejection. Names are
vectorised over, days are looped over; money is integer fen. Market-neutral sells index futures against the stocks,
index enhancement holds stocks alone and is measured against the index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fireflyer.errors import UserError
from fireflyer.market.account import FILL_PRICES, Exchange, StockAccount
from fireflyer.market.futures import FuturesAccount
from fireflyer.market.orders import Fill, Order, Rejection, order_hash
from fireflyer.market.panel import Dates, Floats, Panel
from fireflyer.market.portfolio import TopK
from fireflyer.market.rules import CONTRACTS, Fees

Mode = Literal["long-only", "index enhancement", "market-neutral"]
MODES: tuple[Mode, ...] = ("long-only", "index enhancement", "market-neutral")
Money = NDArray[np.int64]


@dataclass(frozen=True)
class BacktestSettings:
    """cash_fen at the start. same_bar: fill at the very close that the signal was made of, which no one can; it is
    there for the audit to catch. delisted_after: sessions without a bar after which a holding is given up at its last
    price. future, futures_share: what market-neutral sells, and the share of the cash that its margin account has."""

    cash_fen: int = 10_000_000_00
    mode: Mode = "long-only"
    portfolio: TopK = field(default_factory=TopK)
    fees: Fees = field(default_factory=Fees)
    fill: str = "close"
    same_bar: bool = False
    delisted_after: int = 60
    future: str = "IC"
    futures_share: float = 0.3

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode = {self.mode!r}; it can be {', '.join(MODES)}")
        if self.fill not in FILL_PRICES:
            raise UserError(f"fill = {self.fill!r}; it can be {', '.join(FILL_PRICES)}")
        if self.future not in CONTRACTS:
            raise UserError(f"future = {self.future!r}; there are {', '.join(CONTRACTS)}")
        if self.cash_fen <= 0:
            raise UserError(f"cash = {self.cash_fen / 100:.2f} yuan buys nothing; give more than 0")


@dataclass(frozen=True)
class BacktestResult:
    """By session (D,): nav, cash, holdings and the futures account in fen, fees and money traded that day in fen, and
    how many holdings stand at a price of another day. orders, fills, rejections: all of them, in order."""

    dates: Dates
    nav: Money
    cash: Money
    holdings: Money
    futures: Money
    fees: Money
    traded: Money
    stale: Money
    orders: list[Order]
    fills: list[Fill]
    rejections: list[Rejection]
    same_bar: bool
    index_close: Floats

    @property
    def order_hash(self) -> str:
        return order_hash(self.orders)

    def returns(self) -> Floats:
        """(D,) simple, net of everything; the first is 0."""
        nav = self.nav.astype(np.float64)
        return np.concatenate([[0.0], nav[1:] / nav[:-1] - 1])

    def turnover(self) -> Floats:
        """(D,) money traded, buying and selling, over twice the account's value."""
        return self.traded / (2.0 * self.nav)


def backtest(panel: Panel, scores: Floats, settings: BacktestSettings) -> BacktestResult:
    """Trade the scores through the panel. Raises UserError for scores of another shape."""
    if scores.shape != panel.shape:
        raise UserError(f"scores are {scores.shape}, the panel {panel.shape}; they must be of the same dates and names")
    days, names = panel.shape
    exchange = Exchange(panel, settings.fees, settings.fill)
    neutral = settings.mode == "market-neutral"
    margin_fen = int(settings.cash_fen * settings.futures_share) if neutral else 0
    account = StockAccount.of(names, settings.cash_fen - margin_fen)
    futures = FuturesAccount(CONTRACTS[settings.future], margin_fen, panel.dates)
    kept: dict[str, list[int]] = {key: [] for key in ("cash", "holdings", "futures", "fees", "traded", "stale")}
    orders: list[Order] = []
    fills: list[Fill] = []
    rejections: list[Rejection] = []
    pending: tuple[np.ndarray, Floats, int] | None = None
    for row in range(days):
        before = (account.fees_fen + futures.fees_fen, account.traded_fen + futures.traded_fen)
        exchange.open_day(account, row)
        if pending is not None and not settings.same_bar:
            done, refused = exchange.trade(account, row, *pending)
            fills += done
            rejections += refused
        exchange.close_day(account, row)
        fills += exchange.give_up(account, row, settings.delisted_after)
        value = account.cash_fen + account.value_fen()
        pending = None
        if row % settings.portfolio.every == 0 and np.isfinite(scores[row]).any():
            shares, priority = settings.portfolio.orders(
                scores[row], panel.member[row], account.held, account.last_price, value
            )
            asked = np.nonzero(shares)[0].tolist()
            orders += [Order(panel.symbols[name], int(shares[name]), row) for name in asked]
            pending = (shares, priority, row)
            if settings.same_bar:
                done, refused = exchange.trade(account, row, *pending)
                fills += done
                rejections += refused
        if neutral:
            futures.settle(row, float(panel.index_close[row]), hedged_fen=account.value_fen())
        kept["cash"].append(account.cash_fen)
        kept["holdings"].append(account.value_fen())
        kept["futures"].append(futures.value_fen)
        kept["fees"].append(account.fees_fen + futures.fees_fen - before[0])
        kept["traded"].append(account.traded_fen + futures.traded_fen - before[1])
        kept["stale"].append(int(((account.held > 0) & (account.last_row < row)).sum()))
    money = {key: np.array(values, np.int64) for key, values in kept.items()}
    return BacktestResult(
        dates=panel.dates,
        nav=money["cash"] + money["holdings"] + money["futures"],
        orders=orders,
        fills=fills,
        rejections=rejections,
        same_bar=settings.same_bar,
        index_close=panel.index_close,
        **money,
    )


def why_nothing(result: BacktestResult) -> str | None:
    """In words, where nothing was ever bought; None where something was."""
    if result.fills:
        return None
    if not result.orders:
        return "no order was made: there is no score on any day; look at the scores' dates and names"
    counts: dict[str, int] = {}
    for rejection in result.rejections:
        counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
    if not counts:
        return "the only orders were made on the last session, after which there is none to fill them"
    reason, count = max(counts.items(), key=lambda item: item[1])
    hint = "; give more cash, or hold fewer names" if reason in ("less than one lot", "not enough cash") else ""
    return f"no order was filled: {reason} ({count} of {len(result.rejections)} rejections){hint}"
