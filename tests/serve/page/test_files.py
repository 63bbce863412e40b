"""The chat page's files: what is sent with them, and that they ask nothing from elsewhere."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fireflyer.serve import page_files
from fireflyer.serve.page_files import PageFiles

PAGE = Path(page_files.__file__).parent / "page"
OWN = sorted(path for path in PAGE.iterdir() if path.suffix in (".js", ".css", ".html", ".svg"))


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.mount("/", PageFiles())
    return TestClient(app, follow_redirects=False)


def test_page_and_its_policy(client):
    page = client.get("/")
    assert page.text == (PAGE / "index.html").read_text(encoding="utf-8")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    script = client.get("/app.js")
    assert "javascript" in script.headers["content-type"]
    assert script.headers["content-security-policy"] == policy
    assert client.get("/app.js", headers={"If-None-Match": script.headers["etag"]}).status_code == 304


@pytest.mark.parametrize("path", ["/no-such-file", "/..%2fpage_files.py", "/vendor", "/%2e%2e/app.py"])
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code in (307, 404)


def test_every_file_that_is_named_exists():
    for path in OWN:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"""(?:src|href|from|import)(?:=|: |\s)?\(?["']([\w./-]+\.(?:js|css|svg))""", text)
        assert [name for name in named if not (PAGE / name).is_file()] == [], path.name
    drawings = re.findall(r'id="(\w+)"', (PAGE / "icons.svg").read_text(encoding="utf-8"))
    used = {name for path in OWN for name in re.findall(r"icons\.svg#(\w+)", path.read_text(encoding="utf-8"))}
    assert used <= set(drawings)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_is_inline_or_from_elsewhere(path):
    text = path.read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w/.-]*", re.sub(r"(?m)^\s*//.*|^ \* .*", "", text)))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert len(text.splitlines()) <= 400
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text)


def test_libraries_are_what_the_list_says():
    listed = {}
    for line in (PAGE / "vendor" / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"[0-9a-f]{64}", cells[-1]):
            listed[cells[0]] = cells[-1]
            licence = re.search(r"\((.+)\)", cells[2])
            assert licence
            assert (PAGE / "vendor" / licence.group(1)).is_file()
    files = [path for path in (PAGE / "vendor").iterdir() if path.suffix not in (".txt", ".md")]
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
