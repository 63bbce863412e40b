"""Which running tasks may be stopped for a waiting one, and from when on; those to stop first in front."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate

from fireflyer.fleet.decision import Settings, protected_until
from fireflyer.fleet.state import FleetState, Task

Offer = tuple[float, Task]


class Offers:
    """One decision's view of those who run.

    served: by user, what orders them: the most served are stopped first, and of one user's tasks the one that has run
    longest.
    """

    def __init__(self, state: FleetState, now_s: float, settings: Settings, served: Mapping[str, float]) -> None:
        self.state, self.now_s, self.settings = state, now_s, settings
        self._served = served
        self._users = sorted(state.running_of, key=lambda user: (-served[user], user))
        self._negative = [-served[user] for user in self._users]
        weights = {user: settings.weight(user) for user in served}
        each = sum(state.num_up.values()) / max(sum(weights.values()), 1e-9)
        self._even = {user: each * weight for user, weight in weights.items()}
        self._over = {user for user in self._users if state.held[user] > self._even[user]}
        self._ripe: dict[tuple[str, bool], list[Task]] = {}
        self._rooms: dict[bool, list[int]] = {}

    def for_turn(self, task: Task, started: Iterable[Task]) -> list[Offer]:
        """Everybody, when they have had their slice; the user's own tasks first. started: those of this decision."""
        tasks, running_of = self.state.tasks, self.state.running_of
        users = sorted(self._users, key=lambda user: user != task.user)
        everybody = [tasks[task_id] for user in users for _, task_id in running_of[user]]
        everybody += sorted(started, key=lambda other: other.user != task.user)
        return [(protected_until(other, self.settings), other) for other in everybody]

    def for_share(self, task: Task, had: float, holds: int) -> list[Offer]:
        """Those who may be stopped now without a turn: for a task's first slice after the least slice, else after a
        full one. First the user's own tasks, if what they have waiting fills those nodes; then those of users who had
        clearly more.

        Such a user must have had more than this one, who `had` so much, will have after a slice; and more by a slice of
        the task that stops, or a large one would stop for a small one whenever two users are about even. For a first
        slice it is enough that the other holds more than an even share of the nodes, and this one, who `holds` so many,
        will not.
        """
        full, quick, more_served = task.num_slices > 0, self._quick(task, holds), self._more_served(task, had)
        wanted = sum(size * len(queue) for (size, _), queue in self.state.waiting[task.user].items())
        found = [other for other in self._ripe_of(task.user, full) if other.num_nodes <= wanted]
        for place, user in enumerate(self._users if quick else self._users[:more_served]):
            if user == task.user:
                continue
            if quick and user in self._over:
                found += self._ripe_of(user, full)
            elif place < more_served:
                ahead = self._served[user] * (1.0 - self.settings.tolerance) - had
                num_nodes = ahead / self.settings.share_of_node(user)
                found += [other for other in self._ripe_of(user, full) if other.num_nodes <= num_nodes]
        return [(self.now_s, other) for other in found]

    def room(self, task: Task, had: float, holds: int) -> int:
        """At most how many nodes `for_share` can free: a bound that costs little."""
        full = task.num_slices > 0
        if full not in self._rooms:
            self._rooms[full] = list(accumulate((self._room_of(user, full) for user in self._users), initial=0))
        if self._quick(task, holds):
            return self._rooms[full][-1]
        return self._rooms[full][self._more_served(task, had)] + self._room_of(task.user, full)

    def next_s(self) -> float | None:
        """When the next slice is over."""
        found = []
        for user, queue in self.state.running_of.items():
            slice_s = self.settings.slice_s(user)
            place = _num_older(queue, slice_s, self.now_s)
            if place < len(queue):
                found.append(queue[place][0] + slice_s)
        return min(found, default=None)

    def _quick(self, task: Task, holds: int) -> bool:
        return not task.num_slices and holds + task.num_nodes <= self._even[task.user]

    def _more_served(self, task: Task, had: float) -> int:
        """How many users, from the front, had clearly more than this task's user will have had after a slice."""
        wanted = (had + task.num_nodes * self.settings.share_of_node(task.user)) / (1.0 - self.settings.tolerance)
        return bisect_right(self._negative, -wanted)

    def _room_of(self, user: str, full: bool) -> int:
        return sum(task.num_nodes for task in self._ripe_of(user, full))

    def _ripe_of(self, user: str, full: bool) -> list[Task]:
        """A user's tasks that have run for the least slice, or a full one."""
        if (user, full) not in self._ripe:
            queue = self.state.running_of.get(user, [])
            slice_s = self.settings.slice_s(user) * (max(1.0, self.settings.full_slice) if full else 1.0)
            older = queue[: _num_older(queue, slice_s, self.now_s)]
            self._ripe[user, full] = [self.state.tasks[task_id] for _, task_id in older]
        return self._ripe[user, full]


def _num_older(queue: list[tuple[float, str]], age_s: float, now_s: float) -> int:
    """How many entries of a sorted queue are as old as this; by the same sum as everywhere, whatever it rounds to."""
    place = bisect_right(queue, (now_s - age_s, ""))
    while place < len(queue) and queue[place][0] + age_s <= now_s:
        place += 1
    while place and queue[place - 1][0] + age_s > now_s:
        place -= 1
    return place
