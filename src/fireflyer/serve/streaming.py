"""One request as an exchange of bytes. In: a body, within its limits. Out: one JSON object, or server-sent events.

While the answer is made, the connection is watched: when the client goes or the time is up, the work is cancelled,
whole answer or stream alike, and with it what the engine does for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from fireflyer.serve.errors import ApiError, as_api_error, refusal

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

_BODY_SECONDS = 60
"""A client that has not sent its body by then is not going to."""

_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def read_body(request: Request, model: type[B], max_bytes: int) -> B:
    """The body as `model`. Raises ApiError.

    Only application/json is read: a web page of another site can send that solely after asking, which we deny.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body's Content-Type is {kind[:80]!r}; send application/json", code="unsupported_type")
    try:
        body = await asyncio.wait_for(_bytes(request, max_bytes), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS} s", code="timeout") from None
    except ClientDisconnect:
        raise ClientGone from None
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error, model) from None


async def _bytes(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(
                400, f"the body is longer than this server's limit of {max_bytes} bytes", code="body_too_long"
            )
    return bytes(body)


class Whole(Response):
    """A JSON object that takes a while."""

    def __init__(self, work: Coroutine[Any, Any, BaseModel], timeout_s: float) -> None:
        super().__init__()
        self._work, self._timeout_s = work, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            result = await _while_connected(receive, self._work, self._timeout_s)
        except ClientGone:
            scope["state"]["outcome"] = "client_gone"
            return
        except Exception as error:
            raise as_api_error(error) from error
        text = result.model_dump_json(exclude_unset=True)
        await Response(text, media_type="application/json")(scope, receive, send)


class EventStream(Response):
    """Server-sent events: one JSON object each, then [DONE].

    Nothing is sent before the first event: until then an error is an ordinary answer with its own status. After it, an
    error is an event of its own, and no [DONE] follows.
    """

    def __init__(self, events: AsyncGenerator[BaseModel, None], timeout_s: float) -> None:
        super().__init__()
        self._events, self._timeout_s = events, timeout_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _while_connected(receive, self._pump(scope, receive, send), self._timeout_s)
        except ClientGone:
            scope["state"]["outcome"] = "client_gone"
        except Exception as error:
            failure = as_api_error(error)
            if not self._started:
                raise failure from error
            scope["state"]["outcome"] = failure.code
            await _send(send, f"data: {json.dumps(failure.body)}\n\n", more=False)

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                if not self._started:
                    response = Response(media_type="text/event-stream", headers=_EVENT_HEADERS)
                    headers = [(k, v) for k, v in response.raw_headers if k != b"content-length"]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    self._started = True
                await _send(send, f"data: {event.model_dump_json(exclude_unset=True)}\n\n", more=True)
        await _send(send, "data: [DONE]\n\n", more=False)


async def _send(send: Send, text: str, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of `work`, which is cancelled when the client goes or the time is up. Raises ClientGone, ApiError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        message = f"the answer took longer than this server's limit of {timeout_s:g} s (--request-timeout)"
        raise ApiError(408, message, code="timeout")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
