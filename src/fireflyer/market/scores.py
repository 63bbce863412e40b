"""Scores as a file, and back: one line a session and name, so that any tool can read or make them.

In and out: CSV, or Parquet where the name ends so, of `date, symbol, score`. A name without a score has no line.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.market.features import Floats
from fireflyer.market.panel import Panel

COLUMNS = ("date", "symbol", "score")


def write_scores(path: str | Path, panel: Panel, scores: Floats) -> int:
    """Write (D, N) scores; returns the number of lines. Raises UserError where the disk refuses."""
    from fireflyer.checkpoint.run_folder import writing

    path = Path(path)
    days, names = np.nonzero(np.isfinite(scores))
    dates = panel.dates[days].astype(str).tolist()
    symbols = [panel.symbols[name] for name in names.tolist()]
    values = scores[days, names].tolist()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow, parquet = pyarrow_modules()
            parquet.write_table(pyarrow.table(dict(zip(COLUMNS, (dates, symbols, values), strict=True))), path)
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows(zip(dates, symbols, map(repr, values), strict=True))
    return len(values)


def read_scores(path: str | Path, panel: Panel) -> Floats:
    """(D, N) of a panel, NaN where the file has none.

    Raises UserError, naming the line, for a date or symbol that the panel lacks, a second score of the same name and
    day, and what is no finite number.
    """
    path = Path(path)
    scores = np.full(panel.shape, np.nan)
    rows = {str(date): row for row, date in enumerate(panel.dates)}
    columns = {symbol: column for column, symbol in enumerate(panel.symbols)}
    for number, (date, symbol, text) in enumerate(_lines(path), start=2):
        row, column = rows.get(date), columns.get(symbol)
        if row is None or column is None:
            what = f"no session {shown(date)}" if row is None else f"no symbol {shown(symbol)}"
            raise UserError(f"{path} line {number}: {what} in {panel.origin.source}; score the same panel")
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise UserError(f"{path} line {number}: {date} {symbol}: score {shown(text)} is no number; leave it out")
        if np.isfinite(scores[row, column]):
            raise UserError(f"{path} line {number}: {date} {symbol} has a second score; keep one")
        scores[row, column] = value
    if not np.isfinite(scores).any():
        raise UserError(f"{path}: no score in it")
    return scores


def _lines(path: Path) -> list[tuple[str, str, str]]:
    try:
        if path.suffix == ".parquet":
            _, parquet = pyarrow_modules()
            table = parquet.read_table(path)
            found = table.column_names
            rows = list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True)) if _whole(found) else []
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                found = list(reader.fieldnames or [])
                rows = [tuple(row[name] for name in COLUMNS) for row in reader] if _whole(found) else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read ({error}); give a CSV or Parquet file of scores") from None
    if not _whole(found):
        raise UserError(f"{path}: its columns are {', '.join(found) or 'none'}; scores have {', '.join(COLUMNS)}")
    return [(str(date)[:10], str(symbol), str(score)) for date, symbol, score in rows]


def _whole(found: list[str]) -> bool:
    return all(name in found for name in COLUMNS)


def pyarrow_modules():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install 'fireflyer[market]', or give a .csv file") from None
    return pyarrow, parquet
