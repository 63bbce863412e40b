"""Who gets the nodes now. A pure function of the time, the state and the settings: the same input, the same decision.

Two rules, in this order:

1. **Turns.** Every waiting user gets a turn within (waiting users) x (slice + stop): the task of theirs that has waited
   longest gets its nodes for at least one slice. When serving all in the order of their waits would only just keep that
   promise, turns are *due*: they are given in that order, and may stop any task that has had its slice.
2. **Least served first.** Otherwise the user who had the fewest node-seconds per weight, faded with a half-life, comes
   first, and may stop tasks of users who had clearly more. Nodes that then are still free go to whoever fits.

A task is never stopped before its slice is over, so freeing nodes for a gang takes one slice and one stop at most.
Reservations carry that over from one decision to the next.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fireflyer.errors import UserError
from fireflyer.fleet.fair_share import Usage, decayed
from fireflyer.fleet.placement import Board
from fireflyer.fleet.state import FleetState, Reservation, Task


@dataclass(frozen=True)
class Settings:
    """What a fleet may choose. Raises UserError naming the setting, its value and its range.

    min_slice_s: nobody is stopped before this, from launch on; a user of weight above 1 has that many times as long.
    stop_s: the deadline for saving and stopping; past it a task is killed.
    half_life_s: node-seconds count half after this time.
    tolerance: a user is stopped for a less served one only if they still had this share more after the other's slice.
    own_turn_s: after this time a task that has run before may take the nodes of another task of the same user.
    tick_s: how often to decide again while tasks wait and nothing happens.
    weights: of users; 1 for those not named.
    """

    min_slice_s: float = 600.0
    stop_s: float = 60.0
    half_life_s: float = 86_400.0
    tolerance: float = 0.05
    own_turn_s: float = 3_600.0
    tick_s: float = 60.0
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("min_slice_s", "half_life_s", "tick_s"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in ("stop_s", "own_turn_s"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("tolerance", self.tolerance, 0 <= self.tolerance < 1, "0 or more and below 1")
        for user, weight in self.weights.items():
            _check(f"weights.{user}", weight, weight > 0, "above 0")

    def weight(self, user: str) -> float:
        return self.weights.get(user, 1.0)

    def slice_s(self, user: str) -> float:
        """How long a user's task runs at least."""
        return self.min_slice_s * max(1.0, self.weight(user))

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


def protected_until(task: Task, settings: Settings) -> float:
    """When a running task has had its slice."""
    return task.since_s + min(settings.slice_s(task.user), task.limit_s)


def check_size(num_nodes: int, state: FleetState, wait_for_nodes: bool) -> None:
    """Refuse a task that this fleet can never run, unless it shall wait for more nodes. Raises UserError."""
    if num_nodes < 1:
        raise UserError(f"nodes = {num_nodes}: a task needs 1 node at least")
    if num_nodes > len(state.nodes) and not wait_for_nodes:
        raise UserError(
            f"nodes = {num_nodes}: the fleet has {len(state.nodes)}; ask for {len(state.nodes)} or fewer, "
            "or for waiting until there are enough"
        )


@dataclass(frozen=True)
class Turn:
    """A waiting user's next turn: for the task that has waited longest of those that fit the nodes that are up.

    since_s: since when the user has waited for it. due_s: when it begins to go before everything else.
    """

    user: str
    task: Task
    since_s: float
    due_s: float


def turns(state: FleetState, now_s: float, settings: Settings) -> list[Turn]:
    """Waiting users, the longest waiting first.

    Serving in this order, user k waits for as many rounds as the gangs before need: gangs that together fit the
    smallest zone start together. A turn is due once a slice for somebody else would break the promise of `turn_s`.
    """
    heads = [head for user in state.waiting if (head := _head(state, user))]
    waits = [(min(now_s, max(head.since_s, state.usage.get(head.user, Usage()).last_turn_s)), head) for head in heads]
    waits.sort(key=lambda wait: (wait[0], wait[1].user))
    promise_s, round_s = settings.turn_s(len(waits)), settings.turn_s(1)
    room = min((up for up in state.num_up.values() if up), default=0)
    rounds, filled = 0, room
    found = []
    for since_s, head in waits:
        filled += head.num_nodes
        if filled > room:
            rounds, filled = rounds + 1, head.num_nodes
        found.append(Turn(head.user, head, since_s, since_s + promise_s - (rounds + 1) * round_s))
    return found


def _head(state: FleetState, user: str) -> Task | None:
    heads = [queue[0] for size, queue in state.waiting[user].items() if state.possible(size)]
    return state.tasks[min(heads)[1]] if heads else None


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
        self.served: dict[str, float] = {}
        for user in sorted({*state.waiting, *state.held}):
            usage = state.usage.get(user, Usage(as_of_s=now_s))
            had = decayed(usage, state.held.get(user, 0), now_s, settings.half_life_s)
            self.served[user] = had / settings.weight(user)
        self.turns = turns(state, now_s, settings)
        self.heads = {turn.task.id for turn in self.turns}
        self.by_preference = sorted(state.running.values(), key=lambda t: (-self.served[t.user], t.since_s, t.id))
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
            if task.id not in self.settled and not self._start(task):
                self._reserve(task)

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
        for task in self.state.running.values():
            bad = [name for name in task.nodes if self.state.nodes[name].health == "drained"]
            if bad and protected_until(task, self.settings) <= self.now_s:
                kept = tuple(name for name in task.nodes if name not in bad)
                suspends[task.id] = Suspend(f"moves off {', '.join(bad)}, which is drained", kept)
        for reservation in self.reservations.values():
            if reservation.ready_s > self.now_s:
                continue
            for holder in self.board.stops_for(reservation):
                if holder.id not in suspends:
                    user = self.state.tasks[reservation.task_id].user
                    suspends[holder.id] = Suspend(f"has had its slice; {user}'s {reservation.task_id} is next")
        return Decision(self.starts, suspends, tuple(self.reservations.values()), self._wake_s())

    def _candidates(self, user: str) -> Iterator[Task]:
        """The first waiting task of each size, those that have waited longest in front."""
        firsts = []
        for queue in self.state.waiting[user].values():
            for entry in queue:
                if entry[1] not in self.settled:
                    firsts.append(entry)
                    break
        return (self.state.tasks[task_id] for _, task_id in sorted(firsts))

    def _start(self, task: Task) -> bool:
        nodes = self.board.fit(task)
        if nodes is None:
            return False
        self.board.take(task, nodes)
        self._record(task, nodes)
        return True

    def _start_reserved(self, task: Task, reservation: Reservation) -> bool:
        if any(map(self.board.holder, reservation.nodes)):
            return False
        if self.state.spans_zones(reservation.nodes) and self.board.crossing is not None:
            return False
        self.board.take(task, reservation.nodes)
        self._record(task, reservation.nodes)
        return True

    def _record(self, task: Task, nodes: tuple[str, ...]) -> None:
        self.starts[task.id] = Start(nodes, turn=task.id in self.heads)
        self._count(task)

    def _count(self, task: Task) -> None:
        """What is given now counts at once, so that one decision does not give one user everything."""
        self.settled.add(task.id)
        self.served[task.user] += self._slice_share(task)

    def _slice_share(self, task: Task) -> float:
        return task.num_nodes * self.settings.slice_s(task.user) / self.settings.weight(task.user)

    def _reserve_share(self, task: Task) -> bool:
        """Nodes of more served users, at once or not at all; and none while a due turn is behind another."""
        eligible = self._eligible_for_share(task)
        return not self.turns_blocked and bool(eligible or self.board.coming) and self._claim(task, eligible, due=False)

    def _reserve(self, task: Task) -> bool:
        """Nodes of whoever will have had a slice first: the user's own tasks before those of the most served."""
        tasks = [*self.by_preference, *(self.board.running[task_id] for task_id in self.starts)]
        tasks.sort(key=lambda other: other.user != task.user)
        return self._claim(task, [(protected_until(other, self.settings), other) for other in tasks], due=True)

    def _claim(self, task: Task, eligible: Sequence[tuple[float, Task]], due: bool) -> bool:
        claim = self.board.claim(task, eligible, may_wait=due) if self.state.possible(task.num_nodes) else None
        if claim is None:
            return False
        self.reservations[task.id] = self.board.reserve(task, claim, due)
        self._count(task)
        return True

    def _hold(self, reservation: Reservation) -> None:
        until_s = [protected_until(task, self.settings) for task in self.board.stops_for(reservation)]
        kept = replace(reservation, ready_s=max([reservation.ready_s, *until_s]))
        self.reservations[kept.task_id] = kept
        self.board.hold(kept)
        self._count(self.state.tasks[kept.task_id])

    def _eligible_for_share(self, task: Task) -> list[tuple[float, Task]]:
        """Tasks of clearly more served users that have had a slice; and the user's own, for a task's first slice or
        after `own_turn_s`."""
        after = self.served[task.user] + self._slice_share(task)
        own, others = [], []
        for other in self.by_preference:
            until_s = protected_until(other, self.settings)
            if other.user == task.user:
                if task.num_slices:
                    until_s = max(until_s, other.since_s + self.settings.own_turn_s)
                if until_s <= self.now_s:
                    own.append((until_s, other))
            elif self.served[other.user] * (1.0 - self.settings.tolerance) >= after and until_s <= self.now_s:
                others.append((until_s, other))
        return own + others

    def _wake_s(self) -> float | None:
        times = [reservation.ready_s for reservation in self.reservations.values()]
        if sum(len(queue) for sizes in self.state.waiting.values() for queue in sizes.values()) > len(self.settled):
            times += [turn.due_s for turn in self.turns]
            times += [protected_until(task, self.settings) for task in self.state.running.values()]
            times += [self.now_s + self.settings.slice_s(self.state.tasks[task_id].user) for task_id in self.starts]
            times.append(self.now_s + self.settings.tick_s)
        elif any(node.health == "drained" for node in self.state.nodes.values()):
            times += [protected_until(task, self.settings) for task in self.state.running.values()]
        return min((time for time in times if time > self.now_s), default=None)


def _check(name: str, value: float, right: bool, wanted: str) -> None:
    if not (math.isfinite(value) and right):
        raise UserError(f"{name} = {value!r}: it has to be {wanted}")
