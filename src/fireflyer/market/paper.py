"""Trading on paper: each session that has come in is decided and booked, once, in a ledger that survives anything.

In: a panel that grows from day to day, scores for it, settings. Out: an SQLite file. A session and what the account is
after it are one transaction: killed anywhere, the next call goes on after the last session that is booked, and the
decisions are the backtest's, since the desk is the same (engine.py).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fireflyer.errors import UserError
from fireflyer.market.engine import BacktestSettings, Day, Desk
from fireflyer.market.panel import Floats, Panel

_TABLES = """
create table if not exists meta (key text primary key, value text not null);
create table if not exists days (
    date text primary key, nav integer, cash integer, holdings integer, futures integer, fees integer, traded integer,
    stale integer, bars text not null
);
create table if not exists orders (date text, symbol text, shares integer);
create table if not exists fills (
    date text, symbol text, shares integer, price real, money_fen integer, fee_fen integer, decided text, forced integer
);
create table if not exists futures (
    date text, contract text, count integer, points real, fee_fen integer, refused text
);
create table if not exists rejections (date text, symbol text, shares integer, decided text, reason text);
"""


def trade_on_paper(
    panel: Panel,
    scores: Floats,
    settings: BacktestSettings,
    ledger: str | Path,
    *,
    start: str | None = None,
    on_day: Callable[[str, Day], None] = lambda date, day: None,
) -> list[str]:
    """Book every session that the ledger doesn't have yet; the dates booked by this call.

    Args:
        scores: (D, N), of which each session's are read when it is decided.
        start: the first session of a new ledger; default the first with a score. An old one knows its own.

    Raises:
        UserError: other settings than the ledger's; bars that were traded on and have changed since; a name that is
            held and has vanished; a file that is no ledger.
    """
    path = Path(ledger)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path)) as book:
            book.executescript(_TABLES)
            return _go_on(book, path, panel, scores, settings, start, on_day)
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: no ledger, or one that can't be written ({error}); give another file") from None


def _go_on(
    book: sqlite3.Connection,
    path: Path,
    panel: Panel,
    scores: Floats,
    settings: BacktestSettings,
    start: str | None,
    on_day: Callable[[str, Day], None],
) -> list[str]:
    meta = dict(book.execute("select key, value from meta"))
    begun = _begun(book, path, meta, panel, scores, settings, start)
    panel, scores = panel.slice(begun, len(panel.dates)), scores[begun:]
    desk = Desk(panel, settings)
    booked = list(book.execute("select date, bars from days order by date"))
    _check_bars(path, panel, booked)
    if booked:
        desk.take_up(json.loads(meta["state"]))
    dates = []
    for row in range(len(booked), len(panel.dates)):
        date = str(panel.dates[row])
        day = desk.day(row, scores[row])
        with book:
            _book(book, panel, date, row, day)
            book.execute("insert or replace into meta values ('state', ?)", (json.dumps(desk.state()),))
        on_day(date, day)
        dates.append(date)
    return dates


def _begun(
    book: sqlite3.Connection,
    path: Path,
    meta: dict[str, str],
    panel: Panel,
    scores: Floats,
    settings: BacktestSettings,
    start: str | None,
) -> int:
    """The row of the ledger's first session. Raises UserError for another account, or none to begin."""
    words = json.dumps(asdict(settings), sort_keys=True)
    if "settings" in meta:
        old, new = json.loads(meta["settings"]), json.loads(words)
        changed = [f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new.get(key)]
        if changed:
            raise UserError(f"{path} is the ledger of another account: {'; '.join(changed)}; give another --ledger")
        row = panel.row(meta["start"])
        if row == len(panel.dates) or str(panel.dates[row]) != meta["start"]:
            raise UserError(f"{path} begins on {meta['start']}, which {panel.origin.source} lacks; give the same bars")
        return row
    scored = np.isfinite(scores).any(axis=1)
    if start is None and not scored.any():
        raise UserError(f"no score on any session of {panel.origin.source}: nothing to begin with")
    row = int(np.argmax(scored)) if start is None else panel.row(start)
    if row == len(panel.dates):
        raise UserError(f"--start {start}: after the last session there is, {panel.dates[-1]}")
    Desk(panel.slice(row, row + 1), settings)  # what it refuses is refused before anything is written
    with book:
        book.execute("insert into meta values ('settings', ?)", (words,))
        book.execute("insert into meta values ('start', ?)", (str(panel.dates[row]),))
    return row


def _check_bars(path: Path, panel: Panel, booked: list[tuple[str, str]]) -> None:
    if len(booked) > len(panel.dates):
        raise UserError(f"{path} has booked {booked[-1][0]}, and the bars end on {panel.dates[-1]}; give all of them")
    for row, (date, bars) in enumerate(booked):
        if str(panel.dates[row]) != date:
            raise UserError(f"{path} has booked {date}, where the bars have {panel.dates[row]}; give the same sessions")
        if bars_of(panel, row) != bars:
            raise UserError(
                f"{panel.origin.source}: the bars of {date} have changed since they were traded on ({path}); a ledger"
                " isn't rewritten: give the bars as they were, or begin another"
            )


def bars_of(panel: Panel, row: int) -> str:
    """SHA-256 over the closes of a session, by name; names that come later change nothing."""
    on = np.flatnonzero(panel.traded[row]).tolist()
    lines = sorted(f"{panel.symbols[name]} {float(panel.close[row, name])!r}" for name in on)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _book(book: sqlite3.Connection, panel: Panel, date: str, row: int, day: Day) -> None:
    nav = day.cash + day.holdings + day.futures
    money = (nav, day.cash, day.holdings, day.futures, day.fees, day.traded, day.stale)
    book.execute("insert into days values (?, ?, ?, ?, ?, ?, ?, ?, ?)", (date, *money, bars_of(panel, row)))
    book.executemany("insert into orders values (?, ?, ?)", [(date, o.symbol, o.shares) for o in day.orders])
    book.executemany(
        "insert into fills values (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (date, f.symbol, f.shares, f.price, f.money_fen, f.fee_fen, str(panel.dates[f.signal_row]), int(f.forced))
            for f in day.fills
        ],
    )
    book.executemany(
        "insert into rejections values (?, ?, ?, ?, ?)",
        [(date, r.symbol, r.shares, str(panel.dates[r.signal_row]), r.reason) for r in day.rejections],
    )
    book.executemany(
        "insert into futures values (?, ?, ?, ?, ?, ?)",
        [(date, t.contract, t.count, t.points, t.fee_fen, t.refused) for t in day.futures_trades],
    )
