"""Headless Chromium: one browser for a module's tests, a fresh profile for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 20_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's own browser. Skips the test where there is none."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """The page at `url` in a new profile. At the end: it asked no other server for anything, and nothing went wrong."""
    profile = browser.new_context(**context)
    profile.set_default_timeout(TIMEOUT_MS)
    asked: list[str] = []
    troubles: list[str] = []
    profile.on("request", lambda request: asked.append(request.url))
    page = profile.new_page()
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: message.type == "error" and troubles.append(message.text))
    page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(url)
    try:
        yield page
    finally:
        profile.close()
    assert [address for address in asked if not address.startswith((url, "data:"))] == []
    # A refused request is what some tests are about; the browser notes it by itself.
    assert [trouble for trouble in troubles if not trouble.startswith("Failed to load resource")] == []
