"""A place to listen, taken before anything slow is done. In: host and port. Out: a socket, or what to do, in a line."""

from __future__ import annotations

import errno
import socket

from fireflyer.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: ports go from 0 (any that is free) to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except socket.gaierror:
        raise UserError(
            f"--host {host}: no such host; 127.0.0.1 is this machine alone, 0.0.0.0 every network"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use; stop what listens there, or choose another --port"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is not allowed to you; choose a --port above 1023") from None
        raise UserError(f"can't listen on {host} port {port}: {error.strerror}") from None
