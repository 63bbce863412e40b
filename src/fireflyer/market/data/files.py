"""Bars from files: CSV, Parquet, a folder of either with a file a name, and qlib's binary store.

In: a path. Out: a Panel, checked by long_table.py. Nothing is written.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.market.data.adapters import canonical, from_columns
from fireflyer.market.data.long_table import NUMBERS, LongTable, Membership, to_panel
from fireflyer.market.panel import Floats, Panel, Universe

_TABLES = (".csv", ".parquet")


def read_panel(
    path: str | Path,
    *,
    universe: Universe = "as recorded",
    membership: Membership | None = None,
    today: np.datetime64 | None = None,
) -> Panel:
    """Whatever lies at `path`. Raises UserError with file, line, date and symbol."""
    path = Path(path)
    if (path / "calendars").is_dir() and (path / "features").is_dir():
        table, digest = _qlib(path)
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _TABLES)
        if not files:
            raise UserError(f"{path}: no .csv or .parquet file in it, nor qlib's calendars and features")
        table, digest = _joined([_read(file) for file in files], str(path)), _sha256(files)
    elif path.is_file():
        table, digest = _read(path), _sha256([path])
    else:
        raise UserError(f"{path}: no such file or folder; give bars as .csv or .parquet, or a folder of them")
    return to_panel(table, universe=universe, membership=membership, today=today, sha256=digest)


def _read(path: Path) -> LongTable:
    if path.suffix not in _TABLES:
        raise UserError(f"{path}: neither .csv nor .parquet")
    try:
        if path.suffix == ".parquet":
            from fireflyer.market.scores import pyarrow_modules

            table = pyarrow_modules()[1].read_table(path)
            columns: dict[str, Sequence[object]] = {name: table[name].to_pylist() for name in table.column_names}
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file)
                header = next(reader, [])
                rows = [row for row in reader if row]
            for number, row in enumerate(rows, start=2):
                if len(row) != len(header):
                    raise UserError(f"{path} line {number}: {len(row)} cells, the header has {len(header)}")
            columns = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    return from_columns(columns, str(path), symbol=path.stem)


def _joined(tables: list[LongTable], source: str) -> LongTable:
    """One below another, each checked for order by itself later; lines are counted through."""
    shared = [name for name in NUMBERS if all(name in table.numbers for table in tables)]
    dates = [date for table in tables for date in table.dates]
    symbols = [symbol for table in tables for symbol in table.symbols]
    numbers = {name: np.concatenate([table.numbers[name] for table in tables]) for name in shared}
    return LongTable(source, dates, symbols, numbers)


def _qlib(path: Path) -> tuple[LongTable, str]:
    """qlib's store: calendars/day.txt, features/CODE/FIELD.day.bin; float32, the first the calendar's row it begins at.

    qlib keeps adjusted prices and the factor: raw = adjusted / factor, and volumes divided by it.
    """
    calendar_file = path / "calendars" / "day.txt"
    try:
        calendar = calendar_file.read_text(encoding="utf-8").split()
    except OSError as error:
        raise UserError(f"{calendar_file}: can't be read ({error.strerror})") from None
    folders = sorted(folder for folder in (path / "features").iterdir() if folder.is_dir())
    if not folders:
        raise UserError(f"{path / 'features'}: no name in it")
    tables: list[LongTable] = []
    files: list[Path] = [calendar_file]
    for folder in folders:
        fields = {name: folder / f"{name}.day.bin" for name in NUMBERS}
        there = {name: file for name, file in fields.items() if file.is_file()}
        if "close" not in there:
            raise UserError(f"{folder}: no close.day.bin")
        files += there.values()
        columns: dict[str, Floats] = {}
        start = 0
        for name, file in there.items():
            raw = np.fromfile(file, "<f4").astype(np.float64)
            if not len(raw) or raw[0] != int(raw[0]) or int(raw[0]) + len(raw) - 1 > len(calendar):
                raise UserError(f"{file}: doesn't fit the calendar of {len(calendar)} days; dump the store again")
            if columns and int(raw[0]) != start:
                raise UserError(f"{file}: begins on another day than the fields beside it; dump the store again")
            start, columns[name] = int(raw[0]), raw[1:]
        factor = columns.get("factor", np.ones_like(columns["close"]))
        for name in ("open", "high", "low", "close"):
            if name in columns:
                columns[name] = np.round(columns[name] / factor, 2)  # float32 of what was quoted in fen
        if "volume" in columns:
            columns["volume"] = columns["volume"] * factor
        rows = np.flatnonzero(np.isfinite(columns["close"]))
        dates = [calendar[start + int(row)] for row in rows]
        numbers = {name: values[rows] for name, values in columns.items()}
        tables.append(LongTable(str(folder), dates, [canonical(folder.name.upper())] * len(rows), numbers))
    return _joined(tables, str(path)), _sha256(files)


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def membership_of(index: str) -> Membership:
    """A point-in-time universe out of index-constitution: csi300, csi500 or another of its names. Raises UserError."""
    try:
        import index_constitution
    except ImportError:
        raise UserError("point-in-time universes need index-constitution: pip install 'fireflyer[market]'") from None
    known = index_constitution.list_indices()
    if index not in known:
        raise UserError(f"no universe {shown(index)}; index-constitution knows {', '.join(known)}")
    frame = index_constitution.history(index)
    spells = []
    for symbol, start, stop in zip(frame["symbol"], frame["opt-in"], frame["opt-out"], strict=True):
        ends = stop is not None and str(stop) not in ("", "NaT", "nan", "None")
        until = np.datetime64(str(stop)[:10], "D") if ends else None
        spells.append((canonical(str(symbol)), np.datetime64(str(start)[:10], "D"), until))
    return Membership(index, spells)
