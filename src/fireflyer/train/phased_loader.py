"""Rows of one length after rows of another: what context extension reads, as one source of batches.

In: a loader for each phase and how many batches it gives. Out: the batches of all of them. Where the next phase has the
same text, it goes on in it where the last one ended; otherwise it begins its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fireflyer.data.loader import Loader
from fireflyer.data.packing import Batch


@dataclass(frozen=True)
class LoaderPhase:
    """batches: how many are taken before the next phase. goes_on: whether it reads on in the text of the phase before.
    what: for people."""

    loader: Loader
    batches: int
    goes_on: bool
    what: str


class PhasedLoader:
    """A `pretraining.BatchSource`; the last phase never ends."""

    def __init__(self, phases: Sequence[LoaderPhase], on_phase: Callable[[str], None]) -> None:
        self._phases, self._on_phase = phases, on_phase
        self._phase = 0
        self._taken = 0  # in this phase

    @property
    def epoch(self) -> int:
        return self._loader.epoch

    @property
    def _loader(self) -> Loader:
        return self._phases[self._phase].loader

    def next_batch(self, batch_size: int) -> Batch:
        if self._taken >= self._phases[self._phase].batches and self._phase + 1 < len(self._phases):
            before = self._loader
            self._phase, self._taken = self._phase + 1, 0
            if self._phases[self._phase].goes_on:
                self._loader.load_state_dict(before.state_dict())
            self._on_phase(self._phases[self._phase].what)
        self._taken += 1
        return self._loader.next_batch(batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self._phase, "taken": self._taken, "loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._phase, self._taken = state["phase"], state["taken"]
        self._loader.load_state_dict(state["loader"])
