"""What the policy sees: nodes in zones, tasks, what each user had, and the nodes being freed for a task.

`FleetState` keeps these indexed (free nodes by zone, waiting tasks by user and size), so that a decision costs the same
whether it is built anew from a ledger or changed one task at a time; both give the same state.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from fireflyer.fleet.fair_share import Usage, decayed

Health = Literal["up", "drained", "lost"]
Phase = Literal["waiting", "running", "stopping"]
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Node:
    """A whole machine.

    health: "up" takes tasks; "drained" takes none and what runs there moves away; "lost" (no contact, or dead) takes
    none, and what runs there stays until its end is known: lost contact is not death.
    """

    name: str
    zone: str = "zone0"
    health: Health = "up"


@dataclass(frozen=True, slots=True)
class Task:
    """One task as it stands now; finished ones are not shown to the policy.

    since_s: when its phase began: its wait, its slice (the launch) or its stop.
    nodes: those it holds while it runs or stops; none while it waits.
    kept_nodes: of a waiting task that lost a node under its feet (or moved off one): the nodes it had, which it gets
        back with one other in place of the lost one.
    num_slices: slices begun so far.
    limit_s: its own promise to end within this time, which lets it run on nodes that are being freed for another.
    """

    id: str
    user: str
    num_nodes: int
    since_s: float
    phase: Phase = "waiting"
    nodes: tuple[str, ...] = ()
    kept_nodes: tuple[str, ...] = ()
    num_slices: int = 0
    limit_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Reservation:
    """Nodes that are being freed for a waiting task. Whoever asks for decisions hands them back with the next state.

    ready_s: when those who run there have had their slices and are stopped.
    due: for a task whose turn had come; it yields to nobody.
    """

    task_id: str
    nodes: tuple[str, ...]
    ready_s: float
    due: bool


class FleetState:
    """The indexed state.

    A node has one holder at most; `free` holds nodes that are up and have none. held: nodes by user.
    waiting: by user and (size, had a slice before), running_of: by user; both as (since_s, id), the longest in front.
    room_of: nodes that the end of a task would free, by zone. crossing: the task across zones.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        tasks: Iterable[Task] = (),
        usage: Mapping[str, Usage] | None = None,
        reservations: Iterable[Reservation] = (),
    ) -> None:
        ordered = sorted(nodes, key=lambda node: (node.zone, natural(node.name)))
        self.nodes = {node.name: node for node in ordered}
        self.rank = {name: rank for rank, name in enumerate(self.nodes)}
        self.zone_of = {node.name: node.zone for node in ordered}
        self.zones = tuple(dict.fromkeys(node.zone for node in ordered))
        self.num_up = {zone: sum(n.zone == zone and n.health == "up" for n in ordered) for zone in self.zones}
        self.free: dict[str, set[str]] = {zone: set() for zone in self.zones}
        for node in ordered:
            if node.health == "up":
                self.free[node.zone].add(node.name)
        self.drained = {node.name for node in ordered if node.health == "drained"}
        self.holder: dict[str, str] = {}
        self.tasks: dict[str, Task] = {}
        self.running: dict[str, Task] = {}
        self.running_of: dict[str, list[tuple[float, str]]] = {}
        self.room_of: dict[str, dict[str, int]] = {}
        self.stopping: dict[str, Task] = {}
        self.interrupted: dict[str, Task] = {}
        self.limited: dict[str, Task] = {}
        self.waiting: dict[str, dict[tuple[int, bool], list[tuple[float, str]]]] = {}
        self.held: dict[str, int] = {}
        self.crossing: str | None = None
        self.usage: dict[str, Usage] = dict(usage or {})
        self.reservations = {reservation.task_id: reservation for reservation in reservations}
        for task in tasks:
            self.put(task)

    def put(self, task: Task) -> None:
        """Add a task, or replace what was known of it."""
        if task.id in self.tasks:
            self.remove(task.id)
        self.tasks[task.id] = task
        if task.phase == "waiting":
            queue = self.waiting.setdefault(task.user, {}).setdefault((task.num_nodes, task.num_slices > 0), [])
            insort(queue, (task.since_s, task.id))
            if task.kept_nodes:
                self.interrupted[task.id] = task
            if task.limit_s < math.inf:
                self.limited[task.id] = task
            return
        if task.phase == "running":
            self.running[task.id] = task
            insort(self.running_of.setdefault(task.user, []), (task.since_s, task.id))
        else:
            self.stopping[task.id] = task
        self.held[task.user] = self.held.get(task.user, 0) + len(task.nodes)
        for name in task.nodes:
            assert name not in self.holder, f"{name} is given to {self.holder[name]} and to {task.id}"
            self.holder[name] = task.id
            self.free[self.zone_of[name]].discard(name)
        self.room_of[task.id] = self._room(task)
        if self.spans_zones(task.nodes):
            self.crossing = task.id

    def remove(self, task_id: str) -> None:
        """Forget a task (it is done, or stopped for good); its nodes are free again where they are up."""
        task = self.tasks.pop(task_id)
        if task.phase == "waiting":
            by_size = self.waiting[task.user]
            _take_out(by_size, (task.num_nodes, task.num_slices > 0), (task.since_s, task_id))
            if not by_size:
                del self.waiting[task.user]
            self.interrupted.pop(task_id, None)
            self.limited.pop(task_id, None)
            return
        if task.phase == "running":
            del self.running[task_id]
            _take_out(self.running_of, task.user, (task.since_s, task_id))
        else:
            del self.stopping[task_id]
        del self.room_of[task_id]
        if self.crossing == task_id:
            self.crossing = None
        self.held[task.user] -= len(task.nodes)
        if not self.held[task.user]:
            del self.held[task.user]
        for name in task.nodes:
            del self.holder[name]
            if self.nodes[name].health == "up":
                self.free[self.zone_of[name]].add(name)

    def put_node(self, node: Node) -> None:
        """Change a node's health; a node keeps its zone."""
        before = self.nodes[node.name]
        assert node.zone == before.zone, f"{node.name} moved from {before.zone} to {node.zone}"
        self.nodes[node.name] = node
        self.num_up[node.zone] += (node.health == "up") - (before.health == "up")
        if node.health == "up" and node.name not in self.holder:
            self.free[node.zone].add(node.name)
        else:
            self.free[node.zone].discard(node.name)
        (self.drained.add if node.health == "drained" else self.drained.discard)(node.name)
        holder = self.holder.get(node.name)
        if holder is not None:
            self.room_of[holder] = self._room(self.tasks[holder])

    def _room(self, task: Task) -> dict[str, int]:
        """How many nodes would be free in each zone if the task stopped."""
        room: dict[str, int] = {}
        for name in task.nodes:
            node = self.nodes[name]
            if node.health == "up":
                room[node.zone] = room.get(node.zone, 0) + 1
        return room

    def charge(self, user: str, now_s: float, half_life_s: float, turn: bool = False) -> None:
        """Bring a user's usage up to now: before the number of nodes they hold changes. turn: Start.turn."""
        old = self.usage.get(user, Usage(as_of_s=now_s))
        had = decayed(old, self.held.get(user, 0), now_s, half_life_s)
        self.usage[user] = Usage(had, now_s, now_s if turn else old.last_turn_s)

    def spans_zones(self, nodes: Iterable[str]) -> bool:
        return len({self.zone_of[name] for name in nodes}) > 1

    def possible(self, num_nodes: int) -> bool:
        """Could a task of this size run now if it had every node that is up?"""
        return num_nodes <= sum(self.num_up.values())


def _take_out(queues: dict[Key, list[tuple[float, str]]], key: Key, entry: tuple[float, str]) -> None:
    """Take an entry out of one of several sorted queues; an empty one goes."""
    queue = queues[key]
    del queue[bisect_left(queue, entry)]
    if not queue:
        del queues[key]


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which node2 comes before node10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)
