"""How an attempt ended, by its ranks' records: the table of judge.py, line by line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fireflyer.fleet.judge import judge, say_code
from fireflyer.fleet.ledger import AttemptRow, TaskRow
from fireflyer.fleet.records import Ended

TASK = TaskRow(
    id=1, user="alice", uid=0, gid=0, name="job", argv=["x"], cwd="/", nodes=1, run_dir=None, deadline_s=30.0,
    restarts=0, submitted_at=0.0, state="running", reason="", ended_at=None, exit_code=None, stop_asked=False,
    failures=0, idle_stops=0, retry_at=0.0, limit_s=None, validates=None,
)  # fmt: skip
ATTEMPT = AttemptRow(
    id=1, task=1, nodes=["n1", "n2"], state="running", turn=True, backend_id="", opened_at=0.0, started_at=1.0,
    stop_at=None, stop_why=None, keeps=[], killed_at=None, ended_at=None, outcome=None, reason="", exit_code=None,
    saved_step=None, kept_s=0.0, lost_s=0.0, stop_s=None, cpu_s=0.0,
)  # fmt: skip
ASKED = replace(ATTEMPT, state="stopping", stop_at=90.0, stop_why="slice")


def rank(code: int, **changes: Any) -> Ended:
    return replace(Ended(code, 100.0, None, False, None, None, None, None, 50.0), **changes)


@pytest.mark.parametrize(
    ("attempt", "ranks", "outcome", "state", "kept_s"),
    [
        (ATTEMPT, [rank(0)], "done", "done", 100),
        (ASKED, [rank(0, stop_s=1.0)], "done", "done", 100),
        (ASKED, [rank(75, stop_s=2.0, saved_step=7, since_save_s=1.0)], "saved", "waiting", 100),
        (ASKED, [rank(75, stop_s=2.0, saved_step=7, since_save_s=22.0)], "saved", "waiting", 80),
        (ASKED, [rank(75, stop_s=2.0), rank(0, stop_s=2.0)], "saved", "waiting", 100),
        (ASKED, [rank(-9, stop_s=30.0, killed=True, since_save_s=40.0)], "unsaved", "waiting", 60),
        (ASKED, [rank(-15, stop_s=0.1)], "unsaved", "waiting", 0),
        (ASKED, [rank(-15)], "unsaved", "waiting", 0),  # dead before its shepherd heard of the TERM
        (ASKED, [rank(1, stop_s=0.1), rank(75, stop_s=1.0)], "unsaved", "waiting", 0),
        (ATTEMPT, [rank(3)], "failed", "failed", 0),
        (ATTEMPT, [rank(-15)], "failed", "failed", 0),  # by somebody else's TERM
        (ATTEMPT, [rank(127, error="no such command")], "failed", "failed", 0),
        (ATTEMPT, [rank(75, saved_step=3, since_save_s=0.0), None], "lost", "waiting", 100),
        (ATTEMPT, [None], "lost", "waiting", 0),
        (replace(ASKED, stop_why="gang: rank 1"), [rank(-15, stop_s=0.1), rank(4)], "failed", "failed", 0),
        (replace(ASKED, stop_why="gang: rank 1"), [rank(-9, stop_s=30.0, killed=True), rank(4)], "failed", "failed", 0),
    ],
)
def test_table(attempt: AttemptRow, ranks: list[Ended | None], outcome: str, state: str, kept_s: float):
    end = judge(TASK, attempt, ranks, None)
    assert (end.outcome, end.task_state, end.kept_s) == (outcome, state, kept_s)
    ran_s = 0.0 if ranks == [None] else 100.0
    assert end.kept_s + end.lost_s == ran_s


def test_75_is_held_against_the_run_folder():
    """A job that says 75 and has saved nothing is not believed; a damaged checkpoint is named (pain 10)."""
    task = replace(TASK, run_dir="runs/x")
    lied = judge(task, ASKED, [rank(75, stop_s=1.0, saved_step=4)], 4)
    assert (lied.outcome, lied.task_state, lied.lost_s) == ("saved", "waiting", 100)
    assert "75, but nothing new saved: its run folder has no checkpoint of this attempt" in lied.reason
    damaged = judge(task, ASKED, [rank(75, stop_s=1.0, saved_step=3, since_save_s=31.0, damage="step-4: torn")], 2)
    assert damaged.reason == "saved step 3, passing over step-4: torn"
    assert damaged.lost_s == 30


def test_restarts_stops_and_idle_75s():
    again = replace(TASK, restarts=1)
    assert judge(again, ATTEMPT, [rank(3)], None).task_state == "waiting"
    assert judge(replace(again, failures=1), ATTEMPT, [rank(3)], None).task_state == "failed"
    assert judge(replace(TASK, stop_asked=True), ASKED, [rank(75, stop_s=1.0)], None).task_state == "stopped"
    idle = replace(TASK, idle_stops=2)
    assert judge(idle, ATTEMPT, [rank(75, saved_step=4, since_save_s=0.0)], 4).task_state == "failed"
    assert judge(idle, ATTEMPT, [rank(75, saved_step=5, since_save_s=0.0)], 4).task_state == "waiting"
    assert judge(idle, ASKED, [rank(75, stop_s=1.0)], None).task_state == "waiting"


def test_codes_in_words():
    assert [say_code(code) for code in (3, -11, -99)] == [
        "exit code 3",
        "ended by signal SIGSEGV",
        "ended by signal 99",
    ]
