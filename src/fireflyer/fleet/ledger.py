"""The ledger: one task, many attempts, why each ended, what of its work was kept. SQLite, durable at every commit.

The controller keeps nothing that is not in here, so it may be killed at any moment. A launch is written down twice:
before it (state `launching`, so that it can't be forgotten) and after it (the back end's id, so that it can be found).
Times are the fleet's clock (clock.py), in seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyer.errors import UserError

ACTIVE = ("waiting", "running")
_FORMAT = 1
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, user TEXT NOT NULL, uid INTEGER NOT NULL,
    gid INTEGER NOT NULL, name TEXT NOT NULL, argv TEXT NOT NULL, cwd TEXT NOT NULL, env TEXT NOT NULL,
    umask INTEGER NOT NULL, nodes INTEGER NOT NULL, run_dir TEXT, deadline_s REAL NOT NULL, restarts INTEGER NOT NULL,
    submitted_at REAL NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', ended_at REAL, exit_code INTEGER,
    stop_asked INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, idle_stops INTEGER NOT NULL DEFAULT 0,
    retry_at REAL NOT NULL DEFAULT 0, limit_s REAL, validates TEXT);
CREATE INDEX tasks_by_state ON tasks (state);
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, task INTEGER NOT NULL REFERENCES tasks (id), nodes TEXT NOT NULL,
    state TEXT NOT NULL, turn INTEGER NOT NULL, backend_id TEXT, opened_at REAL NOT NULL, started_at REAL,
    stop_at REAL, stop_why TEXT, keeps TEXT NOT NULL DEFAULT '[]',
    killed_at REAL, ended_at REAL, outcome TEXT, reason TEXT NOT NULL DEFAULT '', exit_code INTEGER,
    saved_step INTEGER, kept_s REAL NOT NULL DEFAULT 0, lost_s REAL NOT NULL DEFAULT 0, stop_s REAL,
    cpu_s REAL NOT NULL DEFAULT 0);
CREATE INDEX attempts_by_task ON attempts (task);
CREATE INDEX attempts_by_state ON attempts (state);
CREATE TABLE nodes (name TEXT PRIMARY KEY, drained INTEGER NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL);
"""


class LedgerError(Exception):
    """The disk refused the ledger; nothing of the transaction was done."""


@dataclass(frozen=True)
class Submission:
    """What a user hands in."""

    key: str
    """Drawn by the client: handed in twice (a lost answer), it is still one task."""
    user: str
    uid: int
    gid: int
    name: str
    argv: list[str]
    cwd: str
    env: dict[str, str]
    umask: int
    nodes: int
    run_dir: str | None
    deadline_s: float
    restarts: int
    limit_s: float | None = None
    """The task's own promise to end within this time."""
    validates: str | None = None
    """The node that this task examines; the policy leaves such tasks alone."""


@dataclass(frozen=True)
class TaskRow:
    id: int
    user: str
    uid: int
    gid: int
    name: str
    argv: list[str]
    cwd: str
    nodes: int
    run_dir: str | None
    deadline_s: float
    restarts: int
    submitted_at: float
    state: str
    """waiting, running (an attempt is open), done, failed, stopped."""
    reason: str
    ended_at: float | None
    exit_code: int | None
    stop_asked: bool
    failures: int
    """Attempts that failed by themselves, so far restarted."""
    idle_stops: int
    """Attempts in a row that ended with 75 unasked and had saved nothing new."""
    retry_at: float
    """Not to be launched before, after the back end refused."""
    limit_s: float | None
    validates: str | None


@dataclass(frozen=True)
class AttemptRow:
    id: int
    task: int
    nodes: list[str]
    state: str
    """launching, running, stopping, ended."""
    turn: bool
    """Whether its launch took the user's turn."""
    backend_id: str | None
    opened_at: float
    started_at: float | None
    stop_at: float | None
    stop_why: str | None
    keeps: list[str]
    """Nodes that the task shall get back: all of a lost attempt's, or what the policy said when it moved it."""
    killed_at: float | None
    ended_at: float | None
    outcome: str | None
    """done, saved, unsaved, failed, lost (its node or shepherd went), void (never began)."""
    reason: str
    exit_code: int | None
    saved_step: int | None
    kept_s: float
    lost_s: float
    stop_s: float | None
    cpu_s: float


@dataclass(frozen=True)
class End:
    """How an attempt ended, and what becomes of its task."""

    outcome: str
    reason: str
    task_state: str
    exit_code: int | None = None
    saved_step: int | None = None
    kept_s: float = 0.0
    lost_s: float = 0.0
    stop_s: float | None = None
    cpu_s: float = 0.0
    failure: bool = False
    idle_stop: bool = False


class Ledger:
    """One connection, one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        new = not path.exists()
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # SQLite's companions take its mode
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        with _disk(path):
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
        known = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone()
        if new or not known:
            with self.transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self.set_meta("format", str(_FORMAT))
                self.set_meta("fleet", secrets.token_hex(4))
        elif self.meta("format") != str(_FORMAT):
            raise UserError(f"{path} is a ledger of format {self.meta('format')}; this version writes {_FORMAT}")

    def close(self) -> None:
        self._db.close()

    @property
    def changes(self) -> int:
        """Grows with every row that is written."""
        return self._db.total_changes

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing. Raises LedgerError where the disk refuses."""
        with self._lock, _disk(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def meta(self, key: str) -> str | None:
        row = self._row("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else row["value"]

    def set_meta(self, key: str, value: str) -> None:
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
        )

    # Tasks

    def add_task(self, given: Submission, now: float) -> int:
        """The new task's number, or that of the task with the same key."""
        with self.transaction():
            row = self._db.execute("SELECT id FROM tasks WHERE key = ?", (given.key,)).fetchone()
            if row is not None:
                return row["id"]
            return self._insert(
                "tasks",
                key=given.key,
                user=given.user,
                uid=given.uid,
                gid=given.gid,
                name=given.name,
                argv=json.dumps(given.argv),
                cwd=json.dumps(given.cwd),
                env=json.dumps(given.env),
                umask=given.umask,
                nodes=given.nodes,
                run_dir=None if given.run_dir is None else json.dumps(given.run_dir),
                deadline_s=given.deadline_s,
                restarts=given.restarts,
                submitted_at=now,
                state="waiting",
                limit_s=given.limit_s,
                validates=given.validates,
            )

    def task(self, number: int) -> TaskRow | None:
        row = self._row(f"SELECT {_TASK_COLUMNS} FROM tasks WHERE id = ?", number)
        return None if row is None else _task(row)

    def environment(self, number: int) -> tuple[dict[str, str], int]:
        """The environment and umask that a task was submitted with."""
        row = self._row("SELECT env, umask FROM tasks WHERE id = ?", number)
        assert row is not None
        return json.loads(row["env"]), row["umask"]

    def active_tasks(self) -> list[TaskRow]:
        """Those that wait or run, oldest first."""
        return self._tasks("state IN ('waiting', 'running') ORDER BY id")

    def recent_tasks(self, number: int) -> list[TaskRow]:
        """The last ones that ended, newest first."""
        return self._tasks(f"state NOT IN ('waiting', 'running') ORDER BY ended_at DESC, id DESC LIMIT {int(number)}")

    def ask_task_to_stop(self, number: int, reason: str, now: float) -> None:
        """Stop for good: at once where it waits, else when its attempt has ended."""
        with self.transaction():
            self._db.execute("UPDATE tasks SET stop_asked = 1, reason = ? WHERE id = ?", (reason, number))
            self._db.execute(
                "UPDATE tasks SET state = 'stopped', ended_at = ? WHERE id = ? AND state = 'waiting'", (now, number)
            )

    def postpone(self, number: int, reason: str, until: float) -> None:
        """Keep a task that the back end could not take, and say why."""
        with self.transaction():
            self._db.execute("UPDATE tasks SET reason = ?, retry_at = ? WHERE id = ?", (reason, until, number))

    # Attempts

    def open_attempt(self, task: int, nodes: Sequence[str], turn: bool, now: float) -> int:
        """The intent to launch; durable before the launch begins."""
        with self.transaction():
            number = self._insert(
                "attempts", task=task, nodes=json.dumps(list(nodes)), turn=turn, state="launching", opened_at=now
            )
            self._db.execute("UPDATE tasks SET state = 'running', reason = '' WHERE id = ?", (task,))
        return number

    def attempt(self, number: int) -> AttemptRow | None:
        row = self._row("SELECT * FROM attempts WHERE id = ?", number)
        return None if row is None else _attempt(row)

    def open_attempts(self) -> list[AttemptRow]:
        return self._attempts("state != 'ended' ORDER BY id")

    def attempts_of(self, task: int) -> list[AttemptRow]:
        """Oldest first, those that never began included."""
        return self._attempts("task = ? ORDER BY id", task)

    def ended_attempts(self, since: float) -> list[tuple[str, AttemptRow]]:
        """(user, attempt) of those that ended after `since`."""
        rows = self._rows(
            "SELECT attempts.*, tasks.user AS user FROM attempts JOIN tasks ON tasks.id = attempts.task"
            " WHERE attempts.state = 'ended' AND attempts.ended_at > ? ORDER BY attempts.id",
            since,
        )
        return [(row["user"], _attempt(row)) for row in rows]

    def launched(self, attempt: int, backend_id: str) -> None:
        """The back end has it, under this id."""
        self._update(attempt, "state = 'running', backend_id = ?", backend_id)

    def started(self, attempt: int, now: float) -> None:
        self._update(attempt, "started_at = ?", now)

    def ask_to_stop(self, attempt: int, why: str, now: float, keeps: Sequence[str] = ()) -> None:
        """The intent to signal it; durable before the signal."""
        change = "state = 'stopping', stop_at = ?, stop_why = ?, keeps = ?"
        self._update(attempt, change, now, why, json.dumps(list(keeps)))

    def killed(self, attempt: int, now: float) -> None:
        self._update(attempt, "killed_at = ?", now)

    def end_attempt(self, attempt: AttemptRow, end: End, now: float) -> None:
        """An attempt's end and what follows for its task, in one transaction."""
        with self.transaction():
            self._db.execute(
                "UPDATE attempts SET state = 'ended', ended_at = ?, outcome = ?, reason = ?, exit_code = ?,"
                " saved_step = ?, kept_s = ?, lost_s = ?, stop_s = ?, cpu_s = ?,"
                " keeps = CASE WHEN ? = 'lost' THEN nodes ELSE keeps END WHERE id = ?",
                (
                    *(now, end.outcome, end.reason, end.exit_code, end.saved_step, end.kept_s, end.lost_s),
                    *(end.stop_s, end.cpu_s, end.outcome, attempt.id),
                ),
            )
            self._db.execute(
                "UPDATE tasks SET state = ?, reason = ?, exit_code = ?, ended_at = ?, failures = failures + ?,"
                " idle_stops = CASE WHEN ? THEN idle_stops + 1 ELSE 0 END WHERE id = ?",
                (
                    end.task_state,
                    end.reason,
                    end.exit_code,
                    None if end.task_state in ACTIVE else now,
                    end.failure,
                    end.idle_stop,
                    attempt.task,
                ),
            )

    # Nodes

    def drained(self) -> dict[str, str]:
        """Nodes that were taken out, with the reason."""
        rows = self._rows("SELECT name, reason FROM nodes WHERE drained = 1")
        return {row["name"]: row["reason"] for row in rows}

    def set_drained(self, node: str, drained: bool, reason: str, now: float) -> None:
        with self.transaction():
            self._db.execute(
                "INSERT INTO nodes VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
                " drained = excluded.drained, reason = excluded.reason, at = excluded.at",
                (node, drained, reason, now),
            )

    def _insert(self, table: str, **values: Any) -> int:
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        cursor = self._db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values()))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _update(self, attempt: int, change: str, *values: Any) -> None:
        with self.transaction():
            self._db.execute(f"UPDATE attempts SET {change} WHERE id = ?", (*values, attempt))

    def _tasks(self, where: str, *values: Any) -> list[TaskRow]:
        return [_task(row) for row in self._rows(f"SELECT {_TASK_COLUMNS} FROM tasks WHERE {where}", *values)]

    def _attempts(self, where: str, *values: Any) -> list[AttemptRow]:
        return [_attempt(row) for row in self._rows(f"SELECT * FROM attempts WHERE {where}", *values)]

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock, _disk(self.path):
            return self._db.execute(query, values).fetchall()

    def _row(self, query: str, *values: Any) -> sqlite3.Row | None:
        return next(iter(self._rows(query, *values)), None)


_TASK_COLUMNS = ", ".join(TaskRow.__dataclass_fields__)  # not env: it is long, and only a launch reads it


def _task(row: sqlite3.Row) -> TaskRow:
    values = {name: row[name] for name in TaskRow.__dataclass_fields__}
    values |= {"argv": json.loads(row["argv"]), "cwd": json.loads(row["cwd"]), "stop_asked": bool(row["stop_asked"])}
    values["run_dir"] = None if row["run_dir"] is None else json.loads(row["run_dir"])
    return TaskRow(**values)


def _attempt(row: sqlite3.Row) -> AttemptRow:
    values = {name: row[name] for name in AttemptRow.__dataclass_fields__}
    return AttemptRow(
        **{**values, **{name: json.loads(row[name]) for name in ("nodes", "keeps")}, "turn": bool(row["turn"])}
    )


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise LedgerError(f"the ledger {path} can't be written: {error}; free its disk, nothing is lost") from error
