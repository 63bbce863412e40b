"""The fleet in a terminal: tables, the live board, logs that follow a task from slice to slice."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fireflyer.cli.progress import duration

WATCH_EVERY_S = 1.0
_FOLLOW_EVERY_S = 0.2
_TAIL_LINES = 10
_TAIL_BYTES = 1 << 16


def queue_text(shown: dict[str, Any]) -> str:
    """The queue as plain text."""
    parts = [headline(shown)]
    if shown["tasks"]:
        parts.append(
            _columns(["task", "user", "name", "nodes", "state", "for", "slices", "next", ""], _task_rows(shown))
        )
    else:
        parts.append("no task waits or runs: fireflyer fleet submit -- COMMAND")
    if shown["users"]:
        parts.append(_columns(["user", "share", "fair", "node-hours", "runs", "waits"], _user_rows(shown)))
    return "\n\n".join(parts)


def headline(shown: dict[str, Any]) -> str:
    """Nodes, occupancy and real use, apart; trouble."""
    nodes = shown["nodes"]
    use = "not known yet" if shown["real_use"] is None else f"{shown['real_use']:.0%}"
    line = (
        f"{shown['backend']}: {nodes['up']} of {nodes['total']} nodes up, {nodes['busy']} held"
        f" (occupancy {shown['occupancy']:.0%}, real use {use}); slices of {duration(shown['slice_s'])}"
    )
    return line + (f"\ntrouble: {shown['trouble']}" if shown["trouble"] else "")


def _task_rows(shown: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task in shown["tasks"]:
        expected = task["expected_in_s"]
        ahead = "" if task["state"] != "waiting" else "?" if expected is None else f"in {duration(expected)}"
        why = ", ".join(task["on"]) + (f": {task['why']}" if task["on"] and task["why"] else "")
        name = task["user"] + (" (me)" if task["user"] == shown.get("me") else "")
        rows.append(
            [
                str(task["task"]),
                name,
                task["name"],
                str(task["nodes"]),
                task["state"],
                duration(task["for_s"]),
                str(task["slices"]),
                ahead,
                why or task["why"],
            ]
        )
    return rows


def _user_rows(shown: dict[str, Any]) -> list[list[str]]:
    return [
        [
            user["user"] + (" (me)" if user["user"] == shown.get("me") else ""),
            f"{user['share']:.0%}",
            f"{user['fair_share']:.0%}",
            f"{user['node_hours']:.2f}",
            str(user["running"]),
            str(user["waiting"]),
        ]
        for user in shown["users"]
    ]


def status_text(shown: dict[str, Any]) -> str:
    """A task, its attempts, and the end of its output where it has failed."""
    lines = [
        f"task {shown['task']} ({shown['name']}, {shown['user']}): {shown['state']}"
        + (f": {shown['why']}" if shown["why"] else ""),
        f"command: {' '.join(shown['argv'])}   in {shown['cwd']}",
        f"work kept {duration(shown['kept_s'])}, lost {shown['lost_s']:.1f} s; waited {duration(shown['waited_s'])}"
        + ("" if shown["saved_step"] is None else f"; saved step {shown['saved_step']}"),
    ]
    if shown["expected_in_s"] is not None:
        lines.append(f"next slice expected in {duration(shown['expected_in_s'])}")
    rows = [
        [
            str(attempt["attempt"]),
            ", ".join(attempt["nodes"]),
            attempt["outcome"] or attempt["state"],
            duration(attempt["held_s"]),
            f"{attempt['lost_s']:.1f} s",
            "" if attempt["stop_s"] is None else f"{attempt['stop_s']:.2f} s",
            attempt["reason"],
        ]
        for attempt in shown["attempts"]
    ]
    if rows:
        lines += ["", _columns(["attempt", "nodes", "ended", "held", "lost", "stop", "why"], rows)]
    if shown["state"] == "failed" and shown["attempts"]:
        tail = _tail(Path(shown["attempts"][-1]["folder"]) / "output.log")
        lines += ["", "its last lines:", *(f"  {line}" for line in tail)]
    return "\n".join(lines)


def nodes_text(rows: list[dict[str, Any]]) -> str:
    table = [
        [
            row["name"],
            row["zone"],
            row["health"],
            "" if row["task"] is None else f"task {row['task']}",
            "" if row["use"] is None else f"{row['use']:.0%}",
            row["reason"],
        ]
        for row in rows
    ]
    return _columns(["node", "zone", "health", "held by", "use", ""], table)


def verdict_text(node: str, shown: dict[str, Any]) -> str:
    """One node's examination, check by check."""
    import json

    try:
        verdict = json.loads((Path(shown["attempts"][-1]["folder"]) / "verdict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError):
        return f"{node}: no verdict: {shown['why']}"
    lines = [f"{node} ({verdict['host']}): {'good' if verdict['ok'] else 'BAD'}"]
    for check in verdict["checks"]:
        lines.append(f"  {check['name']:<11} {'good' if check['ok'] else 'BAD '}  {check['said']}")
    return "\n".join(lines)


def watch(ask: Callable[[], dict[str, Any]]) -> None:
    """The board, until Ctrl-C."""
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        try:
            while True:
                live.update(board(ask()), refresh=True)
                time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return


def board(shown: dict[str, Any]) -> Group:
    """The queue as rich shows it."""
    tasks = _table(["task", "user", "name", "nodes", "state", "for", "slices", "next", "why"], _task_rows(shown))
    users = _table(["user", "share", "fair", "node-hours", "runs", "waits"], _user_rows(shown))
    return Group(Text(headline(shown)), tasks, users)


def copy_logs(status: Callable[[], dict[str, Any]], rank: int, follow: bool) -> None:
    """A task's output, attempt after attempt, as the user who owns the files reads them."""
    at: dict[int, int] = {}
    while True:
        shown = status()
        ended = shown["state"] not in ("waiting", "running", "stopping")
        for attempt in shown["attempts"]:
            name = "output.log" if rank == 0 else f"output-{rank}.log"
            path = Path(attempt["folder"]) / name
            number = attempt["attempt"]
            at[number] = _copy(path, at.get(number, 0))
        if not follow or ended:
            return
        time.sleep(_FOLLOW_EVERY_S)


def _copy(path: Path, begin: int) -> int:
    try:
        with path.open("rb") as file:
            file.seek(begin)
            while block := file.read(_TAIL_BYTES):
                sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
            return file.tell()
    except FileNotFoundError:
        return begin


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.strip().splitlines()[-_TAIL_LINES:]


def _table(columns: Sequence[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _columns(names: Sequence[str], rows: list[list[str]]) -> str:
    """Text in columns, as wide as their widest cell; the last as it is."""
    table = [list(names), *rows]
    widths = [max(len(row[place]) for row in table) for place in range(len(names) - 1)]
    lines = ("  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in table)
    return "\n".join(lines)
