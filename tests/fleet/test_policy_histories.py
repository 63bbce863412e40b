"""Thousands of random histories of small fleets: what must hold after every decision, checked against the driver's own
books, and how long anybody waited."""

from __future__ import annotations

import pytest
from fleet_history import SLICE_S, STOP_S, History, World

from fireflyer.fleet.policy import Decision, decide

TURN_S = SLICE_S + STOP_S


class Checks:
    """The invariants; one instance follows one history."""

    def __init__(self) -> None:
        self.idle_since: dict[tuple[str, str], float] = {}
        self.turns: dict[str, float] = {}
        self.waiting_users: list[tuple[float, int]] = []

    def __call__(self, history: History, decision: Decision) -> None:
        self.deterministic(history, decision)
        self.given_is_asked(history, decision)
        self.slices_are_whole(history, decision)
        self.one_task_across_zones(history, decision)
        self.no_node_idles_while_a_task_fits(history, decision)
        if not history.world.faults:
            self.reserved_nodes_idle_briefly(history, decision)
            self.turns_come_in_time(history, decision)

    def deterministic(self, history: History, decision: Decision) -> None:
        if history.decisions % 4 == 0:
            assert decide(history.rebuilt(), history.now_s, history.settings) == decision

    def given_is_asked(self, history: History, decision: Decision) -> None:
        taken = {name for job in history.jobs.values() for name in job.nodes}
        for task_id, start in decision.starts.items():
            job = history.jobs[task_id]
            assert job.phase == "waiting"
            assert len(start.nodes) == len(set(start.nodes)) == job.num_nodes
            for name in start.nodes:
                assert history.nodes[name].health == "up"
                assert name not in taken, f"{name} is given twice"
                taken.add(name)

    def slices_are_whole(self, history: History, decision: Decision) -> None:
        for task_id in decision.suspends:
            job = history.jobs[task_id]
            assert job.phase == "running"
            assert history.now_s - job.since_s >= SLICE_S, f"{task_id} after {history.now_s - job.since_s} s"

    def one_task_across_zones(self, history: History, decision: Decision) -> None:
        held = {job.id: job.nodes for job in history.jobs.values() if job.nodes}
        held |= {task_id: start.nodes for task_id, start in decision.starts.items()}
        across = [i for i, nodes in held.items() if len({history.nodes[name].zone for name in nodes}) > 1]
        assert len(across) <= 1, across

    def no_node_idles_while_a_task_fits(self, history: History, decision: Decision) -> None:
        held = {name for job in history.jobs.values() for name in job.nodes}
        held |= {name for start in decision.starts.values() for name in start.nodes}
        held |= {name for reservation in decision.reservations for name in reservation.nodes}
        free: dict[str, int] = {}
        for name, node in history.nodes.items():
            free[node.zone] = free.get(node.zone, 0) + (node.health == "up" and name not in held)
        across = any(len({history.nodes[n].zone for n in job.nodes}) > 1 for job in history.jobs.values())
        across |= any(len({history.nodes[n].zone for n in s.nodes}) > 1 for s in decision.starts.values())
        across |= any(len({history.nodes[n].zone for n in r.nodes}) > 1 for r in decision.reservations)
        room = max(max(free.values()), 0 if across else sum(free.values()))
        reserved = {reservation.task_id for reservation in decision.reservations}
        for job in history.jobs.values():
            if job.phase == "waiting" and job.id not in decision.starts and job.id not in reserved:
                assert job.num_nodes > room, f"{job.id} needs {job.num_nodes} and {room} idle"

    def reserved_nodes_idle_briefly(self, history: History, decision: Decision) -> None:
        """A node that is kept free for a gang waits a slice and a stop at most."""
        held = {name for job in history.jobs.values() for name in job.nodes}
        held |= {name for start in decision.starts.values() for name in start.nodes}
        idle = {(name, r.task_id) for r in decision.reservations for name in r.nodes if name not in held}
        self.idle_since = {pair: self.idle_since.get(pair, history.now_s) for pair in idle}
        for (name, task_id), since_s in self.idle_since.items():
            assert history.now_s - since_s <= TURN_S, f"{name} idle for {task_id} since {since_s}"

    def turns_come_in_time(self, history: History, decision: Decision) -> None:
        """Each user's task that has waited longest starts within (waiting users) x (slice + stop), as many as waited at
        most since the user's turn before."""
        queues: dict[str, list[tuple[float, str]]] = {}
        for job in history.jobs.values():
            if job.phase == "waiting":
                queues.setdefault(job.user, []).append((job.since_s, job.id))
        self.waiting_users.append((history.now_s, len(queues)))
        for user, queue in queues.items():
            since_s, head = min(queue)
            since_s = max(since_s, self.turns.get(user, 0.0))
            most = max(users for at_s, users in self.waiting_users if at_s >= since_s)
            assert history.now_s - since_s <= most * TURN_S, f"{user} waits since {since_s}"
            if head in decision.starts:
                self.turns[user] = history.now_s


@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("part", range(8))
def test_random_histories(part, faults):
    for seed in range(625 * part, 625 * (part + 1)):
        History(World.draw(seed, faults)).run(Checks())
