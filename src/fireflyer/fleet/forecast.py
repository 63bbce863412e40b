"""When a waiting task will get its next slice: the policy, run ahead on the state as it is.

Nobody is taken to finish, so the answer is the latest that is likely; a job that ends makes it sooner.
"""

from __future__ import annotations

from dataclasses import replace

from fireflyer.fleet.policy import Settings, decide
from fireflyer.fleet.state import FleetState

_DECISIONS = 200


def forecast(state: FleetState, now_s: float, settings: Settings, stop_s: float) -> dict[str, float]:
    """By task id, when it starts. Missing: not within the decisions that are looked at.

    Args:
        state: used up.
        stop_s: how long saving and stopping usually takes.
    """
    waiting = {task.id for task in state.tasks.values() if task.phase == "waiting"}
    starts: dict[str, float] = {}
    for _ in range(_DECISIONS):
        if waiting <= starts.keys():
            break
        for task in list(state.stopping.values()):
            if task.since_s + stop_s <= now_s:
                state.charge(task.user, now_s, settings.half_life_s)
                state.put(replace(task, phase="waiting", nodes=(), since_s=now_s))
        decision = decide(state, now_s, settings)
        for name in decision.suspends:
            state.put(replace(state.tasks[name], phase="stopping", since_s=now_s))
        for name, start in decision.starts.items():
            task = state.tasks[name]
            state.charge(task.user, now_s, settings.half_life_s, start.turn)
            state.put(replace(task, phase="running", nodes=start.nodes, kept_nodes=(), since_s=now_s))
            starts.setdefault(name, now_s)
        state.reservations = {reservation.task_id: reservation for reservation in decision.reservations}
        soonest = [task.since_s + stop_s for task in state.stopping.values()]
        soonest += [] if decision.wake_s is None else [decision.wake_s]
        if not soonest:
            break
        now_s = max(min(soonest), now_s + 1e-3)
    return {name: start_s for name, start_s in starts.items() if name in waiting}
