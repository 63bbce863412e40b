"""The shapes of answers: what the scripted engine says must come out of every endpoint, whole and in pieces alike."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fireflyer.text.special_tokens import (
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEPARATOR,
)

HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("look", "sum")]
CALLS = TOOL_CALLS_BEGIN + "\n".join(
    f"{TOOL_CALL_BEGIN}function{TOOL_SEPARATOR}{name}\n```json\n{arguments}\n```{TOOL_CALL_END}"
    for name, arguments in (("look", '{"a": "漢"}'), ("sum", "{}"))
)
CALLS += TOOL_CALLS_END


def post(client: httpx.AsyncClient, path: str, **body) -> httpx.Response:
    async def call() -> httpx.Response:
        async with client:
            return await client.post(path, json=body)

    return asyncio.run(call())


def events(response: httpx.Response) -> list[dict]:
    """The JSON of each event; the stream must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def chat(client, **body) -> dict:
    response = post(client, "/v1/chat/completions", messages=HI, **body)
    assert response.status_code == 200, response.text
    return ChatCompletion.model_validate_json(response.text, strict=True).model_dump() | response.json()


def chat_stream(client, **body) -> list[dict]:
    chunks = events(post(client, "/v1/chat/completions", messages=HI, stream=True, **body))
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
    return chunks


def added_up(chunks: list[dict]) -> dict[int, dict]:
    """What a client that gathers the deltas of each choice has at the end."""
    choices: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], {"content": "", "reasoning": "", "calls": {}, "logprobs": []})
            delta = choice["delta"]
            assert "finish_reason" not in whole, "nothing comes after the end"
            whole["content"] += delta.get("content") or ""
            whole["reasoning"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or ():
                if call.get("id"):
                    whole["calls"][call["index"]] = {"name": call["function"]["name"], "arguments": ""}
                whole["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            whole["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            if choice["finish_reason"]:
                whole["finish_reason"] = choice["finish_reason"]
    return choices


def test_a_chat_and_its_stream_say_the_same(make_client, engine, tokenizer):
    asked = {"n": 2, "logprobs": True, "top_logprobs": 2, "seed": 1}
    whole = chat(make_client(), **asked)
    chunks = chat_stream(make_client(), **asked, stream_options={"include_usage": True})
    assert [c["choices"][0]["delta"] for c in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, streamed in added_up(chunks).items():
        choice = whole["choices"][index]
        assert streamed["content"] == choice["message"]["content"] == engine.text
        assert streamed["finish_reason"] == choice["finish_reason"] == "stop"
        assert streamed["logprobs"] == choice["logprobs"]["content"]
    tokens = [*tokenizer.encode(engine.text), tokenizer.eos_id]
    first = whole["choices"][1]["logprobs"]["content"][0]
    assert first["token"] == "the"
    assert first["bytes"] == list(b"the")
    assert first["logprob"] == -tokens[0] / 1000
    assert [top["logprob"] for top in first["top_logprobs"]] == [0.0, -0.1]
    prompt = engine.prompts[0]
    assert whole["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 2 * len(tokens),
        "total_tokens": len(prompt) + 2 * len(tokens),
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_without_asking_there_is_no_usage_in_a_stream(make_client):
    chunks = chat_stream(make_client())
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_and_calls_have_their_own_fields(make_client, engine, stream):
    """The finish_reason is tool_calls only where there are calls; a call's arguments are the model's own JSON."""
    engine.text = f"<think>\nlet me 🎉</think>\n\nI look.{CALLS}"
    if stream:
        (reply,) = added_up(chat_stream(make_client(), tools=TOOLS)).values()
        calls = list(reply["calls"].values())
        reasoning, content, reason = reply["reasoning"], reply["content"], reply["finish_reason"]
    else:
        choice = chat(make_client(), tools=TOOLS)["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        reasoning, content = message["reasoning_content"], message["content"]
        assert all(call["id"].startswith("call_") and call["type"] == "function" for call in message["tool_calls"])
        calls = [
            {"name": c["function"]["name"], "arguments": c["function"]["arguments"]} for c in message["tool_calls"]
        ]
    assert (reasoning, content, reason) == ("let me 🎉", "I look.", "tool_calls")
    assert calls == [{"name": "look", "arguments": '{"a": "漢"}'}, {"name": "sum", "arguments": "{}"}]


@pytest.mark.parametrize("stream", [False, True])
def test_what_looks_like_a_call_stays_text_where_there_are_no_tools(make_client, engine, stream):
    engine.text = CALLS
    for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        if stream:
            (reply,) = added_up(chat_stream(make_client(), **extra)).values()
            assert (reply["content"], reply["finish_reason"], reply["calls"]) == (CALLS, "stop", {})
        else:
            choice = chat(make_client(), **extra)["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS, "stop")
            assert "tool_calls" not in choice["message"]
    assert engine.prompts[-1] == engine.prompts[0], "tools that may not be called are not shown to the model"


def test_calls_without_text_have_null_content_and_one_call_is_one(make_client, engine):
    engine.text = CALLS
    message = chat(make_client(), tools=TOOLS, parallel_tool_calls=False)["choices"][0]["message"]
    assert message["content"] is None
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["look"]


@pytest.mark.parametrize("stream", [False, True])
def test_cut_inside_thinking_leaves_content_empty(make_client, engine, stream):
    engine.text = "<think>a long thought that does not end</think>no"
    if stream:
        (reply,) = added_up(chat_stream(make_client(), max_tokens=12)).values()
        found = reply["content"], reply["reasoning"], reply["finish_reason"]
    else:
        choice = chat(make_client(), max_tokens=12)["choices"][0]
        found = choice["message"]["content"], choice["message"]["reasoning_content"], choice["finish_reason"]
    content, reasoning, reason = found
    assert (content, reason) == ("", "length")
    assert reasoning
    assert "a long thought that does not end".startswith(reasoning)


def test_a_cut_call_is_a_call_and_ends_with_length(make_client, engine, tokenizer):
    engine.text = CALLS
    length = len(tokenizer.encode(CALLS.partition('{"a"')[0] + '{"a"', allow_special=True))
    choice = chat(make_client(), tools=TOOLS, max_tokens=length)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"a"'}


def test_completions_of_many_prompts_and_their_stream(make_client, engine, tokenizer):
    """Text and token ids; choice p * n + i is answer i to prompt p; the text of the prompt comes first."""
    asked = {"prompt": ["hi 漢", "the"], "n": 2, "echo": True, "max_tokens": 3}
    response = post(make_client(), "/v1/completions", **asked)
    whole = Completion.model_validate_json(response.text, strict=True)
    said = tokenizer.decode(tokenizer.encode(engine.text)[:3])
    assert [choice.text for choice in whole.choices] == [p + said for p in ("hi 漢", "hi 漢", "the", "the")]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in whole.choices} == {"length"}
    texts = dict.fromkeys(range(4), "")
    for chunk in events(post(make_client(), "/v1/completions", **asked, stream=True)):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(len(prompt) for prompt in engine.prompts[:2])
    assert whole.usage.completion_tokens == 12


def test_completions_of_token_ids(make_client, engine):
    post(make_client(), "/v1/completions", prompt=[5, 6, 7])
    post(make_client(), "/v1/completions", prompt=[[5, 6], [7]])
    assert engine.prompts == [[5, 6, 7], [5, 6], [7]]
    assert engine.params[0].max_tokens == 16, "OpenAI's default"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_with_the_prompts(make_client, engine, tokenizer, stream):
    """Prompt tokens come first, the begin token without a probability; offsets count characters of the text."""
    asked = {"prompt": "hi 漢", "echo": True, "logprobs": 1}
    if stream:
        pieces = [c["choices"][0] for c in events(post(make_client(), "/v1/completions", **asked, stream=True))]
        text = "".join(piece["text"] for piece in pieces)
        found = {key: [x for piece in pieces for x in piece["logprobs"][key]] for key in pieces[0]["logprobs"]}
    else:
        (choice,) = post(make_client(), "/v1/completions", **asked).json()["choices"]
        text, found = choice["text"], choice["logprobs"]
    tokens = [tokenizer.bos_id, *tokenizer.encode("hi 漢"), *tokenizer.encode(engine.text), tokenizer.eos_id]
    assert text == "hi 漢" + engine.text
    assert found["tokens"] == [tokenizer.token_text(token) for token in tokens]
    assert found["token_logprobs"] == [None, *(-token / 1000 for token in tokens[1:])]
    assert found["top_logprobs"][0] is None
    best = tokenizer.token_text(40)
    assert found["top_logprobs"][1] == {best: 0.0, tokenizer.token_text(tokens[1]): -tokens[1] / 1000}
    for token, start, end in zip(tokens, found["text_offset"], [*found["text_offset"][1:], len(text)], strict=True):
        piece = tokenizer.token_bytes(token)
        assert piece.decode("utf-8", "ignore") in text[start:]
        assert end - start <= len(piece)
        if piece.isascii():
            assert text[start:end] == piece.decode()


def test_suffix_is_fill_in_the_middle(make_client, engine, tokenizer):
    post(make_client(), "/v1/completions", prompt="def f(", suffix="<think>): pass")
    begin, hole, end = (tokenizer.special_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
    prefix, suffix = tokenizer.encode("def f("), tokenizer.encode("<think>): pass")
    assert engine.prompts == [[tokenizer.bos_id, begin, *prefix, hole, *suffix, end]]


def test_our_own_field_tells_experts_and_drafts(make_client, engine, tokenizer):
    tokens = [*tokenizer.encode(engine.text), tokenizer.eos_id]
    asked = {"fireflyer": {"experts": True}}
    chunks = chat_stream(make_client(), **asked)
    told = [chunk["fireflyer"] for chunk in chunks if chunk["choices"] and "fireflyer" in chunk]
    assert [token for extras in told for token in extras["token_ids"]] == tokens
    assert [name for extras in told for name in extras["tokens"]] == [tokenizer.token_text(t) for t in tokens]
    assert [drafted for extras in told for drafted in extras["drafted"]] == [i % 2 == 1 for i in range(len(tokens))]
    assert [experts for extras in told for experts in extras["experts"]] == [
        [[i, 1], [2, 3]] for i in range(len(tokens))
    ]
    last = chunks[-1]
    assert last["choices"] == []
    assert last["fireflyer"]["tokens_per_s"] > 0
    whole = chat(make_client(), **asked)
    assert whole["choices"][0]["fireflyer"]["token_ids"] == tokens
    assert len(whole["choices"][0]["fireflyer"]["experts"]) == len(tokens)
    assert "experts" not in chat(make_client(), fireflyer={})["choices"][0]["fireflyer"]


def test_parameters_reach_the_engine(make_client, engine):
    asked = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "seed": 3,
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "max_completion_tokens": 5,
    }
    chat(make_client(), **asked, stop="x", logit_bias={"12": -100}, logprobs=True, user="me", metadata={"a": "b"})
    (params,) = engine.params
    asked["max_tokens"] = asked.pop("max_completion_tokens")
    asked["stop_token_ids"] = (9,)
    assert {name: getattr(params, name) for name in asked} == asked
    assert tuple(params.stop) == ("x",)
    assert dict(params.logit_bias) == {12: -100}
    assert params.logprobs == 0
    chat(make_client(), temperature=None, max_tokens=None, stop=None, tools=None)
    assert (engine.params[1].temperature, engine.params[1].max_tokens) == (1.0, None)


def test_the_conversation_reaches_the_engine(make_client, engine, tokenizer):
    """Parts, the newer name of the system role, past calls; and a last message that the answer goes on with."""
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "hi <｜User｜>", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "seen"},
        {"role": "assistant", "content": "I saw", "annotations": [], "refusal": None},
    ]  # fmt: skip

    def prompt(**body) -> str:
        response = post(make_client(), "/v1/chat/completions", messages=messages, **body)
        assert response.status_code == 200, response.text
        return tokenizer.decode(engine.prompts[-1], skip_special=False)

    whole = prompt(add_generation_prompt=False)
    assert whole.startswith("<｜begin▁of▁sentence｜>be\nkind<｜User｜>hi <｜User｜>")
    assert engine.prompts[-1].count(tokenizer.special_id("<｜User｜>")) == 1, "what the user spells is text"
    assert whole.endswith("I saw<｜end▁of▁sentence｜>")
    assert prompt(continue_final_message=True).endswith("I saw")
    assert '{"a": 1}' in whole
    assert "seen" in whole


def test_models_and_tokens(make_client, engine, tokenizer):
    async def calls():
        async with make_client(served_model_name="org/tiny") as client:
            listed = (await client.get("/v1/models")).json()
            one = (await client.get("/v1/models/org/tiny")).json()
            other = await client.get("/v1/models/else")
            tokens = (await client.post("/tokenize", json={"prompt": "hi 漢", "add_special_tokens": False})).json()
            text = (await client.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
            info = (await client.get("/tokenizer_info")).json()
            return listed, one, other, tokens, text, info

    listed, one, other, tokens, text, info = asyncio.run(calls())
    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["max_model_len"]) == ("org/tiny", engine.llm.max_length)
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert tokens["tokens"] == tokenizer.encode("hi 漢")
    assert text == {"prompt": "hi 漢"}
    assert info["eos_token"] == tokenizer.token_text(tokenizer.eos_id)
