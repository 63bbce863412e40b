"""Which nodes a gang gets: all of them or none, whole, inside one zone where one has room, and else across zones if no
other task is across zones.

`Board` is one decision's scratch copy of the state: nodes handed out leave it, so nothing is given twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fireflyer.fleet.state import FleetState, Reservation, Task

Offer = tuple[float, int, Task]  # from when on a task may be stopped, and how many nodes that frees


@dataclass(frozen=True)
class Claim:
    """A way to free enough nodes for a task: stop these tasks when `ready_s` has come."""

    zones: tuple[str, ...]
    victims: tuple[Task, ...]
    ready_s: float

    @property
    def cost(self) -> tuple[float, int, tuple[str, ...]]:
        return self.ready_s, sum(victim.num_nodes for victim in self.victims), self.zones


class Board:
    """What is free in this decision.

    coming: nodes that will be free and are not meant for anybody yet, with the time when their holder is stopped.
    running: tasks that run, those started in this decision included.
    doomed: tasks that stop or will be stopped, with that time.
    crossing: the task that runs (or stops) across zones; next_crossing: the one that shall.
    """

    def __init__(self, state: FleetState, now_s: float) -> None:
        self.state = state
        self.now_s = now_s
        self.free = {zone: set(names) for zone, names in state.free.items()}
        self.coming: dict[str, float] = {}
        self.running = dict(state.running)
        self.room_of: dict[str, dict[str, int]] = {}
        self._started: dict[str, str] = {}
        self.doomed: dict[str, float] = {}
        self.crossing = state.crossing
        self.next_crossing: str | None = None
        for task in state.stopping.values():
            self._doom(task, now_s)

    def fit(self, task: Task) -> tuple[str, ...] | None:
        """Free nodes for a task, or None: in the zone with most of its kept nodes, then in the one it fills best."""
        size = task.num_nodes
        zones = [zone for zone, free in self.free.items() if len(free) >= size]
        if zones:
            best = min(zones, key=lambda z: (-len(self.free[z].intersection(task.kept_nodes)), len(self.free[z]), z))
            return self.pick((best,), task)
        if self.crossing is None and self.next_crossing is None and sum(map(len, self.free.values())) >= size:
            return self.pick(self._widest_first(), task)
        return None

    def take(self, task: Task, nodes: tuple[str, ...]) -> None:
        """Hand out free nodes."""
        self.running[task.id] = replace(task, phase="running", since_s=self.now_s, nodes=nodes, kept_nodes=())
        room = self.room_of[task.id] = dict.fromkeys(self.free, 0)
        for name in nodes:
            zone = self.state.zone_of[name]
            self.free[zone].remove(name)
            room[zone] += 1
            self._started[name] = task.id
        if self.state.spans_zones(nodes):
            self.crossing = task.id

    def is_free(self, name: str) -> bool:
        return name in self.free[self.state.zone_of[name]]

    def holder(self, name: str) -> str | None:
        """The task that holds a node, from before or since this decision."""
        return self._started.get(name) or self.state.holder.get(name)

    def stops_for(self, reservation: Reservation) -> list[Task]:
        """Who runs on a reservation's nodes, and who is across zones where it shall be."""
        holders = dict.fromkeys(filter(None, map(self.holder, reservation.nodes)))
        if self.state.spans_zones(reservation.nodes) and self.crossing is not None:
            holders[self.crossing] = None
        return [self.running[task_id] for task_id in holders if task_id in self.running]

    def claim(
        self, task: Task, eligible: Sequence[tuple[float, Task]], may_wait: bool, home: str | None = None
    ) -> Claim | None:
        """The way to free nodes for a task that is ready first, and of these the one that stops the fewest nodes.

        eligible: running tasks that may be stopped for it and from when on, those to stop first in front.
        may_wait: take also a claim that is ready later, not only now.
        home: look only in this zone.
        """
        zones = self.free if home is None else (home,)
        claims = [self._claim(task, (zone,), eligible) for zone in zones if self.state.num_up[zone] >= task.num_nodes]
        if not any(claims) and len(self.free) > 1 and home is None:
            claims = [self._claim(task, self._widest_first(), eligible)]
        horizon_s = float("inf") if may_wait else self.now_s
        ready = [claim for claim in claims if claim is not None and claim.ready_s <= horizon_s]
        return min(ready, key=lambda claim: claim.cost, default=None)

    def reserve(self, task: Task, claim: Claim, due: bool) -> Reservation:
        """Set nodes apart for a task: the free ones first, then those that will be."""
        for victim in claim.victims:
            self._doom(victim, claim.ready_s)
        kept, rank, zone_of = set(task.kept_nodes), self.state.rank, self.state.zone_of
        names = [name for zone in claim.zones for name in self.free[zone]]
        names += [
            name for name, ready_s in self.coming.items() if zone_of[name] in claim.zones and ready_s <= claim.ready_s
        ]
        names.sort(key=lambda name: (name not in kept, name in self.coming, self.coming.get(name, 0.0), rank[name]))
        chosen = tuple(sorted(names[: task.num_nodes], key=rank.__getitem__))
        reservation = Reservation(task.id, chosen, claim.ready_s, due)
        self.hold(reservation)
        return reservation

    def hold(self, reservation: Reservation) -> None:
        """Take a reservation's nodes off the board, and doom those who hold them."""
        for holder in self.stops_for(reservation):
            if holder.id not in self.doomed:
                self._doom(holder, reservation.ready_s)
        for name in reservation.nodes:
            self.free[self.state.zone_of[name]].discard(name)
            self.coming.pop(name, None)
        if self.state.spans_zones(reservation.nodes):
            self.next_crossing = reservation.task_id

    def available(self, name: str) -> bool:
        """Is the node up, and not meant for anybody? (Who runs there may have to stop.)"""
        if self.is_free(name) or name in self.coming:
            return True
        holder = self.holder(name)
        return holder is not None and holder not in self.doomed and self.state.nodes[name].health == "up"

    def _claim(self, task: Task, zones: tuple[str, ...], eligible: Sequence[tuple[float, Task]]) -> Claim | None:
        across = len(zones) > 1
        must: list[Offer] = []
        offers: list[Offer] = []
        for until_s, victim in eligible:
            if victim.id in self.doomed:
                continue
            room = self.room_of.get(victim.id) or self.state.room_of[victim.id]
            gain = sum(room.get(zone, 0) for zone in zones)
            if gain:
                target = must if across and victim.id == self.crossing else offers
                target.append((max(until_s, self.now_s), gain, victim))
        if across and not self._may_cross(bool(must)):
            return None
        coming = [(ready_s, 1) for name, ready_s in self.coming.items() if self.state.zone_of[name] in zones]
        need = task.num_nodes - sum(len(self.free[zone]) for zone in zones) - sum(gain for _, gain, _ in must)
        start_s = max([self.now_s, *(until_s for until_s, _, _ in must)])
        ready_s = _enough_at(need, coming + [(until_s, gain) for until_s, gain, _ in offers], start_s)
        if ready_s is None:
            return None
        need -= sum(ready <= ready_s for ready, _ in coming)
        victims = _fewest(need, [offer for offer in offers if offer[0] <= ready_s])
        return Claim(zones, tuple(victim for _, _, victim in must + victims), ready_s)

    def _may_cross(self, stops_the_other: bool) -> bool:
        """May a task be planned across zones, given that the one that is across now is stopped for it?"""
        if self.next_crossing is not None:
            return False
        return self.crossing is None or self.crossing in self.doomed or stops_the_other

    def _doom(self, task: Task, ready_s: float) -> None:
        self.doomed[task.id] = ready_s
        for name in task.nodes:
            if self.state.nodes[name].health == "up":
                self.coming[name] = ready_s

    def _widest_first(self) -> tuple[str, ...]:
        return tuple(sorted(self.free, key=lambda zone: (-len(self.free[zone]), zone)))

    def pick(self, zones: tuple[str, ...], task: Task) -> tuple[str, ...]:
        """The task's nodes among the free ones: those it kept first, then zone by zone in the order of names."""
        kept, rank, zone_of = set(task.kept_nodes), self.state.rank, self.state.zone_of
        names = [name for zone in zones for name in self.free[zone]]
        names.sort(key=lambda name: (name not in kept, zones.index(zone_of[name]), rank[name]))
        return tuple(sorted(names[: task.num_nodes], key=rank.__getitem__))


def _enough_at(need: int, supply: Iterable[tuple[float, int]], start_s: float) -> float | None:
    """When as many nodes have come together, at `start_s` at the earliest; None for never. Supply: (when, nodes)."""
    ready_s = start_s
    for when_s, nodes in sorted(supply):
        if need <= 0:
            break
        need -= nodes
        ready_s = max(ready_s, when_s)
    return ready_s if need <= 0 else None


def _fewest(need: int, offers: Sequence[Offer]) -> list[Offer]:
    """Offers that free `need` nodes: in their order those that free no more than is missing; if that is not enough, the
    smallest that frees the rest, without those that it makes unnecessary."""
    chosen: list[Offer] = []
    passed: list[Offer] = []
    for offer in offers:
        if need <= 0:
            break
        if offer[1] <= need:
            chosen.append(offer)
            need -= offer[1]
        else:
            passed.append(offer)
    if need <= 0:
        return chosen
    last = min(passed, key=lambda offer: offer[1])
    spare = last[1] - need
    for offer in list(chosen):
        if offer[1] <= spare:
            chosen.remove(offer)
            spare -= offer[1]
    return [*chosen, last]
