"""Text out of one column of a parquet file (pyarrow, only when there is one to read).

A row can only be had by decoding its whole row group, so row groups are kept up to a bound, and the order of an epoch
(data/documents.py) reads the rows of a few groups together.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fireflyer.data.files import Part, ReadOptions, mend
from fireflyer.errors import UserError

# Decoded text that an epoch's order mixes at a time; twice as much may be held.
WINDOW_BYTES = 64 * 2**20


def scan_parquet(path: Path, options: ReadOptions) -> Iterator[tuple[int, Part]]:
    """(row group, text) of every row. Raises UserError naming the columns there are, or the row that has no text."""
    row = 0
    with _open(path, options.text_column) as file:
        for group in range(file.metadata.num_row_groups):
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[options.text_column]):
                column = batch.column(0)
                for i in range(len(column)):
                    yield group, Part(row, 0, _text(column[i], path, row, options), True)
                    row += 1


class ParquetReader:
    """Random access to the rows of some files, with the row groups decoded last kept in memory."""

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self._first_rows: dict[Path, np.ndarray] = {}
        self._groups: dict[tuple[Path, int], Any] = {}

    def read(self, path: Path, row: int) -> str:
        """The text in one row of one file."""
        if path not in self._first_rows:
            with _open(path, self._options.text_column) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            self._first_rows[path] = np.cumsum([0, *sizes])
        group = int(np.searchsorted(self._first_rows[path], row, side="right")) - 1
        value = self._column(path, group)[row - int(self._first_rows[path][group])]
        return _text(value, path, row, self._options)

    def _column(self, path: Path, group: int) -> Any:
        if (path, group) in self._groups:
            return self._groups[path, group]
        with _open(path, self._options.text_column) as file:
            column = file.read_row_group(group, columns=[self._options.text_column]).column(0)
        held = sum(kept.nbytes for kept in self._groups.values())
        while self._groups and held + column.nbytes > 2 * WINDOW_BYTES:
            held -= self._groups.pop(next(iter(self._groups))).nbytes
        self._groups[path, group] = column
        return column


def _open(path: Path, column: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'fireflyer[parquet]'") from error
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: can't be read as parquet: {str(error).splitlines()[0]}") from error
    schema = file.schema_arrow
    if column not in schema.names:
        raise UserError(
            f"{path}: no column {column!r} (it has: {', '.join(schema.names) or 'none'}); "
            "name the one that holds the text with --set data.text_column=COLUMN"
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not strings")
    return file


def _text(value: Any, path: Path, row: int, options: ReadOptions) -> str:
    where = f"{path}, row {row}"
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        if options.encoding_errors == "replace":
            return error.object.decode("utf-8", errors="replace")
        raise UserError(
            f"{where}: invalid UTF-8 at byte {error.start} of the text; mend it or go on with --encoding-errors replace"
        ) from error
    if text is None:
        raise UserError(f"{where}: {options.text_column!r} is null; drop such rows or fill them in")
    return mend(text, where, options)
