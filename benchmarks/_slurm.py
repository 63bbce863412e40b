"""A whole Slurm on this machine: munged, slurmctld and a slurmd for each node, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fireflyer.fleet.processes import all_processes, descendants

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scancel", "scontrol", "srun")
_READY_S = 30.0


def missing() -> str | None:
    """Why there can be no Slurm here; None: there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class SlurmCluster:
    """Nodes n1, n2, ... with one processor each, in zones given by letters: SlurmCluster(path, zones="aab").

    scheduler: its SchedulerParameters. By default batch jobs wait for up to 3 s after a node has become free.
    """

    def __init__(self, folder: Path, zones: str = "a", scheduler: str = "batch_sched_delay=0") -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, len(zones) + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("etc", "log", "state", "munge", *(f"spool-{name}" for name in self.names)):
            (folder / name).mkdir(parents=True, mode=0o755)
        (folder / "munge").chmod(0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.conf = folder / "etc" / "slurm.conf"
        self.conf.write_text(self._conf(zones, scheduler))

    def start(self) -> None:
        """Everything up, every node idle."""
        munge = self.folder / "munge"
        self._spawn(
            "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={self.folder}/munge.sock",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        _until(lambda: (self.folder / "munge.sock").exists())
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        _until(lambda: self.states() == dict.fromkeys(self.names, "idle"))

    def start_controller(self) -> None:
        self._spawn("slurmctld", "-D")

    def stop_controller(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._end("slurmctld", number)

    def start_node(self, name: str) -> None:
        self._spawn("slurmd", "-D", "-N", name, key=name)

    def kill_node(self, name: str) -> None:
        """As when its power goes: the daemon and all that runs under it, at once."""
        daemon = self._daemons.pop(name)
        doomed = [pid for step in self._steps() if self._node_of(step) == name for pid in (step, *descendants(step))]
        for pid in (daemon.pid, *doomed):
            os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def _steps(self) -> list[int]:
        """The processes that keep each step of each job."""
        return [p.pid for p in all_processes() if _read(p.pid, "cmdline").startswith(b"slurmstepd: [")]

    def _node_of(self, step: int) -> str | None:
        """By the log that it writes; None: it is of another Slurm."""
        for link in (Path("/proc") / str(step) / "fd").iterdir():
            with suppress(OSError):
                log = link.readlink()
                if log.parent == self.folder / "log" and log.name.startswith("slurmd-"):
                    return log.stem.removeprefix("slurmd-")
        return None

    def run(self, program: str, *arguments: str) -> str:
        env = {"PATH": _path(), "SLURM_CONF": str(self.conf)}
        return subprocess.run([program, *arguments], env=env, capture_output=True, text=True, check=False).stdout

    def states(self) -> dict[str, str]:
        """As Slurm says: idle, allocated, drained, down*, ..."""
        return dict(line.split("|") for line in self.run("sinfo", "-h", "-N", "-o", "%N|%T").splitlines())

    def stop(self) -> None:
        """End every job and daemon."""
        doomed = [pid for step in self._steps() if self._node_of(step) for pid in (step, *descendants(step))]
        for name in list(self._daemons):
            self._end(name, signal.SIGKILL)
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _spawn(self, program: str, *arguments: str, key: str | None = None) -> None:
        key = key or program
        with (self.folder / "log" / f"{key}.out").open("ab") as log:
            self._daemons[key] = subprocess.Popen(
                [shutil.which(program, path=_path()) or program, *arguments],
                env={"PATH": _path(), "SLURM_CONF": str(self.conf)},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _end(self, key: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(key)
        daemon.send_signal(number)
        daemon.wait(timeout=20)

    def _conf(self, zones: str, scheduler: str) -> str:
        host = socket.gethostname().partition(".")[0]
        controller, *ports = _free_ports(1 + len(zones))
        nodes = "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 Feature=zone_{zone}\n"
            for name, port, zone in zip(self.names, ports, zones, strict=True)
        )
        return f"""ClusterName=fleettest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldDebug=debug
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SlurmdDebug=debug
DebugFlags=Steps
LogTimeFormat=iso8601_ms
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.sock
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
SlurmdTimeout=4
KillWait=2
MpiDefault=none
MessageTimeout=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}PartitionName=main Nodes={",".join(self.names)} Default=YES State=UP OverSubscribe=EXCLUSIVE MaxTime=INFINITE
"""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _read(pid: int, what: str) -> bytes:
    try:
        return (Path("/proc") / str(pid) / what).read_bytes()
    except OSError:
        return b""


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + _READY_S
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"Slurm is not ready after {_READY_S:g} s")
        time.sleep(0.05)
