"""A process that serves: one listening socket, signals, an orderly end. In: an application. Out: when it has ended.

The first SIGTERM or Ctrl-C lets nobody in any more (503) and waits for those inside; the second ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fireflyer.infer.async_engine import AsyncEngine
from fireflyer.serve.service import Service

_log = logging.getLogger("fireflyer.serve")

_CLOSING_S = 5
"""After the drain: for connections to take the last bytes, and for the engine to end its step."""


def serve(app: FastAPI, engine: AsyncEngine, on_started: Callable[[], None], sock: socket.socket) -> None:
    """Answer on `sock` until a signal, then finish what is running, within settings.drain_s."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=65,
        timeout_graceful_shutdown=_CLOSING_S,
    )
    _Server(config, engine, app.state.service, on_started).run([sock])


class _Server(uvicorn.Server):
    """uvicorn, with an end of our own."""

    def __init__(
        self, config: uvicorn.Config, engine: AsyncEngine, service: Service, on_started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine, self._service, self._on_started = engine, service, on_started
        self._asked = False
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def on_tick(self, counter: int) -> bool:
        if self._asked and self._drain is None:
            self._drain = asyncio.create_task(self._end())
        return await super().on_tick(counter)

    async def _end(self) -> None:
        drain_s = self._service.settings.drain_s
        if not await self._service.admission.drain(drain_s):
            _log.warning("answers were still being written after %g s and are cut", drain_s)
        try:
            await asyncio.wait_for(self._engine.close(), _CLOSING_S)
        except asyncio.TimeoutError:
            _log.warning("the engine's step did not end within %g s", _CLOSING_S)
            os._exit(0)  # its thread would keep the process alive
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(130)
        self._asked = True
