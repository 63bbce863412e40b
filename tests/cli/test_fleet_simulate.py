"""`fireflyer fleet simulate`: its table, its JSON, its pictures and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fireflyer.cli.fleet_simulate import duration
from fireflyer.cli.main import main

SMALL = ["fleet", "simulate", "--nodes", "12", "--days", "0.5", "--warm-up", "0"]


def test_the_table_has_a_column_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--policy", "ours,fifo,fifo-backfill,priority"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "12 nodes x 8 GPUs in two zones, 0.5 days at 1 times their capacity, seed 0"
    assert out.splitlines()[1].split() == ["ours", "fifo", "fifo-backfill", "priority"]
    assert "first slice after, 2-8 nodes" in out


def test_json_is_one_object_and_the_same_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == main([*SMALL, "--json"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert json.loads(first)["policies"]["ours"]["share"]["allocated"] > 0.5


@pytest.mark.parametrize("name", ["month.svg", "month.png"])
def test_a_picture(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for path in (tmp_path / name, tmp_path / f"again-{name}"):
        assert main([*SMALL, "--policy", "ours,fifo", "--plot", str(path)]) == 0
    data = (tmp_path / name).read_bytes()
    assert data == (tmp_path / f"again-{name}").read_bytes()
    assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert len(data) < 150_000
    assert main([*SMALL, "--plot", str(tmp_path / "absent" / name)]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "lottery"], "no policy 'lottery'; there are ours, fifo, fifo-backfill, priority"),
        (["--plot", "month.pdf"], "its name has to end with .svg or .png"),
        (["--nodes", "1"], "nodes = 1: at least 2"),
        (["--load", "0"], "load = 0.0: at least 0.01"),
    ],
)
def test_what_it_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_times_for_people() -> None:
    times = {0: "0 s", 10: "10 s", 60: "1 min", 7199: "120 min", 7200: "2 h", 172_800: "2 d"}
    assert {seconds: duration(seconds) for seconds in times} == times
