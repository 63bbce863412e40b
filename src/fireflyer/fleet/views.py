"""The fleet as its users see it: one JSON-able picture of the ledger, the last look at the nodes, and the policy."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fireflyer.fleet.controller import Controller, policy_id
from fireflyer.fleet.explain import Wait, waits
from fireflyer.fleet.fair_share import Usage
from fireflyer.fleet.forecast import forecast
from fireflyer.fleet.ledger import AttemptRow, TaskRow
from fireflyer.fleet.records import read_json, use_path

_USUAL_STOP_S = 1.0
_ENDED_SHOWN = 10


def queue(fleet: Controller) -> dict[str, Any]:
    """Who runs, why each waits, when its next slice is expected, everybody's share, occupancy and real use."""
    with fleet.lock:
        now = fleet.clock.now()
        tasks = fleet.ledger.active_tasks()
        open_ = {attempt.task: attempt for attempt in fleet.ledger.open_attempts()}
        state = fleet.policy_state(now)
        usage = dict(state.usage)
        reasons = waits(state, now, fleet.settings)
        trouble = fleet.paused or fleet.sight.trouble
        ended = fleet.ledger.recent_tasks(_ENDED_SHOWN)
        nodes = node_rows(fleet)
    up = [node for node in nodes if node["health"] == "up"]
    busy = [node for node in nodes if node["task"] is not None]
    rows = [_task_row(fleet, task, open_.get(task.id), now) for task in tasks]
    starts = forecast(state, now, fleet.settings, _USUAL_STOP_S)
    for task, row in zip(tasks, rows, strict=True):
        if row["state"] == "waiting":
            wait = reasons.get(policy_id(task.id))
            row["why"] = _why(task, wait, trouble, now)
            start_s = starts.get(policy_id(task.id))
            row["expected_in_s"] = None if start_s is None else max(0.0, start_s - now)
            row["promised_in_s"] = None if wait is None or wait.by_s is None else max(0.0, wait.by_s - now)
    loads = [node["use"] for node in busy if node["use"] is not None]
    return {
        "now": now,
        "backend": fleet.backend.name,
        "trouble": trouble,
        "nodes": {"total": len(nodes), "up": len(up), "busy": len(busy)},
        "occupancy": len(busy) / len(up) if up else 0.0,
        "real_use": sum(loads) / len(up) if up and loads else None,
        "slice_s": fleet.settings.min_slice_s,
        "users": _shares(fleet, tasks, usage),
        "tasks": rows,
        "ended": [_task_row(fleet, task, None, now) for task in ended],
    }


def node_rows(fleet: Controller) -> list[dict[str, Any]]:
    """Each node: health, why not up, who holds it, and its real use (0 to 1; None before the first note of it)."""
    drained = fleet.ledger.drained()
    holders = {
        name: (attempt, rank) for attempt in fleet.ledger.open_attempts() for rank, name in enumerate(attempt.nodes)
    }
    rows = []
    for node in fleet.sight.nodes:
        attempt, rank = holders.get(node.name, (None, 0))
        health = "drained" if node.health == "up" and node.name in drained else node.health
        rows.append(
            {
                "name": node.name,
                "zone": node.zone,
                "health": health,
                "reason": drained.get(node.name) or node.reason,
                "task": None if attempt is None else attempt.task,
                "use": None if attempt is None else _real_use(fleet, attempt, rank),
            }
        )
    return rows


def status(fleet: Controller, task: TaskRow) -> dict[str, Any]:
    """One task and all its attempts."""
    attempts = [attempt for attempt in fleet.ledger.attempts_of(task.id) if attempt.outcome != "void"]
    open_ = next((attempt for attempt in attempts if attempt.state != "ended"), None)
    row = _task_row(fleet, task, open_, fleet.clock.now())
    if task.state == "waiting" and task.validates is None:
        row = next((entry for entry in queue(fleet)["tasks"] if entry["task"] == task.id), row)
    return {
        **row,
        "argv": task.argv,
        "cwd": task.cwd,
        "run_dir": task.run_dir,
        "exit_code": task.exit_code,
        "waited_s": _waited(task, attempts, fleet.clock.now()),
        "attempts": [
            {
                "attempt": number,
                "nodes": attempt.nodes,
                "state": attempt.state,
                "outcome": attempt.outcome,
                "reason": attempt.reason or attempt.stop_why or "",
                "began_s_ago": fleet.clock.now() - attempt.opened_at,
                "held_s": (attempt.ended_at or fleet.clock.now()) - attempt.opened_at,
                "saved_step": attempt.saved_step,
                "kept_s": attempt.kept_s,
                "lost_s": attempt.lost_s,
                "stop_s": attempt.stop_s,
                "folder": str(fleet.hands.attempt_folder(attempt.id)),
            }
            for number, attempt in enumerate(attempts, 1)
        ],
    }


def _task_row(fleet: Controller, task: TaskRow, attempt: AttemptRow | None, now: float) -> dict[str, Any]:
    attempts = [other for other in fleet.ledger.attempts_of(task.id) if other.outcome != "void"]
    saved = [other.saved_step for other in attempts if other.saved_step is not None]
    return {
        "task": task.id,
        "user": task.user,
        "name": task.name,
        "nodes": task.nodes,
        "state": task.state if attempt is None or attempt.state != "stopping" else "stopping",
        "on": [] if attempt is None else attempt.nodes,
        "for_s": now - (_waits_since(task, attempts) if attempt is None else attempt.opened_at),
        "slices": len(attempts),
        "kept_s": sum(other.kept_s for other in attempts),
        "lost_s": sum(other.lost_s for other in attempts),
        "saved_step": saved[-1] if saved else None,
        "why": task.reason if attempt is None else (attempt.stop_why or ""),
        "expected_in_s": None,
        "promised_in_s": None,
    }


def _waits_since(task: TaskRow, attempts: list[AttemptRow]) -> float:
    ended = [attempt.ended_at for attempt in attempts if attempt.ended_at is not None]
    return max([task.submitted_at, *ended])


def _why(task: TaskRow, wait: Wait | None, trouble: str | None, now: float) -> str:
    """Why a task waits, in words that say what it waits for."""
    if trouble is not None:
        return f"nothing is launched now: {trouble}"
    if task.retry_at > now:
        return f"{task.reason}; tried again in {task.retry_at - now:.0f} s"
    if task.validates is not None:
        return f"waits until {task.validates} is free"
    return "is about to stop" if wait is None else wait.reason


def _shares(fleet: Controller, tasks: list[TaskRow], usage: dict[str, Usage]) -> list[dict[str, Any]]:
    """Share of the node-seconds that count, beside the fair share among those who want nodes now."""
    active = {task.user for task in tasks if task.validates is None}
    total = sum(entry.node_seconds for entry in usage.values()) or 1.0
    weights = sum(fleet.settings.weight(user) for user in active) or 1.0
    states = Counter((task.user, task.state) for task in tasks)
    return [
        {
            "user": user,
            "share": usage[user].node_seconds / total if user in usage else 0.0,
            "fair_share": fleet.settings.weight(user) / weights if user in active else 0.0,
            "node_hours": usage[user].node_seconds / 3600 if user in usage else 0.0,
            "running": states[user, "running"],
            "waiting": states[user, "waiting"],
        }
        for user in sorted(active | usage.keys())
    ]


def _real_use(fleet: Controller, attempt: AttemptRow, rank: int) -> float | None:
    """Load of the node's GPUs where there are any, else processor time used of what its cores gave."""
    noted = read_json(use_path(fleet.hands.attempt_folder(attempt.id), rank))
    if noted is None:
        return None
    try:
        if noted["gpu_load"] is not None:
            return float(noted["gpu_load"])
        cores = max(1.0, noted["cores"] / fleet.backend.nodes_a_machine)
        return min(1.0, noted["cpu_s"] / noted["ran_s"] / cores)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _waited(task: TaskRow, attempts: list[AttemptRow], now: float) -> float:
    """Seconds without nodes since it was submitted."""
    end = task.ended_at or now
    held = sum(min(end, attempt.ended_at or now) - attempt.opened_at for attempt in attempts)
    return max(0.0, end - task.submitted_at - held)
