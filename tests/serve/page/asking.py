"""What the chat page's tests do again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

from playwright.sync_api import Locator, Page, expect


def ask(page: Page, text: str) -> None:
    """Type a question and wait for the whole answer."""
    answers = page.locator(".message.assistant").count()
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    expect(page.locator(".message.assistant")).to_have_count(answers + 1)
    expect(page.locator("#send")).to_be_visible()


def answer(page: Page) -> Locator:
    """The newest one."""
    return page.locator(".message.assistant").last


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
