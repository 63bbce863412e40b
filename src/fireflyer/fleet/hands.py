"""What the controller does to jobs, in an order that a kill at any line can't turn into two runs or none.

A launch: the intent in the ledger, the attempt's folder, the back end, the back end's id in the ledger. A controller
that finds an intent without an id asks the back end whether it has that attempt; if not, it takes rank 0's claim away,
after which a shepherd that comes late goes home.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fireflyer.fleet.backend import Backend, Launch, Refused, Unreachable
from fireflyer.fleet.folder import StateFolder
from fireflyer.fleet.ledger import AttemptRow, End, Ledger, TaskRow
from fireflyer.fleet.records import (
    VOID,
    Spec,
    asked_path,
    claim,
    read_json,
    started_path,
    write_spec,
)

RETRY_S = 10.0
KILL_GRACE_S = 5.0
"""The shepherd keeps the deadline; this long after it the controller kills by itself."""


@dataclass
class Hands:
    """Acts on the back end for one ledger."""

    ledger: Ledger
    backend: Backend
    folder: StateFolder
    as_me: bool

    def launch_of(self, task: TaskRow, attempt: AttemptRow) -> Launch:
        uid, gid = (os.geteuid(), os.getegid()) if self.as_me else (task.uid, task.gid)
        return Launch(attempt.id, self.attempt_folder(attempt.id), tuple(attempt.nodes), uid, gid, attempt.backend_id)

    def attempt_folder(self, number: int) -> Path:
        fleet = self.ledger.meta("fleet")
        assert fleet is not None
        return self.folder.attempt(fleet, number)

    def start(self, task: TaskRow, nodes: Sequence[str], turn: bool, now: float) -> None:
        """Launch a waiting task."""
        number = self.ledger.open_attempt(task.id, nodes, turn, now)
        attempt = self.ledger.attempt(number)
        assert attempt is not None
        launch = self.launch_of(task, attempt)
        try:
            self._lay_out(task, launch)
            self.ledger.launched(number, self.backend.launch(launch))
        except FileExistsError:
            # Of an older ledger's attempt: what lies there is not to be taken for this one's end.
            self.void(task, attempt, f"{launch.folder} exists already", now, retry=False)
        except (Refused, OSError) as error:
            reason = f"the back end refused: {error}"
            if isinstance(error, OSError):
                reason = f"its folder {launch.folder} can't be written: {error.strerror}"
            self.give_up(task, attempt, reason, now, retry=True)
        except Unreachable:
            return  # it may have arrived all the same: `find_or_void` will tell

    def find_or_void(self, task: TaskRow, attempt: AttemptRow, now: float) -> None:
        """An intent without an id, left by a kill or by a back end that did not answer."""
        launch = self.launch_of(task, attempt)
        found = self.backend.find(launch)
        if found is not None:
            self.ledger.launched(attempt.id, found)
        else:
            self.give_up(task, attempt, "never launched", now)

    def give_up(self, task: TaskRow, attempt: AttemptRow, reason: str, now: float, retry: bool = False) -> bool:
        """Void a launch that has not begun; False when it has, and must be stopped like any other."""
        launch = self.launch_of(task, attempt)
        if launch.folder.exists() and not claim(launch.folder, 0, VOID):
            if attempt.state == "launching":
                self.ledger.launched(attempt.id, attempt.backend_id or "")  # it began, and has ended since
            return False
        self.backend.kill(launch)  # ranks of which rank 0 never came
        self.void(task, attempt, reason, now, retry)
        return True

    def void(self, task: TaskRow, attempt: AttemptRow, reason: str, now: float, retry: bool) -> None:
        """Write down that an attempt never began. `retry`: the reason may be there still, so not at once again."""
        self.ledger.end_attempt(attempt, End("void", reason, "stopped" if task.stop_asked else "waiting"), now)
        if retry and not task.stop_asked:
            self.ledger.postpone(task.id, reason, now + RETRY_S)

    def stop(self, task: TaskRow, attempt: AttemptRow, now: float) -> bool:
        """Carry a stop out once its intent is in the ledger: True when TERM is with all ranks, or none is left."""
        launch = self.launch_of(task, attempt)
        ranks = range(len(launch.nodes))
        if any(read_json(asked_path(launch.folder, rank)) for rank in ranks):
            return True
        started = [rank for rank in ranks if read_json(started_path(launch.folder, rank))]
        if not started:
            return self.give_up(task, attempt, "stopped before it began", now)
        if len(started) < len(ranks):
            return False  # the others are about to start; TERM sent now might miss them
        self.backend.terminate(launch)
        return True

    def kill(self, task: TaskRow, attempt: AttemptRow, now: float) -> None:
        """The deadline has passed, and the shepherds did not keep it."""
        self.ledger.killed(attempt.id, now)
        self.backend.kill(self.launch_of(task, attempt))

    def _lay_out(self, task: TaskRow, launch: Launch) -> None:
        env, umask = self.ledger.environment(task.id)
        launch.folder.mkdir(mode=0o700)
        spec = Spec(
            task=task.id,
            attempt=launch.attempt,
            argv=task.argv,
            cwd=task.cwd,
            env=env,
            umask=umask,
            nodes=list(launch.nodes),
            node_env=[self.backend.node_env(node) for node in launch.nodes],
            run_dir=task.run_dir,
            deadline_s=task.deadline_s,
            master_port=29500 + launch.attempt % 10000,
        )
        write_spec(launch.folder, spec)
        (launch.folder / "shepherd.log").touch(mode=0o600)
        if launch.uid != os.geteuid():
            for path in (*launch.folder.iterdir(), launch.folder):
                os.chown(path, launch.uid, launch.gid)
