"""From rows of (date, symbol, bar) to a panel: the one place where bars of any source are checked and laid out.

In: columns as numpy arrays, and where each row stands in its file. Out: a Panel. Nothing is filled: a name and day
without a row has no bar. What is wrong is named with file, line, date and symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.market.panel import Dates, Floats, Mask, Origin, Panel, Universe

NUMBERS = ("open", "high", "low", "close", "volume", "amount", "factor")
_BESIDE_CLOSE = ("open", "high", "low", "volume", "amount")
SHRUNKEN = 0.5
"""A universe that loses more than this share of its names from one session to the next has lost data, not names."""


@dataclass(frozen=True)
class LongTable:
    """One row a bar. dates: (R,) text or dates, of one kind; symbols: (R,); numbers: (R,) by name, `close` among them.

    first_line: of the first row in its file, for messages; lines: (R,) of every row, where one doesn't follow the
    other.
    """

    source: str
    dates: Sequence[object]
    symbols: Sequence[str]
    numbers: dict[str, Floats]
    first_line: int = 2
    lines: NDArray[np.int64] | None = None

    def line(self, row: int) -> int:
        """Of a row, in its file."""
        return self.first_line + row if self.lines is None else int(self.lines[row])

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.source} line {self.line(row)}: {self.dates[row]} {self.symbols[row]}"


@dataclass(frozen=True)
class Membership:
    """(symbol, first day, day after the last or None) spells of a universe, point in time."""

    name: str
    spells: Sequence[tuple[str, np.datetime64, np.datetime64 | None]]


def to_panel(
    table: LongTable,
    *,
    universe: Universe = "as recorded",
    membership: Membership | None = None,
    index: tuple[Dates, Floats] | None = None,
    today: np.datetime64 | None = None,
    sha256: str = "",
) -> Panel:
    """Check and lay out.

    Args:
        membership: who belongs to the universe when; None: whoever has a bar, so that only what the file holds counts.
        index: (dates, closes) of the benchmark; None: the mean of the members' returns, each alike.
        today: bars after it lie in the future and are refused; None: not asked.

    Raises:
        UserError: with source, line, date and symbol.
    """
    if not len(table.symbols):
        raise UserError(f"{table.source}: no rows; it needs date, symbol and close")
    dates = session_dates(table)
    if today is not None and (dates > today).any():
        raise UserError(f"{table.place(int(np.argmax(dates > today)))}: lies in the future; today is {today}")
    sessions, day = np.unique(dates, return_inverse=True)
    symbols, name = np.unique(np.asarray(table.symbols, dtype=str), return_inverse=True)
    _check_order(table, dates, day, name)
    shape = (len(sessions), len(symbols))
    numbers = {key: _laid_out(table.numbers[key], day, name, shape) for key in NUMBERS if key in table.numbers}
    close = numbers["close"]
    volume = numbers.get("volume")
    _check_numbers(table, numbers, day, name)
    bar = np.isfinite(close)
    traded = bar if volume is None else bar & ~(volume == 0)
    if (empty := traded.sum(axis=1) == 0).any():
        day_without = sessions[int(np.argmax(empty))]
        raise UserError(f"{table.source}: {day_without}: no name traded; leave the day out, or get its bars")
    member = bar if membership is None else members(membership, sessions, tuple(symbols.tolist()), table.source)
    _check_universe(table.source, sessions, member)
    factor = numbers.get("factor")
    panel = Panel(
        dates=sessions,
        symbols=tuple(symbols.tolist()),
        close=np.where(traded, close, np.nan),
        factor=np.ones(shape, np.float64) if factor is None else carried(factor),
        traded=traded,
        member=member,
        index_close=np.ones(len(sessions), np.float64),
        origin=Origin(table.source, universe, close_only="open" not in numbers, sha256=sha256),
        **{key: np.where(traded, numbers[key], np.nan) for key in _BESIDE_CLOSE if key in numbers},
    )
    return with_index(panel, index)


def session_dates(table: LongTable) -> Dates:
    """The rows' dates, without a zone. Raises UserError for zones, times of day that differ, and what is no date."""
    found = np.empty(len(table.dates), "datetime64[D]")
    for row, value in enumerate(table.dates):
        zone = getattr(value, "tzinfo", None)
        text = str(value)
        if zone is not None or text.endswith("Z") or (len(text) > 19 and text[19] in "+-"):
            raise UserError(
                f"{table.place(row)}: a time with a zone; bars are dated by session, in exchange time: convert them, as"
                " 2024-06-28"
            )
        compact = len(text) == 8 and text.isdigit()
        try:
            found[row] = np.datetime64(f"{text[:4]}-{text[4:6]}-{text[6:]}" if compact else text[:10], "D")
        except ValueError:
            raise UserError(f"{table.place(row)}: {shown(text)} is no date, as 2024-06-28 or 20240628") from None
        if np.isnat(found[row]):
            raise UserError(f"{table.place(row)}: no date; every bar has its session's")
    return found


def members(membership: Membership, sessions: Dates, symbols: tuple[str, ...], source: str) -> Mask:
    """(D, N) from spells. Raises UserError for spells that overlap, and names that have no bars at all."""
    column = {symbol: place for place, symbol in enumerate(symbols)}
    member = np.zeros((len(sessions), len(symbols)), bool)
    seen: dict[str, list[tuple[np.datetime64, np.datetime64 | None]]] = {}
    for symbol, start, stop in membership.spells:
        seen.setdefault(symbol, []).append((start, stop))
    for symbol, spells in seen.items():
        spells.sort(key=lambda spell: spell[0])
        for (_, stop), (start, _) in pairwise(spells):
            if stop is None or start < stop:
                raise UserError(f"{membership.name}: {symbol}: two spells overlap at {start}; each day counts once")
        for start, stop in spells:
            if symbol in column:
                member[:, column[symbol]] |= (sessions >= start) & (True if stop is None else sessions < stop)
    wanted = {s for s, spells in seen.items() if any(_meets(spell, sessions) for spell in spells)}
    lacking = sorted(wanted - column.keys())
    if lacking:
        raise UserError(
            f"{source}: {len(lacking)} of {len(wanted)} members of {membership.name} have no bars, {lacking[0]} first;"
            " a universe of those that are there would be another one: get their bars, or leave the universe out"
        )
    return member


def with_index(panel: Panel, index: tuple[Dates, Floats] | None) -> Panel:
    """The panel with its benchmark: given, or the mean of the members' returns. UserError where a session lacks."""
    if index is None:
        returns = panel.returns()
        known = np.isfinite(returns) & panel.member
        mean = np.where(known, returns, 0.0).sum(1) / np.maximum(known.sum(1), 1)
        return replace(panel, index_close=1000 * np.cumprod(1 + mean, dtype=np.float64))
    dates, closes = index
    place = np.searchsorted(dates, panel.dates)
    there = (place < len(dates)) & (dates[np.minimum(place, len(dates) - 1)] == panel.dates)
    if not there.all():
        raise UserError(f"{panel.origin.source}: the index has no close on {panel.dates[int(np.argmin(there))]}")
    return replace(panel, index_close=np.asarray(closes, np.float64)[place])


def carried(factor: Floats) -> Floats:
    """An adjustment factor holds until the next is known; before the first it is the first."""
    rows = np.where(np.isfinite(factor), np.arange(len(factor))[:, None], -1)
    latest = np.maximum.accumulate(rows, axis=0)
    first = np.argmax(np.isfinite(factor), axis=0)
    place = np.where(latest >= 0, latest, first[None])
    filled = np.take_along_axis(factor, place, axis=0)
    return np.where(np.isfinite(filled), filled, 1.0)


def _meets(spell: tuple[np.datetime64, np.datetime64 | None], sessions: Dates) -> bool:
    return spell[0] <= sessions[-1] and (spell[1] is None or spell[1] > sessions[0])


def _laid_out(values: Floats, day: NDArray, name: NDArray, shape: tuple[int, int]) -> Floats:
    grid = np.full(shape, np.nan)
    grid[day, name] = values
    return grid


def _check_order(table: LongTable, dates: Dates, day: NDArray, name: NDArray) -> None:
    keys = day.astype(np.int64) * (int(name.max()) + 1) + name
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(twice):
        row, earlier = int(order[twice[0] + 1]), int(order[twice[0]])
        raise UserError(f"{table.place(row)}: a second bar of that name and day, the first is line"
                        f" {table.line(earlier)}; keep one")  # fmt: skip
    by_name = np.lexsort((np.arange(len(name)), name))
    falling = (name[by_name][1:] == name[by_name][:-1]) & (dates[by_name][1:] < dates[by_name][:-1])
    if falling.any() and not _falls_throughout(dates, name):
        row = int(by_name[int(np.argmax(falling)) + 1])
        raise UserError(f"{table.place(row)}: comes after a later day of that name; sort the rows by date")


def _falls_throughout(dates: Dates, name: NDArray) -> bool:
    """The newest first, as some vendors give it: that is an order too."""
    by_name = np.lexsort((np.arange(len(name)), name))
    same = name[by_name][1:] == name[by_name][:-1]
    return bool((dates[by_name][1:][same] < dates[by_name][:-1][same]).all())


def _check_numbers(table: LongTable, numbers: dict[str, Floats], day: NDArray, name: NDArray) -> None:
    """What the panel would refuse too, here with the line."""

    def refuse(wrong: NDArray, text: str) -> None:
        rows = wrong[day, name]
        if rows.any():
            raise UserError(f"{table.place(int(np.argmax(rows)))}: {text}")

    close, volume = numbers["close"], numbers.get("volume")
    on = np.isfinite(close) if volume is None else np.isfinite(close) & ~(volume == 0)
    with np.errstate(invalid="ignore"):
        for key in ("open", "high", "low", "close"):
            if key in numbers:
                refuse(np.isfinite(close) & (numbers[key] <= 0), f"{key} isn't above 0")
                if key != "close":
                    refuse(on & ~np.isfinite(numbers[key]), f"a close but no {key}")
        for key in ("volume", "amount"):
            if key in numbers:
                refuse(numbers[key] < 0, f"{key} is below 0")
        if "high" in numbers and "low" in numbers:
            high, low = numbers["high"], numbers["low"]
            refuse(on & (high < low), "the high lies below the low")
            for key in ("open", "close"):
                if key in numbers:
                    refuse(on & ((numbers[key] > high * (1 + 1e-9)) | (numbers[key] < low * (1 - 1e-9))),
                           f"the {key} lies outside low and high")  # fmt: skip
        if "factor" in numbers:
            refuse(numbers["factor"] <= 0, "the adjustment factor isn't above 0")


def _check_universe(source: str, sessions: Dates, member: Mask) -> None:
    counts = member.sum(1)
    if (counts == 0).any():
        raise UserError(f"{source}: {sessions[int(np.argmax(counts == 0))]}: the universe is empty")
    fell = np.flatnonzero(counts[1:] < counts[:-1] * (1 - SHRUNKEN))
    if len(fell):
        row = int(fell[0]) + 1
        raise UserError(
            f"{source}: {sessions[row]}: the universe shrinks from {counts[row - 1]} names to {counts[row]}; bars are"
            " missing"
        )
