"""The one process beside a job's command on each node: starts it, keeps its deadline, writes down how it ended.

It needs no controller while it runs, so the controller may die, hang or be renewed. TERM comes to every process of the
command (from the process group, or from Slurm); the shepherd passes nothing on, it only counts the deadline from then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from fireflyer.fleet.processes import cpu_seconds, descendants
from fireflyer.fleet.records import (
    ATTEMPT_VARIABLE,
    SAVED,
    Ended,
    ReservedRecord,
    Spec,
    asked_path,
    claim,
    ended_path,
    is_void,
    output_path,
    read_json,
    read_spec,
    started_path,
    use_path,
    write_json,
)

USE_EVERY_S = 5.0
_LEFTOVERS_S = 1.0
_SLURM_SETS = ("SLURM", "CUDA_VISIBLE_", "ROCR_VISIBLE_", "HIP_VISIBLE_", "GPU_DEVICE_", "ZE_AFFINITY_")
_WATCHED = {signal.SIGTERM, signal.SIGCHLD}
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    """`FOLDER [RANK]`; without RANK it is Slurm's number of this process in the job."""
    folder = Path(arguments[0])
    rank = int(arguments[1] if len(arguments) > 1 else os.environ["SLURM_PROCID"])
    if not claim(folder, rank, "shepherd") or is_void(folder):
        return 0
    Shepherd(folder, rank, read_spec(folder)).run()
    return 0


class Shepherd:
    """One rank of one attempt."""

    def __init__(self, folder: Path, rank: int, spec: Spec) -> None:
        self.folder, self.rank, self.spec = folder, rank, spec
        self._began = time.monotonic()
        self._term_at: float | None = None
        self._killed = False
        self._use_at = self._began

    def run(self) -> None:
        """Start the command and stay until nothing of it is left."""
        # Blocked and waited for, never handled: no moment in which a signal could be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        _adopt_orphans()
        record = ReservedRecord(ended_path(self.folder, self.rank))
        began_wall = time.time()
        with output_path(self.folder, self.rank).open("ab", buffering=0) as output:
            try:
                process = self._start(output)
            except OSError as error:
                reason = f"{self.spec.argv[0]!r} can't be started in {self.spec.cwd}: {error.strerror}"
                output.write(f"fleet: {reason}\n".encode(errors="replace"))
                record.write(asdict(Ended(127, 0.0, None, False, None, None, None, reason, 0.0)))
                return
        host = socket.gethostname()
        write_json(started_path(self.folder, self.rank), {"pid": process.pid, "host": host, "at": began_wall})
        code = self._watch(process)
        if code == -signal.SIGTERM:
            self._wait(0.05)  # our own TERM may come a moment after the command's
        ran_s = time.monotonic() - self._began
        _clear_leftovers()
        stop_s = None if self._term_at is None else time.monotonic() - self._term_at
        step, since_save_s, damage = self._saved(began_wall, ran_s)
        times = os.times()
        cpu_s = times.children_user + times.children_system
        record.write(asdict(Ended(code, ran_s, stop_s, self._killed, step, since_save_s, damage, None, cpu_s)))

    def _start(self, output: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.spec.argv,
            cwd=self.spec.cwd,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            umask=self.spec.umask,
            preexec_fn=_unblock,  # there is no other thread that it could meet
        )

    def _environment(self) -> dict[str, str]:
        """The submitter's environment, what Slurm says of the job, and where this rank stands in the gang."""
        spec = self.spec
        first = socket.gethostname() if len(spec.nodes) == 1 or "SLURM_JOB_ID" not in os.environ else spec.nodes[0]
        placed = {
            ATTEMPT_VARIABLE: str(self.folder),
            "FIREFLYER_FLEET_TASK": str(spec.task),
            "FIREFLYER_FLEET_NODES": ",".join(spec.nodes),
            "FIREFLYER_FLEET_RANK": str(self.rank),
            # torchrun reads its own arguments from these.
            "PET_NNODES": str(len(spec.nodes)),
            "PET_NODE_RANK": str(self.rank),
            "PET_MASTER_ADDR": first,
            "PET_MASTER_PORT": str(spec.master_port),
        }
        slurm = {name: value for name, value in os.environ.items() if name.startswith(_SLURM_SETS)}
        return {**spec.env, **slurm, **spec.node_env[self.rank], **placed}

    def _watch(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            self._wait(self._patience())
            now = time.monotonic()
            if (code := _reap(process.pid)) is not None:
                return code
            if self._term_at is not None and now - self._term_at >= self.spec.deadline_s:
                self._killed = True
                _kill_descendants()
            if now - self._use_at >= USE_EVERY_S:
                self._note_use(now)

    def _patience(self) -> float:
        """Until the deadline, or the next note of use."""
        until = self._use_at + USE_EVERY_S
        if self._term_at is not None:
            until = min(until, self._term_at + self.spec.deadline_s)
        return 0.05 if self._killed else max(0.01, until - time.monotonic())

    def _wait(self, wait_s: float) -> None:
        """For a signal; the first TERM begins the deadline."""
        got = signal.sigtimedwait(_WATCHED, wait_s)
        if got is not None and got.si_signo == signal.SIGTERM and self._term_at is None:
            self._term_at = time.monotonic()
            _quietly(asked_path(self.folder, self.rank), {"at": time.time()})

    def _note_use(self, now: float) -> None:
        pids = descendants(os.getpid())
        _quietly(
            use_path(self.folder, self.rank),
            {
                "ran_s": now - self._began,
                "cpu_s": cpu_seconds(pids),
                "cores": len(os.sched_getaffinity(0)),
                "gpu_load": _gpu_load(),
            },
        )
        self._use_at = time.monotonic()

    def _saved(self, began_wall: float, ran_s: float) -> tuple[int | None, float | None, str | None]:
        """The step saved last, how long before the end, and what ails newer checkpoints. Rank 0 speaks for the gang."""
        if self.rank:
            return None, None, None
        if self.spec.run_dir is not None:
            from fireflyer.fleet.saved import newest_saved

            saved = newest_saved(Path(self.spec.run_dir))
            step, at, damage = saved.step, saved.at, saved.damage
        else:
            said = read_json(self.folder / SAVED) or {}
            step, at, damage = said.get("step"), said.get("at"), None
        # Two seconds of grace: file systems of other machines keep their own time.
        in_this_attempt = at is not None and at >= began_wall - 2
        return step, min(ran_s, max(0.0, time.time() - at)) if at is not None and in_this_attempt else None, damage


def _unblock() -> None:
    """In the child, before its command: signals as any process has them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def _adopt_orphans() -> None:
    """Grandchildren whose parent ends become ours, so that none of them escapes the deadline."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap(command: int) -> int | None:
    """Bury the dead; the command's exit code once it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == command:
            code = os.waitstatus_to_exitcode(status)


def _kill_descendants() -> None:
    for pid in descendants(os.getpid()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _clear_leftovers() -> None:
    """What the command left running gets a moment to end by itself, for its node is given on."""
    until = time.monotonic() + _LEFTOVERS_S
    while True:
        _reap(-1)
        if not descendants(os.getpid()):
            return
        if time.monotonic() >= until:
            _kill_descendants()
        time.sleep(0.02)


def _quietly(path: Path, value: dict[str, object]) -> None:
    """Notes that are good to have: a full disk must not end the job."""
    try:
        write_json(path, value)
    except OSError:
        return


def _gpu_load() -> float | None:
    """Mean load of the GPUs that the job sees, 0 to 1; None where none is to be asked."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            preexec_fn=_unblock,
        )
        loads = [float(line) for line in asked.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return sum(loads) / len(loads) / 100 if loads else None
