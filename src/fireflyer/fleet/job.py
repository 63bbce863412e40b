"""A job's side of the protocol, for loops of one's own: stop at a step's end when asked, and exit with 75.

    with fleet.job() as job:
        state = load_or_begin()
        for step in job.steps(1000, first=state.step):
            state = train(state)
            if job.should_stop():
                save(state)
                job.saved(step + 1)

Works the same outside a fleet, where Ctrl-C and TERM come from people. Needs nothing but Python.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fireflyer.fleet.records import ATTEMPT_VARIABLE, SAVED, write_json

STOPPED_CODE = 75
UNSAVED_CODE = 128 + signal.SIGTERM


def job(agree: Callable[[bool], bool] = bool) -> Job:
    """A new job, to be entered with `with`.

    Args:
        agree: makes one answer of all ranks' (say an all-reduce by maximum), where there are several: ranks that
            stopped at different steps would wait for one another for ever. Every rank must then ask at every step.
    """
    return Job(agree)


class Job:
    """While entered, TERM and Ctrl-C ask for a stop. Leaving after one ends the process with exit code 75."""

    def __init__(self, agree: Callable[[bool], bool]) -> None:
        self._agree = agree
        self._asked = False
        self._answered = False
        self._complete: bool | None = None  # None: the loop is not over `steps`
        self._pid = 0
        self._before: dict[int, Any] = {}
        folder = os.environ.get(ATTEMPT_VARIABLE)
        self._folder = Path(folder) if folder else None

    def __enter__(self) -> Job:
        self._pid = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is not None or self._complete:
            return
        if self._answered:
            sys.exit(STOPPED_CODE)
        if self._asked and self._complete is not None:
            sys.exit(UNSAVED_CODE)  # the loop was left without asking `should_stop`: nothing says that it saved

    def steps(self, total: int, first: int = 0) -> Iterator[int]:
        """first, first + 1, ..., total - 1; ends early after the step in which a stop was agreed on."""
        self._complete = first >= total
        for step in range(first, total):
            yield step
            self._complete = step + 1 == total
            if self._answered and not self._complete:
                return

    def should_stop(self) -> bool:
        """Whether to save now: true from the step on in which all ranks know of the request."""
        self._answered = self._answered or self._agree(self._asked)
        self._asked = self._asked or self._answered
        return self._answered

    def saved(self, step: int) -> None:
        """Say what has been saved: `step` steps are done and on disk. Only rank 0 needs to."""
        if self._folder is not None:
            write_json(self._folder / SAVED, {"step": step, "at": time.time()})

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked worker (a data loader's) has inherited this: it goes on until its parent has saved and ends it.
        if os.getpid() == self._pid:
            self._asked = True
