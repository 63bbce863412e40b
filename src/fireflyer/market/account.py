"""A stock account under the exchanges' rules: shares and cash in integers, one day's orders at a time.

In: orders for a day, by name. Out: fills and rejections; cash in fen and shares that balance exactly: what was paid for
shares, what came of selling them, and fees are all that ever moves cash, but for what a split leaves over.

Shapes: N names of the panel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fireflyer.errors import UserError
from fireflyer.market.orders import Fill, Reason, Rejection
from fireflyer.market.panel import Floats, Mask, Panel
from fireflyer.market.rules import LOT, STAR_LEAST, TICK, Fees, board_of, limit_prices, limit_shares

Counts = NDArray[np.int64]
_Refuse = Callable[[Mask, Counts, Reason], None]

FILL_PRICES = ("close", "open", "vwap")


@dataclass
class StockAccount:
    """held (N,) shares; bought (N,) of them today, which T+1 keeps from being sold; last_price (N,) yuan."""

    cash_fen: int
    held: Counts
    bought: Counts
    last_price: Floats
    last_row: Counts
    fees_fen: int = 0
    traded_fen: int = 0

    @classmethod
    def of(cls, names: int, cash_fen: int) -> StockAccount:
        zeros = np.zeros(names, np.int64)
        return cls(cash_fen, zeros.copy(), zeros.copy(), np.full(names, np.nan), np.full(names, -1))

    def value_fen(self) -> int:
        """Of all shares at their last prices."""
        owned = self.held > 0
        return int(money_fen(self.last_price[owned], self.held[owned]).sum())


@dataclass
class Exchange:
    """A panel's days as they can be traded."""

    panel: Panel
    fees: Fees
    fill: str = "close"
    limits: Floats = field(init=False)
    price: Floats = field(init=False)
    star: Mask = field(init=False)

    def __post_init__(self) -> None:
        panel = self.panel
        self.limits = limit_shares(panel.symbols, panel.dates)
        self.star = np.array([board_of(symbol) == "star" for symbol in panel.symbols])
        self.price = fill_prices(panel, self.fill)

    def open_day(self, account: StockAccount, row: int) -> None:
        """Before anything trades: splits change shares, what was bought yesterday may be sold."""
        account.bought[:] = 0
        on, before = self.panel.traded[row], account.last_row
        split = on & (before >= 0) & (account.held > 0)
        if not split.any():
            return
        names = np.nonzero(split)[0]
        ratio = self.panel.factor[row, names] / self.panel.factor[before[names], names]
        changed = np.abs(ratio - 1) > 1e-9
        for name, times in zip(names[changed].tolist(), ratio[changed].tolist(), strict=True):
            exact = account.held[name] * times
            whole = int(np.floor(exact + 1e-6))
            left = max(exact - whole, 0.0)
            account.cash_fen += fen(account.last_price[name] / times, left)
            account.held[name] = whole
            account.last_price[name] /= times

    def trade(
        self, account: StockAccount, row: int, wanted: Counts, priority: Floats, signal_row: int
    ) -> tuple[list[Fill], list[Rejection]]:
        """Sell, then buy what the cash is enough for. wanted (N,): shares to buy, below 0 to sell; priority (N,): whom
        the cash serves first."""
        fills: list[Fill] = []
        rejected: list[Rejection] = []

        def refuse(mask: Mask, shares: Counts, reason: Reason) -> None:
            for name in np.nonzero(mask)[0].tolist():
                symbol = self.panel.symbols[name]
                rejected.append(Rejection(symbol, int(shares[name]), signal_row, row, reason))

        on = self.panel.traded[row]
        asked = wanted != 0
        refuse(asked & ~on, wanted, "suspended")
        low, high = self._limits(account, row)
        price = self.price[row]
        with np.errstate(invalid="ignore"):
            stuck_down, stuck_up = price <= low + TICK / 4, price >= high - TICK / 4
        selling, buying = asked & on & (wanted < 0), asked & on & (wanted > 0)
        refuse(selling & stuck_down, wanted, "at the lower limit")
        refuse(buying & stuck_up, wanted, "at the upper limit")
        self._sell(account, row, np.where(selling & ~stuck_down, -wanted, 0), signal_row, fills, refuse)
        self._buy(account, row, np.where(buying & ~stuck_up, wanted, 0), priority, signal_row, fills, refuse)
        return fills, rejected

    def close_day(self, account: StockAccount, row: int) -> None:
        """Value everything at the day's close, or at the last one that there was."""
        on = self.panel.traded[row]
        account.last_price = np.where(on, self.panel.close[row], account.last_price)
        account.last_row = np.where(on, row, account.last_row)

    def give_up(self, account: StockAccount, row: int, after: int) -> list[Fill]:
        """Names held that haven't traded for more than `after` sessions leave at their last price, without a fee."""
        gone = (account.held > 0) & (account.last_row >= 0) & (row - account.last_row > after)
        fills = []
        for name in np.nonzero(gone)[0].tolist():
            shares, price = int(account.held[name]), float(account.last_price[name])
            money = fen(price, shares)
            account.cash_fen += money
            account.held[name] = 0
            fills.append(Fill(self.panel.symbols[name], -shares, price, money, 0, row, row, forced=True))
        return fills

    def _limits(self, account: StockAccount, row: int) -> tuple[Floats, Floats]:
        """Of names that traded before; the others have none known."""
        before = np.maximum(self.panel.previous_bar[row], 0)
        names = np.arange(len(before))
        known = self.panel.previous_bar[row] >= 0
        ratio = self.panel.factor[row] / self.panel.factor[before, names]
        reference = np.where(known, self.panel.close[before, names] / ratio, np.nan)
        if self.panel.origin.nominal_prices:  # prices made from returns aren't in fen
            share = self.limits[row]
            return reference * (1 - share + 5e-4), reference * (1 + share - 5e-4)
        return limit_prices(reference, self.limits[row])

    def _sell(
        self, account: StockAccount, row: int, shares: Counts, signal_row: int, fills: list[Fill], refuse: _Refuse
    ) -> None:
        free = account.held - account.bought
        refuse((shares > 0) & (free <= 0) & (account.held > 0), -shares, "bought today")
        shares = np.minimum(shares, free)
        lots = np.where(self.star, np.where(shares >= STAR_LEAST, shares, 0), shares // LOT * LOT)
        able = np.where(shares >= account.held, account.held, lots)  # what is left goes whole
        able = np.where(free > 0, np.minimum(able, free), 0)
        refuse((shares > 0) & (able == 0), -shares, "less than one lot")
        for name in np.nonzero(able)[0].tolist():
            self._fill(account, row, name, -int(able[name]), signal_row, fills)

    def _buy(
        self,
        account: StockAccount,
        row: int,
        shares: Counts,
        priority: Floats,
        signal_row: int,
        fills: list[Fill],
        refuse: _Refuse,
    ) -> None:
        able = np.where(self.star, np.where(shares >= STAR_LEAST, shares, 0), shares // LOT * LOT)
        refuse((shares > 0) & (able == 0), shares, "less than one lot")
        names = np.nonzero(able)[0]
        for name in names[np.lexsort((names, -priority[names]))].tolist():
            count = self._affordable(account.cash_fen, row, name, int(able[name]))
            if count:
                self._fill(account, row, name, count, signal_row, fills)
            if count < able[name]:
                short = np.zeros(len(able), bool)
                short[name] = True
                refuse(short, able - count, "not enough cash")

    def _affordable(self, cash_fen: int, row: int, name: int, shares: int) -> int:
        """The most of so many shares, in whole lots, that the cash pays with its fee."""
        price, date = self.price[row, name], self.panel.dates[row]

        def cost(count: int) -> int:
            money = fen(price, count)
            return money + self.fees.of(money, selling=False, date=date)

        if cost(shares) <= cash_fen:
            return shares
        step, least = (1, STAR_LEAST) if self.star[name] else (LOT, LOT)
        count = int(max(cash_fen - self.fees.minimum_fen, 0) / (price * 100)) // step * step
        while count >= least and cost(count) > cash_fen:
            count -= step
        return count if count >= least else 0

    def _fill(
        self, account: StockAccount, row: int, name: int, shares: int, signal_row: int, fills: list[Fill]
    ) -> None:
        price = float(self.price[row, name])
        money = fen(price, abs(shares))
        fee = self.fees.of(money, selling=shares < 0, date=self.panel.dates[row])
        account.cash_fen += (money if shares < 0 else -money) - fee
        account.held[name] += shares
        account.bought[name] += max(shares, 0)
        account.fees_fen += fee
        account.traded_fen += money
        fills.append(Fill(self.panel.symbols[name], shares, price, money, fee, signal_row, row))


def fen(price: float, shares: float) -> int:
    """Of shares at a price in yuan, half a fen upwards."""
    return math.floor(price * shares * 100 + 0.5)


def money_fen(price: Floats, shares: Counts) -> Counts:
    """`fen` of many."""
    return np.floor(price * shares * 100 + 0.5).astype(np.int64)


def fill_prices(panel: Panel, fill: str) -> Floats:
    """(D, N) at which a day's orders trade: the close, the open, or the money over the shares.

    Raises UserError for what the panel doesn't have, as a whole or on a day that a name traded.
    """
    if fill == "close":
        return panel.close
    if fill == "open":
        price = panel.open
    elif panel.amount is None or panel.volume is None:
        price = None
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            price = np.round(panel.amount / panel.volume, 2)
    source = panel.origin.source
    if price is None:
        needed = "opens" if fill == "open" else "volumes and amounts"
        raise UserError(f"fill = {fill!r}: {source} has no {needed}; fill at the close")
    lacking = panel.traded & ~(np.isfinite(price) & (price > 0))
    if lacking.any():
        row, name = (int(place[0]) for place in np.nonzero(lacking))
        raise UserError(
            f"{source}: {panel.dates[row]} {panel.symbols[name]}: traded, but no {fill} is known; fill at the close"
        )
    return price
