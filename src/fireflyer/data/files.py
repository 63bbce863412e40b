"""Text out of one file: plain text, JSON lines or (data/parquet.py) parquet.

Every file is read through once when it is opened, so that a bad byte in the last file is told before the run begins.
What is kept of it is where each text lies, never the texts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fireflyer.errors import UserError

TEXT_ENDINGS = (".md", ".py", ".txt")
JSONL_ENDING = ".jsonl"
PARQUET_ENDING = ".parquet"
ENDINGS = (*TEXT_ENDINGS, JSONL_ENDING, PARQUET_ENDING)

# A plain-text file is one document, however long; it is read in parts of this size, so a file of gigabytes is no
# different from one of kilobytes.
PART_BYTES = 2**20

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ReadOptions:
    """`encoding_errors`: "strict" refuses invalid UTF-8, "replace" puts U+FFFD; `text_column`: the JSON key or parquet
    column that holds the text; `part_bytes`: the longest piece of a plain-text file read at once."""

    encoding_errors: str = "strict"
    text_column: str = "text"
    part_bytes: int = PART_BYTES


@dataclass(frozen=True)
class Part:
    """A piece of a document as it was found: bytes [offset, offset + raw_bytes) of its file (in parquet: row `offset`
    and 0), its text, and whether the document begins with it."""

    offset: int
    raw_bytes: int
    text: str
    begins: bool


def scan_text(path: Path, options: ReadOptions) -> Iterator[Part]:
    """The parts of a plain-text file in order. Raises UserError with file and byte at invalid UTF-8."""
    with _open(path) as file:
        offset = _skip_bom(file)
        begins = True
        rest = b""
        while data := rest + file.read(options.part_bytes - len(rest)):
            end = len(data) if len(data) < options.part_bytes else _cut(data)
            yield Part(offset, end, _decode(data[:end], str(path), offset, options), begins)
            offset, rest, begins = offset + end, data[end:], False


def read_text(path: Path, offset: int, raw_bytes: int, options: ReadOptions) -> str:
    """One part of a plain-text file."""
    with _open(path) as file:
        file.seek(offset)
        return _decode(file.read(raw_bytes), str(path), offset, options)


def scan_jsonl(path: Path, options: ReadOptions) -> Iterator[Part]:
    """One document a line; blank lines are passed over. Raises UserError with file and line."""
    with _open(path) as file:
        offset = _skip_bom(file)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Part(offset, len(line), _text_of_line(line, f"{path}, line {number}", offset, options), True)
            offset += len(line)


def read_jsonl(path: Path, offset: int, raw_bytes: int, options: ReadOptions) -> str:
    """The text of the line at a byte offset."""
    with _open(path) as file:
        file.seek(offset)
        return _text_of_line(file.read(raw_bytes), f"{path}, byte {offset}", offset, options)


def mend(text: str, where: str, options: ReadOptions) -> str:
    """Text that came in with escapes or unchecked: half surrogate pairs are refused, or replaced if so chosen."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if options.encoding_errors == "replace":
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        raise UserError(
            f"{where}: half a surrogate pair at character {error.start}, which is no Unicode text; "
            "mend it or go on with --encoding-errors replace"
        ) from error
    return text


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def _skip_bom(file: IO[bytes]) -> int:
    if file.read(len(_BOM)) == _BOM:
        return len(_BOM)
    file.seek(0)
    return 0


def _decode(data: bytes, where: str, offset: int, options: ReadOptions) -> str:
    try:
        return data.decode("utf-8", errors=options.encoding_errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: invalid UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
            "save it as UTF-8 or go on with --encoding-errors replace"
        ) from error


def _text_of_line(line: bytes, where: str, offset: int, options: ReadOptions) -> str:
    try:
        row = json.loads(_decode(line, where, offset, options))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    key = options.text_column
    if not isinstance(row, dict):
        raise UserError(f'{where}: {type(row).__name__} instead of an object like {{"{key}": "..."}}')
    if key not in row:
        raise UserError(
            f"{where}: no key {key!r} (it has: {', '.join(map(str, row)) or 'none'}); "
            "name the one that holds the text with --set data.text_column=KEY"
        )
    if not isinstance(row[key], str):
        raise UserError(f"{where}: {key!r} is {type(row[key]).__name__}, not a string")
    return mend(row[key], where, options)


def _cut(data: bytes) -> int:
    """Where to end a part: after a line break with no white space behind it, since no token reaches across that; else
    before the last whole character."""
    end = len(data)
    while (end := data.rfind(b"\n", len(data) // 2, end)) >= 0:
        if end + 1 < len(data) and 0x21 <= data[end + 1] <= 0x7E:
            return end + 1
    # Bytes 10xxxxxx continue a character: step back to the one it begins with.
    end = len(data) - 1
    while end > len(data) - 4 and data[end] & 0xC0 == 0x80:
        end -= 1
    return max(end, 1)
