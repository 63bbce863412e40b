"""The docs' picture of the chat page: what the demo's model answers, looked into.

    fireflyer demo
    python scripts/screenshot_page.py runs/demo docs/serve-page.png

Serves the checkpoint on a free port, drives the system's Chromium through playwright, and writes a PNG.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

QUESTIONS = ("73398375+77768709=", "89565902-69127964=")
LIMIT_BYTES = 200_000


@contextmanager
def served(checkpoint: str) -> Iterator[str]:
    """The address of a server that runs while entered."""
    command = [sys.executable, "-m", "fireflyer", "serve", checkpoint, "--port", "0", "--served-model-name", "spark"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"page (http://\S+/)", line):
                    yield found.group(1)
                    return
            raise SystemExit("fireflyer serve ended before it served")
        finally:
            process.terminate()


def look(page: Page, address: str) -> None:
    """Ask, and point at a token."""
    page.goto(address)
    expect(page.locator("#server-text")).to_have_text("ready", timeout=60_000)
    page.locator("#look-inside").click()
    for question in QUESTIONS:
        page.keyboard.press("Alt+n")
        page.fill("#prompt", question)
        page.press("#prompt", "Enter")
        expect(page.locator(".message.assistant .meter")).to_contain_text("tokens/s", timeout=60_000)
        expect(page.locator("#send")).to_be_visible(timeout=60_000)
    page.locator(".message.assistant").last.get_by_role("option").nth(20).click()
    page.wait_for_timeout(300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--theme", choices=("light", "dark"), default="dark")
    args = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with served(args.checkpoint) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        size = {"width": 1180, "height": 720}
        page = browser.new_page(viewport=size, device_scale_factor=1.5, color_scheme=args.theme)
        look(page, address)
        page.screenshot(path=args.picture)
        browser.close()
    size_bytes = args.picture.stat().st_size
    if size_bytes > LIMIT_BYTES:
        raise SystemExit(f"{args.picture} has {size_bytes} bytes; {LIMIT_BYTES} at most")


if __name__ == "__main__":
    main()
