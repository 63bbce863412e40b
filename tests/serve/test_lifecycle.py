"""Requests come, wait, are given up; the server warms up, hangs, drains. Every step of the engine is the test's."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from asgi_client import Connection
from fastapi import FastAPI

from fireflyer.infer.model_runner import ModelRunner
from fireflyer.serve.app import create_app
from fireflyer.serve.readiness import Readiness
from fireflyer.serve.settings import ServeSettings

BODY = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


async def until(condition: Callable[[], Any], seconds: float = 5) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), seconds)


def app_of(engine, **settings) -> FastAPI:
    return create_app(engine, ServeSettings(**{"served_model_name": "tiny", **settings}))


def metric(app: FastAPI, name: str) -> float:
    for line in app.state.service.metrics.text().decode().splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    return 0.0


def outcomes(app: FastAPI, outcome: str) -> float:
    return metric(app, f'fireflyer_requests_total{{endpoint="{CHAT}",outcome="{outcome}"}}')


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_worked_for_no_longer(engine, stream):
    """Whole answer or stream: the engine's iterator is closed, and the place is free again."""

    async def test() -> None:
        engine.hold = asyncio.Event()
        app = app_of(engine, max_queue=0)
        client = Connection(app, CHAT, BODY | {"stream": stream, "n": 2})
        await until(lambda: engine.running)
        client.gone.set()
        await asyncio.wait_for(client.task, 5)
        assert engine.running == 0
        assert engine.steps == 0
        assert outcomes(app, "client_gone") == 1
        assert await app.state.service.admission.drain(0.1)
        assert "[DONE]" not in client.text

    run(test)


def test_hanging_up_before_the_answer_began_is_seen_too(engine):
    async def test() -> None:
        app = app_of(engine)
        client = Connection(app, CHAT, BODY)
        client.gone.set()
        await asyncio.wait_for(client.task, 5)
        await until(lambda: engine.running == 0)
        assert await app.state.service.admission.drain(0.1)

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_only_so_much_time(engine, stream):
    async def test() -> None:
        engine.hold = asyncio.Event()
        app = app_of(engine, request_timeout_s=1)
        client = Connection(app, CHAT, BODY | {"stream": stream})
        await asyncio.wait_for(client.task, 5)
        assert engine.running == 0
        assert outcomes(app, "timeout") == 1
        assert '"code":' in client.text
        assert "--request-timeout" in client.text
        assert client.status == (200 if stream else 408)
        assert "[DONE]" not in client.text

    run(test)


def test_a_full_queue_is_429_with_a_time_to_come_back(engine):
    """The engine runs 4, and 1 may wait: the sixth is told to come back, and may when one has ended."""

    async def test() -> None:
        engine.hold = asyncio.Event()
        app = app_of(engine, max_queue=1)
        inside = [Connection(app, CHAT, BODY) for _ in range(5)]
        await until(lambda: engine.running == 5)
        for extra in ({}, {"stream": True}):
            refused = Connection(app, CHAT, BODY | extra)
            await asyncio.wait_for(refused.task, 5)
            assert refused.status == 429
            assert json.loads(refused.text)["error"]["code"] == "queue_full"
            headers = dict(refused.sent[0]["headers"])
            assert 1 <= int(headers[b"retry-after"]) <= 60
        assert outcomes(app, "queue_full") == 2
        engine.hold.set()
        await asyncio.gather(*(client.task for client in inside))
        assert {client.status for client in inside} == {200}
        again = Connection(app, CHAT, BODY)
        await asyncio.wait_for(again.task, 5)
        assert again.status == 200

    run(test)


def test_each_answer_asked_for_takes_a_place(engine):
    async def test() -> None:
        engine.hold = asyncio.Event()
        app = app_of(engine, max_queue=1)
        inside = Connection(app, CHAT, BODY | {"n": 4})
        await until(lambda: engine.running)
        refused = Connection(app, CHAT, BODY | {"n": 2})
        await asyncio.wait_for(refused.task, 5)
        assert refused.status == 429
        engine.hold.set()
        await inside.task

    run(test)


@pytest.mark.parametrize(("bad", "begun"), [(999, 0), (998, 2)])
def test_one_bad_prompt_of_many_begins_none(engine, bad, begun):
    """The engine refuses the third before any has begun, or when its turn comes: then all are closed."""

    async def test() -> None:
        app = app_of(engine)
        client = Connection(app, "/v1/completions", {"prompt": [[5], [6], [bad]]})
        await asyncio.wait_for(client.task, 5)
        assert client.status == 400
        assert len(engine.prompts) == begun
        assert engine.closed >= begun
        assert await app.state.service.admission.drain(0.1)

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_in_the_engine_is_an_error_and_no_answer(engine, stream):
    async def test() -> None:
        engine.failure = "the model's logits are not finite"
        app = app_of(engine)
        client = Connection(app, CHAT, BODY | {"stream": stream})
        await asyncio.wait_for(client.task, 5)
        assert client.status == (200 if stream else 500)
        last = client.text.strip().rpartition("data: ")[2]
        error = json.loads(last)["error"]
        assert error["message"] == engine.failure
        assert (error["type"], error["code"]) == ("server_error", "generation_failed")
        assert outcomes(app, "generation_failed" if stream else "failed") == 1

    run(test)


async def ready(app: FastAPI) -> tuple[int, str]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        health = await client.get("/health")
        assert health.status_code == 200, "alive whatever the engine does"
        response = await client.get("/ready")
        return response.status_code, response.json()["status"]


def test_ready_after_the_first_steps_and_while_steps_end(engine):
    async def test() -> None:
        engine.hold = asyncio.Event()
        app = app_of(engine, step_timeout_s=1)
        async with app.router.lifespan_context(app):
            await until(lambda: engine.running)
            assert await ready(app) == (503, "warming up")
            engine.hold.set()
            await until(lambda: app.state.service.readiness.warm)
            assert await ready(app) == (200, "ready")

            engine.hold = asyncio.Event()  # a step that hangs
            client = Connection(app, CHAT, BODY)
            await until(lambda: engine.running)
            assert (await ready(app))[0] == 200, "not at once: steps may take a while"
            await asyncio.sleep(1.2)
            status, why = await ready(app)
            assert (status, why) == (503, "no step has ended for 1 s")
            engine.hold.set()
            await client.task
            assert (await ready(app))[0] == 200

    run(test)


def test_a_first_step_that_fails_is_told(engine):
    async def test() -> None:
        engine.failure = "the model's logits are not finite"
        app = app_of(engine)
        async with app.router.lifespan_context(app):
            await until(lambda: app.state.service.readiness.failure)
            assert await ready(app) == (503, engine.failure)

    run(test)


def test_idle_for_long_is_not_stuck(monkeypatch):
    """Only work counts: an hour without requests, then the first one has the whole time for its first step."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    state = {"steps": 0, "busy": False}
    readiness = Readiness(lambda: (state["steps"], state["busy"]), step_timeout_s=10)
    readiness.warm = True
    now[0] = 3600
    assert readiness.trouble() is None
    state["busy"] = True
    now[0] = 3609
    assert readiness.trouble() is None
    now[0] = 3611
    assert readiness.trouble() == "no step has ended for 11 s"
    state["steps"] = 1
    assert readiness.trouble() is None


def test_draining_lets_those_inside_finish_and_nobody_in(engine):
    async def test() -> None:
        engine.hold = asyncio.Event()
        app = app_of(engine)
        inside = Connection(app, CHAT, BODY | {"stream": True})
        await until(lambda: engine.running)
        draining = asyncio.ensure_future(app.state.service.admission.drain(5))
        await asyncio.sleep(0)
        late = Connection(app, CHAT, BODY)
        await late.task
        assert late.status == 503
        assert json.loads(late.text)["error"]["code"] == "shutting_down"
        app.state.service.readiness.warm = True
        assert await ready(app) == (503, "shutting down")
        assert not draining.done()
        engine.hold.set()
        assert await draining
        await inside.task
        assert inside.text.endswith("data: [DONE]\n\n")

    run(test)


def test_draining_ends_when_the_time_is_up(engine):
    async def test() -> None:
        engine.hold = asyncio.Event()
        app = app_of(engine)
        inside = Connection(app, CHAT, BODY)
        await until(lambda: engine.running)
        assert not await app.state.service.admission.drain(0.05)
        inside.gone.set()
        await inside.task

    run(test)


def test_metrics_count_and_time(engine, tokenizer):
    async def test() -> None:
        app = app_of(engine)
        await Connection(app, CHAT, BODY).task
        await Connection(app, CHAT, BODY | {"stream": True}).task
        await Connection(app, CHAT, BODY | {"n": 0}).task
        num_tokens = len(tokenizer.encode(engine.text)) + 1
        assert outcomes(app, "answered") == 2
        assert outcomes(app, "refused") == 1
        assert metric(app, "fireflyer_time_to_first_token_seconds_count") == 2
        assert metric(app, "fireflyer_inter_token_seconds_count") == 2 * (num_tokens - 1)
        assert metric(app, "fireflyer_request_seconds_count") == 3
        assert metric(app, 'fireflyer_cache_blocks{state="free"}') == 5
        assert metric(app, "fireflyer_accepted_tokens_total") == 8
        assert metric(app, "fireflyer_preemptions_total") == 9
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        names = {line.split()[2] for line in response.text.splitlines() if line.startswith("# TYPE")}
        assert {
            "fireflyer_answers_running",
            "fireflyer_drafted_tokens_total",
            "fireflyer_prefix_hit_tokens_total",
        } <= names

    run(test)


def test_prompts_are_nowhere_in_the_log(engine, caplog):
    async def test() -> None:
        body = {"messages": [{"role": "user", "content": "my secret"}], "n": 0}
        await Connection(app_of(engine), CHAT, body).task
        await Connection(app_of(engine), CHAT, body | {"n": 1}).task

    with caplog.at_level(logging.DEBUG, logger="fireflyer"):
        run(test)
    assert "secret" not in caplog.text


def test_a_step_of_the_real_engine_that_hangs(real_engine, monkeypatch):
    """The event loop stays free while the engine's thread is stuck, also for requests that need its lock."""
    going = threading.Event()
    going.set()
    trunk = ModelRunner.trunk

    def stuck(*arguments):
        assert going.wait(30)
        return trunk(*arguments)

    monkeypatch.setattr(ModelRunner, "trunk", stuck)

    async def test() -> None:
        app = app_of(real_engine, step_timeout_s=1)
        async with app.router.lifespan_context(app):
            await until(lambda: app.state.service.readiness.warm)
            going.clear()
            shape = {"response_format": {"type": "json_object"}}
            clients = [Connection(app, CHAT, BODY | {"max_tokens": 2} | extra) for extra in ({}, shape)]
            await asyncio.sleep(1.5)
            assert (await ready(app))[0] == 503
            going.set()
            await asyncio.gather(*(client.task for client in clients))
            assert [client.status for client in clients] == [200, 200]
            assert (await ready(app))[0] == 200

    run(test)
