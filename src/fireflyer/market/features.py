"""What is known of every bar at its close: the decoder's inputs, the baselines' fifteen features, and the labels.

In: a Panel. Out: arrays in its shape (D dates, N names). Everything but the labels is causal to the bit: a value at t
is computed by the same operations in the same order whatever comes after t. There is no fill, backward or forward: a
day without a bar has none, and a window of 20 is twenty days on which the name traded. What is scaled is scaled by the
name's own past or by the other names of the same day, never by statistics of the whole panel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fireflyer.errors import UserError
from fireflyer.market.panel import Panel
from fireflyer.market.rules import board_of, limit_shares

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

SIGMA_DAYS = 20
SIGMA_FLOOR = 0.002
"""A name that hardly moved for a month would make any move enormous."""
CLIP = 6.0
"""In standard deviations; price limits keep most moves below."""

LIMIT_SLACK = 0.002
"""Prices are rounded to the fen, and returns from an index's weights to less: nearly at the limit is at it."""

EXECUTION_LAG = 1
"""Sessions from the close that a signal is made of to the close at which it is filled."""

PRICE_FEATURES = (
    "return 1",
    "return 5",
    "return 10",
    "return 20",
    "return 60",
    "volatility 5",
    "volatility 20",
    "volatility 60",
    "best day of 20",
    "worst day of 20",
    "skewness 20",
    "beta 60",
    "own volatility 60",
    "below the high of 60",
    "above the low of 60",
)


@dataclass(frozen=True)
class BarInputs:
    """values: (D, N, F) float32, NaN where a name has no bar; names: of the F numbers."""

    values: NDArray[np.float32]
    names: tuple[str, ...]


def bar_inputs(panel: Panel) -> BarInputs:
    """The small vector that describes each bar to the decoder; OHLC and volume add theirs where the panel has them."""
    days = TradedDays(known_bars(panel))
    returns = log_returns(panel)
    market = market_returns(panel)
    sigma = trailing_sigma(days, returns)
    before = days.spread(shifted(days.gather(sigma)))
    up, down = at_limit(panel)
    there = days.bars & panel.member
    centre = row_median(returns, there)
    columns = {
        "return": returns / before,
        "excess return": (returns - centre[:, None]) / before,
        "rank of return": cross_rank(returns, there),
        "market return": np.broadcast_to((market / market_sigma(market))[:, None], returns.shape),
        "log volatility": 3 * np.log(sigma / row_median(sigma, there)[:, None]),
        "limit up": up.astype(np.float64),
        "limit down": down.astype(np.float64),
        "sessions missed": np.log1p(sessions_missed(days.bars)),
    }
    close = panel.close
    for name, price in (("open", panel.open), ("high", panel.high), ("low", panel.low)):
        if price is not None:
            columns[name] = (returns + quiet_log(price / close)) / before
    for name, amount in (("volume", panel.volume), ("amount", panel.amount)):
        if amount is not None:
            logs = days.gather(quiet_log(amount))
            columns[name] = days.spread(logs - shifted(rolling_sum(logs, SIGMA_DAYS)) / SIGMA_DAYS)
    stacked = np.stack([np.clip(column, -CLIP, CLIP) for column in columns.values()], axis=-1)
    # Where trailing scale is not known yet, at the beginning of a name's history, a bar says nothing.
    stacked = np.where(np.isfinite(stacked), stacked, 0.0)
    stacked[~days.bars] = np.nan
    return BarInputs(stacked.astype(np.float32), tuple(columns))


def price_features(panel: Panel) -> Floats:
    """(D, N, 15) of `PRICE_FEATURES`, each as its rank among the members of the day, -1 to 1; NaN where there is none.

    They need closes alone, so that every panel has them. A window that isn't full yet gives NaN.
    """
    days = TradedDays(known_bars(panel))
    x = days.gather(log_returns(panel))
    m = days.gather(np.broadcast_to(market_returns(panel)[:, None], x.shape))
    price = np.cumsum(np.where(days.held, x, 0.0), axis=0)
    columns = [x, *(rolling_sum(x, window) for window in (5, 10, 20, 60))]
    columns += [np.sqrt(rolling_sum(x * x, window)) for window in (5, 20, 60)]
    columns += [rolling(np.maximum, x, 20), rolling(np.minimum, x, 20), _skewness(x, 20)]
    columns += _beta_and_rest(x, m, 60)
    columns += [price - rolling(np.maximum, price, 60), price - rolling(np.minimum, price, 60)]
    assert len(columns) == len(PRICE_FEATURES)
    there = days.bars & panel.member
    return np.stack([cross_rank(days.spread(column), there) for column in columns], axis=-1)


# --- Labels: the only values here that look ahead


def forward_returns(panel: Panel, horizon: int) -> Floats:
    """(D, N) log return from the close of t+1, where a signal at t is filled, to that of t+1+horizon; else NaN.

    NaN where the name is no member at t, has no bar at t or t+1, was at its limit at the close of t+1 (it could not
    have been bought or sold), stops trading at once, or t+1+horizon lies beyond the panel. A name that is suspended at
    the end counts at its last price.
    """
    bars, entry = known_bars(panel), EXECUTION_LAG
    price = np.cumsum(np.where(bars, log_returns(panel), 0.0), axis=0)
    up, down = at_limit(panel)
    enters = bars & ~up & ~down
    traded = np.cumsum(bars, axis=0)
    label = np.full(price.shape, np.nan)
    last = len(price) - entry - horizon
    if last > 0:
        start, end = slice(entry, entry + last), slice(entry + horizon, None)
        known = panel.member[:last] & bars[:last] & enters[start] & (traded[end] > traded[start])
        label[:last] = np.where(known, price[end] - price[start], np.nan)
    return label


# --- Causal parts


def at_limit(panel: Panel) -> tuple[Mask, Mask]:
    """(D, N) closes at the upper and at the lower price limit of the board and the day."""
    limits = price_limits(panel)
    returns = np.where(known_bars(panel), panel.returns(), 0.0)
    return returns >= limits - LIMIT_SLACK, returns <= -limits + LIMIT_SLACK


def price_limits(panel: Panel) -> Floats:
    """(D, N) the rule book's daily limits, as shares of the last close; infinite for what is no A-share."""
    limits = np.full(panel.shape, np.inf)
    ours = [column for column, symbol in enumerate(panel.symbols) if _is_a_share(symbol)]
    if ours:
        found = limit_shares(tuple(panel.symbols[column] for column in ours), panel.dates)
        limits[:, ours] = np.where(np.isfinite(found), found, np.inf)
    return limits


class TradedDays:
    """The bars of each name moved together, so that a window counts days on which it traded, and back again."""

    def __init__(self, bars: Mask) -> None:
        self.bars = bars
        self._order = np.argsort(~bars, axis=0, kind="stable")
        self._place = np.maximum(np.cumsum(bars, axis=0) - 1, 0)
        self.held = np.arange(len(bars))[:, None] < bars.sum(0)

    def gather(self, values: NDArray[np.floating]) -> Floats:
        """(D, N) by session to (D, N) by traded day, NaN beyond a name's last."""
        return np.where(self.held, np.take_along_axis(values, self._order, axis=0), np.nan)

    def spread(self, values: Floats) -> Floats:
        """Back to sessions, NaN where a name didn't trade."""
        return np.where(self.bars, np.take_along_axis(values, self._place, axis=0), np.nan)


def known_bars(panel: Panel) -> Mask:
    """Where a name traded and its return since the last traded day is known."""
    returns = panel.returns()
    return panel.traded & np.isfinite(returns) & (returns > -1)


def log_returns(panel: Panel) -> Floats:
    """(D, N) adjusted, over traded days; NaN where there is no bar."""
    return np.log1p(np.where(known_bars(panel), panel.returns(), np.nan))


def market_returns(panel: Panel) -> Floats:
    """(D,) log return of the index; the median of the members' on days when the index is not known."""
    index = np.full(len(panel.dates), np.nan)
    index[1:] = quiet_log(panel.index_close[1:] / panel.index_close[:-1])
    names = row_median(log_returns(panel), known_bars(panel) & panel.member)
    return np.where(np.isfinite(index), index, np.where(np.isfinite(names), names, 0.0))


def market_sigma(market: Floats) -> Floats:
    """(D,) the market's own trailing volatility up to the day before."""
    before = shifted(np.sqrt(rolling_sum(market[:, None] ** 2, SIGMA_DAYS) / SIGMA_DAYS))[:, 0]
    return np.maximum(before, SIGMA_FLOOR)


def trailing_sigma(days: TradedDays, returns: Floats) -> Floats:
    """(D, N) root mean square of the last 20 traded days' log returns, this one's included."""
    x = days.gather(returns)
    return np.maximum(days.spread(np.sqrt(rolling_sum(x * x, SIGMA_DAYS) / SIGMA_DAYS)), SIGMA_FLOOR)


def shifted(values: Floats) -> Floats:
    """One row later; NaN first."""
    return np.concatenate([np.full_like(values[:1], np.nan), values[:-1]])


def rolling(combine: Callable[[Floats, Floats], Floats], values: Floats, window: int) -> Floats:
    """`combine` over the last `window` rows, lag by lag: always the same operations in the same order. NaN before."""
    total = values.copy()
    for lag in range(1, min(window, len(values))):
        total[lag:] = combine(total[lag:], values[:-lag])
    total[: window - 1] = np.nan
    return total


def rolling_sum(values: Floats, window: int) -> Floats:
    return rolling(np.add, values, window)


def row_median(values: Floats, mask: Mask) -> Floats:
    """(D,) median of each day's values under the mask; NaN where there is none."""
    median = np.full(len(values), np.nan)
    for day, (row, there) in enumerate(zip(values, mask & np.isfinite(values), strict=True)):
        if there.any():
            median[day] = np.median(row[there])
    return median


def cross_rank(values: Floats, mask: Mask) -> Floats:
    """(D, N) place among the day's values under the mask, from -1 to 1, equals sharing theirs; NaN elsewhere."""
    rank = np.full(values.shape, np.nan)
    for day, (row, there) in enumerate(zip(values, mask & np.isfinite(values), strict=True)):
        own = row[there]
        ordered = np.sort(own)
        below, up_to = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
        rank[day, there] = (below + up_to) / max(len(own), 1) - 1
    return rank


def sessions_missed(bars: Mask) -> Floats:
    """(D, N) sessions without a bar just before each bar; 0 at a name's first."""
    rows = np.arange(len(bars))[:, None]
    last = np.maximum.accumulate(np.where(bars, rows, -1), axis=0)
    before = np.concatenate([np.full_like(last[:1], -1), last[:-1]])
    return np.where(bars & (before >= 0), rows - before - 1, 0).astype(np.float64)


def quiet_log(values: NDArray[np.floating]) -> Floats:
    """log, NaN where there is none."""
    return np.log(np.where(values > 0, values, np.nan))


def _skewness(x: Floats, window: int) -> Floats:
    m1, m2, m3 = (rolling_sum(x**power, window) / window for power in (1, 2, 3))
    return (m3 - 3 * m1 * m2 + 2 * m1**3) / np.maximum(m2 - m1 * m1, SIGMA_FLOOR**2) ** 1.5


def _beta_and_rest(x: Floats, m: Floats, window: int) -> list[Floats]:
    """The slope on the market, and the volatility of what it leaves."""
    mean_x, mean_m = (rolling_sum(values, window) / window for values in (x, m))
    covariance = rolling_sum(x * m, window) / window - mean_x * mean_m
    variance = rolling_sum(m * m, window) / window - mean_m**2
    beta = covariance / np.maximum(variance, SIGMA_FLOOR**2)
    rest = rolling_sum(x * x, window) / window - mean_x**2 - beta * covariance
    return [beta, np.sqrt(np.maximum(rest, 0.0))]


def _is_a_share(symbol: str) -> bool:
    try:
        board_of(symbol)
    except UserError:
        return False
    return True
