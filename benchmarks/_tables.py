"""Docs from results: rewrites the marked blocks of README*.md and docs/ from `benchmarks/results/*.json`.

<!-- table: PART[.NAME] -->   a table of the result (its only one, or the one of that name), and where it came from
<!-- output: PART[.NAME] -->  terminal output, fenced
<!-- value: PART.KEY[.KEY...] [FORMAT] -->  one figure in running text; FORMAT is Python's, such as .1% or ,
<!-- end -->                  closes each
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks._result import RESULTS, ROOT

_BLOCK = re.compile(r"<!-- (table|output|value): ([\w.-]+)(?: (\S+))? -->(.*?)<!-- end -->", re.DOTALL)


def document_paths() -> list[Path]:
    """Every page that may hold a block."""
    return sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])


def rewrite_all() -> tuple[list[Path], list[str]]:
    """Rewrites every page that differs from the results; returns the pages changed, and what some page still lacks."""
    changed, lacking = [], []
    for path in document_paths():
        before = path.read_text(encoding="utf-8")
        try:
            after = rewrite(before, chinese=path.name.endswith(".zh-CN.md"), source=path.name)
        except ValueError as error:
            lacking.append(str(error))
            continue
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed, lacking


def rewrite(text: str, *, chinese: bool = False, source: str = "text", results: Path = RESULTS) -> str:
    """The page with each block filled from the results; a block that names no result raises ValueError."""

    def fill(match: re.Match[str]) -> str:
        kind, name, spec, _ = match.groups()
        head = match.group().split("-->", 1)[0] + "-->"
        try:
            part, *keys = name.split(".")
            result = json.loads((results / f"{part}.json").read_text(encoding="utf-8"))
            body = _RENDER[kind](result, keys, spec or "", chinese)
        except (KeyError, IndexError, FileNotFoundError, TypeError) as error:
            raise ValueError(f"{source}: nothing in benchmarks/results for '{kind}: {name}' ({error})") from error
        return f"{head}{body}<!-- end -->"

    return _BLOCK.sub(fill, text)


def _table(result: dict[str, Any], keys: list[str], spec: str, chinese: bool) -> str:
    table = _named(result["tables"], keys)
    rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n" + "\n".join([*lines, "", _caption(result, chinese)]) + "\n"


def _output(result: dict[str, Any], keys: list[str], spec: str, chinese: bool) -> str:
    text = _named(result["outputs"], keys).strip("\n")
    return f"\n```text\n{text}\n```\n\n{_caption(result, chinese)}\n"


def _value(result: dict[str, Any], keys: list[str], spec: str, chinese: bool) -> str:
    value: Any = result["figures"]
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value[key]
    return format(value, spec)


_RENDER = {"table": _table, "output": _output, "value": _value}


def _named(blocks: dict[str, Any], keys: list[str]) -> Any:
    if keys:
        return blocks[keys[0]]
    if len(blocks) != 1:
        raise KeyError(f"one of {sorted(blocks)} must be named")
    return next(iter(blocks.values()))


def _cell(cell: str | int | float) -> str:
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def _caption(result: dict[str, Any], chinese: bool) -> str:
    machine = result["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    command, day, commit, torch = result["command"], result["date"][:10], result["commit"], machine["torch"]
    if chinese:
        return f"<sub>由 `{command}` 生成：{day}，提交 {commit}，{device}，torch {torch}。</sub>"
    return f"<sub>Made by `{command}` on {day}, commit {commit}: {device}, torch {torch}.</sub>"
