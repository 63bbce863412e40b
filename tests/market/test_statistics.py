"""Coefficients, errors and Sharpe ratios against scipy, loops over days, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fireflyer.market.features import forward_returns
from fireflyer.market.statistics import (
    annual_return,
    coefficient,
    daily_ic,
    decay,
    deflated_sharpe,
    drawdowns,
    expected_best,
    overlap_error,
    probabilistic_sharpe,
    rank_ic,
    sharpe,
    worst_drawdown,
)
from fireflyer.market.synthetic import synthetic_panel

RNG = np.random.default_rng(5)


def _pair(days: int = 30, names: int = 12) -> tuple[np.ndarray, np.ndarray]:
    x = np.round(RNG.normal(size=(days, names)), 1)  # so that some are equal
    y = np.round(0.4 * x + RNG.normal(size=x.shape), 1)
    x[RNG.random(x.shape) < 0.2] = np.nan
    y[RNG.random(x.shape) < 0.2] = np.nan
    return x, y


@pytest.mark.parametrize("rank", [True, False])
def test_a_days_coefficient_is_scipys(rank: bool) -> None:
    x, y = _pair()
    x[3], y[4, 4:] = np.nan, np.nan  # too few
    x[5] = 1.0  # no order among equals
    found = daily_ic(x, y, rank=rank)
    for day in range(len(x)):
        both = np.isfinite(x[day]) & np.isfinite(y[day])
        if both.sum() < 5 or np.ptp(x[day, both]) == 0:
            assert math.isnan(found[day])
        else:
            oracle = (stats.spearmanr if rank else stats.pearsonr)(x[day, both], y[day, both]).statistic
            assert found[day] == pytest.approx(oracle, abs=1e-12)


def test_the_coefficient_of_a_series() -> None:
    daily = np.array([0.1, np.nan, 0.3, -0.2, 0.2])
    found = coefficient(daily, 1)
    known = daily[np.isfinite(daily)]
    assert found.mean == pytest.approx(0.1)
    assert found.icir == pytest.approx(0.1 / np.std(known, ddof=1))
    assert (found.days, found.positive) == (4, 0.75)
    assert found.t == pytest.approx(0.1 / found.standard_error)
    assert coefficient(np.full(4, np.nan), 5).days == 0


def test_the_error_of_overlapping_means_is_that_of_repeated_worlds() -> None:
    """A moving sum of h shocks: the error of its mean over many worlds, and of one world alone."""
    horizon, days, worlds = 5, 400, 400
    shocks = np.random.default_rng(0).normal(size=(worlds, days + horizon - 1))
    series = np.stack([np.convolve(world, np.ones(horizon), "valid") for world in shocks])
    truth = series.mean(1).std()
    overlap = np.mean([overlap_error(world, horizon) for world in series])
    naive = np.mean([world.std() / math.sqrt(days) for world in series])
    # Bartlett's weights leave a bias downwards of about 1/h of the covariances; the naive error is half the truth.
    assert overlap == pytest.approx(truth, rel=0.2)
    assert naive < 0.55 * truth


def test_newey_west_is_the_double_sum_over_pairs_of_days() -> None:
    series = RNG.normal(size=40).cumsum()
    centred, lag = series - series.mean(), 3
    total = 0.0
    for i in range(40):
        for j in range(40):
            total += max(0.0, 1 - abs(i - j) / (lag + 1)) * centred[i] * centred[j]
    assert overlap_error(series, lag) == pytest.approx(math.sqrt(total) / 40)


def test_decay_looks_at_each_horizons_own_returns() -> None:
    panel = synthetic_panel(3, days=120, names=20)
    oracle = forward_returns(panel, 5)
    five, one = decay(oracle, panel, [5, 1])
    assert five.mean == pytest.approx(1)
    assert 0.2 < one.mean < 0.7  # one of the five days that the oracle knows the sum of
    assert rank_ic(-oracle, panel, 5).mean == pytest.approx(-1)


def test_drawdown_by_a_loop() -> None:
    value = 100 * np.exp(np.cumsum(RNG.normal(0, 0.02, 200)))
    worst, where = 0.0, (0, 0)
    for peak in range(200):
        for trough in range(peak, 200):
            if 1 - value[trough] / value[peak] > worst:
                worst, where = 1 - value[trough] / value[peak], (peak, trough)
    found = worst_drawdown(value)
    assert (found.depth, (found.peak, found.trough)) == (pytest.approx(worst), where)
    assert drawdowns(value).min() == pytest.approx(-worst)
    assert worst_drawdown(np.array([1, 2, 3])).depth == 0


def test_annual_figures() -> None:
    daily = np.full(122, 1.1 ** (1 / 122) - 1)
    assert annual_return(daily) == pytest.approx(1.21 - 1)
    assert sharpe(daily) == 0
    daily = RNG.normal(0.001, 0.01, 300)
    assert sharpe(daily) == pytest.approx(np.mean(daily) / np.std(daily, ddof=1) * math.sqrt(244))


def test_the_best_of_many_worthless_strategies_by_simulation() -> None:
    days, trials = 250, 40
    returns = np.random.default_rng(1).normal(size=(400, trials, days))
    ratios = returns.mean(-1) / returns.std(-1, ddof=1)
    assert expected_best(trials, 1 / (days - 1)) == pytest.approx(ratios.max(1).mean(), rel=0.03)
    assert expected_best(1, 1.0) == 0


def test_the_deflated_sharpe_of_the_best_worthless_one_is_a_coin() -> None:
    rng, trials, days = np.random.default_rng(2), 30, 250
    found, alone = [], []
    for _ in range(150):
        returns = rng.normal(size=(trials, days)) * 0.01
        best = max(returns, key=sharpe)
        found.append(deflated_sharpe(best, trials).probability)
        alone.append(probabilistic_sharpe(best, 0.0))
    assert 0.4 < np.mean(found) < 0.6
    assert np.mean(alone) > 0.95  # who doesn't count the trials finds every one of them good


def test_the_probabilistic_sharpe_by_scipys_moments() -> None:
    daily = RNG.standard_t(4, 500) * 0.01 + 0.0005
    ratio = daily.mean() / daily.std(ddof=1)
    skew, kurtosis = stats.skew(daily), stats.kurtosis(daily, fisher=False)
    z = (ratio - 0.01) * math.sqrt(499) / math.sqrt(1 - skew * ratio + (kurtosis - 1) / 4 * ratio**2)
    assert probabilistic_sharpe(daily, 0.01) == pytest.approx(stats.norm.cdf(z))
    one = deflated_sharpe(daily, 1)
    assert one.probability == pytest.approx(probabilistic_sharpe(daily, 0.0))
    many = deflated_sharpe(daily, 100)
    assert many.probability < one.probability
    assert many.expected_best > 0
    with pytest.raises(ValueError, match="3 days and 1 trial"):
        deflated_sharpe(daily, 0)
