"""A panel as one file of rows, in the form that files.py reads."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from fireflyer.checkpoint.run_folder import writing
from fireflyer.errors import UserError
from fireflyer.market.data.long_table import NUMBERS
from fireflyer.market.panel import Panel
from fireflyer.market.scores import pyarrow_modules


def write_panel(path: str | Path, panel: Panel) -> int:
    """Write every bar, by session and name; returns how many. Raises UserError where a file is there already."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} is there already; give another name, or remove it")
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path}: neither .csv nor .parquet")
    rows, names = np.nonzero(panel.traded)
    columns: dict[str, list] = {
        "date": panel.dates[rows].astype(str).tolist(),
        "symbol": [panel.symbols[name] for name in names.tolist()],
    }
    for name in NUMBERS:
        values = getattr(panel, name)
        if values is not None:
            columns[name] = values[rows, names].tolist()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow, parquet = pyarrow_modules()
            parquet.write_table(pyarrow.table(columns), path)
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
    return len(rows)
