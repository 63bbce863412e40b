"""Does a command survive the fleet? Run it with a shepherd of its own, interrupt it, resume it, and look.

The same shepherd, signal, deadline and judgement as in the fleet; no controller, no ledger.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from fireflyer.errors import UserError
from fireflyer.fleet.backend import Launch
from fireflyer.fleet.judge import judge
from fireflyer.fleet.ledger import AttemptRow, End, TaskRow
from fireflyer.fleet.local import LocalBackend, LocalNode
from fireflyer.fleet.records import Spec, output_path, read_ended, read_json, started_path, write_spec

_POLL_S = 0.02
_TAIL_LINES = 5


def simulate_interrupt(
    command: list[str],
    *,
    cwd: Path,
    run_dir: str | None,
    after_s: float,
    times: int,
    deadline_s: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Interrupt it `times` times, each `after_s` after its start, then let it run to its end.

    Returns: {"survived": True, "interrupts": [...], "seconds": ...}.

    Raises:
        UserError: it did not survive, and in which way.
    """
    if times < 1 or after_s <= 0:
        raise UserError(f"--times {times} --after {after_s:g}: once at least, and after more than 0 s")
    trial = _Trial(command, cwd, run_dir, deadline_s)
    with tempfile.TemporaryDirectory(prefix="fireflyer-") as folder:
        ends: list[End] = []
        began = time.monotonic()
        for number in range(times + 1):
            place = Path(folder) / str(number)
            asked = number < times
            say(f"run {number + 1}: " + (f"interrupted after {after_s:g} s" if asked else "to the end"))
            end = trial.run(place, number, after_s if asked else None, ends[-1].saved_step if ends else None)
            ends.append(end)
            tail = _tail(output_path(place, 0))
            if end.outcome == "done" and asked:
                raise UserError(f"it ended by itself within {after_s:g} s: give less with --after")
            say(f"run {number + 1}: {end.reason}" + (f", {end.stop_s:.2f} s after TERM" if end.stop_s else ""))
            if end.outcome != ("saved" if asked else "done") or (asked and not end.kept_s):
                raise UserError(f"it does not survive: {end.reason}; its last lines: {tail}")
        if any(later < earlier for earlier, later in _saved_steps(ends)):
            raise UserError("it does not survive: it began anew instead of going on from what it had saved")
    say("it survives: interrupted, saved, resumed, done")
    return {
        "survived": True,
        "seconds": time.monotonic() - began,
        "interrupts": [{"saved_step": e.saved_step, "stop_s": e.stop_s, "lost_s": e.lost_s} for e in ends[:-1]],
        "end": {key: value for key, value in asdict(ends[-1]).items() if key in ("outcome", "saved_step")},
    }


class _Trial:
    """One command, launched again and again as the fleet would."""

    def __init__(self, command: list[str], cwd: Path, run_dir: str | None, deadline_s: float) -> None:
        self._backend = LocalBackend([LocalNode("here", "here")])
        self._task = TaskRow(
            id=0,
            user="",
            uid=os.geteuid(),
            gid=os.getegid(),
            name="",
            argv=command,
            cwd=str(cwd),
            nodes=1,
            run_dir=run_dir,
            deadline_s=deadline_s,
            restarts=0,
            submitted_at=0.0,
            state="running",
            reason="",
            ended_at=None,
            exit_code=None,
            stop_asked=False,
            failures=0,
            idle_stops=0,
            retry_at=0.0,
            limit_s=None,
            validates=None,
        )

    def run(self, folder: Path, number: int, stop_after_s: float | None, last_step: int | None) -> End:
        launch = self._launch(folder, number)
        asked_at = None
        try:
            while (ended := read_ended(folder, 0)) is None:
                if not self._backend.alive([launch])[number].ranks and read_ended(folder, 0) is None:
                    raise UserError("its shepherd was killed: run it again")
                started = read_json(started_path(folder, 0))
                due = stop_after_s is not None and started is not None and time.time() - started["at"] >= stop_after_s
                if due and asked_at is None:
                    asked_at = time.time()
                    self._backend.terminate(launch)
                time.sleep(_POLL_S)
        except BaseException:
            self._backend.kill(launch)
            raise
        attempt = AttemptRow(
            id=number,
            task=0,
            nodes=["here"],
            state="running",
            turn=False,
            backend_id=launch.backend_id,
            opened_at=0.0,
            started_at=None,
            stop_at=asked_at,
            stop_why=None,
            keeps=[],
            killed_at=None,
            ended_at=None,
            outcome=None,
            reason="",
            exit_code=None,
            saved_step=None,
            kept_s=0.0,
            lost_s=0.0,
            stop_s=None,
            cpu_s=0.0,
        )
        return judge(self._task, attempt, [ended], last_step)

    def _launch(self, folder: Path, number: int) -> Launch:
        folder.mkdir(mode=0o700)
        umask = os.umask(0o077)
        os.umask(umask)
        task = self._task
        write_spec(
            folder,
            Spec(
                task=0,
                attempt=number,
                argv=task.argv,
                cwd=task.cwd,
                env=dict(os.environ),
                umask=umask,
                nodes=["here"],
                node_env=[{}],
                run_dir=task.run_dir,
                deadline_s=task.deadline_s,
                master_port=29500,
            ),
        )
        (folder / "shepherd.log").touch(mode=0o600)
        launch = Launch(number, folder, ("here",), task.uid, task.gid)
        return Launch(number, folder, ("here",), task.uid, task.gid, self._backend.launch(launch))


def _saved_steps(ends: list[End]) -> list[tuple[Any, Any]]:
    known = [end for end in ends if end.saved_step is not None]
    return [(earlier.saved_step, later.saved_step) for earlier, later in pairwise(known)]


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return json.dumps(" | ".join(lines[-_TAIL_LINES:]), ensure_ascii=False)
