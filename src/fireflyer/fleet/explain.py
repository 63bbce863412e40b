"""Why each waiting task waits, and by when its next slice is promised. Of the same input as the decision."""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.fleet.decision import Settings
from fireflyer.fleet.state import FleetState, Task
from fireflyer.fleet.turns import served, turns


@dataclass(frozen=True, slots=True)
class Wait:
    """reason: in words. by_s: the latest begin of its next slice, if no node fails and no more users come; None while
    fewer nodes are up than it asks for."""

    reason: str
    by_s: float | None


def waits(state: FleetState, now_s: float, settings: Settings) -> dict[str, Wait]:
    """By task, for all that wait (`state.reservations` as the last decision left them)."""
    order = turns(state, now_s, settings, served(state, now_s, settings))
    promise_s = settings.turn_s(len(order))
    found: dict[str, Wait] = {}
    for users_before, turn in enumerate(order):
        place = 0
        for since_s, task_id in sorted(entry for queue in state.waiting[turn.user].values() for entry in queue):
            task = state.tasks[task_id]
            if state.possible(task.num_nodes):
                place += 1
                reason = _reason(state, task, users_before, place, now_s)
                found[task_id] = Wait(reason, max(since_s, turn.since_s) + place * promise_s)
    for sizes in state.waiting.values():
        for (size, _), queue in sizes.items():
            if not state.possible(size):
                up = sum(state.num_up.values())
                found |= {i: Wait(f"asks for {size} nodes; {up} of {len(state.nodes)} are up", None) for _, i in queue}
    return found


def _reason(state: FleetState, task: Task, users_before: int, place: int, now_s: float) -> str:
    reservation = state.reservations.get(task.id)
    if reservation is not None:
        there = sum(name not in state.holder for name in reservation.nodes)
        wait_s = max(0.0, reservation.ready_s - now_s)
        when = f"the others have their slices for {wait_s:.0f} s more" if wait_s else "the others are saving"
        return f"its nodes are being freed: {there} of {task.num_nodes} are, {when}"
    before = f"{users_before} user{'s' * (users_before != 1)} before" if users_before else "next in turn"
    if place > 1:
        before = f"{place - 1} of {task.user}'s own tasks before, {before}"
    if task.num_nodes > max(state.num_up.values()) and state.crossing is not None:
        return f"{before}; asks for more nodes than a zone has, and {state.crossing} is across zones"
    free = max(map(len, state.free.values()))
    return f"{before}; asks for {task.num_nodes} node{'s' * (task.num_nodes != 1)}, {free} are free together"
