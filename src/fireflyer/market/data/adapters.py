"""Frames as the data vendors' libraries give them, in one form: date, symbol, open, high, low, close, volume, amount.

In: a table's columns by name, and for vendors whose frames are of one name, which. Out: a LongTable. Volumes become
shares and amounts yuan; prices stay as they came: ask vendors for unadjusted ones, and for the factor beside them.

    akshare     stock_zh_a_hist: 日期 股票代码 开盘 收盘 最高 最低 成交量 (lots of 100) 成交额
    baostock    query_history_k_data_plus: date code open high low close volume amount tradestatus, all of them text
    tushare     daily: ts_code trade_date open high low close vol (lots of 100) amount (thousands)
    yfinance    download: Date index, Open High Low Close Adj Close Volume; one name a frame
    wide        date, then a column of closes for each name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.market.data.long_table import NUMBERS, LongTable
from fireflyer.market.panel import Floats

if TYPE_CHECKING:
    import pandas

Columns = Mapping[str, Sequence[object]]


@dataclass(frozen=True)
class Form:
    """A vendor's names of things. lot: shares in a unit of volume; money: yuan in a unit of amount."""

    name: str
    date: str
    symbol: str | None
    columns: Mapping[str, str]
    lot: float = 1.0
    money: float = 1.0
    spelling: Callable[[str], str] = str
    adjusted_close: str | None = None
    trading: str | None = None


def canonical(code: str) -> str:
    """ "sh.600000", "600000.SH", "600000.SS", "SH600000" and "600000" are "600000.XSHG"; others stay as they are."""
    digits = "".join(character for character in code if character.isdigit())
    if len(digits) != 6:
        return code
    text = code.lower()
    if ".xsh" in text or text.endswith(".bj"):
        return code.upper()
    shanghai = any(mark in text for mark in ("sh", ".ss"))
    shenzhen = "sz" in text
    if not shanghai and not shenzhen:
        shanghai = digits[0] in "569"
    return f"{digits}.{'XSHG' if shanghai else 'XSHE'}"


_OHLC = {"open": "open", "high": "high", "low": "low", "close": "close"}
FORMS = (
    Form("plain", "date", "symbol", {name: name for name in NUMBERS}),
    Form(
        "akshare",
        "日期",
        "股票代码",
        {"open": "开盘", "high": "最高", "low": "最低", "close": "收盘", "volume": "成交量", "amount": "成交额"},
        lot=100,
        spelling=canonical,
    ),
    Form(
        "baostock",
        "date",
        "code",
        {**_OHLC, "volume": "volume", "amount": "amount"},
        spelling=canonical,
        trading="tradestatus",
    ),
    Form(
        "tushare",
        "trade_date",
        "ts_code",
        {**_OHLC, "volume": "vol", "amount": "amount"},
        lot=100,
        money=1000,
        spelling=canonical,
    ),
    Form(
        "yfinance",
        "Date",
        None,
        {"open": "Open", "high": "High", "low": "Low", "close": "Close", "volume": "Volume"},
        spelling=canonical,
        adjusted_close="Adj Close",
    ),
)
"""Told apart by the names of their date and symbol columns."""


def recognised(columns: Sequence[str], source: str) -> Form:
    """The form whose columns these are. Raises UserError naming what is missing."""
    for form in FORMS:
        if form.date in columns and (form.symbol is None or form.symbol in columns):
            if form.columns["close"] not in columns:
                raise UserError(f"{source}: no column {form.columns['close']!r}; {form.name} frames have one")
            return form
    vendors = ", ".join(form.name for form in FORMS[1:])
    raise UserError(
        f"{source}: its columns are {', '.join(map(str, columns)) or 'none'}; bars have date, symbol, close (open,"
        f" high, low, volume, amount, factor too where known), or a vendor's: {vendors}"
    )


def from_columns(columns: Columns, source: str, *, symbol: str | None = None, first_line: int = 2) -> LongTable:
    """A table in any of the known forms. symbol: whose bars they are, where the form is of one name.

    Raises UserError.
    """
    if _is_wide(list(columns)):
        return _from_wide(columns, source, first_line)
    form = recognised(list(columns), source)
    dates = list(columns[form.date])
    if form.symbol is not None:
        symbols = [form.spelling(str(value)) for value in columns[form.symbol]]
    elif symbol is not None:
        symbols = [form.spelling(symbol)] * len(dates)
    else:
        raise UserError(f"{source}: {form.name} frames are of one name; say whose it is: name the file SYMBOL.csv")
    table = LongTable(source, dates, symbols, {}, first_line)
    units = {"volume": form.lot, "amount": form.money}
    numbers = {
        name: _floats(columns[column], table, name) * units.get(name, 1.0)
        for name, column in form.columns.items()
        if column in columns
    }
    if form.adjusted_close is not None and form.adjusted_close in columns:
        numbers["factor"] = _floats(columns[form.adjusted_close], table, "Adj Close") / numbers["close"]
    if form.trading is not None and form.trading in columns:
        suspended = np.array([str(value) == "0" for value in columns[form.trading]])
        numbers["volume"] = np.where(suspended, 0.0, numbers.get("volume", np.full(len(dates), 1.0)))
    return LongTable(source, dates, symbols, numbers, first_line)


def _is_wide(columns: Sequence[str]) -> bool:
    """Closes of many names side by side: a date, then a column a name, told by codes of an exchange."""
    return len(columns) > 1 and columns[0] in ("date", "Date") and all("." in canonical(c) for c in columns[1:])


def _from_wide(columns: Columns, source: str, first_line: int) -> LongTable:
    """One row a date and name that has a close; an empty cell is no bar."""
    date, *names = columns
    count = len(columns[date])
    lines = np.arange(count) + first_line
    dates: list[object] = []
    symbols: list[str] = []
    closes: list[Floats] = []
    rows: list[NDArray[np.int64]] = []
    for name in names:
        symbol = canonical(name)
        column = _floats(columns[name], LongTable(source, columns[date], [symbol] * count, {}, first_line), "close")
        there = np.flatnonzero(np.isfinite(column))
        dates += [columns[date][row] for row in there.tolist()]
        symbols += [symbol] * len(there)
        closes.append(column[there])
        rows.append(lines[there])
    return LongTable(source, dates, symbols, {"close": np.concatenate(closes)}, lines=np.concatenate(rows))


def from_frame(frame: pandas.DataFrame, source: str, *, symbol: str | None = None) -> LongTable:
    """A pandas DataFrame of a vendor; the index counts as a column where it has a name."""
    table = frame.reset_index() if frame.index.name else frame
    if table.columns.nlevels > 1:
        raise UserError(f"{source}: columns of several names; give one name's frame at a time")
    return from_columns(
        {str(name): table[name].tolist() for name in table.columns}, source, symbol=symbol, first_line=0
    )


def _floats(values: Sequence[object], table: LongTable, name: str) -> Floats:
    """Empty cells are NaN. Raises UserError for what is no number."""
    found = np.empty(len(values), np.float64)
    for row, value in enumerate(values):
        try:
            found[row] = np.nan if value is None or value == "" else float(value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            raise UserError(f"{table.place(row)}: {name} is {shown(value)}, no number") from None
    return found
