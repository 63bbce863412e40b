"""`fireflyer fleet` as it is typed: a fleet brought up, used and taken down; mistakes as one line."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fireflyer.cli import main as cli
from fireflyer.cli.fleet import duration

Say = pytest.CaptureFixture[str]


def fleet(capfd: Say, *argv: str) -> tuple[int, str, str]:
    code = cli.main(["fleet", *argv])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Say) -> Iterator[Path]:
    monkeypatch.setenv("FIREFLYER_FLEET", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    code, out, err = fleet(capfd, "up", "--as-me", "--nodes", "2", "--slice", "30s", "--web", "0")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'state'}: local, 2 nodes")
    yield tmp_path / "state"
    fleet(capfd, "down", "--suspend")


def test_a_fleets_day(up: Path, capfd: Say):
    """submit, logs -f, status, queue, nodes, the page, stop, down: each says what is."""
    code, out, _ = fleet(capfd, "submit", "--name", "hello", "--", "sh", "-c", "echo $0 there; exit 3", "<b>")
    assert (code, out) == (0, "1\n")
    assert fleet(capfd, "logs", "-f", "1")[1] == "<b> there\n"
    out = fleet(capfd, "status", "1")[1]
    assert out.startswith("task 1 (hello, ")
    assert "failed: exit code 3" in out
    assert out.endswith("its last lines:\n  <b> there\n")
    assert json.loads(fleet(capfd, "status", "1", "--json")[1])["exit_code"] == 3
    assert fleet(capfd, "submit", "--for", "bob", "sleep", "600")[1] == "2\n"
    queue = json.loads(fleet(capfd, "queue", "--json")[1])
    assert [task["task"] for task in queue["tasks"]] == [2]
    assert queue["ended"][0]["why"] == "exit code 3"
    assert "bob" in fleet(capfd, "queue")[1]
    assert "trouble" not in fleet(capfd, "queue")[1]
    log = (up / "ledger" / "controller.log").read_text()
    page = urllib.request.urlopen(log.partition("local, ")[2].partition(",")[0], timeout=10)
    assert page.headers["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    text = page.read().decode()
    assert "bob" in text
    assert "src=" not in text
    assert fleet(capfd, "nodes", "--drain", "n2", "--reason", "loud fan")[1].splitlines()[2].endswith("loud fan")
    assert "n2    zone0  up" in fleet(capfd, "nodes", "--resume", "n2")[1]
    assert fleet(capfd, "stop", "2")[1] in ("task 2: stopping\n", "task 2: stopped\n")
    assert fleet(capfd, "down", "--suspend")[1] == "down\n"
    code, out, err = fleet(capfd, "queue")
    assert (code, out) == (2, "")
    assert err == f"fireflyer: no fleet answers in {up}: start one with fireflyer fleet up\n"


def test_jobs_outlive_the_controller(up: Path, capfd: Say):
    fleet(capfd, "submit", "sh", "-c", "sleep 1.5; echo done")
    while "running" not in fleet(capfd, "queue")[1]:
        pass
    assert fleet(capfd, "down")[1] == "down; jobs that run on: 1; the next fireflyer fleet up takes them over\n"
    assert fleet(capfd, "up", "--as-me")[0] == 0
    assert fleet(capfd, "logs", "-f", "1")[1] == "done\n"
    assert json.loads(fleet(capfd, "status", "1", "--json")[1])["attempts"][-1]["outcome"] == "done"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["submit"], "no command: give it after --"),
        (["submit", "--", "no-such-command"], "command 'no-such-command' doesn't exist on PATH"),
        (["submit", "./gone.sh"], "command './gone.sh' doesn't exist in this folder"),
        (["submit", "--deadline", "soon", "true"], "'soon' isn't a time: give seconds, or 90s, 10m, 2h, 1d"),
        (["queue"], "no fleet answers in "),
        (["up", "--nodes", "0"], "--nodes 0 --zones 1: 1 node at least"),
        (["up", "--node-env", "n1"], "--node-env 'n1': give it as n1:CUDA_VISIBLE_DEVICES=0"),
        (["up", "--node-env", "n7:A=1"], "--node-env n7: the nodes are n1"),
        (["up", "--weight", "alice"], "--weight 'alice': give it as alice=2"),
        (["up", "--slice", "0"], "min_slice_s"),
        (["simulate-interrupt", "--times", "0", "true"], "--times 0"),
    ],
)
def test_mistakes(argv: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Say):
    monkeypatch.setenv("FIREFLYER_FLEET", str(tmp_path / "none"))
    code, out, err = fleet(capfd, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("fireflyer: ")
    assert err.count("\n") == 1
    assert line in err


SURVIVES = """
import os, sys, time
from fireflyer import fleet
first = int(open("at").read()) if os.path.exists("at") else 0
with fleet.job() as job:
    for step in job.steps(25, first):
        time.sleep(0.02)
        if job.should_stop():
            open("at", "w").write(str(step + 1))
            job.saved(step + 1)
"""


def test_simulate_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Say):
    monkeypatch.chdir(tmp_path)
    code, out, err = fleet(
        capfd, "simulate-interrupt", "--after", "0.3", "--json", "--", sys.executable, "-c", SURVIVES
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["survived"] is True
    assert 0 < report["interrupts"][0]["saved_step"] < 25
    code, _, err = fleet(capfd, "simulate-interrupt", "--after", "0.2", "--", "sleep", "60")
    assert code == 2
    assert "it does not survive: ended by signal SIGTERM after TERM instead of saving" in err
    code, _, err = fleet(capfd, "simulate-interrupt", "--after", "5", "--", "true")
    assert "it ended by itself within 5 s" in err


def test_durations():
    assert [duration(text) for text in ("90", "90s", "10m", "1.5h", "1d")] == [90, 90, 600, 5400, 86400]
