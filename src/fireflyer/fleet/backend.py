"""What the controller asks of whatever runs the jobs: nodes, launch, who is alive, signals. Two answer: local, slurm.

A back end starts one shepherd on each node of an attempt (rank 0 last, or all at once) and keeps no state of its own:
the id it gives for a launch goes into the ledger, and a launch whose id was lost is found again by its attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


class Unreachable(Exception):
    """The back end gave no answer; whatever runs may run on. Says why."""


class Refused(Exception):
    """The back end answered, and did not take the launch. Says why."""


@dataclass(frozen=True)
class SeenNode:
    """A node as the back end sees it."""

    name: str
    zone: str
    health: Literal["up", "drained", "lost"]
    reason: str = ""


@dataclass(frozen=True)
class Launch:
    """An attempt, as a back end needs to know it."""

    attempt: int
    folder: Path
    nodes: tuple[str, ...]
    uid: int
    gid: int
    backend_id: str | None = None


@dataclass(frozen=True)
class Alive:
    """Which ranks' shepherds still live. Not certain: the back end only knows nothing of the others."""

    ranks: frozenset[int]
    certain: bool = True


class Backend(Protocol):
    """Every call may raise Unreachable."""

    name: str
    nodes_a_machine: int
    """How many nodes share one machine's cores."""

    def nodes(self) -> list[SeenNode]: ...

    def node_env(self, node: str) -> dict[str, str]:
        """What a job's environment says of this node only."""
        ...

    def launch(self, launch: Launch) -> str:
        """Start the shepherds and return the id to find them by. Raises Refused."""
        ...

    def find(self, launch: Launch) -> str | None:
        """The id of a launch whose id was not written down; None: it never came here."""
        ...

    def alive(self, launches: Sequence[Launch]) -> dict[int, Alive]:
        """By attempt. Only for launches with an id."""
        ...

    def terminate(self, launch: Launch) -> None:
        """TERM, once, to every process of every rank."""
        ...

    def kill(self, launch: Launch) -> None:
        """KILL to whatever is left of it."""
        ...

    def set_drained(self, node: str, drained: bool, reason: str) -> None:
        """Tell the engine below that a node takes no jobs (or takes them again)."""
        ...
