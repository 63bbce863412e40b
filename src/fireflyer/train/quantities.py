"""Quantities as recipes spell them: token counts ("14.8T", "2.5M", 1000) and shares of a run ("70%").

In: what TOML or the command line gave. Out: whole numbers, exact (no floating point on the way). No torch.
"""

from __future__ import annotations

import re
from fractions import Fraction

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

_NUMBER = re.compile(r"(?P<number>[0-9][0-9_]*(\.[0-9]+)?(e[+]?[0-9]+)?)\s*(?P<suffix>[KMBT]?)", re.IGNORECASE)
_PERCENT = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*%")


def parse_quantity(value: object) -> int:
    """A count from 469, 1e6, "14.8T", "2.5M", "1_000" or "1e6"; anything but a whole number >= 0 raises ValueError."""
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
        number = Fraction(match["number"].replace("_", "")) * SUFFIXES[match["suffix"].upper()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 1e30:
        number = Fraction(value)
    else:
        raise ValueError('must be a count such as 1000, "2.5M" or "14.8T"')
    if number.denominator != 1 or not 0 <= number < 2**63:  # TOML's integers end there
        raise ValueError("must be a whole number, 0 or more")
    return int(number)


def parse_boundary(value: object) -> int | str:
    """A point of a run: a token count, or a share of the run's tokens such as "70%" (kept as that string)."""
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        if Fraction(match["number"]) > 100:
            raise ValueError("must be at most 100%")
        return f"{match['number']}%"
    try:
        return parse_quantity(value)
    except ValueError as error:
        raise ValueError(f'{error}, or a share of the run such as "70%"') from None


def resolve_boundary(boundary: int | str, total: int) -> int:
    """The count that `boundary` means in a run of `total`: shares are rounded down."""
    if isinstance(boundary, str):
        return int(Fraction(boundary[:-1]) * total / 100)
    return boundary


def format_quantity(count: int) -> str:
    """A short spelling that `parse_quantity` reads back exactly: "14.633T" for 14633000000000, and "12345678"."""
    for suffix in ("T", "B", "M", "K"):
        thousandths, rest = divmod(count * 1000, SUFFIXES[suffix])
        if 1000 <= thousandths < 10**6 and not rest:
            return f"{thousandths / 1000:.3f}".rstrip("0").rstrip(".") + suffix
    return str(count)
