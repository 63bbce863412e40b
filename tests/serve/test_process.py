"""A real `fireflyer serve` process and the `openai` client; its start, its signals, its end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
from served import Served

from fireflyer.cli.main import main

USER = [{"role": "user", "content": "the quick"}]
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["fox", "dog"]}},
    "required": ["size", "kind"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("look", "chase")]


@pytest.fixture(scope="module")
def server(checkpoint):
    with Served(checkpoint, "--served-model-name", "tiny", FIREFLYER_API_KEY="k") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def thoughtless(tokenizer) -> dict[str, int]:
    """A bias against thinking, to which a model of random weights finds no end."""
    return {str(tokenizer.special_id("<think>")): -100}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fireflyer"


def test_chat_and_its_stream(client, tokenizer):
    asked = {"model": "tiny", "messages": USER, "max_tokens": 24, "seed": 3}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    again = client.chat.completions.create(**asked)
    assert again.usage.prompt_tokens_details.cached_tokens >= 0
    assert again.choices[0].message.content == text


def test_stop_strings_and_n(client):
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 60, "temperature": 0}
    (whole,) = client.completions.create(**asked).choices
    stop = whole.text[10:13]
    (cut,) = client.completions.create(**asked, stop=[stop]).choices
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    many = client.chat.completions.create(model="tiny", messages=USER, n=3, seed=1, max_tokens=20).choices
    assert [choice.index for choice in many] == [0, 1, 2]
    assert len({choice.message.content for choice in many}) > 1


def test_logprobs_are_those_of_the_model(client, model, tokenizer):
    """The oracle is a plain forward over prompt and answer."""
    import torch

    answer = client.completions.create(
        model="tiny", prompt="the quick brown", max_tokens=8, echo=True, logprobs=2, temperature=1, seed=5
    )
    found = answer.choices[0].logprobs
    ids = [tokenizer.bos_id, *tokenizer.encode("the quick brown")]
    names = [tokenizer.token_text(token) for token in ids]
    assert found.tokens[: len(ids)] == names
    told = answer.choices[0].logprobs.token_logprobs
    assert told[0] is None
    written = client.completions.create(
        model="tiny", prompt=ids, max_tokens=8, temperature=1, seed=5, extra_body={"fireflyer": {}}
    )
    ids += written.choices[0].model_extra["fireflyer"]["token_ids"]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logprobs[place, token].item() for place, token in enumerate(ids[1:])]
    assert told[1:] == pytest.approx(expected, abs=1e-4)
    best = logprobs[0, : tokenizer.vocab_size].max().item()
    assert max(found.top_logprobs[1].values()) == pytest.approx(best, abs=1e-4)
    chat = client.chat.completions.create(model="tiny", messages=USER, max_tokens=4, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.logprob <= entry.top_logprobs[0].logprob + 1e-6 for entry in content)


def test_json_schema(client, thoughtless):
    shape = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="tiny",
            messages=USER,
            response_format=shape,
            seed=2,
            max_tokens=300,
            logit_bias=thoughtless,
            stream=stream,
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        value = json.loads(text)
        assert set(value) == {"size", "kind"}
        assert 0 <= value["size"] <= 99


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "chase"}}])
def test_tools(client, choice, thoughtless):
    asked = {"model": "tiny", "messages": USER, "tools": TOOLS, "tool_choice": choice, "seed": 4, "max_tokens": 350}
    asked |= {"logit_bias": thoughtless, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    for call in whole.message.tool_calls:
        assert call.function.name in ("look", "chase") if choice == "required" else call.function.name == "chase"
        assert set(json.loads(call.function.arguments)) == {"size", "kind"}
    arguments: dict[int, str] = {}
    names: dict[int, str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            names.setdefault(call.index, call.function.name)
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        reason = chunk.choices[0].finish_reason
    assert reason == "tool_calls"
    assert list(names.values()) == [call.function.name for call in whole.message.tool_calls]
    assert list(arguments.values()) == [call.function.arguments for call in whole.message.tool_calls]


def test_errors_are_the_clients_own(client, server):
    with pytest.raises(openai.BadRequestError, match="temprature"):
        client.chat.completions.create(model="tiny", messages=USER, extra_body={"temprature": 1})
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=USER)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "the " * 1500}])
    assert caught.value.code == "context_length_exceeded"
    assert "1024 tokens" in caught.value.message
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_full_context_ends_with_length(client):
    answer = client.completions.create(model="tiny", prompt=[5] * 1000, max_tokens=100, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 1024
    assert answer.choices[0].finish_reason == "length"


def test_metrics_and_the_page(server, client):
    client.chat.completions.create(model="tiny", messages=USER, max_tokens=30, temperature=0)
    text = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["fireflyer_generated_tokens_total"]) > 30
    assert float(values["fireflyer_drafted_tokens_total"]) > 0
    assert float(values["fireflyer_answers_running"]) == 0
    assert float(values["fireflyer_steps_total"]) > 0
    response = httpx.get(f"{server.url}/", headers={"Host": "evil.example"})
    assert response.status_code == 403


def test_a_port_in_use_is_one_line(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(checkpoint), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port 70000"),
        (["--host", "no.such.host.invalid"], "no such host"),
        (["--max-queue", "-1"], "--max-queue is -1"),
        (["--api-key", ""], "API key is empty"),
        (["--request-timeout", "nan"], "--request-timeout is nan"),
        (["--max-length", "9000"], "max_length is 9000"),
    ],
)
def test_mistakes_are_one_line(checkpoint, capsys, arguments, said):
    assert main(["serve", str(checkpoint), *(["--port", "0"] if "--port" not in arguments else []), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_help_is_light():
    code = (
        "import sys; from fireflyer.cli.main import main; main(['serve', '--help']);"
        "assert not {'torch', 'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--max-queue" in out


def test_without_the_extra_the_line_to_type_is_told(checkpoint, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fireflyer.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(checkpoint)]) == 2
    assert "pip install 'fireflyer[serve]'" in capsys.readouterr().err


def test_sigterm_lets_the_running_answer_finish(checkpoint):
    """Those inside finish, late ones are told 503, the exit code is 0. Open to all without a key: a warning."""
    with Served(checkpoint, "--host", "0.0.0.0", "--drain", "60") as served:
        assert "warning: 0.0.0.0 can be reached from outside" in served.log
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        body = {"messages": USER, "stream": True, "max_tokens": 400, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            late = None
            while late is None or late.status_code == 200:
                late = httpx.post(f"{url}/v1/completions", json={"prompt": "the", "max_tokens": 1}, timeout=60)
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "shutting_down"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert served.process.wait(timeout=60) == 0


def test_a_second_signal_ends_it_at_once(checkpoint):
    with Served(checkpoint) as served:
        body = {"messages": USER, "stream": True, "ignore_eos": True, "max_tokens": 500}
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
            served.process.send_signal(signal.SIGINT)
            served.process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            assert served.process.wait(timeout=30) == 130
            assert time.monotonic() - started < 5


def test_a_client_that_goes_is_worked_for_no_longer(server, client):
    """Over a real connection, whole answer and stream: what runs falls back to nothing long before the answer's end."""

    def running() -> float:
        text = httpx.get(f"{server.url}/metrics").text
        return float(text.partition("\nfireflyer_answers_running ")[2].partition("\n")[0])

    body = {"messages": USER, "ignore_eos": True, "max_tokens": 900, "n": 8}
    key = {"Authorization": "Bearer k"}
    for stream in (False, True):
        asked = {"json": body | {"stream": stream}, "headers": key, "timeout": 0.3 if not stream else 60}
        if stream:
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", **asked) as response:
                lines = response.iter_lines()
                for _ in range(40):  # past the openings of all eight: the engine is at work
                    next(lines)
                assert running()
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/chat/completions", **asked)
        until = time.monotonic() + 2
        while running():
            assert time.monotonic() < until
            time.sleep(0.01)
