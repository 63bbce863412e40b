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
        self._users = sorted(state.running_of, key=lambda user: (-served[user], user))
        self._served = served
        self._ripe: dict[str, list[Task]] = {}
        self._rooms: dict[str, list[int]] | None = None

    def for_turn(self, task: Task, started: Iterable[Task]) -> list[Offer]:
        """Everybody, when they have had their slice; the user's own tasks first. started: those of this decision."""
        tasks, running_of = self.state.tasks, self.state.running_of
        users = sorted(self._users, key=lambda user: user != task.user)
        everybody = [tasks[task_id] for user in users for _, task_id in running_of[user]]
        everybody += sorted(started, key=lambda other: other.user != task.user)
        return [(protected_until(other, self.settings), other) for other in everybody]

    def for_share(self, task: Task, had: float) -> list[Offer]:
        """Those who may be stopped now without a turn: for a task's first slice after the least slice, else after a
        full one. First the user's own tasks, if they are no larger; then those of users who had clearly more.

        Such a user must have had more than this one, who `had` so much, will have after a slice; and more by a slice of
        the task that stops, or a large one would stop for a small one whenever two users are about even.
        """
        found = [other for other in self._ripe_of(task.user) if other.num_nodes <= task.num_nodes]
        for user in self._users[: self._more_served(task, had)]:
            ahead = self._served[user] * (1.0 - self.settings.tolerance) - had
            found += [x for x in self._ripe_of(user) if x.user != task.user and self.settings.share(x) <= ahead]
        if task.num_slices:
            found = [other for other in found if other.since_s + self.settings.full_slice_s <= self.now_s]
        return [(self.now_s, other) for other in found]

    def room(self, task: Task, had: float, zone: str) -> int:
        """At most how many nodes `for_share` can free in a zone: a bound that costs nothing."""
        if self._rooms is None:
            self._rooms = {}
            for z in self.state.zones:
                by_user = (sum(self.state.room_of[t.id].get(z, 0) for t in self._ripe_of(u)) for u in self._users)
                self._rooms[z] = list(accumulate(by_user, initial=0))
        own = sum(self.state.room_of[other.id].get(zone, 0) for other in self._ripe_of(task.user))
        return own + self._rooms[zone][self._more_served(task, had)]

    def next_s(self) -> float | None:
        """When the next slice is over."""
        found = []
        for user, queue in self.state.running_of.items():
            place = self._num_ripe(user)
            if place < len(queue):
                found.append(queue[place][0] + self.settings.slice_s(user))
        return min(found, default=None)

    def _more_served(self, task: Task, had: float) -> int:
        """How many users, from the front, had clearly more than this task's user will have had after a slice."""
        wanted = (had + self.settings.share(task)) / (1.0 - self.settings.tolerance)
        return bisect_right(self._users, -wanted, key=lambda user: -self._served[user])

    def _num_ripe(self, user: str) -> int:
        slice_s = self.settings.slice_s(user)
        return bisect_right(self.state.running_of[user], self.now_s, key=lambda entry: entry[0] + slice_s)

    def _ripe_of(self, user: str) -> list[Task]:
        if user not in self.state.running_of:
            return []
        if user not in self._ripe:
            queue = self.state.running_of[user][: self._num_ripe(user)]
            self._ripe[user] = [self.state.tasks[task_id] for _, task_id in queue]
        return self._ripe[user]
