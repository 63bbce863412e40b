"""A server that says what a test wants the page to show: OpenAI's streams with Fireflyer's extras, no model behind."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fireflyer.serve.page_files import PageFiles

LAYERS, EXPERTS, CHOSEN = 3, 16, 2


@dataclass
class Script:
    """One answer: pieces of a token each. `status` other than 200: an error with `content` as its message.
    `cut_after`: so many pieces, and the connection breaks. `done`: whether the stream says that it ends."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    status: int = 200
    retry_after: int | None = None
    pause_s: float = 0.0
    cut_after: int | None = None
    finish: str = "stop"
    done: bool = True


@dataclass
class ScriptedServer:
    """What the page is told, by the reader's last message, and what it asked for."""

    url: str = ""
    scripts: dict[str, Script] = field(default_factory=dict)
    taught_to_chat: bool = True
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    left: int = 0

    def app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None)
        app.get("/ready")(lambda: {"status": "ready"})
        app.get("/v1/models")(self._models)
        app.post("/v1/chat/completions")(self._answer)
        app.post("/v1/completions")(self._answer)
        app.mount("/", PageFiles())
        return app

    def _models(self, request: Request) -> Response:
        if self._refuses(request):
            return _error(401, "no valid API key")
        extras = {"taught_to_chat": self.taught_to_chat, "num_experts": EXPERTS}
        card = {"id": "spark", "object": "model", "max_model_len": 4096, "fireflyer": extras}
        return JSONResponse({"object": "list", "data": [card]})

    def _refuses(self, request: Request) -> bool:
        return self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}"

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        if self._refuses(request):
            return _error(401, "no valid API key")
        self.bodies.append(body)
        asked = (
            body["prompt"]
            if "prompt" in body
            else next(
                message["content"] for message in reversed(body["messages"]) if message["role"] in ("user", "tool")
            )
        )
        script = self.scripts.get(asked, Script(content=f"You said: {asked}"))
        if script.status != 200:
            return _error(script.status, script.content, script.retry_after)
        return StreamingResponse(self._events(script, body), media_type="text/event-stream")

    async def _events(self, script: Script, body: dict[str, Any]) -> AsyncIterator[str]:
        self.running += 1
        plain = "prompt" in body
        begun = time.monotonic()
        sent, ended = 0, False
        try:
            for kind, piece in _pieces(script):
                if sent == script.cut_after:
                    raise ConnectionError("the test wants the connection cut")
                await asyncio.sleep(script.pause_s)
                choice = {"index": 0, "text": piece} if plain else {"index": 0, "delta": _delta(kind, piece)}
                yield _event(choices=[choice], fireflyer=_extras(sent, piece, body))
                sent += 1
            finish = "tool_calls" if script.calls else script.finish
            yield _event(choices=[{"index": 0, "delta": {}, "text": "", "finish_reason": finish}])
            speed = sent / (time.monotonic() - begun + 1e-9)
            yield _event(choices=[], usage={"prompt_tokens": 9}, fireflyer={"acceptance": 0.875, "tokens_per_s": speed})
            ended = True
            if script.done:
                yield "data: [DONE]\n\n"
        finally:
            self.running -= 1
            self.left += not ended


def _pieces(script: Script) -> Iterator[tuple[str, Any]]:
    for kind, text in (("reasoning_content", script.reasoning), ("content", script.content)):
        for start in range(0, len(text), 4):
            yield kind, text[start : start + 4]
    for index, (name, arguments) in enumerate(script.calls):
        call = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        yield "tool_calls", [call]
        for start in range(0, len(arguments), 4):
            yield "tool_calls", [{"index": index, "function": {"arguments": arguments[start : start + 4]}}]


def _delta(kind: str, piece: Any) -> dict[str, Any]:
    return {kind: piece}


def _extras(place: int, piece: Any, body: dict[str, Any]) -> dict[str, Any]:
    token = piece if isinstance(piece, str) else json.dumps(piece)
    extras: dict[str, Any] = {"token_ids": [place], "tokens": [token], "drafted": [place % 2 == 1]}
    if body["fireflyer"]["experts"]:
        chosen = [[(place * 5 + layer * 3 + k * 7) % EXPERTS for k in range(CHOSEN)] for layer in range(LAYERS)]
        extras["experts"] = [chosen]
    return extras


def _event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def _error(status: int, message: str, retry_after: int | None = None) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse({"error": {"message": message, "type": "", "param": None, "code": None}}, status, headers)


@contextmanager
def serving(scripted: ScriptedServer, port: int = 0) -> Iterator[ScriptedServer]:
    """Serve in a thread while entered."""
    server = uvicorn.Server(uvicorn.Config(scripted.app(), port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    scripted.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
