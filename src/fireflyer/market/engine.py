"""The daily backtest: decided at the close of t with what was known then, filled on the next session.

In: a panel, scores (D, N) and settings. Out: the account day by day, and every order, fill and rejection. Names are
vectorised over, days are looped over; money is integer fen. Market-neutral sells index futures against the stocks,
index enhancement holds stocks alone and is measured against the index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fireflyer.errors import UserError
from fireflyer.market.account import FILL_PRICES, Counts, Exchange, StockAccount
from fireflyer.market.futures import FuturesAccount
from fireflyer.market.mean_risk import MeanRisk
from fireflyer.market.orders import Fill, FutureTrade, Order, Rejection, order_hash
from fireflyer.market.panel import Dates, Floats, Panel
from fireflyer.market.portfolio import Decision, TopK
from fireflyer.market.rules import CODES, Fees, contract_on, round_fen

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
    portfolio: TopK | MeanRisk = field(default_factory=TopK)
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
        if self.future not in CODES:
            raise UserError(f"future = {self.future!r}; there are {', '.join(CODES)}")
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
    futures_trades: list[FutureTrade]
    same_bar: bool
    index_close: Floats

    @property
    def order_hash(self) -> str:
        return order_hash(self.orders, self.futures_trades)

    def returns(self) -> Floats:
        """(D,) simple, net of everything; the first is 0."""
        nav = self.nav.astype(np.float64)
        return np.concatenate([[0.0], nav[1:] / nav[:-1] - 1])

    def turnover(self) -> Floats:
        """(D,) money traded, buying and selling, over twice the account's value."""
        return self.traded / (2.0 * self.nav)


@dataclass(frozen=True)
class Day:
    """What one session came to; money in fen."""

    orders: list[Order]
    fills: list[Fill]
    rejections: list[Rejection]
    futures_trades: list[FutureTrade]
    cash: int
    holdings: int
    futures: int
    fees: int
    traded: int
    stale: int


class Desk:
    """An account and what it will do tomorrow, session by session: the backtest's, and that of trading on paper.

    It reads nothing of a panel beyond the session it is told of. Raises UserError for a future that wasn't traded yet.
    """

    def __init__(self, panel: Panel, settings: BacktestSettings) -> None:
        if settings.mode == "market-neutral":
            contract_on(settings.future, panel.dates[0])
        self._panel, self._settings = panel, settings
        self._exchange = Exchange(panel, settings.fees, settings.fill)
        margin = settings.cash_fen * settings.futures_share if settings.mode == "market-neutral" else 0
        self.account = StockAccount.of(len(panel.symbols), settings.cash_fen - int(margin))
        self.futures = FuturesAccount(settings.future, int(margin))
        self._pending: tuple[Counts, Floats, int] | None = None

    def day(self, row: int, scores_N: Floats) -> Day:
        """Fill what was decided at the close before, value everything, and decide anew with the day's scores."""
        account, futures, settings = self.account, self.futures, self._settings
        fees, traded = account.fees_fen + futures.fees_fen, account.traded_fen + futures.traded_fen
        fills: list[Fill] = []
        rejections: list[Rejection] = []
        self._exchange.open_day(account, row)
        if self._pending is not None and not settings.same_bar:
            fills, rejections = self._exchange.trade(account, row, *self._pending)
        self._exchange.close_day(account, row)
        fills += self._exchange.give_up(account, row, settings.delisted_after)
        orders = self._decide(row, scores_N)
        if self._pending is not None and settings.same_bar:
            done, refused = self._exchange.trade(account, row, *self._pending)
            fills, rejections = fills + done, rejections + refused
        trades: list[FutureTrade] = []
        if settings.mode == "market-neutral":
            date, points = self._panel.dates[row], float(self._panel.index_close[row])
            trades = futures.settle(date, row, points, hedged_fen=account.value_fen() + self._asked_fen())
        return Day(
            orders=orders,
            fills=fills,
            rejections=rejections,
            futures_trades=trades,
            cash=account.cash_fen,
            holdings=account.value_fen(),
            futures=futures.value_fen,
            fees=account.fees_fen + futures.fees_fen - fees,
            traded=account.traded_fen + futures.traded_fen - traded,
            stale=int(((account.held > 0) & (account.last_row < row)).sum()),
        )

    def state(self) -> dict[str, Any]:
        """JSON-able, by symbol and date: a panel with more names and sessions takes it up again."""
        account, symbols, dates = self.account, self._panel.symbols, self._panel.dates
        known = np.flatnonzero((account.last_row >= 0) | (account.held > 0)).tolist()
        pending = None
        if self._pending is not None:
            shares, priority, row = self._pending
            asked = [(symbols[n], int(shares[n]), float(priority[n])) for n in np.flatnonzero(shares).tolist()]
            pending = {"row": str(dates[row]), "orders": asked}
        return {
            "cash_fen": account.cash_fen,
            "fees_fen": account.fees_fen,
            "traded_fen": account.traded_fen,
            "names": [
                (symbols[n], int(account.held[n]), float(account.last_price[n]), str(dates[account.last_row[n]]))
                for n in known
            ],
            "futures": self.futures.state(),
            "pending": pending,
        }

    def take_up(self, state: dict[str, Any]) -> None:
        """Put `state` back. Raises UserError where a name that is held is no longer in the panel."""
        account, place = self.account, {symbol: column for column, symbol in enumerate(self._panel.symbols)}

        def column(symbol: str) -> int:
            if symbol not in place:
                raise UserError(
                    f"{self._panel.origin.source}: {symbol}, which is held or ordered, has vanished from it"
                )
            return place[symbol]

        account.cash_fen, account.fees_fen, account.traded_fen = (
            state[key] for key in ("cash_fen", "fees_fen", "traded_fen")
        )
        for symbol, held, price, date in state["names"]:
            if held or symbol in place:
                name = column(symbol)
                account.held[name], account.last_price[name] = held, price
                account.last_row[name] = self._panel.row(date)
        self.futures = FuturesAccount(**state["futures"])
        self._pending = None
        if state["pending"] is not None:
            shares = np.zeros(len(place), np.int64)
            priority = np.full(len(place), -np.inf)
            for symbol, count, first in state["pending"]["orders"]:
                shares[column(symbol)], priority[column(symbol)] = count, first
            self._pending = (shares, priority, self._panel.row(state["pending"]["row"]))

    def _asked_fen(self) -> int:
        """What the orders for the next session would add to the holdings, at today's prices."""
        if self._pending is None or self._settings.same_bar:
            return 0
        shares = self._pending[0]
        asked = np.flatnonzero(shares)
        return round_fen(float(shares[asked] @ self.account.last_price[asked]) * 100)

    def _decide(self, row: int, scores_N: Floats) -> list[Order]:
        self._pending = None
        rule, account, panel = self._settings.portfolio, self.account, self._panel
        if row % rule.every or not np.isfinite(scores_N).any():
            return []
        value = account.cash_fen + account.value_fen()
        decision = Decision(panel, row, scores_N, account.held, account.last_price, value)
        shares, priority = rule.orders(decision)
        self._pending = (shares, priority, row)
        return [Order(panel.symbols[name], int(shares[name]), row) for name in np.flatnonzero(shares).tolist()]


def backtest(panel: Panel, scores: Floats, settings: BacktestSettings) -> BacktestResult:
    """Trade the scores through the panel. Raises UserError for scores of another shape."""
    if scores.shape != panel.shape:
        raise UserError(f"scores are {scores.shape}, the panel {panel.shape}; they must be of the same dates and names")
    desk = Desk(panel, settings)
    days = [desk.day(row, scores[row]) for row in range(len(panel.dates))]
    money = {
        key: np.array([getattr(day, key) for day in days], np.int64)
        for key in ("cash", "holdings", "futures", "fees", "traded", "stale")
    }
    return BacktestResult(
        dates=panel.dates,
        nav=money["cash"] + money["holdings"] + money["futures"],
        orders=[order for day in days for order in day.orders],
        fills=[fill for day in days for fill in day.fills],
        rejections=[rejection for day in days for rejection in day.rejections],
        futures_trades=[trade for day in days for trade in day.futures_trades],
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
