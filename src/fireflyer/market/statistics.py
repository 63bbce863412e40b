"""How good scores and returns are, with the errors that overlapping labels and repeated trying call for.

In: scores and the returns that followed, (D, N) by session and name; or daily returns (D,) of an account. Out: numbers.
Information coefficients are correlations across the names of a day; a label of h sessions overlaps with the next h - 1,
so that their mean's standard error is Newey and West's (1987). A Sharpe ratio that is the best of many tried is
deflated as Bailey and López de Prado (2014) do.

Shapes: D sessions · N names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fireflyer.market.features import cross_rank, forward_returns
from fireflyer.market.panel import Panel

Floats = NDArray[np.float64]

SESSIONS_A_YEAR = 244
"""Of the mainland's exchanges, 242 to 244 since 2010."""
FEWEST_NAMES = 5
"""A correlation over fewer says nothing; such days have none."""
_EULER = 0.5772156649015329


@dataclass(frozen=True)
class Coefficient:
    """Of a daily series of information coefficients: mean, its standard error (overlap allowed for), mean over standard
    deviation of the days (ICIR), share of days above 0, and how many days there are."""

    mean: float
    standard_error: float
    icir: float
    positive: float
    days: int

    @property
    def t(self) -> float:
        """The mean in standard errors; 0 where there is no error to speak of."""
        return self.mean / self.standard_error if self.standard_error > 0 else 0.0


def daily_ic(scores: Floats, ahead: Floats, *, rank: bool = True) -> Floats:
    """(D,) correlation across names of scores and later returns, both (D, N); NaN on days with fewer than five of both.

    rank: Spearman's (RankIC), equal values sharing their rank; else Pearson's (IC).
    """
    both = np.isfinite(scores) & np.isfinite(ahead)
    if rank:
        scores, ahead = cross_rank(scores, both), cross_rank(ahead, both)
    count = both.sum(1)
    x, y = (_centred(values, both, count) for values in (scores, ahead))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.where((count >= FEWEST_NAMES) & np.isfinite(found), found, np.nan)


def coefficient(daily: Floats, horizon: int) -> Coefficient:
    """Of daily coefficients (D,), NaN days left out, whose labels reach over `horizon` sessions."""
    known = daily[np.isfinite(daily)]
    if not len(known):
        return Coefficient(math.nan, math.nan, math.nan, math.nan, 0)
    deviation = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    mean = float(known.mean())
    return Coefficient(
        mean=mean,
        standard_error=overlap_error(known, horizon),
        icir=mean / deviation if deviation > 0 else 0.0,
        positive=float((known > 0).mean()),
        days=len(known),
    )


def overlap_error(daily: Floats, horizon: int) -> float:
    """Standard error of the mean of a daily series whose values overlap for `horizon` days: Newey and West's, with
    Bartlett weights up to lag `horizon`."""
    centred = daily - daily.mean()
    count = len(centred)
    variance = float(centred @ centred) / count
    for lag in range(1, min(horizon, count - 1) + 1):
        variance += 2 * (1 - lag / (horizon + 1)) * float(centred[lag:] @ centred[:-lag]) / count
    return math.sqrt(max(variance, 0.0) / count)


def rank_ic(scores: Floats, panel: Panel, horizon: int) -> Coefficient:
    """RankIC against the returns from the close of t+1 to that of t+1+horizon."""
    return coefficient(daily_ic(scores, forward_returns(panel, horizon)), horizon)


def decay(scores: Floats, panel: Panel, horizons: Sequence[int]) -> list[Coefficient]:
    """RankIC over each horizon: how long a signal lasts."""
    return [rank_ic(scores, panel, horizon) for horizon in horizons]


@dataclass(frozen=True)
class Drawdown:
    """depth: the largest fall from a peak, as a share of it; peak, trough: their rows."""

    depth: float
    peak: int
    trough: int


def drawdowns(value: NDArray[np.number]) -> Floats:
    """(D,) how far each day lies below the highest value so far; 0 or below."""
    value = np.asarray(value, np.float64)
    return value / np.maximum.accumulate(value) - 1


def worst_drawdown(value: NDArray[np.number]) -> Drawdown:
    """Of an account's value (D,), above 0."""
    below = drawdowns(value)
    trough = int(below.argmin())
    return Drawdown(float(-below[trough]), int(np.asarray(value)[: trough + 1].argmax()), trough)


def annual_return(daily: Floats) -> float:
    """Of simple daily returns (D,), compounded, a year's."""
    return float(np.prod(1 + daily) ** (SESSIONS_A_YEAR / len(daily)) - 1) if len(daily) else 0.0


def sharpe(daily: Floats) -> float:
    """Mean over standard deviation of daily returns, a year's, over no interest; 0 where nothing moves."""
    deviation = float(daily.std(ddof=1)) if len(daily) > 1 else 0.0
    return float(daily.mean()) / deviation * math.sqrt(SESSIONS_A_YEAR) if deviation > 1e-12 else 0.0


@dataclass(frozen=True)
class DeflatedSharpe:
    """sharpe: a year's. expected_best: a year's too, what the best of `trials` worthless strategies shows. probability:
    that the true ratio is above that."""

    sharpe: float
    expected_best: float
    probability: float
    trials: int


def deflated_sharpe(daily: Floats, trials: int, trial_variance: float | None = None) -> DeflatedSharpe:
    """Bailey and López de Prado, "The Deflated Sharpe Ratio" (2014), equations 1 and 2.

    Args:
        daily: (D,) simple returns of the strategy that was chosen.
        trials: how many were tried, all of them, the chosen one among them.
        trial_variance: of the trials' daily Sharpe ratios; where they weren't kept, that of worthless strategies over
            as many days, 1 / (D - 1).
    """
    days = len(daily)
    if days < 3 or trials < 1:
        raise ValueError(f"{days} days and {trials} trials; a deflated Sharpe ratio takes 3 days and 1 trial at least")
    each_day = sharpe(daily) / math.sqrt(SESSIONS_A_YEAR)
    best = expected_best(trials, 1 / (days - 1) if trial_variance is None else trial_variance)
    probability = probabilistic_sharpe(daily, best)
    return DeflatedSharpe(each_day * math.sqrt(SESSIONS_A_YEAR), best * math.sqrt(SESSIONS_A_YEAR), probability, trials)


def expected_best(trials: int, variance: float) -> float:
    """The expected largest of `trials` independent normal Sharpe ratios around 0; 0 for one."""
    if trials == 1:
        return 0.0
    normal = NormalDist()
    far = (1 - _EULER) * normal.inv_cdf(1 - 1 / trials) + _EULER * normal.inv_cdf(1 - 1 / (trials * math.e))
    return math.sqrt(variance) * far


def probabilistic_sharpe(daily: Floats, threshold: float) -> float:
    """The probability that the true daily Sharpe ratio is above `threshold`, skewness and fat tails allowed for."""
    deviation = float(daily.std(ddof=1))
    if deviation <= 1e-12:
        return 0.0
    ratio = float(daily.mean()) / deviation
    z = (daily - daily.mean()) / daily.std()
    skewness, kurtosis = float((z**3).mean()), float((z**4).mean())
    spread = max(1 - skewness * ratio + (kurtosis - 1) / 4 * ratio**2, 1e-12)
    return NormalDist().cdf((ratio - threshold) * math.sqrt(len(daily) - 1) / math.sqrt(spread))


def _centred(values: Floats, both: NDArray[np.bool_], count: NDArray[np.int64]) -> Floats:
    held = np.where(both, values, 0.0)
    mean = held.sum(1) / np.maximum(count, 1)
    return np.where(both, held - mean[:, None], 0.0)
