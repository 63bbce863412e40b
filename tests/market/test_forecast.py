"""Fans, risk and coverage against counts by hand; Kupiec's test against its published critical regions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.features import forward_returns
from fireflyer.market.forecast import calibration, fan, kupiec, path_risk
from fireflyer.market.heads import QUANTILES
from fireflyer.market.network import Forecast
from fireflyer.market.synthetic import synthetic_panel
from fireflyer.market.tokens import Scenarios

PANEL = synthetic_panel(8, days=400, names=40, signal=0.0, bars=False)


def honest(horizon: int) -> Forecast:
    """The unconditional quantiles of the made-up market, for every name and day."""
    ahead = forward_returns(PANEL, horizon)
    levels = np.nanquantile(ahead, QUANTILES)
    quantiles = np.broadcast_to(levels, (*PANEL.shape, 1, 5)).copy()
    return Forecast((horizon,), np.zeros((*PANEL.shape, 1)), quantiles, np.zeros((400, 1, 8)))


@pytest.mark.parametrize("horizon", [1, 5])
def test_honest_quantiles_are_covered(horizon: int) -> None:
    found = calibration(honest(horizon), PANEL, slice(0, 400))
    assert [coverage.level for coverage in found] == list(QUANTILES)
    for coverage in found:
        assert coverage.share == pytest.approx(coverage.level, abs=0.005)
        assert coverage.count == np.isfinite(forward_returns(PANEL, horizon)).sum()


def test_quantiles_that_are_too_narrow_are_found_out() -> None:
    narrow = honest(1)
    narrow = Forecast(narrow.horizons, narrow.scores, narrow.quantiles * 0.5, narrow.expert_load)
    low, *_, high = calibration(narrow, PANEL, slice(0, 400))
    assert low.share > 0.05 + 5 * low.standard_error
    assert high.share < 0.95 - 5 * high.standard_error
    right = calibration(honest(1), PANEL, slice(0, 400))[0]
    assert low.names_passing < right.names_passing - 0.3


@pytest.mark.parametrize(
    ("trials", "probability", "accepted"),
    [(510, 0.05, range(17, 36)), (1000, 0.05, range(38, 65)), (255, 0.05, range(7, 21)), (1000, 0.01, range(5, 17))],
)
def test_kupiec_accepts_what_his_table_accepts(trials: int, probability: float, accepted: range) -> None:
    """Non-rejection regions at 5 %, from the table of Kupiec (1995) as textbooks print it (Jorion, Value at Risk)."""
    passed = [count for count in range(trials // 3) if kupiec(count, trials, probability)[1] > 0.05]
    assert passed == list(accepted)


def test_kupiec_by_its_formula() -> None:
    ratio, p = kupiec(12, 250, 0.025)
    share = 12 / 250
    expected = -2 * math.log((0.975**238 * 0.025**12) / ((1 - share) ** 238 * share**12))
    assert ratio == pytest.approx(expected)
    assert p == pytest.approx(math.erfc(math.sqrt(expected / 2)))
    assert kupiec(0, 0, 0.05) == (0.0, 1.0)
    assert kupiec(5, 100, 0.05)[1] == 1.0
    with pytest.raises(ValueError, match="can't be tested"):
        kupiec(5, 4, 0.05)


def test_a_fan_is_in_simple_returns_and_a_missing_one_is_named() -> None:
    forecast = honest(5)
    drawn = fan(forecast, PANEL, 300, PANEL.symbols[3])
    np.testing.assert_allclose(drawn.returns, np.expm1(forecast.quantiles[300, 3]))
    forecast.quantiles[300, 3] = math.nan
    with pytest.raises(UserError, match="no forecast"):
        fan(forecast, PANEL, 300, PANEL.symbols[3])
    with pytest.raises(UserError, match="not among the 40 names"):
        fan(forecast, PANEL, 300, "000000.XSHE")


def test_risk_is_read_off_the_paths() -> None:
    returns = np.linspace(-0.5, 0.49, 100)
    (risk,) = path_risk(Scenarios(("A",), np.log1p(returns)[None, :, None]), 0.95)
    assert risk.worst == pytest.approx(0.5)
    assert risk.value_at_risk == pytest.approx(0.4505, abs=1e-3)
    assert risk.expected_shortfall == pytest.approx(np.mean([0.5, 0.49, 0.48, 0.47, 0.46]))
