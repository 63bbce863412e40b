"""Bars of many names over many sessions: what every part of the desk reads, and nothing may change.

Prices are raw, as money was; `factor` says what splits and dividends did to them, and returns are of adjusted prices.
A name without a bar on a day has NaN, never a price of another day. Dates are sessions in exchange time, without zone.

Shapes: D dates · N names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fireflyer.config.messages import shown
from fireflyer.errors import UserError

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Dates = NDArray[np.datetime64]

Universe = Literal["point-in-time", "survivors", "as recorded", "synthetic"]
How = Literal["noise", "nan", "truncate"]

PRICES = ("open", "high", "low", "close")


@dataclass(frozen=True)
class Origin:
    """Where a panel comes from, printed at the head of every report.

    universe: how its names were chosen. close_only: no opens, highs and lows. nominal_prices: prices were made from
    returns, beginning at 10.00. sha256: of the file or files that were read.
    """

    source: str
    universe: Universe
    close_only: bool
    nominal_prices: bool = False
    sha256: str = ""


@dataclass(frozen=True)
class Panel:
    """dates: (D,) datetime64[D], rising. symbols: N, as "600000.XSHG". All else (D, N), but index_close: (D,).

    traded: False while suspended and where there is no bar. member: of the universe at that date's close. factor:
    adjusted price over raw price. amount: money traded. The arrays are copies that can't be written to.
    """

    dates: Dates
    symbols: tuple[str, ...]
    close: Floats
    factor: Floats
    traded: Mask
    member: Mask
    index_close: Floats
    origin: Origin
    open: Floats | None = None
    high: Floats | None = None
    low: Floats | None = None
    volume: Floats | None = None
    amount: Floats | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                kept = value.copy()
                kept.flags.writeable = False
                object.__setattr__(self, field.name, kept)
        _check(self)

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N)."""
        return self.close.shape[0], self.close.shape[1]

    @cached_property
    def adjusted_close(self) -> Floats:
        """(D, N) close · factor."""
        return _read_only(self.close * self.factor)

    @cached_property
    def previous_bar(self) -> NDArray[np.int64]:
        """(D, N): the row of the last day before on which the name traded; -1 where it had not yet."""
        days, names = self.shape
        rows = np.where(self.traded, np.arange(days)[:, None], -1)
        latest = np.maximum.accumulate(rows, axis=0)
        return _read_only(np.vstack([np.full((1, names), -1), latest[:-1]]))

    def returns(self) -> Floats:
        """(D, N) simple returns from the close of the last traded day to this one's; NaN without either."""
        before = np.take_along_axis(self.adjusted_close, np.maximum(self.previous_bar, 0), axis=0)
        known = self.traded & (self.previous_bar >= 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(known, self.adjusted_close / before - 1, np.nan)

    def index_returns(self) -> Floats:
        """(D,) simple returns of the index; the first is NaN."""
        return np.concatenate([[np.nan], self.index_close[1:] / self.index_close[:-1] - 1])

    def row(self, date: np.datetime64 | str) -> int:
        """The row of the first session on or after a date; D where there is none."""
        return int(np.searchsorted(self.dates, np.asarray(date, "datetime64[D]")))

    def slice(self, start: int, stop: int) -> Panel:
        """Rows from `start` to before `stop`."""
        return self._of_rows(slice(start, stop))

    def select(self, symbols: Sequence[str]) -> Panel:
        """These names, in this order. Raises UserError for one that isn't there."""
        place = {symbol: column for column, symbol in enumerate(self.symbols)}
        missing = [symbol for symbol in symbols if symbol not in place]
        if missing:
            raise UserError(f"{self.origin.source}: no symbol {shown(missing[0])} among its {len(self.symbols)}")
        columns = [place[symbol] for symbol in symbols]
        changed = {name: array[:, columns] for name, array in self._arrays().items() if array.ndim == 2}
        return replace(self, symbols=tuple(symbols), **changed)

    def replace_future(self, row: int, how: How, rng: np.random.Generator) -> Panel:
        """The same up to `row`, and after it other numbers, none, or no rows at all: for tests of causality.

        A result that is known at `row` must not differ to the bit.
        """
        if how == "truncate":
            return self.slice(0, row + 1)
        changed: dict[str, NDArray] = {}
        later = slice(row + 1, None)
        for name, array in self._arrays().items():
            new = array.copy()
            if array.dtype == np.bool_:
                if how == "nan":
                    new[later] = False
                else:
                    new[later] &= rng.random(array[later].shape) < 0.9
            elif how == "nan":
                new[later] = np.nan
            else:
                new[later] *= np.exp(rng.normal(0, 0.3, array[later].shape))
            changed[name] = new
        if how == "noise":  # bars stay bars: the high is the highest, the low the lowest
            _order_bars_(changed, later)
        changed["index_close"] = changed["index_close"] if how == "noise" else self.index_close
        return replace(self, **changed)

    def _of_rows(self, rows: slice) -> Panel:
        changed = {name: array[rows] for name, array in self._arrays().items()}
        return replace(self, dates=self.dates[rows], **changed)

    def _arrays(self) -> dict[str, NDArray]:
        """By name, whatever has dates for its first axis; the dates apart."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, np.ndarray) and name != "dates"}


def _read_only(array: NDArray) -> NDArray:
    array.flags.writeable = False
    return array


def _order_bars_(arrays: dict[str, NDArray], rows: slice) -> None:
    there = [name for name in PRICES if name in arrays]
    stacked = np.stack([arrays[name][rows] for name in there])
    for name, pick in (("high", np.max), ("low", np.min)):
        if name in arrays:
            arrays[name][rows] = pick(stacked, axis=0)


def _check(panel: Panel) -> None:
    """What every reader must have made sure of; a reader names file, date and symbol, this the date and symbol."""
    source, days, names = panel.origin.source, len(panel.dates), len(panel.symbols)
    if not days or not names:
        raise UserError(f"{source}: a panel of {days} dates and {names} names; both must be there")
    if panel.dates.dtype != np.dtype("datetime64[D]"):
        raise UserError(f"{source}: dates are {panel.dates.dtype}; they are sessions, datetime64[D] without zone")
    later = panel.dates[1:] > panel.dates[:-1]
    if not later.all():
        row = int(np.argmin(later)) + 1
        raise UserError(f"{source}: {panel.dates[row]} comes after {panel.dates[row - 1]}; sort the dates, each once")
    twice = sorted({symbol for symbol in panel.symbols if panel.symbols.count(symbol) > 1}) if names < 10_000 else []
    if twice or len(set(panel.symbols)) < names:
        raise UserError(f"{source}: the symbol {shown((twice or ['?'])[0])} is there more than once")
    for name, array in panel._arrays().items():
        wanted = (days,) if name == "index_close" else (days, names)
        if array.shape != wanted:
            raise UserError(f"{source}: {name} is {array.shape}, with {days} dates and {names} names it is {wanted}")
    _check_bars(panel)


def _check_bars(panel: Panel) -> None:
    def refuse(wrong: Mask, text: str) -> None:
        if wrong.any():
            row, column = (int(place[0]) for place in np.nonzero(wrong))
            raise UserError(f"{panel.origin.source}: {panel.dates[row]} {panel.symbols[column]}: {text}")

    close, traded = panel.close, panel.traded
    with np.errstate(invalid="ignore"):
        refuse(traded & ~(np.isfinite(close) & (close > 0)), "traded, but without a close above 0")
        refuse(~np.isnan(close) & ~(panel.factor > 0), "an adjustment factor that isn't above 0")
        for name in ("open", "high", "low"):
            price = getattr(panel, name)
            if price is not None:
                refuse(traded & ~(price > 0), f"traded, but {name} isn't above 0")
        if panel.high is not None and panel.low is not None:
            refuse(traded & (panel.high < panel.low), "the high lies below the low")
            for name in ("open", "close"):
                price = getattr(panel, name)
                if price is not None:
                    outside = (price > panel.high * (1 + 1e-9)) | (price < panel.low * (1 - 1e-9))
                    refuse(traded & outside, f"the {name} lies outside low and high")
