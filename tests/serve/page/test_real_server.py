"""The chat page before `fireflyer serve` itself, in a process of its own, with a tiny random model."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator

import httpx
import pytest
from browser import opened
from playwright.sync_api import Browser, Page, expect
from served import Served

from .asking import answer, ask, wait_until


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory) -> Iterator[Served]:
    """The context is long, so that there is time to stop an answer."""
    folder = tmp_path_factory.mktemp("long")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 50_000}))
    with Served(folder, "--served-model-name", "tiny", "--max-num-seqs", "2") as served:
        yield served


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    with opened(browser, served.url) as page:
        expect(page.locator("#model-name")).to_have_text("tiny")
        yield page


def set_field(page: Page, label: str, value: str) -> None:
    page.keyboard.press("Alt+,")
    page.get_by_label(label).fill(value)
    page.keyboard.press("Escape")


def running(served: Served) -> float:
    text = httpx.get(f"{served.url}/metrics").text
    return sum(float(number) for number in re.findall(r"^fireflyer_answers_(?:running|waiting) (\S+)", text, re.M))


def test_text_goes_on_and_can_be_looked_into(page, served):
    expect(page.locator("#notice")).to_be_visible()
    set_field(page, "Max tokens", "24")
    set_field(page, "Temperature", "0")
    page.get_by_role("button", name="Look inside").click()
    ask(page, "the quick")
    tokens = page.get_by_role("option")
    expect(tokens).to_have_count(24)
    expect(answer(page).locator(".meter")).to_contain_text("24 tokens")
    body = {"prompt": "the quick", "max_tokens": 24, "temperature": 0, "fireflyer": {"experts": True}}
    oracle = httpx.post(f"{served.url}/v1/completions", json=body).json()
    expect(answer(page).locator(".meter")).to_contain_text(f"{oracle['fireflyer']['acceptance']:.0%} accepted")
    oracle = oracle["choices"][0]["fireflyer"]
    guessed = tokens.evaluate_all("nodes => nodes.map(node => node.classList.contains('guessed'))")
    assert [name.replace("⏎\n", "\n") for name in tokens.all_text_contents()] == oracle["tokens"]
    assert guessed == [bool(drafted) for drafted in oracle["drafted"]]
    tokens.nth(7).click()
    page.locator(".in-words summary").click()
    expect(page.locator(".in-words li")).to_have_count(len(oracle["experts"][7]))
    lines = page.locator(".in-words li").all_text_contents()
    assert [sorted(map(int, re.findall(r"\d+", line)[1:])) for line in lines] == [
        sorted(chosen) for chosen in oracle["experts"][7]
    ]


def test_stop_and_go_on(page, served):
    set_field(page, "Max tokens", "40000")
    set_field(page, "Temperature", "0")
    page.fill("#prompt", "the quick")
    page.press("#prompt", "Enter")
    expect(answer(page).locator(".meter")).to_contain_text("tokens/s")
    assert running(served) == 1
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: running(served) == 0)
    said = answer(page).locator(".text").text_content()
    assert said
    set_field(page, "Max tokens", "5")
    page.get_by_role("button", name="Go on").click()
    expect(answer(page).locator(".failure")).to_contain_text("Cut at the most tokens allowed.")
    assert answer(page).locator(".text").text_content().startswith(said)


def test_chat_regenerate_and_reload(page, served):
    page.get_by_role("button", name="Chat anyway").click()
    set_field(page, "Max tokens", "8")
    set_field(page, "Seed", "7")
    ask(page, "the lazy dog")
    first = answer(page).locator(".text").text_content()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("#send")).to_be_visible()
    expect(answer(page).locator(".meter")).to_contain_text("8 tokens")
    assert answer(page).locator(".text").text_content() == first
    page.reload()
    expect(answer(page).locator(".text")).to_have_text(first)


def test_refusal_is_the_servers_own_line(page, served):
    ask(page, "the " * 60_000)
    expect(answer(page).get_by_role("alert")).to_contain_text(re.compile("context"))


def test_server_that_ends(browser, checkpoint):
    with Served(checkpoint, "--api-key", "k") as served, opened(browser, served.url) as page:
        ask(page, "hi")
        expect(answer(page).get_by_role("alert")).to_contain_text("asks for an API key")
        assert served.stop(signal.SIGTERM) == 0
        page.get_by_role("button", name="Retry").click()
        expect(answer(page).get_by_role("alert")).to_have_text("The server doesn't answer.")
        expect(page.locator("#server")).to_have_attribute("data-state", "away")
