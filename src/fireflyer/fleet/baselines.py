"""The schedulers that ours is compared with: first come first served, with and without backfill, and seven pre-emptive
priorities. They decide on the same state and place by the same rule (whole gangs, zone-local first).

They may know what ours does not: how long each task still runs (`Outlook`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from fireflyer.fleet.placement import Board
from fireflyer.fleet.policy import Decision, Settings, Start, Suspend, decide
from fireflyer.fleet.state import FleetState, Task
from fireflyer.fleet.workload import NUM_PRIORITIES, Submission

_BACKFILL_DEPTH = 500  # tasks looked at behind the first that does not fit, as many as Slurm does by default


@dataclass
class Outlook:
    """How long waiting tasks take from their launch to their end, and when running ones end, if nothing happens."""

    takes_s: dict[str, float] = field(default_factory=dict)
    ends_s: dict[str, float] = field(default_factory=dict)


class Scheduler(Protocol):
    """keeps_place: a task that comes back is queued by when it was submitted, not by when it came back."""

    name: str
    keeps_place: bool

    def group(self, submission: Submission) -> str:
        """Whose task it is in the state that `decide` sees: tasks of one group are queued together."""
        ...

    def decide(self, state: FleetState, now_s: float, outlook: Outlook) -> Decision: ...


class Ours:
    """The policy of the fleet, as it is."""

    name = "ours"
    keeps_place = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def group(self, submission: Submission) -> str:
        return submission.user

    def decide(self, state: FleetState, now_s: float, outlook: Outlook) -> Decision:
        return decide(state, now_s, self.settings)


class Fifo:
    """First come, first served; nobody is stopped.

    With backfill (EASY): the first task that does not fit gets a date, the earliest at which it will; tasks behind it
    start now if that does not move the date.
    """

    keeps_place = True

    def __init__(self, backfill: bool) -> None:
        self.backfill = backfill
        self.name = "fifo-backfill" if backfill else "fifo"

    def group(self, submission: Submission) -> str:
        return "all"

    def decide(self, state: FleetState, now_s: float, outlook: Outlook) -> Decision:
        board = Board(state, now_s)
        starts: dict[str, Start] = {}
        queue = _in_order(state, "all")
        for task in queue:
            nodes = board.fit(task)
            if nodes is None:
                if self.backfill and any(board.free.values()):
                    self._fill(board, task, islice(queue, _BACKFILL_DEPTH), outlook, starts)
                break
            board.take(task, nodes)
            starts[task.id] = Start(nodes, turn=False)
        return Decision(starts, {}, (), None)

    def _fill(
        self, board: Board, first: Task, behind: Iterator[Task], outlook: Outlook, starts: dict[str, Start]
    ) -> None:
        ends_s = outlook.ends_s | {i: board.now_s + outlook.takes_s[i] for i in starts}
        dated, date_s, spare = _date(board, first, ends_s)
        for task in behind:
            in_time = board.now_s + outlook.takes_s[task.id] <= date_s
            for zone in sorted(board.free, key=lambda z: (len(board.free[z]), z)):
                if len(board.free[zone]) < task.num_nodes:
                    continue
                if zone in dated and not in_time:
                    if task.num_nodes > spare:
                        continue
                    spare -= task.num_nodes
                nodes = board.pick((zone,), task)
                board.take(task, nodes)
                starts[task.id] = Start(nodes, turn=False)
                break
            if not any(board.free.values()):
                return


def _date(board: Board, task: Task, ends_s: dict[str, float]) -> tuple[tuple[str, ...], float, int]:
    """Where and when a task will find room, and how many nodes will be left beside it then."""
    num_up = board.state.num_up
    options = [(zone,) for zone in board.free if num_up[zone] >= task.num_nodes] or [tuple(board.free)]
    found = []
    for zones in options:
        room = sum(len(board.free[zone]) for zone in zones)
        date_s = board.now_s
        for end_s, other in sorted((ends_s[other.id], other.id) for other in board.running.values()):
            if room >= task.num_nodes:
                break
            room += sum(board.state.zone_of[name] in zones for name in board.running[other].nodes)
            date_s = end_s
        if len(zones) > 1 and board.crossing is not None:
            date_s = max(date_s, ends_s[board.crossing])
        found.append((date_s if room >= task.num_nodes else float("inf"), zones, room - task.num_nodes))
    date_s, zones, spare = min(found)
    return zones, date_s, spare


class Priority:
    """Seven priorities, the higher first; inside one, first come first served. A task stops those of lower priority at
    once, however short they ran; lower ones fill the gaps."""

    name = "priority"
    keeps_place = True

    def group(self, submission: Submission) -> str:
        return str(submission.priority)

    def decide(self, state: FleetState, now_s: float, outlook: Outlook) -> Decision:
        board = Board(state, now_s)
        starts: dict[str, Start] = {}
        suspends: dict[str, Suspend] = {}
        lowest_first = sorted(state.running.values(), key=lambda task: (task.user, -task.since_s, task.id))
        for priority in reversed(range(NUM_PRIORITIES)):
            for task in _in_order(state, str(priority)):
                nodes = board.fit(task)
                if nodes is not None:
                    board.take(task, nodes)
                    starts[task.id] = Start(nodes, turn=False)
                    continue
                lower = [(now_s, other) for other in lowest_first if other.user < str(priority)]
                claim = board.claim(task, lower, may_wait=False)
                if claim is None:
                    break
                board.reserve(task, claim, due=False)
                reason = f"makes room for {task.id} of priority {priority}"
                suspends |= {victim.id: Suspend(reason) for victim in claim.victims}
        return Decision(starts, suspends, (), None)


def _in_order(state: FleetState, group: str) -> Iterator[Task]:
    """A group's waiting tasks, the first come first."""
    return (state.tasks[task_id] for _, task_id in heapq.merge(*state.waiting.get(group, {}).values()))
