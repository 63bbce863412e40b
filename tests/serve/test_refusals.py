"""What is refused, with which status, in OpenAI's shape; what is let through; who may speak to the server at all."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

HI = {"messages": [{"role": "user", "content": "hi"}]}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "look"}}


def call(client: httpx.AsyncClient, method: str, path: str, **options) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def fault(response: httpx.Response, status: int = 400) -> dict:
    """The error object, which has exactly OpenAI's four keys."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (CHAT, {}, "messages", "messages is missing"),
        (CHAT, HI | {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "'wizard'"),
        (CHAT, {"messages": [{"role": "user"}]}, None, "no content"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "it is 5"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "image_url"),
        (CHAT, HI | {"temprature": 1}, "temprature", "did you mean temperature?"),
        (CHAT, HI | {"functions": []}, "functions", "give tools"),
        (CHAT, HI | {"reasoning_effort": "low"}, "reasoning_effort", "chat_template_kwargs"),
        (CHAT, HI | {"modalities": ["audio"]}, "modalities.0", "'audio'"),
        (CHAT, HI | {"temperature": "1"}, "temperature", "it is '1'"),
        (CHAT, HI | {"temperature": -1}, "temperature", "it is -1"),
        (CHAT, HI | {"top_p": 0}, "top_p", "it is 0"),
        (CHAT, HI | {"top_k": 2.5}, "top_k", "it is 2.5"),
        (CHAT, HI | {"n": 0}, "n", "it is 0"),
        (CHAT, HI | {"n": 17}, "n", "16 answers at most"),
        (CHAT, HI | {"seed": 2**64}, "seed", "it is 18446744073709551616"),
        (CHAT, HI | {"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        (CHAT, HI | {"stop": [""]}, "stop.0", "at least 1 character"),
        (CHAT, HI | {"stop": ["x"] * 33}, "stop", "at most 32"),
        (CHAT, HI | {"top_logprobs": 2}, None, "needs logprobs"),
        (CHAT, HI | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "it is 21"),
        (CHAT, HI | {"max_tokens": 2, "max_completion_tokens": 3}, None, "differ"),
        (CHAT, HI | {"tool_choice": "always"}, "tool_choice", "'always'"),
        (CHAT, HI | {"tool_choice": "required"}, None, "there are no tools"),
        (CHAT, HI | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, None, "'x'"),
        (CHAT, HI | {"tools": [TOOL, TOOL]}, None, "same name"),
        (CHAT, HI | {"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "tool_choice"),
        (CHAT, HI | {"continue_final_message": True}, None, "continue_final_message"),
        (CHAT, HI | {"chat_template_kwargs": {"messages": []}}, None, "messages"),
        (CHAT, HI | {"model": "gpt-4"}, "model", "'gpt-4'"),
        (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": [1, "x"]}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": 5}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": [5, 999]}, None, "999"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", "0 or more"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens", "it is 0"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of", "give n"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y", "echo": True}, None, "echo"),
        (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1, "n": 2}, None, "leave n at 1"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {"x": 1}}, "stream_options.x", "stream_options.x"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(make_client, engine, path, body, param, said):
    error = fault(call(make_client(), "POST", path, json=body), 404 if param == "model" else 400)
    assert said in error["message"], error
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert engine.running == 0
    assert engine.params == [], "nothing was begun"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"null", "the body"),
        (b"[]", "the body"),
        (b'{"messages": "\\ud800"}', "not JSON"),
        (b'{"messages": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "not JSON"),
        (b'{"temperature": NaN}', "temperature"),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', "temperature"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", ""),
    ],
)
def test_what_is_no_request_at_all(make_client, body, said):
    headers = {"Content-Type": "application/json"}
    error = fault(call(make_client(), "POST", CHAT, content=body, headers=headers))
    assert said in error["message"]
    assert len(error["message"]) < 400


def test_only_json_is_read_so_that_no_other_site_can_post(make_client):
    """A form or plain text is what a web page may send to any server without asking it first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": kind} if kind else {}
        fault(call(make_client(), "POST", CHAT, content=json.dumps(HI), headers=headers), 415)
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert call(make_client(), "POST", CHAT, content=json.dumps(HI), headers=headers).status_code == 200


def test_limits_of_body_prompt_and_output(make_client, engine):
    long = HI | {"messages": [{"role": "user", "content": "x" * 5_000}]}
    error = fault(call(make_client(max_body_bytes=2_000), "POST", CHAT, json=long))
    assert error["code"] == "body_too_long"
    assert "2000 bytes" in error["message"]
    for path, body in ((CHAT, long), (COMPLETIONS, {"prompt": "x" * 5_000}), (COMPLETIONS, {"prompt": [5] * 400})):
        error = fault(call(make_client(), "POST", path, json=body))
        assert error["code"] == "context_length_exceeded"
        assert f"{engine.llm.max_length} tokens" in error["message"], "with the numbers"
    assert "the prompt has 400" in error["message"]
    error = fault(call(make_client(max_output_tokens=5), "POST", CHAT, json=HI | {"max_tokens": 6}))
    assert (error["code"], error["param"]) == ("max_tokens_too_large", "max_tokens")
    assert engine.params == []
    call(make_client(max_output_tokens=5), "POST", CHAT, json=HI)
    assert engine.params[0].max_tokens == 5
    error = fault(call(make_client(max_queue=0), "POST", COMPLETIONS, json={"prompt": ["a"] * 5}))
    assert error["code"] == "too_many_answers"


def test_a_long_body_is_refused_before_it_has_arrived(make_client):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000

    headers = {"Content-Type": "application/json"}
    fault(call(make_client(max_body_bytes=10_000), "POST", CHAT, content=endless(), headers=headers))
    assert sent < 20_000


def test_harmless_fields_are_accepted(make_client):
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "prediction": {"type": "content", "content": "x"},
        "response_format": {"type": "text"},
        "audio": None,
        "stream_options": None,
    }
    for name, value in harmless.items():
        response = call(make_client(), "POST", CHAT, json=HI | {name: value})
        assert response.status_code == 200, (name, response.text)


def test_paths_and_methods(make_client):
    error = fault(call(make_client(), "POST", "/v1/embeddings", json={}), 404)
    assert "/v1/embeddings" in error["message"]
    fault(call(make_client(), "GET", CHAT), 404)
    fault(call(make_client(), "DELETE", "/v1/models"), 404)


def test_the_key_guards_the_api_and_nothing_else(make_client):
    def status(path: str, key: str | None) -> int:
        headers = {} if key is None else {"Authorization": key}
        return call(make_client(api_key="secret"), "GET", path, headers=headers).status_code

    for key in (None, "secret", "Bearer", "Bearer wrong", "Bearer secretx", "Bearer ", "Basic secret", "Bearer Secret"):
        assert status("/v1/models", key) == 401, key
    assert status("/v1/models", "Bearer secret") == 200
    assert status("/v1/models", "bearer secret") == 200
    for path in ("/health", "/metrics"):
        assert status(path, None) == 200
    error = fault(call(make_client(api_key="secret"), "POST", CHAT, json=HI), 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert "secret" not in error["message"]
    headers = {"Authorization": "Bearer schlüssel 漢".encode()}
    assert call(make_client(api_key="schlüssel 漢"), "GET", "/v1/models", headers=headers).status_code == 200


def test_every_api_path_asks_for_the_key(make_client):
    """Found in the description, so that a new endpoint can't be forgotten."""
    paths = call(make_client(), "GET", "/openapi.json").json()["paths"]
    guarded = {path for path in paths if path.startswith("/v1") or "token" in path}
    assert len(guarded) >= 6
    for path in guarded:
        for method in paths[path]:
            response = call(make_client(api_key="k"), method.upper(), path.replace("{name}", "tiny"), json={})
            assert response.status_code == 401, (path, response.text)


def test_a_foreign_host_name_is_refused(make_client):
    """DNS rebinding: the browser believes it talks to evil.example, and says so."""
    names = ("localhost", "127.0.0.1", "::1", "[::1]")

    def status(host: str) -> int:
        client = make_client(allowed_hosts=names)
        return call(client, "GET", "/v1/models", headers={"Host": host}).status_code

    for host in ("localhost", "localhost:8000", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert status(host) == 200, host
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io:8000", ""):
        assert status(host) == 403, host


def test_no_page_of_another_site_may_read_answers_unless_named(make_client):
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for settings, allowed in (({}, None), ({"allowed_origins": ("https://a.example",)}, "https://a.example")):
        response = call(make_client(**settings), "OPTIONS", CHAT, headers=asking)
        assert response.headers.get("access-control-allow-origin") == allowed
        response = call(make_client(**settings), "GET", "/v1/models", headers={"Origin": "https://a.example"})
        assert response.headers.get("access-control-allow-origin") == allowed
        other = call(make_client(**settings), "GET", "/v1/models", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_bug_of_ours_tells_nothing_and_the_server_goes_on(make_client, engine, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("secrets")

    monkeypatch.setattr(engine, "generate", broken)
    for stream in (False, True):
        error = fault(call(make_client(), "POST", CHAT, json=HI | {"stream": stream}), 500)
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert "secrets" not in error["message"]
    monkeypatch.undo()
    assert call(make_client(), "POST", CHAT, json=HI).status_code == 200
