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
        self._served = [-served[user] for user in self._users]
        self._ripe: dict[str, list[Task]] = {}
        self._rooms: dict[str, list[int]] | None = None

    def for_turn(self, task: Task, started: Iterable[Task]) -> list[Offer]:
        """Everybody, when they have had their slice; the user's own tasks first. started: those of this decision."""
        tasks, running_of = self.state.tasks, self.state.running_of
        users = sorted(self._users, key=lambda user: user != task.user)
        everybody = [tasks[task_id] for user in users for _, task_id in running_of[user]]
        everybody += sorted(started, key=lambda other: other.user != task.user)
        return [(protected_until(other, self.settings), other) for other in everybody]

    def for_share(self, task: Task, after: float) -> list[Offer]:
        """Those who have had their slice: of the user's own tasks any for a task's first slice, else those that have
        run for `own_turn_s`; and the tasks of users who had clearly more than `after`."""
        own = self._ripe_of(task.user)
        if task.num_slices:
            own = [other for other in own if other.since_s + self.settings.own_turn_s <= self.now_s]
        others = [other for user in self._users[: self._more_served(after)] for other in self._ripe_of(user)]
        return [(self.now_s, other) for other in own + [other for other in others if other.user != task.user]]

    def room(self, task: Task, after: float, zone: str) -> int:
        """At most how many nodes `for_share` can free in a zone: a bound that costs nothing."""
        if self._rooms is None:
            self._rooms = {}
            for z in self.state.zones:
                by_user = (sum(self.state.room_of[t.id].get(z, 0) for t in self._ripe_of(u)) for u in self._users)
                self._rooms[z] = list(accumulate(by_user, initial=0))
        own = sum(self.state.room_of[other.id].get(zone, 0) for other in self._ripe_of(task.user))
        return own + self._rooms[zone][self._more_served(after)]

    def next_s(self) -> float | None:
        """When the next slice is over."""
        found = []
        for user, queue in self.state.running_of.items():
            place = self._num_ripe(user)
            if place < len(queue):
                found.append(queue[place][0] + self.settings.slice_s(user))
        return min(found, default=None)

    def _more_served(self, after: float) -> int:
        """How many users (from the front) are stopped for somebody who will have had `after`."""
        return bisect_right(self._served, -after / (1.0 - self.settings.tolerance))

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
