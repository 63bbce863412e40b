"""A client of an ASGI application in this process, one connection a request. Unlike httpx's it can hang up."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import FastAPI


class Connection:
    """One client's connection to an application: what was sent to it, and a way to hang up."""

    def __init__(self, app: FastAPI, path: str, body: Any) -> None:
        """`body` is sent as JSON, bytes as they are."""
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self._body: bytes | None = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = [(b"host", b"server"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()
