"""The process table as Linux shows it: who descends from whom, who is alive, who used how much."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A line of the table. A pid alone is not one: pids come again, the pair with the start time does not."""

    pid: int
    parent: int
    state: str
    start_ticks: int
    cpu_ticks: int

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


def read_process(pid: int) -> Process | None:
    """None where there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = text.rpartition(")")[2].split()  # the name before it may hold anything
    return Process(pid, int(words[1]), words[0], int(words[19]), int(words[11]) + int(words[12]))


def all_processes() -> list[Process]:
    found = (read_process(int(name)) for name in os.listdir(PROC) if name.isdigit())
    return [process for process in found if process is not None]


def descendants(pid: int) -> list[int]:
    """Living children, their children, and so on."""
    children: dict[int, list[Process]] = {}
    for process in all_processes():
        children.setdefault(process.parent, []).append(process)
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            waiting.append(child.pid)
            if child.alive:
                found.append(child.pid)
    return found


def cpu_seconds(pids: list[int]) -> float:
    """What these have used, and their ended children that were waited for in this process."""
    ticks = sum(process.cpu_ticks for pid in pids if (process := read_process(pid)) is not None)
    times = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") + times.children_user + times.children_system


def owner(pid: int) -> int | None:
    """The user that a process runs as."""
    try:
        return (PROC / str(pid)).stat().st_uid
    except OSError:
        return None


def with_variable(name: str, value: str, uid: int) -> list[int]:
    """Living processes of one user that have this in their environment."""
    wanted = f"{name}={value}".encode()
    found = []
    for process in all_processes():
        if process.alive and owner(process.pid) == uid:
            try:
                environment = (PROC / str(process.pid) / "environ").read_bytes()
            except OSError:
                continue
            if wanted in environment.split(b"\0"):
                found.append(process.pid)
    return found
