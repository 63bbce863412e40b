"""The panel: returns over suspensions and splits against a plain loop, what it refuses, that nothing writes to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.panel import Panel
from fireflyer.market.synthetic import synthetic_panel


def returns_by_hand(panel: Panel) -> np.ndarray:
    days, names = panel.shape
    found = np.full((days, names), np.nan)
    for name in range(names):
        last = None
        for day in range(days):
            if not panel.traded[day, name]:
                continue
            price = panel.close[day, name] * panel.factor[day, name]
            if last is not None:
                found[day, name] = price / last - 1
            last = price
    return found


def test_returns_over_suspensions_splits_and_late_listings() -> None:
    panel = synthetic_panel(3, days=300, names=40)
    assert (~panel.traded & panel.member).any()
    assert (np.diff(panel.factor, axis=0) != 0).any()
    np.testing.assert_allclose(panel.returns(), returns_by_hand(panel), rtol=1e-12)


def test_the_made_up_market_has_its_limits_and_its_signal() -> None:
    panel = synthetic_panel(0, days=600, names=120, signal=0.15)
    reference = np.round(panel.close[:-1] / (panel.factor[1:] / panel.factor[:-1]), 2)
    moves = panel.close[1:] / reference - 1
    both = panel.traded[1:] & panel.traded[:-1]
    growth = np.array([symbol.startswith(("30", "688")) for symbol in panel.symbols])
    main = moves[:, ~growth][both[:, ~growth]]
    assert np.abs(main).max() < 0.10 + 0.01 / 2
    assert (main > 0.0985).any()
    assert np.abs(moves[:, growth][both[:, growth]]).max() > 0.11
    returns = np.nan_to_num(panel.returns())
    five = np.lib.stride_tricks.sliding_window_view(returns, 5, axis=0).sum(-1)[:-1]
    assert np.corrcoef(five.ravel(), returns[5:].ravel())[0, 1] < -0.02


def test_the_same_seed_gives_the_same_panel() -> None:
    one, other, third = synthetic_panel(1, days=50), synthetic_panel(1, days=50), synthetic_panel(2, days=50)
    np.testing.assert_array_equal(one.close, other.close)
    assert not np.array_equal(one.close, third.close, equal_nan=True)


def test_nothing_writes_to_it() -> None:
    panel = synthetic_panel(0, days=20, names=5)
    for array in (panel.close, panel.traded, panel.index_close, panel.adjusted_close, panel.dates):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[1]
    source = np.array(panel.close)
    mine = replace(panel, close=source)
    source[:] = 1.0
    np.testing.assert_array_equal(mine.close, panel.close)


@pytest.mark.parametrize("how", ["noise", "nan", "truncate"])
def test_another_future_leaves_the_past(how: str) -> None:
    panel = synthetic_panel(5, days=80, names=12)
    other = panel.replace_future(40, how, np.random.default_rng(0))  # pyright: ignore[reportArgumentType]
    for name in ("close", "open", "high", "low", "volume", "amount", "factor", "traded", "member"):
        np.testing.assert_array_equal(getattr(other, name)[:41], getattr(panel, name)[:41])
    np.testing.assert_array_equal(other.returns()[:41], panel.returns()[:41])
    if how == "truncate":
        assert other.shape == (41, 12)
    else:
        assert not np.array_equal(other.close[41:], panel.close[41:], equal_nan=True)


def test_rows_and_names() -> None:
    panel = synthetic_panel(0, days=60, names=8, first="2021-01-04")
    assert panel.row("2021-01-09") == panel.row("2021-01-11") == 5
    assert panel.row("2030-01-01") == 60
    picked = panel.select([panel.symbols[3], panel.symbols[0]])
    np.testing.assert_array_equal(picked.close[:, 1], panel.close[:, 0])
    assert panel.slice(10, 20).dates[0] == panel.dates[10]
    with pytest.raises(UserError, match=r"no symbol '999999\.XSHG'"):
        panel.select(["999999.XSHG"])


def changed(panel: Panel, name: str, row: int, column: int, value: float) -> Panel:
    array = np.array(getattr(panel, name))
    array[row, column] = value
    return replace(panel, **{name: array})


def test_what_is_refused() -> None:
    panel = synthetic_panel(0, days=30, names=4)
    date, symbol = str(panel.dates[7]), panel.symbols[0]
    place = f"{date} {symbol}"
    with pytest.raises(UserError, match=f"{place}: the high lies below the low"):
        changed(panel, "high", 7, 0, 0.01)
    with pytest.raises(UserError, match=f"{place}: traded, but without a close"):
        changed(panel, "close", 7, 0, np.nan)
    with pytest.raises(UserError, match=f"{place}: traded, but open isn't above 0"):
        changed(panel, "open", 7, 0, -1)
    with pytest.raises(UserError, match=f"{place}: the open lies outside"):
        changed(panel, "open", 7, 0, panel.high[7, 0] * 2 if panel.high is not None else 0)
    with pytest.raises(UserError, match=f"{place}: an adjustment factor"):
        changed(panel, "factor", 7, 0, 0.0)
    dates = panel.dates.copy()
    dates[7] = dates[6]
    with pytest.raises(UserError, match="each once"):
        replace(panel, dates=dates)
    with pytest.raises(UserError, match="more than once"):
        replace(panel, symbols=(panel.symbols[0],) * 4)
    with pytest.raises(UserError, match="without zone"):
        replace(panel, dates=panel.dates.astype("datetime64[ns]"))
    with pytest.raises(UserError, match=r"volume is \(30, 3\)"):
        replace(panel, volume=np.array(panel.volume)[:, :3])
    with pytest.raises(UserError, match="a panel of 0 dates"):
        panel.slice(0, 0)
