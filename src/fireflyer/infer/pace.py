"""How many threads a small step takes: as many as were fastest lately.

The threads of a step meet a dozen times a layer. On a quiet machine that costs less than it saves even in small models;
beside another busy process a thread that has lost its core lets all others wait, and one alone is up to twice as fast.
Only the clock knows which it is. How many there are changes no bit of the result.
"""

from __future__ import annotations

TRY_EVERY = 50
"""Steps of one size from one try of another number to the next."""

_NEWEST = 0.25
"""Weight of the newest step in the mean of the number that is in use."""


class Pace:
    """Seconds a row by size of step and number of threads; sizes within a factor of two are one."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._used: dict[int, int] = {}
        self._steps: dict[int, int] = {}

    def threads(self, rows: int, most: int) -> int:
        """For a step of so many rows: 1, 2, 4... or `most`."""
        size, numbers = rows.bit_length(), _numbers(most)
        unknown = [number for number in numbers if (size, number) not in self._seconds]
        if unknown:
            return unknown[0]
        best = min(numbers, key=lambda number: self._seconds[size, number])
        self._used[size] = best
        self._steps[size] = steps = self._steps.get(size, 0) + 1
        others = [number for number in numbers if number != best]
        if steps % TRY_EVERY or not others:
            return best
        return others[steps // TRY_EVERY % len(others)]

    def took(self, rows: int, threads: int, seconds: float) -> None:
        """What the step took. One try can be slow by chance, never fast: the newest is what is known of it."""
        key = (rows.bit_length(), threads)
        weight = _NEWEST if key in self._seconds and self._used.get(key[0]) == threads else 1.0
        before = self._seconds.get(key, 0.0)
        self._seconds[key] = before + weight * (seconds / rows - before)


def _numbers(most: int) -> list[int]:
    return [*(1 << power for power in range((most - 1).bit_length())), most]
