"""Nodes examined, drained and taken back: the validator runs on its node as a job, its verdict decides."""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import dataclass
from typing import Any

from fireflyer.fleet.backend import Backend
from fireflyer.fleet.clock import FleetClock
from fireflyer.fleet.hands import Hands
from fireflyer.fleet.ledger import AttemptRow, Ledger, Submission, TaskRow
from fireflyer.fleet.local import shepherd_environment
from fireflyer.fleet.records import VERDICT, read_json

FAILED = "validation failed"
_LIMIT_S = 600.0


@dataclass
class Validation:
    """The examinations of one fleet."""

    ledger: Ledger
    backend: Backend
    hands: Hands
    clock: FleetClock

    def ask(self, node: str) -> int:
        """Have a node examined once it is free; the task's number. One that is asked for already is not asked twice."""
        for task in self.ledger.active_tasks():
            if task.validates == node:
                return task.id
        return self.ledger.add_task(
            Submission(
                key=secrets.token_hex(16),
                user="validator",
                uid=os.geteuid(),
                gid=os.getegid(),
                name=f"validate {node}",
                argv=[sys.executable, "-m", "fireflyer.fleet", "validator"],
                cwd="/",
                env=shepherd_environment(),
                umask=0o077,
                nodes=1,
                run_dir=None,
                deadline_s=10.0,
                restarts=0,
                limit_s=_LIMIT_S,
                validates=node,
            ),
            self.clock.now(),
        )

    def launch_waiting(self, now: float) -> None:
        """Start those whose node is free."""
        held = {name for attempt in self.ledger.open_attempts() for name in attempt.nodes}
        lost = {node.name for node in self.backend.nodes() if node.health == "lost"}
        for task in self.ledger.active_tasks():
            node = task.validates
            if node is not None and task.state == "waiting" and task.retry_at <= now and not {node} & (held | lost):
                if node in self.ledger.drained():
                    self.backend.set_drained(node, False, "")  # the policy still leaves it alone
                self.hands.start(task, [node], False, now)

    def conclude(self, task: TaskRow, attempt: AttemptRow) -> None:
        """Drain the node, or take it back if it was an examination that had drained it."""
        node = task.validates
        assert node is not None
        verdict = read_json(self.hands.attempt_folder(attempt.id) / VERDICT) or {}
        before = self.ledger.drained().get(node)
        if attempt.outcome == "done" and verdict.get("ok") is True:
            if before is not None and before.startswith(FAILED):
                self.restore(node)
            elif before is not None:
                self.backend.set_drained(node, True, before)
        elif attempt.outcome != "void" and not task.stop_asked:
            self.drain(node, f"{FAILED}: {_first_failure(verdict) or attempt.reason}")

    def drain(self, node: str, reason: str) -> None:
        """Take a node out, with the reason; the engine below is told too."""
        self.ledger.set_drained(node, True, reason, self.clock.now())
        self.backend.set_drained(node, True, reason)

    def restore(self, node: str) -> None:
        self.ledger.set_drained(node, False, "", self.clock.now())
        self.backend.set_drained(node, False, "")


def _first_failure(verdict: dict[str, Any]) -> str | None:
    return next((f"{check['name']}: {check['said']}" for check in verdict.get("checks", []) if not check["ok"]), None)
