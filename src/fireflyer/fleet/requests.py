"""What users may ask of the fleet, and who may have it: all see the queue, owners touch their own tasks."""

from __future__ import annotations

import os
import pwd
import re
import threading
from typing import Any

from fireflyer.errors import UserError
from fireflyer.fleet import views
from fireflyer.fleet.channel import Peer
from fireflyer.fleet.controller import Controller
from fireflyer.fleet.ledger import LedgerError, Submission, TaskRow
from fireflyer.fleet.policy import check_size

DEADLINE_LIMIT_S = 3600.0
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Requests:
    """Answers for one controller; `end` is set when it shall end."""

    def __init__(self, fleet: Controller, end: threading.Event) -> None:
        self._fleet = fleet
        self._end = end
        self._known = {
            "ping": self._ping,
            "submit": self._submit,
            "queue": self._queue,
            "status": self._status,
            "stop": self._stop,
            "nodes": self._nodes,
            "validate": self._validate,
            "drain": self._drain,
            "down": self._down,
        }

    def answer(self, peer: Peer, what: str, arguments: dict[str, Any]) -> Any:
        """Raises UserError: it is the peer's to mend, or to wait for."""
        if what not in self._known:
            raise UserError(f"the fleet knows no request {what!r}: is it of another version?")
        try:
            return self._known[what](peer, arguments)
        except LedgerError as error:
            raise UserError(f"not done: {error}") from error
        except (KeyError, TypeError) as error:
            raise UserError(f"request {what!r} isn't whole: {error}") from error

    def _ping(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        fleet = self._fleet
        return {"pid": os.getpid(), "backend": fleet.backend.name, "nodes": len(fleet.sight.nodes)}

    def _submit(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        fleet = self._fleet
        user, uid, gid = self._account(peer, arguments.get("user"))
        given = Submission(
            key=_text(arguments, "key"),
            user=user,
            uid=uid,
            gid=gid,
            name=_text(arguments, "name"),
            argv=_texts(arguments["argv"], "argv"),
            cwd=_text(arguments, "cwd"),
            env=_environment(arguments["env"]),
            umask=int(arguments["umask"]) & 0o777,
            nodes=int(arguments["nodes"]),
            run_dir=None if arguments["run_dir"] is None else _text(arguments, "run_dir"),
            deadline_s=float(arguments["deadline_s"] or fleet.settings.stop_s),
            restarts=int(arguments["restarts"]),
            limit_s=None if arguments["limit_s"] is None else float(arguments["limit_s"]),
        )
        _check(given)
        with fleet.lock:
            check_size(given.nodes, fleet.policy_state(fleet.clock.now()), bool(arguments["wait_for_nodes"]))
            task = fleet.ledger.add_task(given, fleet.clock.now())
        fleet.wake.set()
        return {"task": task, "trouble": fleet.sight.trouble}

    def _queue(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**views.queue(self._fleet), "me": self._account(peer, None)[0]}

    def _status(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        return views.status(self._fleet, self._own(peer, arguments))

    def _stop(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        task = self._own(peer, arguments)
        if task.state not in ("waiting", "running"):
            return {"task": task.id, "state": task.state}
        who = self._account(peer, None)[0]
        self._fleet.ledger.ask_task_to_stop(task.id, f"stopped by {who}", self._fleet.clock.now())
        self._fleet.wake.set()
        after = self._fleet.ledger.task(task.id)
        return {"task": task.id, "state": "stopping" if after is None or after.state == "running" else after.state}

    def _nodes(self, peer: Peer, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return views.node_rows(self._fleet)

    def _validate(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        self._must_own_fleet(peer, "validate nodes")
        known = [node.name for node in self._fleet.sight.nodes]
        asked = known if arguments["node"] is None else [self._node(arguments["node"])]
        tasks = {name: self._fleet.validation.ask(name) for name in asked}
        self._fleet.wake.set()
        return tasks

    def _drain(self, peer: Peer, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        self._must_own_fleet(peer, "drain and resume nodes")
        node = self._node(arguments["node"])
        if arguments["drained"]:
            self._fleet.validation.drain(node, _text(arguments, "reason"))
        else:
            self._fleet.validation.restore(node)
        self._fleet.wake.set()
        return views.node_rows(self._fleet)

    def _down(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        self._must_own_fleet(peer, "take it down")
        if arguments["suspend"]:
            self._fleet.drain()
            running = len(self._fleet.ledger.open_attempts())
            if running:
                return {"pid": os.getpid(), "running": running}
        self._end.set()
        self._fleet.wake.set()
        return {"pid": os.getpid(), "running": 0 if arguments["suspend"] else len(self._fleet.ledger.open_attempts())}

    def _account(self, peer: Peer, wanted: str | None) -> tuple[str, int, int]:
        """(user charged, uid, gid) for what a peer submits. Only the fleet's owner may name somebody else."""
        if wanted is None:
            return user_name(peer.uid), peer.uid, peer.gid
        self._must_own_fleet(peer, f"submit for {wanted!r}")
        if not _NAME.fullmatch(wanted):
            raise UserError(f"--for {wanted!r}: a user's name has letters, digits, '_', '.' and '-'")
        if self._fleet.hands.as_me:
            return wanted, peer.uid, peer.gid
        try:
            entry = pwd.getpwnam(wanted)
        except KeyError as error:
            raise UserError(f"--for {wanted}: this machine has no such user") from error
        return wanted, entry.pw_uid, entry.pw_gid

    def _owns_fleet(self, peer: Peer) -> bool:
        return peer.uid in (0, os.geteuid())

    def _must_own_fleet(self, peer: Peer, what: str) -> None:
        if not self._owns_fleet(peer):
            raise UserError(f"only {user_name(os.geteuid())}, whose fleet this is, may {what}")

    def _own(self, peer: Peer, arguments: dict[str, Any]) -> TaskRow:
        number = int(arguments["task"])
        task = self._fleet.ledger.task(number)
        if task is None:
            raise UserError(f"there is no task {number}: fireflyer fleet queue lists them")
        if task.uid != peer.uid and not self._owns_fleet(peer):
            raise UserError(f"task {number} is {task.user}'s, not {user_name(peer.uid)}'s")
        return task

    def _node(self, name: Any) -> str:
        known = [node.name for node in self._fleet.sight.nodes]
        if name not in known:
            raise UserError(f"there is no node {name!r}: there are {', '.join(known) or 'none'}")
        return name


def user_name(uid: int) -> str:
    """Its name, or uidN where the machine knows none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid{uid}"


def _text(arguments: dict[str, Any], key: str) -> str:
    return _texts([arguments[key]], key)[0]


def _texts(values: Any, key: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) and "\0" not in value for value in values):
        raise UserError(f"{key}: text without NUL characters is wanted")
    return values


def _environment(given: dict[str, Any]) -> dict[str, str]:
    return dict(zip(_texts([*given], "env"), _texts([*given.values()], "env"), strict=True))


def _check(given: Submission) -> None:
    if not given.argv or not given.argv[0]:
        raise UserError("no command: give it after --, as in fireflyer fleet submit -- python train.py")
    if not _NAME.fullmatch(given.name):
        raise UserError(f"--name {given.name!r}: a name has 1 to 64 letters, digits, '_', '.' and '-'")
    if not given.cwd.startswith("/"):
        raise UserError(f"folder {given.cwd!r} isn't absolute")
    if not 0 < given.deadline_s <= DEADLINE_LIMIT_S:
        raise UserError(f"--deadline {given.deadline_s:g}: between 0 and {DEADLINE_LIMIT_S:g} s")
    if given.restarts < 0:
        raise UserError(f"--restarts {given.restarts}: 0 or more")
    if given.limit_s is not None and not given.limit_s > 0:
        raise UserError(f"--limit {given.limit_s:g}: above 0 s")
    if any("=" in name or not name for name in given.env):
        raise UserError("env: a variable's name is not empty and has no '='")
