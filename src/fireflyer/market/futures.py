"""A futures account, marked every day: index contracts sold against stocks, margin, settlement, expiry and roll.

In: each session's settlement and what is to be hedged. Out: cash in fen. The panels have an index and no futures
prices: contracts settle at the index, so that the basis and what it earns or costs are left out, and reports say so.
"""

from __future__ import annotations

import numpy as np

from fireflyer.market.panel import Dates
from fireflyer.market.rules import Contract, last_trading_day, listed_months, round_fen

ROLL_BEFORE = 2
"""Sessions before the last trading day on which the position moves to the next month."""


class FuturesAccount:
    """value_fen: cash, with every day's gains and losses in it. count: contracts, below 0 sold."""

    def __init__(self, contract: Contract, cash_fen: int, sessions: Dates) -> None:
        self.contract = contract
        self.value_fen = cash_fen
        self.count = 0
        self.month = ""
        self.fees_fen = 0
        self.traded_fen = 0
        self.gains_fen = 0
        self._sessions = sessions
        self._settled = 0.0
        self._roll_row = 0

    def settle(self, row: int, points: float, *, hedged_fen: int) -> None:
        """End a session: take the day's gain, roll where the month ends, and sell as many contracts as the stocks ask
        for and the margin allows."""
        if self.count:
            self._gain(points)
        if self.count and row >= self._roll_row:
            self.trade(points, -self.count, closing=True)
        wanted = -round_fen(hedged_fen / (points * self.contract.multiplier * 100))
        wanted = max(wanted, -self.most(points))
        if not self.count and wanted:
            self._choose_month(row)
        change = wanted - self.count
        if change:
            closing = abs(wanted) < abs(self.count)
            self.trade(points, change, closing=closing)

    def trade(self, points: float, change: int, *, closing: bool, today: bool = False) -> None:
        """Buy (or sell, below 0) contracts at so many points; what was held is marked to them first."""
        if self.count:
            self._gain(points)
        fee = round_fen(self.contract.fee_yuan(points, abs(change), closing=closing, today=today) * 100)
        self.value_fen -= fee
        self.fees_fen += fee
        self.traded_fen += round_fen(points * self.contract.multiplier * abs(change) * 100)
        self.count += change
        self._settled = points

    def most(self, points: float) -> int:
        """Contracts whose margin the account's cash covers."""
        return max(self.value_fen, 0) // max(self.contract.margin_fen(points, 1), 1)

    def _gain(self, points: float) -> None:
        gain = round_fen((points - self._settled) * self.contract.multiplier * self.count * 100)
        self.value_fen += gain
        self.gains_fen += gain
        self._settled = points

    def _choose_month(self, row: int) -> None:
        """The nearest month that isn't about to be rolled; past the known sessions the position stays."""
        date = self._sessions[row]
        for month in listed_months(date):
            if np.datetime64(month) > self._sessions[-1].astype("datetime64[M]"):
                break
            friday_row = self._last_row(month)
            if friday_row - ROLL_BEFORE > row:
                self.month, self._roll_row = month, friday_row - ROLL_BEFORE
                return
        self.month, self._roll_row = str(date.astype("datetime64[M]") + 1), len(self._sessions)

    def _last_row(self, month: str) -> int:
        third_friday = np.busday_offset(np.datetime64(f"{month}-01"), 2, roll="forward", weekmask="Fri")
        if third_friday > self._sessions[-1]:
            return len(self._sessions)
        return int(np.searchsorted(self._sessions, last_trading_day(month, self._sessions)))
