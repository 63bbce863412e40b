"""Users and the controller: a line of JSON each way over a Unix socket. Who asks is what the kernel says, not they."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyer.errors import UserError

REQUEST_LIMIT_BYTES = 4 << 20
_PATIENCE_S = 30.0
_SERVER_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Peer:
    """The user at the other end."""

    uid: int
    gid: int


Answer = Callable[[Peer, str, dict[str, Any]], Any]
"""(who, what, arguments) -> something JSON-able; UserError is told to the peer."""


class Server:
    """Answers requests in threads of its own until closed."""

    def __init__(self, path: Path, shared: bool, answer: Answer) -> None:
        self._path = path
        path.unlink(missing_ok=True)  # the controller's lock is held: nobody listens there

        class Handler(socketserver.StreamRequestHandler):
            timeout = _SERVER_PATIENCE_S

            def handle(self) -> None:
                _serve(self.connection, self.rfile, answer)

        with _short(path) as short:
            before = os.umask(0o177)
            try:
                self._server = _UnixServer(short, Handler)
            finally:
                os.umask(before)
        if shared:
            path.chmod(0o666)  # anybody may ask; what they may have is decided by who they are
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = False  # closing waits for the answers under way, `down`'s own among them
    request_queue_size = 128


def _serve(connection: socket.socket, reader: Any, answer: Answer) -> None:
    _, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        line = reader.readline(REQUEST_LIMIT_BYTES + 1)
        if len(line) > REQUEST_LIMIT_BYTES or not line.endswith(b"\n"):
            raise UserError(f"a request has {REQUEST_LIMIT_BYTES >> 20} MiB at most, environment included")
        request = json.loads(line)
        if not isinstance(request, dict) or not isinstance(request.get("do"), str):
            raise UserError("a request is an object with 'do'")
        arguments = {key: value for key, value in request.items() if key != "do"}
        reply = {"result": answer(Peer(uid, gid), request["do"], arguments)}
    except (UserError, UnicodeError, json.JSONDecodeError) as error:
        reply = {"error": str(error)}
    except OSError:
        return
    except Exception as error:  # ours: the peer is told, and the controller goes on
        traceback.print_exc()
        reply = {"error": f"the controller failed at this: {type(error).__name__}: {error}; its log has more"}
    try:
        connection.sendall(json.dumps(reply).encode() + b"\n")
    except OSError:
        return


def ask(path: Path, what: str, **arguments: Any) -> Any:
    """One request. Raises UserError: what the controller says, or that there is none."""
    try:
        with _short(path) as short, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_PATIENCE_S)
            connection.connect(short)
            connection.sendall(json.dumps({"do": what, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as reader:
                line = reader.readline()
    except PermissionError as error:
        raise UserError(f"{path.parent} is another user's fleet: give yours with --state") from error
    except (OSError, EOFError) as error:
        raise UserError(f"no fleet answers in {path.parent}: start one with fireflyer fleet up") from error
    try:
        reply = json.loads(line)
    except ValueError as error:
        raise UserError(f"the fleet in {path.parent} ended before it answered: ask again") from error
    if "error" in reply:
        raise UserError(reply["error"])
    return reply["result"]


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """The path by way of an open folder, since a socket's own path may have 107 bytes only."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
