"""The back end on Slurm: an attempt is a Slurm job with one step, a shepherd on each node. sbatch, squeue, scancel.

A slice changes by a signal and a fresh submission; Slurm's own pre-emption and requeueing (minutes, measured) are not
used. A job bears its attempt in its name, by which it is found again. What it is to run stands in the attempt's folder,
so nothing of a user's command line is ever read by a shell. The state folder must be on a file system of all nodes.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from typing import Literal

from fireflyer.errors import UserError
from fireflyer.fleet.backend import Alive, Launch, Refused, SeenNode, Unreachable
from fireflyer.fleet.local import SHEPHERD, shepherd_environment

_PATIENCE_S = 20.0
_LOOK_EVERY_S = 1.0
_SILENT = re.compile(
    r"unable to contact|connect failure|connection (?:refused|timed out)|timed out|socket|communication|try again"
    r"|authentication|munge|not responding|in standby|slurm backup",
    re.IGNORECASE,
)
_LIVING = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
_FREE = {"IDLE", "ALLOCATED", "MIXED", "COMPLETING", "PLANNED", "ALLOC", "COMP", "MIX"}


class SlurmBackend:
    """Whole nodes of one partition. The id of a launch is its Slurm job's."""

    name = "slurm"
    nodes_a_machine = 1

    def __init__(self, fleet: str, partition: str | None) -> None:
        self._prefix = f"fleet-{fleet}-"
        self._partition = partition
        self._jobs: dict[str, tuple[str, str]] = {}
        self._looked_at = float("-inf")
        try:
            _run("sinfo", "--version")
        except Unreachable as error:
            raise UserError(f"Slurm's commands can't be used here: {error}") from error

    def nodes(self) -> list[SeenNode]:
        listed = _run("sinfo", "-h", "-N", *self._of_partition(), "-o", "%N|%T|%f|%R|%E")
        if not listed and self._partition:
            raise Unreachable(f"Slurm has no nodes in partition {self._partition!r}")
        others = self._nodes_of_others()
        seen: dict[str, SeenNode] = {}
        for line in listed:
            name, state, features, _, reason = line.split("|", 4)
            seen[name] = _node(name, state, features, "" if reason == "none" else reason, others.get(name))
        return list(seen.values())

    def node_env(self, node: str) -> dict[str, str]:
        return {}

    def launch(self, launch: Launch) -> str:
        step = ["srun", "--overlap", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--export=ALL"]
        script = f"#!/bin/sh\nexec {shlex.join([*step, *SHEPHERD, str(launch.folder)])}\n"
        options = [
            "--parsable",
            f"--job-name={self._prefix}{launch.attempt}",
            f"--nodes={len(launch.nodes)}",
            f"--nodelist={','.join(launch.nodes)}",
            "--ntasks-per-node=1",
            "--exclusive",
            "--no-requeue",
            "--open-mode=append",
            f"--output={launch.folder}/slurm.log",
            "--chdir=/",
            "--export=ALL",
            *self._of_partition(),
        ]
        if launch.uid != os.geteuid():
            options += [f"--uid={launch.uid}", f"--gid={launch.gid}"]
        said = _run("sbatch", *options, script=script, refuses=True)
        self._looked_at = float("-inf")
        match = re.match(r"(\d+)", said[-1]) if said else None
        if match is None:
            raise Unreachable(f"sbatch said {said!r} and no job's number")
        return match[1]

    def find(self, launch: Launch) -> str | None:
        """By name, always: a Slurm that was restarted may give a number again."""
        self._look()
        job = self._jobs.get(f"{self._prefix}{launch.attempt}")
        return None if job is None else job[0]

    def alive(self, launches: Sequence[Launch]) -> dict[int, Alive]:
        names = {launch.attempt: f"{self._prefix}{launch.attempt}" for launch in launches}
        if not names:
            return {}
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S or not set(names.values()) <= self._jobs.keys():
            self._look()
        alive = {}
        for launch in launches:
            # A job that is not listed is over since MinJobAge, or forgotten by a Slurm that was restarted.
            _, state = self._jobs.get(names[launch.attempt], ("", None))
            ranks = range(len(launch.nodes)) if state in _LIVING else ()
            alive[launch.attempt] = Alive(frozenset(ranks), certain=state is not None)
        return alive

    def terminate(self, launch: Launch) -> None:
        # To the step, that is to every process on every node, once; not to srun, which would answer by killing them.
        if (job := self.find(launch)) is not None:
            _run("scancel", "-s", "TERM", job, tolerates=True)

    def kill(self, launch: Launch) -> None:
        if (job := self.find(launch)) is not None:
            _run("scancel", "--full", "-s", "KILL", job, tolerates=True)
            _run("scancel", job, tolerates=True)

    def set_drained(self, node: str, drained: bool, reason: str) -> None:
        state = ["State=DRAIN", f"Reason=fleet: {reason}"] if drained else ["State=RESUME"]
        _run("scontrol", "update", f"NodeName={node}", *state, tolerates=True)

    def _of_partition(self) -> list[str]:
        return [f"--partition={self._partition}"] if self._partition else []

    def _look(self) -> None:
        jobs = {}
        for line in _run("squeue", "-h", "-a", "-t", "all", "-o", "%i|%T|%j"):
            number, state, name = line.split("|", 2)
            if name.startswith(self._prefix):
                jobs[name] = (number, state)
        self._jobs, self._looked_at = jobs, time.monotonic()

    def _nodes_of_others(self) -> dict[str, str]:
        """Nodes that jobs outside this fleet have."""
        found = {}
        for line in _run("squeue", "-h", "-a", "-t", "running,suspended,configuring", "-o", "%i|%N|%j"):
            number, nodes, name = line.split("|", 2)
            if not name.startswith(self._prefix) and nodes:
                for node in _run("scontrol", "show", "hostnames", nodes):
                    found[node] = f"Slurm's job {number}"
        return found


def _node(name: str, state: str, features: str, reason: str, other: str | None) -> SeenNode:
    """A node from sinfo's line: its zone is a feature zone..., as Feature=zone_a in slurm.conf."""
    base = re.sub(r"[^A-Z_]", "", state.upper())
    zone = next((word for word in features.split(",") if word.startswith("zone")), "zone0")
    health: Literal["up", "drained", "lost"] = "lost"
    if "*" in state:
        reason = reason or "Slurm has no contact with it"
    elif base.startswith("DRAIN"):
        health = "drained"
    elif other is not None:
        reason = f"taken by {other}"
    elif base in _FREE:
        health, reason = "up", ""
    else:
        reason = reason or f"Slurm's state {state}"
    return SeenNode(name, zone, health, reason)


def _run(
    program: str, *arguments: str, script: str | None = None, refuses: bool = False, tolerates: bool = False
) -> list[str]:
    """One of Slurm's commands: its lines. Raises Unreachable, or Refused where Slurm has answered.

    Args:
        refuses: an answer other than yes is Refused.
        tolerates: an answer other than yes is none of our business (a job that has ended meanwhile).
    """
    env = shepherd_environment() | {key: value for key, value in os.environ.items() if key == "SLURM_CONF"}
    try:
        done = subprocess.run(
            [program, *arguments],
            env=env,
            cwd="/",
            input=script or "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{program} gave no answer in {_PATIENCE_S:g} s") from error
    except OSError as error:
        raise Unreachable(f"{program} can't be run: {error.strerror}") from error
    if done.returncode == 0 or (tolerates and not _SILENT.search(done.stderr)):
        return done.stdout.splitlines()
    said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if refuses and not _SILENT.search(done.stderr):
        raise Refused(said)
    raise Unreachable(f"Slurm: {said}")
