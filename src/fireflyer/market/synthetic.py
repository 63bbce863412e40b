"""A made-up A-share market: what the tests run on, and the demo where there is no data.

It has what trips up backtests: price limits by board, suspensions, splits, late listings and de-listings, calm and wild
regimes. One thing in it can be learnt: names that rose over five days fall back a little, `signal` standard deviations
a day for each standard deviation that they rose.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fireflyer.market.panel import Dates, Floats, Origin, Panel

_BOARDS = (
    ("60{:04d}.XSHG", 0.10, 0.4),
    ("00{:04d}.XSHE", 0.10, 0.3),
    ("30{:04d}.XSHE", 0.20, 0.2),
    ("688{:03d}.XSHG", 0.20, 0.1),
)
"""Symbols, price limit, share of the names."""
_CALM, _WILD = 0.8, 1.8
_STAY = 0.98
"""Of a regime, from day to day."""
_REVERSAL_DAYS = 5


def synthetic_panel(
    seed: int = 0,
    *,
    days: int = 400,
    names: int = 60,
    signal: float = 0.06,
    first: str = "2021-01-04",
    bars: bool = True,
) -> Panel:
    """The same panel for the same arguments. bars: opens, highs, lows and volumes beside the closes."""
    rng = np.random.default_rng([seed, days, names])
    symbols, limits = _symbols(rng, names)
    dates = _weekdays(first, days)
    listed = _listed(rng, days, names)
    traded = listed & ~_suspended(rng, days, names)
    split = traded & (rng.random((days, names)) < 0.001)
    split[0] = False
    ratio = np.where(split, 1.5, 1.0)
    close, opens = _prices(rng, traded, limits, ratio, signal)
    spread = np.abs(rng.normal(0, 0.006, (2, days, names)))
    high = np.maximum(close, opens) * (1 + spread[0])
    low = np.minimum(close, opens) * (1 - spread[1])
    volume = np.where(traded, np.round(rng.lognormal(13, 0.6, (days, names)) / 100) * 100, np.nan)
    close, opens, high, low = (np.where(traded, price, np.nan) for price in (close, opens, high, low))
    factor = np.cumprod(ratio, axis=0, dtype=np.float64)
    panel = Panel(
        dates=dates,
        symbols=symbols,
        close=close,
        factor=factor,
        traded=traded,
        member=listed,
        index_close=np.full(days, 5000.0),
        origin=Origin(f"made up, seed {seed}", "synthetic", close_only=not bars),
        open=opens if bars else None,
        high=high if bars else None,
        low=low if bars else None,
        volume=volume if bars else None,
        amount=volume * close if bars else None,
    )
    returns = panel.returns()  # the index is all that trades, each name alike
    known = np.isfinite(returns)
    mean = np.where(known, returns, 0).sum(1) / np.maximum(known.sum(1), 1)
    return replace(panel, index_close=5000 * np.cumprod(1 + mean))


def _symbols(rng: np.random.Generator, names: int) -> tuple[tuple[str, ...], Floats]:
    boards = rng.choice(len(_BOARDS), names, p=[share for _, _, share in _BOARDS])
    boards[0] = 0
    limits = np.array([limit for _, limit, _ in _BOARDS])[boards]
    of_board = np.cumsum(boards[:, None] == np.arange(len(_BOARDS)), axis=0)[np.arange(names), boards]
    numbered = zip(boards.tolist(), of_board.tolist(), strict=True)
    return tuple(_BOARDS[board][0].format(number) for board, number in numbered), limits


def _weekdays(first: str, days: int) -> Dates:
    start = np.asarray(first, "datetime64[D]")
    return np.asarray(np.busday_offset(start, np.arange(days), roll="forward"), "datetime64[D]")


def _listed(rng: np.random.Generator, days: int, names: int) -> NDArray[np.bool_]:
    """A tenth comes later, a tenth goes earlier; the first name is always there."""
    fate = rng.random(names)
    starts = np.where(fate < 0.1, rng.integers(1, max(days // 2, 2), names), 0)
    stops = np.where(fate > 0.9, rng.integers(max(days // 2, 1), days + 1, names), days)
    starts[0], stops[0] = 0, days
    rows = np.arange(days)[:, None]
    return (rows >= starts) & (rows < stops)


def _suspended(rng: np.random.Generator, days: int, names: int) -> NDArray[np.bool_]:
    """Spells of one to ten days, about one in three hundred days beginning one."""
    begins = rng.random((days, names)) < 1 / 300
    lengths = rng.integers(1, 11, (days, names))
    suspended = np.zeros((days, names), bool)
    for row, column in zip(*np.nonzero(begins), strict=True):
        suspended[row : row + lengths[row, column], column] = True
    suspended[:, 0] = False
    return suspended


def _prices(
    rng: np.random.Generator, traded: NDArray[np.bool_], limits: Floats, ratio: Floats, signal: float
) -> tuple[Floats, Floats]:
    """Raw closes and opens in hundredths, within the limits of each day's reference price."""
    days, names = traded.shape
    sigma = rng.uniform(0.014, 0.03, names)
    beta = rng.uniform(0.6, 1.4, names)
    wild = np.cumsum(rng.random(days) > _STAY) % 2 == 1
    market = rng.normal(0, 0.009, days) * np.where(wild, _WILD, _CALM)
    own = rng.standard_t(5, (days, names)) * np.sqrt(3 / 5) * np.where(wild, _WILD, _CALM)[:, None]
    gaps = rng.normal(0, 0.004, (days, names))
    price = np.round(rng.uniform(5, 50, names), 2)
    recent = np.zeros((_REVERSAL_DAYS, names))
    close, opens = np.empty((days, names)), np.empty((days, names))
    for day in range(days):
        pulled = -signal * np.clip(recent.sum(0) / np.sqrt(_REVERSAL_DAYS), -3, 3)
        moved = beta * market[day] + sigma * (own[day] + pulled)
        reference = np.round(price / ratio[day], 2)
        top, bottom = np.round(reference * (1 + limits), 2), np.round(reference * (1 - limits), 2)
        new = np.clip(np.round(reference * np.exp(moved), 2), np.maximum(bottom, 0.01), top)
        opens[day] = np.clip(np.round(reference * (1 + gaps[day]), 2), np.maximum(bottom, 0.01), top)
        on = traded[day]
        recent[day % _REVERSAL_DAYS] = np.where(on, own[day] + pulled, 0.0)
        price = np.where(on, new, price)
        close[day] = price
    return close, opens
