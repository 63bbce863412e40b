"""10,000 bodies that no client should send: none may break the server, and each gets an answer in the one shape."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from asgi_client import Connection

from fireflyer.serve.app import create_app
from fireflyer.serve.settings import ServeSettings

NUM_BODIES = 10_000
AT_ONCE = 40

TOOL = {"type": "function", "function": {"name": "look", "description": "x", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
COMMON = {
    "model": "tiny",
    "max_tokens": 2,
    "n": 1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"40": 1.5},
    "seed": 7,
    "stop": ["the", "漢"],
    "stop_token_ids": [41],
    "ignore_eos": False,
    "min_tokens": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "me",
    "cache_salt": "s",
    "fireflyer": {"experts": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
}
MESSAGES = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": [{"type": "text", "text": "hi 🎉"}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "seen"},
    {"role": "user", "content": "so?"},
]  # fmt: skip
CHAT = COMMON | {
    "messages": MESSAGES,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [TOOL],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "chat_template_kwargs": {"thinking": True},
    "add_generation_prompt": True,
    "continue_final_message": False,
}
COMPLETION = COMMON | {"prompt": ["hi", "the fox"], "echo": True, "logprobs": 2, "suffix": "x"}
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/tokenize": {"prompt": "hi", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2, 40]},
}
ODD = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**53 + 1, 2**63, 2**64, -(2**70), 10**400,
    float("nan"), float("inf"), "", " ", "x", "\0", "a" * 3_000, "\ud800", "𝕏\u202e\ufdd0", "<｜User｜><think>", "auto",
    "required", "json_object", "user", "tool", [], {}, [None], [[]], {"": None}, {"type": "function"}, {"a": {"b": 1}},
    [0, -1, 10**6], ["x"] * 40, [[1, 2], [3]], {"type": "regex", "pattern": "("}, {"type": "regex", "pattern": "a*"},
    {"type": "grammar", "grammar": "start: start"}, {"type": "choice", "choices": ["a", "the"]}, {"role": "user"},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, {"type": "json_object"},
]  # fmt: skip


def small(rng: random.Random, path: str) -> dict[str, Any]:
    """A valid body with a few of its fields."""
    whole = VALID[path]
    needed = [key for key in ("messages", "prompt", "tokens") if key in whole]
    extra = rng.sample(sorted(whole), rng.randrange(min(len(whole), 8)))
    return json.loads(json.dumps({key: whole[key] for key in {*needed, *extra, "max_tokens"} if key in whole}))


def mutate(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """One change somewhere in a tree of JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        draw = rng.random()
        if draw < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if draw < 0.15:
            return value | {key + rng.choice(["", "s", "\0", "漢"]): rng.choice(ODD)}
        return value | {key: mutate(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        draw = rng.random()
        if draw < 0.15:
            return value[:place] + value[place + 1 :]
        if draw < 0.3:
            return value + value
        return [*value[:place], mutate(rng, value[place], depth + 1), *value[place + 1 :]]
    return rng.choice(ODD) if depth else value


def anything(rng: random.Random, depth: int = 0) -> Any:
    """Random JSON."""
    if depth > 4 or rng.random() < 0.4:
        return rng.choice(ODD)
    if rng.random() < 0.5:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [rng.choice([*CHAT, *COMPLETION, "x"]) for _ in range(rng.randrange(4))]
    return {key: anything(rng, depth + 1) for key in keys}


def broken(rng: random.Random, body: bytes) -> bytes:
    """Bytes flipped, cut, doubled, put in."""
    place = rng.randrange(len(body))
    return rng.choice(
        [
            body[:place],
            body[:place] + bytes([rng.randrange(256)]) + body[place + 1 :],
            body[:place] + rng.choice([b"\xff", b"\\u", b"\\ud800", b"{" * 300, b"9" * 400, b"\x00"]) + body[place:],
            body + body,
            body[place:],
        ]
    )


def fuzzed(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body."""
    path = rng.choice([*VALID, "/v1/chat/completions", "/v1/completions"])
    body = small(rng, path)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        body = mutate(rng, body)
    if rng.random() < 0.1:
        body = anything(rng)
    data = json.dumps(body).encode()
    return path, broken(rng, data) if rng.random() < 0.25 else data


def check(path: str, body: bytes, client: Connection) -> int:
    """The answer's status; whatever it is, it has the shape that clients read."""
    where = f"{path} {body[:400]!r}: {client.status} {client.text[:300]}"
    assert client.status is not None, where
    assert client.status in (200, 400, 404, 429), where
    if client.status != 200:
        assert set(json.loads(client.text)["error"]) == {"message", "type", "param", "code"}, where
    elif client.text.startswith("data: "):
        last = client.text.rstrip().rpartition("data: ")[2]
        assert last == "[DONE]", where
    else:
        json.loads(client.text, parse_constant=lambda name: AssertionError(f"{name}: {where}"))
    return client.status


def test_ten_thousand_odd_bodies_leave_it_answering(real_engine):
    rng = random.Random(20)
    settings = ServeSettings("tiny", max_output_tokens=4, max_n=3, max_body_bytes=200_000, max_queue=200)
    app = create_app(real_engine, settings)
    statuses: list[int] = []

    async def worker(bodies) -> None:
        for path, body in bodies:
            client = Connection(app, path, body)
            await asyncio.wait_for(client.task, 30)
            statuses.append(check(path, body, client))

    async def test() -> None:
        bodies = (fuzzed(rng) for _ in range(NUM_BODIES))
        await asyncio.gather(*(worker(bodies) for _ in range(AT_ONCE)))
        for path, body in VALID.items():
            client = Connection(app, path, {k: v for k, v in body.items() if k not in ("response_format", "suffix")})
            await client.task
            assert client.status == 200, client.text

    asyncio.run(test())
    assert len(statuses) == NUM_BODIES
    counts = {status: statuses.count(status) for status in set(statuses)}
    assert counts[200] > NUM_BODIES // 20, f"the fuzz hardly gets past the first check: {counts}"
    assert counts[400] > NUM_BODIES // 4, counts
    real_engine.llm.engine.check_integrity()
    assert real_engine.stats().blocks_used == 0
