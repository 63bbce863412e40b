"""Conversations on the chat page, before a server that says what each test wants."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack

import pytest
from browser import opened
from playwright.sync_api import expect

from .asking import answer, ask, wait_until
from .scripted_server import Script, ScriptedServer, serving


def test_question_and_answer(visit, server):
    page = visit()
    expect(page.locator("#model-name")).to_have_text("spark")
    ask(page, "Who glows?")
    expect(answer(page).locator(".text")).to_have_text("You said: Who glows?")
    expect(answer(page).locator(".meter")).to_have_text(
        re.compile(r"^5 tokens · [\d,.]+ tokens/s · 40% guessed by MTP · 88% accepted$")
    )
    ask(page, "And who else?")
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": "Who glows?"},
        {"role": "assistant", "content": "You said: Who glows?"},
        {"role": "user", "content": "And who else?"},
    ]
    assert server.bodies[1]["stream"] is True
    assert server.bodies[1]["fireflyer"] == {"experts": False}


def test_stop_ends_it_on_the_server_too(visit, server):
    server.scripts["long"] = Script("word " * 10_000, pause_s=0.01)
    page = visit()
    page.fill("#prompt", "long")
    page.press("#prompt", "Enter")
    expect(answer(page).locator(".text")).to_contain_text("word word")
    assert server.running == 1
    page.get_by_role("button", name="Stop").click()
    expect(answer(page).locator(".failure")).to_contain_text("Stopped.")
    wait_until(lambda: server.running == 0)
    assert server.left == 1
    said = answer(page).locator(".text").inner_text()
    assert 0 < len(said) < 10_000

    page.keyboard.press("ArrowUp")  # nothing typed: the last message, to be edited
    page.locator(".edit-form textarea").press("Enter")
    expect(answer(page).locator(".text")).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(answer(page).locator(".failure")).to_contain_text("Stopped.")
    wait_until(lambda: server.running == 0)


def test_answer_is_shown_while_it_grows(visit, server):
    server.scripts["slow"] = Script("The end is not yet here.", pause_s=0.15)
    page = visit()
    page.fill("#prompt", "slow")
    page.press("#prompt", "Enter")
    expect(answer(page).locator(".text")).to_contain_text("The")
    assert "here" not in answer(page).locator(".text").inner_text()
    expect(answer(page)).to_have_attribute("aria-busy", "true")
    expect(answer(page).locator(".text")).to_have_text("The end is not yet here.")
    expect(answer(page)).to_have_attribute("aria-busy", "false")


def test_regenerate_and_edit(visit, server):
    page = visit()
    ask(page, "first")
    ask(page, "second")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".message")).to_have_count(4)
    wait_until(lambda: len(server.bodies) == 3)
    assert server.bodies[2] == server.bodies[1]

    page.locator(".message.user").first.hover()
    page.get_by_role("button", name="Edit and send again").first.click()
    field = page.locator(".edit-form textarea")
    expect(field).to_have_value("first")
    field.fill("changed")
    page.get_by_role("button", name="Send", exact=True).first.click()
    expect(page.locator(".message")).to_have_count(2)
    expect(answer(page).locator(".text")).to_have_text("You said: changed")
    assert server.bodies[3]["messages"] == [{"role": "user", "content": "changed"}]


def test_tools(visit, server):
    server.scripts["weather"] = Script("I look.", calls=[("get_weather", '{"city": "Oslo"}'), ("get_time", "{}")])
    server.scripts["12 o'clock"] = Script("It rains at noon.")
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill('[{"type": "function", "function": {"name": "get_weather"}}]')
    page.get_by_role("button", name="Done").click()
    ask(page, "weather")
    cards = page.locator(".card")
    expect(cards).to_have_count(2)
    expect(cards.first.locator("header")).to_have_text("Calls get_weather")
    assert json.loads(cards.first.get_by_label("Arguments").inner_text()) == {"city": "Oslo"}
    for number, result in enumerate(["rain", "12 o'clock"]):
        card = page.locator(".message.assistant .card").nth(number)
        card.locator("textarea").fill(result)
        card.get_by_role("button", name="Give result").click()
    expect(answer(page).locator(".text")).to_have_text("It rains at noon.")
    assert server.bodies[0]["tools"][0]["function"]["name"] == "get_weather"
    said = server.bodies[1]["messages"]
    assert said[1]["tool_calls"][0] == {
        "id": "call_0",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    assert said[2:] == [
        {"role": "tool", "tool_call_id": "call_0", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 o'clock"},
    ]


def test_go_on_after_the_limit(visit, server):
    server.scripts["count"] = Script("one two", finish="length")
    page = visit()
    ask(page, "count")
    server.scripts["count"] = Script(" three")
    page.get_by_role("button", name="Go on").click()
    expect(answer(page).locator(".text")).to_have_text("one two three")
    expect(answer(page).locator(".failure")).to_be_hidden()
    body = server.bodies[1]
    assert body["messages"][-1] == {"role": "assistant", "content": "one two"}
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False


def test_settings_reach_the_server_and_stay(visit, server):
    page = visit()
    page.keyboard.press("Alt+,")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Top-p").fill("")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Thinking").select_option("off")
    page.get_by_label("Theme").select_option("dark")
    page.keyboard.press("Escape")
    page.reload()
    expect(page.locator("#server-text")).to_have_text("ready")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    ask(page, "hi")
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["model"] == "spark"
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 7, 3)
    assert "top_p" not in body
    assert body["chat_template_kwargs"] == {"thinking": False}


def test_model_that_was_not_taught_to_chat(visit, server):
    server.taught_to_chat = False
    server.scripts["1+1="] = Script("2")
    page = visit()
    expect(page.get_by_text("never taught to chat")).to_be_visible()
    ask(page, "1+1=")
    expect(answer(page).locator(".text")).to_have_text("2")
    assert server.bodies[0]["prompt"] == "1+1="
    page.get_by_role("button", name="Chat anyway").click()
    expect(page.locator("#notice")).to_be_hidden()
    ask(page, "hello")
    assert server.bodies[1]["messages"][-1] == {"role": "user", "content": "hello"}


def test_conversations_stay_until_they_are_cleared(visit, server):
    page = visit()
    ask(page, "first chat")
    page.keyboard.press("Alt+n")
    expect(page.locator("#empty")).to_be_visible()
    ask(page, "second chat")
    page.reload()
    expect(page.locator(".message.user .bubble")).to_have_text("second chat")
    titles = page.locator("#conversations .title")
    expect(titles).to_have_text(["second chat", "first chat"])
    titles.last.click()
    expect(answer(page).locator(".text")).to_have_text("You said: first chat")
    ask(page, "more")
    assert [message["content"] for message in server.bodies[-1]["messages"]][::2] == ["first chat", "more"]
    page.get_by_role("button", name="Clear all").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#empty")).to_be_visible()
    page.reload()
    expect(page.locator("#conversations .title")).to_have_count(0)


def test_key_is_asked_for_and_kept_in_the_tab_alone(visit, server):
    server.key = "secret-key"
    page = visit()
    ask(page, "hi")
    expect(answer(page).get_by_role("alert")).to_contain_text("asks for an API key")
    page.get_by_role("button", name="Enter the key").click()
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("secret-key")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Retry").click()
    expect(answer(page).locator(".text")).to_have_text("You said: hi")
    expect(page.locator("#model-name")).to_have_text("spark")
    assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("sessionStorage.getItem('fireflyer.key')") == "secret-key"


def test_busy_server(visit, server):
    server.scripts["hi"] = Script("all places are taken", status=429, retry_after=1)
    page = visit()
    ask(page, "hi")
    expect(answer(page).get_by_role("alert")).to_have_text("The server is busy: all places are taken")
    retry = page.get_by_role("button", name="Retry in 1 s")
    expect(retry).to_be_disabled()
    server.scripts.clear()
    retry = page.get_by_role("button", name="Retry", exact=True)
    expect(retry).to_be_enabled()
    retry.click()
    expect(answer(page).locator(".text")).to_have_text("You said: hi")
    expect(page.locator(".message")).to_have_count(2)


@pytest.mark.parametrize(
    ("status", "said", "shown"),
    [
        (400, "the prompt is too long", "the prompt is too long"),
        (503, "it ends", "The server can't answer now: it ends"),
    ],
)
def test_refusals(visit, server, status, said, shown):
    server.scripts["hi"] = Script(said, status=status)
    page = visit()
    ask(page, "hi")
    expect(answer(page).get_by_role("alert")).to_have_text(shown)
    expect(page.get_by_role("button", name="Retry", exact=True)).to_be_enabled()


@pytest.mark.parametrize("how", [{"cut_after": 2}, {"done": False}], ids=["breaks", "just ends"])
def test_lost_connection(visit, server, how):
    server.scripts["hi"] = Script("half an answer", pause_s=0.05, **how)
    page = visit()
    ask(page, "hi")
    expect(answer(page).locator(".text")).to_contain_text("half")
    expect(answer(page).get_by_role("alert")).to_have_text("The connection to the server was lost.")


def test_server_restarts(browser, server):
    port = int(server.url.rpartition(":")[2])
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        inner = ScriptedServer()
        first.enter_context(serving(inner))
        port = int(inner.url.rpartition(":")[2])
        page = stack.enter_context(opened(browser, inner.url))
        expect(page.locator("#server-text")).to_have_text("ready")
        first.close()
        ask(page, "hi")
        expect(answer(page).get_by_role("alert")).to_have_text("The server doesn't answer.")
        expect(page.locator("#server")).to_have_attribute("data-state", "away")
        stack.enter_context(serving(ScriptedServer(), port))
        expect(page.locator("#server-text")).to_have_text("ready")
        page.get_by_role("button", name="Retry").click()
        expect(answer(page).locator(".text")).to_have_text("You said: hi")
