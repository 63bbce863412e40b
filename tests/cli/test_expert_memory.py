"""--expert-memory: the same answer from less memory, and how often an expert was there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fireflyer.cli.main import main


def test_generate(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["generate", str(tiny_checkpoint), "the fox", "--max-tokens", "12", "--temperature", "0", "--json"]
    assert main(ask) == 0
    expected, plain_talk = capsys.readouterr()
    assert main([*ask, "--expert-memory", "8KiB"]) == 0
    facts, talk = capsys.readouterr()
    assert json.loads(facts)["token_ids"] == json.loads(expected)["token_ids"]
    assert "found in memory" in talk
    assert "found in memory" not in plain_talk


def test_bench(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure = ["bench", str(tiny_checkpoint), "--prompt-tokens", "8", "--new-tokens", "4", "--json"]
    assert main([*measure, "--expert-memory", "8KiB"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["expert_hit_rate"] < 1


@pytest.mark.parametrize("verb", ["generate", "chat", "serve", "bench"])
def test_refused(verb: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["x"] if verb == "generate" else []
    assert main([verb, str(tiny_checkpoint), *prompt, "--expert-memory", "much"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expert_memory is 'much'; give a size such as 8GiB" in error
