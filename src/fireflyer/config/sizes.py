"""Sizes of memory as people write them: 8GiB, 512 MB, 1.5g."""

from __future__ import annotations

import re

from fireflyer.config.messages import shown
from fireflyer.errors import UserError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)


def parse_bytes(value: str | int, name: str) -> int:
    """Bytes meant by a text such as 8GiB (1024³) or 8GB (1000³), or by a number. Raises UserError with `name`."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None and not (match[3] and not match[2]):
        unit = _UNITS[match[2].lower()]
        if match[3]:
            unit = 1024 ** list(_UNITS).index(match[2].lower())
        if (size := int(float(match[1]) * unit)) > 0:
            return size
    raise UserError(f"{name} is {shown(value)}; give a size such as 8GiB, 500MB or a number of bytes")


def show_bytes(num_bytes: float) -> str:
    """In binary units, three figures: 7.45 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}" if num_bytes < 1000 * size else f"{num_bytes / size:,.0f} {unit}"
    return f"{num_bytes / 1024:.3g} KiB"
