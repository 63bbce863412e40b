"""Ctrl-C and SIGTERM while a run works: the step in progress ends, the run saves itself, exit code 75."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from fireflyer.errors import Stopped
from fireflyer.train.events import Event, Started


class StopSignals:
    """While entered, the first signal asks the run to stop; a second one ends it at once, unsaved.

    Before work has begun there is nothing to save and nobody asks `requested`: the first signal ends it at once.
    """

    def __init__(self, too_early: str = "stopped before training began; the same command begins again") -> None:
        """`too_early`: what is said of a stop before work has begun."""
        self._too_early = too_early
        self._asked = False
        self._working = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_event(self, event: Event) -> None:
        """Told of every event, to know when training begins."""
        if isinstance(event, Started):
            self.begin()

    def begin(self) -> None:
        """From here on `requested` is asked."""
        self._working = True

    def requested(self) -> bool:
        """Whether the run is asked to stop."""
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        if not self._working:
            raise Stopped(self._too_early)
        self._asked = True
