"""An outcome of the simulator in figures: shares of the node-seconds, waits, slowdown, fairness. JSON-able."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fireflyer.fleet.simulator import Outcome
from fireflyer.fleet.workload import Submission

SIZES = ((1, 1), (2, 8), (9, 32), (33, 128), (129, 256))


def figures(outcome: Outcome, modest: set[str]) -> dict[str, Any]:
    """Everything that the table and the pictures show.

    share: of the node-seconds of nodes that were up; `allocated` is the sum of useful, starting, saving and lost; of
    the rest, `nothing_waits` is what nobody could have used. allocated_of_usable: of all but that.
    wait_s: from submission to first launch, by nodes; a task that had none by the end counts with its wait so far.
    wait_modest_s: the same for tasks of users who ask for no more than an even share.
    slowdown: of finished tasks, time from submission to end over their work (10 minutes at least).
    fairness: of each user's node-seconds over an even share (max-min over what they want): Jain's index, and the least.
    """
    account = outcome.account
    up = account.all - account.down
    usable = up - account.idle
    jobs = [job for job in outcome.jobs if job.submission.submitted_s >= 0.0]
    waits = {
        job.submission.id: (outcome.end_s if job.first_s is None else job.first_s) - job.submission.submitted_s
        for job in jobs
    }
    done = [job for job in outcome.jobs if job.done_s is not None and job.done_s >= 0.0]
    slow = [(job.done_s or 0.0) - job.submission.submitted_s for job in done]
    slow = [time / max(job.submission.work_s, 600.0) for time, job in zip(slow, done, strict=True)]
    by_user = [outcome.received[user] / even for user, even in outcome.entitled.items() if even > 0.0]
    parts = ("allocated", "useful", "starting", "saving", "lost", "reserved", "unfit")
    return {
        "share": {name: getattr(account, name) / up for name in parts} | {"nothing_waits": account.idle / up},
        "allocated_of_usable": account.allocated / usable if usable > 0.0 else 1.0,
        "down_share": account.down / account.all,
        "lost_node_hours": account.lost / 3600.0,
        "wait_s": {
            _label(low, high): _spread(waits[j.submission.id] for j in jobs if low <= j.submission.num_nodes <= high)
            for low, high in SIZES
        },
        "wait_modest_s": _spread(waits[job.submission.id] for job in jobs if job.submission.id in modest),
        "wait_all_s": _spread(waits.values()),
        "never_started": sum(job.first_s is None for job in jobs),
        "slowdown": _spread(slow) | {"mean": float(np.mean(slow)) if slow else None},
        "fairness": {"jain": _jain(by_user), "least": min(by_user, default=1.0), "by_user": sorted(by_user)},
        "submitted": len(jobs),
        "done": len(done),
        "slices": outcome.slices,
        "suspensions": outcome.suspensions,
        "faults": outcome.faults,
        "decisions": outcome.decisions,
    }


def modest_tasks(submissions: Sequence[Submission], num_nodes: int) -> set[str]:
    """Tasks whose user asked for no more than an even share when they came, in a cluster that runs everything at once
    (so it does not depend on the scheduler)."""
    found: set[str] = set()
    asked: dict[str, int] = {}
    ends: list[tuple[float, str, int]] = []
    for task in submissions:
        while ends and ends[0][0] <= task.submitted_s:
            _, user, nodes = heapq.heappop(ends)
            asked[user] -= nodes
        asked[task.user] = asked.get(task.user, 0) + task.num_nodes
        heapq.heappush(ends, (task.submitted_s + task.work_s, task.user, task.num_nodes))
        if asked[task.user] * sum(nodes > 0 for nodes in asked.values()) <= num_nodes:
            found.add(task.id)
    return found


def _spread(values: Iterable[float]) -> dict[str, float | int | None]:
    found = np.fromiter(values, dtype=float)
    if not len(found):
        return {"tasks": 0, "p50": None, "p99": None}
    return {"tasks": len(found), "p50": float(np.percentile(found, 50)), "p99": float(np.percentile(found, 99))}


def _jain(values: Sequence[float]) -> float:
    """(sum)^2 / (n x sum of squares): 1 when all are equal, 1/n when one has everything."""
    array = np.array(values)
    return float(array.sum() ** 2 / (len(array) * (array**2).sum())) if array.any() else 1.0


def _label(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
