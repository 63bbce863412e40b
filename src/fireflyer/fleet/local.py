"""The back end of one machine: nodes are places for a job, shepherds are sessions of their own that outlive us."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fireflyer.errors import UserError
from fireflyer.fleet.backend import Alive, Launch, Refused, SeenNode
from fireflyer.fleet.processes import PROC, all_processes, owner, read_process, with_variable
from fireflyer.fleet.records import ATTEMPT_VARIABLE

SOURCE = Path(__file__).resolve().parents[2]
SHEPHERD = [sys.executable, "-m", "fireflyer.fleet", "shepherd"]
_PLAIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def shepherd_environment() -> dict[str, str]:
    """What a shepherd itself runs with: nothing of the controller's, nothing of the job's."""
    return {"PATH": _PLAIN_PATH, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True)
class LocalNode:
    """A place for one job; `env` is set for what runs there, say CUDA_VISIBLE_DEVICES."""

    name: str
    zone: str
    env: dict[str, str] = field(default_factory=dict)


class LocalBackend:
    """Process groups on this machine. The id of a launch: pid and start time of each rank's shepherd."""

    name = "local"

    def __init__(self, nodes: Sequence[LocalNode]) -> None:
        if not (PROC / "self" / "stat").exists():
            raise UserError("the local back end reads the process table under /proc, which only Linux has")
        self._nodes = {node.name: node for node in nodes}
        self.nodes_a_machine = max(1, len(self._nodes))
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def nodes(self) -> list[SeenNode]:
        return [SeenNode(node.name, node.zone, "up") for node in self._nodes.values()]

    def node_env(self, node: str) -> dict[str, str]:
        return self._nodes[node].env if node in self._nodes else {}

    def launch(self, launch: Launch) -> str:
        ids: list[list[int]] = []
        for rank in reversed(range(len(launch.nodes))):
            try:
                child = self._start(launch, rank)
            except (OSError, subprocess.SubprocessError) as error:
                for pid, _ in ids:
                    os.killpg(pid, signal.SIGKILL)
                raise Refused(f"no process could be started: {error}") from error
            self._children[child.pid] = child
            ids.insert(0, [child.pid, _start_ticks(child.pid)])
        return json.dumps(ids)

    def find(self, launch: Launch) -> str | None:
        ids: dict[int, list[int]] = {}
        mark = b"\0".join([b"shepherd", os.fsencode(launch.folder)])
        for process in all_processes():
            if not process.alive or owner(process.pid) != launch.uid:
                continue
            try:
                command = (PROC / str(process.pid) / "cmdline").read_bytes()
            except OSError:
                continue
            _, found, rest = command.partition(mark + b"\0")
            if found and (rank := rest.strip(b"\0")).isdigit():
                ids[int(rank)] = [process.pid, process.start_ticks]
        return json.dumps([ids.get(rank, [0, 0]) for rank in range(len(launch.nodes))]) if ids else None

    def alive(self, launches: Sequence[Launch]) -> dict[int, Alive]:
        for pid, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[pid]
        return {
            launch.attempt: Alive(frozenset(rank for rank, id_ in enumerate(_ids(launch)) if _lives(*id_)))
            for launch in launches
        }

    def terminate(self, launch: Launch) -> None:
        for pid, start_ticks in _ids(launch):
            if _lives(pid, start_ticks):
                _signal_group(pid, signal.SIGTERM)

    def kill(self, launch: Launch) -> None:
        for pid, start_ticks in _ids(launch):
            if _lives(pid, start_ticks):
                _signal_group(pid, signal.SIGKILL)
        # What left its process group, and what a shepherd that died left behind.
        for pid in with_variable(ATTEMPT_VARIABLE, str(launch.folder), launch.uid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def set_drained(self, node: str, drained: bool, reason: str) -> None:
        """There is nothing below to tell; the ledger holds it."""

    def _start(self, launch: Launch, rank: int) -> subprocess.Popen[bytes]:
        other = launch.uid != os.geteuid()
        # The folder is the user's: a link in its place is not followed.
        descriptor = os.open(launch.folder / "shepherd.log", os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "ab") as log:
            return subprocess.Popen(
                [*SHEPHERD, str(launch.folder), str(rank)],
                cwd="/",
                env=shepherd_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=launch.uid if other else None,
                group=launch.gid if other else None,
                extra_groups=groups_of(launch.uid, launch.gid) if other else None,
            )


def groups_of(uid: int, gid: int) -> list[int]:
    """The groups that a user's own processes have."""
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return [gid]


def _ids(launch: Launch) -> list[tuple[int, int]]:
    return [(pid, ticks) for pid, ticks in json.loads(launch.backend_id or "[]")]


def _start_ticks(pid: int) -> int:
    process = read_process(pid)
    return process.start_ticks if process is not None else 0


def _lives(pid: int, start_ticks: int) -> bool:
    process = read_process(pid)
    return process is not None and process.alive and process.start_ticks == start_ticks


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return
