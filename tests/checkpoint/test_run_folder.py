"""The lock, and metrics that are cut back to the checkpoint a run resumes from."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fireflyer.checkpoint.run_folder import MetricsLog, RunLock, read_metrics
from fireflyer.checkpoint.trainer_state import read_ema, read_trainer_state, write_trainer_state
from fireflyer.errors import UserError

HOLD = """
import pathlib, sys
from fireflyer.checkpoint.run_folder import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_second_process_is_refused_in_one_line_and_a_killed_one_holds_nothing(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"{tmp_path.name} is in use by another process \(pid {holder.pid}\)") as e:
            RunLock(tmp_path)
        assert "\n" not in str(e.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()}\n"
        with pytest.raises(UserError):
            RunLock(tmp_path)
    RunLock(tmp_path).release()


def write_rows(tmp_path: Path, steps: int) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    for step in range(1, steps + 1):
        log.append({"step": step, "loss": 1.0 / step})
    log.sync()
    log.close()


def test_metrics_are_cut_back_on_resume(tmp_path: Path):
    write_rows(tmp_path, 5)
    log = MetricsLog(tmp_path, resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    log.append({"step": 4, "loss": 0.5})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 1 / 3},
        {"step": 4, "loss": 0.5},
    ]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}', "\x00" * 20])
def test_torn_last_line_is_dropped(torn: str, tmp_path: Path):
    write_rows(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)  # no newline: the kill came within the line
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    MetricsLog(tmp_path, resume_step=9).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_each_line_reaches_the_kernel_before_the_next_step(tmp_path: Path):
    log = MetricsLog(tmp_path, resume_step=0)
    log.append({"step": 1})
    assert read_metrics(tmp_path) == [{"step": 1}]
    with pytest.raises(ValueError, match="JSON"):
        log.append({"step": 2, "loss": math.nan})
    log.close()


def test_full_disk_under_the_metrics_is_one_line(tmp_path: Path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    log = MetricsLog(tmp_path, resume_step=0)
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics.jsonl can't be written: No space left"):
        log.append({"step": 1})
    log.close()


def test_trainer_state_keeps_bits_and_dtypes(tmp_path: Path):
    tensors = {
        "optimizer.model.norm.weight.exp_avg": torch.tensor([1e-40, 1.0 + 2**-23, -0.0]),
        "optimizer.model.norm.weight.step": torch.tensor(7.0),
        "rng.torch": torch.get_rng_state(),
        "ema.model.norm.weight": torch.tensor([0.1], dtype=torch.float32),
    }
    state = {"step": 3, "data": {"cursor": [1, 2]}, "train_s": 0.1 + 0.2}
    write_trainer_state(tmp_path, tensors, state)
    read, read_state = read_trainer_state(tmp_path)
    assert read_state == state
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].numpy().tobytes() == tensor.numpy().tobytes()
    ema = read_ema(tmp_path)
    assert list(ema) == ["model.norm.weight"]
    assert ema["model.norm.weight"].item() == tensors["ema.model.norm.weight"].item()
    assert read_ema(tmp_path / "elsewhere") == {}
