"""What a fleet may set, and what a decision says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fireflyer.errors import UserError
from fireflyer.fleet.state import Reservation, Task


@dataclass(frozen=True)
class Settings:
    """What a fleet may choose. Raises UserError naming the setting, its value and its range.

    min_slice_s: nobody is stopped before this, from launch on; a user of weight above 1 has that many times as long.
    stop_s: the deadline for saving and stopping; past it a task is killed.
    half_life_s: node-seconds count half after this time.
    tolerance: a user is stopped for a less served one only if they still had this share more after the other's slice.
    full_slice: in least slices: so long a task that has run before leaves the others to run, unless its turn is due.
    tick_s: how often to decide again while tasks wait and nothing happens.
    weights: of users; 1 for those not named.
    """

    min_slice_s: float = 600.0
    stop_s: float = 60.0
    half_life_s: float = 86_400.0
    tolerance: float = 0.05
    full_slice: float = 6.0
    tick_s: float = 60.0
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("min_slice_s", "half_life_s", "tick_s"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in ("stop_s", "full_slice"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("tolerance", self.tolerance, 0 <= self.tolerance < 1, "0 or more and below 1")
        for user, weight in self.weights.items():
            _check(f"weights.{user}", weight, weight > 0, "above 0")

    def weight(self, user: str) -> float:
        return self.weights.get(user, 1.0)

    def slice_s(self, user: str) -> float:
        """How long a user's task runs at least."""
        return self.min_slice_s * max(1.0, self.weight(user)) if self.weights else self.min_slice_s

    def share_of_node(self, user: str) -> float:
        """What one slice on one node adds to what a user had: node-seconds per weight."""
        return self.slice_s(user) / self.weight(user)

    def turn_s(self, users: int) -> float:
        """The longest wait for a turn while this many users wait."""
        return users * (self.min_slice_s * max([1.0, *self.weights.values()]) + self.stop_s)


@dataclass(frozen=True)
class Start:
    """Launch a task on these nodes. turn: it takes its user's turn (store the time as Usage.last_turn_s)."""

    nodes: tuple[str, ...]
    turn: bool


@dataclass(frozen=True)
class Suspend:
    """Ask a task to save and stop. kept_nodes: if it only moves off a bad node, what it gets back (Task.kept_nodes)."""

    reason: str
    kept_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """starts, suspends: by task. reservations: part of the next state. wake_s: decide again then at the latest (None:
    when something happens)."""

    starts: dict[str, Start]
    suspends: dict[str, Suspend]
    reservations: tuple[Reservation, ...]
    wake_s: float | None


def protected_until(task: Task, settings: Settings) -> float:
    """When a running task has had its slice."""
    return task.since_s + min(settings.slice_s(task.user), task.limit_s)


def _check(name: str, value: float, right: bool, wanted: str) -> None:
    if not (math.isfinite(value) and right):
        raise UserError(f"{name} = {value!r}: it has to be {wanted}")
