"""The engine for event loops and servers. In: requests, at any time. Out: their parts as they come.

One thread steps the engine as long as there is work, and ends when there is none. Before every step it takes in what
has arrived and drops what was given up; parts travel to the event loop that asked for them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fireflyer.errors import UserError
from fireflyer.infer.outputs import StreamPart
from fireflyer.infer.request import Request
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.stats import EngineStats

if TYPE_CHECKING:
    from fireflyer.infer.llm import LLM, Prompt

_log = logging.getLogger(__name__)


class RequestParts(AsyncIterator[StreamPart]):
    """The parts of one request, until all its answers have ended. Leaving it, in any way, gives the request up."""

    def __init__(self, engine: AsyncEngine, request: Request) -> None:
        self.request = request
        self._engine = engine
        self._open = request.params.n
        self._queue: asyncio.Queue[StreamPart] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Hand the request to the engine; within a running event loop. Raises UserError."""
        self._loop = asyncio.get_running_loop()
        self._engine.submit(self)

    def __aiter__(self) -> RequestParts:
        return self

    async def __anext__(self) -> StreamPart:
        if not self._open:
            raise StopAsyncIteration
        if self._loop is None:
            self.start()
        try:
            part = await self._queue.get()
        except BaseException:
            self.close()
            raise
        if part.finish_reason is not None:
            self._open -= 1
        return part

    async def aclose(self) -> None:
        """As async generators have it: nothing more comes, and the engine is told."""
        self.close()

    def close(self) -> None:
        if self._open and self._loop is not None:
            self._engine.abort(self.request.request_id)
        self._open = 0

    def __del__(self) -> None:
        self.close()

    def deliver(self, parts: list[StreamPart]) -> None:
        """From the engine's thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._receive, parts)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.close()

    def _receive(self, parts: list[StreamPart]) -> None:
        for part in parts:
            self._queue.put_nowait(part)


class AsyncEngine:
    """One model for many event loops' tasks; `llm` may be used beside it."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        # Guards all below. Re-entrant, since a dropped request may be collected, and given up, anywhere.
        self._lock = threading.RLock()
        self._arrived: list[RequestParts] = []
        self._given_up: list[str] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._streams: dict[str, tuple[Request, weakref.ref[RequestParts]]] = {}

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        report_experts: bool = False,
    ) -> RequestParts:
        """The answers to a prompt in parts as they grow; those of n answers are told apart by their `index`.

        The request ends within one step when the iterator is closed, dropped, or its task is cancelled.

        Args:
            request_id: for `abort`; default a new one.
            cache_salt: prompts share cached latents only with others of the same salt.
            report_experts: whether parts say which experts answered.

        Raises UserError for what can't be served.
        """
        parts = RequestParts(
            self,
            self.llm.make_request(
                prompt, params, request_id=request_id, cache_salt=cache_salt, report_experts=report_experts
            ),
        )
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # called outside of any event loop: it begins with the first part that is asked for
            return parts
        parts.start()
        return parts

    def submit(self, parts: RequestParts) -> None:
        """Put a request before the next step. Raises UserError."""
        request = parts.request
        with self._lock:
            if self._closed:
                raise UserError("the engine is closed; no request is taken any more")
            if request.request_id in self._streams:
                raise UserError(f"request_id {request.request_id!r} is in use; give each request its own")
            self._streams[request.request_id] = (request, weakref.ref(parts))
            self._arrived.append(parts)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fireflyer-engine", daemon=True)
                self._thread.start()

    def abort(self, request_id: str) -> None:
        """End a request before the next step; nothing happens where there is none of this name."""
        with self._lock:
            if request_id in self._streams:
                self._given_up.append(request_id)

    def stats(self) -> EngineStats:
        return self.llm.engine.stats

    async def close(self) -> None:
        """End all requests and wait for the last step."""
        with self._lock:
            self._closed = True
            self._given_up += self._streams
            thread = self._thread
        if thread is not None:
            await asyncio.to_thread(thread.join)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._streams:
                    self._thread = None
                    return
                arrived, self._arrived = [parts.request for parts in self._arrived], []
                given_up, self._given_up = self._given_up, []
                streams = dict(self._streams)
            with self.llm.lock:
                self._step(arrived, given_up)
                # Both under the lock: a step of another thread must not come between the last part and the end.
                news = [(request, parts, request.take_parts(), request.finished) for request, parts in streams.values()]
            for request, reference, parts, ended in news:
                self._deliver(request.request_id, reference, parts, ended)

    def _step(self, arrived: list[Request], given_up: list[str]) -> None:
        engine = self.llm.engine
        for request in arrived:
            try:
                engine.add(request)
            except UserError as error:
                request.fail(str(error))
        for request_id in given_up:
            engine.abort(request_id)
        try:
            engine.step()
        except Exception:
            _log.exception("a step failed; its requests ended with an error, the others go on")

    def _deliver(
        self, request_id: str, reference: weakref.ref[RequestParts], parts: list[StreamPart], ended: bool
    ) -> None:
        # No reference outlives this call: dropping the last one elsewhere is how a request is given up.
        listener = reference()
        if listener is None:
            self.abort(request_id)
        elif parts:
            listener.deliver(parts)
        if ended:
            with self._lock:
                del self._streams[request_id]
