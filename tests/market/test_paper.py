"""Trading on paper: the backtest's decisions whatever way the sessions come in, and a ledger that survives a kill."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.engine import BacktestResult, BacktestSettings, backtest
from fireflyer.market.panel import Floats, Panel
from fireflyer.market.paper import trade_on_paper
from fireflyer.market.portfolio import TopK
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(11, days=120, names=25, signal=0.2)
SETTINGS = BacktestSettings(portfolio=TopK(8, 2, every=2), mode="market-neutral", future="IF")


def scores_of(panel: Panel) -> Floats:
    adjusted = panel.adjusted_close
    scores = np.full(panel.shape, np.nan)
    scores[5:] = 1 - adjusted[5:] / adjusted[:-5]
    return scores


def whole() -> BacktestResult:
    return backtest(PANEL.slice(5, 120), scores_of(PANEL)[5:], SETTINGS)


def booked(ledger: Path) -> tuple[list, list, list]:
    with sqlite3.connect(ledger) as book:
        return (
            list(
                book.execute("select date, nav, cash, holdings, futures, fees, traded, stale from days order by date")
            ),
            list(book.execute("select date, symbol, shares from orders order by rowid")),
            list(book.execute("select date, symbol, shares, price, money_fen, fee_fen from fills order by rowid")),
        )


def expected() -> tuple[list, list, list]:
    result = whole()
    dates = [str(date) for date in result.dates]
    columns = (result.nav, result.cash, result.holdings, result.futures, result.fees, result.traded, result.stale)
    return (
        [(date, *(int(values[row]) for values in columns)) for row, date in enumerate(dates)],
        [(dates[o.signal_row], o.symbol, o.shares) for o in result.orders],
        [(dates[f.fill_row], f.symbol, f.shares, f.price, f.money_fen, f.fee_fen) for f in result.fills],
    )


def test_day_by_day_or_at_once_it_is_the_backtest(tmp_path: Path) -> None:
    at_once, daily, in_weeks = (tmp_path / f"{name}.sqlite" for name in ("once", "daily", "weeks"))
    assert len(trade_on_paper(PANEL, scores_of(PANEL), SETTINGS, at_once)) == 115
    for stop in range(6, 121):
        part = PANEL.slice(0, stop)
        assert len(trade_on_paper(part, scores_of(part), SETTINGS, daily)) == 1
    for stop in (20, 20, 61, 120):
        part = PANEL.slice(0, stop)
        trade_on_paper(part, scores_of(part), SETTINGS, in_weeks)
    assert booked(at_once) == expected()
    assert booked(daily) == expected()
    assert booked(in_weeks) == expected()
    assert len(expected()[2]) > 50


def test_names_that_come_in_later_change_nothing(tmp_path: Path) -> None:
    """The panel of the first weeks lacks the names that have no bar yet, so that columns move."""
    first = PANEL.slice(0, 15)
    there = [symbol for symbol, bars in zip(first.symbols, first.traded.sum(0).tolist(), strict=True) if bars]
    assert len(there) < len(PANEL.symbols)
    early = first.select(there)
    trade_on_paper(replace(early, index_close=first.index_close), scores_of(early), SETTINGS, tmp_path / "ledger")
    trade_on_paper(PANEL, scores_of(PANEL), SETTINGS, tmp_path / "ledger")
    assert booked(tmp_path / "ledger") == expected()


_SLOW = """
import sys, time
from tests.market.test_paper import *
def slowly(date, day):
    print(date, flush=True)
    time.sleep(0.02)
trade_on_paper(PANEL, scores_of(PANEL), SETTINGS, sys.argv[1], on_day=slowly)
"""


def test_killed_between_any_two_steps_it_goes_on(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    for delay in (0.05, 0.2, 0.01):
        process = subprocess.Popen([sys.executable, "-c", _SLOW, str(ledger)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline()  # a session is booked
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    days = booked(ledger)[0]
    assert 3 <= len(days) < 115
    trade_on_paper(PANEL, scores_of(PANEL), SETTINGS, ledger)
    assert booked(ledger) == expected()


def test_what_is_refused(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    part = PANEL.slice(0, 40)
    trade_on_paper(part, scores_of(part), SETTINGS, ledger)
    before = ledger.read_bytes()
    with pytest.raises(UserError, match=r"another account: mode: market-neutral -> long-only"):
        trade_on_paper(PANEL, scores_of(PANEL), replace(SETTINGS, mode="long-only"), ledger)
    close = np.array(PANEL.close)
    row, name = 20, int(np.flatnonzero(PANEL.traded[20])[0])
    assert PANEL.open is not None
    close[row, name] = PANEL.open[row, name] + 0.01 * (PANEL.open[row, name] == close[row, name])
    changed = replace(PANEL, close=close, high=np.fmax(PANEL.high, close), low=np.fmin(PANEL.low, close))  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(UserError, match=f"the bars of {PANEL.dates[row]} have changed since they were traded on"):
        trade_on_paper(changed, scores_of(changed), SETTINGS, ledger)
    with pytest.raises(UserError, match="give all of them"):
        trade_on_paper(PANEL.slice(0, 30), scores_of(PANEL)[:30], SETTINGS, ledger)
    with pytest.raises(UserError, match="lacks; give the same bars"):
        trade_on_paper(PANEL.slice(50, 100), scores_of(PANEL)[50:100], SETTINGS, ledger)
    with sqlite3.connect(ledger) as book:
        state = json.loads(book.execute("select value from meta where key = 'state'").fetchone()[0])
    held = next(symbol for symbol, shares, *_ in state["names"] if shares)
    without = PANEL.select([symbol for symbol in PANEL.symbols if symbol != held])
    with pytest.raises(UserError, match=r"have changed|has vanished"):
        trade_on_paper(without, scores_of(without), SETTINGS, ledger)
    assert ledger.read_bytes() == before
    (tmp_path / "text").write_text("not a database, but quite long enough to be looked at" * 20)
    with pytest.raises(UserError, match="no ledger"):
        trade_on_paper(PANEL, scores_of(PANEL), SETTINGS, tmp_path / "text")
    with pytest.raises(UserError, match="no score on any session"):
        trade_on_paper(part, np.full(part.shape, np.nan), SETTINGS, tmp_path / "new.sqlite")
