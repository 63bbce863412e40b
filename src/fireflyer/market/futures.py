"""A futures account, marked every day: index contracts sold against stocks, margin, settlement, expiry and roll.

In: each session's settlement and what is to be hedged. Out: cash in fen. What the hedge should be is decided at a close
and traded at the next, as stocks are. The panels have an index and no futures prices: contracts settle at the index, so
that the basis and what it earns or costs are left out, and reports say so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fireflyer.market.orders import FutureTrade, Reason
from fireflyer.market.rules import contract_on, listed_months, quoted, round_fen, third_friday

ROLL_BEFORE = 2
"""Weekdays before the last trading day on which the position moves to the next month."""


@dataclass
class FuturesAccount:
    """value_fen: cash, with every day's gains and losses in it. count: contracts of `month`, below 0 sold; settled: the
    points of the last session, 0 before the first; target: the count decided on at its close."""

    code: str
    value_fen: int
    count: int = 0
    month: str = ""
    target: int = 0
    fees_fen: int = 0
    traded_fen: int = 0
    gains_fen: int = 0
    settled: float = 0.0

    def settle(self, date: np.datetime64, row: int, points: float, *, hedged_fen: int) -> list[FutureTrade]:
        """A session: take the day's gain, trade what was decided at the close before, as far as the margin allows, roll
        where the month ends, and decide how many contracts the stocks ask for next. The day's trades."""
        terms = contract_on(self.code, date)
        points = quoted(points, terms)
        before, self.settled = self.settled, points
        if self.count:
            gain = round_fen((points - before) * terms.multiplier * self.count * 100)
            self.value_fen += gain
            self.gains_fen += gain
        wanted = max(self.target, -self.most(date, points))
        trades = []
        if self.count and date >= roll_date(self.month):
            trades.append(self.trade(date, row, points, before, -self.count))
        if not self.count:
            self.month = next(month for month in listed_months(date) if roll_date(month) > date)
        if wanted != self.count and (not trades or trades[-1].refused is None):
            trades.append(self.trade(date, row, points, before, wanted - self.count))
        self.target = -round_fen(hedged_fen / (points * terms.multiplier * 100))
        return trades

    def trade(
        self, date: np.datetime64, row: int, points: float, before: float, change: int, *, today: bool = False
    ) -> FutureTrade:
        """Buy (or sell, below 0) contracts at the session's points; `before`: the previous settlement, which the day's
        limits are of, 0 where there is none. today: contracts are closed that were opened today."""
        terms = contract_on(self.code, date)
        name = f"{self.code}{self.month[2:4]}{self.month[5:7]}"
        refused: Reason | None = None
        if before and change > 0 and points >= quoted(before * (1 + terms.limit), terms):
            refused = "at the upper limit"
        elif before and change < 0 and points <= quoted(before * (1 - terms.limit), terms):
            refused = "at the lower limit"
        if refused:
            return FutureTrade(name, 0, points, 0, row, refused)
        closing = abs(self.count + change) < abs(self.count)
        fee = round_fen(terms.fee_fen(points, change, closing=closing, today=today))
        self.value_fen -= fee
        self.fees_fen += fee
        self.traded_fen += terms.money_fen(points, change)
        self.count += change
        return FutureTrade(name, change, points, fee, row)

    def most(self, date: np.datetime64, points: float) -> int:
        """Contracts whose margin the account's cash covers."""
        return max(self.value_fen, 0) // max(contract_on(self.code, date).margin_fen(points, 1), 1)

    def state(self) -> dict[str, Any]:
        """JSON-able: the account's fields."""
        return asdict(self)


def roll_date(month: str) -> np.datetime64:
    """From which day on a month is no longer held."""
    return np.busday_offset(third_friday(month), -ROLL_BEFORE)
