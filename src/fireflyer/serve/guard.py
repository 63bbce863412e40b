"""Who may speak to the server, and how each exchange is counted. In: ASGI calls. Out: the same, or a refusal."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fireflyer.serve.errors import ApiError
from fireflyer.serve.metrics import Metrics

COUNTED = ("/v1/chat/completions", "/v1/completions")


def key_check(api_key: str | None) -> Callable[[Request], None]:
    """A dependency that raises ApiError unless the request carries the key. Every comparison takes the same time."""
    wanted = None if api_key is None else _digest(api_key.encode())

    def check(request: Request) -> None:
        if wanted is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(given.strip().encode("latin-1")), wanted):
            return
        raise ApiError(401, "no valid API key; send Authorization: Bearer KEY", code="invalid_api_key")

    return check


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class HostGuard:
    """Refuses requests whose Host header names another server.

    A page at evil.example can make its own name point to 127.0.0.1 and then talk to a server here as if it were its
    own; but the browser still says in Host which name it used.
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...]) -> None:
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._names:
            host = Headers(scope=scope).get("host", "")
            name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
            if name.lower() not in self._names:
                message = f"the Host header is {host[:80]!r}; this server answers to {', '.join(sorted(self._names))}"
                await ApiError(403, f"{message} (--allowed-host)", code="unknown_host").response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Counter:
    """Counts and times requests for answers by how they ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        status, started = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if scope["path"] in COUNTED and scope["method"] == "POST":
                outcome = state.get("outcome") or _OUTCOMES.get(status) or ("refused" if status < 500 else "failed")
                self._metrics.requests.labels(scope["path"], outcome).inc()
                self._metrics.request.observe(time.monotonic() - started)


_OUTCOMES = {200: "answered", 408: "timeout", 429: "queue_full", 503: "shutting_down"}
