"""`fireflyer launch`: what it refuses and shows; runs on two ranks that are killed, stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import SETTINGS, tiny_recipe, write_text

from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.cli.main import main
from fireflyer.train.loop import train

SIZES = {**SETTINGS, "steps": 400, "checkpoint_every": 3, "eval_every": 0}


def settings(changed: dict[str, object]) -> list[str]:
    return [word for key, value in {**SIZES, **changed}.items() for word in ("--set", f"{key}={value}")]


def pretrain(text: Path, run_dir: Path, **changed: object) -> list[str]:
    given = {key.replace("__", "."): value for key, value in changed.items()}
    return ["pretrain", "--data", str(text), "--run", str(run_dir), *settings(given)]


def rows(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- Refused before any rank is started


def taken_port() -> tuple[socket.socket, int]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener, listener.getsockname()[1]


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    text = write_text(tmp_path / "text.jsonl", 50)
    listener, port = taken_port()
    command = pretrain(text, tmp_path / "run")
    for argv, said in (
        (["-n", "3", *command], "parallel.dp = 3 doesn't divide a batch of 4 sequences; dp can be 1 or 2"),
        (["-n", "2", *command, "--set", "parallel.dp=4"], "is 4 ranks, and 2 run; start 4, as fireflyer launch -n 4"),
        (["-n", "4", *command, "--set", "parallel.ep=3"], "parallel.ep = 3 doesn't divide the 4 data ranks"),
        (["-n", "2", *command, "--set", "parallel.cp=3"], "2 ranks can't be shared by parallel.pp = 1 times"),
        (["-n", "2", *command, "--set", "parallel.zero=4"], "parallel.zero"),
        (["-n", "2", *command, "--set", "optimizer.name=muon"], "optimizer.name=adamw"),
        (["-n", "2", "--port", str(port), *command], f"--port {port} can't be had"),
        (["-n", "2", "generate", "x"], "generate runs in one process; ranks can share pretrain, extend, sft"),
        (["-n", "2"], "no command for the ranks"),
        (["-n", "0", *command], "-n 0: at least 1"),
        (["-n", "2", "--nodes", "2", *command], "--nodes and --meet HOST:PORT go together"),
    ):
        assert main(["launch", *argv]) == 2, argv
        error = capsys.readouterr().err
        assert said in error, error
        assert error.count("\n") == 1
    listener.close()
    assert not (tmp_path / "run").exists()


def test_dry_run_shows_who_holds_what(capsys):
    """All shares of AdamW's state come to the whole: two moments of every parameter."""
    command = ["pretrain", *settings({"parallel.pp": 2, "parallel.ep": 2, "parallel.micro_batch_size": 1})]
    assert main(["launch", "-n", "4", "--dry-run", *command]) == 0
    shown = capsys.readouterr().out
    assert "4 ranks: pp 2 x dp 2 x cp 1, ep 2, zero 1" in shown
    assert main(["launch", "-n", "4", "--dry-run", *command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [rank["experts"] for rank in facts["ranks"]] == [[0, 4], [4, 8]] * 2
    assert sorted({tuple(rank["layers"][0]) for rank in facts["ranks"]})[0][0] == 0
    config = tiny_recipe("text.jsonl").model
    copy_of_embedding = config.vocab_size * config.hidden_size  # on the last stage, for MTP and head
    biases = 4 * config.n_routed_experts  # gate biases: counted, but nothing of AdamW's
    parameters = facts["parameters"]["total"] + facts["parameters"]["mtp"] + copy_of_embedding
    held = sum(rank["optimizer_bytes"] for rank in facts["ranks"])
    assert abs(held - 8 * parameters) <= 8 * biases


# --- Two ranks


class Launched:
    """A launch of two ranks in the background."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fireflyer", "launch", "-n", "2", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ranks(self) -> list[int]:
        """Their process ids, by rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        spawned = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        return sorted(map(int, spawned))

    def wait_for(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not done():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.05)

    def ended(self, within_s: float) -> tuple[int, str]:
        """Exit code and what was said."""
        try:
            error = self.process.communicate(timeout=within_s)[1]
        finally:
            self.process.kill()
        return self.process.returncode, error


@pytest.fixture
def launched():
    started: list[Launched] = []

    def start(command: list[str]) -> Launched:
        started.append(Launched(command))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_stopped_and_gone_on_with_alone_is_the_run_of_one_process(launched, tmp_path):
    """Rank 1 is killed; two ranks with others' experts go on, and one of them is asked to stop; one process ends it."""
    text = write_text(tmp_path / "text.jsonl", 300)
    run_dir = tmp_path / "run"
    first = launched(pretrain(text, run_dir, parallel__zero=3))
    first.wait_for(lambda: len(rows(run_dir)) > 6)
    ranks = first.ranks()
    os.kill(ranks[1], signal.SIGKILL)
    code, said = first.ended(within_s=20)
    assert (code, said.count("\n")) == (1, 1), said
    assert "rank 1 was ended by SIGKILL" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)

    saved = int(newest_good_checkpoint(run_dir).name.removeprefix("step-"))
    second = launched(pretrain(text, run_dir, parallel__ep=2))
    second.wait_for(lambda: len(rows(run_dir)) > saved + 4)
    os.kill(second.ranks()[1], signal.SIGTERM)
    code, said = second.ended(within_s=60)
    assert (code, said.count("\n")) == (75, 1), said
    stopped = rows(run_dir)[-1]["step"]
    assert f"stopped and saved at step {stopped} of 400" in said
    assert newest_good_checkpoint(run_dir).name == f"step-{stopped:08d}"

    # Alone to its end, beside a run that was alone all the time.
    steps = stopped + 4
    recipe = tiny_recipe(text, **{key.replace(".", "__"): value for key, value in SIZES.items()})
    for folder in (run_dir, tmp_path / "alone"):
        seen: list[int] = []
        with pytest.raises(Exception, match="stopped and saved"):
            train(
                recipe,
                folder,
                on_event=lambda event, seen=seen: seen.append(getattr(getattr(event, "metrics", None), "step", 0)),
                should_stop=lambda seen=seen: max(seen) >= steps,
            )
    ours, theirs = rows(run_dir), rows(tmp_path / "alone")
    assert [row["step"] for row in ours] == list(range(1, steps + 1))
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio", "tokens"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5), (mine["step"], key)
    states = [
        json.loads((newest_good_checkpoint(run) / "trainer.json").read_text()) for run in (run_dir, tmp_path / "alone")
    ]
    assert states[0]["data"] == states[1]["data"]  # the same documents are read and used up, to the token


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_that_read_other_data_end_with_one_line(tmp_path):
    """Started by hand, as on two machines whose files of one name differ."""
    listener, port = taken_port()
    listener.close()
    processes = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_text(tmp_path / str(rank) / "text.jsonl", 100, seed=rank)
        started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "fireflyer", *pretrain(Path("text.jsonl"), tmp_path / "run")],
                cwd=tmp_path / str(rank),
                env={**os.environ, **{key: str(value) for key, value in started.items()}},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "rank 1 has another data or tokenizer than rank 0" in said[0]
    assert said[1] == ""
