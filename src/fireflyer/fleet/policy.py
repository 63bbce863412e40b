"""Who gets the nodes now. A pure function of the time, the state and the settings: the same input, the same decision.

Two rules, in this order:

1. **Turns.** Every waiting user gets a turn within (waiting users) x (slice + stop): the task of theirs that has waited
   longest gets its nodes for at least one slice. When serving all in the order of their waits would only just keep that
   promise, turns are *due*: they are given in that order, and may stop any task that has had its slice.
2. **Least served first.** Otherwise the user who had the fewest node-seconds per weight, faded with a half-life, comes
   first, and may stop tasks of users who had clearly more; a first slice comes sooner than later ones (`offers.py`).
   Nodes that then are still free go to whoever fits.

A task is never stopped before its slice is over, so freeing nodes for a gang takes one slice and one stop at most.
Reservations carry that over from one decision to the next.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

from fireflyer.errors import UserError
from fireflyer.fleet.decision import Decision, Settings, Start, Suspend, protected_until
from fireflyer.fleet.offers import Offer, Offers
from fireflyer.fleet.placement import Board
from fireflyer.fleet.state import FleetState, Reservation, Task
from fireflyer.fleet.turns import served, turns


def decide(state: FleetState, now_s: float, settings: Settings) -> Decision:
    """One decision; the state is left as it is."""
    round_ = _Round(state, now_s, settings)
    round_.keep_reservations(due=True)
    round_.restore_gangs()
    round_.give_due_turns()
    round_.keep_reservations(due=False)
    round_.share()
    round_.backfill()
    return round_.decision()


def check_size(num_nodes: int, state: FleetState, wait_for_nodes: bool) -> None:
    """Refuse a task that this fleet can never run, unless it shall wait for more nodes. Raises UserError."""
    if num_nodes < 1:
        raise UserError(f"nodes = {num_nodes}: a task needs 1 node at least")
    if num_nodes > len(state.nodes) and not wait_for_nodes:
        raise UserError(
            f"nodes = {num_nodes}: the fleet has {len(state.nodes)}; ask for {len(state.nodes)} or fewer, "
            "or for waiting until there are enough"
        )


class _Round:
    """One decision as it grows."""

    def __init__(self, state: FleetState, now_s: float, settings: Settings) -> None:
        self.state = state
        self.now_s = now_s
        self.settings = settings
        self.board = Board(state, now_s)
        self.starts: dict[str, Start] = {}
        self.reservations: dict[str, Reservation] = {}
        self.settled: set[str] = set()
        had = served(state, now_s, settings)
        self.served = dict(had)
        self.holds = dict(state.held)
        self.turns = turns(state, now_s, settings, had)
        self.heads = {turn.task.id for turn in self.turns}
        self.offers = Offers(state, now_s, settings, had)
        self.turns_blocked = False

    def keep_reservations(self, due: bool) -> None:
        """Go on with what earlier decisions began, where all its nodes are still there for it."""
        for reservation in self.state.reservations.values():
            task = self.state.tasks.get(reservation.task_id)
            if reservation.due != due or task is None or task.phase != "waiting" or task.id in self.settled:
                continue
            if not all(map(self.board.available, reservation.nodes)):
                continue
            if self._start_reserved(task, reservation) or self._start(task):
                continue
            self._hold(reservation)

    def restore_gangs(self) -> None:
        """Tasks that lost a node go on with the nodes they kept and one other, before anybody else."""
        for task in sorted(self.state.interrupted.values(), key=lambda task: (task.since_s, task.id)):
            if task.id not in self.settled:
                self._restore(task)

    def give_due_turns(self) -> None:
        num_due = max((place for place, turn in enumerate(self.turns, 1) if turn.due_s <= self.now_s), default=0)
        for turn in self.turns[:num_due]:
            if turn.task.id in self.settled or self._start(turn.task) or self.turns_blocked:
                continue
            self.turns_blocked = not self._reserve(turn.task)

    def share(self) -> None:
        """The least served user's next task, again and again, until nobody's fits."""
        users = [(self.served[user], user) for user in self.state.waiting]
        heapq.heapify(users)
        while users:
            _, user = heapq.heappop(users)
            if any(self._start(task) or self._reserve_share(task) for task in self._candidates(user)):
                heapq.heappush(users, (self.served[user], user))

    def backfill(self) -> None:
        """Nodes that wait for a gang to come together serve tasks that are over, or have had a slice, by then."""
        ready_s = {
            name: reservation.ready_s
            for reservation in self.reservations.values()
            for name in reservation.nodes
            if self.board.holder(name) is None
        }
        if not ready_s:
            return
        tasks = {task.id: task for task in self.state.limited.values() if task.id not in self.settled}
        if max(ready_s.values()) >= self.now_s + self.settings.min_slice_s:
            tasks |= {task.id: task for user in self.state.waiting for task in self._candidates(user)}
        for task in sorted(tasks.values(), key=lambda task: (self.served[task.user], task.since_s, task.id)):
            until_s = self.now_s + min(self.settings.slice_s(task.user), task.limit_s)
            for zone in self.state.zones:
                names = [n for n, ready in ready_s.items() if ready >= until_s and self.state.zone_of[n] == zone]
                if len(names) >= task.num_nodes:
                    nodes = tuple(sorted(names, key=self.state.rank.__getitem__)[: task.num_nodes])
                    self._record(task, nodes)
                    for name in nodes:
                        del ready_s[name]
                    break

    def decision(self) -> Decision:
        suspends: dict[str, Suspend] = {}
        for task in self._on_drained_nodes():
            if protected_until(task, self.settings) <= self.now_s:
                bad = [name for name in task.nodes if name in self.state.drained]
                kept = tuple(name for name in task.nodes if name not in bad)
                suspends[task.id] = Suspend(f"moves off {', '.join(bad)}, which is drained", kept)
        for reservation in self.reservations.values():
            if reservation.ready_s > self.now_s:
                continue
            for holder in self.board.stops_for(reservation):
                if holder.id not in suspends and holder.id not in self.starts:
                    user = self.state.tasks[reservation.task_id].user
                    suspends[holder.id] = Suspend(f"has had its slice; {user}'s {reservation.task_id} is next")
        return Decision(self.starts, suspends, tuple(self.reservations.values()), self._wake_s())

    def _candidates(self, user: str) -> Iterator[Task]:
        """The user's next task of each size: those that never ran, then the others, the longest waiting in front."""
        firsts = []
        for (_, begun), queue in self.state.waiting[user].items():
            for since_s, task_id in queue:
                if task_id not in self.settled:
                    firsts.append((begun, since_s, task_id))
                    break
        return (self.state.tasks[task_id] for _, _, task_id in sorted(firsts))

    def _restore(self, task: Task) -> None:
        """On the nodes it kept and one that is free or whose task has had its slice; elsewhere only if that fails."""
        nodes = self.board.fit(task)
        kept = [name for name in task.kept_nodes if self.board.is_free(name)]
        homes = {self.state.zone_of[name] for name in kept}
        if nodes is not None and set(kept) <= set(nodes):
            self._give(task, nodes)
        elif len(homes) == 1 and self._claim(task, self._everybody(task), due=True, home=homes.pop()):
            pass
        elif nodes is not None:
            self._give(task, nodes)
        else:
            self._reserve(task)

    def _start(self, task: Task) -> bool:
        nodes = self.board.fit(task)
        if nodes is None:
            return False
        self._give(task, nodes)
        return True

    def _start_reserved(self, task: Task, reservation: Reservation) -> bool:
        if any(map(self.board.holder, reservation.nodes)):
            return False
        if self.state.spans_zones(reservation.nodes) and self.board.crossing is not None:
            return False
        self._give(task, reservation.nodes)
        return True

    def _give(self, task: Task, nodes: tuple[str, ...]) -> None:
        self.board.take(task, nodes)
        self._record(task, nodes)

    def _record(self, task: Task, nodes: tuple[str, ...]) -> None:
        self.starts[task.id] = Start(nodes, turn=task.id in self.heads)
        self._count(task)

    def _count(self, task: Task) -> None:
        """What is given now counts at once, so that one decision does not give one user everything."""
        self.settled.add(task.id)
        self.served[task.user] += task.num_nodes * self.settings.share_of_node(task.user)
        self.holds[task.user] = self.holds.get(task.user, 0) + task.num_nodes

    def _reserve_share(self, task: Task) -> bool:
        """Nodes of more served users, at once or not at all; and none while a due turn is behind another."""
        if self.turns_blocked:
            return False
        had, holds = self.served[task.user], self.holds.get(task.user, 0)
        room = len(self.board.coming) + sum(map(len, self.board.free.values()))
        if room + self.offers.room(task, had, holds) < task.num_nodes:
            return False
        return self._claim(task, self.offers.for_share(task, had, holds), due=False)

    def _everybody(self, task: Task) -> list[Offer]:
        return self.offers.for_turn(task, [self.board.running[task_id] for task_id in self.starts])

    def _reserve(self, task: Task) -> bool:
        """Nodes of whoever will have had a slice first: the user's own tasks before those of the most served."""
        return self._claim(task, self._everybody(task), due=True)

    def _claim(self, task: Task, offers: list[Offer], due: bool, home: str | None = None) -> bool:
        """Reserve nodes; for a due turn also such that are ready later; in the zone `home` only such that are ready."""
        if not self.state.possible(task.num_nodes):
            return False
        claim = self.board.claim(task, offers, may_wait=due and home is None, home=home)
        if claim is None:
            return False
        self.reservations[task.id] = self.board.reserve(task, claim, due)
        self._count(task)
        return True

    def _hold(self, reservation: Reservation) -> None:
        until_s = [protected_until(other, self.settings) for other in self.board.stops_for(reservation)]
        kept = replace(reservation, ready_s=max([reservation.ready_s, *until_s]))
        self.reservations[kept.task_id] = kept
        self.board.hold(kept)
        self._count(self.state.tasks[kept.task_id])

    def _on_drained_nodes(self) -> list[Task]:
        """Running tasks with a node that is drained, in the order of nodes."""
        drained = sorted(self.state.drained, key=self.state.rank.__getitem__)
        holders = dict.fromkeys(self.state.holder.get(name, "") for name in drained)
        return [self.state.running[task_id] for task_id in holders if task_id in self.state.running]

    def _wake_s(self) -> float | None:
        times = [reservation.ready_s for reservation in self.reservations.values()]
        times += [protected_until(task, self.settings) for task in self._on_drained_nodes()]
        if sum(len(queue) for sizes in self.state.waiting.values() for queue in sizes.values()) > len(self.settled):
            times += [turn.due_s for turn in self.turns]
            times += [self.now_s + self.settings.slice_s(self.state.tasks[task_id].user) for task_id in self.starts]
            times += [self.now_s + self.settings.tick_s, self.offers.next_s() or 0.0]
        return min((time for time in times if time > self.now_s), default=None)
