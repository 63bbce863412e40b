"""One browser for a module's tests; a server and a profile for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from browser import chromium, opened
from playwright.sync_api import Browser, Page, expect

from .scripted_server import ScriptedServer, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serving(ScriptedServer()) as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: ScriptedServer) -> Iterator[Callable[..., Page]]:
    """visit(**context): the page, once it knows the model."""
    with ExitStack() as stack:

        def visit(**context: Any) -> Page:
            page = stack.enter_context(opened(browser, server.url, **context))
            expect(page.locator("#server-text")).to_have_text("ready")
            return page

        yield visit
