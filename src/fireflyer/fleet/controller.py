"""The controller: look at what runs, settle what has ended, let the policy decide, carry it out; again and again.

Everything it must not forget is in the ledger before it is done, so each tick can begin from the ledger alone, and the
first tick of a new controller adopts what the last one left.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fireflyer.fleet import state as policy
from fireflyer.fleet.backend import Alive, Backend, Launch, SeenNode, Unreachable
from fireflyer.fleet.clock import FleetClock
from fireflyer.fleet.folder import StateFolder
from fireflyer.fleet.hands import KILL_GRACE_S, Hands
from fireflyer.fleet.judge import GANG, judge
from fireflyer.fleet.ledger import AttemptRow, Ledger, LedgerError, TaskRow
from fireflyer.fleet.policy import Settings, decide
from fireflyer.fleet.records import Ended, modified, read_ended, read_json, started_path, use_path
from fireflyer.fleet.shepherd import USE_EVERY_S
from fireflyer.fleet.usage import FORGOTTEN_HALF_LIVES, UsageBook
from fireflyer.fleet.validation import Validation

TICK_S = 0.2
NODES_EVERY_S = 1.0
RECORD_LAG_S = 1.0
"""A shepherd that is gone may have left a record that this machine does not see yet."""
FORGOTTEN_S = 2.5 * USE_EVERY_S
"""A job that the back end does not know of, and whose shepherds write nothing for so long, is gone."""
START_LIMIT_S = 60.0
"""A launch that takes longer counts as begun."""
STUCK_S = 30.0
"""After KILL; then the node is suspect, and drained."""
_NOTE_EVERY_S = 10.0
_AFTER_FAILURE_S = 5.0


@dataclass(frozen=True)
class Sight:
    """What the back end showed last."""

    nodes: tuple[SeenNode, ...] = ()
    at: float = float("-inf")
    trouble: str | None = None
    """Why it does not answer now."""


class Controller:
    """One fleet. `tick` and the requests of users may come from different threads."""

    def __init__(
        self, folder: StateFolder, backend: Backend, settings: Settings, *, as_me: bool, ledger: Ledger | None = None
    ) -> None:
        self.ledger = ledger or Ledger(folder.ledger)
        self.clock = FleetClock(self.ledger.meta("clock"))
        self.backend = backend
        self.settings = settings
        self.hands = Hands(self.ledger, backend, folder, as_me)
        self.lock = threading.RLock()
        self.wake = threading.Event()
        self.sight = Sight()
        self.paused: str | None = None
        """Why nothing is launched at the moment."""
        since = self.clock.now() - FORGOTTEN_HALF_LIVES * settings.half_life_s
        self.usage = UsageBook(settings.half_life_s, self.ledger.ended_attempts(since))
        self.reservations: tuple[policy.Reservation, ...] = ()
        self._signalled: set[int] = set()
        self._gone_since: dict[int, tuple[float, tuple[float | None, ...]]] = {}
        self._kill_at: dict[int, float] = {}
        self._noted_at = float("-inf")
        self._draining = False
        self._decided_on: object = None
        self._decide_at = float("-inf")
        self.validation = Validation(self.ledger, backend, self.hands, self.clock)

    def run(self, until: threading.Event) -> None:
        """Tick until told to end."""
        while not until.is_set():
            try:
                self.tick()
                self.paused = None
            except LedgerError as error:
                self.paused = str(error)
            except Exception as error:  # ours: what runs runs on, and the queue says why nothing else does
                traceback.print_exc()
                self.paused = f"the controller failed: {type(error).__name__}: {error}; its log has more"
                until.wait(_AFTER_FAILURE_S)
            self.wake.wait(TICK_S)
            self.wake.clear()

    def tick(self) -> None:
        """One round. Raises LedgerError where the disk refuses; what runs runs on, and the next tick tries again."""
        now = self.clock.now()
        self.look(now)
        open_ = self.ledger.open_attempts()
        alive = self._alive(open_)
        for attempt in open_:
            with self._reaching():
                self._settle(self._task(attempt), attempt, alive, now)
        if self.sight.trouble is None and not self._draining:
            self._decide(now)
            with self._reaching():
                self.validation.launch_waiting(now)
        if now - self._noted_at >= _NOTE_EVERY_S:
            with self.ledger.transaction():
                self.ledger.set_meta("clock", self.clock.note())
            self._noted_at = now

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """A back end that does not answer is trouble to be shown, and no more: whatever runs may run on."""
        try:
            yield
        except Unreachable as error:
            self.sight = replace(self.sight, trouble=str(error))

    def _alive(self, open_: list[AttemptRow]) -> dict[int, Alive]:
        """By attempt; those that the back end says nothing of are taken to live."""
        launched = [attempt for attempt in open_ if attempt.state != "launching"]
        with self._reaching():
            return self.backend.alive([self.hands.launch_of(self._task(a), a) for a in launched])
        return {}

    def drain(self) -> None:
        """Launch nothing more, and ask all that runs to save and stop."""
        self._draining = True
        now = self.clock.now()
        with self.lock:
            for attempt in self.ledger.open_attempts():
                if attempt.state == "running":
                    self.ledger.ask_to_stop(attempt.id, "the fleet goes down", now)
        self.wake.set()

    def look(self, now: float) -> None:
        """See the nodes, now and then."""
        if now - self.sight.at < NODES_EVERY_S and self.sight.trouble is None:
            return
        try:
            self.sight = Sight(tuple(self.backend.nodes()), now)
        except Unreachable as error:
            self.sight = replace(self.sight, at=now, trouble=str(error))

    # What runs

    def _settle(self, task: TaskRow, attempt: AttemptRow, alive: dict[int, Alive], now: float) -> None:
        """Bring one open attempt up to date with what its ranks have written, and on its way to its end."""
        if attempt.state == "launching":
            self.hands.find_or_void(task, attempt, now)
            return
        launch = self.hands.launch_of(task, attempt)
        ranks = range(len(attempt.nodes))
        ended = [read_ended(launch.folder, rank) for rank in ranks]
        living = alive[attempt.id].ranks if attempt.id in alive else frozenset(ranks)
        missing = {rank for rank in ranks if ended[rank] is None and rank not in living}
        if attempt.started_at is None and all(
            ended[rank] or read_json(started_path(launch.folder, rank)) for rank in ranks
        ):
            self.ledger.started(attempt.id, now)
        certain = attempt.id not in alive or alive[attempt.id].certain
        gone = self._gone(launch, missing, RECORD_LAG_S if certain else FORGOTTEN_S, now)
        if all(record or rank in missing for rank, record in enumerate(ended)):
            if not missing or gone:
                self._end(task, attempt, ended, now)
        elif attempt.state == "running":
            self._watch_gang(task, attempt, ended, missing if gone else set(), now)
        else:
            self._press(task, attempt, now)

    def _gone(self, launch: Launch, missing: set[int], grace_s: float, now: float) -> bool:
        """Whether the missing ranks are really gone: the back end has said so for a while, and in that time their
        shepherds wrote nothing. (An engine that was restarted may have forgotten a job that runs.)"""
        if not missing:
            self._gone_since.pop(launch.attempt, None)
            return False
        signs = tuple(modified(use_path(launch.folder, rank)) for rank in sorted(missing))
        since_s, before = self._gone_since.get(launch.attempt, (now, signs))
        if signs != before:
            since_s = now
        self._gone_since[launch.attempt] = (since_s, signs)
        return now - since_s >= grace_s

    def _watch_gang(
        self,
        task: TaskRow,
        attempt: AttemptRow,
        ended: list[Ended | None],
        gone: set[int],
        now: float,
    ) -> None:
        """Some ranks are over and others not: the others can't go on without those that failed or went."""
        why = None
        if task.stop_asked:
            why = "stop"
        elif gone:
            why = f"lost: {', '.join(attempt.nodes[rank] for rank in sorted(gone))}"
        else:
            bad = next(((rank, record.code) for rank, record in enumerate(ended) if record and record.code), None)
            why = f"{GANG}: rank {bad[0]} ended with code {bad[1]}" if bad else None
        if why is not None:
            self.ledger.ask_to_stop(attempt.id, why, now)
            self.wake.set()

    def _press(self, task: TaskRow, attempt: AttemptRow, now: float) -> None:
        """An attempt that shall stop: TERM once, KILL when even its shepherds are late, a suspect node after that."""
        assert attempt.stop_at is not None
        late_s = now - attempt.stop_at - task.deadline_s
        if late_s >= KILL_GRACE_S and now - self._kill_at.get(attempt.id, float("-inf")) >= KILL_GRACE_S:
            self._kill_at[attempt.id] = now
            self.hands.kill(task, attempt, attempt.killed_at or now)
        elif attempt.id not in self._signalled and self.hands.stop(task, attempt, now):
            self._signalled.add(attempt.id)
        if attempt.killed_at is not None and now - attempt.killed_at >= STUCK_S:
            alive = self.backend.alive([self.hands.launch_of(task, attempt)])[attempt.id].ranks
            drained = self.ledger.drained()
            for name in (attempt.nodes[rank] for rank in alive):
                if name not in drained:
                    self.validation.drain(name, f"suspect: task {task.id} does not die there after KILL")

    def _end(self, task: TaskRow, attempt: AttemptRow, ended: list[Ended | None], now: float) -> None:
        if any(record is None for record in ended):
            self.backend.kill(self.hands.launch_of(task, attempt))  # what a shepherd that died left behind
        folder = self.hands.attempt_folder(attempt.id)
        if not any(ended) and not any(read_json(started_path(folder, rank)) for rank in range(len(ended))):
            reason = f"no shepherd came up on {', '.join(attempt.nodes)}: see the logs in {folder}"
            self.hands.void(task, attempt, reason, now, retry=True)
            return
        before = [other for other in self.ledger.attempts_of(task.id) if other.id < attempt.id]
        last_step = next((other.saved_step for other in reversed(before) if other.saved_step is not None), None)
        end = judge(task, attempt, ended, last_step)
        # An end that nobody saw for a while took no longer than the shepherd says.
        ran_s = max([record.ran_s for record in ended if record is not None], default=0.0)
        unsure = None in ended
        with self.lock:
            begun_at = attempt.started_at or now
            ended_at = now if unsure else min(now, begun_at + ran_s + 1)
            self.ledger.end_attempt(attempt, end, ended_at)
            closed = self.ledger.attempt(attempt.id)
            assert closed is not None
            self.usage.add(task.user, closed)
        if task.validates is not None:
            self.validation.conclude(task, closed)
        for forget in (self._signalled, self._gone_since, self._kill_at):
            forget.discard(attempt.id) if isinstance(forget, set) else forget.pop(attempt.id, None)

    # What shall run

    def _decide(self, now: float) -> None:
        seen = (self.ledger.changes, self.sight.nodes)
        if seen == self._decided_on and now < self._decide_at:
            return
        with self.lock:
            state = self.policy_state(now)
            decision = decide(state, now, self.settings)
            self._decided_on = seen
            self._decide_at = min([now + self.settings.tick_s, *self._retries(now)])
            if decision.wake_s is not None:
                self._decide_at = min(self._decide_at, decision.wake_s)
            self.reservations = decision.reservations
            open_ = {attempt.task: attempt for attempt in self.ledger.open_attempts()}
            for name, suspend in decision.suspends.items():
                attempt = open_[int(name)]
                self.ledger.ask_to_stop(attempt.id, suspend.reason, now, suspend.kept_nodes)
        for name in decision.suspends:
            self._press_now(int(name), now)
        for name, start in decision.starts.items():
            task = self.ledger.task(int(name))
            if task is not None and task.state == "waiting":
                self.hands.start(task, start.nodes, start.turn, now)
        if decision.suspends or decision.starts:
            self.wake.set()

    def _press_now(self, number: int, now: float) -> None:
        attempt = next(a for a in self.ledger.open_attempts() if a.task == number)
        with self._reaching():
            self._press(self._task(attempt), attempt, now)

    def _retries(self, now: float) -> list[float]:
        return [task.retry_at for task in self.ledger.active_tasks() if task.retry_at > now]

    def policy_state(self, now: float) -> policy.FleetState:
        """The ledger and the nodes, as the policy looks at them."""
        tasks = [task for task in self.ledger.active_tasks() if task.validates is None]
        users = {task.id: task.user for task in self.ledger.active_tasks()}
        open_ = self.ledger.open_attempts()
        by_task = {attempt.task: attempt for attempt in open_}
        nodes = self.policy_nodes()
        known = {node.name for node in nodes}
        nodes += [policy.Node(name, health="lost") for a in open_ for name in a.nodes if name not in known]
        return policy.FleetState(
            {node.name: node for node in nodes}.values(),
            [
                self._policy_task(task, by_task.get(task.id), now)
                for task in tasks
                if task.id in by_task or (task.retry_at <= now and not task.stop_asked)
            ],
            self.usage.at(now, [(users[attempt.task], attempt) for attempt in open_]),
            [r for r in self.reservations if int(r.task_id) in {task.id for task in tasks}],
        )

    def policy_nodes(self) -> list[policy.Node]:
        """Nodes that are to be examined count as drained: who runs there moves away when their slice is over."""
        out = {*self.ledger.drained(), *(task.validates for task in self.ledger.active_tasks())}
        return [
            policy.Node(node.name, node.zone, "drained" if node.health == "up" and node.name in out else node.health)
            for node in self.sight.nodes
        ]

    def _policy_task(self, task: TaskRow, attempt: AttemptRow | None, now: float) -> policy.Task:
        begun = [other for other in self.ledger.attempts_of(task.id) if other.outcome != "void"]
        common = {"id": policy_id(task.id), "user": task.user, "num_nodes": task.nodes, "num_slices": len(begun)}
        limit_s = task.limit_s if task.limit_s is not None else float("inf")
        if attempt is None:
            last = begun[-1] if begun else None
            since_s = task.submitted_at if last is None or last.ended_at is None else last.ended_at
            kept = tuple(last.keeps) if last is not None else ()
            return policy.Task(**common, since_s=since_s, kept_nodes=kept, limit_s=limit_s)
        return policy.Task(
            **common,
            since_s=_slice_since(attempt, now) if attempt.stop_at is None else attempt.stop_at,
            phase="running" if attempt.stop_at is None else "stopping",
            nodes=tuple(attempt.nodes),
            limit_s=limit_s,
        )

    def _task(self, attempt: AttemptRow) -> TaskRow:
        task = self.ledger.task(attempt.task)
        assert task is not None
        return task


def _slice_since(attempt: AttemptRow, now: float) -> float:
    """A slice begins with the command, not with the launch: a slow start takes nothing from it, unless it hangs."""
    if attempt.started_at is not None:
        return attempt.started_at
    return max(attempt.opened_at, min(now, attempt.opened_at + START_LIMIT_S))


def policy_id(number: int) -> str:
    """What the policy calls a task."""
    return str(number)
