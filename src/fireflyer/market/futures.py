"""A futures account, marked every day: index contracts sold against stocks, margin, settlement, expiry and roll.

In: each session's settlement and what is to be hedged. Out: cash in fen. The panels have an index and no futures
prices: contracts settle at the index, so that the basis and what it earns or costs are left out, and reports say so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fireflyer.market.rules import Contract, listed_months, round_fen, third_friday

ROLL_BEFORE = 2
"""Weekdays before the last trading day on which the position moves to the next month."""


@dataclass
class FuturesAccount:
    """value_fen: cash, each day's gains and losses in it. count: contracts, below 0 sold; settled: their points."""

    contract: Contract
    value_fen: int
    count: int = 0
    month: str = ""
    fees_fen: int = 0
    traded_fen: int = 0
    gains_fen: int = 0
    settled: float = 0.0

    def settle(self, date: np.datetime64, points: float, *, hedged_fen: int) -> None:
        """End a session: take the day's gain, roll where the month ends, and sell as many contracts as the stocks ask
        for and the margin allows."""
        if self.count:
            self._gain(points)
        if self.count and date >= roll_date(self.month):
            self.trade(points, -self.count, closing=True)
        wanted = -round_fen(hedged_fen / (points * self.contract.multiplier * 100))
        wanted = max(wanted, -self.most(points))
        if not self.count and wanted:
            self.month = next(month for month in listed_months(date) if roll_date(month) > date)
        if wanted != self.count:
            self.trade(points, wanted - self.count, closing=abs(wanted) < abs(self.count))

    def trade(self, points: float, change: int, *, closing: bool, today: bool = False) -> None:
        """Buy (or sell, below 0) contracts at so many points; what was held is marked to them first."""
        if self.count:
            self._gain(points)
        fee = round_fen(self.contract.fee_yuan(points, abs(change), closing=closing, today=today) * 100)
        self.value_fen -= fee
        self.fees_fen += fee
        self.traded_fen += round_fen(points * self.contract.multiplier * abs(change) * 100)
        self.count += change
        self.settled = points

    def most(self, points: float) -> int:
        """Contracts whose margin the account's cash covers."""
        return max(self.value_fen, 0) // max(self.contract.margin_fen(points, 1), 1)

    def state(self) -> dict[str, Any]:
        """JSON-able, the contract apart."""
        return {key: value for key, value in asdict(self).items() if key != "contract"}

    def _gain(self, points: float) -> None:
        gain = round_fen((points - self.settled) * self.contract.multiplier * self.count * 100)
        self.value_fen += gain
        self.gains_fen += gain
        self.settled = points


def roll_date(month: str) -> np.datetime64:
    """From which day on a month is no longer held."""
    return np.busday_offset(third_friday(month), -ROLL_BEFORE)
