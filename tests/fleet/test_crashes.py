"""A controller killed at each line that matters, and by kill -9 from outside: nothing lost, run twice, or forgotten."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fireflyer.errors import UserError
from fireflyer.fleet.backend import Unreachable
from fireflyer.fleet.channel import ask
from fireflyer.fleet.folder import StateFolder
from fireflyer.fleet.ledger import Ledger, LedgerError
from fireflyer.fleet.processes import all_processes

from .conftest import COUNTER, PYTHON, Lab, local_nodes

STEPS = 40
LEDGER_ACTS = ("open_attempt", "launched", "started", "ask_to_stop", "end_attempt")
BACKEND_ACTS = ("launch", "terminate")


class Killed(BaseException):
    """As SIGKILL: nothing after it happens, no handler of ours sees it."""


def killing(act: str, when: str, target: Any) -> list[str]:
    """Die at the next call of `act`, before or after it is done. The list holds it once that has happened."""
    real, died = getattr(target, act), []

    def call(*args: Any) -> Any:
        if when == "before" and not died:
            died.append(act)
            raise Killed
        result = real(*args)
        if not died:
            died.append(act)
            raise Killed
        return result

    setattr(target, act, call)
    return died


def check_never_twice(lines: list[list[str]], steps: int) -> None:
    """begin, end, begin, end, ...: each run goes on where the one before stopped, none beside another."""
    assert [line[0] for line in lines] == ["begin", "end"] * (len(lines) // 2)
    at = 0
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert begin[1] == end[1]
        assert int(begin[2]) == at
        at = int(end[2])
    assert at == steps


def test_killed_at_every_act(make_lab: Callable[..., Lab]):
    """Before and after each write and each deed, one by one; a new controller goes on from the ledger alone."""
    lab = make_lab(min_slice_s=0.1)
    tasks = {user: lab.counter(user, STEPS, user) for user in ("alice", "bob", "carol")}
    for act in (*LEDGER_ACTS, *BACKEND_ACTS):
        for when in ("before", "after"):
            died = killing(act, when, lab.ledger if act in LEDGER_ACTS else lab.backend)
            with pytest.raises(Killed):
                lab.until(lambda died=died: bool(died) or lab.ended(*tasks.values())())
            lab.ledger.close()
            lab.backend = local_nodes(1)  # it has lost its children's handles, too
            lab.controller()
    lab.until(lab.ended(*tasks.values()), 60)
    for user, number in tasks.items():
        assert lab.task(number).state == "done"
        check_never_twice(lab.log(user), STEPS)
        assert sum(attempt.lost_s for attempt in lab.attempts(number)) < 0.2


def start_daemon(state: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fireflyer", "fleet", "up", "--foreground", "--as-me", "--state", str(state)]
    with (state / "up.log").open("ab") as log:
        process = subprocess.Popen([*command, "--slice", "0.3"], stdout=log, stderr=log)
    while not answers(state):
        assert process.poll() is None, (state / "up.log").read_text()
        time.sleep(0.02)
    return process


def answers(state: Path) -> bool:
    try:
        return bool(ask(StateFolder(state).socket, "ping"))
    except UserError:
        return False


def submit(state: Path, user: str, argv: list[str]) -> int:
    given = {
        "key": user,
        "user": user,
        "name": user,
        "argv": argv,
        "cwd": str(state),
        "env": {},
        "umask": 0o22,
        "nodes": 1,
        "run_dir": None,
        "deadline_s": None,
        "restarts": 0,
        "limit_s": None,
        "wait_for_nodes": False,
    }
    return ask(StateFolder(state).socket, "submit", **given)["task"]


def test_kill_9_from_outside(tmp_path: Path):
    """At random moments, while jobs of three users go round; a submission sent twice is one task (its key)."""
    draw = random.Random(3)
    daemon = start_daemon(tmp_path)
    tasks = []
    for user in ("alice", "bob", "carol"):
        argv = [*PYTHON, COUNTER, str(tmp_path / user), "50"]
        tasks.append(submit(tmp_path, user, argv))
        assert submit(tmp_path, user, argv) == tasks[-1]
    for _ in range(6):
        time.sleep(draw.uniform(0.05, 0.8))
        daemon.kill()
        daemon.wait()
        daemon = start_daemon(tmp_path)
    try:
        until = time.monotonic() + 60
        while any(ask(StateFolder(tmp_path).socket, "status", task=n)["state"] != "done" for n in tasks):
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
    for user in ("alice", "bob", "carol"):
        lines = [line.split() for line in (tmp_path / f"{user}.log").read_text().splitlines()]
        check_never_twice(lines, 50)
    marks = [p.pid for p in all_processes() if str(tmp_path).encode() in cmdline(p.pid) and p.alive]
    assert not marks


def cmdline(pid: int) -> bytes:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def test_second_controller_is_one_line(tmp_path: Path):
    daemon = start_daemon(tmp_path)
    try:
        command = [sys.executable, "-m", "fireflyer", "fleet", "up", "--as-me", "--state", str(tmp_path)]
        for more in ([], ["--foreground"]):
            second = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
            assert second.returncode == 2
            assert second.stderr == (
                f"fireflyer: {tmp_path} has a controller already (pid {daemon.pid}): use it, or end it with"
                " fireflyer fleet down\n"
            )
    finally:
        daemon.kill()
        daemon.wait()


def test_full_disk_under_the_ledger(make_lab: Callable[..., Lab]):
    """Nothing is launched that could not be written down; what runs runs on; with room again all goes on."""
    lab = make_lab()
    running = lab.counter("running", 60)
    lab.until(lab.running(running))
    pages = lab.ledger._db.execute("PRAGMA page_count").fetchone()[0]
    lab.ledger._db.execute(f"PRAGMA max_page_count={pages}")
    full = f"the ledger {lab.folder.ledger} can't be written: database or disk is full; free its disk, nothing is lost"
    with pytest.raises(LedgerError, match=re.escape(full)):
        _ = [lab.counter(f"waiting{number}", 2, "bob") for number in range(60)]
    accepted = [task.id for task in lab.ledger.active_tasks()]
    stuck = 0
    for _ in range(40):
        try:
            lab.fleet.tick()
        except LedgerError:
            stuck += 1
        time.sleep(0.02)
    assert len(lab.ledger.open_attempts()) <= 1
    lab.ledger._db.execute(f"PRAGMA max_page_count={1 << 30}")
    lab.until(lab.ended(*accepted), 60)
    assert all(lab.task(number).state == "done" for number in accepted)
    check_never_twice(lab.log("running"), 60)


def test_ledger_is_its_owners_alone(make_lab: Callable[..., Lab]):
    lab = make_lab()
    number = lab.counter("job", 1)
    lab.until(lab.ended(number))
    for path in lab.folder.root.rglob("*"):
        if path.is_relative_to(lab.folder.ledger.parent) or path.is_relative_to(lab.folder.root / "attempts"):
            assert path.stat().st_mode & 0o077 == 0 or path.name == "output.log", path
    assert lab.attempt_folder(number).stat().st_mode & 0o077 == 0


def test_other_format_is_refused(make_lab: Callable[..., Lab]):
    lab = make_lab()
    with lab.ledger.transaction():
        lab.ledger.set_meta("format", "99")
    with pytest.raises(UserError, match="a ledger of format 99"):
        Ledger(lab.folder.ledger)


def test_lost_answer_costs_no_second_run(make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch):
    """The back end launched, and its answer did not come: the launch is found, not made again."""
    lab = make_lab()
    real = lab.backend.launch
    answers = []

    def launch(given: Any) -> str:
        answers.append(real(given))
        raise Unreachable("no answer")

    monkeypatch.setattr(lab.backend, "launch", launch)
    number = lab.counter("job", 10)
    lab.until(lab.ended(number))
    assert len(answers) == 1
    check_never_twice(lab.log("job"), 10)
    assert os.path.exists(lab.attempt_folder(number))
