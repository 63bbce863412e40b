"""Whether fills could have happened: in their order, at a price of the day, under T+1. In: a panel and fills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fireflyer.market.orders import Fill
from fireflyer.market.panel import Panel
from fireflyer.market.rules import TICK, limit_prices, limit_shares


@dataclass
class _Holding:
    """Shares of a name at the open of `row` and now, and how many were sold on that day."""

    row: int
    at_open: float = 0.0
    now: float = 0.0
    sold: int = 0


def wrong_fill(panel: Panel, fills: Sequence[Fill]) -> str | None:
    """The first fill that could not have been, in words; None where all could.

    Forced ones, of names that no longer trade, are marked as such, and only counted.
    """
    limits = limit_shares(panel.symbols, panel.dates)
    column = {symbol: place for place, symbol in enumerate(panel.symbols)}
    holdings: dict[str, _Holding] = {}
    for fill in sorted(fills, key=lambda fill: fill.fill_row):  # stable: those of one day in the order they were made
        name, row = column[fill.symbol], fill.fill_row
        holding = holdings.setdefault(fill.symbol, _Holding(row))
        if holding.row < row:
            split = float(panel.factor[row, name] / panel.factor[holding.row, name])
            shares = holding.now * split if holding.now else 0.0
            holdings[fill.symbol] = holding = _Holding(row, shares, shares)
        holding.now += fill.shares
        holding.sold += max(-fill.shares, 0)
        wrong = None if fill.forced else _wrong(panel, fill, name, float(limits[row, name]), holding)
        if wrong:
            return f"{panel.dates[row]} {fill.symbol}: {wrong}"
    return None


def _wrong(panel: Panel, fill: Fill, name: int, limit: float, holding: _Holding) -> str | None:
    row = fill.fill_row
    if row <= fill.signal_row:
        return f"filled on the very bar that its signal was made of, the close of {panel.dates[fill.signal_row]}"
    if not panel.traded[row, name]:
        return "filled while suspended"
    before = int(panel.previous_bar[row, name])
    if before >= 0 and limit == limit:  # a first day has no limit
        reference = panel.close[before, name] * panel.factor[before, name] / panel.factor[row, name]
        low, high = (float(price[0]) for price in limit_prices(np.array([reference]), np.array([limit])))
        if not low - TICK / 2 <= fill.price <= high + TICK / 2:
            return f"filled at {fill.price:.2f}, beyond the limits {low:.2f} and {high:.2f}"
        if fill.shares > 0 and fill.price >= high - TICK / 4:
            return f"bought at the upper limit {high:.2f}, where nobody sells"
        if fill.shares < 0 and fill.price <= low + TICK / 4:
            return f"sold at the lower limit {low:.2f}, where nobody buys"
    if holding.sold > holding.at_open + 1e-6:
        return f"{holding.sold:,} sold of {int(holding.at_open):,} held overnight: bought today, sold today"
    return None
