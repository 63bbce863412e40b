"""Lines of JSON objects with their places, for data whose every line is checked before a run begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fireflyer.errors import UserError


@dataclass(frozen=True)
class Line:
    """One object; `where` names file and line."""

    where: str
    values: dict[str, Any]


def read_lines(path: str | Path) -> tuple[str, list[Line]]:
    """The file's sha256 and its objects, blank lines left out. Raises UserError with the line and the reason."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give a .jsonl file") from None
    lines = list(_objects(str(path), data))
    if not lines:
        raise UserError(f"{path}: no lines in it; each must be a JSON object")
    return sha256(data).hexdigest(), lines


def check_keys(line: Line, known: frozenset[str]) -> None:
    """Refuse keys that nobody reads: a misspelt one would be data left out."""
    if unknown := sorted(line.values.keys() - known):
        raise UserError(f"{line.where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _objects(path: str, data: bytes) -> Iterator[Line]:
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if not raw.strip():
            continue
        try:
            values = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: invalid UTF-8 at byte {error.start} of the line; convert the file") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); each line must be one JSON object") from None
        if not isinstance(values, dict):
            raise UserError(f"{where}: {str(values)[:60]!r} is no JSON object; each line must be one")
        yield Line(where, values)
