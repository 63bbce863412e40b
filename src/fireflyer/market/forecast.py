"""What the future may bring, for risk: fans of quantiles, value at risk of sampled paths, and how true they were.

In: a model's quantiles, or paths drawn by the token front end. Out: prices with their odds; the share of returns that
fell below each quantile; Kupiec's test of it. A quantile is honest when returns fall below it as often as it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fireflyer.errors import UserError
from fireflyer.market.features import forward_returns
from fireflyer.market.heads import QUANTILES
from fireflyer.market.network import Forecast
from fireflyer.market.panel import Panel
from fireflyer.market.statistics import overlap_error
from fireflyer.market.tokens import Scenarios


@dataclass(frozen=True)
class Fan:
    """One name's simple returns from the close after `date` to each horizon, at each of `QUANTILES`: (H, Q)."""

    symbol: str
    date: str
    horizons: tuple[int, ...]
    returns: NDArray[np.float64]


def fan(forecast: Forecast, panel: Panel, row: int, symbol: str) -> Fan:
    """The fan of a name after session `row`. Raises UserError where there is none."""
    if symbol not in panel.symbols:
        raise UserError(f"{symbol}: not among the {len(panel.symbols)} names of {panel.origin.source}")
    logs = forecast.quantiles[row, panel.symbols.index(symbol)]
    if not np.isfinite(logs).all():
        raise UserError(
            f"{symbol} {panel.dates[row]}: no forecast: it is no member, didn't trade, or has fewer than 20 bars"
        )
    return Fan(symbol, str(panel.dates[row]), forecast.horizons, np.expm1(logs))


@dataclass(frozen=True)
class Risk:
    """Of holding a name, or several in equal parts, over the days of the paths; losses are positive.

    value_at_risk: what is lost at most with probability `level`; expected_shortfall: the mean loss beyond it.
    """

    level: float
    value_at_risk: float
    expected_shortfall: float
    worst: float


def path_risk(scenarios: Scenarios, level: float = 0.95) -> list[Risk]:
    """Of each name's paths at their end. Names are drawn apart: of a portfolio these paths say nothing."""
    risks = []
    for paths in np.expm1(scenarios.paths[:, :, -1]):
        losses = np.sort(-paths)
        at = float(np.quantile(losses, level))
        risks.append(Risk(level, at, float(losses[losses >= at].mean()), float(losses[-1])))
    return risks


@dataclass(frozen=True)
class Coverage:
    """How often returns fell below one quantile, over the days and names that have both.

    share: of all; standard_error: of the mean of the days' shares, days within one horizon counted as overlapping.
    names_passing: of the names with `min_days`, how many Kupiec's test at 5 % lets pass, on every (horizon+1)-th day;
    about 0.95 where the quantile is right.
    """

    horizon: int
    level: float
    share: float
    standard_error: float
    count: int
    names_passing: float


MIN_DAYS = 15
"""Days that don't overlap: below, Kupiec's test sees nothing."""


def calibration(forecast: Forecast, panel: Panel, rows: slice) -> list[Coverage]:
    """Coverage of every horizon's quantiles over the sessions `rows`; horizons without a known return are left out."""
    found = []
    for place, horizon in enumerate(forecast.horizons):
        ahead = forward_returns(panel, horizon)[rows]
        quantiles = forecast.quantiles[rows, :, place]
        known = np.isfinite(ahead) & np.isfinite(quantiles).all(-1)
        if not known.any():
            continue
        for at, level in enumerate(QUANTILES):
            below = known & (ahead < quantiles[..., at])
            days = known.any(1)
            daily = below.sum(1)[days] / known.sum(1)[days]
            found.append(
                Coverage(
                    horizon=horizon,
                    level=level,
                    share=float(below.sum() / known.sum()),
                    standard_error=overlap_error(daily, horizon),
                    count=int(known.sum()),
                    names_passing=_names_passing(below, known, level, horizon),
                )
            )
    return found


def kupiec(failures: int, trials: int, probability: float) -> tuple[float, float]:
    """Kupiec's proportion-of-failures test (1995): the likelihood ratio and its p-value (chi-square, one degree).

    Returns (0, 1) for no trials.
    """
    if not 0 <= failures <= trials or not 0 < probability < 1:
        raise ValueError(f"{failures} failures of {trials} at probability {probability:g} can't be tested")
    if not trials:
        return 0.0, 1.0
    ratio = 2 * (_log_likelihood(failures, trials, failures / trials) - _log_likelihood(failures, trials, probability))
    ratio = max(ratio, 0.0)
    return ratio, math.erfc(math.sqrt(ratio / 2))


def _log_likelihood(failures: int, trials: int, probability: float) -> float:
    total = 0.0
    if failures:
        total += failures * math.log(probability)
    if trials - failures:
        total += (trials - failures) * math.log1p(-probability)
    return total


def _names_passing(below: NDArray[np.bool_], known: NDArray[np.bool_], level: float, horizon: int) -> float:
    """NaN where no name has days enough."""
    passed = []
    for name in range(known.shape[1]):
        days = np.flatnonzero(known[:, name])
        apart = _spaced(days, horizon + 1)
        if len(apart) >= MIN_DAYS:
            passed.append(kupiec(int(below[apart, name].sum()), len(apart), level)[1] >= 0.05)
    return float(np.mean(passed)) if passed else math.nan


def _spaced(days: NDArray[np.int64], step: int) -> NDArray[np.int64]:
    kept: list[int] = []
    for day in days.tolist():
        if not kept or day - kept[-1] >= step:
            kept.append(day)
    return np.array(kept, dtype=np.int64)
