"""A controller's life: settings, lock, ledger, socket, page, ticks; in this process or in one of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from fireflyer.errors import UserError
from fireflyer.fleet.backend import Backend
from fireflyer.fleet.channel import Server, ask
from fireflyer.fleet.controller import Controller
from fireflyer.fleet.folder import ControllerLock, StateFolder
from fireflyer.fleet.ledger import Ledger, LedgerError
from fireflyer.fleet.local import SOURCE, LocalBackend, LocalNode
from fireflyer.fleet.policy import Settings
from fireflyer.fleet.requests import Requests

_READY_S = 20.0


@dataclass(frozen=True)
class FleetConfig:
    """How a fleet is set up; kept in its ledger for the next `up`."""

    backend: str = "local"
    nodes: int = 1
    zones: int = 1
    node_env: dict[str, dict[str, str]] = field(default_factory=dict)
    partition: str | None = None
    slice_s: float = 600.0
    deadline_s: float = 30.0
    half_life_s: float = 86_400.0
    weights: dict[str, float] = field(default_factory=dict)
    as_me: bool = False

    def settings(self) -> Settings:
        return Settings(
            min_slice_s=self.slice_s, stop_s=self.deadline_s, half_life_s=self.half_life_s, weights=self.weights
        )


def build_backend(config: FleetConfig, fleet: str) -> Backend:
    """`fleet`: the ledger's id, by which its jobs are told from others'."""
    if config.backend == "local":
        if config.nodes < 1 or not 1 <= config.zones <= config.nodes:
            raise UserError(f"--nodes {config.nodes} --zones {config.zones}: 1 node at least, and no zone without one")
        names = [f"n{number}" for number in range(1, config.nodes + 1)]
        if unknown := config.node_env.keys() - set(names):
            raise UserError(f"--node-env {min(unknown)}: the nodes are {', '.join(names)}")
        return LocalBackend(
            [
                LocalNode(name, f"zone{place * config.zones // config.nodes}", config.node_env.get(name, {}))
                for place, name in enumerate(names)
            ]
        )
    if config.backend == "slurm":
        from fireflyer.fleet.slurm import SlurmBackend

        return SlurmBackend(fleet, config.partition)
    raise UserError(f"--backend {config.backend}: there are local and slurm")


def run_controller(
    folder: StateFolder,
    changes: dict[str, Any],
    *,
    web_port: int | None = None,
    on_ready: Callable[[str], None] = lambda line: None,
) -> None:
    """Be the controller until asked to end (`down`, SIGTERM, SIGINT); jobs run on.

    Args:
        changes: fields of FleetConfig that differ from what the ledger holds.
        on_ready: told in one line once requests are answered.
    """
    shared = os.geteuid() == 0 and not changes.get("as_me", False)
    folder.prepare(shared)
    lock = ControllerLock(folder)
    try:
        ledger = Ledger(folder.ledger)
        config = FleetConfig(**{**json.loads(ledger.meta("config") or "{}"), **changes})
        as_me = config.as_me or os.geteuid() != 0
        if as_me:
            folder.prepare(shared=False)
        backend = build_backend(config, ledger.meta("fleet") or "")
        with ledger.transaction():
            ledger.set_meta("config", json.dumps(asdict(config)))
        controller = Controller(folder, backend, config.settings(), as_me=as_me, ledger=ledger)
        controller.look(controller.clock.now())
    except LedgerError as error:
        raise UserError(str(error)) from error
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (end.set(), controller.wake.set()))
    server = Server(folder.socket, not as_me, Requests(controller, end).answer)
    page = None
    if web_port is not None:
        from fireflyer.fleet.web import Page

        page = Page(web_port, controller)
    place = f"http://127.0.0.1:{page.port}/, " if page is not None else ""
    on_ready(f"{folder.root}: {config.backend}, {place}pid {os.getpid()}")
    try:
        controller.run(end)
    finally:
        server.close()
        if page is not None:
            page.close()
        ledger.close()
        lock.release()


def start_controller(folder: StateFolder, options: list[str]) -> dict[str, Any]:
    """Start `fireflyer fleet up --foreground` as a process of its own and wait until it answers."""
    shared = os.geteuid() == 0 and "--as-me" not in options
    folder.prepare(shared)
    ControllerLock(folder).release()  # a second controller is told so here
    command = [sys.executable, "-m", "fireflyer", "fleet", "up", "--foreground", "--state", str(folder.root), *options]
    with folder.log.open("ab") as log:
        begun = log.tell()
        process = subprocess.Popen(
            command,
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until = time.monotonic() + _READY_S
    while time.monotonic() < until:
        try:
            return ask(folder.socket, "ping")
        except UserError:
            if process.poll() is not None:
                break
            time.sleep(0.05)
    said = folder.log.read_bytes()[begun:].decode(errors="replace").strip().splitlines()
    raise UserError((said or [f"the controller did not answer in {_READY_S:g} s"])[-1].removeprefix("fireflyer: "))
