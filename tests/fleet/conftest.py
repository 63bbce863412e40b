"""A fleet in the test's own process: the real controller, ledger, shepherds and jobs, ticked by hand."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks._slurm import SlurmCluster, missing
from fireflyer.fleet import local
from fireflyer.fleet import slurm as slurm_backend
from fireflyer.fleet.backend import Backend
from fireflyer.fleet.controller import Controller
from fireflyer.fleet.folder import StateFolder
from fireflyer.fleet.ledger import AttemptRow, Ledger, Submission, TaskRow
from fireflyer.fleet.local import LocalBackend, LocalNode
from fireflyer.fleet.policy import Settings

PYTHON = [sys.executable, "-S", "-I", "-c"]

# Counts steps into a file, one every 20 ms; on TERM writes the count down and exits with 75. argv: FILE STEPS
COUNTER = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
path, total = sys.argv[1], int(sys.argv[2])
step = int(open(path).read()) if os.path.exists(path) else 0
log = open(path + ".log", "a", buffering=1)
log.write(f"begin {os.getpid()} {step}\\n")
while step < total:
    time.sleep(0.02)
    step += 1
    if asked or step == total:
        with open(path + ".part", "w") as file:
            file.write(str(step))
        os.replace(path + ".part", path)
        if step < total:
            log.write(f"end {os.getpid()} {step}\\n")
            sys.exit(75)
log.write(f"end {os.getpid()} {step}\\n")
"""


class Lab:
    """One state folder and the controller that has it now."""

    def __init__(self, root: Path, backend: Backend, **settings: Any) -> None:
        self.folder = StateFolder(root)
        self.folder.prepare(shared=False)
        self.backend = backend
        self.settings = Settings(**{"min_slice_s": 0.4, "stop_s": 5.0, "tick_s": 1.0, **settings})
        self.fleet = self.controller()

    def controller(self, ledger: Ledger | None = None) -> Controller:
        """A new one, as after a kill of the last."""
        self.fleet = Controller(self.folder, self.backend, self.settings, as_me=True, ledger=ledger)
        return self.fleet

    @property
    def ledger(self) -> Ledger:
        return self.fleet.ledger

    def submit(self, argv: Sequence[str], user: str = "alice", **changes: Any) -> int:
        given = {
            "key": secrets.token_hex(8),
            "user": user,
            "uid": os.geteuid(),
            "gid": os.getegid(),
            "name": "job",
            "argv": list(argv),
            "cwd": str(self.folder.root),
            "env": {"PATH": os.environ["PATH"]},
            "umask": 0o022,
            "nodes": 1,
            "run_dir": None,
            "deadline_s": 5.0,
            "restarts": 0,
        }
        return self.ledger.add_task(Submission(**{**given, **changes}), self.fleet.clock.now())

    def counter(self, name: str, steps: int, user: str = "alice", **changes: Any) -> int:
        return self.submit([*PYTHON, COUNTER, str(self.folder.root / name), str(steps)], user, **changes)

    def until(self, true: Callable[[], Any], limit_s: float = 30.0) -> None:
        """Tick until it is so."""
        until = time.monotonic() + limit_s
        while not true():
            assert time.monotonic() < until, f"not within {limit_s} s: {self.ledger.active_tasks()}"
            self.fleet.tick()
            time.sleep(0.02)

    def task(self, number: int) -> TaskRow:
        task = self.ledger.task(number)
        assert task is not None
        return task

    def attempts(self, number: int) -> list[AttemptRow]:
        """Those that began."""
        return [attempt for attempt in self.ledger.attempts_of(number) if attempt.outcome != "void"]

    def ended(self, *numbers: int) -> Callable[[], bool]:
        return lambda: all(self.task(number).state in ("done", "failed", "stopped") for number in numbers)

    def running(self, number: int) -> Callable[[], bool]:
        """Its command has started on every node."""
        return lambda: any(a.started_at is not None and a.state == "running" for a in self.attempts(number))

    def attempt_folder(self, number: int) -> Path:
        return self.fleet.hands.attempt_folder(self.attempts(number)[-1].id)

    def log(self, name: str) -> list[list[str]]:
        """A counter's log: who began and ended at which step."""
        return [line.split() for line in (self.folder.root / f"{name}.log").read_text().splitlines()]

    def close(self) -> None:
        for attempt in self.ledger.open_attempts():
            if attempt.state != "launching":
                self.backend.kill(self.fleet.hands.launch_of(self.task(attempt.task), attempt))
        self.ledger.close()


def local_nodes(number: int, zones: int = 1) -> LocalBackend:
    return LocalBackend([LocalNode(f"n{i + 1}", f"zone{i * zones // number}") for i in range(number)])


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """make_lab(nodes=1, backend=None, **settings)"""
    labs: list[Lab] = []

    def make(nodes: int = 1, zones: int = 1, backend: Backend | None = None, **settings: Any) -> Lab:
        labs.append(Lab(tmp_path / f"fleet{len(labs)}", backend or local_nodes(nodes, zones), **settings))
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that other users may pass through, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def everybodys_python(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Shepherds, and the interpreter given back, that users other than root may run, wherever this one is installed."""
    if os.geteuid() != 0:
        pytest.skip("only root can run jobs as other users")
    shutil.copytree(local.SOURCE / "fireflyer", open_folder / "source" / "fireflyer")
    monkeypatch.setattr(local, "SOURCE", open_folder / "source")
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        program = [python, "-c", "import sys; assert sys.version_info >= (3, 10)"]
        with suppress(OSError):
            if (
                python
                and subprocess.run(program, user="nobody", check=False, stderr=subprocess.DEVNULL).returncode == 0
            ):
                for module in (local, slurm_backend):
                    monkeypatch.setattr(module, "SHEPHERD", [python, *local.SHEPHERD[1:]])
                return python
    pytest.skip("no Python here that other users may run")


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A Slurm of three nodes in two zones: n1, n2 in zone_a, n3 in zone_b."""
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    cluster = SlurmCluster(folder, zones="aab")
    try:
        cluster.start()
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(cluster.conf)
        yield cluster
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
