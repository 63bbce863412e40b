"""A month of a cluster in a minute: submissions, slices, saves, faults and repairs, event by event.

What decides is the real policy (or a baseline), on the same state that the controller builds from its ledger. In: a
cluster, a workload, faults, a scheduler. Out: where every node-second went, how long tasks waited, what faults cost.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from fireflyer.fleet.baselines import Outlook, Scheduler
from fireflyer.fleet.state import FleetState, Node, Task
from fireflyer.fleet.workload import Submission

SAMPLE_S = 600.0


@dataclass(frozen=True)
class Costs:
    """What a task pays.

    start_s: from launch to its first step. save_s: from the signal to free nodes.
    checkpoint_every_s, notice_s: a fault loses what came after the last periodic save, and the time until it is seen.
    """

    start_s: float = 20.0
    save_s: float = 10.0
    checkpoint_every_s: float = 300.0
    notice_s: float = 60.0


@dataclass
class Job:
    """A submission on its way.

    left_s: work to do yet. attempt: counts launches, so that events of an earlier one are known to be stale.
    broken_s: when a fault struck the attempt that runs.
    """

    submission: Submission
    left_s: float
    attempt: int = 0
    launched_s: float = 0.0
    stopped_s: float = 0.0
    broken_s: float | None = None
    broken_node: str | None = None
    first_s: float | None = None
    done_s: float | None = None


@dataclass
class Account:
    """Node-seconds inside the measured window.

    allocated = useful + starting + saving + lost; all = allocated + down + idle (nothing waits) + reserved (being freed
    for a gang) + unfit (what waits is too large for what is free).
    """

    all: float = 0.0
    down: float = 0.0
    allocated: float = 0.0
    idle: float = 0.0
    reserved: float = 0.0
    unfit: float = 0.0
    starting: float = 0.0
    saving: float = 0.0
    lost: float = 0.0

    @property
    def useful(self) -> float:
        return self.allocated - self.starting - self.saving - self.lost


@dataclass
class Outcome:
    """What came out: see `report.py` for the figures.

    received, entitled: node-seconds by user, had and due by an even share among those who want nodes (nobody more than
    they want), summed over samples.
    occupancy: (time, allocated, wanted) in nodes, sampled.
    """

    name: str
    num_nodes: int
    end_s: float
    jobs: list[Job]
    account: Account = field(default_factory=Account)
    received: dict[str, float] = field(default_factory=dict)
    entitled: dict[str, float] = field(default_factory=dict)
    occupancy: list[tuple[float, int, int]] = field(default_factory=list)
    slices: int = 0
    suspensions: int = 0
    faults: int = 0
    decisions: int = 0


class Simulation:
    """One run; `run()` gives the outcome. The measured window begins at 0; what comes before warms the cluster up."""

    def __init__(
        self,
        scheduler: Scheduler,
        zones: Sequence[int],
        submissions: Iterable[Submission],
        faults: Iterable[tuple[float, int, float | None]],
        end_s: float,
        costs: Costs,
        half_life_s: float,
    ) -> None:
        self.scheduler, self.costs, self.end_s, self.half_life_s = scheduler, costs, end_s, half_life_s
        nodes = [Node(f"z{zone}n{i}", f"z{zone}") for zone, size in enumerate(zones) for i in range(size)]
        self.names = [node.name for node in nodes]
        self.state = FleetState(nodes)
        self.outlook = Outlook()
        self.jobs: dict[str, Job] = {}
        self.wanted: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.outcome = Outcome(scheduler.name, len(nodes), end_s, [])
        self.now_s = -math.inf
        self.free, self.reserved = len(nodes), 0
        self.events: list[tuple[float, int, str, object, float]] = []
        self.count = 0
        self.wake_s = math.inf
        for submission in submissions:
            self._at(submission.submitted_s, "submit", submission)
        for when_s, node, repair_s in faults:
            self._at(when_s, "fault", self.names[node], math.nan if repair_s is None else repair_s)
        self._at(0.0, "sample", None)

    def run(self) -> Outcome:
        handlers = {
            "submit": self._submit,
            "end": self._end,
            "saved": self._saved,
            "fault": self._fault,
            "noticed": self._noticed,
            "repair": self._repair,
            "sample": self._sample,
        }
        while True:
            next_s = min(self.events[0][0] if self.events else math.inf, self.wake_s)
            self._integrate(min(next_s, self.end_s))
            if next_s >= self.end_s:
                break
            self.now_s = next_s
            changed = self.wake_s <= next_s
            while self.events and self.events[0][0] <= next_s:
                _, _, kind, what, extra = heapq.heappop(self.events)
                changed |= handlers[kind](what, extra)
            if changed:
                self._decide()
        self._close()
        return self.outcome

    def _at(self, when_s: float, kind: str, what: object, extra: float = 0.0) -> None:
        self.count += 1
        heapq.heappush(self.events, (when_s, self.count, kind, what, extra))

    def _decide(self) -> None:
        decision = self.scheduler.decide(self.state, self.now_s, self.outlook)
        self.outcome.decisions += 1
        for task_id in decision.suspends:
            self._suspend(task_id)
        for task_id, start in decision.starts.items():
            self._start(task_id, start.nodes, start.turn)
        self.state.reservations = {r.task_id: r for r in decision.reservations}
        self.wake_s = math.inf if decision.wake_s is None else decision.wake_s
        self.free = sum(map(len, self.state.free.values()))
        holder = self.state.holder
        self.reserved = sum(name not in holder for r in decision.reservations for name in r.nodes)

    # What happens

    def _submit(self, submission: Submission, _: float) -> bool:
        self.wanted[submission.user] = self.wanted.get(submission.user, 0) + submission.num_nodes
        job = Job(submission, submission.work_s)
        self.jobs[submission.id] = job
        self.outcome.jobs.append(job)
        group = self.scheduler.group(submission)
        self.outlook.takes_s[submission.id] = self.costs.start_s + job.left_s
        self.state.put(Task(submission.id, group, submission.num_nodes, self.now_s))
        return True

    def _start(self, task_id: str, nodes: tuple[str, ...], turn: bool) -> None:
        task, job = self.state.tasks[task_id], self.jobs[task_id]
        self.state.charge(task.user, self.now_s, self.half_life_s, turn)
        self.state.put(
            replace(
                task, phase="running", nodes=nodes, kept_nodes=(), since_s=self.now_s, num_slices=task.num_slices + 1
            )
        )
        self._hold(job, len(nodes))
        job.attempt += 1
        job.launched_s = self.now_s
        job.first_s = self.now_s if job.first_s is None else job.first_s
        end_s = self.now_s + self.costs.start_s + job.left_s
        self.outlook.ends_s[task_id] = end_s
        self._at(end_s, "end", task_id, job.attempt)
        self.outcome.slices += 1

    def _end(self, task_id: str, attempt: float) -> bool:
        job = self.jobs.get(task_id)
        if job is None or job.attempt != attempt or job.broken_s is not None:
            return False
        task = self.state.tasks[task_id]
        if task.phase != "running":
            return False
        self.state.charge(task.user, self.now_s, self.half_life_s)
        self.state.remove(task_id)
        self._hold(job, -task.num_nodes)
        self._count_start(job, task.num_nodes, self.now_s)
        self.wanted[job.submission.user] -= task.num_nodes
        job.done_s, job.left_s = self.now_s, 0.0
        del self.jobs[task_id], self.outlook.ends_s[task_id], self.outlook.takes_s[task_id]
        return True

    def _suspend(self, task_id: str) -> None:
        task, job = self.state.tasks[task_id], self.jobs[task_id]
        self.state.put(replace(task, phase="stopping", since_s=self.now_s))
        self.outcome.suspensions += 1
        job.stopped_s = self.now_s
        self._at(self.now_s + self.costs.save_s, "saved", task_id, job.attempt)
        self.outlook.ends_s[task_id] = self.now_s + self.costs.save_s

    def _saved(self, task_id: str, attempt: float) -> bool:
        job = self.jobs[task_id]
        if job.attempt != attempt or self.state.tasks[task_id].phase != "stopping":
            return False
        num_nodes = job.submission.num_nodes
        self._count_start(job, num_nodes, job.stopped_s)
        if job.broken_s is None:
            job.left_s -= max(0.0, job.stopped_s - job.launched_s - self.costs.start_s)
            self._count("saving", job.stopped_s, num_nodes * (self.now_s - job.stopped_s))
        else:
            self._lose(job)
        self._queue(task_id, ())
        return True

    def _fault(self, name: str, repair_s: float) -> bool:
        """A node breaks (or only the program on it); who runs there gets no further."""
        node = self.state.nodes[name]
        breaks = not math.isnan(repair_s)
        if node.health != "up":
            return False
        if breaks:
            self.state.put_node(replace(node, health="lost"))
            self._at(self.now_s + repair_s, "repair", name)
        holder = self.state.holder.get(name)
        if holder is not None:
            job = self.jobs[holder]
            if job.broken_s is None:
                job.broken_s = self.now_s
                self._at(self.now_s + self.costs.notice_s, "noticed", holder, job.attempt)
        return True

    def _noticed(self, task_id: str, attempt: float) -> bool:
        job = self.jobs[task_id]
        if job.attempt != attempt or job.broken_s is None:
            return False
        task = self.state.tasks[task_id]
        self._count_start(job, task.num_nodes, job.broken_s)
        self._lose(job)
        self._queue(task_id, tuple(name for name in task.nodes if self.state.nodes[name].health == "up"))
        return True

    def _repair(self, name: str, _: float) -> bool:
        self.state.put_node(replace(self.state.nodes[name], health="up"))
        return True

    def _queue(self, task_id: str, kept: tuple[str, ...]) -> None:
        """Back to waiting."""
        task, job = self.state.tasks[task_id], self.jobs[task_id]
        since_s = job.submission.submitted_s if self.scheduler.keeps_place else self.now_s
        self.state.charge(task.user, self.now_s, self.half_life_s)
        self.state.put(replace(task, phase="waiting", nodes=(), kept_nodes=kept, since_s=since_s))
        self._hold(job, -task.num_nodes)
        self.outlook.takes_s[task_id] = self.costs.start_s + job.left_s
        del self.outlook.ends_s[task_id]

    # What it costs

    def _lose(self, job: Job) -> None:
        """What a fault took: the work since the last save, and the nodes' time until they were free."""
        assert job.broken_s is not None
        done_s = max(0.0, job.broken_s - job.launched_s - self.costs.start_s)
        saved_s = math.floor(done_s / self.costs.checkpoint_every_s) * self.costs.checkpoint_every_s
        job.left_s -= saved_s
        self._count("lost", job.broken_s, job.submission.num_nodes * (done_s - saved_s + self.now_s - job.broken_s))
        self.outcome.faults += job.broken_s >= 0.0
        job.broken_s = None

    def _count_start(self, job: Job, num_nodes: int, until_s: float) -> None:
        self._count("starting", job.launched_s, num_nodes * min(self.costs.start_s, until_s - job.launched_s))

    def _count(self, what: str, when_s: float, node_seconds: float) -> None:
        if when_s >= 0.0:
            setattr(self.outcome.account, what, getattr(self.outcome.account, what) + node_seconds)

    def _hold(self, job: Job, num_nodes: int) -> None:
        self.held[job.submission.user] = self.held.get(job.submission.user, 0) + num_nodes

    def _integrate(self, until_s: float) -> None:
        span_s = until_s - max(self.now_s, 0.0)
        if until_s <= 0.0 or span_s <= 0.0:
            return
        account, everything = self.outcome.account, len(self.names)
        allocated = sum(self.held.values())
        account.all += span_s * everything
        account.allocated += span_s * allocated
        account.down += span_s * (everything - allocated - self.free)
        account.reserved += span_s * self.reserved
        idle = span_s * (self.free - self.reserved)
        if self.state.waiting:
            account.unfit += idle
        else:
            account.idle += idle

    def _sample(self, _: object, __: float) -> bool:
        num_up = sum(self.state.num_up.values())
        wanted = {user: nodes for user, nodes in self.wanted.items() if nodes}
        for user, nodes in even_shares(wanted, num_up).items():
            self.outcome.entitled[user] = self.outcome.entitled.get(user, 0.0) + nodes * SAMPLE_S
            had = self.held.get(user, 0) * SAMPLE_S
            self.outcome.received[user] = self.outcome.received.get(user, 0.0) + had
        self.outcome.occupancy.append((self.now_s, sum(self.held.values()), sum(wanted.values())))
        self._at(self.now_s + SAMPLE_S, "sample", None)
        return False

    def _close(self) -> None:
        """Attempts that still run at the end have started, too."""
        for task in self.state.running.values():
            self._count_start(self.jobs[task.id], task.num_nodes, self.end_s)


def even_shares(wanted: dict[str, int], num_nodes: int) -> dict[str, float]:
    """Nodes divided evenly, nobody more than they want, and what they leave among the others (max-min)."""
    shares: dict[str, float] = {}
    left, users = float(num_nodes), len(wanted)
    for user, nodes in sorted(wanted.items(), key=lambda item: (item[1], item[0])):
        shares[user] = min(float(nodes), left / users)
        left -= shares[user]
        users -= 1
    return shares
