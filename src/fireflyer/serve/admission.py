"""Who may come in. In: how many answers a request wants. Out: a place for them, or 429 with a time to return, or 503.

Only the event loop's thread touches it, so counting needs no lock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fireflyer.serve.errors import ApiError

_LONGEST_RETRY_S = 60


class Admission:
    """Counts answers between arrival and end, running and waiting ones together."""

    def __init__(self, max_running: int, max_queue: int) -> None:
        self._capacity = max_running + max_queue
        self._max_queue = max_queue
        self._inside = 0
        self._mean_s = 1.0  # how long a request takes, lately
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def busy(self) -> bool:
        return self._inside > 0

    @contextmanager
    def place(self, num_answers: int) -> Iterator[None]:
        """A place for so many answers while entered. Raises ApiError."""
        self._check(num_answers)
        self._inside += num_answers
        self._empty.clear()
        started = time.monotonic()
        try:
            yield
        finally:
            self._mean_s += 0.1 * (time.monotonic() - started - self._mean_s)
            self._inside -= num_answers
            if not self._inside:
                self._empty.set()

    def check_open(self) -> None:
        """Raises ApiError once the server is shutting down."""
        if self._draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)

    def _check(self, num_answers: int) -> None:
        self.check_open()
        if num_answers > self._capacity:
            raise ApiError(
                400,
                f"the request asks for {num_answers} answers at once; this server takes {self._capacity} at most",
                param="n",
                code="too_many_answers",
            )
        if self._inside + num_answers > self._capacity:
            raise ApiError(
                429,
                f"{self._inside} answers are in work and {self._max_queue} may wait (--max-queue); try again later",
                code="queue_full",
                retry_after_s=min(max(math.ceil(self._mean_s), 1), _LONGEST_RETRY_S),
            )

    async def drain(self, limit_s: float) -> bool:
        """Let nobody in any more, and wait for those inside; whether all were done within the limit."""
        self._draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), limit_s)
        except asyncio.TimeoutError:
            return False
        return True
