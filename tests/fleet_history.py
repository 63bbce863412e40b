"""Random histories of a small fleet, driven by the policy: submissions, ends, saves of any length, faults, repairs.

The driver keeps its own books (who holds what since when), so that the checks do not believe the policy's.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

from fireflyer.fleet.fair_share import Usage, decayed
from fireflyer.fleet.policy import Decision, Settings, decide
from fireflyer.fleet.state import FleetState, Node, Task

SLICE_S, STOP_S = 10.0, 3.0
SETTINGS = Settings(min_slice_s=SLICE_S, stop_s=STOP_S, half_life_s=200.0, full_slice=3.0, tick_s=10.0)


@dataclass
class Job:
    """A task as the driver knows it."""

    id: str
    user: str
    num_nodes: int
    left_s: float
    since_s: float
    phase: str = "waiting"
    nodes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    slices: int = 0
    ends_s: float = 0.0

    def task(self) -> Task:
        return Task(self.id, self.user, self.num_nodes, self.since_s, self.phase, self.nodes, self.kept, self.slices)


@dataclass
class World:
    """What a history is drawn from."""

    rng: random.Random
    num_zones: int
    num_nodes: int
    num_users: int
    num_tasks: int
    faults: bool
    nodes: dict[str, Node] = field(default_factory=dict)

    @classmethod
    def draw(cls, seed: int, faults: bool) -> World:
        rng = random.Random(seed)
        world = cls(rng, rng.choice([1, 1, 2, 3]), rng.randint(1, 8), rng.randint(1, 5), rng.randint(1, 12), faults)
        for i in range(world.num_nodes):
            world.nodes[f"n{i}"] = Node(f"n{i}", f"z{rng.randrange(world.num_zones)}")
        return world

    def jobs(self) -> list[tuple[float, Job]]:
        jobs = []
        for i in range(self.num_tasks):
            at_s = float(self.rng.choice([0, 0, self.rng.randint(0, 60)]))
            size = self.rng.choice([1, self.rng.randint(1, self.num_nodes), self.num_nodes])
            left_s = float(self.rng.choice([1, self.rng.randint(1, 30), self.rng.randint(1, 90)]))
            jobs.append((at_s, Job(f"t{i}", f"u{self.rng.randrange(self.num_users)}", size, left_s, at_s)))
        return jobs


class History:
    """Runs one history to its end, calling `check(history, decision)` after each decision, before it is carried out."""

    def __init__(self, world: World, settings: Settings = SETTINGS) -> None:
        self.world, self.settings, self.rng = world, settings, world.rng
        self.nodes = dict(world.nodes)
        self.jobs: dict[str, Job] = {}
        self.live = FleetState(self.nodes.values())
        self.now_s = 0.0
        self.events: list[tuple[float, int, str, object]] = []
        self.count = 0
        self.decisions = 0
        for at_s, job in world.jobs():
            self.at(at_s, "submit", job)
        if world.faults:
            for _ in range(self.rng.randint(0, 4)):
                self.at(
                    float(self.rng.randint(0, 80)),
                    self.rng.choice(["fail", "drain"]),
                    self.rng.choice(list(self.nodes)),
                )

    def at(self, time_s: float, kind: str, what: object) -> None:
        self.count += 1
        heapq.heappush(self.events, (time_s, self.count, kind, what))

    def rebuilt(self) -> FleetState:
        """The state anew from the books, in another order than it grew."""
        nodes, tasks = list(self.nodes.values()), [job.task() for job in self.jobs.values()]
        random.Random(self.decisions).shuffle(nodes)
        random.Random(self.decisions).shuffle(tasks)
        return FleetState(nodes, tasks, self.live.usage, self.live.reservations.values())

    def settle(self, user: str) -> None:
        held = sum(len(job.nodes) for job in self.jobs.values() if job.user == user)
        old = self.live.usage.get(user, Usage(as_of_s=self.now_s))
        had = decayed(old, held, self.now_s, self.settings.half_life_s)
        self.live.usage[user] = Usage(had, self.now_s, old.last_turn_s)

    def run(self, check, limit: int = 5000) -> None:
        while self.events:
            self.now_s = self.events[0][0]
            while self.events and self.events[0][0] == self.now_s:
                _, _, kind, what = heapq.heappop(self.events)
                getattr(self, "on_" + kind)(what)
            decision = decide(self.live, self.now_s, self.settings)
            self.decisions += 1
            assert self.decisions < limit, "the history does not end"
            check(self, decision)
            self.carry_out(decision)
            if decision.wake_s is not None and self.jobs:
                assert decision.wake_s > self.now_s
                self.at(decision.wake_s, "wake", None)
        assert not self.jobs, f"left over: {self.jobs}"

    def carry_out(self, decision: Decision) -> None:
        self.live.reservations = {reservation.task_id: reservation for reservation in decision.reservations}
        for task_id, start in decision.starts.items():
            job = self.jobs[task_id]
            self.settle(job.user)
            if start.turn:
                old = self.live.usage[job.user]
                self.live.usage[job.user] = Usage(old.node_seconds, old.as_of_s, self.now_s)
            job.phase, job.nodes, job.since_s, job.kept, job.lost = "running", start.nodes, self.now_s, (), ()
            job.slices += 1
            job.ends_s = self.now_s + job.left_s
            self.live.put(job.task())
            self.at(job.ends_s, "end", (task_id, job.slices))
        for task_id, suspend in decision.suspends.items():
            job = self.jobs[task_id]
            job.left_s -= self.now_s - job.since_s
            job.phase, job.since_s, job.kept = "stopping", self.now_s, suspend.kept_nodes
            self.live.put(job.task())
            self.at(self.now_s + self.rng.choice([0.5, STOP_S, 1.0]), "stopped", (task_id, job.slices))

    def on_wake(self, _) -> None:
        pass

    def on_submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.live.put(job.task())

    def on_end(self, what) -> None:
        job = self.jobs.get(what[0])
        if job is not None and job.phase == "running" and job.slices == what[1]:
            self.settle(job.user)
            self.live.remove(job.id)
            del self.jobs[job.id]

    def on_stopped(self, what) -> None:
        job = self.jobs.get(what[0])
        if job is None or job.phase != "stopping" or job.slices != what[1]:
            return
        self.settle(job.user)
        job.phase, job.nodes, job.since_s = "waiting", (), self.now_s
        self.live.put(job.task())
        if job.left_s <= 0:
            self.live.remove(job.id)
            del self.jobs[job.id]

    def on_fail(self, name: str) -> None:
        self.set_node(name, "lost")
        self.at(self.now_s + self.rng.randint(1, 30), "repair", name)
        for job in self.jobs.values():
            if name in job.nodes:
                self.settle(job.user)
                if job.phase == "running":
                    job.kept = tuple(n for n in job.nodes if n != name)
                    job.lost = job.nodes
                job.phase, job.nodes, job.since_s = "waiting", (), self.now_s
                self.live.put(job.task())

    def set_node(self, name: str, health: str) -> None:
        self.nodes[name] = Node(name, self.nodes[name].zone, health)
        self.live.put_node(self.nodes[name])

    def on_drain(self, name: str) -> None:
        if self.nodes[name].health == "up":
            self.set_node(name, "drained")
            self.at(self.now_s + self.rng.randint(1, 60), "repair", name)

    def on_repair(self, name: str) -> None:
        self.set_node(name, "up")
