"""inspect --fit: the verdict, what it tells to type, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fireflyer.cli.main import main
from fireflyer.evaluate.machine import Machine


def on(monkeypatch: pytest.MonkeyPatch, memory_gib: float, disk_gib: float = 2000, disk: float | None = 3e9) -> None:
    """A machine of so much memory."""
    gib = 1 << 30
    machine = Machine(
        int(memory_gib * gib), int(memory_gib * gib), int(disk_gib * gib), 300 << 20, 20e9, disk, None, None
    )
    monkeypatch.setattr("fireflyer.evaluate.machine.measure_machine", lambda folder: machine)


def advice(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    assert main(["inspect", *args, "--fit", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["fit"]["advice"]


def test_advice_by_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """V2-Lite: 59 GiB in fp32, 15 in int8, 8.4 in int4."""
    on(monkeypatch, 64)
    assert advice(capsys, "deepseek-v2-lite")[0] == "It fits: fireflyer generate CHECKPOINT PROMPT"
    on(monkeypatch, 20)
    (line,) = advice(capsys, "deepseek-v2-lite")
    assert line.startswith("It fits as int8: fireflyer convert CHECKPOINT CHECKPOINT-int8 --to int8")
    on(monkeypatch, 12)
    assert advice(capsys, "deepseek-v2-lite")[0].startswith("It fits as int4: fireflyer convert ")
    on(monkeypatch, 6, disk=None)
    lines = advice(capsys, "deepseek-v2-lite")
    assert any(
        "--expert-memory" in line and "--to int4" in line and "if the disk gives 2 GB/s" in line for line in lines
    )
    on(monkeypatch, 32, disk_gib=100)
    assert "but the disk is 242 GiB short of that" in advice(capsys, "deepseek-v3")[-1]
    on(monkeypatch, 1)
    assert "needs a larger machine" in advice(capsys, "deepseek-v3")[-1]


def test_a_smaller_context(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on(monkeypatch, 10)
    assert "It fits as int4 with up to" in advice(capsys, "deepseek-v2-lite", "--context", "160000")[0]


def test_on_this_machine(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_checkpoint), "--fit", "--context", "64", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 sequences of 64 tokens" in out
    assert f"It fits: fireflyer generate {tiny_checkpoint} PROMPT" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "5"], "--context 5 says what has to fit; add --fit"),
        (["--fit", "--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--fit", "--context", "9999999"], "beyond the model's 163,840 tokens"),
    ],
)
def test_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "deepseek-v3", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
