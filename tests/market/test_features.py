"""Features against loops over one name's traded days; and nothing that comes later may change a bit of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.market.features import (
    PRICE_FEATURES,
    SIGMA_FLOOR,
    at_limit,
    bar_inputs,
    cross_rank,
    forward_returns,
    known_bars,
    log_returns,
    price_features,
    price_limits,
    rolling,
    sessions_missed,
)
from fireflyer.market.panel import How, Panel
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(3, days=130, names=20)
CLOSES = synthetic_panel(3, days=130, names=20, bars=False)
HOWS: tuple[How, ...] = ("noise", "nan", "truncate")


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@settings(max_examples=12, deadline=None)
@given(row=st.integers(1, 128), how=st.sampled_from(HOWS), seed=st.integers(0, 99))
def test_the_future_changes_no_bit_of_the_past(row: int, how: How, seed: int) -> None:
    changed = PANEL.replace_future(row, how, np.random.default_rng(seed))
    assert same(bar_inputs(changed).values[: row + 1], bar_inputs(PANEL).values[: row + 1])
    assert same(price_features(changed)[: row + 1], price_features(PANEL)[: row + 1])


@pytest.mark.parametrize("how", ["noise", "nan", "truncate"])
def test_each_operator_is_causal_by_itself(how: How) -> None:
    row = 90
    changed = PANEL.replace_future(row, how, np.random.default_rng(0))
    past, now = log_returns(PANEL)[: row + 1], log_returns(changed)[: row + 1]
    assert same(past, now)
    for up, other in zip(at_limit(PANEL), at_limit(changed), strict=True):
        assert same(up[: row + 1], other[: row + 1])
    assert same(sessions_missed(PANEL.traded)[: row + 1], sessions_missed(changed.traded)[: row + 1])


def test_the_same_call_gives_the_same_answer_and_changes_nothing() -> None:
    first = bar_inputs(PANEL).values
    price_features(PANEL)
    assert same(bar_inputs(PANEL).values, first)
    with pytest.raises(ValueError, match="read-only"):
        PANEL.close[0, 0] = 1.0


def test_windows_count_traded_days() -> None:
    """The same bars with sessions of suspension between them have the same own history."""
    name = int(np.argmax(known_bars(PANEL).sum(0)))
    alone = PANEL.select([PANEL.symbols[name]])
    x = log_returns(alone)[:, 0]
    rows = np.flatnonzero(np.isfinite(x))
    for row in rows[60::17]:
        own = x[rows[rows <= row]]
        sigma = max(math.sqrt(float(np.mean(own[-21:-1] ** 2))), SIGMA_FLOOR)
        assert bar_inputs(alone).values[row, 0, 0] == pytest.approx(np.clip(own[-1] / sigma, -6, 6), rel=1e-5)


def naive_features(x: list[float], m: list[float]) -> list[float]:
    """The fifteen, of one name's log returns up to now and the market's on the same days."""
    price = np.cumsum(x)
    last, index = np.array(x[-60:]), np.array(m[-60:])
    covariance = np.cov(last, index, bias=True)
    beta = covariance[0, 1] / max(covariance[1, 1], SIGMA_FLOOR**2)
    rest = math.sqrt(max(covariance[0, 0] - beta * covariance[0, 1], 0))
    twenty = np.array(x[-20:])
    centred = twenty - twenty.mean()
    skewness = (centred**3).mean() / max((centred**2).mean(), SIGMA_FLOOR**2) ** 1.5
    found = [x[-1], *(sum(x[-n:]) for n in (5, 10, 20, 60))]
    found += [math.sqrt(sum(r * r for r in x[-n:])) for n in (5, 20, 60)]
    found += [max(twenty), min(twenty), skewness, beta, rest]
    return [*found, price[-1] - price[-60:].max(), price[-1] - price[-60:].min()]


def test_the_fifteen_against_loops_over_one_names_traded_days() -> None:
    from fireflyer.market.features import market_returns

    found, market = price_features(PANEL), market_returns(PANEL)
    row = 125
    values = {}
    for name in range(len(PANEL.symbols)):
        x = log_returns(PANEL)[: row + 1, name]
        rows = np.flatnonzero(np.isfinite(x))
        if len(rows) >= 60 and rows[-1] == row and PANEL.member[row, name]:
            values[name] = naive_features(x[rows].tolist(), market[rows].tolist())
    assert len(values) > 8
    table = np.array(list(values.values()))
    assert table.shape[1] == len(PRICE_FEATURES)
    others = np.isfinite(found[row, :, 14]).sum()
    assert others == len(values)
    for column, label in enumerate(PRICE_FEATURES):
        if label.endswith("60") or "of 60" in label:  # ranked among the same names
            expected = [(sum(table[:, column] < v) + sum(table[:, column] <= v)) / others - 1 for v in table[:, column]]
            np.testing.assert_allclose(found[row, list(values), column], expected, atol=1e-9, err_msg=label)
        else:  # ranked among more names: the order is theirs
            order = np.argsort(found[row, list(values), column])
            assert (np.diff(table[order, column]) >= -1e-12).all(), label


def test_ranks_share_places_and_span_the_day() -> None:
    values = np.array([[3.0, 1.0, 2.0, 2.0, 9.0, np.nan]])
    there = np.array([[True, True, True, True, False, True]])
    np.testing.assert_allclose(cross_rank(values, there)[0], [0.75, -0.75, 0.0, 0.0, np.nan, np.nan])


def test_rolling_is_a_loop() -> None:
    x = np.random.default_rng(0).normal(size=(30, 2))
    out = rolling(np.maximum, x, 7)
    assert np.isnan(out[:6]).all()
    for row in range(6, 30):
        np.testing.assert_array_equal(out[row], x[row - 6 : row + 1].max(0))
    assert np.isnan(rolling(np.add, x[:3], 7)).all()


# --- Labels


def labelled(panel: Panel, row: int, name: int, horizon: int) -> float:
    """From the panel's own closes, one name at a time."""
    bars = known_bars(panel)
    up, down = at_limit(panel)
    entry, end = row + 1, row + 1 + horizon
    if end >= len(panel.dates) or not (panel.member[row, name] and bars[row, name] and bars[entry, name]):
        return math.nan
    if up[entry, name] or down[entry, name]:
        return math.nan
    held = [day for day in range(entry + 1, end + 1) if bars[day, name]]
    if not held:
        return math.nan
    price = panel.adjusted_close
    return math.log(price[held[-1], name] / price[entry, name])


@pytest.mark.parametrize("horizon", [1, 5])
def test_labels_begin_at_the_fill_and_end_at_the_last_price(horizon: int) -> None:
    found = forward_returns(PANEL, horizon)
    expected = [[labelled(PANEL, row, name, horizon) for name in range(20)] for row in range(130)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isfinite(found).sum() > 1500
    assert np.isnan(found[-1 - horizon :]).all()


def test_names_at_their_limit_on_the_day_of_entry_have_no_label() -> None:
    row, name = 50, int(np.flatnonzero(known_bars(PANEL)[49:60].all(0))[0])
    close = PANEL.close.copy()
    factor = np.ones_like(close)
    limit = 0.2 if PANEL.symbols[name].startswith(("688", "30")) else 0.1
    close[row + 1 :, name] *= close[row, name] * (1 + limit) / close[row + 1, name]
    raised = replace(PANEL, close=close, factor=factor, open=None, high=None, low=None)
    assert at_limit(raised)[0][row + 1, name]
    assert np.isnan(forward_returns(raised, 5)[row, name])


def test_a_name_that_is_suspended_is_not_filled_in() -> None:
    row, name = 60, int(np.flatnonzero(known_bars(PANEL)[40:80].all(0))[0])
    traded = PANEL.traded.copy()
    traded[row : row + 3, name] = False
    cut = replace(PANEL, traded=traded, **{
        field: np.where(traded, getattr(PANEL, field), np.nan)
        for field in ("close", "open", "high", "low", "volume", "amount")
    })  # fmt: skip
    inputs = bar_inputs(cut)
    assert np.isnan(inputs.values[row : row + 3, name]).all()
    missed = inputs.values[row + 3, name, inputs.names.index("sessions missed")]
    assert missed == pytest.approx(math.log1p(3), rel=1e-6)
    # The return after the suspension is over the days without a bar, from the last price that there was.
    assert log_returns(cut)[row + 3, name] == pytest.approx(
        math.log(PANEL.adjusted_close[row + 3, name] / PANEL.adjusted_close[row - 1, name])
    )


def test_panels_without_prices_have_fewer_inputs() -> None:
    assert set(bar_inputs(PANEL).names) - set(bar_inputs(CLOSES).names) == {"open", "high", "low", "volume", "amount"}
    first = bar_inputs(CLOSES).values
    assert np.isfinite(first[known_bars(CLOSES)]).all()
    assert np.isnan(first[~known_bars(CLOSES)]).all()


def test_what_is_no_a_share_has_no_limit() -> None:
    foreign = replace(CLOSES, symbols=("AAPL", "510300.XSHG", *CLOSES.symbols[2:]))
    limits = price_limits(foreign)
    assert np.isinf(limits[:, :2]).all()
    assert set(np.unique(limits[:, 2:])) == {0.1, 0.2}
